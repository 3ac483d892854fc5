"""The sections of a report that are pictures."""

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

import numpy as np

from sdft.study import measures, pictures
from sdft.study.found import Found, Row, stage_metrics
from sdft.study.render import Block, Picture, Text
from sdft.study.spec import Cell, stage_configs

CLEAR = 3  # up to so many methods, every learning rate has its path; for more methods only the best rate has one
POINTS = 30  # of a training curve; each is the mean over a block of steps


def _look(f: Found) -> dict[str, pictures.Style]:
    return pictures.styles([method.name for method in f.study.methods])


# New skills against prior skills.


def pareto(f: Found) -> Iterator[Block]:
    """New skill against prior skills after every stage, and after all stages."""
    s = f.study
    if not s.prior_skills:
        yield Text("The study names no prior skills, so the report cannot show what was forgotten of them.")
        return
    planes = [plane for number in range(len(s.tasks)) if (plane := _stage_plane(f, number)).curves]
    if f.best and len(s.tasks) > 1:
        planes.append(_last_plane(f))
    of = ", at each method's best rate" if len(s.methods) > CLEAR else ""
    yield Picture(
        "pareto",
        "Pareto picture of new skill against prior skills",
        pictures.pareto(planes, _look(f)),
        "New skill (to the right) against the mean of the prior skills (up). A point is a method at the learning rate "
        "written next to it, mean over the seeds; a thick line joins the rates of a method. Thin lines show the way to "
        "a point: the evaluations during the stage, if the study made any (eval.every); in the last panel the base and "
        f"the stages{of}. Rings mark the points that no other point beats in both.",
    )
    last = planes[-1]
    named = [("base", *last.base)] + [(f"{m} at {r:g}", x, y) for m, c in last.curves.items() for r, x, y in c]
    front = measures.pareto_front([point[1:] for point in named])
    yield Text(f"On the front ({last.title}): {', '.join(named[i][0] for i in front)}.")


def _shows_way(f: Found, row: Row) -> bool:
    return len(f.study.methods) <= CLEAR or f.best.get(row.method.name, row) is row


def _stage_plane(f: Found, number: int) -> pictures.Plane:
    """The plane after a stage: its task against the prior skills."""
    task = f.study.tasks[number]
    at = f.study.accuracy_set(task)
    curves: dict[str, list[tuple[float, float, float]]] = {}
    paths: dict[str, list[list[pictures.Point]]] = {}
    for row in f.rows:
        reached = [(cell, stages[number]["accuracy"]) for cell, stages in row.cells if len(stages) > number]
        if reached:
            point = (row.rate, mean(a[at] for _, a in reached), mean(f.prior(a) for _, a in reached))
            curves.setdefault(row.method.name, []).append(point)
            if _shows_way(f, row):
                paths.setdefault(row.method.name, []).append(_path(f, [cell for cell, _ in reached], number, at))
    title = f"after stage {number + 1}: {task.name}" if len(f.study.tasks) > 1 else task.name
    return pictures.Plane(title, f"new skill {at}: accuracy (%)", (f.base[at], f.prior(f.base)), curves, paths)


