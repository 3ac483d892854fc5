"""What only a CPU needs: memory goes back to the system."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from sdft import device
from sdft.model import activations

CPU = torch.device("cpu")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_freed_blocks_go_back_within_the_gradient(
    kind: str, checkpointing: bool, load_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several times in a forward pass that keeps activations and in its backward pass; elsewhere never."""
    _, model = load_tiny(kind)
    if checkpointing:
        activations.enable_gradient_checkpointing(model)
    given_back = []
    monkeypatch.setattr(device, "return_freed", lambda device: given_back.append(device))
    ids = torch.arange(12).view(1, 12)
    model.lm.train()
    model.hidden(ids).sum().backward()
    want = {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}
    device.return_freed_in_passes(model.lm, torch.device("cuda"))
    model.hidden(ids)
    assert given_back == []
    device.return_freed_in_passes(model.lm, CPU)
    with torch.no_grad():
        model.hidden(ids)
    assert given_back == []
    model.lm.zero_grad()
    hidden = model.hidden(ids)
    forward = len(given_back)
    assert 1 <= forward <= device.RETURNS[0]
    hidden.sum().backward()
    assert len(given_back) >= 2 * forward
    assert set(given_back) == {CPU}
    for name, gradient in want.items():
        assert torch.equal(gradient, model.trainable()[name].grad), name


@pytest.mark.parametrize("layers", [1, 5, 6, 7, 30, 80])
def test_blocks_after_which_memory_goes_back(layers: int) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = torch.nn.ModuleList(GradientCheckpointingLayer() for _ in range(layers))
    device.return_freed_in_passes(blocks, CPU)
    calls = [hook.args[:2] for block in blocks for hook in block._forward_hooks.values()]  # type: ignore[union-attr]
    assert blocks[-1]._forward_hooks
    assert [sum(way) for way in zip(*calls, strict=True)] == [min(layers, n) for n in device.RETURNS]


def test_caches_of_compiled_products_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in device.CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")  # set by the user
    device.limit_caches()
    assert [os.environ[name] for name in device.CACHES] == [str(device.CACHED_KERNELS), "7"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_goes_back() -> None:
    """In a fresh process: 128 MiB that were freed below a block that is still held."""
    script = """
import torch
from sdft import device
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
torch.ones(7 * 2**20)  # 28 MiB, freed at once: from now on glibc keeps smaller blocks in its heap
start = resident()
blocks = [torch.ones(2**20) for _ in range(32)]  # 4 MiB each
pin = [bytearray(100_000) for _ in range(4)]  # above them, so that the heap cannot shrink by itself
del blocks
held = resident() - start
device.return_freed(torch.device('cpu'))
print(held, resident() - start)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    held, left = map(float, out.split())
    assert held > 100
    assert left < 8


# Private operators of PyTorch, and what stands in for them.


@pytest.fixture(params=["tested", "untested"])
def torch_version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with the private operators, and as if this version of torch were outside the tested range."""
    if request.param == "untested":
        monkeypatch.setattr(device, "TESTED", ("1.0", "1.1"))
    return request.param


@pytest.mark.parametrize("bias", [True, False])
def test_a_prepared_product_is_the_product(bias: bool, torch_version: str) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 5, 32), torch.randn(48, 32), torch.randn(48)
    want = x.double() @ w.double().T + (b.double() if bias else 0)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        got = device.prepared_linear(w, b if bias else None, dtype)(x)
        assert got.dtype == dtype
        assert (got.double() - want).norm() < bound * want.norm()


def test_packed_attention_and_its_gradient(torch_version: str) -> None:
    """Under autocast, against float64, for sequences of 9 and 20 tokens end to end."""
    from types import SimpleNamespace

    from sdft.model.attention import attend

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 29, 16, requires_grad=True) for heads in (4, 2, 2))
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(module, q, k, v, None, lengths=(9, 20), scaling=0.25)[0]  # type: ignore[arg-type]
    weight = torch.randn(1, 29, 4, 16)
    (out.float() * weight).sum().backward()

    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    parts = zip(*(x.split([9, 20], 2) for x in wide), strict=True)
    each = [
        torch.nn.functional.scaled_dot_product_attention(
            a, b.repeat_interleave(2, 1), c.repeat_interleave(2, 1), is_causal=True, scale=0.25
        )
        for a, b, c in parts
    ]
    want = torch.cat(each, 2).transpose(1, 2)
    (want * weight).sum().backward()
    assert (out.double() - want).norm() < 0.02 * want.norm()
    for got, exact in zip((q, k, v), wide, strict=True):
        assert (got.grad.double() - exact.grad).norm() < 0.03 * exact.grad.norm()


def test_without_the_private_operators_bf16_is_not_taken_for_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "TESTED", ("1.0", "1.1"))
    assert not device.has_fast_bf16(torch.device("cpu"))
    assert not device.has_mixed_attention(torch.device("cpu"))
