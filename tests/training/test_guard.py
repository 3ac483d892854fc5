"""eval.guard: what must not get worse stops the run, and the model is the best checkpoint that respects the limit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft.cli import main
from sdft.config import load_config, to_toml
from sdft.errors import SdftError
from sdft.evaluation import accuracy
from sdft.evaluation.accuracy import Answer, EvalResult
from sdft.rollout.sampling import ModelEngine
from sdft.training import checkpoint, guard, loop
from sdft.training.checkpoint import checkpoints, latest
from sdft.training.metrics import read_metrics

BASE = 50  # of 100 questions, at the start


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    for name in ("guard", "new"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "say ab", "answer": "AB"}\n')
    return {
        "eval.guard": str(tmp_path / "guard.jsonl"), "eval.every": 1, "train.steps": 6, "train.keep_checkpoints": 1,
    }  # fmt: skip


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """scores(guard=[...], new=[...]) are the right answers of 100 in the evaluations at steps 0, 1, 2, ..."""

    def give(**series: list[int]) -> None:
        own, asked = guard.evaluate, []

        def evaluate(run: Any, step: int, output: Path) -> Any:
            asked[:] = [series[name][step] for name in run.evals]
            return own(run, step, output)

        def scripted(*args: Any) -> EvalResult:
            right = asked.pop(0)
            return EvalResult(tuple(Answer("", (), "", i < right) for i in range(100)))

        monkeypatch.setattr(guard, "evaluate", evaluate)
        monkeypatch.setattr(accuracy, "evaluate", scripted)

    return give


def weights(folder: Path, name: str = "weights.safetensors") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / name)


def steps(output: Path) -> list[int]:
    return [checkpoint.step_of(f) for f in checkpoints(output)]


def trained(output: Path) -> list[int]:
    return [line["step"] for line in read_metrics(output) if "loss" in line]


def assert_model_of_step(output: Path, step: int) -> None:
    """OUTPUT/model holds the weights of that step's checkpoint, which differ from the newest."""
    best, newest = weights(checkpoint.checkpoint_folder(output, step)), weights(latest(output))
    model = weights(output / "model", "model.safetensors")
    assert all(torch.equal(model[name], tensor) for name, tensor in best.items())
    assert not torch.equal(best["lm_head.weight"], newest["lm_head.weight"])


def test_a_run_that_loses_too_much_stops(
    make_config: Any, settings: Any, scores: Any, tmp_path: Path, capsys: Any
) -> None:
    scores(guard=[BASE, 51, 49, 47, 50, 50, 50])
    folder = loop.train(make_config(**settings))
    run = tmp_path / "run"
    assert trained(run) == [1, 2, 3]
    assert steps(run) == [2, 3]  # the best and the newest
    assert_model_of_step(run, 2)
    said = [line["guard"] for line in read_metrics(run) if "guard" in line]
    assert [line["respected"] for line in said] == [True, True, True, False]
    assert [line["drop"] for line in said] == pytest.approx([0, -1, 1, 3])
    assert {line["baseline"] for line in said} == {0.5}
    out = capsys.readouterr().out
    assert (
        "Stopped after step 3 by eval.guard: accuracy on guard is 3.0 points below the 50.0% of the start, and " in out
    )
    assert "eval.max_drop = 2. The model is that of step 2, the best that respects it." in out
    card = (folder / "README.md").read_text()
    assert "2 steps of 3 prompts" in card
    assert "| guard | 49.0% |" in card
    assert {f.name for f in (run / "eval").iterdir()} == {f"step-00000{i}-guard.jsonl" for i in range(4)}


@pytest.mark.parametrize(("max_drop", "stops"), [(2.0, False), (1.9, True), (0.0, True)])
def test_the_limit_itself_is_allowed(
    max_drop: float, stops: bool, make_config: Any, settings: Any, scores: Any, tmp_path: Path
) -> None:
    scores(guard=[29, 29, 27, 27, 27, 27, 27])  # 0.29 - 0.27 is a little over 0.02
    loop.train(make_config(**settings | {"eval.max_drop": max_drop}))
    assert trained(tmp_path / "run")[-1] == (2 if stops else 6)
    if not stops:
        model = weights(tmp_path / "run" / "model", "model.safetensors")
        assert torch.equal(model["lm_head.weight"], weights(latest(tmp_path / "run"))["lm_head.weight"])


