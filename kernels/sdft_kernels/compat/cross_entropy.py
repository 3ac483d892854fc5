"""The cross-entropy of labels from hidden states and a head, the logits never whole.

N tokens, V vocabulary, H hidden size, C tokens of a chunk. The gradients are made in the forward, as
`linear_divergence` makes them: fp32 logits whatever the inputs, one fp32 accumulator for the head.
"""

from typing import Any

import torch
from torch import Tensor

from ..call import Grads, Inputs, Result, autocast_dtype, compute_dtype, dx_dtype, new_grads, unsharded
from ..checks import make_options
from ..chunks import DEFAULT_CHUNK_BYTES, blocks, live_rows, power_of_two_below, put, take
from ..operands import FP16_SHIFT, Head, bf16_products, has_bf16_products, has_narrow_products, mm32
from ..operators import hand_over, register

SCHEMA = (
    "(Tensor x, Tensor w, Tensor? bias, Tensor labels, Tensor? upstream, SymInt ignore_index, "
    "bool need_x, bool need_w, bool need_bias, ScalarType? autocast) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward(
    x: Tensor,  # (N, H)
    w: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    upstream: Tensor | None,  # () where a second backward runs the loop again
    ignore_index: int,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss (), and dX, dW, db; what was not asked for has no elements."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        loss, result = _run(x, w, bias, labels, ignore_index, Grads(need_x, need_w, need_bias), autocast)
        if upstream is not None:
            result.scale_grads(upstream)
    dx, dw, dbias = (x.new_empty(0) if g is None else g for g in (result.dx, result.dw, result.dbias))
    return loss, dx, dw, dbias


def _run(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    grads: Grads,
    autocast: torch.dtype | None,
) -> tuple[Tensor, Result]:
    dtype, device, vocab = compute_dtype(x, w), x.device, w.shape[0]
    keep = live_rows(labels != ignore_index)
    rows = x.shape[0] if keep is None else keep.numel()
    inputs = Inputs(x, w, bias, x, w, None, None)
    options = make_options(
        divergence="forward_kl", beta=0.5, temperature=1.0, reduction="mean",
        vocab=vocab, return_tokens=False, chunk_bytes=None,
    )  # fmt: skip
    loss = torch.zeros((), dtype=dtype, device=device)
    result = new_grads(inputs, options, grads, Result(loss, None), keep is None)
    if rows == 0:
        return loss, result.zero_grads()
    narrow = torch.promote_types(x.dtype, w.dtype) if autocast is None else autocast
    operand = narrow if has_narrow_products(device) else dtype
    inside, after = (FP16_SHIFT, 1 / (FP16_SHIFT * rows)) if operand == torch.float16 else (1 / rows, 1.0)
    head = Head(w, vocab, w.dtype if autocast is None else narrow, operand, DEFAULT_CHUNK_BYTES // 32)
    row_bytes = dtype.itemsize * (vocab + 2 * x.shape[1]) + (operand != dtype) * operand.itemsize * vocab
    chunk = min(rows, power_of_two_below(DEFAULT_CHUNK_BYTES // row_bytes))
    z = torch.empty(chunk, vocab, dtype=dtype, device=device)
    dx = torch.empty(chunk if grads.x else 0, x.shape[1], dtype=dtype, device=device)
    with bf16_products(has_bf16_products(device) and narrow == torch.bfloat16):
        for lo, hi in blocks(rows, chunk):
            x_c = take(x, keep, lo, hi)  # (C, H)
            x_c = (x_c if autocast is None else x_c.to(narrow)).to(operand)
            label = take(labels, keep, lo, hi).unsqueeze(1)  # (C, 1)
            s = z[: hi - lo]  # (C, V)
            head.logits(x_c, s)
            if bias is not None:
                s.add_(bias)
            log_p = torch._log_softmax(s, 1, False, out=s)
            loss.sub_(log_p.gather(1, label).sum() / rows)
            if not grads:
                continue
            g = log_p.exp_()
            g.scatter_add_(1, label, g.new_tensor(-1.0).expand_as(label)).mul_(inside)
            if result.dbias is not None:
                result.dbias.add_(g.sum(0))
            g = g.to(operand)
            if result.dw is not None:
                mm32(g.t(), x_c, result.dw, beta=0.0 if lo == 0 else 1.0)
            if result.dx is not None:
                head.input_grad(g, dx[: hi - lo])
                put(result.dx, keep, lo, hi, dx[: hi - lo].mul_(after))
        for grad in (result.dw, result.dbias):
            if grad is not None and after != 1.0:
                grad.mul_(after)
    return loss, result


def _fake(
    x: Tensor, w: Tensor, bias: Tensor | None, labels: Tensor, upstream: Tensor | None, ignore_index: int,
    need_x: bool, need_w: bool, need_bias: bool, autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = compute_dtype(x, w)
    dx = torch.empty_like(x, dtype=dx_dtype(x, dtype)) if need_x else x.new_empty(0)
    dw = torch.empty_like(w, dtype=dtype) if need_w else x.new_empty(0)
    db = torch.empty_like(bias, dtype=dtype) if bias is not None and need_bias else x.new_empty(0)
    return x.new_empty((), dtype=dtype), dx, dw, db


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.plain = inputs[5:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.spent = False


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 10
    if grad is None:
        return nothing
    saved = ctx.saved_tensors
    tensors, made = saved[:4], saved[4:]
    grads = hand_over(ctx, grad, tensors, made, ctx.plain[1:4], lambda: _op(*tensors, grad, *ctx.plain)[1:])
    return *grads, *nothing[3:]


_op = register(
    "sdft::linear_cross_entropy", SCHEMA, _forward, _fake, _backward, _setup, "the cross-entropy of hard labels"
)


def linear_cross_entropy(
    x: Tensor,  # (N, H)
    w: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
) -> Tensor:
    """Mean of −log p(labels[n]) over the rows whose label is not ignore_index, p = softmax(x Wᵀ + b); 0 if none.

    (), fp32 (fp64 if x or w is fp64). Gradients flow to those of x, w and bias that require them. The caller
    has checked the shapes; a label outside the vocabulary is refused by the gather. w and bias may be DTensors, as
    in `linear_divergence`.
    """
    w, bias = unsharded(w), unsharded(bias)
    needs = (v is not None and v.requires_grad and torch.is_grad_enabled() for v in (x, w, bias))
    autocast = autocast_dtype(x.device, compute_dtype(x, w))
    return _op(x, w, bias, labels, None, ignore_index, *needs, autocast)[0]
