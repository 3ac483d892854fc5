"""The Triton kernels, compiled ahead of time for GPUs, and compared with the table in the repository.

Compilation runs in separate processes, because in this process the kernels belong to Triton's interpreter. The quick
tests compile two kernels for one architecture by the installed Triton; the slow ones everything, by it and by the
oldest Triton admitted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SLACK = 1.15  # another ptxas may need a few registers more
Row = dict[str, Any]


def compile_rows(folder: Path, *arguments: str) -> list[Row]:
    env = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, str(ROOT / "bench" / "resources.py"), "--json", str(folder / "rows.json"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if "cannot be installed" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "rows.json").read_text())["rows"]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    two = "rows reverse_kl, values only|rows reverse_kl fp32"
    return compile_rows(tmp_path_factory.mktemp("resources"), "--targets", "sm_90", "--kernels", two)


@pytest.fixture(scope="module", params=[[], ["--oldest"]], ids=["installed Triton", "oldest Triton"])
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return compile_rows(tmp_path_factory.mktemp("resources"), *request.param)


def label(row: Row) -> str:
    return f"{row['kernel']} on {row['target']}, triton {row['triton']}"


def check_spills(rows: list[Row]) -> None:
    assert {label(r): (r["spills"], r["stack"]) for r in rows if r["spills"] or r["stack"]} == {}


def check_accesses(rows: list[Row]) -> None:
    """16 bytes, but for single numbers: the row's index, its weight, its label, the label's logits and biases."""
    for row in rows:
        if "not aligned" in row["kernel"]:
            continue
        if row["kernel"].startswith("dual"):  # its statistics are 4 bytes each, its tiles' rows are masked
            assert row["wide stores"] >= 1, label(row)
            continue
        assert row["wide loads"] >= 1, label(row)
        assert row["loads"] - row["wide loads"] <= 8, label(row)
        assert row["wide stores"] >= 1 or "values only" in row["kernel"], label(row)


def check_loops(rows: list[Row]) -> None:
    """The statistics are each thread's own until the row ends: no thread waits for another inside the loop."""
    found = [r for r in rows if "values only" in r["kernel"] and not r["target"].startswith("gfx")]
    assert found
    for row in found:
        assert row["longest loop"] > 100, label(row)
        assert (row["its barriers"], row["its shuffles"]) == (0, 0), label(row)


def check_warps(rows: list[Row]) -> None:
    """Sixteen warps a multiprocessor, each with four 16-byte loads in flight or more, cover a GPU's latency."""
    for row in rows:
        if not row["kernel"].startswith("dual tiles"):  # its sums fill the registers, as in any large product
            assert row["warps resident"] >= 16, label(row)


def check_shared_memory(rows: list[Row]) -> None:
    """Every device has the shared memory that a block takes: an RTX 50 has 99 KiB, less than half of a B200's 227."""
    for row in rows:
        assert row["shared bytes"] <= row["shared limit"], label(row)


def check_products(rows: list[Row]) -> None:
    """Hopper's products are those of a warpgroup: no other instruction reaches the full rate."""
    for row in rows:
        wanted = row["kernel"].startswith("dual tiles") and row["target"] == "sm_90"
        assert (row["HGMMA"] >= 1) == wanted, label(row)


def check_table(rows: list[Row]) -> None:
    """Registers and shared memory no larger than bench/results/resources.json has them, kernel by kernel."""
    kept = json.loads((ROOT / "bench" / "results" / "resources.json").read_text())["rows"]
    table = {label(r): r for r in kept}
    for row in rows:
        assert label(row) in table, "python bench/resources.py --write"
        for column in ("registers", "shared bytes"):
            assert row[column] <= table[label(row)][column] * SLACK, f"{label(row)}: {column}"


CHECKS = [check_spills, check_accesses, check_loops, check_warps, check_shared_memory, check_products, check_table]


@pytest.mark.parametrize("check", CHECKS)
def test_two_kernels_on_one_architecture(few: list[Row], check: Any) -> None:
    assert len(few) == 2
    check(few)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_every_kernel_on_every_architecture(rows: list[Row], check: Any) -> None:
    assert len({r["target"] for r in rows}) == 5
    check(rows)