def _last_plane(f: Found) -> pictures.Plane:
    """The plane after the last stage: the mean over all tasks against the prior skills."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    paths: dict[str, list[list[pictures.Point]]] = {}
    for row in f.complete_rows:
        stages = list(row.complete.values())
        means = [
            {c: mean(seed[number]["accuracy"][c] for seed in stages) for c in f.columns}
            for number in range(len(f.study.tasks))
        ]
        path = [(f.new(accuracy), f.prior(accuracy)) for accuracy in (f.base, *means)]
        curves.setdefault(row.method.name, []).append((row.rate, *path[-1]))
        if _shows_way(f, row):
            paths.setdefault(row.method.name, []).append(path)
    x = "mean over all tasks: accuracy (%)"
    return pictures.Plane("after the last stage", x, (f.new(f.base), f.prior(f.base)), curves, paths)


def _path(f: Found, cells: Sequence[Cell], number: int, at: str) -> list[pictures.Point]:
    """(new, prior) at the evaluations during a stage, mean over the cells; only steps that all cells evaluated."""
    seen = []
    for cell in cells:
        points = {}
        for run in stage_metrics(f.study, cell, number):
            for line in run:
                accuracy = line.get("eval", {})
                if at in accuracy and all(name in accuracy for name in f.study.prior_skills):
                    points[line["step"]] = (accuracy[at], f.prior(accuracy))
        seen.append(points)
    common = sorted(set.intersection(*(set(points) for points in seen)))
    return [(mean(p[step][0] for p in seen), mean(p[step][1] for p in seen)) for step in common]


# Stage by stage.


def stages(f: Found) -> Iterator[Block]:
    """Accuracy on every set after every stage, as heat maps and as curves."""
    names = ["base", *(f"{n + 1}: {t.name}" for n, t in enumerate(f.study.tasks))]
    seeds = {name: np.stack([f.matrix(st) for st in row.complete.values()]) for name, row in f.best.items()}
    maps = {
        f"{name}, learning rate {f.best[name].rate:g}": matrices.mean(axis=0)  # (stages + 1, columns)
        for name, matrices in seeds.items()
    }
    yield Picture(
        "matrix",
        "Heat maps of the accuracy matrices",
        pictures.heat_maps(names, f.columns, maps),
        "Accuracy in percent after every stage (rows, the base first) on every set (columns), each method at its best "
        "learning rate, mean over the seeds. Dark is low.",
    )
    panels = {c: {name: m[:, :, i].T for name, m in seeds.items()} for i, c in enumerate(f.columns)}
    yield Picture(
        "stages",
        "Curves of accuracy over stages",
        pictures.over_stages(names, panels, _look(f)),
        "The same as curves: accuracy over stages, each method at its best learning rate. Points are means; bars reach "
        "from the lowest seed to the highest.",
    )


# How it trained.

# A panel's label; the key in metrics.jsonl; whether it is of runs with a teacher, without one, or of all runs (None).
QUANTITIES = (
    ("divergence\n(nats a token)", "loss", True),
    ("cross-entropy\n(nats a token)", "loss", False),
    ("completion length\n(tokens)", "answer_tokens", None),
    ("student's entropy\n(nats a token)", "student_entropy", None),
)


def training(f: Found) -> Iterator[Block]:
    """Divergence by position, and training curves, each method at its best learning rate."""
    s = f.study
    columns = [f"stage {n + 1}: {t.name}" for n, t in enumerate(s.tasks)]
    positions: dict[str, dict[str, Any]] = {}
    curves: dict[str, dict[str, dict[str, Any]]] = {}
    for number, column in enumerate(columns):
        for name, row in f.best.items():
            cells = row.complete_cells
            distils = [c.method.needs_teacher for c in stage_configs(s, cells[0], number, s.config.model.name)]
            runs = [stage_metrics(s, cell, number) for cell in cells]  # seed, phase, line
            if True in distils:
                last = len(distils) - 1 - distils[::-1].index(True)
                ends = first_and_last([run[last] for run in runs])
                if ends is not None:
                    positions.setdefault(column, {})[name] = ends
            for quantity, key, teacher in QUANTITIES:
                curve = training_curve(runs, key, [teacher in (None, has) for has in distils])
                if curve[0]:
                    curves.setdefault(quantity, {}).setdefault(column, {})[name] = curve
    if not curves and not positions:
        yield Text("The runs' metrics.jsonl are not there.")
    if positions:
        yield Picture(
            "positions",
            "Curves of divergence by position in the completion",
            pictures.by_position(positions, _look(f)),
            "Divergence from the teacher by position in the completion, of the methods that have a teacher: over the "
            "first tenth of the steps (dotted, hollow) and over the last tenth (filled), mean over the seeds. If a "
            "stage has several runs, the last run with a teacher. Positions are grouped by powers of two.",
        )
    if curves:
        order = {quantity: curves[quantity] for quantity, _, _ in QUANTITIES if quantity in curves}
        yield Picture(
            "training",
            "Training curves",
            pictures.curves(columns, order, _look(f)),
            "The training of each stage at the best learning rate, mean over the seeds; if there are more than "
            f"{POINTS} steps, also mean over blocks of steps. A divergence, a cross-entropy, and DFT's weighted "
            "cross-entropy are different quantities: compare only curves of the same quantity. The completion is what "
            "was trained on: a rollout or the demonstration.",
        )


ByPosition = dict[str, float]  # group of positions -> mean divergence in nats


def first_and_last(runs: Sequence[Sequence[dict[str, Any]]]) -> tuple[ByPosition, ByPosition] | None:
    """Divergence by position over the first and over the last tenth of the steps; None if it was not recorded."""
    first, last = [], []
    for lines in runs:
        steps = [line["loss_by_position"] for line in lines if line.get("loss_by_position")]
        tenth = max(1, len(steps) // 10)
        first += steps[:tenth]
        last += steps[-tenth:]
    return (_by_position(first), _by_position(last)) if first else None


def _by_position(lines: Sequence[dict[str, float | None]]) -> ByPosition:
    found: dict[str, list[float]] = {}
    for line in lines:
        for position, value in line.items():
            if value is not None:
                found.setdefault(position, []).append(value)
    return {p: mean(found[p]) for p in sorted(found, key=lambda p: int(p.split("-")[0]))}


def training_curve(
    runs: Sequence[Sequence[Sequence[dict[str, Any]]]], key: str, wanted: Sequence[bool]
) -> tuple[list[float], list[float]]:
    """Steps and values of the wanted phases, mean over the seeds and over blocks of steps.

    runs: seed -> phase -> lines of metrics.jsonl. wanted: one for each phase.
    """
    values: dict[int, list[float]] = {}
    for phases in runs:
        for phase, want in zip(phases, wanted, strict=True):
            for line in phase if want else ():
                if "loss" in line and line.get(key) is not None:
                    values.setdefault(line["step"], []).append(line[key])
    steps = sorted(values)
    block = -(-len(steps) // POINTS) or 1
    blocks = [steps[i : i + block] for i in range(0, len(steps), block)]
    return [mean(b) for b in blocks], [mean(v for step in b for v in values[step]) for b in blocks]
