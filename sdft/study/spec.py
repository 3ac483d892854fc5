"""A study's TOML file as a `Study`: its tasks, methods, cells, and the config of every run.

A cell is one method at one learning rate with one seed. It learns the tasks one after the other; each task is a stage,
and each stage starts from the weights that the stage before it left. A method with a grid of further settings stands
for as many methods, named METHOD/SETTING-VALUE.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pydantic.dataclasses

from sdft.config import STRICT, Config, Settings, config_keys, from_table, located, override, read_toml, validate
from sdft.errors import SdftError

BASE = "{base}"  # in a method's settings: the model that the study starts from
FIXED = ("model.name", "optim.lr", "train.seed", "train.output", "eval.sets")  # the study sets these in every run


@dataclass(frozen=True)
class Task:
    """A skill to learn in one stage."""

    name: str
    train: str  # file of training records
    eval: dict[str, str]  # name -> evaluation file; the accuracy on the first is the task's accuracy
    config: dict[str, Any]  # settings of the task's stage, by dotted name


@dataclass(frozen=True)
class Method:
    """A way to learn a task: one run, or several runs, each from the weights of the run before."""

    name: str
    phases: tuple[dict[str, Any], ...]  # settings of each run, by dotted name
    learning_rates: tuple[float, ...]
    point: dict[str, Any] = field(default_factory=dict)  # a point of the grid: further settings of every run

    @property
    def family(self) -> str:
        """The method's name in the file; all points of its grid share it."""
        return self.name.split("/")[0]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Harness(Settings):
    """Prior skills that lm-evaluation-harness measures; `evaluation.harness.run` explains the options."""

    tasks: dict[str, str] = field(default_factory=dict)  # task or group -> the metric that counts, such as acc
    limit: int | None = None
    include_path: str = ""
    fewshot: int | None = None
    chat: bool = False
    allow_code: bool = False


@dataclass(frozen=True)
class Study:
    """The contents of a study file."""

    output: Path
    seeds: tuple[int, ...]
    config: Config  # settings that all runs share
    settings: dict[str, Any]  # the same, only those that the file sets, by dotted name
    tasks: tuple[Task, ...]
    prior: dict[str, str]  # name -> evaluation file of a skill that the model has already
    methods: tuple[Method, ...]
    keep_weights: bool = False
    harness: Harness = field(default_factory=Harness)
    samples: int = 0  # completions sampled per prompt of a task's accuracy set, for pass@k; 0: no pass@k
    drift: int = 32  # prompts of each kind on which the distance from the base is measured; 0: it is not measured
    drift_on: str = ""  # records with prompts that no task trains; default: the prompts of `prior`

    @property
    def sets(self) -> dict[str, str]:
        """Name -> file of every evaluation set: TASK-NAME for the tasks' sets, and the prior skills."""
        return {f"{t.name}-{name}": path for t in self.tasks for name, path in t.eval.items()} | self.prior

    @property
    def prior_skills(self) -> list[str]:
        """Names of the prior skills: evaluation files and tasks of lm_eval."""
        return [*self.prior, *self.harness.tasks]

    @property
    def accuracy_sets(self) -> list[str]:
        """The evaluation set of each task whose accuracy is the task's accuracy."""
        return [self.accuracy_set(task) for task in self.tasks]

    def accuracy_set(self, task: Task) -> str:
        """The evaluation set whose accuracy is the task's accuracy."""
        return f"{task.name}-{next(iter(task.eval))}"


@dataclass(frozen=True)
class Cell:
    method: Method
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.name}/lr-{self.learning_rate:g}/seed-{self.seed}"


# Reading the file.

KEYS = {
    "output", "seeds", "learning_rates", "grid", "keep_weights", "config", "tasks", "prior", "harness", "drift",
    "drift_on", "samples", "methods",
}  # fmt: skip


