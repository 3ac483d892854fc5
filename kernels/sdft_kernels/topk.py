"""Divergence from a teacher known only by its top-k log-probabilities, as an inference server returns them.

Both distributions become k + 1 events: the k tokens that the teacher named, and all the others together (the tail).
Which form to take, and what goes wrong without the tail: docs/topk.md.

File order: the teacher's side, the rows, the loop over chunks, the operator, the public functions.
N tokens, V vocabulary, H hidden size, k named tokens a row, R rows of a block.
"""

import math
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .call import Grads, autocast_dtype, compute_dtype, dx_dtype, unsharded
from .checks import (
    FLOATS,
    DivergenceName,
    Options,
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
from .chunks import block_rows, blocks, budget_of, clear_untouched, power_of_two_below, put, take
from .operands import Head, bf16_products, has_bf16_products
from .operators import hand_over, register
from .reduce import finish, row_scales
from .rows import activate_, block_divergence_, deactivate_
from .torch_impl import TILE_BYTES

Tail = Literal["bucket", "renormalise"]
TAILS = ("bucket", "renormalise")


class TopkStats(NamedTuple):
    """Per-token outputs, all (N,), detached, fp32 (fp64 for fp64 inputs); zeros where the weight is zero."""

    divergence: Tensor  # D_n, not multiplied by the token's weight
    student_tail: Tensor  # the student's probability outside the named tokens
    teacher_tail: Tensor  # the teacher's, 1 − Σ exp(logprobs), at least 0
    student_logprob: Tensor | None  # of labels[n], over the whole vocabulary; None without labels


class Teacher(NamedTuple):
    """What is known of the teacher, cleaned: entries that do not count, and repeats, are not `named`."""

    ids: Tensor  # (N, k) int64, 0 where not named
    named: Tensor  # (N, k) bool
    logprobs: Tensor  # (N, k), −inf where not named
    mass: Tensor  # (N,) outside the named tokens, as it comes out: rounding may make it negative
    covered: Tensor  # (N,) bool: every token of the vocabulary is named

    def rows(self, keep: Tensor | None, lo: int, hi: int) -> "Teacher":
        return Teacher(*(take(value, keep, lo, hi) for value in self))


def read_teacher(ids: Tensor, logprobs: Tensor, vocab: int, dtype: torch.dtype) -> Teacher:
    """Clean one call's (N, k) ids and log-probabilities, without the host looking at them."""
    ids = ids.long()
    logprobs = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))
    named = (ids >= 0) & (ids < vocab) & (logprobs != -math.inf)
    # Of an id given twice the first entry counts: a stable sort brings repeats together and leaves their order.
    ranked, order = ids.masked_fill(~named, -1).sort(dim=1, stable=True)
    repeat = torch.zeros_like(named)
    repeat[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    named &= ~torch.zeros_like(named).scatter_(1, order, repeat)
    logprobs = logprobs.masked_fill(~named, -math.inf)
    # 1 − Σq as (1 − q_max) − Σ others: where q_max is near 1 this keeps the digits that 1 − Σq would lose.
    most, where = logprobs.max(1, keepdim=True)
    mass = -most.expm1().squeeze(1) - logprobs.exp().scatter_(1, where, 0.0).sum(1)
    covered = named.sum(1) == vocab
    return Teacher(ids.masked_fill(~named, 0), named, logprobs.to(dtype), mass.to(dtype), covered)


def events_of(
    inside: Tensor,  # (R, k) student logits of the named tokens, −inf where not named
    outside: Tensor,  # (R,) log-sum-exp of its other logits
    teacher: Teacher,
    tail: str,
    tail_floor: float,
) -> tuple[Tensor, Tensor]:
    """Two (R, k + 1) blocks of unnormalised log-probabilities, the tail last."""
    if tail == "bucket":
        own = outside
        theirs = teacher.mass.clamp_min(tail_floor).log()
        # Nothing is outside, or the student can say nothing outside and the teacher's mass there is only rounding.
        void = teacher.covered | ((outside == -math.inf) & (teacher.mass <= tail_floor))
        theirs = theirs.masked_fill(void, -math.inf)
    else:  # no tail; a row with nothing named is one certain event on both sides, and its divergence 0
        own = theirs = torch.zeros_like(outside).masked_fill_(teacher.named.any(1), -math.inf)
    return torch.cat([inside, own.unsqueeze(1)], 1), torch.cat([teacher.logprobs, theirs.unsqueeze(1)], 1)


def topk_rows_(
    s: Tensor,  # (R, V) raw student logits; dD/draw over options.grad_factor on return if need_grad, else destroyed
    bias: Tensor | None,  # (V,)
    teacher: Teacher,
    labels: Tensor | None,  # (R,)
    options: Options,
    tail: str,
    tail_floor: float,
    need_grad: bool,
) -> tuple[Tensor | None, ...]:
    """(R,) divergences, the student's tail, and its log-probabilities of the labels if there are any."""
    activate_(s, bias, options.student)
    z = s.clone() if need_grad and options.student.softcap is not None else None
    inside = s.gather(1, teacher.ids).masked_fill_(~teacher.named, -math.inf)  # (R, k)
    label = None if labels is None else s.gather(1, labels.unsqueeze(1)).squeeze(1)
    # Take the named tokens out of s. Adding leaves token 0, where the ids of what is not named point, as it is.
    s.scatter_add_(1, teacher.ids, torch.zeros_like(inside).masked_fill_(teacher.named, -math.inf))
    top = s.amax(1, keepdim=True)
    top.masked_fill_(top == -math.inf, 0.0)
    total = s.sub_(top).exp_().sum(1)  # at least 1, or exactly 0 where nothing is left
    outside = total.log() + top.squeeze(1)
    whole = torch.logsumexp(torch.cat([inside, outside.unsqueeze(1)], 1), 1)
    events, target = events_of(inside, outside, teacher, tail, tail_floor)
    lost = (events == -math.inf).all(1)  # the student forbids all that it is compared on: nothing to normalise
    scratch = torch.empty(2, *events.shape, dtype=s.dtype, device=s.device)
    plain = replace(options, return_tokens=False)
    value = block_divergence_(events, target, scratch, plain, None, need_grad).divergence
    value = value.masked_fill(lost, math.inf)
    if need_grad:
        grad = events.masked_fill_(lost.unsqueeze(1), 0.0)  # (R, k + 1) with respect to the events' logits
        share = (grad[:, -1] / total).masked_fill_(total == 0, 0.0)
        s.mul_(share.unsqueeze(1))  # the tail's, among its tokens in proportion to p
        s.scatter_add_(1, teacher.ids, grad[:, :-1].masked_fill(~teacher.named, 0.0))
        if z is not None:
            deactivate_(s, z, options.student)
    return value, (outside - whole).exp(), None if label is None else label - whole


class _Loop:
    """One call: rows in chunks, gradients made in the forward. `w` None: x holds the logits themselves."""

    def __init__(self, x: Tensor, w: Tensor | None, bias: Tensor | None, options: Options, keep: Tensor | None,
                 autocast: torch.dtype | None):  # fmt: skip
        self.x, self.w, self.bias, self.options, self.keep = x, w, bias, options, keep
        self.dtype = compute_dtype(x, w)
        self.autocast = autocast if self.dtype == torch.float32 and w is not None else None
        self.rows = x.shape[0] if keep is None else keep.numel()
        self.as_bf16 = w is not None and has_bf16_products(x.device)
        self.as_bf16 &= all(self.rounding(t) == torch.bfloat16 for t in (x, w) if t is not None)

    def rounding(self, tensor: Tensor) -> torch.dtype:
        """The dtype that an operand's values are rounded to before the product."""
        return tensor.dtype if self.autocast is None or tensor.dtype == torch.float64 else self.autocast

    def plan(self, k: int) -> tuple[int, int, int]:
        """Rows per chunk, rows per elementwise block, and bytes for an upcast head, from the budget."""
        budget, vocab, w = budget_of(self.options), self.options.vocab, self.w
        block = block_rows(self.options, self.dtype, self.x.device)
        tiles = 0 if w is None or w.dtype == self.rounding(w) == self.dtype else min(TILE_BYTES, budget // 8)
        copies = block * vocab if self.options.student.softcap is not None else 0  # of logits, for its chain rule
        row = vocab + (0 if w is None else 2 * self.x.shape[1]) + 8 * (k + 1)
        left = budget - tiles - copies * self.dtype.itemsize
        chunk = min(max(1, self.rows), power_of_two_below(left // (row * self.dtype.itemsize)))
        return chunk, min(chunk, block), tiles

    def run(
        self, teacher: Teacher, labels: Tensor | None, tail: str, tail_floor: float, grads: Grads,
        row_weights: Tensor | None, uniform: float,
    ) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
        """Per-row values (divergence, student's tail, label's log-probability), and dX, dW, db."""
        x, w, opt, keep, device = self.x, self.w, self.options, self.keep, self.x.device
        values = [torch.zeros(x.shape[0], dtype=self.dtype, device=device) for _ in range(3)]
        dx = torch.empty(x.shape, dtype=dx_dtype(x, self.dtype), device=device) if grads.x else None
        dw = torch.zeros(w.shape, dtype=self.dtype, device=device) if grads.w and w is not None else None
        db = torch.zeros_like(self.bias, dtype=self.dtype) if grads.bias and self.bias is not None else None
        clear_untouched(dx, x.shape[0], opt.vocab if w is None else x.shape[1], keep)
        chunk, block, tile_bytes = self.plan(teacher.ids.shape[1])
        head = None if w is None else Head(w, opt.vocab, self.rounding(w), self.dtype, tile_bytes)
        bias = None if self.bias is None else self.bias[: opt.vocab].to(self.dtype)
        slab = torch.empty(chunk if self.rows else 0, opt.vocab, dtype=self.dtype, device=device)
        for lo, hi in blocks(self.rows, chunk):
            s, h = slab[: hi - lo], take(x, keep, lo, hi)
            if head is None:
                s.copy_(h[:, : opt.vocab])
            else:
                h = h.to(self.rounding(x)).to(self.dtype)
                head.logits(h, s)
            for b_lo, b_hi in blocks(hi - lo, block):
                here = (keep, lo + b_lo, lo + b_hi)
                label = None if labels is None else take(labels, *here)
                part = s[b_lo:b_hi]
                made = topk_rows_(part, bias, teacher.rows(*here), label, opt, tail, tail_floor, bool(grads))
                for out, value in zip(values, made, strict=True):
                    if value is not None:
                        put(out, *here, value)
                if grads:
                    part.mul_(uniform * opt.grad_factor)
                if grads and row_weights is not None:
                    part.mul_(take(row_weights, *here).unsqueeze(1))
            if dw is not None:
                dw[: opt.vocab].addmm_(s.t(), h)
            if db is not None:
                db[: opt.vocab] += s.sum(0)
            if dx is not None and head is None:
                put(dx[:, : opt.vocab], keep, lo, hi, s)
            elif dx is not None and head is not None:
                dh = torch.empty_like(h)
                head.input_grad(s, dh)
                put(dx, keep, lo, hi, dh)
        return values, [dx, dw, db]


SCHEMA = (
    "(Tensor x, Tensor? w, Tensor? bias, Tensor ids, Tensor logprobs, Tensor? token_weights, Tensor? labels, "
    "Tensor? upstream, bool need_x, bool need_w, bool need_bias, ScalarType? autocast, str tail, float tail_floor, "
    f"{Options.SCHEMA}) -> ({', '.join(['Tensor'] * 8)})"
)
TENSORS = 8  # leading arguments of the operator that are tensors; then three needs, autocast, tail, tail_floor, options


def _forward(
    x: Tensor,  # (N, H), or (N, V) logits where w is None
    w: Tensor | None,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, k)
    logprobs: Tensor,  # (N, k)
    token_weights: Tensor | None,  # (N,)
    labels: Tensor | None,  # (N,)
    upstream: Tensor | None,  # dLoss: None in the forward; () or (N,) where a backward runs the loop again
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    autocast: torch.dtype | None,
    tail: str,
    tail_floor: float,
    *plain: Any,
) -> tuple[Tensor, ...]:
    """The loss, four per-token outputs, and dX, dW, db; what was not asked for has no elements."""
    options = Options.from_flat(*plain)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        keep, weights, uniform = row_scales(token_weights, upstream, options, x.shape[0])
        known = upstream is not None or options.reduction != "none"
        grads = Grads(need_x, need_w, need_bias) if known else Grads()
        loop = _Loop(x, w, bias, options, keep, autocast)
        teacher = read_teacher(ids, logprobs, options.vocab, loop.dtype)
        wanted = labels if options.return_tokens else None
        with bf16_products(loop.as_bf16):
            values, made = loop.run(teacher, wanted, tail, tail_floor, grads, weights, uniform)
        stats = [x.new_empty(0) for _ in range(4)]  # each its own: an operator's outputs may not alias
        if options.return_tokens:
            mass = teacher.mass.clamp(0.0, 1.0)
            mass = mass if token_weights is None else mass.masked_fill(token_weights == 0, 0.0)
            stats = [values[0], values[1], mass, x.new_empty(0) if labels is None else values[2]]
        loss = finish(values[0], token_weights, options.reduction)
        return (loss, *stats, *(x.new_empty(0) if g is None else g for g in made))


def _fake(
    x: Tensor, w: Tensor | None, bias: Tensor | None, ids: Tensor, logprobs: Tensor, token_weights: Tensor | None,
    labels: Tensor | None, upstream: Tensor | None, need_x: bool, need_w: bool, need_bias: bool,
    autocast: torch.dtype | None, tail: str, tail_floor: float, *plain: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    options, dtype = Options.from_flat(*plain), compute_dtype(x, w)
    known = upstream is not None or options.reduction != "none"

    def row(wanted: bool) -> Tensor:
        return x.new_empty(x.shape[0], dtype=dtype) if wanted else x.new_empty(0)

    def grad(like: Tensor | None, wanted: bool, kind: torch.dtype) -> Tensor:
        return x.new_empty(0) if like is None or not (wanted and known) else x.new_empty(like.shape, dtype=kind)

    tokens = options.return_tokens
    return (
        x.new_empty((x.shape[0],) if options.reduction == "none" else (), dtype=dtype),
        *(row(tokens) for _ in range(3)),
        row(tokens and labels is not None),
        grad(x, need_x, dx_dtype(x, dtype)),
        grad(w, need_w, dtype),
        grad(bias, need_bias, dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.plain = inputs[TENSORS:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[: TENSORS - 1], *output[5:])  # all but upstream
    ctx.spent = False


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (TENSORS + len(ctx.plain))
    if grad is None:  # an undefined gradient: nothing depends on the loss
        return nothing
    saved = ctx.saved_tensors
    tensors, made = saved[: TENSORS - 1], saved[TENSORS - 1 :]
    rerun = Options.from_flat(*ctx.plain[6:]).reduction == "none"
    grads = hand_over(ctx, grad, tensors, made, ctx.plain[:3], lambda: _op(*tensors, grad, *ctx.plain)[5:], rerun=rerun)
    return *grads, *nothing[3:]


_op = register("sdft::topk_divergence", SCHEMA, _forward, _fake, _backward, _setup, "the top-k divergence")


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
) -> Any:
    """Divergence between the student and a teacher known by its k most likely tokens a row.

    The student's logits are those of `linear_divergence`, fp32 (fp64 if x or w is), a chunk of rows at a time. With
    tail="bucket" the value is at most the full divergence, grows with k, and equals it where all tokens are named.
    Runs on any device through torch; the host waits only for token_weights.

    Args:
        x: (N, H) student hidden states, fp32, bf16, fp16 or fp64. Flatten batch and time first.
        w: (V, H) student head; it and the bias may be DTensors, as in `linear_divergence`.
        teacher_ids: (N, k) int64 or int32. Entries outside 0..vocab_size−1 (−1 by convention), and those whose
            log-probability is −inf, are not there: their mass is the tail's. Of an id given twice in a row the
            first entry counts. Values are never refused, because looking at them would make the host wait.
        teacher_logprobs: (N, k) floating: logs of probabilities over the *whole* vocabulary, as servers return
            them, in any order, and at the `temperature` of this call (docs/topk.md).
        divergence, beta: as in `linear_divergence`, over the k + 1 (or k) events.
        tail: "bucket": everything not named is one event; its gradient spreads over its tokens in proportion
            to the student's p. "renormalise": both sides restricted to the named tokens; the other logits get no
            gradient, and mass that the student holds there is not seen.
        tail_floor: in [0, 1), for "bucket": the least mass that the teacher's tail is taken to have. Rounding of
            log-probabilities leaves about 1e-7 of it unknown, and 0 would make reverse KL infinite.
        bias: (V,), floating. −inf forbids a token. A student that forbids a token that the teacher gives mass has
            infinite forward KL; under "renormalise" one that forbids all named tokens has any of them infinite.
            Such a row keeps the value; its gradient is 0.
        temperature, softcap, scale: of the student's logits, as in `linear_divergence`.
        token_weights, labels, reduction, vocab_size, chunk_bytes: as in `linear_divergence`.
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
    autocast = autocast_dtype(x.device, compute_dtype(x, w))
    return _call(
        ("x", x), w, bias, teacher_ids, teacher_logprobs, token_weights, labels, autocast, tail, tail_floor, options
    )


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
) -> Any:
    """`linear_topk_divergence` for those who already hold the student's logits.

    Args:
        student_logits: (N, V) fp32, bf16, fp16 or fp64, left as they are; any softcap or scale is already in them.

    The other arguments, the return value and the errors are those of `linear_topk_divergence`; the gradient has
    the logits' own dtype.
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
    token_weights: Tensor | None, labels: Tensor | None, autocast: torch.dtype | None, tail: str, tail_floor: float,
    options: Options,
) -> Any:  # fmt: skip
    """The checks that both public functions share, and the operator."""
    x = here[1]
    _check_topk(ids, logprobs, here)
    check_tokens(token_weights, labels, x.shape[0], here)
    check_choice("tail", tail, TAILS)
    if isinstance(tail_floor, bool) or not isinstance(tail_floor, int | float) or not 0 <= tail_floor < 1:
        raise ValueError(f"tail_floor={tail_floor!r} is outside [0, 1): give the least mass of the teacher's tail")
    needs = (v is not None and v.requires_grad and torch.is_grad_enabled() for v in (x, w, bias))
    loss, *rest = _op(
        x, w, bias, ids, logprobs, token_weights, labels, None, *needs, autocast, tail, float(tail_floor),
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
