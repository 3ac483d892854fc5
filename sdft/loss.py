"""Hidden states and heads -> the loss of a micro-batch, and per-token values for the metrics.

Legend: N completion rows, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sdft_kernels import linear_divergence
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdft.config import LossConfig
from sdft.errors import SdftError
from sdft.model.loading import Head

CE_ROWS = 512  # rows whose logits exist at once in the cross-entropy


@dataclass(frozen=True)
class TokenLoss:
    """Detached per-token values, (N,) float32 each, in the order of the batch's rows."""

    loss: Tensor  # divergence, or cross-entropy, weighted by the token's probability for DFT
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    student_logprob: Tensor | None = None
    teacher_logprob: Tensor | None = None
    top1_agree: Tensor | None = None


def check_impl(config: LossConfig, device: torch.device) -> None:
    """Raises SdftError if loss.impl cannot run on the device; tries it on one token."""
    if config.impl == "auto":
        return
    one = torch.zeros(2, 1, device=device)
    try:
        linear_divergence(one[:1], one, one[:1], one, impl=config.impl)
    except (RuntimeError, ValueError) as error:
        raise SdftError(f"loss.impl = {config.impl!r} cannot run: {error}") from None


def divergence_loss(
    hidden: Tensor,  # (N, H_s)
    head: Head,
    teacher: tuple[Tensor, Head] | None,  # hidden states (N, H_t) and head; needed
    labels: Tensor,  # (N,)
    weights: Tensor,  # (N,)
    config: LossConfig,
) -> tuple[Tensor, TokenLoss]:
    """sum_n w_n D_n, the divergence between student and teacher, by the fused loss; 0-dim float32, and token values."""
    assert teacher is not None, "a divergence compares with a teacher"
    teacher_hidden, teacher_head = teacher
    loss, tokens = linear_divergence(
        hidden,
        head.weight,
        teacher_hidden,
        teacher_head.weight,
        divergence=config.divergence,
        beta=config.beta,
        bias=head.bias,
        teacher_bias=teacher_head.bias,
        temperature=config.temperature,
        scale=head.scale,
        softcap=head.softcap,
        token_weights=weights,
        labels=labels,
        reduction="sum",
        return_tokens=True,
        chunk_bytes=config.chunk_bytes or None,
        compact=False,  # masked tokens never became rows; looking for them would make the host wait
        impl=None if config.impl == "auto" else config.impl,
    )
    return loss, TokenLoss(
        tokens.divergence,
        tokens.student_entropy,
        tokens.teacher_entropy,
        tokens.student_logprob,
        tokens.teacher_logprob,
        tokens.top1_agree,
    )


def cross_entropy_loss(
    hidden: Tensor,  # (N, H)
    head: Head,
    teacher: None,
    labels: Tensor,  # (N,)
    weights: Tensor,  # (N,)
    config: LossConfig,
) -> tuple[Tensor, TokenLoss]:
    """sum_n w_n (-log p(label_n)) by the student's probabilities p, 0-dim float32, and token values (SFT)."""
    total, ce = _weighted_cross_entropy(hidden, head, labels, weights, by_probability=False)
    return total, TokenLoss(ce)


def weighted_cross_entropy_loss(
    hidden: Tensor,  # (N, H)
    head: Head,
    teacher: None,
    labels: Tensor,  # (N,)
    weights: Tensor,  # (N,)
    config: LossConfig,
) -> tuple[Tensor, TokenLoss]:
    """sum_n w_n stop_gradient(p(label_n)) (-log p(label_n)), 0-dim float32, and token values (DFT).

    The weights w sum to 1 over the step, as for SFT, and the probabilities are not normalised: a step of unlikely
    tokens is a small one (Wu et al. 2025, arXiv 2508.05629). The gradient is that of -sum_n w_n p(label_n).
    """
    total, ce = _weighted_cross_entropy(hidden, head, labels, weights, by_probability=True)
    return total, TokenLoss(ce * ce.neg().exp(), student_logprob=-ce)


LOSSES: dict[str, Callable[..., tuple[Tensor, TokenLoss]]] = {
    "divergence": divergence_loss,
    "cross_entropy": cross_entropy_loss,
    "weighted_cross_entropy": weighted_cross_entropy_loss,
}
"""The losses by the names that a `Method` uses. All take the same arguments."""


def _weighted_cross_entropy(
    hidden: Tensor, head: Head, labels: Tensor, weights: Tensor, by_probability: bool
) -> tuple[Tensor, Tensor]:
    """The weighted sum, and the cross-entropy of each label (N,); logits of CE_ROWS rows exist at a time."""
    total, values = hidden.new_zeros((), dtype=torch.float32), []
    for start in range(0, len(labels), CE_ROWS):
        rows = slice(start, start + CE_ROWS)
        ce = checkpoint(_cross_entropy, hidden[rows], head, labels[rows], use_reentrant=False)  # (n,)
        weighted = ce * ce.detach().neg().exp() if by_probability else ce
        total = total + (weighted * weights[rows]).sum()
        values.append(ce.detach())
    return total, torch.cat(values) if values else weights.new_zeros(0)


def _cross_entropy(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head.logits(hidden).float(), labels, reduction="none")
