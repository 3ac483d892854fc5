"""The Triton kernels, compiled ahead of time for GPUs that are not here, held to the table in the repo."""

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


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """A fresh compilation, in a process of its own: here the kernels belong to Triton's interpreter."""
    folder = tmp_path_factory.mktemp("resources")
    env = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, str(ROOT / "bench" / "resources.py"), "--json", str(folder / "rows.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "rows.json").read_text())["rows"]


def label(row: Row) -> str:
    return f"{row['kernel']} on {row['target']}"


@pytest.mark.slow
def test_no_kernel_spills(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print()
        for row in rows:
            print(
                f"{label(row):58} {row['registers']:4} registers {row['spills']:3} spills {row['shared bytes']:7} "
                f"shared {row['wide loads']:3}/{row['loads']} loads of 16 bytes {row['HGMMA']:3} HGMMA"
            )
    assert len({r["target"] for r in rows}) == 4
    assert {label(r): (r["spills"], r["stack"]) for r in rows if r["spills"] or r["stack"]} == {}


@pytest.mark.slow
def test_global_accesses_are_16_bytes_wide(rows: list[Row]) -> None:
    for row in rows:
        assert row["wide loads"] >= 1, label(row)
        if row["gemm"]:
            continue
        # The others read single numbers: the row's index, its weight, its label, the label's logits and biases.
        assert row["loads"] - row["wide loads"] <= 8, label(row)
        assert row["wide stores"] >= 1 or "values only" in row["kernel"], label(row)


@pytest.mark.slow
def test_bandwidth_bound_kernels_leave_room_for_many_warps(rows: list[Row]) -> None:
    """Sixteen warps a multiprocessor, each with four 16-byte loads in flight or more, cover a GPU's latency."""
    for row in rows:
        assert row["gemm"] or row["warps resident"] >= 16, label(row)


@pytest.mark.slow
def test_the_table_is_kept(rows: list[Row]) -> None:
    """Registers and shared memory no larger than bench/results/resources.json says, kernel by kernel."""
    kept = json.loads((ROOT / "bench" / "results" / "resources.json").read_text())["rows"]
    table = {label(r): r for r in kept}
    assert sorted(table) == sorted(map(label, rows)), "python bench/resources.py --write"
    for row in rows:
        for column in ("registers", "shared bytes"):
            assert row[column] <= table[label(row)][column] * SLACK, f"{label(row)}: {column}"
