"""The portable loss of ready logits: copy a chunk to fp32, run the row math, write the gradient back."""

import torch
from torch import Tensor

from .call import compute_dtype
from .checks import Options, TokenStats
from .chunks import (
    Outputs,
    RowPass,
    block_rows,
    blocks,
    budget_of,
    clear_untouched,
    power_of_two_below,
    put,
    take,
)
from .rows import scratch_planes


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
    dtype, device = compute_dtype(student, teacher), student.device
    rows, vocab = student.shape[0] if keep is None else keep.numel(), options.vocab
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        outputs = Outputs(student.shape[0], dtype, device, options.return_tokens, labels is not None)
        clear_untouched(into, student.shape[0], vocab, keep)
        if rows == 0:
            return outputs.divergence, outputs.tokens()
        size = _chunk(options, dtype, device, rows)
        z = torch.empty(2, size, vocab, dtype=dtype, device=device)
        row_pass = RowPass((None, None), options, size, dtype, device)
        for lo, hi in blocks(rows, size):
            s = z[0, : hi - lo].copy_(take(student, keep, lo, hi)[:, :vocab])
            t = z[1, : hi - lo].copy_(take(teacher, keep, lo, hi)[:, :vocab])
            label = None if labels is None else take(labels, keep, lo, hi)
            weights = None if row_weights is None else take(row_weights, keep, lo, hi)
            for b_lo, b_hi, stats in row_pass.run(s, t, label, weights, into is not None):
                outputs.write(keep, lo + b_lo, lo + b_hi, stats)
            if into is not None:
                s.mul_(uniform * options.grad_factor)
                put(into[:, :vocab], keep, lo, hi, s)
        return outputs.divergence, outputs.tokens()


def _chunk(options: Options, dtype: torch.dtype, device: torch.device, rows: int) -> int:
    """Rows per chunk. On the CPU no GEMM wants more rows than the elementwise block has."""
    block = min(rows, block_rows(options, dtype, device))
    if device.type == "cpu":
        return block
    row_bytes = options.vocab * dtype.itemsize
    left = budget_of(options) - scratch_planes(options) * block * row_bytes
    return min(rows, power_of_two_below(left // (2 * row_bytes)))
