"""The portable fused loss: a loop over chunks of tokens whose gradients are made in the forward.

For each chunk: two logits GEMMs into one buffer, the row math over blocks small enough to stay in cache
(it overwrites the student's logits with their gradient), then the gradient GEMMs. N rows with a nonzero
weight, C of them per chunk, R per block, V vocabulary, H hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import Options, TokenStats
from .operands import Head, bf16_products, has_bf16_products
from .rows import RowStats, activate_, block_divergence_, deactivate_

DEFAULT_CHUNK_BYTES = 256 * 2**20
CACHE_BYTES = 2**20  # of one logits block per CPU thread: four such blocks are about one core's L2
BLOCK_BYTES = 64 * 2**20  # of scratch elsewhere, where many small launches would cost more than the traffic
TILE_BYTES = 8 * 2**20  # of upcast weights at a time: small enough to stay in cache for the GEMM that follows


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call, untouched."""

    x: Tensor  # (N, H_s)
    w: Tensor  # (V_s, H_s)
    bias: Tensor | None  # (V_s,)
    teacher_x: Tensor  # (N, H_t)
    teacher_w: Tensor  # (V_t, H_t)
    teacher_bias: Tensor | None  # (V_t,)
    labels: Tensor | None  # (N,)


@dataclass(frozen=True)
class Grads:
    """Which gradients to compute."""

    x: bool = False
    w: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.x or self.w or self.bias


@dataclass
class Result:
    """What the loop leaves: per-row values (not weighted) and the weighted gradients."""

    divergence: Tensor  # (N,) zeros where the weight is zero
    tokens: TokenStats | None
    dx: Tensor | None = None  # (N, H_s) in x's dtype (fp32 for fp16)
    dw: Tensor | None = None  # (V_s, H_s) fp32 (fp64 for fp64 inputs)
    dbias: Tensor | None = None  # (V_s,) the same


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any input is, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def power_of_two_below(value: int) -> int:
    """The largest power of two <= value, at least 1."""
    return 1 << max(0, value.bit_length() - 1)


def block_rows(vocab: int, itemsize: int, device: torch.device) -> int:
    """Rows per elementwise block."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return max(threads, power_of_two_below(threads * CACHE_BYTES // (vocab * itemsize)))
    return power_of_two_below(BLOCK_BYTES // (2 * vocab * itemsize))


def live_rows(weights: Tensor | None) -> Tensor | None:
    """Indices of the rows with a nonzero weight, or None for all of them.

    Counting them makes the host wait for the weights: the price of skipping their rows in every GEMM.
    """
    if weights is None:
        return None
    index = weights.nonzero().squeeze(1)
    return None if index.numel() == weights.numel() else index


def take(tensor: Tensor, index: Tensor | None, lo: int, hi: int) -> Tensor:
    """Rows lo:hi of tensor, or of its rows at index."""
    return tensor[lo:hi] if index is None else tensor.index_select(0, index[lo:hi])


def put(out: Tensor, index: Tensor | None, lo: int, hi: int, value: Tensor) -> None:
    """The inverse of take, into out."""
    if index is None:
        out[lo:hi].copy_(value)
    else:
        out.index_copy_(0, index[lo:hi], value.to(out.dtype))


class Outputs:
    """Per-row results of N tokens, filled block by block."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device, tokens: bool, labels: bool):
        def new(wanted: bool = True, kind: torch.dtype = dtype) -> Tensor | None:
            return torch.zeros(rows, dtype=kind, device=device) if wanted else None

        self.divergence = torch.zeros(rows, dtype=dtype, device=device)
        self.rest = (new(tokens), new(tokens), new(tokens and labels), new(tokens and labels))
        self.agree = new(tokens, torch.bool)

    def write(self, index: Tensor | None, lo: int, hi: int, stats: RowStats) -> None:
        for out, value in zip((self.divergence, *self.rest, self.agree), stats, strict=True):
            if out is not None and value is not None:
                put(out, index, lo, hi, value)

    def tokens(self) -> TokenStats | None:
        if self.agree is None:
            return None
        return TokenStats(self.divergence, *self.rest, self.agree)  # type: ignore[arg-type]


