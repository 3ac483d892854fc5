"""The work on rows of logits by torch: a block of rows at a time, so that on a CPU a block stays in cache.

N tokens of a call, C of them in a chunk, R in a block, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .call import Scales
from .checks import Options
from .chunks import Outputs, block_rows, blocks, put, take
from .rows import activate_, block_divergence_, deactivate_, math_planes

Where = tuple[Tensor | None, int, int]  # rows lo:hi of the call, or of its rows at an index


class TorchRows:
    """The common part of the work on rows by torch: blocks, the logits' activation and its chain rule, the scales.

    A subclass gives `math_`, the number of its sides, and the number of (R, V) scratch blocks that it needs.
    """

    sides = 1
    pad = 1  # no gaps between rows: torch's log_softmax would copy them
    narrow = False
    row_bytes = 0

    def __init__(
        self,
        options: Options,
        bias: Tensor | None,  # (V or more,) the student's
        labels: Tensor | None,  # (N,)
        scales: Scales,
        need_grad: bool,
        dtype: torch.dtype,
        device: torch.device,
        planes: int = 0,
    ):
        self.options, self.labels, self.need_grad = options, labels, need_grad
        self.keep, self.masked = scales.keep, scales.masked
        self.dtype, self.device = dtype, device
        self.bias = None if bias is None else bias[: options.vocab].to(dtype)
        self.capped = need_grad and options.student.softcap is not None
        self.planes = planes + self.capped
        self.block = block_rows(options, self.sides, self.planes, dtype, device)
        self.scratch = torch.empty(self.planes, 0, options.vocab, dtype=dtype, device=device)
        self.outputs: Sequence[Tensor | None] = ()  # (N,) each, in the order of math_'s values

    def block_bytes(self, rows: int) -> int:
        return self.planes * min(self.block, rows) * self.options.vocab * self.dtype.itemsize

    def math_(
        self, s: Tensor, t: Sequence[Tensor], labels: Tensor | None, scratch: Tensor, where: Where
    ) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """Values (R,) of final student logits s (R, V), and a factor (R,) of the gradient or None; dD/ds in s.

        t: the teacher's raw logits if there are two sides, destroyed. labels: (R,). scratch: (planes, R, V).
        """
        raise NotImplementedError

    def run(self, logits: Sequence[Tensor], lo: int, hi: int, weights: Tensor | None, factor: float) -> Tensor:
        if self.scratch.shape[1] < min(self.block, hi - lo):
            self.scratch = self.scratch.new_empty(self.planes, min(self.block, hi - lo), self.options.vocab)
        for b_lo, b_hi in blocks(hi - lo, self.block):
            s, *t = (side[b_lo:b_hi] for side in logits)  # (R, V)
            where = (self.keep, lo + b_lo, lo + b_hi)
            scratch = self.scratch[:, : b_hi - b_lo]
            activate_(s, self.bias, self.options.student)
            if self.capped:
                scratch[-1].copy_(s)
            weight = None if weights is None else take(weights, *where)
            gone = weight == 0 if self.masked and weight is not None else None  # (R,)
            if gone is not None and gone.device.type == "cpu" and not gone.any():  # a CPU waits for nothing
                gone = None
            labels = None if self.labels is None else take(self.labels, *where)
            if labels is not None and gone is not None:  # a row of weight zero may hold any label
                labels = labels.masked_fill(gone, 0)
            values, own = self.math_(s, t, labels, scratch, where)
            if self.capped:
                deactivate_(s, scratch[-1], self.options.student)
            for out, value in zip(self.outputs, values, strict=True):
                if out is not None and value is not None:
                    put(out, *where, value if gone is None else value.masked_fill(gone, 0))
            if self.need_grad:
                scale_rows_(s, [v for v in (weight, own) if v is not None], factor, gone)
        return logits[0]


def looks_infinite(value: Tensor) -> bool:
    """Whether some entry may be infinite. On a GPU always True, because a look would make the host wait."""
    return value.device.type != "cpu" or not math.isfinite(value.sum().item())


def scale_rows_(grad: Tensor, scales: list[Tensor], factor: float, gone: Tensor | None) -> None:
    """grad (R, V) times each of scales (R,) and factor, in one pass; 0 in the rows that are gone."""
    if scales:
        scale = torch.stack([v.to(grad.dtype) for v in scales]).prod(0).mul_(factor)  # (R,)
        grad.mul_(scale.unsqueeze(1))
    elif factor != 1.0:
        grad.mul_(factor)
    if gone is not None:
        grad.masked_fill_(gone.unsqueeze(1), 0.0)


class DivergenceRows(TorchRows):
    """The divergence of the student's rows from the teacher's."""

    sides = 2

    def __init__(
        self,
        options: Options,
        bias: tuple[Tensor | None, Tensor | None],  # (V or more,) of both sides
        labels: Tensor | None,  # (N,)
        outputs: Outputs,
        scales: Scales,
        need_grad: bool,
    ):
        like, planes = outputs.divergence, math_planes(options)
        super().__init__(options, bias[0], labels, scales, need_grad, like.dtype, like.device, planes)
        self.teacher_bias = None if bias[1] is None else bias[1][: options.vocab].to(like.dtype)
        self.outputs = (outputs.divergence, *outputs.rest, outputs.agree)

    def math_(
        self, s: Tensor, t: Sequence[Tensor], labels: Tensor | None, scratch: Tensor, where: Where
    ) -> tuple[Sequence[Tensor | None], Tensor | None]:
        teacher = activate_(t[0], self.teacher_bias, self.options.teacher)
        return block_divergence_(s, teacher, scratch, self.options, labels, self.need_grad), None
