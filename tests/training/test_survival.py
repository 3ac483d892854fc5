"""Short forms of tests/training/survival.py: two kills, and in the long suite five kills in each mode."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("mode", "kills"),
    [
        ("full", 2),
        pytest.param("full", 5, marks=pytest.mark.slow),
        pytest.param("lora", 5, marks=pytest.mark.slow),
        pytest.param("offline", 5, marks=pytest.mark.slow),
    ],
)
def test_a_run_survives_being_killed(mode: str, kills: int) -> None:
    script = Path(__file__).with_name("survival.py")
    command = [sys.executable, str(script), "--kills", str(kills), "--seed", "1", "--mode", mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"{mode}: {kills} kills \(.*\), .* each ended bit-identical to the undisturbed one", done.stdout)
