"""The files in studies/: every run is valid, the first step of every method runs, memory is predicted."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from sdft.cli import main
from sdft.config import describe, override
from sdft.evaluation import harness
from sdft.model.shape import ModelShape
from sdft.planning import work as planned_work
from sdft.planning.machine import GIB, this_machine
from sdft.study import spec
from sdft.study.plan import Sizes, plan_study
from sdft.training.loop import train

FILES = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))
# The sizes in the models' config.json.
CONFIGS = {
    "smollm2-135m": transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-7B-Instruct": transformers.Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "Qwen/Qwen2.5-3B-Instruct": transformers.Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-14B-Instruct": transformers.Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40,
        num_key_value_heads=8, tie_word_embeddings=False,
    ),
    "allenai/Olmo-3-7B-Think": transformers.Olmo3Config(vocab_size=100278),
}  # fmt: skip
TINY = {"smollm2-135m": "llama-tied", "Qwen/Qwen2.5-7B-Instruct": "qwen2", "allenai/Olmo-3-7B-Think": "olmo3"}
SMALL = {
    "train.steps": 1, "train.batch_size": 2, "rollout.max_new_tokens": 5, "model.compute_dtype": "auto",
    "optim.warmup_steps": 0,
}  # fmt: skip


def some(*slow: str) -> list[Any]:
    """The study files; those whose names are given are slow."""
    return [pytest.param(f, id=f.stem, marks=[pytest.mark.slow] * (f.stem in slow)) for f in FILES]


def stages(found: spec.Study) -> Iterator[tuple[spec.Cell, int]]:
    return ((cell, number) for cell in spec.cells(found) for number in range(len(found.tasks)))


def test_the_papers_experiments_are_there() -> None:
    tasks = {f.stem: [t.name for t in spec.load_study(f, with_data=False).tasks] for f in FILES}
    assert tasks == {
        "cpu": ["facts", "style"],
        "cpu-rates": ["style"],
        "cpu-why": ["style"],
        "paper-knowledge": ["knowledge"],
        "paper-medical": ["medical"],
        "paper-science": ["science"],
        "paper-sequence": ["science", "tools", "medical"],
        "paper-thinking": ["medical"],
        "paper-tools": ["tools"],
    }


@pytest.mark.parametrize("file", [f for f in FILES if f.stem.startswith("paper")], ids=lambda f: f.stem)
def test_the_papers_grid(file: Path) -> None:
    found = spec.load_study(file, with_data=False)
    assert found.seeds == (0, 1, 2)
    assert found.config.eval.max_new_tokens == found.config.rollout.max_new_tokens
    assert found.drift
    assert found.drift_on.endswith("prior.jsonl")  # the KL to the base on unrelated prompts too
    assert list(found.harness.tasks) == ["hellaswag", "humaneval", "ifeval", "mmlu", "truthfulqa_mc1", "winogrande"]
    assert {c.learning_rate for c in spec.cells(found)} == {5e-6, 1e-5, 5e-5}
    runs = {}
    for cell in spec.cells(found):
        for config in spec.stage_configs(found, cell, 0, "start"):
            runs.setdefault(cell.method.family, []).append(config)
    sdft = runs["sdft"]
    assert {(c.loss.divergence, c.loss.mask_first, c.loss.average) for c in sdft} == {("forward_kl", 3, "sequence")}
    assert all(c.teacher.kind == "ema" and c.rollout.source == "student" for c in sdft)
    assert all("{demonstration}" in c.teacher.template for c in sdft)  # the preset's context gives way to the file's
    if file.stem != "paper-sequence":
        for name in ("sdft", "sft"):
            assert {c.train.batch_size for c in runs[name]} == {16, 32, 64}
        assert {c.teacher.ema_alpha for c in sdft} == {0.01, 0.02, 0.05}
    if "sdft-as-written" in runs:
        assert {c.loss.divergence for c in runs["sdft-as-written"]} == {"reverse_kl"}
    assert all(c.model.name == "start" or c.teacher.model == found.config.model.name for r in runs.values() for c in r)


def test_list_and_other_sizes(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Neither needs the data."""
    monkeypatch.chdir(tmp_path)
    path = str(next(f for f in FILES if f.stem == "paper-science"))
    main(["study", path, "--list", "--model", "Qwen/Qwen2.5-14B-Instruct", "--output", "other"])
    assert "sft/train.batch_size-32/train.epochs-1/lr-1e-05/seed-2: 0 of 1 stages" in capsys.readouterr().out
    found = spec.load_study(path, "Qwen/Qwen2.5-14B-Instruct", "other", with_data=False)
    cell = next(c for c in spec.cells(found) if c.method.family == "sft-reinvoked")
    first, second = spec.stage_configs(found, cell, 0, found.config.model.name)
    assert first.model.name == second.teacher.model == "Qwen/Qwen2.5-14B-Instruct"
    assert second.model.name == str(Path(first.train.output) / "model")
    assert first.train.output.startswith("other/")


