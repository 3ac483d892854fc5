"""The benchmark runs from end to end on tiny shapes, so that a GPU is not the first to run it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cases, gpu, measure, peers, report
from bench.cases import Case
from bench.peers import Variant

Run = Callable[..., list[dict[str, Any]]]
ONE = r"tiny 32 float32 reverse_kl trained"


@pytest.fixture
def bench(tmp_path: Path) -> Run:
    """bench(*arguments) runs bench.gpu on the CPU and returns its rows."""
    return lambda *arguments: gpu.main(["--device", "cpu", "--results", str(tmp_path), *arguments])


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """only(variant, ...) replaces what is benched."""
    return lambda *variants: monkeypatch.setattr(gpu, "VARIANTS", variants)


def named(rows: list[dict[str, Any]], variant: str) -> dict[str, Any]:
    (row,) = [row for row in rows if row["variant"] == variant]
    return row


@pytest.mark.slow
def test_all_tiny_cases(
    bench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setenv("OUT", str(copies))
    monkeypatch.setenv("COMMIT", "abc1234")
    rows = bench()

    labels = [str(label) for label, _ in report.by_case(rows)]
    assert len(labels) == len(set(labels)) == len(cases.TINY_CASES)
    for own in (row for row in rows if row["variant"] == "sdft_kernels torch"):
        assert "note" not in own
        assert max(own["D error"], own["dX error"]) < cases.BARS[own["dtype"]]
        assert ("dW error" in own) == (own["head"] == "trained")
        assert own["p10"] <= own["ms"] <= own["p90"]
        assert own["rounds"] >= 5
        assert own["of the floor"] > 0
    for row in rows:
        assert "ms" in row or row["note"]

    (stem,) = {file.name.split("-tiny")[0] for file in tmp_path.glob("cpu-*")}
    written = sorted(file.name for file in copies.iterdir())
    assert written == [f"{stem}-tiny{end}" for end in ("-floor.png", "-memory.png", ".json", ".md")]
    saved = json.loads((tmp_path / f"{stem}-tiny.json").read_text())
    assert saved["rows"] == rows
    assert saved["commit"] == "abc1234"
    assert saved["torch"] == torch.__version__
    table = (tmp_path / f"{stem}-tiny.md").read_text()
    assert table.count("| sdft_kernels torch |") == len(cases.TINY_CASES)
    assert table.count("| bare GEMMs |") == len(cases.TINY_CASES)
    assert len(capsys.readouterr().out) < 12_000


def test_sweep_over_chunk_sizes(bench: Run, tmp_path: Path) -> None:
    rows = bench("--sweep", "--cases", ONE)
    own = [row["variant"] for row in rows if "chunk" not in row and row["variant"].startswith("sdft")]
    assert own == [f"sdft_kernels torch, {mib} MiB" for mib in gpu.SWEEP_MIB]
    assert list(tmp_path.glob("*-sweep.md"))


def test_sweep_over_tiles_puts_the_table_back() -> None:
    from sdft_kernels import linear_divergence, tuning

    from bench.gpu import with_row_blocks

    kept = dict(tuning.ROW_BLOCKS)
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((5, 8), (90, 8))] * 2
    tensors[2] = tensors[2] + 0.1
    value = with_row_blocks(32, 1, "reverse_kl")(*tensors)
    torch.testing.assert_close(value, linear_divergence(*tensors, impl="torch"))
    assert kept == tuning.ROW_BLOCKS


def test_missing_peer_is_listed_by_name(bench: Run, only: Callable[..., None]) -> None:
    def make(divergence: str) -> peers.Loss:
        import peer_that_nobody_has  # noqa: F401

        raise AssertionError

    only(Variant("a peer", make), Variant("dense", peers.dense))
    rows = bench("--cases", ONE)
    assert named(rows, "a peer")["note"] == "missing: No module named 'peer_that_nobody_has'"
    assert "ms" in named(rows, "dense")


def test_wrong_peer_is_timed_and_marked(bench: Run, only: Callable[..., None]) -> None:
    def half(divergence: str) -> peers.Loss:
        return lambda *tensors: peers.dense(divergence)(*tensors) / 2

    def nan(divergence: str) -> peers.Loss:
        return lambda *tensors: peers.dense(divergence)(*tensors) * float("nan")

    only(Variant("half", half), Variant("nan", nan))
    rows = bench("--cases", ONE)
    for name in ("half", "nan"):
        assert named(rows, name)["note"].startswith("inexact")
        assert named(rows, name)["ms"] > 0
    assert named(rows, "half")["dW error"] == pytest.approx(0.5, abs=1e-3)


def test_out_of_memory_is_predicted_and_caught(
    bench: Run, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(divergence: str) -> peers.Loss:
        def loss(x: Tensor, *others: Tensor) -> Tensor:
            if len(x) > 16:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return peers.dense(divergence)(x, *others)

        return loss

    monkeypatch.setitem(measure.CHECKED_ROWS, "cpu", 16)
    monkeypatch.setattr(measure.Cpu, "free_bytes", lambda self: 1e6)
    only(Variant("large", peers.dense, planes=10**6), Variant("greedy", greedy), Variant("dense", peers.dense))
    rows = bench("--cases", ONE)
    assert named(rows, "large")["note"] == f"out of memory (needs about {1e6 * 32 * 512 * 4 / 1e9:.1f} GB)"
    assert named(rows, "large")["dX error"] < 1e-3  # judged on the rows that fit
    assert named(rows, "greedy")["note"] == "out of memory"
    assert named(rows, "dense")["ms"] > 0


def test_failure_while_timing_loses_one_row(bench: Run, only: Callable[..., None]) -> None:
    calls = []

    def tired(divergence: str) -> peers.Loss:
        def loss(*tensors: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) > 6:
                raise ValueError("no | more")
            return peers.dense(divergence)(*tensors)

        return loss

    only(Variant("tired", tired), Variant("dense", peers.dense))
    rows = bench("--cases", ONE)
    assert named(rows, "tired")["note"] == "raises ValueError: no / more"
    assert "ms" not in named(rows, "tired")
    assert named(rows, "dense")["rounds"] == measure.ROUNDS


def test_case_that_does_not_fit_is_listed_and_the_next_runs(
    bench: Run, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = cases.Problem.make

    def too_large(case: Case, device: str) -> cases.Problem:
        if case.tokens == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(case, device)

    monkeypatch.setattr(cases.Problem, "make", too_large)
    only(Variant("dense", peers.dense))
    first, second = (group for _, group in report.by_case(bench("--cases", "float32 reverse_kl")))
    assert {row["note"] for row in first} == {"out of memory"}
    assert all("ms" in row for row in second)


def test_time_budget(bench: Run, only: Callable[..., None]) -> None:
    only(Variant("dense", peers.dense))
    rows = bench("--budget", "-1")
    assert len(rows) == len(cases.TINY_CASES)
    assert {row["note"] for row in rows} == {"skipped: time budget"}


def test_time_budget_within_a_case() -> None:
    rows: list[dict[str, Any]] = []
    measure.run_case(Case("tiny", 32, "float32"), measure.Cpu(), rows, deadline=0.0)
    assert named(rows, "dense")["note"] == "skipped: time budget"
    assert named(rows, "bare GEMMs")["ms"] > 0


def test_lost_device_keeps_what_was_measured(
    bench: Run, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After an illegal access every CUDA call fails; the rows so far are in the file, the others say why not."""
    broken = []

    def finish(self: measure.Cpu) -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def breaks(divergence: str) -> peers.Loss:
        def loss(x: Tensor, *others: Tensor) -> Tensor:
            if len(x) == 64:
                broken.append(1)
            return peers.dense(divergence)(x, *others)

        return loss

    monkeypatch.setattr(measure.Cpu, "finish", finish)
    only(Variant("dense", peers.dense), Variant("breaks", breaks))
    bench("--cases", "float32 reverse_kl")
    (file,) = tmp_path.glob("*.json")
    first, second = (group for _, group in report.by_case(json.loads(file.read_text())["rows"]))
    assert all("ms" in row for row in first)
    assert named(second, "breaks")["note"].startswith("raises RuntimeError: CUDA error")
    assert named(second, "dense")["note"] == "skipped: the device failed in breaks"


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
    """Every line of Cuda runs, against a torch.cuda that pretends."""

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
    measure.run_case(case, measure.Cuda(), rows, variants=[Variant("dense", peers.dense)])
    returned = (32 * 32 + 512 * 32) * 4
    assert named(rows, "dense")["extra MB"] == pytest.approx((3 * 10**6 - returned) / 1e6)
    assert named(rows, "dense")["ms"] > 0


def test_rounds() -> None:
    assert measure.rounds_for(150.0) == 20
    assert measure.rounds_for(200.0) == 7
    assert measure.rounds_for(5000.0) == 5


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


def test_gpu_cases_cover_what_is_promised() -> None:
    for case in (*cases.GPU_CASES, *cases.SWEEP_CASES, *cases.CPU_CASES):
        assert case.model in cases.HEADS
        assert any(measure.applies(v, case, measure.Cpu()) for v in peers.VARIANTS)
    assert len(set(cases.GPU_CASES)) == len(cases.GPU_CASES)
    assert {(c.model, c.tokens) for c in cases.GPU_CASES if c.divergence == "reverse_kl" and not c.frozen} >= {
        (model, n) for model in cases.BIG for n in (1024, 4096, 16384, 32768)
    }
