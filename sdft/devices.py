"""What only a CPU needs: freed memory goes back to the system, and caches of compiled products stay small."""

import ctypes
import os
import resource
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

KERNELS = 64  # that oneDNN keeps; a step's distinct products at one time are fewer
# Of freed blocks in a forward pass, the last after its last block, and in its backward pass, the first before it; what
# is given back must be faulted in again.
RETURNS = (2, 6)
# oneDNN's own cache, and the one of PyTorch's layer above it (ideep), whose every entry holds its product's too.
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def settle() -> None:
    """Settings of the process that keep memory from growing with the steps; call it before the first product.

    oneDNN keeps the code it makes for each shape of a product, 1024 of them by default, and PyTorch keeps 1024 of its
    descriptions. Steps rarely repeat a shape: 0.4 GB after 15 steps of SmolLM2, and 8 MB more with each.
    """
    for cache in CACHES:
        os.environ.setdefault(cache, str(KERNELS))


def return_freed(device: torch.device) -> None:
    """Gives what glibc holds of freed blocks back to the system, where tensors live in its heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # musl has none
    if device.type == "cpu" and trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Bytes of this process that are in memory; on systems other than Linux the most that ever were."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_within(lm: nn.Module, device: torch.device) -> None:
    """return_freed a few times (RETURNS) in every forward pass that keeps activations, and in its backward pass.

    Tensors that a block frees lie between those it keeps, and glibc's heap grows around the holes: 8% of the peak of
    SmolLM2's full fine-tuning, 10% with LoRA.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    def give_back(*_: Any) -> None:
        return_freed(device)

    def after(forward: bool, backward: bool, block: nn.Module, args: Any, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output  # (B, T, H)
        if hidden.requires_grad:
            if forward:
                give_back()
            if backward:
                hidden.register_hook(give_back)

    blocks = [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer)] if device.type == "cpu" else []
    forward, backward = ({len(blocks) * i // n for i in range(1, n + 1)} for n in RETURNS)
    for i, block in enumerate(blocks, start=1):
        if i in forward | backward:
            block.register_forward_hook(partial(after, i in forward, i in backward))


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on the GPU, or resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
