"""The portable fused loss: a loop over chunks of tokens whose gradients are made in the forward.

For each chunk: two logits GEMMs into one buffer, the row math over blocks small enough to stay in cache
(it overwrites the student's logits with their gradient), then the gradient GEMMs. N rows with a nonzero
weight, C of them per chunk, V vocabulary, H hidden size.
"""

import torch
from torch import Tensor

from .call import Grads, Inputs, Result, new_grads
from .checks import Options
from .chunks import (
    Outputs,
    RowPass,
    block_rows,
    blocks,
    budget_of,
    power_of_two_below,
    put,
    take,
)
from .operands import Head, bf16_products, has_bf16_products
from .rows import scratch_planes

TILE_BYTES = 8 * 2**20  # of upcast weights at a time: small enough to stay in cache for the GEMM that follows


def run_linear(
    inputs: Inputs,
    options: Options,
    grads: Grads,
    row_weights: Tensor | None,  # (N,) dLoss/dD_n, or None for `uniform` on every row
    uniform: float,
    keep: Tensor | None,  # indices of the rows that count, or None for all
    autocast: torch.dtype | None,
) -> Result:
    """Loss values of every row and Σ_n row_weights[n]·∂D_n, chunk by chunk."""
    loop = _LinearLoop(inputs, options, grads, keep, autocast)
    device_type = inputs.x.device.type
    with torch.no_grad(), torch.autocast(device_type, enabled=False), bf16_products(loop.as_bf16):
        return loop.run(row_weights, uniform)


class _LinearLoop:
    """Buffers and steps of run_linear."""

    def __init__(
        self, inputs: Inputs, options: Options, grads: Grads, keep: Tensor | None, autocast: torch.dtype | None
    ):
        self.inputs, self.options, self.grads, self.keep = inputs, options, grads, keep
        self.device = inputs.x.device
        self.dtype = inputs.dtype
        self.autocast = autocast if self.dtype == torch.float32 else None
        self.rows = inputs.x.shape[0] if keep is None else keep.numel()
        operands = (inputs.x, inputs.w, inputs.teacher_x, inputs.teacher_w)
        self.as_bf16 = has_bf16_products(self.device) and all(self.rounding(o) == torch.bfloat16 for o in operands)
        self.shared = inputs.shared_head

    def rounding(self, tensor: Tensor) -> torch.dtype:
        """The dtype that an operand's values are rounded to before the product."""
        return tensor.dtype if self.autocast is None or tensor.dtype == torch.float64 else self.autocast

    def plan(self) -> tuple[int, int]:
        """Tokens per chunk and bytes for each upcast head, from the budget."""
        budget, item, inp = budget_of(self.options), self.dtype.itemsize, self.inputs
        heads = [inp.w] if self.shared else [inp.w, inp.teacher_w]
        upcast = [h for h in heads if not (h.dtype == self.rounding(h) == self.dtype)]
        tiles = min(TILE_BYTES, budget // 8) * len(upcast)
        rows, vocab = max(1, self.rows), self.options.vocab
        block = min(block_rows(self.options, self.dtype, self.device), rows)
        scratch = scratch_planes(self.options) * block * vocab * item
        row_bytes = (2 * vocab + 2 * inp.x.shape[1] + inp.teacher_x.shape[1]) * item
        return min(rows, power_of_two_below((budget - tiles - scratch) // row_bytes)), tiles // max(1, len(upcast))

    def upcast(self, tensor: Tensor, lo: int, hi: int) -> Tensor:
        """Rows lo:hi of an (N, H) input in the compute dtype, rounded as autocast would."""
        return take(tensor, self.keep, lo, hi).to(self.rounding(tensor)).to(self.dtype)

    def run(self, row_weights: Tensor | None, uniform: float) -> Result:
        inp, opt = self.inputs, self.options
        chunk, tile_bytes = self.plan()
        outputs = Outputs(inp.x.shape[0], self.dtype, self.device, opt.return_tokens, inp.labels is not None)
        result = new_grads(inp, opt, self.grads, Result(outputs.divergence, outputs.tokens()), self.keep is None)
        if self.rows == 0:
            return result.zero_grads()
        head = Head(inp.w, opt.vocab, self.rounding(inp.w), self.dtype, tile_bytes)
        teacher = head
        if not self.shared:
            teacher = Head(inp.teacher_w, opt.vocab, self.rounding(inp.teacher_w), self.dtype, tile_bytes)
        z = torch.empty(2, chunk, opt.vocab, dtype=self.dtype, device=self.device)
        row_pass = RowPass((inp.bias, inp.teacher_bias), opt, chunk, self.dtype, self.device)
        alpha = uniform * opt.grad_factor
        for lo, hi in blocks(self.rows, chunk):
            s, t, rows = z[0, : hi - lo], z[1, : hi - lo], (self.keep, lo, hi)
            x = self.upcast(inp.x, lo, hi)
            head.logits(x, s)
            teacher.logits(self.upcast(inp.teacher_x, lo, hi), t)
            labels = None if inp.labels is None else take(inp.labels, *rows)
            weights = None if row_weights is None else take(row_weights, *rows)
            for b_lo, b_hi, stats in row_pass.run(s, t, labels, weights, bool(self.grads)):
                outputs.write(self.keep, lo + b_lo, lo + b_hi, stats)
            self._gradients(result, head, s, x, alpha, lo, hi)
        return result

    def _gradients(self, result: Result, head: Head, grad: Tensor, x: Tensor, alpha: float, lo: int, hi: int) -> None:
        vocab, beta = self.options.vocab, 0.0 if lo == 0 else 1.0
        if result.dw is not None:
            result.dw[:vocab].addmm_(grad.t(), x, beta=beta, alpha=alpha)
        if result.dbias is not None:
            ones = torch.ones(grad.shape[0], dtype=self.dtype, device=self.device)
            result.dbias[:vocab].addmv_(grad.t(), ones, beta=beta, alpha=alpha)
        if result.dx is not None:
            dx = torch.empty_like(x)
            head.input_grad(grad, dx)
            put(result.dx, self.keep, lo, hi, dx.mul_(alpha))
