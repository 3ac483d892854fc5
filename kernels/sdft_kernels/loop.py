"""The one loop of every loss: a chunk of tokens at a time, from logits to values and gradients.

A source makes the logits of a chunk and takes their gradient back: `projection.Projection` multiplies hidden states
with heads, `run_logits` copies logits that the caller holds. Rows do the work between the two, in place:
`torch_rows.DivergenceRows`, `triton_rows.TritonRows`, `topk_rows.TopkRows` and `cross_entropy.LabelRows`.

N tokens of a call, C of them in a chunk, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from . import onednn
from .call import Gradients, Grads, Inputs, Rows, Scales, grad_dtype, new_dw
from .checks import Options
from .chunks import blocks, budget_of, clear_untouched, power_of_two_below, put, take
from .projection import Projection


def run_linear(
    inputs: Inputs, options: Options, rows: Rows, grads: Grads, scales: Scales, rounding: torch.dtype | None,
    project: type[Projection] = Projection,
) -> Gradients:  # fmt: skip
    """Run rows on the logits of hidden states and heads, made by `project`; Σ_n weights[n]·∂D_n by x, w and bias."""
    with torch.no_grad(), torch.autocast(inputs.x.device.type, enabled=False):
        made = Gradients.new(inputs, grads, scales.keep is None)
        count = inputs.x.shape[0] if scales.keep is None else scales.keep.numel()
        if count == 0:
            made.dw = new_dw(inputs.w, 0, grad_dtype(inputs.w, inputs.dtype)) if grads.w else None
            return made.zero_()
        source = project(inputs, options, rows, made, grads, scales, count, rounding)
        with onednn.products(source.as_bf16) if inputs.x.device.type == "cpu" else nullcontext():
            for lo, hi in blocks(count, source.chunk):
                g = rows.run(source.logits(lo, hi), lo, hi, source.weights, source.factor)
                if grads:
                    source.gradients(g, lo, hi)
        del g
        return source.finish()


def run_logits(
    logits: Sequence[Tensor],  # (N, V or more) of each side
    options: Options,
    rows: Rows,
    into: Tensor | None,  # (N, V or more) takes the student's gradient; None for values alone
    scales: Scales,
    dtype: torch.dtype,
) -> None:
    """Run rows on ready logits: copies of a chunk in `dtype`, and their gradient written to `into`."""
    with torch.no_grad(), torch.autocast(logits[0].device.type, enabled=False):
        count, vocab, device = logits[0].shape[0], options.vocab, logits[0].device
        clear_untouched(into, count, vocab, scales.keep)
        count = count if scales.keep is None else scales.keep.numel()
        if count == 0:
            return
        row_bytes = len(logits) * vocab * dtype.itemsize + rows.row_bytes
        budget = budget_of(options, device)
        chunk = min(count, power_of_two_below((budget - rows.block_bytes(count)) // row_bytes))
        z = torch.empty(len(logits), chunk, vocab, dtype=dtype, device=device)
        factor = scales.uniform * options.grad_factor
        for lo, hi in blocks(count, chunk):
            for side, values in zip(z, logits, strict=True):
                side[: hi - lo].copy_(take(values, scales.keep, lo, hi)[:, :vocab])
            g = rows.run([side[: hi - lo] for side in z], lo, hi, scales.weights, factor)
            if into is not None:
                put(into[:, :vocab], scales.keep, lo, hi, g)
