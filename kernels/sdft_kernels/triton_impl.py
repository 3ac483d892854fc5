"""The Triton loss: the vendor's GEMMs around row_kernel, a chunk of tokens at a time, gradients in the forward.

Buffers are allocated once, and nothing in here makes the host wait. N tokens with a nonzero weight, C of them
per chunk, V vocabulary, H hidden size.
"""

import torch
from torch import Tensor

from .call import Grads, Inputs, Result, new_grads
from .checks import Options
from .chunks import Outputs, blocks, put, take
from .operands import FP16_SHIFT, Head, mm32
from .row_kernels import gradient_view, launch_rows

ROW_MULTIPLE = 64  # of the tokens in a chunk: GEMM tiles
PAD = 64  # of a row of logits, in entries: every row starts on a 16-byte boundary in every dtype


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
    with torch.no_grad(), torch.autocast(inputs.x.device.type, enabled=False):
        return _Loop(inputs, options, grads, keep, autocast).run(row_weights, uniform)


def workspace_bytes(device: torch.device) -> int:
    """The default workspace: 256 MiB, or a 64th of a smaller device (8 GB: 128 MiB)."""
    if device.type != "cuda":
        return 256 * 2**20
    return min(256 * 2**20, torch.cuda.get_device_properties(device).total_memory // 64)


def operand_dtype(hidden: Tensor, weight: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """What both operands of a projection are cast to: their common dtype, or autocast's."""
    return torch.promote_types(hidden.dtype, weight.dtype) if autocast is None else autocast


class _Loop:
    """Buffers and steps of run_linear."""

    def __init__(
        self, inputs: Inputs, options: Options, grads: Grads, keep: Tensor | None, autocast: torch.dtype | None
    ):
        self.inputs, self.options, self.grads, self.keep = inputs, options, grads, keep
        self.rows = inputs.x.shape[0] if keep is None else keep.numel()
        self.s_dtype = operand_dtype(inputs.x, inputs.w, autocast)
        self.t_dtype = operand_dtype(inputs.teacher_x, inputs.teacher_w, autocast)
        self.stacked = inputs.shared_head and self.s_dtype == self.t_dtype
        self.stride = -(-options.vocab // PAD) * PAD
        budget = workspace_bytes(inputs.x.device) if options.chunk_bytes is None else options.chunk_bytes
        self.chunk = self.chunk_rows(budget)
        self.head = Head(inputs.w, options.vocab, self.s_dtype, self.s_dtype, budget // 8)
        self.teacher = self.head
        if not self.stacked:
            self.teacher = Head(inputs.teacher_w, options.vocab, self.t_dtype, self.t_dtype, budget // 8)
        hidden, device = inputs.x.shape[1], inputs.x.device
        self.z = torch.empty(2 * self.chunk, self.stride, dtype=torch.float32, device=device)
        self.dx = torch.empty(self.chunk if grads.x else 0, hidden, dtype=torch.float32, device=device)
        self.both = torch.empty(2 * self.chunk if self.stacked else 0, hidden, dtype=self.s_dtype, device=device)

    def chunk_rows(self, budget: int) -> int:
        """The most tokens whose logits, hidden states and dX fit beside the cast tiles; chunks of about one size."""
        inp = self.inputs
        casts = (inp.w.dtype != self.s_dtype) + (not self.stacked and inp.teacher_w.dtype != self.t_dtype)
        row_bytes = 8 * self.stride + 12 * inp.x.shape[1] + 4 * inp.teacher_x.shape[1]
        most = max(1, (budget - casts * (budget // 8)) // row_bytes)
        if most > ROW_MULTIPLE:
            most -= most % ROW_MULTIPLE
        rows = max(1, self.rows)
        even = -(-rows // -(-rows // most))
        return min(rows, most, -(-even // ROW_MULTIPLE) * ROW_MULTIPLE)

    def run(self, row_weights: Tensor | None, uniform: float) -> Result:
        inp, opt = self.inputs, self.options
        outputs = Outputs(inp.x.shape[0], inp.dtype, inp.x.device, opt.return_tokens, inp.labels is not None)
        result = new_grads(inp, opt, self.grads, Result(outputs.divergence, outputs.tokens()), self.keep is None)
        if self.rows == 0:
            return result.zero_grads()
        factor = uniform * opt.grad_factor
        fp16 = self.s_dtype == torch.float16
        if fp16:
            row_weights, factor, after = fp16_scales(row_weights, factor)
        gone = None if row_weights is None else (row_weights == 0).unsqueeze(1)  # (N, 1)
        for lo, hi in blocks(self.rows, self.chunk):
            rows = hi - lo
            x = self.project(lo, hi)
            s, t = self.z[:rows], self.z[rows : 2 * rows]  # (C, stride) each
            g = gradient_view(s, self.s_dtype) if self.grads else None
            launch_rows(
                s, t, g, opt, (inp.bias, inp.teacher_bias), outputs,
                rows=rows, lo=lo, index=self.keep, weights=row_weights, labels=inp.labels, factor=factor,
            )  # fmt: skip
            if gone is not None and result.dw is not None:  # their gradient is 0, but 0·NaN would not be
                x = x.masked_fill(take(gone, self.keep, lo, hi), 0.0)
            if g is not None:
                self.gradients(result, g[:, : opt.vocab], x, lo, hi)
        if fp16:
            result.scale_grads(after)
        return result

    def project(self, lo: int, hi: int) -> Tensor:
        """Fill z with both sides' raw logits; returns the student's hidden states (C, H) as a GEMM operand."""
        inp, rows, vocab = self.inputs, hi - lo, self.options.vocab
        x, teacher_x = take(inp.x, self.keep, lo, hi), take(inp.teacher_x, self.keep, lo, hi)
        if self.stacked:
            both = self.both[: 2 * rows]
            both[:rows].copy_(x)
            both[rows:].copy_(teacher_x)
            self.head.logits(both, self.z[: 2 * rows, :vocab])
            return both[:rows]
        x = x.to(self.s_dtype)
        self.head.logits(x, self.z[:rows, :vocab])
        self.teacher.logits(teacher_x.to(self.t_dtype), self.z[rows : 2 * rows, :vocab])
        return x

    def gradients(self, result: Result, g: Tensor, x: Tensor, lo: int, hi: int) -> None:
        """g (C, V), x (C, H) -> dW += gᵀ x, db += Σ g, dX = g W."""
        vocab, beta = self.options.vocab, 0.0 if lo == 0 else 1.0
        if result.dw is not None:
            mm32(g.t(), x, result.dw[:vocab], beta=beta)
        if result.dbias is not None:
            result.dbias[:vocab] += g.sum(0, dtype=torch.float32)
        if result.dx is not None:
            direct = self.keep is None and result.dx.dtype == torch.float32
            dx = result.dx[lo:hi] if direct else self.dx[: hi - lo]
            self.head.input_grad(g, dx)
            if not direct:
                put(result.dx, self.keep, lo, hi, dx)


def fp16_scales(row_weights: Tensor | None, uniform: float) -> tuple[Tensor | None, float, Tensor | float]:
    """(row weights, factor in the kernel, factor afterwards): stored fp16 gradients neither vanish nor overflow.

    The kernel sees weights of at most 1 and FP16_SHIFT; the rest, 1/N and 1/τ above all, multiplies the fp32 sums.
    """
    if row_weights is None:
        return None, FP16_SHIFT, uniform / FP16_SHIFT
    largest = row_weights.abs().amax()
    largest = torch.where(largest == 0, 1.0, largest)
    return row_weights / largest, FP16_SHIFT, largest * (uniform / FP16_SHIFT)
