"""Divergences of ready log-probabilities, a block of rows at a time.

The log-probabilities themselves are the variables here: nothing is normalised, and the gradient is with
respect to each of them, as a loss after a `log_softmax` needs it. `divergence` takes logits
and saves that log_softmax. N rows, V vocabulary, R rows of a block; plain torch on every device.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..call import compute_dtype
from ..checks import Options, make_options
from ..chunks import block_rows, blocks
from ..operators import register
from ..rows import MAX_RATIO, expectation

JSD_SCHEMA = "(Tensor log_p, Tensor log_q, Tensor? labels, Tensor? upstream, float beta, SymInt ignore_index) -> Tensor"
KL_SCHEMA = "(Tensor log_p, Tensor target, Tensor? upstream, str reduction, bool log_target, float eps) -> Tensor"


def _options(log_p: Tensor, beta: float) -> Options:
    return make_options(
        divergence="jsd", beta=beta, temperature=1.0, reduction="mean",
        vocab=log_p.shape[1], return_tokens=False, chunk_bytes=None,
    )  # fmt: skip


def _jsd(
    log_p: Tensor,  # (N, V) the student's
    log_q: Tensor,  # (N, V) the teacher's
    labels: Tensor | None,  # (N,)
    upstream: Tensor | None,  # () dLoss in the backward
    beta: float,
    ignore_index: int,
) -> Tensor:
    """The loss (), or with upstream its gradient (N, V) with respect to log_p, in log_p's dtype."""
    rows, dtype, device = log_p.shape[0], compute_dtype(log_p, log_q), log_p.device
    options = _options(log_p, beta)
    live = torch.ones(rows, dtype=torch.bool, device=device) if labels is None else labels != ignore_index  # (N,)
    count = live.sum().clamp_min(1)
    values = torch.zeros(rows, dtype=dtype, device=device)
    grad = None if upstream is None else torch.empty_like(log_p, memory_format=torch.contiguous_format)
    size = min(max(1, rows), block_rows(options, 2, 2, dtype, device))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        scratch = torch.empty(4, size, log_p.shape[1], dtype=dtype, device=device)
        for lo, hi in blocks(rows, size):
            s, t, a, b = (plane[: hi - lo] for plane in scratch)
            value = _jsd_rows_(s.copy_(log_p[lo:hi]), t.copy_(log_q[lo:hi]), a, b, options)
            values[lo:hi] = value
            if grad is not None and upstream is not None:
                gone = ~live[lo:hi] | (value == math.inf)  # an infinite divergence has no useful gradient
                grad[lo:hi] = s.mul_(upstream / count).masked_fill_(gone.unsqueeze(1), 0.0)
        return values.masked_fill_(~live, 0.0).sum() / count if grad is None else grad


def _jsd_rows_(s: Tensor, t: Tensor, a: Tensor, b: Tensor, options: Options) -> Tensor:
    """Values (R,) of log-probabilities s and t (R, V); s becomes the gradient. a and b are scratch.

    With u = t − s and l = log(1 − β + β·e^u), m = βq + (1−β)p: log(p/m) = −l and log(q/m) = u − l. The terms
    of ∂ log m cancel, since the weights of m are those of the two sums.
    """
    u = torch.sub(t, s, out=a)
    if options.kind == "forward_kl":
        q = t.exp_()
        value = expectation(q, u, out=u)[1]
        torch.neg(q, out=s)
        return value
    if options.kind == "reverse_kl":
        p = s.exp_()
        product, value, _ = expectation(p, u.neg_(), out=u)
        s.add_(product)
        return value
    beta = options.beta
    u.clamp_(-MAX_RATIO, MAX_RATIO)
    p, q = s.exp_(), t.exp_()
    log_mp = torch.exp(u, out=b).mul_(beta).add_(1.0 - beta).log_()
    teacher = expectation(q, u.sub_(log_mp), out=u)[1]
    product, student, _ = expectation(p, log_mp, out=log_mp)
    torch.mul(product, beta - 1.0, out=s)
    return beta * teacher - (1.0 - beta) * student