@pytest.mark.parametrize(
    ("best", "new", "model"),
    [("new", [90, 10, 40, 30, 99, 0, 0], 2), ("mean", [90, 10, 20, 30, 99, 0, 0], 3), ("", [0] * 7, 3)],
)
def test_the_best_among_those_that_respect_the_limit(
    best: str, new: list[int], model: int, make_config: Any, settings: Any, scores: Any, tmp_path: Path
) -> None:
    """The step that stops the run is the best of all on keep_best's set, and it is not taken."""
    scores(guard=[BASE, 50, 50, 48, 10, 50, 50], new=new)
    settings |= {"eval.sets": {"new": str(tmp_path / "new.jsonl")}, "train.keep_best": best}
    loop.train(make_config(**settings))
    assert trained(tmp_path / "run") == [1, 2, 3, 4]
    assert steps(tmp_path / "run") == [model, 4]
    assert_model_of_step(tmp_path / "run", model)


def test_a_guard_that_is_one_of_the_sets_is_evaluated_once(
    make_config: Any, settings: Any, scores: Any, tmp_path: Path
) -> None:
    scores(old=[BASE, 50, 10, 0, 0, 0, 0])
    loop.train(make_config(**settings | {"eval.sets": {"old": str(tmp_path / "new.jsonl")}, "eval.guard": "old"}))
    assert trained(tmp_path / "run") == [1, 2]
    assert_model_of_step(tmp_path / "run", 1)
    assert [set(line["eval"]) for line in read_metrics(tmp_path / "run") if "eval" in line] == [{"old"}] * 3


