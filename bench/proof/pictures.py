"""Three pictures of a proof: the loss by workspace, the loss and its peers, and whole steps."""

import math
from pathlib import Path
from typing import Any

from .phase import Row

# The colours of Okabe and Ito, which colour-blind readers can distinguish; markers separate lines of one colour.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX<>*hp"
PHASES = ("rollout", "score", "loss", "backward", "update")  # of a training step


def draw(path: Path, found: dict[str, Any]) -> list[Path]:
    """path-ours.png, path-peers.png and path-steps.png, without empty pictures; none if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = []
    for name, make in (("ours", by_workspace), ("peers", beside_peers), ("steps", steps)):
        rows = [row for entry in found["phases"].get(name, []) for row in entry["rows"]]
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        if make(axes, rows):
            axes.grid(alpha=0.3)
            axes.set_title(found["meta"].get("device", ""), fontsize=10)
            figure.legend(loc="outside right upper", fontsize=8, frameon=False)
            drawn.append(path.with_name(f"{path.name}-{name}.png"))
            figure.savefig(drawn[-1], dpi=150)
        plt.close(figure)
    return drawn


def by_workspace(axes: Any, rows: list[Row]) -> bool:
    """Share of the bare products by workspace, the bound of the costs dashed."""
    rows = [row for row in rows if row.get("workspace") and "of the floor" in row and not row["trainer"]]
    names = dict.fromkeys((row["model"], row["head"], row["impl"]) for row in rows)
    for i, name in enumerate(names):
        mine = [row for row in rows if (row["model"], row["head"], row["impl"]) == name]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        sizes = [row["workspace"] / 2**20 for row in mine]
        axes.plot(sizes, [row["of the floor"] for row in mine], label=", ".join(name), **style)
        if all("bound" in row for row in mine):
            axes.plot(sizes, [row["bound"] for row in mine], ls="--", color=style["color"], alpha=0.5)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["workspace"] / 2**20 for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel="workspace, MiB; dashed: the bound by bench.roofline", ylabel="time of the bare products / time")
    axes.set_ylim(0, 1.05)
    return bool(rows)


def beside_peers(axes: Any, rows: list[Row]) -> bool:
    """Time over memory of each loss on the first case, relative to the bare products."""
    rows = [row for row in rows if "of the floor" in row and row.get("extra MB") is not None]
    if not rows:
        return False
    keys = ("model", "N", "divergence", "head")
    rows = [row for row in rows if all(row[key] == rows[0][key] for key in keys)]
    for i, row in enumerate(rows):
        fill = "none" if "note" in row else "full"
        axes.plot(
            max(row["extra MB"], 1), row["of the floor"], ls="", label=row["variant"], fillstyle=fill,
            color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
        )  # fmt: skip
    axes.set_xscale("log")
    ends = [math.log10(max(row["extra MB"], 1)) for row in rows]
    axes.set_xlim(
        10 ** math.floor(min(ends)), 10 ** math.ceil(max(ends) + 0.01)
    )  # whole decades, so that there is a tick at both ends
    case = ", ".join(str(rows[0][key]) for key in keys)
    axes.set(xlabel=f"extra memory, MB ({case}; hollow: inexact)", ylabel="time of the bare products / time")
    axes.set_ylim(0, 1.05)
    return True


def steps(axes: Any, rows: list[Row]) -> bool:
    """Seconds of a step by phase."""
    rows = [row for row in rows if "seconds" in row]
    labels = [f"{row['shape'].partition(',')[0]}\n{row['contender']}" for row in rows]
    bottom = [0.0] * len(rows)
    for i, phase in enumerate(PHASES):
        values = [row[phase] for row in rows]
        axes.bar(range(len(rows)), values, bottom=bottom, label=phase, color=COLOURS[(i + 1) % len(COLOURS)])
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.set_xticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylabel("seconds a step")
    return bool(rows)