@pytest.mark.parametrize("file", some())
def test_the_first_step_of_every_method(file: Path, tmp_path: Path, model_folder: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    found = spec.load_study(file, with_data=False)
    rows = [{"prompt": f"say {i}", "demonstration": f"It is {i}.", "answer": str(i)} for i in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    named = {c.data.train for cell, n in stages(found) for c in spec.stage_configs(found, cell, n, "start")}
    for path in named | set(found.sets.values()) | ({found.drift_on} - {""}):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    monkeypatch.setattr(harness, "check", lambda *args: None)  # the extra lm-eval need not be installed here
    found = spec.load_study(file, str(model_folder(TINY[found.config.model.name])))
    tried = {}
    for cell, number in stages(found):
        configs = [
            override(config, SMALL | {"teacher.ema_alpha": 0.01})
            for config in spec.stage_configs(found, cell, number, found.config.model.name)
        ]
        described = [(describe(c), c.teacher.turns, c.rollout.temperature, c.loss.temperature) for c in configs]
        if tuple(described) in tried:  # the same but for the learning rate, the seed and the like
            continue
        tried[tuple(described)] = cell.method.family
        for config in configs:
            train(config)
            lines = [json.loads(line) for line in (Path(config.train.output) / "metrics.jsonl").open()]
            assert [line["step"] for line in lines if "loss" in line] == [1]
    assert set(tried.values()) == {method.family for method in found.methods}


@pytest.mark.parametrize("file", some("paper-thinking"))
def test_memory_and_operations_are_predicted(file: Path, monkeypatch: Any) -> None:
    """For every run, from the shape of the model alone."""
    found = spec.load_study(file, with_data=False)
    config = CONFIGS[found.config.model.name]
    monkeypatch.setattr(planned_work, "shape_of", lambda _: ModelShape.from_config(config))
    if file.stem == "paper-thinking":  # is simulated, which takes its time
        found = replace(found, methods=tuple(replace(m, name=m.family, point={}) for m in found.methods))
    machine = this_machine(override(found.config, {"model.device": "cuda"}), 141 * GIB)
    # The sizes in the command of the file.
    sizes = dict(re.findall(r"--((?:teacher-)?prompt-tokens|records) (\d+)", file.read_text()))
    prompt, shown, records = (int(sizes.get(k, 0)) for k in ("prompt-tokens", "teacher-prompt-tokens", "records"))
    planned = plan_study(found, machine, Sizes(prompt or 500, shown, records or 1000))
    assert sum(one.runs for one in planned) == sum(len(cell.method.phases) for cell, _ in stages(found))
    weights = ModelShape.from_config(config).parameters * (4 if file.stem.startswith("cpu") else 2)
    for one in planned:
        assert 4 * weights < one.peak < machine.memory  # weights, gradients, two moments; all fits on an H200
    peaks = {one.name.split(",")[0]: one.peak for one in planned}
    flops = {one.name.split(",")[0]: one.flops / one.steps for one in planned}
    if not file.stem.startswith("cpu-"):  # are of one method
        assert peaks["sdft"] > peaks["sft"]
        assert flops["sdft"] > flops["sft"]


@pytest.mark.parametrize(
    ("model", "lean", "gib"), [("3B", False, 43), ("14B", False, 203), ("14B", True, 124), ("7B", True, 64)]
)
def test_other_sizes_take_what_the_files_say(model: str, lean: bool, gib: int, monkeypatch: Any) -> None:
    file = next(f for f in FILES if f.stem == "paper-science")
    name = f"Qwen/Qwen2.5-{model}-Instruct"
    monkeypatch.setattr(planned_work, "shape_of", lambda c: ModelShape.from_config(CONFIGS[c.model.name]))
    found = spec.load_study(file, name, with_data=False)
    changed = {"optim.name": "adamw_8bit", "teacher.offload": True} if lean else {}
    sdft = [replace(m, phases=({**m.phases[0], **changed},)) for m in found.methods if m.family == "sdft"]
    machine = this_machine(override(found.config, {"model.device": "cuda"}), 141 * GIB)
    planned = plan_study(replace(found, methods=tuple(sdft)), machine, Sizes(prompt=500, records=4000))
    assert round(max(one.peak for one in planned) / GIB) == gib
    assert f"{gib} GiB" in " ".join(file.read_text().replace("\n#", "").split())


def test_plan_of_a_study_without_its_data(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planned_work, "shape_of", lambda c: ModelShape.from_config(CONFIGS[c.model.name]))
    path = str(next(f for f in FILES if f.stem == "paper-tools"))
    args = ["--plan", "--memory", "80GB", "--tflops", "200", "--prompt-tokens", "500"]
    main(["study", path, *args, "--records", "4000"])
    out = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in out.splitlines() if line.startswith("|")}
    runs, steps, _, fits, pflop, hours = (
        cell.strip() for cell in rows["sft, tools, train.batch_size 16, train.epochs 2"]
    )
    assert (runs, steps, fits) == ("9", "500", "yes")
    assert float(hours) == pytest.approx(float(pflop) * 1e15 / 200e12 / 3600, rel=0.05)
    assert rows["sdft, tools, train.batch_size 16, train.epochs 2"][3].strip() == "no"
    assert "The device has 80.00 GiB." in out
    with pytest.raises(SystemExit):
        main(["study", path, *args])
    assert "--prompt-tokens and --records go together" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["study", path, "--plan"])
    assert "runs/tasks/tools/most.jsonl" in capsys.readouterr().err
