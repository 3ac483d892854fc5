"""A run that is interrupted and resumed equals an uninterrupted run, bit for bit."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft import files
from sdft.config import to_toml
from sdft.errors import SdftError
from sdft.loss import LOSSES
from sdft.training import checkpoint, guard, loop
from sdft.training import step as step_module
from sdft.training.checkpoint import checkpoints, latest
from sdft.training.metrics import MetricsLog, read_metrics
from sdft.training.step import NonFiniteError

TIMES = ("seconds", "tokens_per_second", "peak_memory")
RUNS = {
    "sdft": {},
    "sft": {"loss.method": "sft"},
    "lora": {"lora.rank": 2, "lora.dropout": 0.2, "optim.weight_decay": 0.1},
    "mixed": {"rollout.source": "mixed", "rollout.per_prompt": 2, "train.micro_batch_tokens": 100, "train.seed": 3},
    "base": {"teacher.kind": "base", "loss.divergence": "jsd", "rollout.source": "teacher"},
    "live": {"teacher.kind": "live", "loss.divergence": "forward_kl", "loss.average": "sequence"},
    "bf16": {
        "model.weights_dtype": "bfloat16",
        "model.compute_dtype": "bfloat16",
        "optim.lr": 1e-2,
        "model.gradient_checkpointing": True,
    },
}


def outcome(output: Path) -> dict[str, Any]:
    """All that must be the same: every tensor of model and last checkpoint, and the metrics except times."""
    from safetensors.torch import load_file

    files = [*(output / "model").glob("*.safetensors"), *latest(output).glob("*.safetensors")]
    found: dict[str, Any] = {f"{f.parent.name}/{f.name}/{k}": t for f in files for k, t in load_file(f).items()}
    moments = torch.load(latest(output) / "optimizer.pt", weights_only=True)["state"]
    found |= {f"moments/{i}/{k}": t for i, state in moments.items() for k, t in state.items()}
    found["metrics"] = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(output)]
    found["eval"] = {f.name: f.read_text() for f in (output / "eval").glob("*")}
    return found


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        same = torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value
        assert same, name


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "eval.jsonl").write_text('{"prompt": "say ab", "answer": "AB"}\n')
    return {
        "train.steps": 6,
        "eval.sets": {"new": str(tmp_path / "eval.jsonl")},
        "eval.every": 2,
        "eval.max_new_tokens": 3,
    }


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Does `action` within that step (from 0)."""
    own = loop.train_step

    def wrapped(run: Any, number: int, output: Path) -> Any:
        if number == step:
            action()
        return own(run, number, output)

    monkeypatch.setattr(loop, "train_step", wrapped)


def control_c() -> None:
    signal.raise_signal(signal.SIGINT)


def crash() -> None:
    raise RuntimeError("power cut")


