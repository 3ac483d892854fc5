"""`sdft study STUDY.toml`: tasks in sequence x methods x learning rates x seeds, every stage evaluated on everything.

A cell is one method at one learning rate with one seed. It learns the tasks one after the other, each stage from the
weights that the stage before left, and after every stage answers every evaluation set of every task and of the prior
skills. A method with a grid of further settings is as many methods, named METHOD/SETTING-VALUE. What a cell leaves
behind:

    OUTPUT/METHOD/lr-1e-05/seed-0/1-facts/result.json       accuracies, settings, tokens, seconds
                                          answers/SET.jsonl  every greedy answer; harness.json of lm_eval's tasks
                                          run/               as `sdft train` writes it; run-2/ of a second phase
    OUTPUT/base/result.json                                 the same of the model before any training

A stage with a result.json is never run again; an interrupted one goes on from its newest checkpoint. One that ended
without a model (NaN, or a guard that nothing respects) leaves failed.json: its cell is over, the study goes on.
"""

import gc
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import pydantic.dataclasses

from sdft import files
from sdft.config import STRICT, Config, Settings, config_keys, from_table, located, override, read_toml, validate
from sdft.errors import FruitlessError, SdftError

RESULT, FAILED = "result.json", "failed.json"  # of a stage
BASE = "{base}"  # in a method's settings: the model that the study starts from
DECIDED = ("model.name", "optim.lr", "train.seed", "train.output", "eval.sets")  # by the study, of every run


@dataclass(frozen=True)
class Task:
    """A skill to learn in one stage."""

    name: str
    train: str  # records
    eval: dict[str, str]  # evaluation files by name; the first is the task's accuracy
    config: dict[str, Any]  # settings of its stage, by dotted name


@dataclass(frozen=True)
class Method:
    """A way to learn a task: one run, or several, each from the weights of the one before."""

    name: str
    phases: tuple[dict[str, Any], ...]  # settings of each run, by dotted name
    learning_rates: tuple[float, ...]
    point: dict[str, Any] = field(default_factory=dict)  # of the grid: further settings, in every run

    @property
    def family(self) -> str:
        """The name in the file, which all points of a grid share."""
        return self.name.split("/")[0]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Harness(Settings):
    """Prior skills that lm-evaluation-harness measures; see harness.run for the options."""

    tasks: dict[str, str] = field(default_factory=dict)  # task or group -> its metric that counts, such as acc
    limit: int | None = None
    include_path: str = ""
    fewshot: int | None = None
    chat: bool = False
    allow_code: bool = False


@dataclass(frozen=True)
class Study:
    """What STUDY.toml says."""

    output: Path
    seeds: tuple[int, ...]
    config: Config  # what all runs share
    settings: dict[str, Any]  # what the file says of it, by dotted name
    tasks: tuple[Task, ...]
    prior: dict[str, str]  # evaluation files of skills that the model has already
    methods: tuple[Method, ...]
    keep_weights: bool = False
    harness: Harness = field(default_factory=Harness)
    samples: int = 0  # answers drawn to each prompt of a task's accuracy, for pass@k; 0: none
    drift: int = 32  # prompts of a kind along whose answers the distance from the base is measured; 0: it is not
    drift_on: str = ""  # records whose prompts have nothing to do with the tasks; without it, those of `prior`

    @property
    def sets(self) -> dict[str, str]:
        """All evaluation files: TASK-NAME of the tasks, and the prior skills by their own names."""
        return {f"{t.name}-{name}": path for t in self.tasks for name, path in t.eval.items()} | self.prior

    @property
    def prior_skills(self) -> list[str]:
        """Names of the prior skills: evaluation files, and tasks of lm_eval."""
        return [*self.prior, *self.harness.tasks]

    @property
    def evaluated(self) -> dict[str, Any]:
        """The model that the study starts from and what it is asked: what decides the base's result."""
        told = {"model": self.config.model.name, "sets": self.sets}
        return told | ({"harness": asdict(self.harness)} if self.harness.tasks else {})

    def measure(self, task: Task) -> str:
        """The evaluation set that is the task's accuracy."""
        return f"{task.name}-{next(iter(task.eval))}"


