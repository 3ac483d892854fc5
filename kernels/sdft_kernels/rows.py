"""The divergence of a block of rows, and its gradient in place: the only math of the loss.

The vocabulary may lie in parts: `statistics_` of each part, `merge` of the statistics, for the JSD also `mixture_` of
each part and `merge_mixtures`, then `gradient_` of each part. The whole vocabulary is one part with nothing to merge. A
part is normalised by its own log-sum-exps, and a KL merges by its chain rule: the KL of the whole is the mean of the
parts' KLs plus the KL of the parts' masses.

Shapes: R rows of the block, V vocabulary (of the part), K parts. `s` holds the student's final logits on entry and
dD/ds at the end; `t` holds the teacher's and is destroyed. Formulas: reference.py. The paper (arXiv 2601.19897) prints
the gradient of the reverse KL without the factor p; here it has the factor.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .checks import Activation, DivergenceName, Options

T = TypeVar("T")

# Blocks (R, V) of scratch, besides the two of logits. With fewer blocks, more rows fit in cache.
SCRATCH = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2}

# e^u overflows fp32 past u = 88. Clamping u at ±80 is exact: past ±80 the smaller probability is below e^-80 of the
# other, so the log-ratio that it weighs cannot be seen.
MAX_RATIO = 80.0


class RowStats(NamedTuple):
    """One block's per-row outputs; the entries after the first are None unless asked for."""

    divergence: Tensor  # (R,)
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    student_logprob: Tensor | None = None
    teacher_logprob: Tensor | None = None
    top1_agree: Tensor | None = None


class TokenSums(NamedTuple):
    """A part's numbers for the per-token outputs, (R,) each; p and q are normalised within the part."""

    entropy: Tensor  # of p
    teacher_entropy: Tensor  # of q
    label: Tensor | None  # log p(label); −inf if another part has the label
    teacher_label: Tensor | None
    best: Tensor  # the largest log p
    teacher_best: Tensor  # the teacher's largest logit; its largest log q if the vocabulary is whole
    shared: Tensor  # the largest log p among the teacher's likeliest tokens


class Statistics(NamedTuple):
    """The statistics of one part of the vocabulary, (R,) each; p and q are normalised within the part."""

    mean: Tensor | None  # of log p − log q under p (reverse KL), of log q − log p under q (forward KL); None for JSD
    mass: Tensor | None  # Σ p or Σ q, over which the mean is taken: 1 up to the rounding of the log-sum-exp
    tokens: TokenSums | None
    finite: bool  # the mean is surely finite
    log_sum: Tensor | None = None  # log-sum-exp of the student's logits; None if the vocabulary is whole
    teacher_log_sum: Tensor | None = None


class Mixture(NamedTuple):
    """The sums of one part for the JSD, (R,) each; p and q are normalised over the whole vocabulary."""

    student: Tensor  # Σ p·log(m/p)
    student_mass: Tensor  # Σ p
    teacher: Tensor  # Σ q·log(q/m)
    teacher_mass: Tensor  # Σ q


def math_planes(options: Options) -> int:
    """(R, V) scratch blocks that the row math needs."""
    return max(SCRATCH[options.kind], 2 if options.return_tokens else 0)


def activate_(raw: Tensor, bias: Tensor | None, act: Activation) -> Tensor:
    """raw (R, V) -> final logits z, in place."""
    if bias is not None:
        raw.add_(bias)
    if act.softcap is None:
        return raw if act.scale == act.temperature else raw.mul_(act.scale / act.temperature)
    return raw.mul_(act.scale / act.softcap).tanh_().mul_(act.softcap / act.temperature)


def deactivate_(
    grad: Tensor,  # (R, V) dD/dz, becomes dD/draw · temperature / scale
    z: Tensor,  # (R, V) final logits, destroyed
    act: Activation,
) -> Tensor:
    """Chain rule of the softcap: dz/draw = scale/temperature · (1 − tanh²). The constant goes into the GEMMs."""
    assert act.softcap is not None, "no softcap, no chain rule"
    z.mul_(act.temperature / act.softcap).square_()
    return grad.addcmul_(grad, z, value=-1.0)


def log_softmax_(z: Tensor) -> Tensor:
    """z (R, V) -> its logarithmic softmax, in place."""
    return torch.log_softmax(z, 1, out=z)


