"""The report of a study: report.md with its pictures, and report.html in one file.

Everything is read from what the study left in OUTPUT (see study.py); no model is loaded and nothing is run. The same
files give the same bytes.
"""

import base64
import html
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from sdft import files
from sdft.config import describe
from sdft.errors import SdftError
from sdft.study import measures, pictures, study
from sdft.study.study import Cell, Method, Study
from sdft.training.metrics import read_metrics

SAMPLES = 3  # records of each evaluation set whose answers are shown
LONGEST = 240  # characters of an answer that are shown
CLEAR = 3  # methods of which the ways of all learning rates are drawn; of more, of the best rate alone
DRAWN = 30  # points of a training curve, each the mean over a block of steps

# What a document is made of. All text is plain: it is escaped where it is written.


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Items:
    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1  # columns of words; the rest are numbers, aligned right


@dataclass(frozen=True)
class Picture:
    name: str
    title: str  # what a reader who cannot see it is told, before the caption
    png: bytes
    caption: str


Block = Heading | Text | Items | Table | Picture


def write_report(s: Study) -> Path:
    """Writes OUTPUT/report.html, OUTPUT/report.md and OUTPUT/report/*.png, each whole or not at all; returns report.md.

    Of a study that is not finished, what there is, and what is missing. Raises SdftError where no stage is finished, or
    where OUTPUT is that of other settings.
    """
    found = collect(s)
    if not any(row.cells for row in found.rows):
        raise SdftError(f"{s.output}: no stage is finished yet, so there is nothing to report; run `sdft study` first")
    blocks = document(found)
    for block in blocks:
        if isinstance(block, Picture):
            files.write_bytes(s.output / "report" / f"{block.name}.png", block.png)
    files.write_text(s.output / "report.html", to_html(blocks))
    files.write_text(s.output / "report.md", to_markdown(blocks))
    return s.output / "report.md"


# What was found.


@dataclass(frozen=True)
class Row:
    """A method at a learning rate."""

    method: Method
    rate: float
    cells: list[tuple[Cell, list[dict[str, Any]]]]  # by seed, with their finished stages, one at least
    complete: dict[int, list[dict[str, Any]]]  # seed -> all stages


@dataclass(frozen=True)
class Found:
    study: Study
    base: dict[str, Any]  # accuracy by set
    base_pass: dict[str, dict[str, float]]  # pass@k by set, where it was measured
    rows: list[Row]
    best: dict[str, Row]  # method -> its best learning rate; without methods of which no cell is complete

    @property
    def columns(self) -> list[str]:
        """The sets of the accuracy matrix: each task's own, then the prior skills."""
        return [self.study.measure(t) for t in self.study.tasks] + list(self.study.prior_skills)

    def new(self, accuracy: dict[str, float]) -> float:
        """Mean accuracy of the tasks."""
        return mean(accuracy[self.study.measure(t)] for t in self.study.tasks)

    def prior(self, accuracy: dict[str, float]) -> float:
        """Mean accuracy of the prior skills; nan without any."""
        return mean(accuracy[name] for name in self.study.prior_skills) if self.study.prior_skills else math.nan

    def score(self, accuracy: dict[str, float]) -> float:
        """What the best learning rate is chosen by."""
        return (self.new(accuracy) + self.prior(accuracy)) / 2 if self.study.prior_skills else self.new(accuracy)

    def over_seeds(self, row: Row, measure: Callable[[dict[str, float]], float]) -> list[float]:
        """A measure of the accuracies after the last stage, one for each complete seed."""
        return [measure(stages[-1]["accuracy"]) for stages in row.complete.values()]

    def matrix(self, stages: Sequence[dict[str, Any]]) -> measures.Array:
        """(stages + 1, columns) accuracies, row 0 the base."""
        return np.array([[a[c] for c in self.columns] for a in [self.base, *(stage["accuracy"] for stage in stages)]])


