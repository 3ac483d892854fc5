"""The fused loss and other losses, as pytest-benchmark cases: `python -m pytest bench` (`make bench`).

This takes some minutes on two quiet cores; `make gpu-proof` measures the same on a GPU. Every case first compares all
variants with float64, and ours must be exact. The results go to bench/results/<device>.json and .md.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from bench.cases import CPU_CASES, Case, Problem
from bench.measure import Cpu, Row, run_case
from bench.peers import ours
from bench.report import RESULTS, by_case, describe, stem_of, summary, write


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    """All rows of the module, written at its end, also if a case failed, but not if only some cases were chosen."""
    rows: list[Row] = []
    yield rows
    meta = describe("python -m pytest bench")
    if len(by_case(rows)) == len(CPU_CASES):
        write(RESULTS / stem_of(meta), meta, rows)
    print("\n" + summary(rows))


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_linear_divergence(benchmark: Any, case: Case, rows: list[Row]) -> None:
    device = Cpu()
    mine: list[Row] = []
    try:
        run_case(case, device, mine)
    finally:
        rows += mine
    own = [row for row in mine if row["variant"].startswith("sdft_kernels")]
    assert any("ms" in row and "note" not in row for row in own), own
    problem, loss = Problem.make(case, device.name), ours(case.divergence)
    benchmark.extra_info.update(case.label(), rows=mine)
    benchmark.pedantic(lambda: problem.step(loss), rounds=3, warmup_rounds=1)