def log_softmax_part_(z: Tensor) -> tuple[Tensor, Tensor]:
    """z (R, V) -> its logarithmic softmax, in place, −inf in a row without a finite logit; and its log-sum-exp (R,)."""
    top = z.amax(1)
    forbidden = top == -math.inf
    log = log_softmax_(z).masked_fill_(forbidden.unsqueeze(1), -math.inf)
    return log, (top - log.amax(1)).masked_fill_(forbidden, -math.inf)


def expectation(p: Tensor, f: Tensor, out: Tensor) -> tuple[Tensor, Tensor, bool]:
    """(p·f in out, Σ p·f by row, whether all are surely finite); an entry with p = 0 counts 0 whatever f is."""
    product = torch.mul(p, f, out=out)
    total = product.sum(1)  # a BLAS dot per row costs 5 times both passes, in thread barriers
    # Cleaning costs two more passes. On a CPU one number shows whether it is needed. On a GPU the host would wait for
    # that number.
    finite = p.device.type == "cpu" and math.isfinite(total.sum().item())
    if not finite:
        total = product.masked_fill_(p == 0, 0.0).sum(1)
    return product, total, finite


def block_divergence_(
    s: Tensor,  # (R, V) final student logits; dD/ds (jsd: over −(1 − β)) on return if need_grad
    t: Tensor,  # (R, V) final teacher logits; destroyed
    scratch: Tensor,  # (at least math_planes(options), R, V)
    options: Options,
    labels: Tensor | None,  # (R,)
    need_grad: bool,
) -> RowStats:
    """D of every row, the per-token outputs if options ask for them, and the gradient in place."""
    whole = statistics_(s, t, scratch, options, labels)
    mixture = mixture_(s, t, scratch, options.beta) if options.kind == "jsd" else None
    if need_grad:
        gradient_(s, t, scratch, options.kind, whole, mixture)
    return row_stats(options, whole, mixture)


# A part of the vocabulary.


def statistics_(
    s: Tensor,  # (R, V) final student logits
    t: Tensor,  # (R, V) final teacher logits
    scratch: Tensor,  # (at least math_planes(options), R, V)
    options: Options,
    labels: Tensor | None,  # (R,) tokens of the whole vocabulary
    start: int | None = None,
) -> Statistics:
    """The statistics of the part that begins at token `start`; None: the vocabulary is whole.

    What `mixture_` and `gradient_` read of the part is left in s and t: log p and log q for the JSD, log p and q for
    the forward KL, p and p·(log p − log q) for the reverse KL.
    """
    log_sum = teacher_log_sum = top = None
    if start is None:
        log_p, log_q = log_softmax_(s), log_softmax_(t)
    else:
        top = t.amax(1)
        (log_p, log_sum), (log_q, teacher_log_sum) = log_softmax_part_(s), log_softmax_part_(t)
    tokens = token_sums(log_p, log_q, scratch, labels, start, top) if options.return_tokens else None
    if options.kind == "jsd":
        return Statistics(None, None, tokens, False, log_sum, teacher_log_sum)
    if options.kind == "reverse_kl":
        ratio = torch.sub(log_p, log_q, out=t)
        weight = log_p.exp_()
    else:
        ratio = torch.sub(log_q, log_p, out=scratch[0])
        weight = log_q.exp_()
    _, total, finite = expectation(weight, ratio, out=ratio)
    mass = weight.sum(1)
    if start is not None:  # a row that the part forbids has no mean, and no weight in the whole
        total, mass = total.masked_fill(mass == 0, 0.0), mass.masked_fill(mass == 0, 1.0)
    return Statistics(mean_of(total, mass), mass, tokens, finite, log_sum, teacher_log_sum)


def mean_of(total: Tensor, mass: Tensor) -> Tensor:
    """Σ p·f / Σ p: the mean of f under p, whose sum is 1 + ε and not 1.

    ε is the rounding of the long sum in the log-sum-exp, 1e-5 at V = 262k. In a gradient p·(f − mean), the mean must be
    taken under the same p. Otherwise it is off by ε·D, which at D = 28 is more than all other errors together.
    """
    return total / mass


