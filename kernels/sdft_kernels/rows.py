"""The divergence of a block of rows, and its gradient in place: the only math of the loss.

Shapes: R rows of the block, V vocabulary. `s` holds the student's final logits on entry and dD/ds on
return; `t` holds the teacher's and is destroyed. Source: design section 2; the gradient of the printed
reverse KL in the paper omits the factor p, the one here does not.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import Activation, Options

# Blocks that (R, V) scratch holds, apart from the two of logits; the fewer, the more rows fit in cache.
SCRATCH = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2}

# e^u overflows fp32 past u = 88. Clamping u at ±80 is exact: where it acts, the side with
# the smaller probability is below e^-80 of the other, so the log-ratio it would weigh cannot be seen.
MAX_RATIO = 80.0


class RowStats(NamedTuple):
    """One block's per-row outputs; the entries after the first are None unless asked for."""

    divergence: Tensor  # (R,)
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    student_logprob: Tensor | None = None
    teacher_logprob: Tensor | None = None
    top1_agree: Tensor | None = None


def math_planes(options: Options) -> int:
    """(R, V) scratch blocks that `block_divergence_` needs."""
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


def expectation(p: Tensor, f: Tensor, out: Tensor) -> tuple[Tensor, Tensor, bool]:
    """(p·f in out, Σ p·f by row, whether all are surely finite); an entry with p = 0 counts 0 whatever f is."""
    product = torch.mul(p, f, out=out)
    total = product.sum(1)  # a BLAS dot per row costs 5 times both passes, in thread barriers
    # Cleaning costs two more passes. On the CPU a look at one number tells whether it is needed; elsewhere
    # that look would make the host wait.
    finite = p.device.type == "cpu" and math.isfinite(total.sum().item())
    if not finite:
        total = product.masked_fill_(p == 0, 0.0).sum(1)
    return product, total, finite


def mean_of(total: Tensor, p: Tensor) -> Tensor:
    """Σ p·f / Σ p: the mean of f under p as it is, whose sum is 1 + ε and not 1.

    ε is the rounding of the long sum in the log-sum-exp, 1e-5 at V = 262k. In a gradient p·(f − mean) the mean must
    be the one under this p: off by ε·D, at D = 28 the error would be larger than all others together.
    """
    return total / p.sum(1)


def center(product: Tensor, p: Tensor, total: Tensor, out: Tensor) -> Tensor:
    """p·f − p·Σ p·f: the gradient of Σ p·f with respect to the logits of p, f held fixed."""
    return torch.addcmul(product, p, total.unsqueeze(1), value=-1.0, out=out)


def block_divergence_(
    s: Tensor,  # (R, V) final student logits; dD/ds (jsd: over −(1 − β)) on return if need_grad
    t: Tensor,  # (R, V) final teacher logits; destroyed
    scratch: Tensor,  # (at least math_planes(options), R, V)
    options: Options,
    labels: Tensor | None,  # (R,)
    need_grad: bool,
) -> RowStats:
    """D of every row, the per-token outputs if options ask for them, and the gradient in place."""
    log_p, log_q = log_softmax_(s), log_softmax_(t)
    extra = token_outputs(log_p, log_q, scratch, labels) if options.return_tokens else ()
    form = {"reverse_kl": _reverse_kl_, "forward_kl": _forward_kl_, "jsd": _jsd_}[options.kind]
    return RowStats(form(log_p, log_q, scratch, options.beta, need_grad), *extra)


def token_outputs(log_p: Tensor, log_q: Tensor, scratch: Tensor, labels: Tensor | None) -> tuple[Tensor | None, ...]:
    """Entropies, log-probabilities of the labels, and whether the teacher's first choice is the student's."""

    def entropy(log: Tensor) -> Tensor:
        prob = torch.exp(log, out=scratch[0])
        return -expectation(prob, log, out=scratch[1])[1]

    def of_label(log: Tensor) -> Tensor | None:
        return None if labels is None else log.gather(1, labels.unsqueeze(1)).squeeze(1)

    here = scratch[0].copy_(log_p).masked_fill_(log_q < log_q.amax(1, keepdim=True), -math.inf)
    agree = here.amax(1) >= log_p.amax(1)
    return entropy(log_p), entropy(log_q), of_label(log_p), of_label(log_q), agree


def _reverse_kl_(log_p: Tensor, log_q: Tensor, scratch: Tensor, beta: float, need_grad: bool) -> Tensor:
    """KL(p‖q) = Σ p·(log p − log q); gradient p·(log p − log q − D)."""
    ratio = torch.sub(log_p, log_q, out=log_q)
    p = log_p.exp_()
    product, value, finite = expectation(p, ratio, out=ratio)
    value = mean_of(value, p)
    if need_grad:
        center(product, p, value, out=p)
        if not finite:
            drop_infinite_(p, value)
    return value


def _forward_kl_(log_p: Tensor, log_q: Tensor, scratch: Tensor, beta: float, need_grad: bool) -> Tensor:
    """KL(q‖p) = Σ q·(log q − log p); gradient p − q."""
    ratio = torch.sub(log_q, log_p, out=scratch[0])
    q = log_q.exp_()
    _, value, finite = expectation(q, ratio, out=ratio)
    value = mean_of(value, q)
    if need_grad:
        log_p.exp_().sub_(q)
        if not finite:
            drop_infinite_(log_p, value)
    return value


def _jsd_(log_p: Tensor, log_q: Tensor, scratch: Tensor, beta: float, need_grad: bool) -> Tensor:
    """β·KL(q‖m) + (1−β)·KL(p‖m), m = βq + (1−β)p; gradient (1−β)·p·(log(p/m) − Σ p·log(p/m)).

    The factor −(1−β) is left to Options.grad_factor. With u = log q − log p and l = log(1 − β + β·e^u):
    log(p/m) = −l, exactly 0 at u = 0, and log(q/m) = u − l. expm1 and log1p would keep more digits below
    |u| = 1e-4 and take 2.5 times as long on the CPU; the rounding of log p and log q, 5e-7, is already larger.
    """
    own = 1.0 - torch.tensor(beta, dtype=log_p.dtype)  # () on the CPU wherever the block is: adds like a number
    beta = 1.0 - own.item()  # so that β + (1 − β) rounds to 1
    ratio = torch.sub(log_q, log_p, out=scratch[0]).clamp_(-MAX_RATIO, MAX_RATIO)
    p, q = log_p.exp_(), log_q.exp_()
    log_mp = torch.exp(ratio, out=scratch[1])
    torch.add(own, log_mp, alpha=beta, out=log_mp).log_()
    _, teacher, _ = expectation(q, ratio.sub_(log_mp), out=ratio)
    product, student, _ = expectation(p, log_mp, out=log_mp)
    teacher, student = mean_of(teacher, q), mean_of(student, p)
    if need_grad:
        center(product, p, student, out=p)
    return beta * teacher - (1.0 - beta) * student


def drop_infinite_(grad: Tensor, value: Tensor) -> None:
    """An infinite divergence has no useful gradient: its row's becomes 0, and the value stays infinite."""
    grad.masked_fill_((value == math.inf).unsqueeze(1), 0.0)
