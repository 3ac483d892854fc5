"""The finished part of a study, read from OUTPUT: what a report is made of. No model is loaded."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from sdft import files
from sdft.study import results
from sdft.study.measures import Array
from sdft.study.spec import Cell, Method, Study, run_folders
from sdft.training.metrics import read_metrics

Accuracies = dict[str, float]  # set -> accuracy


@dataclass(frozen=True)
class Row:
    """A method at a learning rate."""

    method: Method
    rate: float
    cells: list[tuple[Cell, list[dict[str, Any]]]]  # by seed, with the results of at least one stage
    complete: dict[int, list[dict[str, Any]]]  # seed -> the results of all stages

    @property
    def complete_cells(self) -> list[Cell]:
        """The cells whose stages are all finished, by seed."""
        return [cell for cell, _ in self.cells if cell.seed in self.complete]

    @property
    def key(self) -> list[str]:
        """The first three columns of the row in a table: method, learning rate, finished seeds."""
        return [self.method.name, f"{self.rate:g}", str(len(self.complete))]

    def last(self, measure: Callable[[Accuracies], float]) -> list[float]:
        """A measure of the accuracies after the last stage, one value for each complete seed."""
        return [measure(stages[-1]["accuracy"]) for stages in self.complete.values()]


@dataclass(frozen=True)
class Found:
    study: Study
    base: Accuracies  # of the model before any training
    base_pass: dict[str, dict[str, float]]  # set -> {k: pass@k} of that model, if it was measured
    rows: list[Row]
    best: dict[str, Row] = field(default_factory=dict)  # method -> its best learning rate, if a cell is complete

    @property
    def complete_rows(self) -> list[Row]:
        return [row for row in self.rows if row.complete]

    @property
    def columns(self) -> list[str]:
        """The sets of the accuracy matrix: each task's accuracy set, then the prior skills."""
        return self.study.accuracy_sets + self.study.prior_skills

    def new(self, accuracy: Accuracies) -> float:
        """Mean accuracy over the tasks."""
        return mean(accuracy[name] for name in self.study.accuracy_sets)

    def prior(self, accuracy: Accuracies) -> float:
        """Mean accuracy over the prior skills; nan if there are none."""
        return mean(accuracy[name] for name in self.study.prior_skills) if self.study.prior_skills else math.nan

    def score(self, accuracy: Accuracies) -> float:
        """The measure by which the best learning rate is chosen."""
        return (self.new(accuracy) + self.prior(accuracy)) / 2 if self.study.prior_skills else self.new(accuracy)

    def matrix(self, stages: Sequence[dict[str, Any]]) -> Array:
        """(stages + 1, columns) accuracies; row 0 is the base."""
        return np.array([[a[c] for c in self.columns] for a in [self.base, *(stage["accuracy"] for stage in stages)]])


def collect(s: Study) -> Found:
    """Everything that is finished. Raises SdftError if the base is not, or if results are of other settings."""
    before = results.base_result(s)
    done = results.results(s)
    rows = []
    for method in s.methods:
        for rate in sorted(method.learning_rates):
            cells = [(c, st) for c, st in done if (c.method.name, c.learning_rate) == (method.name, rate)]
            rows.append(Row(method, rate, cells, {c.seed: st for c, st in cells if len(st) == len(s.tasks)}))
    found = Found(s, before["accuracy"], before.get("pass_at", {}), rows)
    for method in s.methods:
        own = [row for row in rows if row.method.name == method.name]
        most = max(len(row.complete) for row in own)
        if most:  # a rate with fewer seeds could win by one lucky seed; max takes the first of equals, the lowest rate
            equal = [row for row in own if len(row.complete) == most]
            found.best[method.name] = max(equal, key=lambda row: round(mean(row.last(found.score)), 12))
    return found


def stage_metrics(s: Study, cell: Cell, number: int) -> list[list[dict[str, Any]]]:
    """The lines of metrics.jsonl of each run of a stage; the steps of a run are counted on from the run before."""
    out, before = [], 0
    for folder in run_folders(s, cell, number):
        out.append([line | {"step": before + line["step"]} for line in read_metrics(folder)])
        before = max([before, *(line["step"] for line in out[-1])])
    return out


def answers_in(folder: Path, name: str) -> list[dict[str, Any]]:
    """The judged completions on an evaluation set; none if the file is not there."""
    path = folder / f"{name}.jsonl"
    return [line.row for line in files.read_json_lines(path)] if path.exists() else []