def collect(s: Study) -> Found:
    """Everything that is finished. Raises SdftError where the base is not, or where results are of other settings."""
    before = study.base_result(s)
    done = study.results(s)
    rows = []
    for method in s.methods:
        for rate in sorted(method.learning_rates):
            cells = [(c, st) for c, st in done if (c.method.name, c.learning_rate) == (method.name, rate)]
            rows.append(Row(method, rate, cells, {c.seed: st for c, st in cells if len(st) == len(s.tasks)}))
    found = Found(s, before["accuracy"], before.get("pass_at", {}), rows, {})
    for method in s.methods:
        own = [row for row in rows if row.method.name == method.name]
        most = max(len(row.complete) for row in own)
        if most:  # a rate with fewer seeds than others could win by one lucky seed; max keeps the first, the lowest
            equal = [row for row in own if len(row.complete) == most]
            found.best[method.name] = max(equal, key=lambda row: round(mean(found.over_seeds(row, found.score)), 12))
    return found


# The document.


def document(f: Found) -> list[Block]:
    """The whole report."""
    s = f.study
    blocks: list[Block] = [
        Heading(f"Study: {s.output.name}", 1),
        Text(
            f"Model {s.config.model.name}; tasks in the order learned: {', '.join(t.name for t in s.tasks)}; "
            f"seeds {', '.join(map(str, s.seeds))}. Accuracies are in percent, by greedy generation, each record by "
            "its own check. After a mean, in brackets, stands its 95% bootstrap interval over the seeds. "
            "docs/measures.md has every formula with its source."
        ),
        Heading("Methods", 3),
        Items(list(_described(s))),
        Heading("What was measured", 3),
        _sets(f),
        *_missing(f),
    ]
    blocks += [Heading("New skills against prior skills"), *_pareto(f)]
    if f.best:
        blocks += [Heading("Accuracy after the last stage"), *_final(f)]
        blocks += [Heading("Learning and forgetting"), *_transfer(f)]
        blocks += [Heading("Each method at its best learning rate"), *_best(f), *_compared(f)]
        blocks += [Heading("How far from the base"), *_drift(f)]
        blocks += [Heading("Stage by stage"), *_stages(f)]
        blocks += [Heading("How it trained"), *_training(f)]
        blocks += [Heading("Answers side by side"), *_answers(f)]
        blocks += [Heading("Cost"), *_cost(f)]
    else:
        blocks.append(Text("No cell is finished through its last task yet: the tables follow when one is."))
    return blocks


def _described(s: Study) -> Iterator[str]:
    for method in s.methods:
        configs = study.stage_configs(s, Cell(method, method.learning_rates[0], s.seeds[0]), 0, s.config.model.name)
        yield f"{method.name}: " + " Then ".join(describe(c) for c in configs)


def _sets(f: Found) -> Table:
    role = {f.study.measure(t): f"task {t.name}: its accuracy" for t in f.study.tasks}
    role |= {name: "prior skill" for name in f.study.prior_skills}
    rows = []
    for name in f.study.sets:
        count = len(_answers_of(f.study.output / "base/answers", name))
        rows.append([name, role.get(name, "task, beside"), str(count or "–"), _percent(f.base[name])])
    return Table(["set", "what", "records", "base"], rows, names=2)


def _missing(f: Found) -> Iterator[Block]:
    s, stages = f.study, {cell.name: len(st) for row in f.rows for cell, st in row.cells}
    wanted = study.cells(s)
    lacking = [c.name for c in wanted if stages.get(c.name, 0) < len(s.tasks)]
    if lacking:
        yield Heading("What is missing", 3)
        yield Text(
            f"{len(wanted) - len(lacking)} of {len(wanted)} cells are finished. Tables and pictures hold finished "
            "cells alone, but for the Pareto picture of a stage, which holds what has finished that stage. Run "
            "`sdft study` again to go on. Missing:"
        )
        ends = {cell.name: f"; {why}" for cell in wanted if (why := study.failure(s, cell))}
        yield Items([f"{name}: {stages.get(name, 0)} of {len(s.tasks)} stages{ends.get(name, '')}" for name in lacking])


