"""bench.step on tiny models: the same tokens on both sides, every phase, failures as notes."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import step, trainers
from bench.trainers import Clock, Contender, Job, Shape
from sdft.training.metrics import PHASES

SHAPE = Shape(completions=3, new_tokens=5, prompt_tokens=80)


def needs_trl() -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("NOT COMPARED WITH TRL, which is missing here: make bench-step installs it")


@pytest.fixture
def job(model_folder: Callable[..., Path]) -> Job:
    """Two measured steps of our trainer on the tiny Llama."""
    return Job(Contender("ours", "ours"), SHAPE, str(model_folder()), "cpu", steps=2, seconds=60.0)


def trl(job: Job, **changes: Any) -> Job:
    needs_trl()
    return replace(job, contender=Contender("TRL", "trl", **changes))


def check(row: dict[str, Any]) -> None:
    assert "note" not in row, row["note"]
    assert row["steps"] == 2
    assert 0 < row["least"] <= row["seconds"] <= row["most"]
    assert all(row[name] > 0 for name in PHASES)
    # Of two steps the median is the mean, so the phases add up to the step.
    assert sum(row[name] for name in PHASES) == pytest.approx(row["seconds"])
    assert row["answer_tokens"] == 3 * 5
    assert row["tokens_per_second"] == pytest.approx(15 / row["seconds"])
    assert row["peak"] > row["libraries"] > 10 * 2**20
    assert len(row["losses"]) == 3


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_ours(job: Job, lora: bool) -> None:
    row = trainers.run_one(replace(job, contender=Contender("ours", "ours", lora)))
    check(row)
    assert row["prompt_tokens"] >= 3 * 80
    assert 0 < row["real_tokens"] <= 1


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_trl_computes_the_same_tokens(job: Job, lora: bool) -> None:
    row = trainers.run_one(trl(job, lora=lora))
    check(row)
    own = trainers.run_one(job)
    for name in ("prompt_tokens", "teacher_prompt_tokens", "answer_tokens"):
        assert row[name] == own[name]


def test_both_compute_the_same_loss(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same completions, teacher and divergence: with the same samples the first step's loss is the same number."""
    job = trl(replace(job, steps=1), settings={"bf16": False})
    sampling = {"top_k": 1}  # the likeliest token: no chance in it
    job.contender.settings["generation_kwargs"] = {"min_new_tokens": 5} | sampling
    own = Contender("ours", "ours", settings={"model.compute_dtype": "float32", "rollout.top_k": 1})
    theirs, ours = trainers.run_one(job), trainers.run_one(replace(job, contender=own))
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-3)


def test_what_cannot_run_is_a_note(job: Job) -> None:
    impossible = Contender("ours", "ours", settings={"optim.offload": True})  # CUDA only
    note = trainers.run_one(replace(job, contender=impossible))["note"]
    assert note.startswith("not possible: raises SdftError: optim.offload")


