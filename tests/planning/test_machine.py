"""The machine of a plan: its size, its process."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from sdft.config import Config
from sdft.errors import SdftError
from sdft.planning.machine import GIB, parse_size, this_machine


@pytest.mark.parametrize(
    ("text", "want"),
    [("12GB", 12 * GIB), ("12 gib", 12 * GIB), ("900MB", 900 * 2**20), ("1.5g", 3 * GIB // 2), ("8", 8)],
)
def test_sizes(text: str, want: int) -> None:
    assert parse_size(text) == want


@pytest.mark.parametrize("text", ["", "much", "12XB", "-3GB", "0GB", "1.2.3GB"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(SdftError, match=r"memory = .*--memory"):
        parse_size(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_gpu_that_is_not_here_needs_its_size(planned: Callable[..., Config]) -> None:
    config = planned(**{"model.device": "cuda"})
    with pytest.raises(SdftError, match=r"memory = .*--memory"):
        this_machine(config)
    assert this_machine(config, GIB).memory == GIB


@pytest.mark.parametrize("device", ["tpu", "cuda:x", ""])
def test_an_unknown_device_is_refused(device: str, planned: Callable[..., Config]) -> None:
    with pytest.raises(SdftError, match=r"^model.device = .* cannot be used: "):
        this_machine(planned(**{"model.device": device}), 8 * GIB)


def test_the_process_is_as_large_as_a_trainers() -> None:
    """The plan imports a list of libraries, and not the trainer; the trainer must add little to them."""
    code = (
        "from sdft.config import Config; from sdft.planning.machine import process_size\n"
        "before = process_size(Config())\n"
        "import sdft.training.setup\n"
        "print(before, process_size(Config()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, found.split()[-2:])
    assert after - before < 0.04 * before
