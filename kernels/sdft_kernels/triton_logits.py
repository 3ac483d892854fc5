"""The Triton loss of ready logits: row_kernel on the caller's own tensors, no copy, no chunks."""

import torch
from torch import Tensor

from .call import compute_dtype
from .checks import Options, TokenStats
from .chunks import Outputs, clear_untouched, put, take
from .row_kernels import launch_rows


def run_logits(
    student: Tensor,  # (N, V_s)
    teacher: Tensor,  # (N, V_t)
    labels: Tensor | None,  # (N,)
    options: Options,
    into: Tensor | None,  # (N, V_s) where the gradient goes; may be student itself; None for values alone
    row_weights: Tensor | None,  # (N,) dLoss/dD_n, or None for `uniform` on every row
    uniform: float,
    keep: Tensor | None,  # indices of the rows that count, or None for all
) -> tuple[Tensor, TokenStats | None]:
    """(N,) divergences of the kept rows, the per-token outputs, and the gradient in `into`."""
    rows = student.shape[0] if keep is None else keep.numel()
    outputs = Outputs(
        student.shape[0], compute_dtype(student, teacher), student.device, options.return_tokens, labels is not None
    )
    with torch.no_grad():
        clear_untouched(into, student.shape[0], options.vocab, keep)
        if rows == 0:
            return outputs.divergence, outputs.tokens()
        s, t = (v if v.stride(1) == 1 else v.contiguous() for v in (student, teacher))
        g = into if into is None or into.stride(1) == 1 else torch.empty_like(s)
        launch_rows(
            s, t, g, options, (None, None), outputs,
            rows=rows, index=keep, gather=True, weights=row_weights, labels=labels,
            factor=uniform * options.grad_factor,
        )  # fmt: skip
        if into is not None and g is not None and g is not into:
            put(into[:, : options.vocab], keep, 0, rows, take(g, keep, 0, rows)[:, : options.vocab])
    return outputs.divergence, outputs.tokens()
