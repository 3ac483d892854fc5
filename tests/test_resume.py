"""An interrupted run that goes on is the run that was never interrupted, bit for bit."""

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

from sdft import SdftError, train
from sdft.checkpoint import latest
from sdft.config import to_toml
from sdft.metrics import read_metrics

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
    """All that must be the same: every tensor of model and last checkpoint, and the metrics but for times."""
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
    own = train.train_step

    def wrapped(run: Any, number: int, output: Path) -> Any:
        if number == step:
            action()
        return own(run, number, output)

    monkeypatch.setattr(train, "train_step", wrapped)


def control_c() -> None:
    signal.raise_signal(signal.SIGINT)


def crash() -> None:
    raise RuntimeError("power cut")


@pytest.mark.parametrize("kind", RUNS)
def test_ctrl_c_and_resume(
    kind: str, make_config: Any, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    settings |= RUNS[kind]
    train.train(make_config(**settings))
    handler = signal.getsignal(signal.SIGINT)
    split = {"train.output": str(tmp_path / "split")}
    for step in (0, 2, 3) if kind == "sdft" else (2,):
        with monkeypatch.context() as patch:
            at_step(patch, step, control_c)
            with pytest.raises(KeyboardInterrupt):
                train.train(make_config(**settings | split | {"train.resume": step > 0}))
        assert latest(tmp_path / "split").name == f"step-{step + 1:06d}"
        assert f"Stopped after step {step + 1}; saved. Go on with --resume." in capsys.readouterr().out
        assert signal.getsignal(signal.SIGINT) is handler
    train.train(make_config(**settings | split | {"train.resume": True}))
    assert f"Resumed after step {step + 1} from" in capsys.readouterr().out
    assert_same(outcome(tmp_path / "split"), outcome(tmp_path / "run"))


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    step: int, make_config: Any, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train(make_config(**settings))
    split = settings | {"train.output": str(tmp_path / "split"), "train.save_every": 2}
    with monkeypatch.context() as patch:
        at_step(patch, step, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train.train(make_config(**split))
    train.train(make_config(**split | {"train.resume": True, "train.keep_checkpoints": 1, "train.save_every": 1}))
    assert_same(outcome(tmp_path / "split"), outcome(tmp_path / "run"))


def test_a_second_ctrl_c_does_not_wait(make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at_step(monkeypatch, 1, lambda: (control_c(), control_c()))
    with pytest.raises(KeyboardInterrupt):
        train.train(make_config())
    assert len(read_metrics(tmp_path / "run")) == 1
    assert latest(tmp_path / "run") is None


def test_sigint_to_the_command(make_config: Any, settings: Any, tmp_path: Path) -> None:
    settings |= {"train.steps": 100, "eval.every": 0, "eval.sets": {}}
    train.train(make_config(**settings))
    output = tmp_path / "split"
    (tmp_path / "c.toml").write_text(to_toml(make_config(**settings | {"train.output": str(output)})))
    command = [sys.executable, "-m", "sdft", "train", str(tmp_path / "c.toml")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or not read_metrics(output):
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.005)
    run.send_signal(signal.SIGINT)
    told = run.communicate(timeout=120)[0]
    assert run.returncode == 130, told
    assert "Traceback" not in told
    steps = len(read_metrics(output))
    assert 0 < steps < 100
    assert latest(output).name == f"step-{steps:06d}"
    subprocess.run([*command, "--resume"], env=environment, check=True, capture_output=True, timeout=300)
    assert_same(outcome(output), outcome(tmp_path / "run"))


# What does not go on.


@pytest.fixture
def stopped(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A run of 4 steps, stopped after the second; stopped(**overrides) is the config that resumes it."""
    with monkeypatch.context() as patch:
        at_step(patch, 1, control_c)
        with pytest.raises(KeyboardInterrupt):
            train.train(make_config(**{"train.save_every": 1}))
    return lambda **overrides: make_config(**{"train.resume": True} | overrides)


def test_another_run_in_the_folder(stopped: Any, tmp_path: Path) -> None:
    before = (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(SdftError, match="holds another run; give another folder, or --resume to go on with it"):
        train.train(stopped(**{"train.resume": False}))
    assert (tmp_path / "run" / "config.toml").read_text() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("optim.lr", 5e-4), ("train.seed", 1), ("train.steps", 9), ("loss.divergence", "jsd"), ("lora.rank", 2),
     ("teacher.ema_alpha", 0.5), ("eval.sets", {"new": "x"}), ("optim.betas", (0.8, 0.9))],
)  # fmt: skip
def test_another_config(stopped: Any, key: str, value: Any) -> None:
    with pytest.raises(SdftError) as error:
        train.train(stopped(**{key: value}))
    assert f"--resume: {key}" in str(error.value)
    assert "put it back, or start another run" in str(error.value)


def test_settings_that_are_free(stopped: Any, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "run", moved)
    train.train(stopped(**{"train.output": str(moved), "train.save_every": 3, "train.keep_checkpoints": 5}))
    assert [line["step"] for line in read_metrics(moved)] == [1, 2, 3, 4]


def test_other_data_under_the_same_name(stopped: Any, skill: Path) -> None:
    skill.write_text(skill.read_text().replace("QR", "qR"))
    with pytest.raises(SdftError, match=r"--resume: the data in .* is not what .* was trained on; put it back"):
        train.train(stopped())


def test_a_corrupt_checkpoint_gives_way_to_the_one_before(stopped: Any, make_config: Any, tmp_path: Path) -> None:
    newest = latest(tmp_path / "run")
    (newest / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(SdftError, match="step-000002: cannot be read"):
        train.train(stopped())
    shutil.rmtree(newest)
    train.train(stopped())
    train.train(make_config(**{"train.output": str(tmp_path / "whole")}))
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_resuming_before_the_first_checkpoint_starts_over(stopped: Any, make_config: Any, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train.train(stopped())
    train.train(make_config(**{"train.output": str(tmp_path / "whole")}))
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_resuming_a_finished_run_writes_the_model_again(make_config: Any, settings: Any, tmp_path: Path) -> None:
    folder = train.train(make_config(**settings))
    want, card = outcome(tmp_path / "run"), (folder / "README.md").read_text()
    shutil.rmtree(folder)
    train.train(make_config(**settings | {"train.resume": True}))
    assert_same(outcome(tmp_path / "run"), want)
    assert "| new | 0.0% |" in card
    assert (folder / "README.md").read_text() == card.replace("resume = false", "resume = true")
    assert json.loads((latest(tmp_path / "run") / "state.json").read_text())["step"] == 6


def test_resume_without_a_run_is_a_first_run(make_config: Any, tmp_path: Path) -> None:
    train.train(make_config(**{"train.resume": True}))
    assert len(read_metrics(tmp_path / "run")) == 4