def blocks(rows: int, size: int) -> Iterator[tuple[int, int]]:
    """(lo, hi) ranges of at most size rows."""
    for lo in range(0, rows, size):
        yield lo, min(lo + size, rows)


class RowPass:
    """The elementwise work on a chunk of raw logits, block after block."""

    def __init__(
        self,
        inputs_bias: tuple[Tensor | None, Tensor | None],
        options: Options,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.options = options
        self.size = min(rows, block_rows(options.vocab, dtype.itemsize, device))
        self.bias, self.teacher_bias = (None if b is None else b[: options.vocab].to(dtype) for b in inputs_bias)
        planes = 2 if options.student.softcap is None else 3
        self.scratch = torch.empty(planes, self.size, options.vocab, dtype=dtype, device=device)

    def run(
        self,
        s: Tensor,  # (C, V) raw student logits; the weighted gradient / grad_factor on return
        t: Tensor,  # (C, V) raw teacher logits, destroyed
        labels: Tensor | None,  # (C,)
        weights: Tensor | None,  # (C,)
        need_grad: bool,
    ) -> Iterator[tuple[int, int, RowStats]]:
        for lo, hi in blocks(s.shape[0], self.size):
            scratch = self.scratch[:, : hi - lo]
            s_b = activate_(s[lo:hi], self.bias, self.options.student)
            t_b = activate_(t[lo:hi], self.teacher_bias, self.options.teacher)
            capped = self.options.student.softcap is not None and need_grad
            if capped:
                scratch[2].copy_(s_b)
            label_b = None if labels is None else labels[lo:hi]
            stats = block_divergence_(s_b, t_b, scratch, self.options, label_b, need_grad)
            if capped:
                deactivate_(s_b, scratch[2], self.options.student)
            if need_grad and weights is not None:
                s_b.mul_(weights[lo:hi].unsqueeze(1))
            yield lo, hi, stats


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
        self.dtype = compute_dtype(inputs.x, inputs.w, inputs.teacher_x, inputs.teacher_w)
        self.autocast = autocast if self.dtype == torch.float32 else None
        self.rows = inputs.x.shape[0] if keep is None else keep.numel()
        operands = (inputs.x, inputs.w, inputs.teacher_x, inputs.teacher_w)
        self.as_bf16 = has_bf16_products(self.device) and all(self.rounding(o) == torch.bfloat16 for o in operands)
        self.shared = (
            inputs.w.data_ptr() == inputs.teacher_w.data_ptr()
            and inputs.w.shape == inputs.teacher_w.shape
            and inputs.w.stride() == inputs.teacher_w.stride()
            and inputs.w.dtype == inputs.teacher_w.dtype
        )

    def rounding(self, tensor: Tensor) -> torch.dtype:
        """The dtype that an operand's values are rounded to before the product."""
        return tensor.dtype if self.autocast is None or tensor.dtype == torch.float64 else self.autocast

    def plan(self) -> tuple[int, int]:
        """Tokens per chunk and bytes for upcast weights, from the budget."""
        budget = self.options.chunk_bytes or DEFAULT_CHUNK_BYTES
        vocab, item, inp = self.options.vocab, self.dtype.itemsize, self.inputs
        heads = [inp.w] if self.shared else [inp.w, inp.teacher_w]
        upcast = [h for h in heads if not (h.dtype == self.rounding(h) == self.dtype)]
        tiles = min(TILE_BYTES, budget // 8) * len(upcast)
        planes = 2 if self.options.student.softcap is None else 3
        block = min(block_rows(vocab, item, self.device), max(1, self.rows))
        row_bytes = (2 * vocab + 2 * inp.x.shape[1] + inp.teacher_x.shape[1]) * item
        chunk = power_of_two_below((budget - tiles - planes * block * vocab * item) // row_bytes)
        return min(chunk, max(1, self.rows)), tiles // max(1, len(upcast))

    def upcast(self, tensor: Tensor, lo: int, hi: int, out: Tensor) -> None:
        """Rows lo:hi of an (N, H) input into out, rounded as autocast would."""
        rows = take(tensor, self.keep, lo, hi)
        out.copy_(rows.to(self.rounding(tensor)))

    def run(self, row_weights: Tensor | None, uniform: float) -> Result:
        inp, opt = self.inputs, self.options
        chunk, tile_bytes = self.plan()
        outputs = Outputs(inp.x.shape[0], self.dtype, self.device, opt.return_tokens, inp.labels is not None)
        result = self._new_result(outputs)
        if self.rows == 0:
            return self._zeroed(result)
        head = Head(inp.w, opt.vocab, self.rounding(inp.w), self.dtype, tile_bytes)
        teacher = (
            head
            if self.shared
            else Head(inp.teacher_w, opt.vocab, self.rounding(inp.teacher_w), self.dtype, tile_bytes)
        )
        z = torch.empty(2, chunk, opt.vocab, dtype=self.dtype, device=self.device)
        row_pass = RowPass((inp.bias, inp.teacher_bias), opt, chunk, self.dtype, self.device)
        alpha = uniform * opt.grad_factor
        for lo, hi in blocks(self.rows, chunk):
            s, t, x = self._logits(head, teacher, z, lo, hi)
            labels = None if inp.labels is None else take(inp.labels, self.keep, lo, hi)
            weights = None if row_weights is None else take(row_weights, self.keep, lo, hi)
            for b_lo, b_hi, stats in row_pass.run(s, t, labels, weights, bool(self.grads)):
                outputs.write(self.keep, lo + b_lo, lo + b_hi, stats)
            self._gradients(result, head, s, x, alpha, lo, hi)
        return result

    def _logits(self, head: Head, teacher: Head, z: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor, Tensor]:
        """Raw logits of both sides (C, V) each, and the student's rows (C, H) in the compute dtype."""
        inp, rows = self.inputs, hi - lo
        flat = z.view(-1, z.shape[2])[: 2 * rows]
        s, t = flat[:rows], flat[rows:]
        if self.shared:  # one product of 2C rows reads the head once
            both = torch.empty(2 * rows, inp.x.shape[1], dtype=self.dtype, device=self.device)
            self.upcast(inp.x, lo, hi, both[:rows])
            self.upcast(inp.teacher_x, lo, hi, both[rows:])
            head.logits(both, flat)
            return s, t, both[:rows]
        x = torch.empty(rows, inp.x.shape[1], dtype=self.dtype, device=self.device)
        teacher_x = torch.empty(rows, inp.teacher_x.shape[1], dtype=self.dtype, device=self.device)
        self.upcast(inp.x, lo, hi, x)
        self.upcast(inp.teacher_x, lo, hi, teacher_x)
        head.logits(x, s)
        teacher.logits(teacher_x, t)
        return s, t, x

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

    def _new_result(self, outputs: Outputs) -> Result:
        inp, vocab = self.inputs, self.options.vocab
        result = Result(outputs.divergence, outputs.tokens())
        if self.grads.x:
            # fp16 would underflow here, before a loss scaler's factor arrives in the backward.
            dtype = self.dtype if inp.x.dtype == torch.float16 else inp.x.dtype
            result.dx = (torch.empty_like if self.keep is None else torch.zeros_like)(inp.x, dtype=dtype)
        if self.grads.w:
            result.dw = torch.empty_like(inp.w, dtype=self.dtype)
            result.dw[vocab:].zero_()
        if self.grads.bias and inp.bias is not None:
            result.dbias = torch.zeros_like(inp.bias, dtype=self.dtype)
        return result

    def _zeroed(self, result: Result) -> Result:
        for grad in (result.dx, result.dw, result.dbias):
            if grad is not None:
                grad.zero_()
        return result