def load_study(path: str | Path, model: str = "", output: str = "", with_data: bool = True) -> Study:
    """Reads a study file and checks its settings, its files and their records.

    model, output: replace the file's config.model.name and output. with_data: False checks the settings only, for a
    study whose data are not there yet. Raises SdftError with the file, the key and the fix.
    """
    where, table = f"study {path}", read_toml(path, "study")
    _check_tables(table, where)
    shared = {key: table.get(key, kind()) for key, kind in (("learning_rates", list), ("grid", dict))}
    settings = _settings(table["config"], f"{where}: config") | ({"model.name": model} if model else {})
    with located(f"{where}: harness"):
        harness = Harness(**table.get("harness", {}))
    study = Study(
        Path(output or table["output"]),
        tuple(_numbers(table.get("seeds", [0]), int, f"{where}: seeds")),
        from_table(_nested(settings), f"{where}: config"),
        settings,
        tuple(_task(row, f"{where}: tasks[{i}]") for i, row in enumerate(table["tasks"])),
        {str(k): str(v) for k, v in table.get("prior", {}).items()},
        tuple(m for name, row in table["methods"].items() for m in _methods(name, row, shared, where)),
        bool(table.get("keep_weights", False)),
        harness,
        **{key: table[key] for key in ("samples", "drift", "drift_on") if key in table},
    )
    _check(study, where)
    if with_data:
        _check_data(study)
    return study


def _check_tables(table: dict[str, Any], where: str) -> None:
    _only(table, KEYS, where)
    for key in ("output", "tasks", "methods", "config"):
        if not table.get(key):
            raise SdftError(f"{where}: {key} is missing")
    for key in ("config", "grid", "prior", "harness", "methods"):
        if not isinstance(table.get(key, {}), dict):
            raise SdftError(f"{where}: {key} = {table[key]!r} must be a table, [{key}]")
    for key, what in (("drift", "prompts"), ("samples", "completions of each prompt")):
        value = table.get(key, 0)
        if type(value) is not int or value < 0:
            raise SdftError(f"{where}: {key} = {value!r} must be a number of {what}, or 0")
    if not isinstance(table.get("drift_on", ""), str):
        raise SdftError(f"{where}: drift_on = {table['drift_on']!r} must be a file with records, such as prior.jsonl")


def _task(row: dict[str, Any], where: str) -> Task:
    _only(row, {"name", "train", "eval", "config"}, where)
    for key in ("name", "train", "eval"):
        if not row.get(key):
            raise SdftError(f"{where}: {key} is missing")
    if not isinstance(row["eval"], dict):
        raise SdftError(f"{where}: eval = {row['eval']!r} must name its files: eval = {{ test = {row['eval']!r} }}")
    return Task(row["name"], row["train"], dict(row["eval"]), _settings(row.get("config", {}), f"{where}.config"))


def _methods(name: str, row: dict[str, Any], shared: dict[str, Any], where: str) -> Iterator[Method]:
    """A method for every point of the grid. The grid of a method replaces the same keys of the study's grid."""
    where, row = f"{where}: methods.{name}", dict(row)
    own = row.pop("learning_rates", shared["learning_rates"])
    grid = _grid(shared["grid"], f"{where}: grid") | _grid(row.pop("grid", {}), f"{where}: grid")
    phases = row.pop("phases", None)
    if phases is not None and row:
        raise SdftError(f"{where}: give either phases or settings, not both ({', '.join(row)})")
    if not own:
        raise SdftError(f"{where}: learning_rates is missing; give it here or at the top, such as [1e-5, 2e-5]")
    settings = tuple(_settings(phase, where) for phase in (phases or [row]))
    rates = tuple(_numbers(own, float, f"{where}: learning_rates"))
    for values in product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        yield Method("/".join([name, *(f"{k}-{v}" for k, v in point.items())]), settings, rates, point)


def _grid(table: dict[str, Any], where: str) -> dict[str, tuple[Any, ...]]:
    """Dotted name -> values; each value is checked by itself."""
    grid = {}
    for key, values in _dotted(table).items():
        if key in FIXED:
            raise SdftError(f"{where}: the study sets {key} itself; give learning_rates and seeds at the top")
        names = [str(v) for v in values] if isinstance(values, list) else []
        if not names or len(set(names)) < len(names) or any("/" in name for name in names):
            raise SdftError(f"{where}: {key} = {values!r} must be a list of different values that can name a folder")
        for value in values:
            from_table(_nested({key: value}), where)
        grid[key] = tuple(values)
    return grid


