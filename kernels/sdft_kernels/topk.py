"""Divergence from a teacher known only by its top-k log-probabilities, as an inference server returns them.

Both distributions become k + 1 events: the k tokens that the teacher named, and all the others together (the tail).
docs/topk.md explains which form to take, and why the tail must not be left out.

File order: the operator, the public functions; the work on rows is in topk_rows.py.
N tokens, V vocabulary, H hidden size, k named tokens a row.
"""

from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from .arguments import LinearTopkOptions, Tail, TopkOptions
from .call import Gradients, Grads, Inputs, compute_dtype, grad_dtype, product_rounding, unsharded
from .checks import (
    FLOATS,
    DivergenceName,
    Options,
    Products,
    Reduction,
    check_bias,
    check_choice,
    check_head,
    check_matrix,
    check_plain,
    check_teacher,
    check_tokens,
    check_vocab,
    make_options,
)
from .loop import run_linear, run_logits
from .operators import linear_operator
from .reduce import finish, row_scales
from .topk_rows import TopkRows, read_teacher

TAILS = ("bucket", "renormalise")


class TopkStats(NamedTuple):
    """Per-token outputs, all (N,), detached, fp32 (fp64 for fp64 inputs); zeros if the weight is zero."""

    divergence: Tensor  # D_n, not multiplied by the token's weight
    student_tail: Tensor  # the student's probability outside the named tokens
    teacher_tail: Tensor  # the teacher's, 1 − Σ exp(logprobs), at least 0
    student_logprob: Tensor | None  # of labels[n], over the whole vocabulary; None without labels


def _forward(
    x: Tensor,  # (N, H), or (N, V) logits if w is None
    w: Tensor | None,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, k)
    logprobs: Tensor,  # (N, k)
    token_weights: Tensor | None,  # (N,)
    labels: Tensor | None,  # (N,)
    upstream: Tensor | None,  # dLoss: None in the forward; () or (N,) if a backward runs the loop again
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    rounding: torch.dtype | None,
    tail: str,
    tail_floor: float,
    *plain: Any,
) -> tuple[Tensor, ...]:
    """The loss, four per-token outputs, and dX, dW, db; what was not asked for has no elements."""
    options = Options.from_flat(*plain)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        scales = row_scales(token_weights, upstream, options, x.shape[0], compute_dtype(x, w))
        known = upstream is not None or options.reduction != "none"
        grads = Grads(need_x, need_w, need_bias) if known else Grads()
        dtype = compute_dtype(x, w)
        teacher = read_teacher(ids, logprobs, options.vocab, dtype)
        wanted = labels if options.return_tokens else None
        rows = TopkRows(options, bias, teacher, wanted, tail, tail_floor, scales, bool(grads))
        if w is None:
            made = Gradients(torch.empty_like(x, dtype=grad_dtype(x, dtype)) if grads.x else None)
            run_logits([x], options, rows, made.dx, scales, dtype)
        else:
            made = run_linear(Inputs(x, w, bias), options, rows, grads, scales, rounding)
        stats = [x.new_empty(0) for _ in range(4)]  # four tensors, because an operator's outputs may not alias
        if options.return_tokens:
            mass = teacher.mass.clamp(0.0, 1.0)
            mass = mass if token_weights is None else mass.masked_fill(token_weights == 0, 0.0)
            label = x.new_empty(0) if rows.label_logprob is None else rows.label_logprob
            stats = [rows.divergence, rows.student_tail, mass, label]
        loss = finish(rows.divergence, scales, options.reduction)
        return loss, *stats, *made.flat(x)


def _describe(
    options: Options, x: Tensor, w: Tensor | None, bias: Tensor | None, ids: Tensor, logprobs: Tensor,
    token_weights: Tensor | None, labels: Tensor | None,
) -> tuple[torch.dtype, list[torch.dtype | None]]:  # fmt: skip
    dtype = compute_dtype(x, w)
    row = dtype if options.return_tokens else None
    return dtype, [row, row, row, None if labels is None else row]


_op = linear_operator(
    "sdft::topk_divergence", _forward, _describe, stats=4, public="the top-k divergence",
    tensors="Tensor ids, Tensor logprobs, Tensor? token_weights, Tensor? labels", plain="str tail, float tail_floor",
)  # fmt: skip