@dataclass(frozen=True)
class Cell:
    method: Method
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.name}/lr-{self.learning_rate:g}/seed-{self.seed}"


# What the file says.


def load_study(path: str | Path, model: str = "", output: str = "", with_data: bool = True) -> Study:
    """Reads a study, and checks all that can be before the first run: settings, files, records.

    model, output: instead of the file's config.model.name and output. with_data: False checks the settings alone, for a
    study whose data are not there yet. Raises SdftError naming the file, the key and the fix.
    """
    where, table = f"study {path}", read_toml(path, "study")
    known = "output seeds learning_rates grid keep_weights config tasks prior harness drift drift_on samples methods"
    _only(table, {*known.split()}, where)
    for key in ("output", "tasks", "methods", "config"):
        if not table.get(key):
            raise SdftError(f"{where}: {key} is missing")
    for key in ("config", "grid", "prior", "harness", "methods"):
        if not isinstance(table.get(key, {}), dict):
            raise SdftError(f"{where}: {key} = {table[key]!r} must be a table, [{key}]")
    with located(f"{where}: harness"):
        harness = Harness(**table.get("harness", {}))
    shared = {key: table.get(key, kind()) for key, kind in (("learning_rates", list), ("grid", dict))}
    settings = _settings(table["config"], f"{where}: config") | ({"model.name": model} if model else {})
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
    for key, what in (("drift", "prompts"), ("samples", "answers to each prompt")):
        value = getattr(study, key)
        if type(value) is not int or value < 0:
            raise SdftError(f"{where}: {key} = {value!r} must be a number of {what}, or 0")
    if not isinstance(study.drift_on, str):
        raise SdftError(f"{where}: drift_on = {study.drift_on!r} must be a file with records, such as prior.jsonl")
    _check(study, where)
    if with_data:
        _check_data(study)
    return study


def _task(row: dict[str, Any], where: str) -> Task:
    _only(row, {"name", "train", "eval", "config"}, where)
    for key in ("name", "train", "eval"):
        if not row.get(key):
            raise SdftError(f"{where}: {key} is missing")
    if not isinstance(row["eval"], dict):
        raise SdftError(f"{where}: eval = {row['eval']!r} must name its files: eval = {{ test = {row['eval']!r} }}")
    return Task(row["name"], row["train"], dict(row["eval"]), _settings(row.get("config", {}), f"{where}.config"))


def _methods(name: str, row: dict[str, Any], shared: dict[str, Any], where: str) -> Iterator[Method]:
    """One for every point of the grid: the study's, in which the method's own values take the place."""
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
    """Lists of values by dotted name; each value is checked by itself."""
    grid = {}
    for key, values in _dotted(table).items():
        if key in DECIDED:
            raise SdftError(f"{where}: {key} is the study's own; learning_rates and seeds are lists of their own")
        names = [str(v) for v in values] if isinstance(values, list) else []
        if not names or len(set(names)) < len(names) or any("/" in name for name in names):
            raise SdftError(f"{where}: {key} = {values!r} must be a list of different values that can name a folder")
        for value in values:
            from_table(_nested({key: value}), where)
        grid[key] = tuple(values)
    return grid


