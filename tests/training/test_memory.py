"""What happens where memory runs short."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft import devices
from sdft.errors import SdftError
from sdft.model import loading
from sdft.training import loop
from sdft.training.metrics import read_metrics

CPU = torch.device("cpu")
CPU_ERROR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."
ERRORS = [RuntimeError(CPU_ERROR), MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_what_counts_as_out_of_memory(error: Exception) -> None:
    assert devices.ran_out(error)


def test_a_real_failure_to_allocate_counts() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert devices.ran_out(error.value)
    assert not devices.ran_out(RuntimeError("shapes cannot be multiplied"))
    assert not devices.ran_out(ValueError("can't allocate memory"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_once_more_with_the_same_random_numbers(error: Exception, capsys: Any) -> None:
    drawn = []

    def work() -> str:
        drawn.append(torch.rand(3))
        if len(drawn) == 1:
            raise error
        return "done"

    assert devices.within(CPU, "step 3", work, lambda: "half of it", str) == "done"
    assert torch.equal(*drawn)
    assert "step 3: out of memory (" in (told := capsys.readouterr().out)
    assert "once more with half of it." in told


def test_other_errors_pass() -> None:
    def work() -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        devices.within(CPU, "x", work, str, str)


def out_of_memory_over(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Makes every forward of the student over more than `tokens` tokens fail; returns the sizes that were tried."""
    from sdft.model.loading import LanguageModel

    own, tried = LanguageModel.hidden, []

    def hidden(self: Any, input_ids: torch.Tensor, lengths: Any = None) -> torch.Tensor:
        if torch.is_grad_enabled():
            tried.append(input_ids.numel())
            if input_ids.numel() > tokens:
                raise RuntimeError(CPU_ERROR)
        return own(self, input_ids, lengths)

    monkeypatch.setattr(LanguageModel, "hidden", hidden)
    return tried


@pytest.mark.parametrize("settings", [{}, {"lora.rank": 2, "lora.dropout": 0.3}], ids=str)
def test_the_step_is_repeated_in_halves(
    settings: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    whole = make_config(**settings | {"train.output": str(tmp_path / "whole"), "train.batch_size": 6})
    loop.train(whole)
    want = read_metrics(tmp_path / "whole")
    capsys.readouterr()
    tried = out_of_memory_over(monkeypatch, 150)
    loop.train(make_config(**settings | {"train.batch_size": 6}))
    got, told = read_metrics(tmp_path / "run"), capsys.readouterr().out
    assert told.count("step 1, gradients: out of memory (") == 1
    assert "out of memory" not in told.replace("step 1, gradients: out of memory", "")  # the smaller size stays
    assert tried[0] > 150
    assert max(tried[1:]) <= 150
    assert all(line["micro_batch_tokens"] < 600 for line in got)
    if not settings:  # dropout draws for other shapes
        for one, other in zip(got, want, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
            assert one["tokens"] == other["tokens"]


def test_twice_out_of_memory_is_a_clear_error(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = out_of_memory_over(monkeypatch, 0)
    with pytest.raises(SdftError) as error:
        loop.train(make_config())
    assert len(tried) == 2
    for words in (
        "step 1, gradients: out of memory also in halves",
        "By `sdft plan`: ",
        "model.gradient_checkpointing = true: ",
        " less",
        "--resume",
    ):
        assert words in str(error.value)


def test_rollouts_too(make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    from sdft.rollout import sampling

    own, tried = sampling._generate_batch, []

    def generate(model: Any, start: Any, head: Any, prompts: Any, config: Any) -> Any:
        tried.append(len(prompts))
        if len(prompts) > 3:
            raise MemoryError
        return own(model, start, head, prompts, config)

    monkeypatch.setattr(sampling, "_generate_batch", generate)
    loop.train(make_config(**{"train.batch_size": 6, "train.steps": 2}))
    assert tried == [6, 3, 3, 3, 3]
    assert (
        "step 1, rollout: out of memory (MemoryError); once more with rollout.batch_size = 3."
        in capsys.readouterr().out
    )
    assert len(read_metrics(tmp_path / "run")) == 2


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
from sdft import memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
torch.ones(7 * 2**20)  # 28 MiB, freed at once: from now on glibc keeps smaller blocks in its heap
start = resident()
blocks = [torch.ones(2**20) for _ in range(32)]  # 4 MiB each
pin = [bytearray(100_000) for _ in range(4)]  # above them, so that the heap cannot shrink by itself
del blocks
held = resident() - start
memory.return_freed(torch.device('cpu'))
print(held, resident() - start)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    held, left = map(float, out.split())
    assert held > 100
    assert left < 8