def token_sums(
    log_p: Tensor,  # (R, V)
    log_q: Tensor,  # (R, V)
    scratch: Tensor,  # (at least 2, R, V)
    labels: Tensor | None,  # (R,)
    start: int | None,
    top: Tensor | None,  # (R,) the teacher's largest logit; None if the vocabulary is whole
) -> TokenSums:
    def entropy(log: Tensor) -> Tensor:
        prob = torch.exp(log, out=scratch[0])
        return -expectation(prob, log, out=scratch[1])[1]

    def of_label(log: Tensor) -> Tensor | None:
        if labels is None:
            return None
        if start is None:
            return log.gather(1, labels.unsqueeze(1)).squeeze(1)
        elsewhere = (labels < start) | (labels >= start + log.shape[1])
        chosen = log.gather(1, (labels - start).masked_fill(elsewhere, 0).unsqueeze(1)).squeeze(1)
        return chosen.masked_fill(elsewhere, -math.inf)

    likeliest = log_q.amax(1, keepdim=True)
    shared = scratch[0].copy_(log_p).masked_fill_(log_q < likeliest, -math.inf).amax(1)
    best = likeliest.squeeze(1) if top is None else top
    return TokenSums(entropy(log_p), entropy(log_q), of_label(log_p), of_label(log_q), log_p.amax(1), best, shared)


def mixture_(
    s: Tensor,  # (R, V) log p of the part
    t: Tensor,  # (R, V) log q of the part
    scratch: Tensor,  # (2, R, V)
    beta: float,
    part: Statistics | None = None,
    whole: Statistics | None = None,
) -> Mixture:
    """The sums of a part for the JSD, after the merge; without `part` and `whole` the vocabulary is whole.

    p and p·log(m/p) are left in s and scratch[1]. With u = log q − log p and l = log(1 − β + β·e^u): log(p/m) = −l,
    exactly 0 at u = 0, and log(q/m) = u − l. expm1 and log1p would keep more digits below |u| = 1e-4 and take 2.5
    times as long on the CPU; the rounding of log p and log q, 5e-7, is already larger.
    """
    if part is not None and whole is not None:
        log_w, log_v = shares(part, whole)
        s.add_(log_w.unsqueeze(1))
        t.add_(log_v.unsqueeze(1))
    rest = 1.0 - torch.tensor(beta, dtype=s.dtype)  # () on the CPU: it adds like a number on every device
    beta = 1.0 - rest.item()  # so that β + (1 − β) rounds to 1
    ratio = torch.sub(t, s, out=scratch[0]).clamp_(-MAX_RATIO, MAX_RATIO)
    p, q = s.exp_(), t.exp_()
    log_mp = torch.exp(ratio, out=scratch[1])
    torch.add(rest, log_mp, alpha=beta, out=log_mp).log_()
    _, teacher, _ = expectation(q, ratio.sub_(log_mp), out=ratio)
    _, student, _ = expectation(p, log_mp, out=log_mp)
    return Mixture(student, p.sum(1), teacher, q.sum(1))


def gradient_(
    s: Tensor,  # (R, V) as statistics_ or mixture_ left it; dD/ds on return (jsd: over −(1 − β))
    t: Tensor,  # (R, V) as they left it
    scratch: Tensor,  # (2, R, V) as mixture_ left it, for the JSD
    kind: DivergenceName,
    whole: Statistics,
    mixture: Mixture | None = None,  # of the whole, for the JSD
    part: Statistics | None = None,  # None: the vocabulary is whole
) -> None:
    """The gradient of the whole's divergence with respect to the part's student logits.

    Reverse KL p·(log p − log q − D), forward KL p − q, JSD (1 − β)·p·(log(p/m) − Σ p·log(p/m)), whose factor −(1 − β)
    is left to Options.grad_factor.
    """
    if kind == "jsd":
        assert mixture is not None, "the JSD takes a second pass over every part"
        center(scratch[1], s, mean_of(mixture.student, mixture.student_mass), out=s)
        return
    value = present(whole.mean)
    if kind == "reverse_kl":
        log_w = None
        mean = value
        if part is not None:  # log p − log q of the part is log p − log q of the whole less log w − log v
            log_w, log_v = shares(part, whole)
            mean = torch.where(log_w == -math.inf, 0.0, value - log_w + log_v)
        center(t, s, mean, out=s)
        if log_w is not None:
            s.mul_(log_w.exp().unsqueeze(1))
    else:
        if part is not None:
            log_w, log_v = shares(part, whole)
            s.add_(log_w.unsqueeze(1))
            t.mul_(log_v.exp().unsqueeze(1))
        s.exp_().sub_(t)
    if not whole.finite:
        drop_infinite_(s, value)


