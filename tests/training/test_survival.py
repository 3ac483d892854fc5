"""The short form of tests/training/survival.py: five kills in each mode."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora", "offline"])
def test_a_run_survives_being_killed(mode: str) -> None:
    script = Path(__file__).with_name("survival.py")
    command = [sys.executable, str(script), "--kills", "5", "--seed", "1", "--mode", mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"{mode}: 5 kills \(.*\), .* each ended bit-identical to the undisturbed one", done.stdout)
