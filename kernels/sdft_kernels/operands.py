"""Heads as GEMM operands: fp32 results whatever the storage dtype, without a whole fp32 copy of the head.

C rows of a chunk, V vocabulary, H hidden size.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FP16_SHIFT = 2.0**10  # fp16 gradients are stored this much larger: most of them would be subnormal
LOGITS_COLUMNS = 1024  # of an fp32 product at a time on the CPU: 6% faster than all of the vocabulary at once

_bf16_lock = threading.Lock()
_bf16_depth = 0
_bf16_before = "none"


@contextmanager
def bf16_products(active: bool) -> Iterator[None]:
    """Let oneDNN multiply fp32 CPU matrices as bf16 with fp32 accumulation and fp32 results.

    Lossless for operands that came from bf16, which is when the chunk loop turns it on. torch keeps this
    switch per process: the depth count lets concurrent calls share it, but another thread's own fp32
    matmul during the call is rounded too.
    """
    global _bf16_depth, _bf16_before
    if not active:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _bf16_lock:
        if _bf16_depth == 0:
            _bf16_before = matmul.fp32_precision
            matmul.fp32_precision = "bf16"
        _bf16_depth += 1
    try:
        yield
    finally:
        with _bf16_lock:
            _bf16_depth -= 1
            if _bf16_depth == 0:
                matmul.fp32_precision = _bf16_before


def has_bf16_products(device: torch.device) -> bool:
    """True where `bf16_products` pays: a CPU with AMX tiles, through oneDNN."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.backends.mkldnn, "matmul")
        and bool(torch.cpu._is_amx_tile_supported())
    )


def has_narrow_products(device: torch.device) -> bool:
    """True where a product of bf16 or fp16 operands has an fp32 result, see mm32; elsewhere they are widened."""
    return device.type == "cuda" and torch.version.hip is None


def mm32(a: Tensor, b: Tensor, out: Tensor, beta: float = 0.0, alpha: float = 1.0) -> None:
    """out = alpha·a b + beta·out in out's dtype, fp32 or fp64: neither sums nor result are rounded to the operands'."""
    if a.dtype != out.dtype and has_narrow_products(a.device):
        if beta == 0.0 and alpha == 1.0:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
        return
    # No such product elsewhere: narrow operands are widened, which is exact, slower, and wants their memory twice.
    torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)


class Head:
    """One side's output matrix (V, H), read in the dtype of the products through vocabulary tiles.

    A matrix already in the compute dtype is one tile, itself. Otherwise tiles are upcast into one buffer,
    or the whole matrix once if it fits in `budget` bytes.
    """

    def __init__(self, weight: Tensor, vocab: int, rounding: torch.dtype, compute: torch.dtype, budget: int):
        self.weight = weight[:vocab]  # (V, H)
        self.rounding = rounding
        self.compute = compute
        self.buffer: Tensor | None = None
        self.tile = vocab
        if weight.dtype == rounding == compute:
            return
        row_bytes = weight.shape[1] * compute.itemsize
        self.tile = min(vocab, max(1, budget // max(1, row_bytes)))
        self.buffer = torch.empty(self.tile, weight.shape[1], dtype=compute, device=weight.device)
        self.held = -1  # the first vocabulary row of the tile that the buffer holds

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """(first row, end row, (rows, H) in the compute dtype), in order; a tile lives until the next."""
        vocab = self.weight.shape[0]
        for v0 in range(0, vocab, self.tile):
            v1 = min(v0 + self.tile, vocab)
            if self.buffer is None:
                yield v0, v1, self.weight
                continue
            tile = self.buffer[: v1 - v0]
            if self.held != v0:
                source = self.weight[v0:v1]
                tile.copy_(source if self.rounding in (source.dtype, self.compute) else source.to(self.rounding))
                self.held = v0
            yield v0, v1, tile

    def logits(self, x: Tensor, out: Tensor) -> None:
        """x (C, H) in the compute dtype -> out (C, V) = x Wᵀ."""
        step = LOGITS_COLUMNS if x.device.type == "cpu" and self.buffer is None else self.tile
        for v0, v1, tile in self.tiles():
            for lo in range(v0, v1, step):
                hi = min(lo + step, v1)
                mm32(x, tile[lo - v0 : hi - v0].t(), out[:, lo:hi])

    def input_grad(self, grad: Tensor, out: Tensor) -> None:
        """grad (C, V) -> out (C, H) = grad W."""
        for v0, v1, tile in self.tiles():
            mm32(grad[:, v0:v1], tile, out, beta=0.0 if v0 == 0 else 1.0)
