"""From the values of rows and the token weights to the loss."""

import torch
from torch import Tensor

from .call import Scales
from .checks import Options, Reduction
from .chunks import live_rows


def scale_rows(
    token_weights: Tensor | None, reduction: Reduction, rows: int, dtype: torch.dtype
) -> tuple[Tensor | None, float]:
    """dLoss/dD_n as ((N,) tensor or None, the factor of every row if None)."""
    if token_weights is None:
        return None, 1.0 / max(1, rows) if reduction == "mean" else 1.0
    weights = token_weights.detach().to(torch.promote_types(token_weights.dtype, dtype))
    if reduction == "mean":
        weights = share_of_sum(weights)
    return weights, 1.0


def row_scales(
    token_weights: Tensor | None,  # (N,)
    upstream: Tensor | None,  # () or (N,): dLoss if it is known already
    options: Options,
    rows: int,
    dtype: torch.dtype,  # of the values
) -> Scales:
    """The scales for a loop: the rows that count, and scale_rows times upstream."""
    keep = live_rows(token_weights) if options.compact else None
    weights, uniform = scale_rows(token_weights, options.reduction, rows, dtype)
    if upstream is not None:
        weights, uniform = upstream.expand(rows) * (uniform if weights is None else weights), 1.0
    return Scales(keep, weights, uniform, masked=token_weights is not None and not options.compact)


def share_of_sum(weights: Tensor) -> Tensor:
    """w / Σ w, or 0 if the sum is 0, without a read on the host.

    Weights are first divided by the largest, so that neither their sum nor its inverse overflows.
    """
    if weights.numel() == 0:
        return weights
    largest = weights.abs().amax()
    weights = weights / torch.where(largest == 0, 1.0, largest)
    total = weights.sum()
    return weights * torch.where(total == 0, 0.0, 1.0 / total)


def finish(divergence: Tensor, scales: Scales, reduction: Reduction) -> Tensor:
    """(N,) divergences -> the loss: () or, for "none", (N,); meaningless if the scales hold an upstream gradient."""
    # A row of weight 0 was never computed, so its divergence is 0 here and inf·0 cannot arise.
    values = divergence * (scales.uniform if scales.weights is None else scales.weights.to(divergence.dtype))
    return values if reduction == "none" else values.sum()
