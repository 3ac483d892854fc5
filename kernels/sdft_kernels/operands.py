"""Heads as GEMM operands: fp32 results whatever the storage dtype, without a whole fp32 copy of the head.

C rows of a chunk, V vocabulary, H hidden size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

FP16_SHIFT = 2.0**10  # fp16 gradients are stored this much larger: most of them would be subnormal
LOGITS_COLUMNS = 1024  # of an fp32 product at a time on the CPU: 6% faster than the whole vocabulary at once


def has_narrow_products(device: torch.device, operand: torch.dtype) -> bool:
    """True if a product of operands in this dtype, bf16 or fp16, has an fp32 result on the device, see mm32.

    cuBLAS has no bf16 product before sm_80, and no fp32 result of fp16 operands while fp16 accumulation is on.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if operand == torch.bfloat16:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return not getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)


def prefers_narrow(device: torch.device) -> bool:
    """Whether the device takes narrow operands if it can multiply them (see operand_dtype): a GPU does."""
    return device.type == "cuda"


def operand_dtype(product: torch.dtype, result: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of operands whose values are rounded to `product`: the result's if a GPU has no such narrow product.

    On a CPU (Triton's interpreter in place of a GPU) they are narrow, and mm32 widens them.
    """
    return result if device.type == "cuda" and not has_narrow_products(device, product) else product


def mm32(a: Tensor, b: Tensor, out: Tensor, beta: float = 0.0, alpha: float = 1.0) -> None:
    """out = alpha·a b + beta·out in out's dtype, with fp32 sums (fp64 for fp64): only the result may be rounded."""
    if a.dtype != out.dtype and has_narrow_products(a.device, a.dtype):
        if beta == 0.0 and alpha == 1.0:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
        return
    # No such product: narrow operands are widened, which is exact and slower, and takes their memory twice.
    torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)


class Head:
    """One side's output matrix (V, H), read in the dtype of the products through vocabulary tiles.

    A matrix already in the compute dtype is one tile, itself. Otherwise tiles are cast into `memory`, again for every
    product, or the whole matrix once if it fits and no other head casts into the same memory (`shared`).
    """

    def __init__(
        self,
        weight: Tensor,
        vocab: int,
        rounding: torch.dtype,
        compute: torch.dtype,
        memory: Tensor,  # (bytes,) uint8
        shared: bool,
    ):
        self.weight = weight[:vocab]  # (V, H)
        self.rounding = rounding
        self.compute = compute
        self.buffer: Tensor | None = None
        self.tile = vocab
        if weight.dtype == rounding == compute:
            return
        row_bytes = max(1, weight.shape[1] * compute.itemsize)
        self.tile = min(vocab, memory.nbytes // row_bytes)
        self.buffer = memory[: self.tile * row_bytes].view(compute).view(self.tile, weight.shape[1])
        self.shared = shared
        self.whole = False  # whether the buffer holds the whole matrix until the call ends

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """(first row, end row, (rows, H) in the compute dtype), in order; a tile lives until the next."""
        vocab = self.weight.shape[0]
        for v0 in range(0, vocab, self.tile):
            v1 = min(v0 + self.tile, vocab)
            if self.buffer is None:
                yield v0, v1, self.weight
                continue
            tile = self.buffer[: v1 - v0]
            if not self.whole:
                source = self.weight[v0:v1]
                tile.copy_(source if self.rounding in (source.dtype, self.compute) else source.to(self.rounding))
                self.whole = self.tile == vocab and not self.shared
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
