"""`make gpu-proof` on the CPU: all of it runs here first, and no failure ends it."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from bench.proof import __main__ as proof
from bench.proof import check as checking
from bench.proof import kernels, offload, phases, report, rollout, values
from bench.proof.check import Check
from bench.proof.phase import OUT_OF_TIME, Place, Row, Stream
from bench.proof.phases import PHASES, Phase
from bench.proof.run import run_phase

TINY = Place("cpu", tiny=True)
QUICK = "machine,kernels"


def tiny_run(folder: Path, *arguments: str) -> dict[str, Any]:
    return proof.main(["--tiny", "--out", str(folder), "--seconds", "3000", *arguments])


def check_files(found: dict[str, Any], folder: Path) -> str:
    """The files of every run: the stream, the same as JSON, and the tables."""
    (stream,) = folder.glob("*.jsonl")
    assert json.loads(stream.with_suffix(".json").read_text()) == json.loads(json.dumps(found))
    assert report.collect(Stream(stream).read()) == found
    assert report.faults(found) == []
    assert found["meta"]["torch"] == torch.__version__
    return stream.with_suffix(".md").read_text()


def test_the_program_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tiny_run(tmp_path, "--only", QUICK)
    table = check_files(found, tmp_path)
    assert list(found["phases"]) == QUICK.split(",")
    assert all(f"## {phase.about}" in table for phase in PHASES if phase.name in QUICK.split(","))
    measured = [row for row in report.rows_of(found, "kernels") if "phase" in row]
    assert {row["phase"] for row in measured} == {"whole call", "logits", "rows", "dW", "dX", "copies"}
    assert all(row["ms"] > 0 and (row["phase"] == "copies" or row["predicted ms"] > 0) for row in measured)
    assert [row["ms"] > 0 for row in report.rows_of(found, "kernels") if "tile" in row] == [True, True]
    assert re.search(r"kernels: 2 items", capsys.readouterr().out)


@pytest.mark.slow
def test_the_whole_program_in_miniature(tmp_path: Path) -> None:
    found = tiny_run(tmp_path)
    table = check_files(found, tmp_path)
    assert list(found["phases"]) == [phase.name for phase in PHASES]
    assert all(f"## {phase.about}" in table for phase in PHASES)
    assert sorted(p.name.rpartition("-")[2] for p in tmp_path.glob("*.png")) == ["ours.png", "peers.png", "steps.png"]
    assert {row["note"] for row in report.rows_of(found, "values") if "note" in row} == {"needs a GPU"}
    steps = report.rows_of(found, "steps")
    assert [row["contender"] for row in steps] == ["ours", "TRL", "ours, LoRA", "TRL, LoRA"]
    assert all(row["seconds"] > 0 for row in steps), steps
    assert all(row["predicted"] > 0 for row in steps if row["contender"].startswith("ours"))
    assert all(row["tokens/s"] > 0 for row in report.rows_of(found, "rollout") if "decoder" in row)


CHECKED = [c for c in (*values.CHECKS, *rollout.CHECKS, *offload.CHECKS) if not c.needs_gpu]


def twice(check: Check) -> bool:
    """Whether another check runs the same code on another dtype."""
    return check.name.endswith(("float32", "float16"))


@pytest.mark.parametrize(
    "check", [pytest.param(c, marks=[pytest.mark.slow] if twice(c) else []) for c in CHECKED], ids=str
)
def test_checks_in_miniature(check: Check, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The list of tests/fused_loss/test_gpu.py, small, by Triton's interpreter."""
    scratch = tmp_path_factory.getbasetemp() / "proof-models"
    scratch.mkdir(exist_ok=True)
    place = Place("cpu", tiny=True, scratch=scratch)
    found = list(check.run(place))
    assert found
    assert [one for one in found if not one.right] == []


def test_a_wrong_value_and_nan_are_faults() -> None:
    def wrong(place: Place) -> Any:
        yield checking.Found("small", 1e-6, 1e-3)
        yield checking.Found("large", 0.5, 1e-3)
        yield checking.Found("nan", float("nan"), 1e-3)

    rows: list[Row] = []
    checking.recorded(Check("a check", wrong), TINY, rows)
    found = report.collect(
        [{"event": "ends", "phase": "values", "item": "a check", "number": 0, "rows": rows, "error": None}]
    )
    assert [fault.split()[:3] for fault in report.faults(found)] == [["WRONG", "values:", w] for w in ("large", "nan")]
    assert "large 5.0e-01 > 1.0e-03" in report.markdown(found)