def test_the_last_step_is_judged_too(make_config: Any, settings: Any, scores: Any, tmp_path: Path) -> None:
    scores(guard=[BASE, 0, 0, 50, 0, 0, 40])
    loop.train(make_config(**settings | {"eval.every": 3}))
    assert trained(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert_model_of_step(tmp_path / "run", 3)


def test_no_checkpoint_respects_the_limit(make_config: Any, settings: Any, scores: Any, tmp_path: Path) -> None:
    scores(guard=[BASE, 10, 50, 50, 50, 50, 50])
    run = tmp_path / "run"
    for resume in (False, True):
        with pytest.raises(
            SdftError, match=r"No checkpoint after the start respects that, so .*/run/model is not writ"
        ):
            loop.train(make_config(**settings | {"train.resume": resume}))
        assert trained(run) == [1]
        assert not (run / "model").exists()
        assert steps(run) == [1]


# Resume.


def test_a_stopped_run_does_not_train_on(
    make_config: Any, settings: Any, scores: Any, tmp_path: Path, capsys: Any
) -> None:
    scores(guard=[BASE, 50, 49, 40, 50, 50, 50])
    loop.train(make_config(**settings))
    run = tmp_path / "run"
    before = {str(f): f.read_bytes() for f in run.rglob("*") if f.is_file() and f.name != "config.toml"}
    capsys.readouterr()
    loop.train(make_config(**settings | {"train.resume": True}))
    after = {str(f): f.read_bytes() for f in run.rglob("*") if f.is_file() and f.name != "config.toml"}
    cards = [path for path in before if path.endswith("README.md")]  # its config has resume = true
    assert before.keys() == after.keys()
    assert [path for path in before if before[path] != after[path]] == cards
    assert "Stopped after step 3 by eval.guard" in capsys.readouterr().out


@pytest.mark.parametrize(("place", "call"), [("train_step", 2), ("train_step", 4), ("back_to_best", 1), ("finish", 1)])
def test_a_kill_changes_nothing(
    place: str, call: int, make_config: Any, settings: Any, scores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(guard=[BASE, 50, 52, 49, 40, 50, 50])
    loop.train(make_config(**settings))
    split = settings | {"train.output": str(tmp_path / "split")}
    module = guard if place == "back_to_best" else loop
    own, calls = getattr(module, place), [0]

    def killed(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise RuntimeError("power cut")
        return own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, place, killed)
        with pytest.raises(RuntimeError, match="power cut"):
            loop.train(make_config(**split))
    loop.train(make_config(**split | {"train.resume": True}))
    assert steps(tmp_path / "split") == steps(tmp_path / "run") == [3, 4]
    assert_model_of_step(tmp_path / "split", 3)
    for step in (3, 4):
        got, want = (weights(checkpoint.checkpoint_folder(tmp_path / name, step)) for name in ("split", "run"))
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    said = [[line.get("guard") for line in read_metrics(tmp_path / name)] for name in ("split", "run")]
    assert said[0] == said[1]


def test_another_keep_best_on_resume_forgets_no_way_back(
    make_config: Any, settings: Any, scores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(guard=[BASE, 50, 50, 10, 50, 50, 50], new=[0, 30, 20, 0, 0, 0, 0])
    settings |= {"eval.sets": {"new": str(tmp_path / "new.jsonl")}}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", lambda *a: pytest.fail("not yet"))
        patch.setattr(guard, "back_to_best", lambda *a: pytest.fail("not yet"))
        with pytest.raises(pytest.fail.Exception):
            loop.train(make_config(**settings))
    loop.train(make_config(**settings | {"train.resume": True, "train.keep_best": "new"}))
    assert_model_of_step(tmp_path / "run", 2)


def test_other_limits_are_another_run(make_config: Any, settings: Any, scores: Any) -> None:
    scores(guard=[BASE, 50, 10, 50, 50, 50, 50])
    loop.train(make_config(**settings))
    with pytest.raises(SdftError, match=r"eval\.max_drop was 2\.0 .* and is now 90\.0; put it back"):
        loop.train(make_config(**settings | {"train.resume": True, "eval.max_drop": 90.0}))


# From the command line, with nothing scripted.


def test_the_command_guards_what_the_model_knew(make_config: Any, make_run: Any, tmp_path: Path, capsys: Any) -> None:
    """The guard set holds the greedy answers of the start, which a run with a high learning rate loses."""
    run = make_run(**{"train.output": str(tmp_path / "probe"), "rollout.temperature": 0.0})
    found = ModelEngine(run.model).generate([e.prompt for e in run.data.examples], run.config.rollout)
    given = [run.tokenizer.decode(c.ids, skip_special_tokens=True) for c in found]
    asked = [json.loads(line)["prompt"] for line in Path(run.config.data.train).read_text().splitlines()]
    rows = [{"prompt": p, "answer": a, "check": "exact"} for p, a in zip(asked, given, strict=True) if a.strip()]
    assert len(rows) > 5
    (tmp_path / "knew.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "loss.method": "sft", "optim.lr": 3e-5, "optim.schedule": "constant", "train.steps": 60,
        "eval.max_new_tokens": 6, "eval.every": 2,
    }  # fmt: skip
    (tmp_path / "c.toml").write_text(to_toml(make_config(**settings)))
    main(["train", str(tmp_path / "c.toml"), "--guard", str(tmp_path / "knew.jsonl"), "--max-drop=30"])
    output = tmp_path / "run"
    assert load_config(output / "config.toml").eval.guard == str(tmp_path / "knew.jsonl")
    lines = [line for line in read_metrics(output) if "eval" in line]
    assert lines[0]["eval"] == {"guard": 1.0}
    assert len(lines) > 2
    assert lines[-1]["guard"]["drop"] > 30
    assert_model_of_step(output, lines[-2]["step"])
    capsys.readouterr()
    main(
        [
            "eval",
            str(output / "model"),
            str(tmp_path / "knew.jsonl"),
            "--max-new-tokens",
            "6",
            "--compute-dtype",
            "float32",
        ]
    )
    assert f"accuracy {lines[-2]['eval']['guard']:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--max-drop", "3"], ["--max_drop=3"], ["--eval.max-drop", "3"]])
def test_short_forms(flags: list[str], make_config: Any, tmp_path: Path) -> None:
    import tyro

    from sdft.cli.commands import config_from
    from sdft.config import Config

    (tmp_path / "c.toml").write_text(to_toml(make_config()))
    config, rest = config_from([str(tmp_path / "c.toml"), "--guard=a=b.jsonl", *flags])
    parsed = tyro.cli(Config, default=config, args=rest)
    assert (parsed.eval.guard, parsed.eval.max_drop) == ("a=b.jsonl", 3.0)
