"""From per-row divergences and token weights to the loss, shared by both public functions."""

import torch
from torch import Tensor

from .checks import Reduction, TokenStats


def scale_rows(token_weights: Tensor | None, reduction: Reduction, rows: int) -> tuple[Tensor | None, float]:
    """dLoss/dD_n as ((N,) tensor or None, the factor of every row if None)."""
    if token_weights is None:
        return None, 1.0 / max(1, rows) if reduction == "mean" else 1.0
    weights = token_weights.detach().to(torch.promote_types(token_weights.dtype, torch.float32))
    if reduction == "mean":
        weights = weights * inverse_sum(weights)
    return weights, 1.0


def inverse_sum(weights: Tensor) -> Tensor:
    """1 / Σ w, or 0 where the sum is 0, without the host looking at it."""
    total = weights.sum()
    return torch.where(total == 0, 0.0, 1.0 / total)


def finish(divergence: Tensor, token_weights: Tensor | None, reduction: Reduction) -> Tensor:
    """(N,) divergences -> the loss: () or, for "none", (N,)."""
    weights, uniform = scale_rows(token_weights, reduction, divergence.shape[0])
    # A row of weight 0 has divergence 0 here: it was never computed, so no inf·0 can arise.
    values = divergence * (uniform if weights is None else weights.to(divergence.dtype))
    return values if reduction == "none" else values.sum()


def token_tuple(tokens: TokenStats | None, like: Tensor) -> tuple[Tensor, ...]:
    """The six outputs as an operator returns them: no elements where there is nothing."""
    values = [None] * 6 if tokens is None else tokens
    return tuple(like.new_empty(0) if v is None else v for v in values)


def fake_tokens(x: Tensor, dtype: torch.dtype, wanted: bool, labels: bool) -> tuple[Tensor, ...]:
    """token_tuple's shapes and dtypes, for tracing."""
    there = (wanted, wanted, wanted, wanted and labels, wanted and labels, wanted)
    kinds = (dtype,) * 5 + (torch.bool,)
    return tuple(
        x.new_empty(x.shape[0], dtype=kind) if here else x.new_empty(0) for here, kind in zip(there, kinds, strict=True)
    )


def token_stats(values: list[Tensor], labels: bool) -> TokenStats:
    """The inverse of token_tuple, for outputs that were asked for."""
    divergence, s_entropy, t_entropy, s_logprob, t_logprob, agree = values
    return TokenStats(
        divergence, s_entropy, t_entropy, s_logprob if labels else None, t_logprob if labels else None, agree
    )


def scale_grad(made: Tensor, factor: Tensor, impl: str) -> Tensor:
    """made·factor, in made's own memory and without the host looking at the factor on a GPU.

    Almost always the factor is 1 and there is nothing to do. Written through .data, so that autograd's
    check for overwritten tensors does not stop a second backward, which does not read them.
    """
    if type(made) is not Tensor:  # torch.compile is tracing
        return made * factor
    if made.numel() == 0:
        return made
    if impl != "torch" and made.is_contiguous():
        from .row_kernels import scale_

        return scale_(made.data, factor)
    if made.device.type == "cpu":
        return made if factor.item() == 1.0 else made.data.mul_(factor)
    return made.data.mul_(factor)


def refuse_double_backward(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no double backward: call backward without create_graph=True")