BROKEN = """
import os, time
from bench.proof.phase import Item

def raises(rows):
    rows.append({"what": "before", "ms": 1.0})
    raise ValueError("no such luck")

def items(place):
    return [
        Item("first", lambda rows: rows.append({"what": "first", "ms": 1.0})),
        Item("raises", raises),
        Item("dies", lambda rows: os._exit(7)),
        Item("after", lambda rows: rows.append({"what": "after", "ms": 2.0})),
        Item("hangs", lambda rows: time.sleep(600)),
        Item("never", lambda rows: rows.append({"what": "never", "ms": 3.0})),
    ]
"""


def test_a_failing_item_is_recorded_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    stream = Stream(tmp_path / "stream.jsonl")
    place = Place("cpu", True, time.monotonic() + 12, tmp_path)
    run_phase(Phase("broken", 12, "Broken", "broken"), place, stream, tmp_path / "log")
    entries = {entry["item"]: entry for entry in report.collect(stream.read())["phases"]["broken"]}
    assert list(entries) == ["first", "raises", "dies", "after", "hangs", "never"]
    assert [row["what"] for entry in entries.values() for row in entry["rows"]] == ["first", "before", "after"]
    assert "ValueError: no such luck" in entries["raises"]["error"]
    assert "raise ValueError" in entries["raises"]["error"], "its traceback"
    assert "status 7" in entries["dies"]["error"]
    assert entries["hangs"]["error"].startswith("cut off")
    assert entries["never"]["error"] == OUT_OF_TIME


def test_a_phase_that_cannot_begin_is_recorded(tmp_path: Path) -> None:
    stream = Stream(tmp_path / "stream.jsonl")
    place = Place("cpu", True, time.monotonic() + 60, tmp_path)
    run_phase(Phase("gone", 60, "Gone", "no_such_module"), place, stream, tmp_path / "log")
    (entry,) = report.collect(stream.read())["phases"]["gone"]
    assert "No module named 'no_such_module'" in entry["error"]


def test_a_stream_that_was_cut_off_is_read(tmp_path: Path) -> None:
    stream = Stream(tmp_path / "stream.jsonl")
    stream.write("ends", phase="machine", item="one", number=0, rows=[{"what": "x"}], seconds=1.0, error=None)
    with stream.path.open("a") as file:
        file.write('{"event": "ends", "phase": "mach')
    assert report.rows_of(report.collect(stream.read()), "machine") == [{"what": "x"}]


def test_the_phases_fit_into_ten_minutes() -> None:
    assert sum(phase.seconds for phase in PHASES) + phases.WRITING <= phases.WHOLE < 600
    ends = proof.deadlines(list(PHASES), 100.0, phases.WHOLE)
    assert ends == sorted(ends)
    assert ends[-1] <= 100.0 + phases.WHOLE - phases.WRITING
    assert proof.deadlines(list(PHASES[:2]), 0.0, 20.0)[-1] < 20.0, "--seconds is for the phases that were chosen"


def test_an_unknown_phase_is_named() -> None:
    with pytest.raises(SystemExit, match="no such phase; there are machine, values"):
        proof.main(["--tiny", "--only", "value"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_runs_here() -> None:
    with pytest.raises(SystemExit, match="--tiny"):
        proof.main([])


def test_the_profile_is_divided_among_the_phases() -> None:
    """Events as torch.profiler has them on a GPU: operators with the time of their kernels, and the kernels."""
    cpu, cuda = DeviceType.CPU, DeviceType.CUDA

    def event(key: str, kind: DeviceType, us: float, shapes: Any = (), count: int = 1) -> Any:
        return SimpleNamespace(
            key=key,
            device_type=kind,
            self_device_time_total=us,
            self_cpu_time_total=1.0,
            input_shapes=shapes,
            count=count,
        )

    events = [
        event("sdft::linear_divergence", cpu, 300.0),
        event("aten::mm", cpu, 2000.0, [[4, 8], [8, 500], [], [4, 500]], 2),
        event("aten::mm", cpu, 500.0, [[500, 4], [4, 8]]),
        event("aten::addmm", cpu, 700.0, [[500, 8], [500, 4], [4, 8]]),
        event("aten::mm", cpu, 900.0, [[4, 500], [500, 8]]),
        event("aten::copy_", cpu, 50.0, [[4, 8], [4, 8]]),
        event("nvjet_gemm", cuda, 4100.0, count=5),
        event("row_kernel", cuda, 300.0, count=2),
        event("vectorized_copy", cuda, 50.0),
    ]
    phases, found = kernels.account(events, on_gpu=True, vocab=500)
    assert phases == {"logits": 2.0, "rows": 0.0, "dW": 1.2, "dX": 0.9, "copies": 0.05}
    assert found == {"nvjet_gemm": (5, 4.1), "row_kernel": (2, 0.3), "vectorized_copy": (1, 0.05)}