def center(product: Tensor, p: Tensor, mean: Tensor, out: Tensor) -> Tensor:
    """p·f − p·Σ p·f: the gradient of Σ p·f with respect to the logits of p, f held fixed."""
    return torch.addcmul(product, p, mean.unsqueeze(1), value=-1.0, out=out)


def drop_infinite_(grad: Tensor, value: Tensor) -> None:
    """Set the gradient of rows with an infinite divergence to 0, since it is useless; the value stays infinite."""
    grad.masked_fill_((value == math.inf).unsqueeze(1), 0.0)


# The whole, from its parts.


def merge(parts: Sequence[Statistics], kind: DivergenceName) -> Statistics:
    """The statistics of the union of parts, all made with a `start`. Any grouping gives the same, up to rounding."""
    log_sums, log_w = merged_logs([present(part.log_sum) for part in parts])
    teacher_log_sums, log_v = merged_logs([present(part.teacher_log_sum) for part in parts])
    mean = mass = None
    if kind != "jsd":
        means = torch.stack([present(part.mean) for part in parts])  # (K, R)
        masses = torch.stack([present(part.mass) for part in parts])
        own, other = (log_w, log_v) if kind == "reverse_kl" else (log_v, log_w)
        weights = own.exp() * masses
        mass = weights.sum(0)
        mean = mean_of(torch.where(weights == 0, 0.0, weights * (means + own - other)).sum(0), mass)
    tokens = None
    if parts[0].tokens is not None:
        tokens = merge_tokens([present(part.tokens) for part in parts], log_w, log_v)
    return Statistics(mean, mass, tokens, False, log_sums, teacher_log_sums)


def merge_tokens(parts: Sequence[TokenSums], log_w: Tensor, log_v: Tensor) -> TokenSums:
    """As `merge`; log_w and log_v (K, R) are the logarithms of the parts' masses under p and under q."""

    def entropy(values: list[Tensor], logs: Tensor) -> Tensor:
        weights = logs.exp()
        return torch.where(weights == 0, 0.0, weights * (torch.stack(values) - logs)).sum(0)

    def largest(values: list[Tensor | None], logs: Tensor) -> Tensor | None:
        return None if values[0] is None else (torch.stack([present(v) for v in values]) + logs).amax(0)

    tops = torch.stack([part.teacher_best for part in parts])  # (K, R)
    top = tops.amax(0)
    shared = torch.stack([part.shared for part in parts]) + log_w
    return TokenSums(
        entropy([part.entropy for part in parts], log_w),
        entropy([part.teacher_entropy for part in parts], log_v),
        largest([part.label for part in parts], log_w),
        largest([part.teacher_label for part in parts], log_v),
        (torch.stack([part.best for part in parts]) + log_w).amax(0),
        top,
        shared.masked_fill(tops < top, -math.inf).amax(0),
    )


def merge_mixtures(parts: Sequence[Mixture]) -> Mixture:
    """The sums of the union of parts."""
    return Mixture(*(torch.stack(values).sum(0) for values in zip(*parts, strict=True)))


def merged_logs(logs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """K tensors (R,) of log-sum-exps -> the whole's (R,), and each part's less the whole's (K, R)."""
    stacked = torch.stack(logs)
    whole = stacked.logsumexp(0)
    return whole, stacked - whole


def shares(part: Statistics, whole: Statistics) -> tuple[Tensor, Tensor]:
    """Logarithms (R,) of the part's mass under p and under q."""
    return (
        present(part.log_sum) - present(whole.log_sum),
        present(part.teacher_log_sum) - present(whole.teacher_log_sum),
    )


def row_stats(options: Options, whole: Statistics, mixture: Mixture | None) -> RowStats:
    """The outputs of a block, from the statistics of the whole vocabulary."""
    if mixture is None:
        value = present(whole.mean)
    else:
        teacher = mean_of(mixture.teacher, mixture.teacher_mass)
        student = mean_of(mixture.student, mixture.student_mass)
        value = options.beta * teacher - (1.0 - options.beta) * student
    tokens = whole.tokens
    if tokens is None:
        return RowStats(value)
    agree = tokens.shared >= tokens.best
    return RowStats(value, tokens.entropy, tokens.teacher_entropy, tokens.label, tokens.teacher_label, agree)


def present(value: T | None) -> T:
    """value, which is not None: the caller has checked it."""
    assert value is not None, "statistics of a whole vocabulary cannot be merged: give statistics_ a start"
    return value
