"""Hidden states and heads: the logits of a chunk by one product a side, and their gradient by two more.

The products have fp32 results (fp64 for fp64 inputs). Their operands are narrow (bf16, fp16) if the device has such a
product, and widened otherwise.

N tokens of a call, C of them in a chunk, V vocabulary, H hidden size; _s the student's, _t the teacher's.
"""

import torch
from torch import Tensor

from .call import Gradients, Grads, Inputs, Rows, Scales, grad_dtype, new_dw
from .checks import Options
from .chunks import budget_of, power_of_two_below, put, take
from .onednn import has_bf16_products
from .operands import FP16_SHIFT, Head, mm32, operand_dtype, prefers_narrow
from .workspace import Plan, plan_linear

TILE_BYTES = 8 * 2**20  # of widened weights at a time: small enough to stay in cache for the product that follows


def product_dtype(hidden: Tensor, weight: Tensor, rounding: torch.dtype | None) -> torch.dtype:
    """The dtype that both operands of a projection are rounded to: `rounding`, or their common one if it is None."""
    return torch.promote_types(hidden.dtype, weight.dtype) if rounding is None else rounding


class Projection:
    """The source of logits for `loop.run_linear`. Buffers are allocated once; nothing here makes the host wait."""

    def __init__(
        self,
        inputs: Inputs,
        options: Options,
        rows: Rows,
        made: Gradients,
        grads: Grads,
        scales: Scales,
        count: int,  # rows of the call that count
        rounding: torch.dtype | None,
    ):
        self.inputs, self.vocab, self.made, self.keep, self.count = inputs, options.vocab, made, scales.keep, count
        self.dtype, device = inputs.dtype, inputs.x.device
        self.narrow = rows.narrow or prefers_narrow(device)
        sides = inputs.sides
        self.products = [product_dtype(h, w, rounding if self.dtype == torch.float32 else None) for h, w in sides]
        self.operands = [operand_dtype(p, self.dtype, device) if self.narrow else self.dtype for p in self.products]
        in_bf16 = all(product == torch.bfloat16 for product in self.products)
        self.as_bf16 = in_bf16 and not self.narrow and device.type == "cpu" and has_bf16_products()
        self.shared = inputs.shared_head and len(set(self.operands)) == 1
        self.stacked = self.shared and self.narrow  # one product for both sides
        self._scale(scales, uniform=scales.uniform * options.grad_factor)

        budget, stride = budget_of(options, device), -(-self.vocab // rows.pad) * rows.pad
        heads = list(zip(sides, self.products, self.operands, strict=True))[: 1 if self.shared else 2]
        row_of_head = [
            w.shape[1] * operand.itemsize if not w.dtype == product == operand else 0
            for (_, w), product, operand in heads
        ]  # bytes of the cast of one token's row
        casts = [self.vocab * row for row in row_of_head]
        self.kept = 1  # chunks whose gradients go into one product for dW
        plan = self._plan(count, budget, casts, stride, rows)
        self.chunk = plan.chunk
        tiles = [
            max(size, row) for size, whole, row in zip(plan.casts, casts, row_of_head, strict=True) if size < whole
        ]
        tile = torch.empty(max(tiles, default=0), dtype=torch.uint8, device=device)  # one at a time, of either head
        self.heads = [
            Head(w, self.vocab, product, operand, tile if size < whole else tile.new_empty(whole), shared=size < whole)
            for ((_, w), product, operand), size, whole in zip(heads, plan.casts, casts, strict=True)
        ]
        if self.shared:
            self.heads *= 2
        self._buffers(stride)
        self.direct = made.dx is not None and self.keep is None and made.dx.dtype == self.dtype
        buffered = made.dx is not None and not self.direct
        self.dx = torch.empty(self.chunk if buffered else 0, inputs.x.shape[1], dtype=self.dtype, device=device)
        # The sum over chunks is in `dtype`. A product that is the whole sum is written in the gradient's dtype.
        self.dw_dtype = grad_dtype(inputs.w, self.dtype)
        whole = self.chunk * self.kept >= count and self.operands[0] == self.dw_dtype
        self.dw = new_dw(inputs.w, self.vocab, self.dw_dtype if whole else self.dtype) if grads.w else None
        self.x = inputs.x  # (C, H_s) the student's operand of the last chunk

    def _scale(self, scales: Scales, uniform: float) -> None:
        """Distribute the factors of the gradient: to the work on rows, to the products, or to the finished sums."""
        self.weights, self.factor, self.alpha = scales.weights, 1.0, uniform
        self.after: Tensor | float = 1.0
        if self.narrow:  # the rows write the gradient anyway
            self.factor, self.alpha = uniform, 1.0
        if self.operands[0] == torch.float16:
            self.weights, self.factor, self.after = fp16_scales(scales.weights, uniform)
        self.gone = None if scales.weights is None else (scales.weights == 0).unsqueeze(1)  # (N, 1)

    def _plan(self, count: int, budget: int, casts: list[int], stride: int, rows: Rows) -> Plan:
        """Tokens of a chunk, from the bytes of their logits, hidden states and dX, and bytes of each head's cast."""
        hidden, item = [h.shape[1] for h, _ in self.inputs.sides], self.dtype.itemsize
        other = rows.block_bytes(count)
        if self.narrow:
            apart = self.operands[0] != self.dtype and not rows.narrow  # the gradient is cast to an operand
            extra = rows.row_bytes + (self.operands[0].itemsize * self.vocab if apart else 0)
            return plan_linear(
                count, self.vocab, hidden, budget, casts, item=item, pad=rows.pad, extra=extra, other=other
            )
        tiles = tuple(min(size, TILE_BYTES, budget // 8) for size in casts)
        row_bytes = item * (rows.sides * stride + sum(hidden) + hidden[0]) + rows.row_bytes
        return Plan(min(count, power_of_two_below((budget - sum(tiles) - other) // row_bytes)), tiles)

    def _buffers(self, stride: int) -> None:
        """Memory for the logits of a chunk, in rows of `stride` entries."""
        device, sides = self.inputs.x.device, len(self.inputs.sides)
        self.z = torch.empty(sides * self.chunk, stride, dtype=self.dtype, device=device)
        self.both = torch.empty(
            2 * self.chunk if self.stacked else 0, self.inputs.x.shape[1], dtype=self.operands[0], device=device
        )  # hidden states of both sides

    def logits(self, lo: int, hi: int) -> list[Tensor]:
        """(C, V or more) raw logits of each side, in buffers that the next chunk overwrites."""
        rows, vocab = hi - lo, self.vocab
        hidden = [
            take(h, self.keep, lo, hi).to(product).to(operand)  # (C, H)
            for (h, _), product, operand in zip(self.inputs.sides, self.products, self.operands, strict=True)
        ]
        self.x = hidden[0]
        out = [self.z[i * rows : (i + 1) * rows] for i in range(len(hidden))]  # (C, V or more) each
        if self.stacked:
            both = torch.cat(hidden, out=self.both[: 2 * rows])
            self.heads[0].logits(both, self.z[: 2 * rows, :vocab])
            return out
        for head, h, z in zip(self.heads, hidden, out, strict=True):
            head.logits(h, z[:, :vocab])
        return out

    def gradients(self, g: Tensor, lo: int, hi: int) -> None:
        """g (C, V): dW += gᵀ x, db += Σ g, and rows lo:hi of dX = g W."""
        if self.made.dbias is not None:
            self.made.dbias[: self.vocab].add_(g.sum(0, dtype=self.dtype), alpha=self.alpha)
        g = g.to(self.operands[0])
        self.weight_gradient(g, self.x, lo, hi)
        self.input_gradient(g, lo, hi)

    def weight_gradient(self, g: Tensor, x: Tensor, lo: int, hi: int) -> None:
        """dW += gᵀ x for tokens lo:hi; the first product, of token 0, starts the sum."""
        if self.dw is None:
            return
        if self.gone is not None:  # the gradient of these rows is 0, but 0·NaN would not be
            x = x.masked_fill(take(self.gone, self.keep, lo, hi), 0.0)
        mm32(g.t(), x, self.dw[: self.vocab], beta=0.0 if lo == 0 else 1.0, alpha=self.alpha)

    def input_gradient(self, g: Tensor, lo: int, hi: int) -> None:
        """Rows lo:hi of dX = g W."""
        if self.made.dx is None:
            return
        dx = self.made.dx[lo:hi] if self.direct else self.dx[: hi - lo]
        self.heads[0].input_grad(g, dx)
        if self.alpha != 1.0:
            dx.mul_(self.alpha)
        if not self.direct:
            put(self.made.dx, self.keep, lo, hi, dx)

    def finish(self) -> Gradients:
        """The gradients of the whole call, each in its dtype. The buffers of the chunks are gone by then."""
        self.release()
        self.made.dw = self.dw
        if self.operands[0] == torch.float16:
            self.made.scale_(self.after)
        if self.dw is not None:
            self.made.dw, self.dw = self.dw.to(self.dw_dtype), None
        return self.made

    def release(self) -> None:
        """Free the buffers of the chunks."""
        self.z = self.both = self.dx = self.x = self.inputs.x.new_empty(0)
        self.heads = []


def fp16_scales(weights: Tensor | None, uniform: float) -> tuple[Tensor | None, float, Tensor | float]:
    """(weights and factor for the work on rows, factor for the sums): fp16 gradients neither vanish nor overflow.

    The work on rows gets weights of at most 1 and FP16_SHIFT. The rest, above all 1/N and 1/τ, multiplies the fp32
    sums.
    """
    if weights is None:
        return None, FP16_SHIFT, uniform / FP16_SHIFT
    largest = weights.abs().amax()
    largest = torch.where(largest == 0, 1.0, largest)
    return weights / largest, FP16_SHIFT, largest * (uniform / FP16_SHIFT)
