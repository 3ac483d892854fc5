"""The Triton loss of ready logits: row_kernel on the tensors of the caller, no copy, no chunks."""

import torch
from torch import Tensor

from .call import Scales
from .checks import Options
from .chunks import Outputs, clear_untouched, put, take
from .row_kernels import launch_rows


def run_logits(
    student: Tensor,  # (N, V_s)
    teacher: Tensor,  # (N, V_t)
    labels: Tensor | None,  # (N,)
    options: Options,
    into: Tensor | None,  # (N, V_s) takes the gradient; may be student itself; None for values alone
    outputs: Outputs,
    scales: Scales,
) -> None:
    """Fill the outputs of the rows that count, and `into` with the gradient."""
    rows = student.shape[0] if scales.keep is None else scales.keep.numel()
    with torch.no_grad():
        clear_untouched(into, student.shape[0], options.vocab, scales.keep)
        if rows == 0:
            return
        s, t = (v if v.stride(1) == 1 else v.contiguous() for v in (student, teacher))
        g = into if into is None or into.stride(1) == 1 else torch.empty_like(s)
        launch_rows(
            s, t, g, options, (None, None), outputs,
            rows=rows, index=scales.keep, gather=True, weights=scales.weights, labels=labels,
            factor=scales.uniform * options.grad_factor,
        )  # fmt: skip
        if into is not None and g is not None and g is not into:
            put(into[:, : options.vocab], scales.keep, 0, rows, take(g, scales.keep, 0, rows)[:, : options.vocab])
