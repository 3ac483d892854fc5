"""A small study on a tiny model, and stages that take no time."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from sdft.study import results, run
from sdft.study.spec import Cell, Study, run_folders


@pytest.fixture
def make_study(write_study: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """make_study(**changes) is the file of a study of two tasks, two methods, two learning rates and two seeds."""
    return functools.partial(write_study, tmp_path)


@pytest.fixture(scope="session")
def write_study(model_folder: Callable[[str], Path]) -> Callable[..., Path]:
    """write_study(folder, **changes): as make_study, in any folder."""
    model = model_folder("llama")

    def make(folder: Path, **changes: Any) -> Path:
        for name, answer in (("colours", "red"), ("sizes", "big"), ("known", "yes")):
            rows = [{"prompt": f"{name} {i}?", "demonstration": answer} for i in range(6)]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        table = {
            "output": str(folder / "study"),
            "seeds": [0, 1],
            "learning_rates": [1e-3, 2e-3],
            "config": {
                "model": {"name": str(model), "compute_dtype": "float32"},
                "rollout": {"max_new_tokens": 4},
                "eval": {"max_new_tokens": 4},
                "train": {"steps": 2, "batch_size": 2},
            },
            "tasks": [
                {"name": n, "train": str(folder / f"{n}.jsonl"), "eval": {"test": str(folder / f"{n}.jsonl")}}
                for n in ("colours", "sizes")
            ],
            "prior": {"known": str(folder / "known.jsonl")},
            "methods": {"sdft": {"loss": {"method": "sdft"}}, "sft": {"loss": {"method": "sft"}}},
        } | changes
        path = folder / "study.toml"
        path.write_text(tomli_w.dumps(table))
        return path

    return make


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CELL/TASK of every stage that was run, in order; the stages leave results at once, and no model is loaded."""
    stages: list[str] = []

    def everywhere(study: Study, value: float) -> dict[str, float]:
        return dict.fromkeys([*study.sets, *study.harness.tasks], value)

    def train_stage(study: Study, cell: Cell, number: int) -> dict[str, int]:
        stages.append(f"{cell.name}/{study.tasks[number].name}")
        (run_folders(study, cell, number)[-1] / "model").mkdir(parents=True, exist_ok=True)
        return {"tokens": 10, "flops": 1000}

    def evaluate_base(study: Study) -> None:
        result = {"accuracy": everywhere(study, 0.0), "seconds": {"evaluate": 1.0}}
        results.write(study.output / "base", results.base_facts(study) | result)

    monkeypatch.setattr(run, "train_stage", train_stage)
    monkeypatch.setattr(run, "evaluate_base", evaluate_base)
    monkeypatch.setattr(run, "evaluate_stage", lambda s, *_: {"accuracy": everywhere(s, 0.5), "drift": {}})
    return stages
