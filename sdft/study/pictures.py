"""The pictures of a study's report, from plain numbers.

The colours are those of Okabe & Ito (2008), which colour-blind readers can distinguish. Every method also has its own
marker and line, so a print in black and white can be read. Accuracies are given as fractions and drawn in percent.
"""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import numpy as np

from sdft.study.measures import Array, pareto_front

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
# The places of a point's label, in points of print; a method's usual place is one of the first four.
SIDES = ((6, 5), (6, -11), (-6, 5), (-6, -11), (6, 14), (-6, 14), (6, -20), (-6, -20))
DPI = 150
Point = tuple[float, float]
P = ParamSpec("P")


@dataclass(frozen=True)
class Style:
    """How a method looks in every picture."""

    color: str
    marker: str
    line: Any
    label_at: tuple[int, int]


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """By name; the combinations of colour, marker and line repeat after 210 methods."""
    return {
        name: Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)], SIDES[i % 4])
        for i, name in enumerate(methods)
    }


def _plain(draw: Callable[P, bytes]) -> Callable[P, bytes]:
    """Draws with matplotlib's defaults, whatever is in the user's matplotlibrc."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> bytes:
        import matplotlib.style

        with matplotlib.style.context("default", after_reset=True):
            return draw(*args, **options)

    return drawn


@dataclass(frozen=True)
class Plane:
    """New skill against prior skill: one panel."""

    title: str
    x_label: str
    base: Point
    curves: Mapping[str, Sequence[tuple[float, float, float]]]  # method -> (learning rate, new, prior), rates rising
    paths: Mapping[str, Sequence[Sequence[Point]]]  # method -> of each rate, (new, prior) while it trains


@_plain
def pareto(planes: Sequence[Plane], look: Mapping[str, Style]) -> bytes:
    """A PNG of one panel a plane; the points that no other beats, the base among them, are ringed."""
    from matplotlib.patheffects import withStroke

    figure, axes = _figure(len(planes), 5.2, 4.4, across=2)  # two panels in a row can be read on a page
    for axis, plane in zip(axes.flat, planes, strict=False):
        points = [plane.base]
        for name, curve in plane.curves.items():
            style = look[name]
            for path in plane.paths.get(name, ()):
                axis.plot(*_percent(path), color=style.color, linewidth=0.8, alpha=0.55, marker=".", markersize=2.5)
            where = [(x, y) for _, x, y in curve]
            points += where
            axis.plot(
                *_percent(where), color=style.color, linestyle=style.line, marker=style.marker, markersize=6,
                linewidth=2, label=name, zorder=3,
            )  # fmt: skip
        for (name, rate, at), side in label_sides(plane, look).items():
            axis.annotate(
                f"{rate:g}", (100 * at[0], 100 * at[1]), xytext=side, textcoords="offset points", fontsize=7,
                color=look[name].color, ha="left" if side[0] > 0 else "right", zorder=5,
                path_effects=[withStroke(linewidth=1.8, foreground="white")],
            )  # fmt: skip
        front = [points[i] for i in pareto_front(points)]
        axis.plot(*_percent(front), color="0.45", linestyle=":", linewidth=1.2, zorder=2)
        axis.plot(
            *_percent(front), color="black", linestyle="none", marker="o", markersize=12, fillstyle="none",
            label="Pareto front", zorder=4,
        )  # fmt: skip
        axis.plot(
            *_percent([plane.base]), color="black", marker="*", markersize=13, linestyle="none", label="base", zorder=4
        )
        axis.set(title=plane.title, xlabel=plane.x_label, ylabel="prior skills: accuracy (%)")
        axis.margins(0.1)
        axis.grid(alpha=0.25)
    _legend(figure, axes.flat[0])
    return _png(figure)


PANEL = (300, 250)  # of a Pareto plane's axes without their margins, in points of print, about
MARK, LETTER = 5, (4.5, 8)  # half a marker's width, and a small letter's width and height, likewise


def label_sides(plane: Plane, look: Mapping[str, Style]) -> dict[tuple[str, float, Point], tuple[int, int]]:
    """(method, rate, point) -> the side of the point at which its learning rate is written.

    It is the method's usual side, or the one of SIDES at which the label covers the fewest other points and labels.
    """
    marks = [(name, rate, (x, y)) for name, curve in plane.curves.items() for rate, x, y in curve]
    at = np.array([plane.base, *(point for _, _, point in marks)])  # (points, 2), the base first
    spans = np.ptp(at, axis=0)
    at = (at - at.min(axis=0)) / np.where(spans > 0, spans, 1.0) * PANEL
    taken = [(x - MARK, x + MARK, y - MARK, y + MARK) for x, y in at]  # left, right, bottom, top

    def box(i: int, side: tuple[int, int]) -> tuple[float, float, float, float]:
        left, bottom = at[i] + side
        wide = LETTER[0] * len(f"{marks[i - 1][1]:g}")
        return left - wide * (side[0] < 0), left + wide * (side[0] > 0), bottom, bottom + LETTER[1]

    def covered(one: tuple[float, float, float, float]) -> int:
        return sum(one[0] < r and left < one[1] and one[2] < t and b < one[3] for left, r, b, t in taken)

    found = {}
    for i, mark in enumerate(marks, start=1):
        own = look[mark[0]].label_at
        side = min((own, *SIDES), key=lambda side: covered(box(i, side)))
        taken.append(box(i, side))
        found[mark] = side
    return found


@_plain
def heat_maps(rows: Sequence[str], columns: Sequence[str], matrices: Mapping[str, Array]) -> bytes:
    """A PNG of accuracy matrices, (rows, columns) each; dark is low, and every number stands in its cell."""
    figure, axes = _figure(len(matrices), max(3.0, 1.3 + 0.75 * len(columns)), 1.3 + 0.42 * len(rows))
    for axis, (title, matrix) in zip(axes.flat, matrices.items(), strict=False):
        axis.imshow(matrix, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(matrix):
            color = "black" if value > 0.45 else "white"
            axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=10)
        axis.set(title=title)
        axis.set_xticks(range(len(columns)), columns, rotation=25, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return _png(figure)


@_plain
def over_stages(stages: Sequence[str], panels: Mapping[str, Mapping[str, Array]], look: Mapping[str, Style]) -> bytes:
    """A PNG: accuracy over stages. panels: title -> method -> (stages, seeds); bars span the seeds."""
    figure, axes = _figure(len(panels), 3.9, 3.0, sharey=True)
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for i, (name, values) in enumerate(lines.items()):
            style, percent = look[name], 100 * values  # (stages, seeds)
            middle = percent.mean(axis=1)
            spread = np.abs(np.stack([percent.min(axis=1), percent.max(axis=1)]) - middle)  # (2, stages)
            x = np.arange(len(stages)) + 0.06 * (i - (len(lines) - 1) / 2)  # shifted, so bars do not cover each other
            axis.errorbar(
                x, middle, spread, color=style.color, linestyle=style.line, marker=style.marker, markersize=5,
                capsize=3, elinewidth=1, label=name,
            )  # fmt: skip
        axis.set(title=title, ylim=(-4, 104))
        axis.set_xticks(range(len(stages)), stages, rotation=20, ha="right", rotation_mode="anchor", fontsize=8)
        axis.grid(alpha=0.25)
    for row in axes:
        row[0].set_ylabel("accuracy (%)")
    _legend(figure, axes.flat[0])
    return _png(figure)


@_plain
def by_position(
    panels: Mapping[str, Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]]], look: Mapping[str, Style]
) -> bytes:
    """A PNG: divergence by position in the answer. panels: title -> method -> ({positions: nats} at the start, end)."""
    names = {p for lines in panels.values() for pair in lines.values() for part in pair for p in part}
    positions = sorted(names, key=lambda p: int(p.split("-")[0]))
    figure, axes = _figure(len(panels), 4.4, 3.2)
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, (start, end) in lines.items():
            style = look[name]
            for when, part, line, fill in (("start", start, ":", "none"), ("end", end, style.line, "full")):
                x = [positions.index(p) for p in part]
                axis.plot(
                    x, list(part.values()), color=style.color, linestyle=line, marker=style.marker, markersize=5,
                    fillstyle=fill, label=f"{name}, {when}",
                )  # fmt: skip
        axis.set(title=title, xlabel="position in the answer (tokens)", ylabel="divergence (nats a token)")
        ticks = [p.split("-")[0] if len(set(p.split("-"))) == 1 else p.replace("-", "–") for p in positions]
        axis.set_xticks(range(len(positions)), ticks, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    _legend(figure, *axes.flat[: len(panels)])
    return _png(figure)


@_plain
def curves(
    columns: Sequence[str],
    rows: Mapping[str, Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]],
    look: Mapping[str, Style],
) -> bytes:
    """A PNG of small training curves. rows: quantity with its unit -> column -> method -> (steps, values)."""
    figure, axes = _figure((len(rows), len(columns)), 4.2, 1.9, sharex="col")
    for line, (quantity, panels) in zip(axes, rows.items(), strict=True):
        for axis, column in zip(line, columns, strict=True):
            for name, (steps, values) in panels.get(column, {}).items():
                style = look[name]
                axis.plot(
                    steps, values, color=style.color, linestyle=style.line, linewidth=1.4, marker=style.marker,
                    markersize=3, markevery=max(1, len(steps) // 6), label=name,
                )  # fmt: skip
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=8)
        line[0].set_ylabel(quantity, fontsize=8)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    _legend(figure, *axes.flat)
    return _png(figure)


def _figure(
    panels: int | tuple[int, int], width: float, height: float, across: int = 3, **options: Any
) -> tuple[Any, Any]:
    """A figure and its (rows, columns) axes, of so many panels or so many rows and columns.

    width, height: of a panel, in inches. across: the most panels in a row. Panels beyond the number asked for are not
    drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if isinstance(panels, int):
        columns = 2 if panels == 4 else min(across, panels)
        rows = -(-panels // columns)
    else:
        rows, columns = panels
        panels = rows * columns
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for i, axis in enumerate(axes.flat):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_visible(i < panels)
    return figure, axes


def _percent(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [100 * x for x, _ in points], [100 * y for _, y in points]


def _legend(figure: Any, *axes: Any) -> None:
    """One legend below everything; each name once."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        entry = 1.0 + 0.075 * max(map(len, found))  # inches, about: a line and the letters of a name
        columns = max(1, min(len(found), int(figure.get_figwidth() / entry)))
        figure.legend(
            found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
            handlelength=3.5,
        )  # fmt: skip


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})  # no version: the same bytes each time
    return out.getvalue()