def _settings(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Settings by dotted name, each converted and checked by itself."""
    from_table(table, where)  # unknown keys and wrong types
    return _dotted(table)


def _dotted(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names; a setting that is itself a table stays one."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, dict) and prefix + key not in config_keys()
        flat |= _dotted(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


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

    for path in {task.train for task in study.tasks} | ({study.drift_on} - {""}):
        load_records(path)
    for path in study.sets.values():
        check_evaluable(load_records(path), path)
    if study.harness.tasks:
        from sdft.evaluation import harness

        harness.check(list(study.harness.tasks), study.harness.limit, study.harness.include_path)


# What is run.


def cells(study: Study) -> list[Cell]:
    """Every cell, seed by seed, so that all methods can be compared as soon as the first seed is through."""
    return [
        Cell(method, rate, seed) for seed in study.seeds for method in study.methods for rate in method.learning_rates
    ]


def stage_folder(study: Study, cell: Cell, number: int) -> Path:
    return study.output / cell.name / f"{number + 1}-{study.tasks[number].name}"


def stage_configs(study: Study, cell: Cell, number: int, start: str) -> list[Config]:
    """The runs of a stage; the first starts from the model `start`.

    Settings, lowest first: the preset that is named, the study's, the task's, the method's phase, the grid's; then what
    the study itself decides.
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
            fixed["lora.earlier"] = ""  # there is no earlier adapter
        configs.append(from_table(_nested(settings), f"methods.{cell.method.name}"))
        configs[-1] = override(configs[-1], fixed)
        start = str(output / "model")
    return configs


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as nested tables."""
    table: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (table.setdefault(section, {}) if section else table)[name] = value
    return table


def run_study(study: Study, only: Sequence[str] = ()) -> list[Cell]:
    """Runs what is not finished; returns the finished cells. only: of these methods (all by default).

    A cell whose run ends without a model, such as at a learning rate that is too high, does not keep the others from
    being run. Several processes may run the same study: each takes cells that no other is at.
    """
    unknown = set(only) - {name for m in study.methods for name in (m.name, m.family)}
    if unknown:
        names = ", ".join(m.name for m in study.methods)
        raise SdftError(f"--only {sorted(unknown)[0]}: the study has no such method; methods: {names}")
    wanted = [cell for cell in cells(study) if not only or {cell.method.name, cell.method.family} & set(only)]
    study.output.mkdir(parents=True, exist_ok=True)
    with files.lock(study.output, wait=True):
        if not (study.output / "base/result.json").exists():
            evaluate_base(study)
    base_result(study)
    total = len(_waiting(study, wanted))
    spent: dict[str, list[float]] = {}
    for cell, stages in results(study):  # of an earlier start, too: the first line already tells the time left
        spent.setdefault(cell.method.name, []).extend(sum(stage["seconds"].values()) for stage in stages)
    for cell in wanted:
        if not _waiting(study, [cell]):
            continue
        (study.output / cell.name).mkdir(parents=True, exist_ok=True)
        with files.lock(study.output / cell.name) as mine:
            if not mine:
                print(f"== {cell.name}: another process is at it", flush=True)
                continue
            for _, number in _waiting(study, [cell]):
                left = [c.method.name for c, _ in _waiting(study, wanted)]
                at = f"stage {total - len(left) + 1} of {total}{remaining(spent, left)}"
                print(f"== {cell.name}, task {study.tasks[number].name}: {at}", flush=True)
                began = time.perf_counter()
                try:
                    run_stage(study, cell, number)
                except FruitlessError as error:
                    settings = settings_of(study, cell, number)
                    _write(stage_folder(study, cell, number), {"error": str(error), "settings": settings}, FAILED)
                    print(f"{cell.name} ends here, the study goes on: {error}", flush=True)
                    break
                spent.setdefault(cell.method.name, []).append(time.perf_counter() - began)
    return [cell for cell in cells(study) if finished(study, cell, len(study.tasks) - 1)]


def _waiting(study: Study, wanted: Sequence[Cell]) -> list[tuple[Cell, int]]:
    """The stages that have no result yet, without those of cells that failed."""
    stages = range(len(study.tasks))
    return [(c, n) for c in wanted if not failure(study, c) for n in stages if not finished(study, c, n)]


def remaining(spent: dict[str, list[float]], waiting: Sequence[str]) -> str:
    """An estimate of the time left in words: a stage takes what stages of its method took, else what all did."""
    everything = [s for seconds in spent.values() for s in seconds]
    if not everything:
        return ""
    left = sum(mean(spent.get(method, everything)) for method in waiting)
    return f", about {left / 3600:.1f} h left" if left >= 5400 else f", about {left / 60:.0f} min left"


def run_stage(study: Study, cell: Cell, number: int) -> None:
    """Trains and evaluates one stage; then drops weights that nothing needs any more."""
    from sdft.planning import plan
    from sdft.training.loop import train
    from sdft.training.metrics import read_metrics

    folder = stage_folder(study, cell, number)
    began, start = time.perf_counter(), study.config.model.name
    if number:
        start = str(_model_of(study, cell, number - 1))
        if not Path(start).exists():
            raise SdftError(f"{start} is missing; delete {Path(start).parents[1] / 'result.json'} to train it again")
    configs = stage_configs(study, cell, number, start)
    tokens = operations = 0
    for config in configs:
        output = Path(config.train.output)
        if not (output / "model").exists():
            begun = any((output / "checkpoints").glob("step-*"))
            if output.exists() and not begun:
                files.remove(output, folder)  # nothing of it can be gone on from
            train(override(config, {"train.resume": begun}), plan.advice_after_running_out)
            gc.collect()
        lines = read_metrics(output)
        tokens += sum(line.get("tokens", 0) for line in lines)
        operations += sum(line.get("flops", 0) for line in lines)
    trained = time.perf_counter()
    tokenizer, model = _load(configs[-1], str(_model_of(study, cell, number)))
    accuracy = evaluate_on_all(study, configs[-1], tokenizer, model, folder / "answers")
    drift = drift_from_base(study, configs[-1], tokenizer, model, study.tasks[number])
    passed = pass_at(study, configs[-1], tokenizer, model)
    del model
    gc.collect()
    _write(
        folder,
        {
            "method": cell.method.name,
            "learning_rate": cell.learning_rate,
            "grid": cell.method.point,
            "seed": cell.seed,
            "task": study.tasks[number].name,
            "settings": settings_of(study, cell, number),
            "accuracy": accuracy,
            "drift": drift,
            **({"pass_at": passed} if passed else {}),
            "tokens": tokens,
            **({"flops": operations} if operations else {}),
            "seconds": {"train": trained - began, "evaluate": time.perf_counter() - trained},
        },
    )
    if study.keep_weights:
        return
    last = number == len(study.tasks) - 1
    for done in range(number + last):  # the next stage starts from this one's
        for output in _outputs(study, cell, done):
            for part in ("model", "checkpoints"):
                if (output / part).exists():
                    files.remove(output / part, output)


def settings_of(study: Study, cell: Cell, number: int) -> list[dict[str, Any]]:
    """What decides a stage's result: the settings of every run up to it, files by name and not by place."""
    out = []
    for n in range(number + 1):
        for config in stage_configs(study, cell, n, BASE):
            out.append(json.loads(json.dumps(asdict(override(config, {"train.output": "", "train.resume": False})))))
    for settings in out:
        if settings["model"]["name"] != BASE:
            settings["model"]["name"] = "the run before"
    harness = {"harness": asdict(study.harness)} if study.harness.tasks else {}
    return [{"base": study.config.model.name} | harness, *out]


def finished(study: Study, cell: Cell, number: int) -> bool:
    """Whether a stage's result is there. Raises SdftError where it is that of other settings."""
    folder = stage_folder(study, cell, number)
    if not (folder / "result.json").exists():
        return False
    _same(_read(folder), {"settings": settings_of(study, cell, number)}, folder)
    return True


def failure(study: Study, cell: Cell) -> str:
    """Why a cell can go no further, with the file that says so; empty where it can."""
    for number in range(len(study.tasks)):
        folder = stage_folder(study, cell, number)
        if (folder / FAILED).exists():
            found = _read(folder, FAILED)
            _same(found, {"settings": settings_of(study, cell, number)}, folder, FAILED)
            return f"{found['error']} (delete {folder / FAILED} to run it again)"
    return ""


def evaluate_base(study: Study) -> None:
    """Writes base/result.json and answers: the model before any training."""
    print("== the model before any training", flush=True)
    began = time.perf_counter()
    tokenizer, model = _load(study.config, study.config.model.name)
    answers = study.output / "base/answers"
    if study.harness.tasks:  # an item of each: data, a package or a metric that is missing shows now, not in hours
        print("one item of each of lm_eval's tasks, to see that they run", flush=True)
        answers.mkdir(parents=True, exist_ok=True)
        first = replace(study.harness, limit=1)
        _on_harness(first, model, tokenizer, study.config.eval.batch_size, answers / "harness.json")
    accuracy = evaluate_on_all(study, study.config, tokenizer, model, answers)
    passed = pass_at(study, study.config, tokenizer, model)
    result: dict[str, Any] = {"accuracy": accuracy, "seconds": {"evaluate": time.perf_counter() - began}}
    _write(study.output / "base", study.evaluated | result | ({"pass_at": passed} if passed else {}))


def evaluate_on_all(study: Study, config: Config, tokenizer: Any, model: Any, answers: Path) -> dict[str, float]:
    """Accuracy of a model on every evaluation set by greedy generation; its answers in answers/SET.jsonl.

    And the metrics of lm_eval's tasks, where there are some; all that it reports in answers/harness.json.
    """
    from sdft.data.formats import load_records
    from sdft.evaluation import accuracy as evaluate

    answers.mkdir(parents=True, exist_ok=True)
    accuracy = {}
    for name, path in study.sets.items():
        records = load_records(path)
        prompts = evaluate.student_prompts(tokenizer, records, config.data.system)
        c = config.eval
        result = evaluate.evaluate(model, tokenizer, records, prompts, c.max_new_tokens, c.batch_size)
        files.write_text(answers / f"{name}.jsonl", "".join(json.dumps(asdict(a)) + "\n" for a in result.answers))
        accuracy[name] = result.accuracy
    if study.harness.tasks:
        accuracy |= _on_harness(study.harness, model, tokenizer, config.eval.batch_size, answers / "harness.json")
    print("  ".join(f"{name} {value:.1%}" for name, value in accuracy.items()), flush=True)
    return accuracy


def drift_from_base(
    study: Study, config: Config, tokenizer: Any, model: Any, task: Task
) -> dict[str, dict[str, float]]:
    """How far a model is from the base along its own greedy answers (evaluation.drift): "new" to prompts of the task's
    evaluation, "prior" to those of `study.drift_on` or the prior skills, `study.drift` of each, evenly taken."""
    from sdft.config import RolloutConfig
    from sdft.data.formats import load_records
    from sdft.evaluation import accuracy as evaluate
    from sdft.evaluation.drift import drift

    kinds = {
        "new": [study.sets[study.measure(task)]],
        "prior": [study.drift_on] if study.drift_on else list(study.prior.values()),
    }
    if not study.drift:
        return {}
    _, base = _load(config, study.config.model.name)
    greedy = RolloutConfig(
        temperature=0.0, max_new_tokens=config.eval.max_new_tokens, batch_size=config.eval.batch_size
    )
    found = {}
    for kind, paths in kinds.items():
        records = [record for path in paths for record in load_records(path)]
        if records:
            count = min(study.drift, len(records))
            picked = [records[i * len(records) // count] for i in range(count)]
            prompts = evaluate.student_prompts(tokenizer, picked, config.data.system)
            found[kind] = drift(model, base, prompts, greedy).summary()
    print("  ".join(f"KL to the base, {kind}: {of['kl_to_base']:.3f}" for kind, of in found.items()), flush=True)
    return found


def pass_at(study: Study, config: Config, tokenizer: Any, model: Any) -> dict[str, dict[str, float]]:
    """{set: {k: pass@k}} of every task's accuracy set, of `study.samples` answers at temperature 1 to each prompt."""
    from sdft.config import RolloutConfig
    from sdft.data.formats import load_records
    from sdft.evaluation import accuracy as evaluate
    from sdft.evaluation import pass_at_k

    if not study.samples:
        return {}
    drawing = RolloutConfig(max_new_tokens=config.eval.max_new_tokens, batch_size=config.eval.batch_size)
    found = {}
    for name in [study.measure(task) for task in study.tasks]:
        records = load_records(study.sets[name])
        prompts = evaluate.student_prompts(tokenizer, records, config.data.system)
        drawn = pass_at_k.sample_answers(model, tokenizer, records, prompts, study.samples, drawing)
        found[name] = {str(k): drawn.pass_at(k) for k in drawn.powers()}
    told = ((name, *list(of.items())[-1]) for name, of in found.items())
    print("  ".join(f"{name} pass@{k} {value:.1%}" for name, k, value in told), flush=True)
    return found


def _load(config: Config, name: str) -> tuple[Any, Any]:
    from sdft.data.prompts import set_chat_template
    from sdft.model import loading

    model_config = override(config, {"model.name": name}).model
    tokenizer, stop_ids = loading.load_tokenizer(model_config)
    set_chat_template(tokenizer, config.data.chat_template)
    model = loading.load(model_config, tokenizer, stop_ids)
    loading.enable_packing(model, config.train.packing)
    return tokenizer, model


def base_result(study: Study) -> dict[str, Any]:
    """What the model does before any training.

    Raises SdftError where that is not known yet, or is that of another model or other evaluation files.
    """
    folder = study.output / "base"
    if not (folder / "result.json").exists():
        raise SdftError(f"{folder}/result.json is missing: nothing is finished yet; run `sdft study` first")
    found = _read(folder)
    _same(found, study.evaluated, folder)
    return found


def _on_harness(wanted: Harness, model: Any, tokenizer: Any, batch_size: int, path: Path) -> dict[str, float]:
    from sdft.evaluation import harness

    options = {k: v for k, v in asdict(wanted).items() if k not in ("tasks", "fewshot")}
    found = harness.run(
        model, tokenizer, list(wanted.tasks), num_fewshot=wanted.fewshot, batch_size=batch_size, **options
    )
    scores = {task: {name: asdict(score) for name, score in of.items()} for task, of in found.items()}
    files.write_text(path, json.dumps(scores, indent=1) + "\n")
    for task, metric in wanted.tasks.items():
        if metric not in scores.get(task, {}):
            there = ", ".join(scores.get(task, {})) or "none"
            raise SdftError(f"harness.tasks.{task} = {metric!r}: lm_eval reports no such metric; it has: {there}")
    return {task: scores[task][metric]["value"] for task, metric in wanted.tasks.items()}


# What it will take.

SAME = {"model.name": BASE, "optim.lr": 1.0, "train.seed": 0, "train.output": "", "teacher.ema_alpha": 1.0}


@dataclass(frozen=True)
class Planned:
    """What one run takes, and how many runs of the study take just that."""

    name: str  # of the method, the task, and the settings that matter here
    runs: int
    steps: int
    peak: int  # bytes
    flops: int


def plan_study(study: Study, machine: Any, prompt: int = 0, shown: int = 0, records: int = 0) -> list[Planned]:
    """Peak memory and operations of every distinct run, before any weight is loaded (plan.py, flops.py).

    Answers that are sampled are taken to be as long as they may get. prompt, shown: tokens of every prompt of the
    student and of the teacher (0: the student's and an answer's more); records: of every training file. Where `prompt`
    is 0, all three are read from the data. machine: a costs.Machine. Evaluations are not counted.
    """
    from sdft.data.dataset import TokenizedExample
    from sdft.model import flops
    from sdft.planning import plan

    shape = plan.shape_of(study.config)
    read: dict[str, Sequence[TokenizedExample]] = {}  # the same data, model and context are read once
    peaks: dict[str, int] = {}
    distinct: dict[str, tuple[str, Config]] = {}
    counts: dict[str, int] = {}
    for cell in cells(study):
        for number, task in enumerate(study.tasks):
            for i, config in enumerate(stage_configs(study, cell, number, BASE)):
                key = json.dumps(asdict(override(config, SAME)))
                point = [f"{k} {v}" for k, v in cell.method.point.items() if k not in SAME]
                part = [f"run {i + 1}"] * (len(cell.method.phases) > 1)
                name = ", ".join([cell.method.family, task.name, *part, *point])
                distinct.setdefault(key, (name, override(config, {"model.name": study.config.model.name})))
                counts[key] = counts.get(key, 0) + 1
    planned = []
    for key, (name, config) in distinct.items():
        answer = config.rollout.max_new_tokens
        if prompt:
            seen = prompt if config.teacher.context == "none" else shown or prompt + answer
            steps = plan.steps_of(config, records)
            works = [plan.Work.uniform(config, prompt, seen, answer)]
            asked = [seen] * (records * config.rollout.per_prompt)
        else:
            same = json.dumps([asdict(c) for c in (config.model, config.data, config.teacher)])
            read[same] = read.get(same) or plan.tokenized(config)
            steps = plan.steps_of(config, len(read[same]))
            works = list(plan.works_of(config, read[same]))
            asked = list(works[0].offline)
        heaviest = max(works, key=lambda work: sum(work.sizes))
        alike = json.dumps([asdict(override(config, SAME | {"train.epochs": 1.0, "train.steps": 0})), heaviest.sizes])
        peaks[alike] = peaks.get(alike) or plan.peak(shape, config, heaviest, machine)
        total = sum(flops.step_flops(shape, config, work).total for work in works) * steps // len(works)
        if config.method.completions == "offline":
            total += flops.answer_flops(shape, asked, [answer] * len(asked))
        planned.append(Planned(name, counts[key], steps, peaks[alike], total))
    return planned


def plan_table(planned: Sequence[Planned], memory: int, tflops: float) -> str:
    """Markdown of what `plan_study` found. memory: bytes of the device; tflops: 1e12 operations a second."""
    from sdft.planning.plan import size

    def hours(flops: int) -> str:
        return f"{flops / tflops / 3.6e15:.2g}"

    lines = ["| run | runs | steps | peak memory | fits | PFLOP | hours |", "|---|---:|---:|---:|---|---:|---:|"]
    for one in planned:
        fits = "yes" if one.peak <= memory else "no"
        cells = [one.name, one.runs, one.steps, size(one.peak), fits, f"{one.flops / 1e15:.3g}", hours(one.flops)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    runs, flops = sum(one.runs for one in planned), sum(one.runs * one.flops for one in planned)
    lines.append(f"| all | {runs} | | | | {flops / 1e15:.3g} | {hours(flops)} |")
    return (
        "\n".join(lines)
        + f"\n\nThe device has {size(memory)}. Hours are those of one run, all of it at {tflops:g} TFLOP/s: that is an "
        "assumption,\nand sampling reaches less than training. Sampled answers are taken to be as long as they may "
        "get;\nevaluations are not counted.\n"
    )


# What has been found.


def results(study: Study) -> list[tuple[Cell, list[dict[str, Any]]]]:
    """The cells that have finished stages, and these in order."""
    out = []
    for cell in cells(study):
        stages = []
        for number in range(len(study.tasks)):
            if not finished(study, cell, number):
                break
            stages.append(_read(stage_folder(study, cell, number)))
        if stages:
            out.append((cell, stages))
    return out


def table(study: Study) -> str:
    """Markdown: for each method and learning rate, accuracies after the last stage, means over the finished seeds."""
    columns = [study.measure(t) for t in study.tasks] + study.prior_skills
    base = base_result(study)["accuracy"]
    lines = [f"| method | lr | seeds | {' | '.join(columns)} |", f"|---|---|---{'|---:' * len(columns)}|"]
    lines.append(f"| before | | | {' | '.join(f'{base[c]:.0%}' for c in columns)} |")
    done = [(c, stages[-1]["accuracy"]) for c, stages in results(study) if len(stages) == len(study.tasks)]
    for method in study.methods:
        for rate in method.learning_rates:
            found = [a for cell, a in done if (cell.method.name, cell.learning_rate) == (method.name, rate)]
            if found:
                means = " | ".join(f"{mean(a[c] for a in found):.0%}" for c in columns)
                lines.append(f"| {method.name} | {rate:g} | {len(found)} | {means} |")
    return "\n".join(lines) + "\n"


def _outputs(study: Study, cell: Cell, number: int) -> list[Path]:
    return [Path(c.train.output) for c in stage_configs(study, cell, number, BASE)]


def _model_of(study: Study, cell: Cell, number: int) -> Path:
    return _outputs(study, cell, number)[-1] / "model"


def _same(found: dict[str, Any], wanted: dict[str, Any], folder: Path, name: str = RESULT) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            raise SdftError(f"{folder}/{name} is of another {key}; give another output, or delete {folder}")


def _write(folder: Path, result: dict[str, Any], name: str = RESULT) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / name, json.dumps(result, indent=1) + "\n")


def _read(folder: Path, name: str = RESULT) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found