@overload
def linear_topk_divergence(
    x: Tensor,
    w: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_tokens: Literal[False] = False,
    **options: Unpack[LinearTopkOptions],
) -> Tensor: ...
@overload
def linear_topk_divergence(
    x: Tensor,
    w: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_tokens: Literal[True],
    **options: Unpack[LinearTopkOptions],
) -> tuple[Tensor, TopkStats]: ...
@overload
def linear_topk_divergence(
    x: Tensor,
    w: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_tokens: bool,
    **options: Unpack[LinearTopkOptions],
) -> Tensor | tuple[Tensor, TopkStats]: ...
def linear_topk_divergence(
    x: Tensor,  # (N, H)
    w: Tensor,  # (V, H)
    teacher_ids: Tensor,  # (N, k)
    teacher_logprobs: Tensor,  # (N, k)
    *,
    divergence: DivergenceName = "reverse_kl",
    beta: float = 0.5,
    tail: Tail = "bucket",
    tail_floor: float = 1e-7,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    token_weights: Tensor | None = None,
    labels: Tensor | None = None,
    reduction: Reduction = "mean",
    vocab_size: int | None = None,
    return_tokens: bool = False,
    chunk_bytes: int | None = None,
    products: Products | None = None,
) -> Tensor | tuple[Tensor, TopkStats]:
    """Divergence between the student and a teacher known by its k most likely tokens a row.

    The student's logits are those of `linear_divergence`, fp32 (fp64 if x or w is), a chunk of rows at a time. With
    tail="bucket" the value is at most the full divergence, grows with k, and equals it if all tokens are named.
    Runs on any device through torch; the host waits only for token_weights.

    Args:
        x: (N, H) student hidden states, fp32, bf16, fp16 or fp64. Flatten batch and time first.
        w: (V, H) student head; it and the bias may be DTensors, as in `linear_divergence`.
        teacher_ids: (N, k) int64 or int32. Entries outside 0..vocab_size−1 (−1 by convention), and those whose
            log-probability is −inf, do not count: their mass belongs to the tail. If an id is given twice in a row,
            the first entry counts. Values are never refused, because a check would make the host wait.
        teacher_logprobs: (N, k) floating: logs of probabilities over the *whole* vocabulary, as servers return
            them, in any order, and at the `temperature` of this call (docs/topk.md).
        divergence, beta: as in `linear_divergence`, over the k + 1 (or k) events.
        tail: "bucket": everything not named is one event; its gradient spreads over its tokens in proportion
            to the student's p. "renormalise": both sides restricted to the named tokens; the other logits get no
            gradient, and the mass that the student gives them has no effect.
        tail_floor: in [0, 1), for "bucket": the least mass that the teacher's tail is taken to have. Rounding of
            log-probabilities leaves about 1e-7 of it unknown, and 0 would make reverse KL infinite.
        bias: (V,), floating. −inf forbids a token. If the student forbids a token that the teacher gives mass, forward
            KL is infinite; under "renormalise", if it forbids all named tokens, every divergence is infinite. Such a
            row keeps the value; its gradient is 0.
        temperature, softcap, scale: of the student's logits, as in `linear_divergence`.
        token_weights, labels, reduction, vocab_size, chunk_bytes, products: as in `linear_divergence`.
        return_tokens: also return TopkStats.

    Returns:
        The loss, () or (N,) for "none", fp32 (fp64 if x or w is fp64); with return_tokens also TopkStats.
        Gradients as from `linear_divergence`; a frozen head costs none. A row with nothing named has divergence 0.

    Raises:
        ValueError: an argument is out of its range or does not fit the others; the message names it.
        RuntimeError: a double backward.
    """
    w, bias = unsharded(w), unsharded(bias)
    check_matrix("x", x)
    check_matrix("w", w, ("x", x))
    check_head("w", w, "x", x)
    check_bias("bias", bias, w.shape[0], ("x", x))
    options = make_options(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        reduction=reduction,
        vocab=check_vocab(vocab_size, w.shape[0], w.shape[0]),
        return_tokens=return_tokens,
        chunk_bytes=chunk_bytes,
        softcap=softcap,
        scale=scale,
    )
    rounding = product_rounding(products, x.device, compute_dtype(x, w))
    return _call(
        ("x", x), w, bias, teacher_ids, teacher_logprobs, token_weights, labels, rounding, tail, tail_floor, options
    )


