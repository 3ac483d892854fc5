"""Hidden states and heads -> the loss of a micro-batch, and per-token values for the metrics.

Legend: N completion rows, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sdft_kernels import LabelStats, linear_cross_entropy, linear_divergence
from torch import Tensor

from sdft.config import LossConfig
from sdft.errors import SdftError
from sdft.model.language_model import Head


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
    loss, tokens = _label_loss(hidden, head, labels, weights, config, by_probability=False)
    return loss, TokenLoss(tokens.loss)


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
    tokens is a small one (Wu et al. 2025, arXiv 2508.05629). It is the gradient of -sum_n w_n p(label_n).
    """
    loss, tokens = _label_loss(hidden, head, labels, weights, config, by_probability=True)
    return loss, TokenLoss(tokens.loss, student_logprob=tokens.logprob)


LOSSES: dict[str, Callable[..., tuple[Tensor, TokenLoss]]] = {
    "divergence": divergence_loss,
    "cross_entropy": cross_entropy_loss,
    "weighted_cross_entropy": weighted_cross_entropy_loss,
}
"""The losses by the names that a `Method` uses. All take the same arguments."""


def _label_loss(
    hidden: Tensor, head: Head, labels: Tensor, weights: Tensor, config: LossConfig, by_probability: bool
) -> tuple[Tensor, LabelStats]:
    return linear_cross_entropy(
        hidden,
        head.weight,
        labels,
        bias=head.bias,
        scale=head.scale,
        softcap=head.softcap,
        token_weights=weights,
        by_probability=by_probability,
        ignore_index=None,
        reduction="sum",
        return_tokens=True,
        chunk_bytes=config.chunk_bytes or None,
        compact=False,  # as for the divergence
    )
