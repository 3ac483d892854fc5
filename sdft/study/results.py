"""The files that a study leaves in OUTPUT, and whether they belong to its settings.

OUTPUT/METHOD/lr-1e-05/seed-0/1-facts/result.json       a finished stage: accuracies, settings, tokens, seconds
                                      failed.json        a stage whose run ended without a model, and why
                                      answers/SET.jsonl  every greedy completion; harness.json of lm_eval's tasks
                                      run/               as `sdft train` writes it; run-2/ is the second phase
OUTPUT/base/result.json                                 the same for the model before any training
"""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from sdft import files
from sdft.config import override
from sdft.errors import SdftError
from sdft.study.spec import BASE, Cell, Study, cells, stage_configs, stage_folder

RESULT, FAILED = "result.json", "failed.json"


def write(folder: Path, result: dict[str, Any], name: str = RESULT) -> None:
    """Writes a stage's result.json or failed.json; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / name, json.dumps(result, indent=1) + "\n")


def read(folder: Path, wanted: dict[str, Any], name: str = RESULT) -> dict[str, Any] | None:
    """The folder's result.json or failed.json; None if it is not there.

    wanted: what it must hold. Raises SdftError if it holds something else: it is the result of another study.
    """
    if not (folder / name).exists():
        return None
    found: dict[str, Any] = json.loads(files.read_text(folder / name))
    for key, value in wanted.items():
        if found.get(key) != value:
            difference = _difference(key, found.get(key), value)
            raise SdftError(
                f"{folder}/{name} is of other settings: {difference}; give another output, or delete {folder}"
            )
    return found


def _difference(name: str, there: Any, here: Any) -> str:
    """The first value that differs, with its name."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [key for key in there | here if there.get(key) != here.get(key)]
        return _difference(f"{name}.{keys[0]}", there.get(keys[0]), here.get(keys[0]))
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        i = next(i for i, (a, b) in enumerate(zip(there, here, strict=True)) if a != b)
        return _difference(f"{name}[{i}]", there[i], here[i])
    return f"{name} was {there!r} and is {here!r}"


def stage_result(study: Study, cell: Cell, number: int) -> dict[str, Any] | None:
    """A stage's result; None if the stage is not finished. Raises SdftError if it is a result of other settings."""
    return read(stage_folder(study, cell, number), {"settings": stage_settings(study, cell, number)})


def is_finished(study: Study, cell: Cell, number: int) -> bool:
    """Whether a stage has a result. Raises SdftError if it is a result of other settings."""
    return stage_result(study, cell, number) is not None


def failure(study: Study, cell: Cell) -> str:
    """Why a cell has ended without a model, and the file to delete; empty if it has not."""
    for number in range(len(study.tasks)):
        folder = stage_folder(study, cell, number)
        found = read(folder, {"settings": stage_settings(study, cell, number)}, FAILED)
        if found:
            return f"{found['error']} (delete {folder / FAILED} to run it again)"
    return ""


def base_facts(study: Study) -> dict[str, Any]:
    """What the base's result depends on: the model and the evaluation sets."""
    facts = {"model": study.config.model.name, "sets": study.sets}
    return facts | ({"harness": asdict(study.harness)} if study.harness.tasks else {})


def base_result(study: Study) -> dict[str, Any]:
    """The result of the model before any training.

    Raises SdftError if it is not there, or if it is of another model or of other evaluation files.
    """
    folder = study.output / "base"
    found = read(folder, base_facts(study))
    if found is None:
        raise SdftError(f"{folder}/{RESULT} is missing: nothing is finished yet; run `sdft study` first")
    return found


def stage_settings(study: Study, cell: Cell, number: int) -> list[dict[str, Any]]:
    """What a stage's result depends on: the settings of every run up to it. Two folders with the same settings have
    results that can be compared, so the folders' names are left out."""
    out = []
    for n in range(number + 1):
        for config in stage_configs(study, cell, n, BASE):
            out.append(json.loads(json.dumps(asdict(override(config, {"train.output": "", "train.resume": False})))))
    for settings in out:
        if settings["model"]["name"] != BASE:
            settings["model"]["name"] = "the run before"
    harness = {"harness": asdict(study.harness)} if study.harness.tasks else {}
    return [{"base": study.config.model.name} | harness, *out]


def results(study: Study) -> list[tuple[Cell, list[dict[str, Any]]]]:
    """The cells that have finished stages, and the results of these stages in order."""
    out = []
    for cell in cells(study):
        stages = []
        for number in range(len(study.tasks)):
            found = stage_result(study, cell, number)
            if found is None:
                break
            stages.append(found)
        if stages:
            out.append((cell, stages))
    return out


def table(study: Study) -> str:
    """Markdown: for each method and learning rate, accuracies after the last stage, means over the finished seeds."""
    columns = study.accuracy_sets + study.prior_skills
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