@pytest.mark.parametrize("kind", RUNS)
def test_ctrl_c_and_resume(
    kind: str, make_config: Any, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    settings |= RUNS[kind]
    loop.train(make_config(**settings))
    handler = signal.getsignal(signal.SIGINT)
    split = {"train.output": str(tmp_path / "split")}
    for step in (0, 2, 3) if kind == "sdft" else (2,):
        with monkeypatch.context() as patch:
            at_step(patch, step, control_c)
            with pytest.raises(KeyboardInterrupt):
                loop.train(make_config(**settings | split | {"train.resume": step > 0}))
        assert latest(tmp_path / "split").name == f"step-{step + 1:06d}"
        assert (
            f"Stopped after step {step + 1}; saved. Continue with train.resume = true (--resume)."
            in capsys.readouterr().out
        )
        assert signal.getsignal(signal.SIGINT) is handler
    loop.train(make_config(**settings | split | {"train.resume": True}))
    assert f"Resumed after step {step + 1} from" in capsys.readouterr().out
    assert_same(outcome(tmp_path / "split"), outcome(tmp_path / "run"))


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    step: int, make_config: Any, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.train(make_config(**settings))
    split = settings | {"train.output": str(tmp_path / "split"), "train.save_every": 2}
    with monkeypatch.context() as patch:
        at_step(patch, step, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            loop.train(make_config(**split))
    loop.train(make_config(**split | {"train.resume": True, "train.keep_checkpoints": 1, "train.save_every": 1}))
    assert_same(outcome(tmp_path / "split"), outcome(tmp_path / "run"))


def test_a_second_ctrl_c_does_not_wait(make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at_step(monkeypatch, 1, lambda: (control_c(), control_c()))
    with pytest.raises(KeyboardInterrupt):
        loop.train(make_config())
    assert len(read_metrics(tmp_path / "run")) == 1
    assert latest(tmp_path / "run") is None


def test_sigint_to_the_command(make_config: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    (tmp_path / "c.toml").write_text(to_toml(make_config(**{"train.steps": 1000})))
    command = [sys.executable, "-m", "sdft", "train", str(tmp_path / "c.toml")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or not read_metrics(output):
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.005)
    run.send_signal(signal.SIGINT)
    printed = run.communicate(timeout=120)[0]
    assert run.returncode == 130, printed
    assert "Traceback" not in printed
    steps = len(read_metrics(output))
    assert 0 < steps < 1000
    assert latest(output).name == f"step-{steps:06d}"  # from which test_ctrl_c_and_resume resumes


# Runs that cannot be resumed.


@pytest.fixture
def stopped(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A run of 4 steps, stopped after the second; stopped(**overrides) is the config that resumes it."""
    with monkeypatch.context() as patch:
        at_step(patch, 1, control_c)
        with pytest.raises(KeyboardInterrupt):
            loop.train(make_config(**{"train.save_every": 1}))
    return lambda **overrides: make_config(**{"train.resume": True} | overrides)


def test_another_run_in_the_folder(stopped: Any, tmp_path: Path) -> None:
    before = (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(SdftError, match=r"holds another run; .* or continue it with train\.resume = true \(--resume\)"):
        loop.train(stopped(**{"train.resume": False}))
    assert (tmp_path / "run" / "config.toml").read_text() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("optim.lr", 5e-4), ("train.seed", 1), ("train.steps", 9), ("loss.divergence", "jsd"), ("lora.rank", 2),
     ("teacher.ema_alpha", 0.5), ("eval.sets", {"new": "x"}), ("optim.betas", (0.8, 0.9))],
)  # fmt: skip
def test_another_config(stopped: Any, key: str, value: Any) -> None:
    with pytest.raises(SdftError) as error:
        loop.train(stopped(**{key: value}))
    assert f"--resume: {key}" in str(error.value)
    assert "put it back, or start another run" in str(error.value)


def test_settings_that_are_free(stopped: Any, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "run", moved)
    loop.train(stopped(**{"train.output": str(moved), "train.save_every": 3, "train.keep_checkpoints": 5}))
    assert [line["step"] for line in read_metrics(moved)] == [1, 2, 3, 4]


def test_a_run_goes_on_with_the_batches_that_fitted(
    make_config: Any, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out once, in the second step, for the gradients and for the rollout."""

    def short_of_memory(patch: pytest.MonkeyPatch, name: str) -> None:
        own, calls = getattr(step_module, name), [0]

        def fails_once(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == 2:
                raise MemoryError
            return own(*args)

        patch.setattr(step_module, name, fails_once)

    settings |= {"train.save_every": 1}
    for output, stops in (("run", False), ("split", True)):
        with monkeypatch.context() as patch:
            short_of_memory(patch, "complete")
            short_of_memory(patch, "accumulate_gradients")
            if stops:
                at_step(patch, 4, crash)
            with contextlib.suppress(RuntimeError):
                loop.train(make_config(**settings | {"train.output": str(tmp_path / output)}))
    loop.train(make_config(**settings | {"train.output": str(tmp_path / "split"), "train.resume": True}))
    assert_same(outcome(tmp_path / "split"), outcome(tmp_path / "run"))
    budgets = [line.get("micro_batch_tokens") for line in read_metrics(tmp_path / "split") if "loss" in line]
    assert budgets[0] is None
    assert len(set(budgets[1:])) == 1
    state = json.loads((latest(tmp_path / "split") / "state.json").read_text())
    assert state["rollout_batch"] == [64, 1]
    assert state["micro_batch_tokens"] == [0, budgets[-1]]


def test_other_budgets_are_taken_from_the_config(stopped: Any, tmp_path: Path) -> None:
    loop.train(stopped(**{"train.micro_batch_tokens": 60, "model.gradient_checkpointing": True}))
    budgets = [line.get("micro_batch_tokens") for line in read_metrics(tmp_path / "run")]
    assert budgets == [None, None, 60, 60]


def test_other_data_under_the_same_name(stopped: Any, skill: Path) -> None:
    skill.write_text(skill.read_text().replace("QR", "qR"))
    with pytest.raises(SdftError, match=r"--resume: the data in .* is not what .* was trained on; put it back"):
        loop.train(stopped())


def test_a_corrupt_checkpoint_gives_way_to_the_one_before(stopped: Any, make_config: Any, tmp_path: Path) -> None:
    run, newest = tmp_path / "run", latest(tmp_path / "run")
    (newest / "weights.safetensors").write_bytes(b"half")
    before = content(run)
    with pytest.raises(SdftError, match=r"step-000002: weights\.safetensors has 4 bytes, .*resume-step 1 continues"):
        loop.train(stopped())
    assert content(run) == before
    loop.train(stopped(**{"train.resume_step": 1}))
    loop.train(make_config(**{"train.output": str(tmp_path / "whole")}))
    assert_same(outcome(run), outcome(tmp_path / "whole"))
    aside = run / "set-aside-after-step-000001"
    assert {str(p.relative_to(aside)) for p in aside.rglob("step-*")} == {"checkpoints/step-000002"}
    assert (aside / "checkpoints" / "step-000002" / "weights.safetensors").read_bytes() == b"half"


# Back to an earlier step.


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_going_back_loses_nothing(make_config: Any, settings: Any, tmp_path: Path, capsys: Any) -> None:
    settings |= {"train.save_every": 1, "train.keep_checkpoints": 9}
    back = {"train.resume": True, "train.resume_step": 3}
    run = tmp_path / "run"
    loop.train(make_config(**settings))
    want, before = outcome(run), content(run)
    loop.train(make_config(**settings | back))
    first, second = run / "set-aside-after-step-000003", run / "set-aside-after-step-000003-2"
    assert f"What came after step 3 is in {first}" in capsys.readouterr().out
    assert_same(outcome(run), want)
    assert [line["step"] for line in read_metrics(first)] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    after = content(first)
    moved = {n for n in before if n.startswith("model/") or any(f"step-00000{i}" in n for i in (4, 5, 6))}
    assert after.keys() - {"metrics.jsonl"} == moved
    assert all(after[name] == before[name] for name in moved)
    loop.train(make_config(**settings | back))
    assert content(first) == after
    assert content(second).keys() == after.keys()
    loop.train(make_config(**settings | {"train.resume": True}))  # a later start looks at neither
    assert_same(outcome(run), want)
    assert sorted(p.name for p in run.glob("set-aside*")) == [first.name, second.name]


def test_going_back_to_the_newest_sets_nothing_aside(stopped: Any, tmp_path: Path) -> None:
    loop.train(stopped(**{"train.resume_step": 2}))
    assert not list((tmp_path / "run").glob("set-aside*"))


def test_a_step_without_checkpoint(stopped: Any, make_config: Any, tmp_path: Path) -> None:
    before = content(tmp_path / "run")
    with pytest.raises(SdftError, match=r"train\.resume_step = 7: .* has no checkpoint of that step; it has 1, 2$"):
        loop.train(stopped(**{"train.resume_step": 7}))
    assert content(tmp_path / "run") == before
    with pytest.raises(SdftError, match="it has none at all"):
        loop.train(make_config(**{"train.output": str(tmp_path / "new"), "train.resume": True, "train.resume_step": 7}))


# Checkpoints of other runs.


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optim.lr", 5e-4, "--resume: optim.lr was 0.0005 in {folder} and is now 0.001; put it back"),
        ("train.seed", 1, "--resume: train.seed was 1 in {folder} and is now 0"),
        ("lora.targets", ("q_proj",), "--resume: lora.targets was ['q_proj'] in {folder} and is now ('all-linear',)"),
    ],
)
def test_a_checkpoint_copied_from_another_run(
    stopped: Any, make_config: Any, tmp_path: Path, key: str, value: Any, words: str
) -> None:
    loop.train(make_config(**{key: value, "train.output": str(tmp_path / "other")}))
    folder = Path(shutil.copytree(latest(tmp_path / "other"), tmp_path / "run" / "checkpoints" / "step-000004"))
    before = content(tmp_path / "run")
    with pytest.raises(SdftError) as error:
        loop.train(stopped())
    assert words.format(folder=folder) in str(error.value)
    assert content(tmp_path / "run") == before


def test_other_frozen_weights_under_the_same_name(make_config: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    name = Path(shutil.copytree(make_config().model.name, tmp_path / "base"))
    lora = {"lora.rank": 2, "model.name": str(name)}
    loop.train(make_config(**lora))
    weights = load_file(name / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.1
    save_file(weights, name / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SdftError, match=r"frozen weights of model\.name = .* are not those that .* was trained on"):
        loop.train(make_config(**lora | {"train.resume": True}))


# The best one.


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """scores(new=[...], old=[...]) are the accuracies of the evaluations at steps 0, 1, 2, ..."""

    def give(**series: list[float]) -> None:
        def evaluate(run: Any, step: int, output: Path) -> dict[str, Any]:
            run.result = {name: values[step] for name, values in series.items()}
            return {"step": step, "eval": run.result}

        monkeypatch.setattr(guard, "evaluate", evaluate)

    return give


def steps(output: Path) -> list[int]:
    return [int(f.name[5:]) for f in checkpoints(output)]


NEW, OLD = [0.9, 0.1, 0.5, 0.5, 0.2, 0.5, 0.4], [0.9, 0.8, 0.1, 0.2, 0.6, 0.1, 0.1]


@pytest.mark.parametrize(
    ("on", "best", "accuracy"), [("new", 2, "50.0%"), ("old", 1, "80.0%"), ("mean", 1, "45.0%"), ("", None, "")]
)
def test_the_best_is_kept(
    on: str, best: int | None, accuracy: str, make_config: Any, settings: Any, scores: Any, tmp_path: Path, capsys: Any
) -> None:
    scores(new=NEW, old=OLD)
    sets = {"new": settings["eval.sets"]["new"], "old": settings["eval.sets"]["new"]}
    settings |= {"eval.every": 1, "eval.sets": sets, "train.keep_best": on}
    loop.train(make_config(**settings))
    assert steps(tmp_path / "run") == ([best, 6] if best else [6])
    said = f"Best on {on}: {accuracy} after step {best}: {tmp_path}/run/checkpoints/step-00000{best}"
    assert (said in capsys.readouterr().out) == (best is not None)
    state = json.loads((latest(tmp_path / "run") / "state.json").read_text())
    assert state["step"] == 6
    assert state["best"].get("step") == best


def test_the_best_survives_a_kill(
    make_config: Any, settings: Any, scores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(new=NEW)
    settings |= {"eval.every": 1, "train.keep_best": "new", "train.keep_checkpoints": 1, "train.save_every": 4}
    loop.train(make_config(**settings))
    split = settings | {"train.output": str(tmp_path / "split")}
    for step in (1, 3, 5):
        with monkeypatch.context() as patch:
            at_step(patch, step, crash)
            with pytest.raises(RuntimeError, match="power cut"):
                loop.train(make_config(**split | {"train.resume": step > 1}))
    loop.train(make_config(**split | {"train.resume": True}))
    assert steps(tmp_path / "split") == steps(tmp_path / "run") == [2, 6]
    assert_same(outcome(tmp_path / "split"), outcome(tmp_path / "run"))


def test_the_ring_is_trimmed_where_a_kill_came_before(
    make_config: Any, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"train.save_every": 3, "train.keep_checkpoints": 1}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "prune", lambda output, keep, best: crash() if steps(output) == [3, 6] else None)
        with pytest.raises(RuntimeError, match="power cut"):
            loop.train(make_config(**settings))
    assert steps(tmp_path / "run") == [3, 6]
    loop.train(make_config(**settings | {"train.resume": True}))
    assert steps(tmp_path / "run") == [6]


def test_a_best_that_has_gone_is_sought_anew(
    make_config: Any, settings: Any, scores: Any, tmp_path: Path, capsys: Any
) -> None:
    scores(new=NEW)
    settings |= {"eval.every": 1, "train.keep_best": "new", "train.save_every": 1, "train.keep_checkpoints": 9}
    loop.train(make_config(**settings))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000002")
    loop.train(make_config(**settings | {"train.resume": True, "train.resume_step": 3}))
    out = capsys.readouterr().out
    assert "The best checkpoint (on new: 50.0% after step 2) is gone" in out
    assert "Best on new: 50.0% after step 5" in out
    shutil.rmtree(tmp_path / "run" / "set-aside-after-step-000003")
    back = {"train.resume": True, "train.resume_step": 4, "train.keep_best": ""}
    loop.train(make_config(**settings | back))
    assert "Best on" not in capsys.readouterr().out


# What a kill or a full disk leaves behind.


def test_what_was_left_half_done_is_cleared_away(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = torch.save

    def twice_control_c(*args: Any) -> None:
        own(*args)
        control_c()
        control_c()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", twice_control_c)
        with pytest.raises(KeyboardInterrupt):
            loop.train(make_config(**{"train.save_every": 2}))
    run = tmp_path / "run"
    assert (run / "partial-step-000002").is_dir()
    for name in ("partial-model", "partial-removed-step-000001", "eval/partial-step-000002-new.jsonl"):
        (run / name).mkdir(parents=True)
    (run / "partial-metrics.jsonl").write_text("half")
    loop.train(make_config(**{"train.resume": True}))
    assert not list(run.rglob("partial*"))
    loop.train(make_config(**{"train.output": str(tmp_path / "whole")}))
    assert_same(outcome(run), outcome(tmp_path / "whole"))


def test_a_start_killed_before_its_config_was_written_is_no_obstacle(make_config: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "partial-config.toml").write_text("half")
    loop.train(make_config(**{"train.steps": 1}))


def test_a_folder_in_use_is_left_alone(stopped: Any, tmp_path: Path) -> None:
    (tmp_path / "run" / "partial-step-000003").mkdir()
    with files.locked(tmp_path / "run"), pytest.raises(SdftError, match="is in use by another process"):
        loop.train(stopped())
    assert (tmp_path / "run" / "partial-step-000003").is_dir()


@pytest.mark.parametrize("where", ["metrics.jsonl", "checkpoints", "eval"])
def test_a_disk_full_within_a_run(
    where: str, make_config: Any, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.train(make_config(**settings))
    split = settings | {"train.output": str(tmp_path / "split"), "train.save_every": 1}

    class FullAtStep4(MetricsLog):
        def write(self, line: dict[str, Any]) -> None:
            if line["step"] == 4:
                self.file = open("/dev/full", "w")  # noqa: SIM115
            super().write(line)

    def replace(partial: Path, final: Path) -> None:
        if final.parent.name == where and "step-000004" in final.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        own(partial, final)

    own = os.replace
    with monkeypatch.context() as patch:
        if where == "metrics.jsonl":
            patch.setattr(loop, "MetricsLog", FullAtStep4)
        else:
            patch.setattr(files.os, "replace", replace)
        with pytest.raises(SdftError, match="not written: no space left on the device; free some"):
            loop.train(make_config(**split))
    assert not list((tmp_path / "split").rglob("partial*"))
    loop.train(make_config(**split | {"train.resume": True}))
    assert_same(outcome(tmp_path / "split"), outcome(tmp_path / "run"))


def test_a_run_stopped_by_nan_goes_on_and_skips(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LOSSES["divergence"]
    bad = {"calls": 0}

    def nan_at_third(*args: Any) -> Any:
        bad["calls"] += 1
        loss, part = own(*args)
        return (loss * float("nan") if bad["calls"] == 3 else loss), part

    monkeypatch.setitem(LOSSES, "divergence", nan_at_third)
    with pytest.raises(NonFiniteError, match=r"step 3: .*--resume --train\.on-nonfinite skip"):
        loop.train(make_config())
    assert latest(tmp_path / "run").name == "step-000002"
    bad["calls"] = 2
    skip = {"train.on_nonfinite": "skip"}
    loop.train(make_config(**skip | {"train.resume": True}))
    bad["calls"] = 0
    loop.train(make_config(**skip | {"train.output": str(tmp_path / "whole")}))
    assert [line.get("skipped", False) for line in read_metrics(tmp_path / "run")] == [False, False, True, False]
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_resuming_before_the_first_checkpoint_starts_over(stopped: Any, make_config: Any, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    loop.train(stopped())
    loop.train(make_config(**{"train.output": str(tmp_path / "whole")}))
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_resuming_a_finished_run_writes_the_model_again(make_config: Any, settings: Any, tmp_path: Path) -> None:
    folder = loop.train(make_config(**settings))
    want, card = outcome(tmp_path / "run"), (folder / "README.md").read_text()
    shutil.rmtree(folder)
    loop.train(make_config(**settings | {"train.resume": True}))
    assert_same(outcome(tmp_path / "run"), want)
    assert "| new | 0.0% |" in card
    assert (folder / "README.md").read_text() == card.replace("resume = false", "resume = true")
    assert json.loads((latest(tmp_path / "run") / "state.json").read_text())["step"] == 6


def test_resume_without_a_run_is_a_first_run(make_config: Any, tmp_path: Path) -> None:
    loop.train(make_config(**{"train.resume": True}))
    assert len(read_metrics(tmp_path / "run")) == 4