def test_a_step_that_went_on_in_halves_is_not_reported_as_whole(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdft.training import step

    accumulate, calls = step.accumulate_gradients, []

    def short(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return accumulate(*args)

    monkeypatch.setattr(step, "accumulate_gradients", short)
    assert trainers.run_one(job)["note"] == "not possible: out of memory"


def test_every_phase_of_ours_is_known() -> None:
    assert (*trainers.TIMED, "update") == PHASES


def test_records_reach_their_length(load_tiny: Callable[..., Any]) -> None:
    tokenizer, _ = load_tiny()
    from sdft.data.prompts import encode_chat
    from sdft.data.records import Message

    def length(row: dict[str, str]) -> int:
        return len(encode_chat(tokenizer, [Message(role="user", content=row["prompt"])], ""))

    rows = trainers.records(Shape(4, 5, 200), tokenizer)
    assert all(200 <= length(row) < 300 for row in rows)
    assert len({row["prompt"] for row in rows}) == 4
    assert all(row["prompt"].count(";") == row["demonstration"].count(";") > 0 for row in rows)
    assert all(";" not in row["prompt"] for row in trainers.records(Shape(4, 5, 0), tokenizer))


def test_clock_leaves_out_the_warm_up_and_keeps_the_time(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(trainers.time, "perf_counter", lambda: now[0])
    clock = Clock(replace(job, seconds=20.0))
    more = []
    for seconds in (9.0, 2.0, 4.0, 3.0):
        now[0] += seconds
        more.append(clock.step_ended({"rollout": seconds / 2, "score": 0.5, "loss": 0.125, "backward": 0.125}))
    row = clock.row(answer_tokens=30)
    assert more == [True, True, True, False]  # at 118 a step of 3 s would end after 120
    assert (row["seconds"], row["least"], row["most"], row["steps"]) == (3.0, 2.0, 4.0, 3)
    assert [row[name] for name in PHASES] == [1.5, 0.5, 0.125, 0.125, 0.75]
    assert row["tokens_per_second"] == 10.0


def test_on_a_gpu_the_peak_is_the_allocators(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    clock = Clock(replace(job, device="cuda"))
    for _ in range(2):
        clock.step_ended(dict.fromkeys(PHASES, 0.0))
    assert clock.row(answer_tokens=1)["peak"] == 123
    assert len(waited) == 2


def test_every_contender_of_ours_has_one_beside_it() -> None:
    names = {c.name for c in step.CONTENDERS}
    assert len(names) == len(step.CONTENDERS)
    assert all(c.beside in names for c in step.CONTENDERS if c.trainer == "ours")
    assert len({json.dumps(asdict(replace(c, name=""))) for c in step.SIX}) == 8


def test_the_random_model_is_a_qwen(tmp_path: Path, job: Job) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = trainers.random_qwen(tmp_path, **small, vocab_size=512)
    check(trainers.run_one(replace(job, model=folder)))


def test_rows_are_compared_with_the_one_beside_them() -> None:
    rows: list[dict[str, Any]] = [
        {"shape": "a", "contender": "ours", "beside": "TRL", "seconds": 1.0, "peak": 30, "predicted": 27},
        {"shape": "a", "contender": "TRL", "beside": "", "seconds": 2.0, "peak": 40},
        {"shape": "b", "contender": "ours", "beside": "TRL", "seconds": 1.0, "peak": 30},
        {"shape": "b", "contender": "TRL", "beside": "", "note": "not possible: out of memory"},
    ]
    step.compare(rows)
    assert (rows[0]["of TRL's time"], rows[0]["of TRL's memory"], rows[0]["predicted / peak"]) == (0.5, 0.75, 0.9)
    assert not any("of TRL's time" in row for row in rows[1:])


def test_one_command(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process for each contender; results are written after each, and the row of a process that died has a note."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(step, "SHAPES", {"tiny": SHAPE})
    broken = Contender("unknown", "nobody's")
    monkeypatch.setattr(step, "CONTENDERS", (job.contender, broken))
    rows = step.main(["--model", job.model, "--steps", "2", "--results", str(tmp_path), "--lock", str(tmp_path / "l")])
    own, dead = rows
    check(own)
    assert dead["note"] == 'not possible: raises KeyError: "nobody\'s"'
    (file,) = tmp_path.glob("step-cpu-*.json")
    assert json.loads(file.read_text())["rows"] == rows
    assert sorted(f.name for f in out.iterdir()) == [file.name, file.with_suffix(".md").name]
    table = file.with_suffix(".md").read_text()
    assert f"{own['prompt_tokens']} tokens of prompts" in table
    assert "| unknown |" in table
    assert table in capsys.readouterr().out


def test_a_process_that_dies_or_hangs_is_a_note(job: Job) -> None:
    assert step.in_subprocess(replace(job, model="no/such/model"), 60.0)["note"].startswith("died with exit status 1")
    assert step.in_subprocess(job, 0.01)["note"] == "over 0 s"


def arguments_of(process: str) -> list[str]:
    try:
        return Path("/proc", process, "cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def test_whoever_ends_the_bench_ends_its_contender(job: Job, tmp_path: Path) -> None:
    """A time limit set from outside must not leave a training run behind."""
    long = ["--model", job.model, "--steps", "100000", "--seconds", "100", "--contenders", "^ours$"]
    command = [sys.executable, "-m", "bench.step", *long, "--shapes", "8x24", "--results", str(tmp_path)]
    bench = subprocess.Popen(command, cwd=step.ROOT)
    children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
    contender = None
    while contender is None:
        assert bench.poll() is None
        time.sleep(0.05)
        contender = next((n for n in children.read_text().split() if "--one" in arguments_of(n)), None)
    bench.terminate()
    assert bench.wait(30) == 128 + signal.SIGTERM
    assert "--one" not in arguments_of(contender)
