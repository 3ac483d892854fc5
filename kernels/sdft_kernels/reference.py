"""The reference for tests and benchmarks: dense PyTorch with autograd, which keeps every logit.

It takes any floating dtype; in float64 it is the reference for the fused losses. Same options, same semantics, no
chunks.
"""

import torch
from torch import Tensor

from .checks import Activation, Options, Same, TokenStats, check_vocab, make_options


def linear_divergence_reference(
    x: Tensor,  # (N, H_s)
    w: Tensor,  # (V_s, H_s)
    teacher_x: Tensor,  # (N, H_t)
    teacher_w: Tensor,  # (V_t, H_t)
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | Same | None = "same",
    scale: float = 1.0,
    teacher_scale: float | Same = "same",
    token_weights: Tensor | None = None,
    labels: Tensor | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    return_tokens: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """As `linear_divergence`, densely, in the dtype of the inputs and with torch's autograd."""
    options = make_options(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        reduction=reduction,
        vocab=check_vocab(vocab_size, w.shape[0], teacher_w.shape[0]),
        return_tokens=return_tokens,
        chunk_bytes=None,
        softcap=softcap,
        teacher_softcap=teacher_softcap,
        scale=scale,
        teacher_scale=teacher_scale,
    )
    s = dense_logits(x, w, bias, options.student, options.vocab)
    t = dense_logits(teacher_x, teacher_w, teacher_bias, options.teacher, options.vocab).detach()
    return dense_divergence(s, t, options, token_weights, labels)


def divergence_reference(
    student_logits: Tensor,  # (N, V_s)
    teacher_logits: Tensor,  # (N, V_t)
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    labels: Tensor | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    return_tokens: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """As `divergence`, densely, in the dtype of the inputs and with torch's autograd."""
    options = make_options(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        reduction=reduction,
        vocab=check_vocab(vocab_size, student_logits.shape[1], teacher_logits.shape[1]),
        return_tokens=return_tokens,
        chunk_bytes=None,
    )
    s = student_logits[:, : options.vocab] / temperature
    t = teacher_logits[:, : options.vocab].detach() / temperature
    return dense_divergence(s, t, options, token_weights, labels)


def topk_divergence_reference(
    student_logits: Tensor,  # (N, V)
    teacher_ids: Tensor,  # (N, k)
    teacher_logprobs: Tensor,  # (N, k)
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    tail: str = "bucket",
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As `topk_divergence` with tail_floor=0: dense (N, V + 1) events, −inf if a token is in the other part."""
    vocab = student_logits.shape[1]
    options = make_options(
        divergence=divergence, beta=beta, temperature=temperature, reduction=reduction, vocab=vocab,
        return_tokens=False, chunk_bytes=None,
    )  # fmt: skip
    log_p = torch.log_softmax(student_logits / temperature, -1)
    log_q = torch.full_like(log_p.detach(), -torch.inf)
    for ids, logprobs in zip(teacher_ids.T.flip(0), teacher_logprobs.T.flip(0), strict=True):  # the first entry wins
        row = ((ids >= 0) & (ids < vocab) & ~logprobs.isneginf()).nonzero().squeeze(1)
        log_q[row, ids[row].long()] = logprobs[row].to(log_q.dtype)
    outside = log_q.isneginf()
    log_p = torch.cat([log_p.masked_fill(outside, -torch.inf), log_tail(log_p, ~outside)], 1)
    rest = torch.log1p(-log_q.exp().sum(1, keepdim=True).clamp_max(1.0))
    log_q = torch.cat([log_q, rest.masked_fill(~outside.any(1, keepdim=True), -torch.inf)], 1)
    if tail == "renormalise":
        log_p, log_q = log_p[:, :-1].log_softmax(1), log_q[:, :-1]
    values = row_divergence(log_p, log_q.log_softmax(1), options)
    if token_weights is not None:
        values = torch.where(token_weights == 0, torch.zeros_like(values), values)
    return reduced(values, token_weights, options.reduction)


def linear_cross_entropy_reference(
    x: Tensor,  # (N, H)
    w: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    token_weights: Tensor | None = None,
    by_probability: bool = False,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    """As `linear_cross_entropy`, densely, in the dtype of the inputs and with torch's autograd."""
    options = make_options(
        divergence="forward_kl", beta=0.5, temperature=temperature, reduction=reduction, softcap=softcap, scale=scale,
        vocab=check_vocab(vocab_size, w.shape[0], w.shape[0]), return_tokens=False, chunk_bytes=None,
    )  # fmt: skip
    weights = torch.ones_like(x[:, 0].detach()) if token_weights is None else token_weights.to(x.dtype)
    weights = weights if ignore_index is None else weights * (labels != ignore_index)
    log_p = dense_logits(x, w, bias, options.student, options.vocab).log_softmax(1)
    values = -log_p.gather(1, labels.masked_fill(weights == 0, 0).unsqueeze(1)).squeeze(1)
    if by_probability:
        values = values * values.detach().neg().exp()
    values = torch.where(weights == 0, torch.zeros_like(values), values)
    return reduced(values, weights, options.reduction)


def reduced(values: Tensor, token_weights: Tensor | None, reduction: str) -> Tensor:
    """(N,) values of the tokens -> the loss."""
    weights = torch.ones_like(values.detach()) if token_weights is None else token_weights.to(values.dtype)
    weighted = weights * values
    if reduction == "none":
        return weighted
    total = weights.sum() if reduction == "mean" else 1.0
    return weighted.sum() / total if total != 0 else 0.0 * weighted.sum()


def log_tail(log_p: Tensor, named: Tensor) -> Tensor:
    """(N, 1) log of the mass that is not named, −inf (and no gradient) if nothing is left."""
    empty = named.all(1, keepdim=True)
    return log_p.masked_fill(named & ~empty, -torch.inf).logsumexp(1, keepdim=True).masked_fill(empty, -torch.inf)


def dense_logits(h: Tensor, w: Tensor, bias: Tensor | None, act: Activation, vocab: int) -> Tensor:
    """(N, vocab) final logits of one side."""
    z = h @ w[:vocab].T
    if bias is not None:
        z = z + bias[:vocab]
    z = z * act.scale
    if act.softcap is not None:
        z = act.softcap * torch.tanh(z / act.softcap)
    return z / act.temperature


def dense_divergence(
    s: Tensor,  # (N, V) final student logits
    t: Tensor,  # (N, V) final teacher logits
    options: Options,
    token_weights: Tensor | None,
    labels: Tensor | None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """The loss of final logits, and TokenStats if asked for."""
    log_p, log_q = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
    values = row_divergence(log_p, log_q, options)
    # A row whose divergence is infinite keeps the value and gets no gradient.
    values = torch.where(values.isinf(), values.detach(), values)
    if token_weights is not None:
        values = torch.where(token_weights == 0, torch.zeros_like(values), values)
    loss = reduced(values, token_weights, options.reduction)
    if not options.return_tokens:
        return loss
    return loss, dense_tokens(values.detach(), log_p.detach(), log_q.detach(), token_weights, labels)


def weighted(log_p: Tensor, f: Tensor) -> Tensor:
    """Σ p·f by row, p = exp(log_p), with 0 if p = 0."""
    p = log_p.exp()
    return torch.where(p == 0, torch.zeros_like(f), p * torch.where(p == 0, torch.zeros_like(f), f)).sum(-1)


def row_divergence(log_p: Tensor, log_q: Tensor, options: Options) -> Tensor:
    """The divergences (N,): Σ p·log(p/q), Σ q·log(q/p), or β·Σ q·log(q/m) + (1 − β)·Σ p·log(p/m)."""
    both = log_p.isneginf() & log_q.isneginf()  # both −inf: neither the difference nor its gradient may become NaN
    log_p, log_q = log_p.masked_fill(both, 0.0), log_q.masked_fill(both, 0.0)
    p_mask, q_mask = log_p.masked_fill(both, -torch.inf), log_q.masked_fill(both, -torch.inf)
    if options.kind == "reverse_kl":
        return weighted(p_mask, log_p - log_q)
    if options.kind == "forward_kl":
        return weighted(q_mask, log_q - log_p)
    beta = options.beta
    log_m = torch.log(beta * q_mask.exp() + (1 - beta) * p_mask.exp())
    log_m = torch.where(both, torch.zeros_like(log_m), log_m)
    return beta * weighted(q_mask, log_q - log_m) + (1 - beta) * weighted(p_mask, log_p - log_m)


def dense_tokens(
    values: Tensor, log_p: Tensor, log_q: Tensor, token_weights: Tensor | None, labels: Tensor | None
) -> TokenStats:
    """TokenStats of dense log-probabilities; rows of weight zero are zeroed."""

    def live(out: Tensor) -> Tensor:
        return out if token_weights is None else torch.where(token_weights == 0, torch.zeros_like(out), out)

    def of_label(log: Tensor) -> Tensor | None:
        return None if labels is None else live(log.gather(1, labels.unsqueeze(1)).squeeze(1))

    here = torch.where(log_q == log_q.amax(-1, keepdim=True), log_p, -torch.inf)
    agree = here.amax(-1) >= log_p.amax(-1)
    return TokenStats(
        live(values),
        live(-weighted(log_p, log_p)),
        live(-weighted(log_q, log_q)),
        of_label(log_p),
        of_label(log_q),
        live(agree),
    )