def _pareto(f: Found) -> Iterator[Block]:
    s = f.study
    if not s.prior_skills:
        yield Text("The study names no prior skills, so nothing can be said of what is lost of them.")
        return
    planes = []
    for number, task in enumerate(s.tasks):
        at = s.measure(task)
        curves: dict[str, list[tuple[float, float, float]]] = {}
        paths: dict[str, list[list[pictures.Point]]] = {}
        for row in f.rows:
            after = [stages[number]["accuracy"] for _, stages in row.cells if len(stages) > number]
            if after:
                point = (row.rate, mean(a[at] for a in after), mean(f.prior(a) for a in after))
                curves.setdefault(row.method.name, []).append(point)
                if len(s.methods) <= CLEAR or f.best.get(row.method.name, row) is row:
                    cells = [cell for cell, stages in row.cells if len(stages) > number]
                    paths.setdefault(row.method.name, []).append(_path(f, cells, number, at))
        if curves:
            title = f"after stage {number + 1}: {task.name}" if len(s.tasks) > 1 else task.name
            x = f"new skill {at}: accuracy (%)"
            planes.append(pictures.Plane(title, x, (f.base[at], f.prior(f.base)), curves, paths))
    if f.best and len(s.tasks) > 1:
        curves, paths = {}, {}
        for row in f.rows:
            if row.complete:
                stages = list(row.complete.values())
                over = [f.base, *({c: mean(st[n]["accuracy"][c] for st in stages) for c in f.columns}
                                  for n in range(len(s.tasks)))]  # fmt: skip
                path = [(f.new(a), f.prior(a)) for a in over]
                curves.setdefault(row.method.name, []).append((row.rate, *path[-1]))
                if len(s.methods) <= CLEAR or f.best[row.method.name] is row:
                    paths.setdefault(row.method.name, []).append(path)
        x = "mean over all tasks: accuracy (%)"
        planes.append(pictures.Plane("after the last stage", x, (f.new(f.base), f.prior(f.base)), curves, paths))
    last = planes[-1]
    of = ", at each method's best rate" if len(s.methods) > CLEAR else ""
    yield Picture(
        "pareto",
        "Pareto picture of new skill against prior skills",
        pictures.pareto(planes, _look(f)),
        "New skill (to the right) against the mean of the prior skills (up). A point is the mean over the seeds of a "
        "method at the learning rate beside it, and a thick line joins a method's rates. Thin lines are the way there: "
        "evaluations during the stage where the study made any (eval.every); in the last panel the base and the "
        f"stages{of}. Rings mark the points that no other beats in both.",
    )
    named = [("base", *last.base)] + [(f"{m} at {r:g}", x, y) for m, c in last.curves.items() for r, x, y in c]
    front = measures.pareto_front([point[1:] for point in named])
    yield Text(f"On the front ({last.title}): {', '.join(named[i][0] for i in front)}.")


def _path(f: Found, cells: Sequence[Cell], number: int, at: str) -> list[pictures.Point]:
    """(new, prior) at the evaluations within a stage, mean over the cells, where all of them have one."""
    seen = []
    for cell in cells:
        lines = [line for run in _metrics(f.study, cell, number) for line in run]
        points = {}
        for line in lines:
            accuracy = line.get("eval", {})
            if at in accuracy and all(name in accuracy for name in f.study.prior_skills):
                points[line["step"]] = (accuracy[at], f.prior(accuracy))
        seen.append(points)
    common = sorted(set.intersection(*(set(points) for points in seen)))
    return [(mean(p[step][0] for p in seen), mean(p[step][1] for p in seen)) for step in common]


def _final(f: Found) -> Iterator[Block]:
    beside = [name for name in f.study.sets if name not in f.columns]
    yield _accuracies(f, f.columns)
    if beside:
        yield Text("The tasks' other evaluation sets:")
        yield _accuracies(f, beside)
    if f.study.samples:
        yield from _pass_at(f)