def _jsd_fake(
    log_p: Tensor, log_q: Tensor, labels: Tensor | None, upstream: Tensor | None, beta: float, ignore_index: int
) -> Tensor:
    if upstream is not None:
        return torch.empty_like(log_p, memory_format=torch.contiguous_format)
    return log_p.new_empty((), dtype=compute_dtype(log_p, log_q))


def _kl(
    log_p: Tensor,  # (N, V)
    target: Tensor,  # (N, V) probabilities, or their logarithms with log_target
    upstream: Tensor | None,  # (), or (N, V) for "none": dLoss in the backward
    reduction: str,
    log_target: bool,
    eps: float,
) -> Tensor:
    """The loss, () or (N, V) for "none", or with upstream its gradient (N, V) with respect to log_p."""
    rows, vocab = log_p.shape
    dtype, device = compute_dtype(log_p, target), log_p.device
    size = min(max(1, rows), block_rows(_options(log_p, 0.0), 1, 1, dtype, device))
    divisor = {"none": 1, "sum": 1, "batchmean": max(1, rows), "mean": max(1, rows * vocab)}[reduction]
    backward, whole = upstream is not None, reduction == "none"
    out = None
    if backward or whole:
        out = torch.empty_like(log_p, dtype=log_p.dtype if backward else dtype, memory_format=torch.contiguous_format)
    total = torch.zeros((), dtype=dtype, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        scratch = torch.empty(2, size, vocab, dtype=dtype, device=device)
        for lo, hi in blocks(rows, size):
            q, f = (plane[: hi - lo] for plane in scratch)
            q.copy_(target[lo:hi])
            f.copy_(q)
            if log_target:
                q.exp_()
            else:
                f.clamp_min_(eps).log_()
            if out is not None and upstream is not None:
                factor = upstream[lo:hi] if whole else upstream / divisor
                out[lo:hi] = q.mul_(factor).neg_()
                continue
            f.sub_(log_p[lo:hi]).mul_(q).masked_fill_(q == 0, 0.0)  # a token of probability 0 counts 0
            if out is not None:
                out[lo:hi] = f
            else:
                total += f.sum()
    return total / divisor if out is None else out


def _kl_fake(
    log_p: Tensor, target: Tensor, upstream: Tensor | None, reduction: str, log_target: bool, eps: float
) -> Tensor:
    if upstream is not None:
        return torch.empty_like(log_p, memory_format=torch.contiguous_format)
    dtype = compute_dtype(log_p, target)
    if reduction == "none":
        return torch.empty_like(log_p, dtype=dtype, memory_format=torch.contiguous_format)
    return log_p.new_empty((), dtype=dtype)


def _jsd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.plain = inputs[4:]


def _jsd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    made = _jsd_op(*ctx.saved_tensors, grad, *ctx.plain) if ctx.needs_input_grad[0] else None
    return made, None, None, None, None, None


def _kl_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.plain = inputs[3:]


def _kl_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    made = _kl_op(*ctx.saved_tensors, grad, *ctx.plain) if ctx.needs_input_grad[0] else None
    return made, None, None, None, None, None


_jsd_op: Callable[..., Tensor] = register(
    "sdft::log_space_jsd", JSD_SCHEMA, _jsd, _jsd_fake, _jsd_backward, _jsd_setup, "LigerJSD"
)
_kl_op: Callable[..., Tensor] = register(
    "sdft::log_space_kl", KL_SCHEMA, _kl, _kl_fake, _kl_backward, _kl_setup, "LigerKLDIVLoss"
)


def log_space_jsd(log_p: Tensor, log_q: Tensor, labels: Tensor | None, beta: float, ignore_index: int) -> Tensor:
    """(): mean of β·KL(q‖m) + (1−β)·KL(p‖m) over the rows not ignored, of log-probabilities (N, V); 0 if none."""
    return _jsd_op(log_p, log_q.detach(), labels, None, float(beta), ignore_index)


def log_space_kl(log_p: Tensor, target: Tensor, reduction: str, log_target: bool, eps: float) -> Tensor:
    """KL(target‖p) of log_p (N, V), reduced as torch.nn.KLDivLoss does."""
    return _kl_op(log_p, target.detach(), None, reduction, log_target, float(eps))