@overload
def topk_divergence(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_tokens: Literal[False] = False,
    **options: Unpack[TopkOptions],
) -> Tensor: ...
@overload
def topk_divergence(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_tokens: Literal[True],
    **options: Unpack[TopkOptions],
) -> tuple[Tensor, TopkStats]: ...
@overload
def topk_divergence(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_tokens: bool,
    **options: Unpack[TopkOptions],
) -> Tensor | tuple[Tensor, TopkStats]: ...
def topk_divergence(
    student_logits: Tensor,  # (N, V)
    teacher_ids: Tensor,  # (N, k)
    teacher_logprobs: Tensor,  # (N, k)
    *,
    divergence: DivergenceName = "reverse_kl",
    beta: float = 0.5,
    tail: Tail = "bucket",
    tail_floor: float = 1e-7,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    labels: Tensor | None = None,
    reduction: Reduction = "mean",
    vocab_size: int | None = None,
    return_tokens: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, TopkStats]:
    """`linear_topk_divergence` for callers who already hold the student's logits.

    Args:
        student_logits: (N, V) fp32, bf16, fp16 or fp64, not changed; any softcap or scale is already in them.

    The other arguments, the return value and the errors are as for `linear_topk_divergence`; the gradient has
    the dtype of the logits.
    """
    check_matrix("student_logits", student_logits)
    if student_logits.shape[1] == 0:
        raise ValueError("student_logits has no columns: give logits of at least one token")
    options = make_options(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        reduction=reduction,
        vocab=check_vocab(vocab_size, student_logits.shape[1], student_logits.shape[1]),
        return_tokens=return_tokens,
        chunk_bytes=chunk_bytes,
    )
    here = ("student_logits", student_logits)
    return _call(
        here, None, None, teacher_ids, teacher_logprobs, token_weights, labels, None, tail, tail_floor, options
    )


def _call(
    here: tuple[str, Tensor], w: Tensor | None, bias: Tensor | None, ids: Tensor, logprobs: Tensor,
    token_weights: Tensor | None, labels: Tensor | None, rounding: torch.dtype | None, tail: str, tail_floor: float,
    options: Options,
) -> Tensor | tuple[Tensor, TopkStats]:  # fmt: skip
    """The checks that both public functions share, and the operator."""
    x = here[1]
    _check_topk(ids, logprobs, here)
    check_tokens(token_weights, labels, x.shape[0], here)
    check_choice("tail", tail, TAILS)
    if isinstance(tail_floor, bool) or not isinstance(tail_floor, int | float) or not 0 <= tail_floor < 1:
        raise ValueError(f"tail_floor={tail_floor!r} is outside [0, 1): give the least mass of the teacher's tail")
    needs = (v is not None and v.requires_grad and torch.is_grad_enabled() for v in (x, w, bias))
    loss, *rest = _op(
        x, w, bias, ids, logprobs, token_weights, labels, None, *needs, rounding, tail, float(tail_floor),
        *options.flat(),
    )  # fmt: skip
    divergence, student_tail, teacher_tail, label = rest[:4]
    stats = TopkStats(divergence, student_tail, teacher_tail, None if labels is None else label)
    return (loss, stats) if options.return_tokens else loss


def _check_topk(ids: object, logprobs: object, here: tuple[str, Tensor]) -> None:
    """Validate the teacher's two (N, k) tensors; their values are not read."""
    name, x = here
    for field, value in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
        value = check_plain(field, value)
        if value.ndim != 2 or value.shape[0] != x.shape[0] or value.shape[1] == 0:
            raise ValueError(
                f"{field} has shape {tuple(value.shape)}: it must be ({x.shape[0]}, k) with k of at least 1, "
                f"one row for each of {name}"
            )
        if value.device != x.device:
            raise ValueError(f"{field} is on {value.device} but {name} is on {x.device}: move one of them")
    assert isinstance(ids, Tensor)
    assert isinstance(logprobs, Tensor)
    if ids.shape != logprobs.shape:
        raise ValueError(
            f"teacher_logprobs has shape {tuple(logprobs.shape)} but teacher_ids has {tuple(ids.shape)}: "
            "give one log-probability for each id, padded with id -1"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"teacher_ids has dtype {ids.dtype}: convert it with .long()")
    if logprobs.dtype not in FLOATS:
        raise ValueError(f"teacher_logprobs has dtype {logprobs.dtype}: use one of {', '.join(map(str, FLOATS))}")
    check_teacher(teacher_logprobs=logprobs)