def _settings(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Dotted name -> setting. Raises SdftError for unknown names and wrong types."""
    from_table(table, where)
    return _dotted(table)


def _dotted(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names; a setting that is itself a table stays a table."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, dict) and prefix + key not in config_keys()
        flat |= _dotted(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as nested tables."""
    table: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (table.setdefault(section, {}) if section else table)[name] = value
    return table


def _only(table: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise SdftError(f"{where}: unknown key {unknown[0]!r}; valid: {', '.join(sorted(known))}")


def _numbers(values: Any, kind: type, where: str) -> list[Any]:
    fits = isinstance(values, list) and values and all(type(v) in (int, kind) for v in values)
    if not fits or len(set(values)) < len(values):
        raise SdftError(f"{where} = {values!r} must be a list of different {'whole ' * (kind is int)}numbers")
    return [kind(v) for v in values]


def _check(study: Study, where: str) -> None:
    names = [task.name for task in study.tasks]
    if len(set(names)) < len(names):
        raise SdftError(f"{where}: two tasks have one name; names: {', '.join(names)}")
    twice = sorted(set(study.sets) & set(study.harness.tasks))
    if twice:
        raise SdftError(f"{where}: {twice[0]!r} is an evaluation file and a task of lm_eval; rename the file's")
    if any(math.isnan(c.learning_rate) or c.learning_rate <= 0 for c in cells(study)):
        raise SdftError(f"{where}: learning_rates must be above 0")
    for cell in cells(study):
        for number, task in enumerate(study.tasks):
            with located(f"{where}: {cell.name}, task {task.name}"):
                for config in stage_configs(study, cell, number, study.config.model.name):
                    validate(config)


def _check_data(study: Study) -> None:
    from sdft.data.formats import load_records
    from sdft.evaluation.accuracy import check_evaluable

    for path in dict.fromkeys([*(task.train for task in study.tasks), study.drift_on]):
        if path:
            load_records(path)
    for path in study.sets.values():
        check_evaluable(load_records(path))
    if study.harness.tasks:
        from sdft.evaluation import harness

        harness.check(list(study.harness.tasks), study.harness.limit, study.harness.include_path)


# Cells and the runs of their stages.


def cells(study: Study) -> list[Cell]:
    """Every cell, seed by seed, so that all methods can be compared as soon as the first seed is finished."""
    return [
        Cell(method, rate, seed) for seed in study.seeds for method in study.methods for rate in method.learning_rates
    ]


def stage_folder(study: Study, cell: Cell, number: int) -> Path:
    """The folder of a cell's stage; `number` counts from 0."""
    return study.output / cell.name / f"{number + 1}-{study.tasks[number].name}"


def stage_configs(study: Study, cell: Cell, number: int, start: str) -> list[Config]:
    """The config of every run of a stage; the first run starts from the model `start`.

    A later setting replaces an earlier one, in this order: the preset, the settings of the study, of the
    task, of the method's phase, of the grid, and the settings that the study always sets (FIXED).
    """
    task, folder = study.tasks[number], stage_folder(study, cell, number)
    own = {f"{task.name}-{name}": path for name, path in task.eval.items()}
    configs = []
    for i, phase in enumerate(cell.method.phases):
        settings = {"data.train": task.train} | study.settings | task.config | phase | cell.method.point
        settings = {k: study.config.model.name if v == BASE else v for k, v in settings.items()}
        output = folder / ("run" if i == 0 else f"run-{i + 1}")
        fixed = {
            "model.name": start,
            "optim.lr": cell.learning_rate,
            "train.seed": cell.seed,
            "train.output": str(output),
            "eval.sets": own | study.prior,
        }
        if number == 0 and i == 0:
            fixed["lora.earlier"] = ""  # the first run has no earlier adapter
        config = from_table(_nested(settings), f"methods.{cell.method.name}")
        configs.append(override(config, fixed))
        start = str(output / "model")
    return configs


def run_folders(study: Study, cell: Cell, number: int) -> list[Path]:
    """The folders of a stage's runs, in order."""
    return [Path(config.train.output) for config in stage_configs(study, cell, number, BASE)]
