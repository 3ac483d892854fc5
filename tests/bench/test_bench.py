"""One measured case: values first, then memory and time; a failure becomes a note, and nothing else is lost."""

import importlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cases, measure, peers, report
from bench.cases import Case
from bench.peers import Variant

TINY = Case("tiny", 32, "float32")


def rows_of(variants: Iterable[Variant], case: Case = TINY, **options: Any) -> list[dict[str, Any]]:
    """The rows of one case on the CPU, in two rounds."""
    rows: list[dict[str, Any]] = []
    measure.run_case(case, measure.Cpu(), rows, variants=list(variants), **{"rounds": 2} | options)
    return rows


def named(rows: list[dict[str, Any]], variant: str) -> dict[str, Any]:
    (row,) = [row for row in rows if row["variant"] == variant]
    return row


OURS = Variant("ours", lambda divergence: peers.ours(divergence, impl="torch"))
DENSE = Variant("dense", peers.dense)


@pytest.mark.parametrize(
    "case",
    [
        TINY,
        Case("tiny", 32, "bfloat16", frozen=True),
        Case("tiny", 32, "float32", "forward_kl"),
        Case("tiny", 32, "float32", "jsd"),
        Case("tiny", 32, "float32", trainer=True),
    ],
    ids=str,
)
def test_a_case(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of([OURS, DENSE], case)
    own = named(rows, "ours")
    assert "note" not in own
    assert max(own["D error"], own["dX error"]) < cases.BARS[case.products]
    assert ("dW error" in own) == (own["head"] == "trained")
    assert own["p10"] <= own["ms"] <= own["p90"]
    assert own["of the floor"] > 0
    monkeypatch.setenv("OUT", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    report.write(tmp_path / "case", {"device": "a CPU"}, rows)
    assert json.loads((tmp_path / "copies/case.json").read_text())["rows"] == rows
    table = (tmp_path / "copies/case.md").read_text()
    assert [table.count(f"| {name} |") for name in ("ours", "dense", "bare GEMMs")] == [1, 1, 1]
    assert "ours" in report.summary(rows)


def test_missing_peer_is_listed_by_name() -> None:
    def make(divergence: str) -> peers.Loss:
        import peer_that_nobody_has  # noqa: F401

        raise AssertionError

    rows = rows_of([Variant("a peer", make), DENSE])
    assert named(rows, "a peer")["note"] == "missing: No module named 'peer_that_nobody_has'"
    assert "ms" in named(rows, "dense")


def test_wrong_peer_is_timed_and_marked() -> None:
    def times(factor: float) -> Any:
        return lambda divergence: lambda *tensors: peers.dense(divergence)(*tensors) * factor

    rows = rows_of([Variant("half", times(0.5)), Variant("nan", times(float("nan")))])
    for name in ("half", "nan"):
        assert named(rows, name)["note"].startswith("inexact")
        assert named(rows, name)["ms"] > 0
    assert named(rows, "half")["dW error"] == pytest.approx(0.5, abs=1e-3)


def test_out_of_memory_is_predicted_and_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(divergence: str) -> peers.Loss:
        def loss(x: Tensor, *others: Tensor) -> Tensor:
            if len(x) > 16:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return peers.dense(divergence)(x, *others)

        return loss

    monkeypatch.setattr(measure.Cpu, "free_bytes", lambda self: 1e6)
    variants = [Variant("large", peers.dense, planes=10**6), Variant("greedy", greedy), DENSE]
    rows = rows_of(variants, checked_rows=16)
    assert named(rows, "large")["note"] == f"out of memory (needs about {1e6 * 32 * 512 * 4 / 1e9:.1f} GB)"
    assert named(rows, "large")["dX error"] < 1e-3  # compared on the rows that fit
    assert named(rows, "greedy")["note"] == "out of memory"
    assert named(rows, "dense")["ms"] > 0


def test_failure_while_timing_loses_one_row() -> None:
    calls = []

    def tired(divergence: str) -> peers.Loss:
        def loss(*tensors: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) > 4:
                raise ValueError("no | more")
            return peers.dense(divergence)(*tensors)

        return loss

    rows = rows_of([Variant("tired", tired), DENSE], rounds=5)
    assert named(rows, "tired")["note"] == "raises ValueError: no / more"
    assert "ms" not in named(rows, "tired")
    assert named(rows, "dense")["rounds"] == 5


def test_past_the_deadline_variants_are_skipped() -> None:
    rows = rows_of([DENSE], deadline=0.0)
    assert named(rows, "dense")["note"] == "skipped: time budget"
    assert named(rows, "bare GEMMs")["ms"] > 0


def test_a_lost_device_ends_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every CUDA call fails; the rows are there, and name the variant that caused it."""
    broken = []

    def finish(self: measure.Cpu) -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def breaks(divergence: str) -> peers.Loss:
        def loss(x: Tensor, *others: Tensor) -> Tensor:
            broken.append(1)
            return peers.dense(divergence)(x, *others)

        return loss

    monkeypatch.setattr(measure.Cpu, "finish", finish)
    rows: list[dict[str, Any]] = []
    with pytest.raises(measure.DeviceLostError, match="breaks"):
        measure.run_case(TINY, measure.Cpu(), rows, variants=[DENSE, Variant("breaks", breaks)])
    assert named(rows, "breaks")["note"].startswith("raises RuntimeError: CUDA error")
    assert named(rows, "dense")["dX error"] < 1e-3


def test_truth_adds_up_over_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = cases.Problem.make(Case("tiny", 40, "float32"), "cpu")
    whole = cases.Truth.of(problem, "jsd")
    monkeypatch.setattr(cases, "TRUTH_ROWS", 16)
    parts = cases.Truth.of(problem, "jsd")
    assert parts.value == pytest.approx(whole.value, rel=1e-12)
    assert whole.dw is not None
    assert parts.dw is not None
    torch.testing.assert_close(parts.dx, whole.dx)
    torch.testing.assert_close(parts.dw, whole.dw)


def test_the_gpus_clock_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of Cuda runs, on a fake torch.cuda."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: "Event") -> float:
            return (end.at - self.at) * 1e3

    pretend = {
        "Event": Event,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 10**6,
        "max_memory_allocated": lambda: 4 * 10**6,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (10**10, 10**11),
    }
    for name, value in pretend.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(measure.Cuda, "name", "cpu")
    monkeypatch.setattr(measure, "FLUSH_BYTES", 1024)
    case = Case("tiny", 32, "float32")
    rows: list[dict[str, Any]] = []
    measure.run_case(case, measure.Cuda(), rows, variants=[DENSE], rounds=2)
    returned = (32 * 32 + 512 * 32) * 4
    assert named(rows, "dense")["extra MB"] == pytest.approx((3 * 10**6 - returned) / 1e6)
    assert named(rows, "dense")["ms"] > 0


def test_slow_variants_get_fewer_rounds() -> None:
    assert [measure.rounds_for(ms, 20) for ms in (150.0, 200.0, 5000.0)] == [20, 7, 5]
    assert measure.rounds_for(5000.0, 2) == 2


def test_floors_skip_the_frozen_heads_gradient() -> None:
    """Three GEMMs, not four, and blocks of tokens that add up."""
    from torch.utils.flop_counter import FlopCounterMode

    vocab, hidden = cases.HEADS["tiny"]
    for frozen, gemms in ((False, 4), (True, 3)):
        problem = cases.Problem.make(Case("tiny", 40, "float32", frozen=frozen), "cpu")
        for floor in (cases.bare_gemms(problem), cases.strict_gemms(problem)):
            with FlopCounterMode(display=False) as counter:
                floor()
            assert counter.get_total_flops() == gemms * 2 * 40 * vocab * hidden


def test_the_numbers_of_the_integrations_have_a_command() -> None:
    from bench.integrations.__main__ import NAMES, main

    with pytest.raises(SystemExit, match="liger"):
        main([])
    assert all(callable(importlib.import_module(f"bench.integrations.{name}").main) for name in NAMES)
