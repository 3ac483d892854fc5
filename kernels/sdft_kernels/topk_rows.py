"""The work on rows of logits against a teacher known by its top-k log-probabilities.

N tokens, V vocabulary, k named tokens a row, R rows of a block.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .call import Scales
from .checks import Options
from .chunks import take
from .rows import block_divergence_
from .torch_rows import TorchRows, Where


class Teacher(NamedTuple):
    """The cleaned log-probabilities of the teacher: entries that do not count, and repeats, are not `named`."""

    ids: Tensor  # (N, k) int64, 0 if not named
    named: Tensor  # (N, k) bool
    logprobs: Tensor  # (N, k), −inf if not named
    mass: Tensor  # (N,) of the tokens that are not named; rounding may make it negative
    covered: Tensor  # (N,) bool: every token of the vocabulary is named

    def rows(self, keep: Tensor | None, lo: int, hi: int) -> "Teacher":
        return Teacher(*(take(value, keep, lo, hi) for value in self))


def read_teacher(ids: Tensor, logprobs: Tensor, vocab: int, dtype: torch.dtype) -> Teacher:
    """Clean one call's (N, k) ids and log-probabilities, without a read on the host."""
    ids = ids.long()
    logprobs = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))
    named = (ids >= 0) & (ids < vocab) & (logprobs != -math.inf)
    # If an id is given twice, the first entry counts: a stable sort brings repeats together and leaves their order.
    ranked, order = ids.masked_fill(~named, -1).sort(dim=1, stable=True)
    repeat = torch.zeros_like(named)
    repeat[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    named &= ~torch.zeros_like(named).scatter_(1, order, repeat)
    logprobs = logprobs.masked_fill(~named, -math.inf)
    # 1 − Σq as (1 − q_max) − Σ others: if q_max is near 1, this keeps the digits that 1 − Σq would lose.
    most, where = logprobs.max(1, keepdim=True)
    mass = -most.expm1().squeeze(1) - logprobs.exp().scatter_(1, where, 0.0).sum(1)
    covered = named.sum(1) == vocab
    return Teacher(ids.masked_fill(~named, 0), named, logprobs.to(dtype), mass.to(dtype), covered)


def events_of(
    inside: Tensor,  # (R, k) student logits of the named tokens, −inf if not named
    outside: Tensor,  # (R,) log-sum-exp of its other logits
    teacher: Teacher,
    tail: str,
    tail_floor: float,
) -> tuple[Tensor, Tensor]:
    """Two (R, k + 1) blocks of unnormalised log-probabilities, the tail last."""
    if tail == "bucket":
        own = outside
        theirs = teacher.mass.clamp_min(tail_floor).log()
        # Nothing is outside, or the student forbids everything outside and the teacher's mass there is only rounding.
        void = teacher.covered | ((outside == -math.inf) & (teacher.mass <= tail_floor))
        theirs = theirs.masked_fill(void, -math.inf)
    else:  # no tail; a row with nothing named is one certain event on both sides, and its divergence 0
        own = theirs = torch.zeros_like(outside).masked_fill_(teacher.named.any(1), -math.inf)
    return torch.cat([inside, own.unsqueeze(1)], 1), torch.cat([teacher.logprobs, theirs.unsqueeze(1)], 1)


class TopkRows(TorchRows):
    """The divergence of the student's rows from the teacher's named tokens and its tail."""

    def __init__(
        self,
        options: Options,
        bias: Tensor | None,  # (V or more,)
        teacher: Teacher,
        labels: Tensor | None,  # (N,)
        tail: str,
        tail_floor: float,
        scales: Scales,
        need_grad: bool,
    ):
        like = teacher.mass
        super().__init__(options, bias, labels, scales, need_grad, like.dtype, like.device)
        self.teacher, self.tail, self.tail_floor = teacher, tail, tail_floor
        self.events = replace(options, return_tokens=False)
        self.row_bytes = 8 * (teacher.ids.shape[1] + 1) * like.dtype.itemsize  # blocks of events
        self.divergence, self.student_tail = torch.zeros_like(like), torch.zeros_like(like)  # (N,)
        self.label_logprob = None if labels is None else torch.zeros_like(like)
        self.outputs = (self.divergence, self.student_tail, self.label_logprob)

    def math_(
        self, s: Tensor, t: Sequence[Tensor], labels: Tensor | None, scratch: Tensor, where: Where
    ) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """(R,) divergences, the student's tail, and its log-probabilities of the labels if there are any."""
        teacher = self.teacher.rows(*where)
        inside = s.gather(1, teacher.ids).masked_fill_(~teacher.named, -math.inf)  # (R, k)
        label = None if labels is None else s.gather(1, labels.unsqueeze(1)).squeeze(1)
        # Take the named tokens out of s. Entries that are not named have id 0: adding 0 leaves token 0 as it is.
        s.scatter_add_(1, teacher.ids, torch.zeros_like(inside).masked_fill_(teacher.named, -math.inf))
        top = s.amax(1, keepdim=True)
        top.masked_fill_(top == -math.inf, 0.0)
        total = s.sub_(top).exp_().sum(1)  # at least 1, or exactly 0 if nothing is left
        outside = total.log() + top.squeeze(1)
        whole = torch.logsumexp(torch.cat([inside, outside.unsqueeze(1)], 1), 1)
        events, target = events_of(inside, outside, teacher, self.tail, self.tail_floor)
        lost = (events == -math.inf).all(1)  # the student forbids all that it is compared on: nothing to normalise
        plain = torch.empty(2, *events.shape, dtype=s.dtype, device=s.device)
        value = block_divergence_(events, target, plain, self.events, None, self.need_grad).divergence
        value = value.masked_fill(lost, math.inf)
        if self.need_grad:
            grad = events.masked_fill_(lost.unsqueeze(1), 0.0)  # (R, k + 1) with respect to the events' logits
            share = (grad[:, -1] / total).masked_fill_(total == 0, 0.0)
            s.mul_(share.unsqueeze(1))  # the tail's, among its tokens in proportion to p
            s.scatter_add_(1, teacher.ids, grad[:, :-1].masked_fill(~teacher.named, 0.0))
        return (value, (outside - whole).exp(), None if label is None else label - whole), None