def _pass_at(f: Found) -> Iterator[Block]:
    """pass@k after the last stage, of every task's accuracy set."""

    def last(stages: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
        return stages[-1].get("pass_at", {})  # not there where `samples` was added later

    for name in [f.study.measure(task) for task in f.study.tasks]:
        counts = {k for row in f.rows for st in row.complete.values() for k in last(st).get(name, {})}
        ks = sorted(counts, key=int)
        rows = []
        if name in f.base_pass:
            rows.append(["base", "", "", *(_percent(f.base_pass[name].get(k, math.nan)) for k in ks)])
        for row in f.rows:
            found = [last(st)[name] for st in row.complete.values() if last(st).get(name, {}).keys() == counts]
            if found and ks:
                values = [_interval([one[k] for one in found]) for k in ks]
                rows.append([row.method.name, f"{row.rate:g}", str(len(found)), *values])
        if ks:
            yield Text(f"Of {ks[-1]} sampled answers to each prompt of {name}, the chance that one of k is right:")
            yield Table(["method", "learning rate", "seeds", *(f"pass@{k}" for k in ks)], rows)


def _accuracies(f: Found, columns: Sequence[str]) -> Table:
    rows = [["base", "", "", *(_percent(f.base[c]) for c in columns)]]
    for row in f.rows:
        if row.complete:
            values = [_interval([st[-1]["accuracy"][c] for st in row.complete.values()]) for c in columns]
            rows.append([row.method.name, f"{row.rate:g}", str(len(row.complete)), *values])
    return Table(["method", "learning rate", "seeds", *columns], rows)


def _transfer(f: Found) -> Iterator[Block]:
    rows = []
    for row in f.rows:
        if row.complete:
            moved = [measures.transfer(f.matrix(st)) for st in row.complete.values()]
            values = [
                _interval([m.average for m in moved]),
                _interval([m.forgetting for m in moved]),
                _interval([m.backward for m in moved], "+"),
                _interval([m.forward for m in moved], "+"),
                _interval([p - f.prior(f.base) for p in f.over_seeds(row, f.prior)], "+"),
            ]
            rows.append([row.method.name, f"{row.rate:g}", str(len(row.complete)), *values])
    head = ["method", "learning rate", "seeds", "average accuracy", "forgetting", "backward transfer"]
    yield Table([*head, "forward transfer", "prior skills against the base"], rows)
    yield Text(
        "Average accuracy: of the tasks, after the last stage. Forgetting: fall from a task's best. Backward transfer: "
        "change since a task's own stage. Forward transfer: what earlier stages gave a task before its own. The last "
        "column is the change of the prior skills' mean. In percentage points but for the first."
        + (" One task has no transfer." if len(f.study.tasks) == 1 else "")
    )


def _best(f: Found) -> Iterator[Block]:
    what = "of the tasks' average accuracy and the prior skills'" if f.study.prior_skills else "of the tasks' accuracy"
    yield Text(
        f"The best learning rate of a method is that with the highest mean {what}, over its finished seeds; of rates "
        "with fewer finished seeds than another none is taken, and of equals the lowest. It is chosen and shown on the "
        "same records, so every method looks a little better here than it would on new ones."
    )
    rows = [
        [
            name,
            f"{row.rate:g}",
            str(len(row.complete)),
            *(_interval(f.over_seeds(row, value)) for value in (f.new, f.prior, f.score)),
        ]
        for name, row in f.best.items()
    ]
    base = ["base", "", "", *(_percent(value(f.base)) for value in (f.new, f.prior, f.score))]
    yield Table(["method", "learning rate", "seeds", "tasks", "prior skills", "mean of both"], [base, *rows])


def _compared(f: Found) -> Iterator[Block]:
    rows, most = [], 0
    for (first, a), (second, b) in combinations(f.best.items(), 2):
        common = [seed for seed in a.complete if seed in b.complete]
        if not common:
            rows.append([f"{first} minus {second}", "–", "no seed in common", "–", "–"])
            continue
        most = max(most, len(common))
        for what, value in (("tasks", f.new), ("prior skills", f.prior), ("mean of both", f.score)):
            x = [value(a.complete[seed][-1]["accuracy"]) for seed in common]
            y = [value(b.complete[seed][-1]["accuracy"]) for seed in common]
            if math.isnan(x[0]) or (what == "mean of both" and not f.study.prior_skills):
                continue
            pair = measures.paired(x, y)
            numbers = [str(len(common)), _shown(pair.difference, "+"), f"{pair.p:.3g}"]
            rows.append([f"{first} minus {second}", what, *numbers])
    if rows:
        yield Heading("Differences, seed by seed", 3)
        yield Table(["difference", "of", "seeds", "percentage points", "p"], rows, names=2)
        if most:
            yield Text(seeds_show(most))


def seeds_show(n: int) -> str:
    """What n seeds can and cannot show, in words."""
    text = (
        "p is that of the two-sided sign-flip test: how often chance gives a difference as large, were the methods "
        "alike. "
    )
    if n == 1:
        return text + "One seed shows nothing of chance: p is 1, and there is no interval. Run more seeds."
    least = 2 / 2**n
    text += f"With {n} seeds it is never below {least:.3g}"
    if least > 0.05:
        text += (
            f", so {n} seeds cannot show a difference at the 5% level, however large it is; six can. At "
            f"{least:.3g}, all seeds have the same sign. "
        )
    else:
        text += ". "
    if n == 3:
        text += (
            "The interval of three values is their range: it holds the median of all seeds in 75% of cases, not in 95%."
        )
    else:
        text += "The intervals of few seeds are too narrow: of five normal values they hold the mean in 83% of cases."
    return text + " Nothing is corrected for the number of comparisons."


def _stages(f: Found) -> Iterator[Block]:
    s = f.study
    stages = ["base", *(f"{n + 1}: {t.name}" for n, t in enumerate(s.tasks))]
    seeds = {name: np.stack([f.matrix(st) for st in row.complete.values()]) for name, row in f.best.items()}
    titles = {name: f"{name}, learning rate {f.best[name].rate:g}" for name in seeds}
    maps = {titles[name]: matrices.mean(axis=0) for name, matrices in seeds.items()}  # (stages + 1, columns) each
    yield Picture(
        "matrix",
        "Heat maps of the accuracy matrices",
        pictures.heat_maps(stages, f.columns, maps),
        "Accuracy in percent after every stage (rows, from the base down) on every set (columns), at each method's "
        "best learning rate, mean over the seeds. Dark is low.",
    )
    panels = {c: {name: m[:, :, i].T for name, m in seeds.items()} for i, c in enumerate(f.columns)}
    yield Picture(
        "stages",
        "Curves of accuracy over stages",
        pictures.over_stages(stages, panels, _look(f)),
        "The same as curves: accuracy over stages, each method at its best learning rate. Points are means, bars span "
        "the lowest and the highest seed.",
    )


def _training(f: Found) -> Iterator[Block]:
    s = f.study
    columns = [f"stage {n + 1}: {t.name}" for n, t in enumerate(s.tasks)]
    position: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for number, column in enumerate(columns):
        for name, row in f.best.items():
            cells = [cell for cell, _ in row.cells if cell.seed in row.complete]
            distils = [c.method.needs_teacher for c in study.stage_configs(s, cells[0], number, s.config.model.name)]
            runs = [_metrics(s, cell, number) for cell in cells]  # seed, phase, line
            if True in distils:
                last = len(distils) - 1 - distils[::-1].index(True)
                ends = _ends([run[last] for run in runs])
                if ends is not None:
                    position.setdefault(column, {})[name] = ends
            for quantity, key, teacher in QUANTITIES:
                series = _series(runs, key, [teacher in (None, has) for has in distils])
                if series[0]:
                    rows.setdefault(quantity, {}).setdefault(column, {})[name] = series
    if not rows and not position:
        yield Text("The runs' metrics.jsonl are not there.")
        return
    if position:
        yield Picture(
            "positions",
            "Curves of divergence by answer position",
            pictures.by_position(position, _look(f)),
            "Divergence from the teacher by position in the answer, of the methods that have a teacher: over the first "
            "tenth of the steps (dotted, hollow) and over the last (filled), mean over the seeds. Of several runs in a "
            "stage, the last with a teacher. Positions are grouped by powers of two.",
        )
    if rows:
        order = {quantity: rows[quantity] for quantity, _, _ in QUANTITIES if quantity in rows}
        yield Picture(
            "training",
            "Training curves",
            pictures.curves(columns, order, _look(f)),
            f"Each stage's training at the best learning rate, mean over the seeds, and over blocks of steps where "
            f"there are more than {DRAWN}. A divergence, a cross-entropy, and that of DFT, which is weighted, are "
            "different things: compare like with like. The answer is what was trained on: a sample, or the "
            "demonstration.",
        )


# A panel's label; the key in metrics.jsonl; of runs with a teacher, without one, or of all (None).
QUANTITIES = (
    ("divergence\n(nats a token)", "loss", True),
    ("cross-entropy\n(nats a token)", "loss", False),
    ("answer length\n(tokens)", "answer_tokens", None),
    ("student's entropy\n(nats a token)", "student_entropy", None),
)


def _metrics(s: Study, cell: Cell, number: int) -> list[list[dict[str, Any]]]:
    """The metrics.jsonl of a stage's runs, their steps counted on from one run to the next."""
    out, before = [], 0
    for config in study.stage_configs(s, cell, number, s.config.model.name):
        lines = read_metrics(Path(config.train.output))
        out.append([line | {"step": before + line["step"]} for line in lines])
        before = max([before, *(line["step"] for line in out[-1])])
    return out


def _ends(runs: Sequence[Sequence[dict[str, Any]]]) -> tuple[dict[str, float], dict[str, float]] | None:
    """Divergence by position over the first and the last tenth of the steps of these runs; None where not recorded."""
    first, last = [], []
    for lines in runs:
        steps = [line["loss_by_position"] for line in lines if line.get("loss_by_position")]
        tenth = max(1, len(steps) // 10)
        first += steps[:tenth]
        last += steps[-tenth:]
    return (_by_position(first), _by_position(last)) if first else None


def _by_position(lines: Sequence[dict[str, float | None]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for line in lines:
        for position, value in line.items():
            if value is not None:
                found.setdefault(position, []).append(value)
    return {p: mean(found[p]) for p in sorted(found, key=lambda p: int(p.split("-")[0]))}


def _series(
    runs: Sequence[Sequence[Sequence[dict[str, Any]]]], key: str, wanted: Sequence[bool]
) -> tuple[list[float], list[float]]:
    """Steps and values of the wanted phases, mean over seeds and blocks of steps."""
    values: dict[int, list[float]] = {}
    for phases in runs:
        for phase, want in zip(phases, wanted, strict=True):
            for line in phase if want else ():
                if "loss" in line and line.get(key) is not None:
                    values.setdefault(line["step"], []).append(line[key])
    steps = sorted(values)
    block = -(-len(steps) // DRAWN) or 1
    blocks = [steps[i : i + block] for i in range(0, len(steps), block)]
    return [mean(b) for b in blocks], [mean(v for step in b for v in values[step]) for b in blocks]


def _answers(f: Found) -> Iterator[Block]:
    s, seen, rows = f.study, {}, []
    for name, row in f.best.items():
        seed, last = min(row.complete, key=s.seeds.index), len(s.tasks) - 1
        seen[name] = study.stage_folder(s, Cell(row.method, row.rate, seed), last) / "answers"
    for column in f.columns:
        answers = [_answers_of(folder, column) for folder in (s.output / "base/answers", *seen.values())]
        same = zip(*answers, strict=False)  # a file that is missing leaves no record
        for record in sorted(same, key=_disagreement, reverse=True)[:SAMPLES]:  # equals stay in the file's order
            expected = " / ".join(record[0]["expected"])
            given = [("✓ " if a["correct"] else "✗ ") + _short(a["given"]) for a in record]
            rows.append([column, _short(record[0]["prompt"]), _short(expected), *given])
    if not rows:
        yield Text("The answers are not there.")
        return
    yield Text(
        f"After the last stage, each method at its best learning rate, with the first of its finished seeds. Of every "
        f"set the {SAMPLES} records on which base and methods disagree most (right answers times wrong ones), of "
        f"equals the first: not a fair sample. ✓ right, ✗ wrong; longer than {LONGEST} characters is cut (…)."
    )
    yield Table(["set", "request", "expected", "base", *seen], rows, names=4 + len(seen))


def _disagreement(answers: Sequence[dict[str, Any]]) -> int:
    right = sum(a["correct"] for a in answers)
    return right * (len(answers) - right)


def _answers_of(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    return [line.row for line in files.read_json_lines(path)] if path.exists() else []


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST].rstrip() + "…"


def _drift(f: Found) -> Iterator[Block]:
    kinds = {"new": "prompts of the last task"}
    kinds["prior"] = "prompts of nothing learned" if f.study.drift_on else "prompts of prior skills"
    rows = []
    for name, row in f.best.items():
        for kind, words in kinds.items():
            found = [
                stages[-1]["drift"][kind] for stages in row.complete.values() if kind in stages[-1].get("drift", {})
            ]
            if found:
                keys = ("kl_to_base", "kl_from_base", "entropy", "base_entropy", "answer_tokens")
                rows.append([name, words, str(len(found)), *(f"{mean(one[k] for one in found):.3g}" for k in keys)])
    if not rows:
        yield Text("Not measured.")
        return
    head = ["KL(model, base)", "KL(base, model)", "entropy", "base's entropy", "tokens an answer"]
    yield Table(["method", "along answers to", "seeds", *head], rows, names=2)
    yield Text(
        "After the last stage, at each method's best rate, means over the seeds. Along the model's own greedy answers: "
        "divergences and entropies in nats a token, over the whole vocabulary."
    )


def _cost(f: Found) -> Iterator[Block]:
    rows = []
    for row in f.rows:
        if row.complete:
            totals: dict[str, list[float]] = {"tokens": [], "flops": [], "steps": [], "train": [], "evaluate": []}
            for cell in [cell for cell, _ in row.cells if cell.seed in row.complete]:
                stages = row.complete[cell.seed]
                lines = [x for n in range(len(stages)) for run in _metrics(f.study, cell, n) for x in run]
                spent = sum(sum(x.get("seconds", {}).values()) for x in lines)
                totals["tokens"].append(sum(st["tokens"] for st in stages))
                totals["flops"].append(sum(st.get("flops", math.nan) for st in stages) / 1e12)
                totals["steps"].append(spent if lines else math.nan)
                for key in ("train", "evaluate"):
                    totals[key].append(sum(st["seconds"][key] for st in stages))
            numbers = ["–" if math.isnan(mean(v)) else f"{mean(v):,.0f}" for v in totals.values()]
            rows.append([row.method.name, f"{row.rate:g}", str(len(row.complete)), *numbers])
    head = ["method", "learning rate", "seeds", "answer tokens", "TFLOP", "seconds in steps"]
    yield Table([*head, "seconds of training", "seconds of evaluating"], rows)
    yield Text(
        "Of one seed through all stages, mean over the seeds. Answer tokens: sampled, or of the demonstrations trained "
        "on. TFLOP: 1e12 operations of the training, the model's own (docs/measures.md). Training includes loading, "
        "evaluations on the way and saving; of a stage that was interrupted it counts since it went on, while the "
        "seconds in steps count all of them."
    )


def _look(f: Found) -> dict[str, pictures.Style]:
    return pictures.styles([method.name for method in f.study.methods])


# Numbers.


def _percent(value: float, sign: str = "") -> str:
    if math.isnan(value):
        return "–"
    points = round(100 * value, 1) + 0.0  # no -0.0
    return f"{points:{sign}.1f}" if points else "0.0"


def _shown(found: measures.Interval, sign: str = "") -> str:
    if found.n == 1:
        return _percent(found.mean, sign)
    return f"{_percent(found.mean, sign)} ({_percent(found.low, sign)} to {_percent(found.high, sign)})"


def _interval(values: Sequence[float], sign: str = "") -> str:
    return "–" if any(math.isnan(v) for v in values) else _shown(measures.interval(values), sign)


# Writing.


def to_markdown(blocks: Sequence[Block]) -> str:
    """The document as Markdown, pictures in the folder report/."""
    out = []
    for block in blocks:
        if isinstance(block, Heading):
            out.append("#" * block.level + " " + markdown_text(block.text))
        elif isinstance(block, Text):
            out.append(markdown_text(block.text))
        elif isinstance(block, Items):
            out.append("\n".join(f"- {markdown_text(text)}" for text in block.texts))
        elif isinstance(block, Table):
            rule = "|---" * block.names + "|---:" * (len(block.head) - block.names) + "|"
            lines = ["| " + " | ".join(map(markdown_text, row)) + " |" for row in (block.head, *block.rows)]
            out.append("\n".join([lines[0], rule, *lines[1:]]))
        else:
            out.append(f"![{markdown_text(block.title)}](report/{block.name}.png)\n\n{markdown_text(block.caption)}")
    return "\n\n".join(out) + "\n"


def markdown_text(text: str) -> str:
    """Plain text that Markdown shows as it is, on one line: no markup, no HTML, no links, no columns."""
    text = html.escape(_one_line(text), quote=False)
    text = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", text)
    return text.replace("://", "&#58;//").replace("www.", "www&#46;")


def to_html(blocks: Sequence[Block]) -> str:
    """The document as one HTML file that needs nothing else."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    out = []
    for block in blocks:
        if isinstance(block, Heading):
            out.append(f"<h{block.level}>{html_text(block.text)}</h{block.level}>")
        elif isinstance(block, Text):
            out.append(f"<p>{html_text(block.text)}</p>")
        elif isinstance(block, Items):
            out.append("<ul>\n" + "\n".join(f"<li>{html_text(text)}</li>" for text in block.texts) + "\n</ul>")
        elif isinstance(block, Table):
            out.append(_html_table(block))
        else:
            data = base64.b64encode(block.png).decode()
            image = f'<img alt="{html_text(block.title)}" src="data:image/png;base64,{data}">'
            out.append(f"<figure>{image}\n<figcaption>{html_text(block.caption)}</figcaption></figure>")
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html_text(title)}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(out) + "\n</body>\n</html>\n"


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="word"' if i < table.names else "" for i in range(len(cells))]
        return "".join(f"<{tag}{k}>{html_text(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True))

    body = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows)
    head = f"<thead><tr>{row(table.head, 'th')}</tr></thead>"
    return f'<div class="wide"><table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table></div>'


def html_text(text: str) -> str:
    """Plain text for HTML, inside an attribute too."""
    return html.escape(_one_line(text))


def _one_line(text: str) -> str:
    """Line breaks as a sign; what UTF-8 or HTML does not allow (an answer may hold anything) as another."""
    text = re.sub(r"\s*[\r\n\x0b\x0c\x85\u2028\u2029]\s*", " ⏎ ", text.strip())
    return re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "�", text)


CSS = """\
body { font: 16px/1.5 system-ui, sans-serif; color: #111; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
p, li, figcaption { max-width: 48rem; }
figure { margin: 1.5rem 0; break-inside: avoid; }
figure img { max-width: 100%; height: auto; }
figcaption { font-size: 0.9rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #bbb; padding: 0.25rem 0.6rem; text-align: right; vertical-align: top; }
thead th { border-bottom: 2px solid #111; }
th.word, td.word { text-align: left; overflow-wrap: anywhere; }
tr { break-inside: avoid; }
@media print { body { max-width: none; margin: 0; font-size: 11pt; } .wide { overflow: visible; } }
"""
