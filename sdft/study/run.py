"""`sdft study STUDY.toml`: trains and evaluates every stage that has no result yet.

A stage with a result.json is never run again. An interrupted stage resumes from its newest checkpoint. A stage whose
run ends without a model (NaN, or no checkpoint within the guard's limit) leaves failed.json: its cell ends, and the
study continues with the other cells.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from sdft import files
from sdft.config import override
from sdft.errors import FruitlessError, SdftError
from sdft.study import evaluate, results
from sdft.study.spec import Cell, Study, cells, run_folders, stage_configs, stage_folder


def run_study(study: Study, only: Sequence[str] = ()) -> list[Cell]:
    """Runs every stage that is not finished; returns the finished cells.

    only: names of the methods to run; all methods by default. Several processes may run the same study: each process
    takes cells that no other process runs.
    """
    unknown = set(only) - {name for m in study.methods for name in (m.name, m.family)}
    if unknown:
        names = ", ".join(m.name for m in study.methods)
        raise SdftError(f"--only {sorted(unknown)[0]}: the study has no such method; methods: {names}")
    wanted = [cell for cell in cells(study) if not only or {cell.method.name, cell.method.family} & set(only)]
    study.output.mkdir(parents=True, exist_ok=True)
    with files.lock(study.output, wait=True):
        if not (study.output / "base" / results.RESULT).exists():
            evaluate_base(study)
    results.base_result(study)
    progress = Progress(study, wanted)
    for cell in wanted:
        if not waiting(study, [cell]):
            continue
        (study.output / cell.name).mkdir(parents=True, exist_ok=True)
        with files.lock(study.output / cell.name) as mine:
            if mine:
                run_cell(study, cell, progress)
            else:
                print(f"== {cell.name}: another process runs it", flush=True)
    return [cell for cell in cells(study) if results.is_finished(study, cell, len(study.tasks) - 1)]


def waiting(study: Study, wanted: Sequence[Cell]) -> list[tuple[Cell, int]]:
    """The stages that have no result yet, without the stages of cells that have failed."""
    stages = range(len(study.tasks))
    return [
        (cell, number)
        for cell in wanted
        if not results.failure(study, cell)
        for number in stages
        if not results.is_finished(study, cell, number)
    ]


class Progress:
    """How many stages are left, and about how long they will take."""

    def __init__(self, study: Study, wanted: Sequence[Cell]) -> None:
        self.study, self.wanted = study, wanted
        self.total = len(waiting(study, wanted))
        self.seconds: dict[str, list[float]] = {}  # method -> what its stages took, earlier starts included
        for cell, stages in results.results(study):
            for stage in stages:
                self.add(cell, sum(stage["seconds"].values()))

    def add(self, cell: Cell, seconds: float) -> None:
        """A stage of this cell took so long."""
        self.seconds.setdefault(cell.method.name, []).append(seconds)

    def __str__(self) -> str:
        left = [cell.method.name for cell, _ in waiting(self.study, self.wanted)]
        return f"stage {self.total - len(left) + 1} of {self.total}{remaining(self.seconds, left)}"


def remaining(seconds: dict[str, list[float]], left: Sequence[str]) -> str:
    """The estimated time left, in words.

    seconds: method -> the seconds that its finished stages took. left: the method of every stage that is left; a method
    without a finished stage is taken to be as slow as all methods together.
    """
    everything = [s for spent in seconds.values() for s in spent]
    if not everything:
        return ""
    total = sum(mean(seconds.get(method, everything)) for method in left)
    return f", about {total / 3600:.1f} h left" if total >= 5400 else f", about {total / 60:.0f} min left"


def evaluate_base(study: Study) -> None:
    """Evaluates the model before any training; writes base/result.json and its answers."""
    print("== the model before any training", flush=True)
    began = time.perf_counter()
    loaded = evaluate.load(study.config, study.config.model.name)
    answers = study.output / "base/answers"
    if study.harness.tasks:
        print("one item of each of lm_eval's tasks first: a missing package, file or metric shows at once", flush=True)
        answers.mkdir(parents=True, exist_ok=True)
        evaluate.on_harness(loaded, replace(study.harness, limit=1), answers / "harness.json")
    accuracy = evaluate.on_all_sets(loaded, study.sets, study.harness, answers)
    passed = evaluate.pass_at(loaded, study)
    result: dict[str, Any] = {"accuracy": accuracy, "seconds": {"evaluate": time.perf_counter() - began}}
    facts = results.base_facts(study)
    results.write(study.output / "base", facts | result | ({"pass_at": passed} if passed else {}))


def run_cell(study: Study, cell: Cell, progress: Progress) -> None:
    """Runs the stages of a cell that are left; a stage that fails ends the cell and leaves failed.json."""
    for _, number in waiting(study, [cell]):
        print(f"== {cell.name}, task {study.tasks[number].name}: {progress}", flush=True)
        began = time.perf_counter()
        try:
            run_stage(study, cell, number)
        except FruitlessError as error:
            settings = results.stage_settings(study, cell, number)
            failed = {"error": str(error), "settings": settings}
            results.write(stage_folder(study, cell, number), failed, results.FAILED)
            print(f"{cell.name} ends here, the study continues: {error}", flush=True)
            return
        progress.add(cell, time.perf_counter() - began)


def run_stage(study: Study, cell: Cell, number: int) -> None:
    """Trains and evaluates one stage, writes its result, and deletes weights that no later stage needs."""
    began = time.perf_counter()
    spent = train_stage(study, cell, number)
    trained = time.perf_counter()
    measured = evaluate_stage(study, cell, number)
    facts = {
        "method": cell.method.name,
        "learning_rate": cell.learning_rate,
        "grid": cell.method.point,
        "seed": cell.seed,
        "task": study.tasks[number].name,
        "settings": results.stage_settings(study, cell, number),
    }
    seconds = {"train": trained - began, "evaluate": time.perf_counter() - trained}
    results.write(stage_folder(study, cell, number), facts | measured | spent | {"seconds": seconds})
    if not study.keep_weights:
        delete_weights(study, cell, number)


def train_stage(study: Study, cell: Cell, number: int) -> dict[str, int]:
    """Trains or resumes the runs of a stage; returns how many tokens were trained on, and the FLOPs if known."""
    from sdft.planning.advice import advice_after_running_out
    from sdft.training.loop import train
    from sdft.training.metrics import read_metrics

    start = study.config.model.name
    if number:
        start = str(run_folders(study, cell, number - 1)[-1] / "model")
        if not Path(start).exists():
            raise SdftError(f"{start} is missing; delete {Path(start).parents[1] / results.RESULT} to train it again")
    tokens = operations = 0
    for config in stage_configs(study, cell, number, start):
        output = Path(config.train.output)
        if not (output / "model").exists():
            begun = any((output / "checkpoints").glob("step-*"))
            if output.exists() and not begun:
                files.remove(output, stage_folder(study, cell, number))  # without a checkpoint, it starts anew
            train(override(config, {"train.resume": begun}), advice_after_running_out)
            gc.collect()
        lines = read_metrics(output)
        tokens += sum(line.get("tokens", 0) for line in lines)
        operations += sum(line.get("flops", 0) for line in lines)
    return {"tokens": tokens} | ({"flops": operations} if operations else {})


def evaluate_stage(study: Study, cell: Cell, number: int) -> dict[str, Any]:
    """What a stage's model can do: the keys accuracy, drift and pass_at of its result."""
    config, folder = stage_configs(study, cell, number, "")[-1], stage_folder(study, cell, number)
    loaded = evaluate.load(config, str(run_folders(study, cell, number)[-1] / "model"))
    accuracy = evaluate.on_all_sets(loaded, study.sets, study.harness, folder / "answers")
    drift: dict[str, dict[str, float]] = {}
    if study.drift:
        base = evaluate.load(config, study.config.model.name).model
        drift = evaluate.distance_from_base(loaded, base, study, study.tasks[number])
        del base
    passed = evaluate.pass_at(loaded, study)
    del loaded
    gc.collect()
    return {"accuracy": accuracy, "drift": drift} | ({"pass_at": passed} if passed else {})


def delete_weights(study: Study, cell: Cell, number: int) -> None:
    """Deletes models and checkpoints of finished stages, except the model that the next stage starts from."""
    is_last = number == len(study.tasks) - 1
    for done in range(number + is_last):
        for output in run_folders(study, cell, done):
            for part in ("model", "checkpoints"):
                if (output / part).exists():
                    files.remove(output / part, output)
