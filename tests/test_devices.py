"""What only a CPU needs: memory goes back to the system."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from sdft import devices
from sdft.model import loading

CPU = torch.device("cpu")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_freed_blocks_go_back_within_the_gradient(
    kind: str, checkpointing: bool, load_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several times in a forward pass that keeps activations and in its backward pass; elsewhere never."""
    _, model = load_tiny(kind)
    if checkpointing:
        loading.enable_gradient_checkpointing(model)
    given_back = []
    monkeypatch.setattr(devices, "return_freed", lambda device: given_back.append(device))
    ids = torch.arange(12).view(1, 12)
    model.lm.train()
    model.hidden(ids).sum().backward()
    want = {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}
    devices.return_freed_within(model.lm, torch.device("cuda"))
    model.hidden(ids)
    assert given_back == []
    devices.return_freed_within(model.lm, CPU)
    with torch.no_grad():
        model.hidden(ids)
    assert given_back == []
    model.lm.zero_grad()
    hidden = model.hidden(ids)
    forward = len(given_back)
    assert 1 <= forward <= devices.RETURNS[0]
    hidden.sum().backward()
    assert len(given_back) >= 2 * forward
    assert set(given_back) == {CPU}
    for name, gradient in want.items():
        assert torch.equal(gradient, model.trainable()[name].grad), name


@pytest.mark.parametrize("layers", [1, 5, 6, 7, 30, 80])
def test_blocks_after_which_memory_goes_back(layers: int) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = torch.nn.ModuleList(GradientCheckpointingLayer() for _ in range(layers))
    devices.return_freed_within(blocks, CPU)
    told = [hook.args[:2] for block in blocks for hook in block._forward_hooks.values()]  # type: ignore[union-attr]
    assert blocks[-1]._forward_hooks
    assert [sum(way) for way in zip(*told, strict=True)] == [min(layers, n) for n in devices.RETURNS]


def test_caches_of_compiled_products_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in devices.CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")  # the user's own
    devices.settle()
    assert [os.environ[name] for name in devices.CACHES] == [str(devices.KERNELS), "7"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_goes_back() -> None:
    """In a fresh process: 128 MiB that were freed below a block that is still held."""
    script = """
import torch
from sdft import devices
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
torch.ones(7 * 2**20)  # 28 MiB, freed at once: from now on glibc keeps smaller blocks in its heap
start = resident()
blocks = [torch.ones(2**20) for _ in range(32)]  # 4 MiB each
pin = [bytearray(100_000) for _ in range(4)]  # above them, so that the heap cannot shrink by itself
del blocks
held = resident() - start
devices.return_freed(torch.device('cpu'))
print(held, resident() - start)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    held, left = map(float, out.split())
    assert held > 100
    assert left < 8
