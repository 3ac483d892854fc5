"""Code for one kind of device only: on a CPU, it returns freed memory, keeps caches small, and has fast products.

This is the one module that calls private operators of PyTorch: oneDNN's products with weights in its own layout, and
the CPU's flash attention. They are used with the versions of torch that they were tested with, TESTED. With any other
version, public operators take their place: the values are the same, the time is not.
"""

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.torch_version import TorchVersion

TESTED = ("2.13", "2.14")  # from the first to before the second
CACHED_KERNELS = 64  # that oneDNN keeps; the distinct products of one step are fewer
# How often freed blocks are returned in a forward pass, the last time after its last block, and in its backward pass,
# the first time before it. Memory that was returned must be faulted in again.
RETURNS = (2, 6)
# The cache of oneDNN, and the cache of PyTorch's layer above it (ideep), each of whose entries holds a product too.
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
WIDEN_UP_TO = 640  # tokens; measured for heads of 64: at 582 fp32's backward takes 0.8 of bf16's time, at 1024 1.3


# Memory.


def limit_caches() -> None:
    """Sets the process so that its memory does not grow with the steps; call it before the first product.

    oneDNN keeps the code that it compiles for each shape of a product, 1024 of them by default, and PyTorch keeps 1024
    of its descriptions. Steps rarely repeat a shape: 0.4 GB after 15 steps of SmolLM2, and 8 MB more with each.
    """
    for cache in CACHES:
        os.environ.setdefault(cache, str(CACHED_KERNELS))


def return_freed(device: torch.device) -> None:
    """Returns the blocks that glibc's heap keeps after they were freed, if the device's tensors live in that heap."""
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


def return_freed_in_passes(lm: nn.Module, device: torch.device) -> None:
    """Calls return_freed a few times (RETURNS) in every forward pass that keeps activations, and in its backward pass.

    Tensors that a block frees lie between those that it keeps, and glibc's heap grows around the holes: 8% of the peak
    of SmolLM2's full fine-tuning, 10% with LoRA.
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


# Products.


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 fast: a CPU with AMX, a GPU since Ampere."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _is_tested() and torch.cpu._is_amx_tile_supported()


def prepared_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + b in dtype, (..., in) -> (..., out), with a copy of the weight (out, in) that is laid out for it.

    On a CPU the weight lies in oneDNN's blocks, without which a product with a few rows reads its weight at half the
    speed of memory. No gradients.
    """
    weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    if weight.device.type == "cpu" and _is_tested() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        blocks = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), blocks, bias, "none", [], "")
    return lambda x: nn.functional.linear(x.to(dtype), weight, bias)


def has_mixed_attention(device: torch.device) -> bool:
    """Whether `mixed_attention` runs on the device."""
    return device.type == "cpu" and _is_tested()


def mixed_attention(
    query: Tensor,  # (B, heads, T, D) bf16
    key: Tensor,  # (B, heads of keys, T, D) bf16
    value: Tensor,  # (B, heads of keys, T, D) bf16
    scale: float | None,
) -> Tensor:
    """PyTorch's causal attention (B, heads, T, D) in bf16 on the CPU; the gradient of short sequences is fp32.

    PyTorch's bf16 backward takes up to 5 times as long as its fp32 one, and is less exact; its bf16 forward takes half
    the time. The fp32 copies are made of one call's tensors at a time.
    """
    return _MixedAttention.apply(query, key, value, scale)


class _MixedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, sums = ctx.saved_tensors
        dtype = torch.float32 if q.shape[2] <= WIDEN_UP_TO else q.dtype
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = backward(*(x.to(dtype) for x in (grad, q, k, v, out)), sums, 0.0, True, scale=ctx.scale)
        dq, dk, dv = (x.to(q.dtype) for x in grads)
        return dq, dk, dv, None


def _is_tested() -> bool:
    version = TorchVersion(torch.__version__)
    return TESTED[0] <= version < TESTED[1]
