"""`divergence`: the same loss for callers who already hold the logits of both sides.

File order: the operator (opaque to torch.compile) with its autograd, its in-place twin, the public function,
the Module.
"""

from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor, nn

from .arguments import LogitsOptions
from .call import compute_dtype
from .checks import (
    DivergenceName,
    Impl,
    Options,
    Reduction,
    TokenStats,
    check_flag,
    check_matrix,
    check_teacher,
    check_tokens,
    check_vocab,
    check_writable,
    choose_impl,
    make_options,
)
from .chunks import Outputs
from .loop import run_logits
from .operators import (
    at_boundary,
    backward_of,
    fake_tokens,
    first_order,
    register,
    scale_grad,
    token_stats,
    token_tuple,
)
from .reduce import finish, row_scales
from .torch_rows import DivergenceRows

SCHEMA = (
    "(Tensor student, Tensor teacher, Tensor? token_weights, Tensor? labels, Tensor? upstream, bool need, "
    f"{Options.SCHEMA}) -> ({', '.join(['Tensor'] * 8)})"
)


def _loss(
    student: Tensor,  # (N, V_s)
    teacher: Tensor,  # (N, V_t)
    token_weights: Tensor | None,  # (N,)
    labels: Tensor | None,  # (N,)
    upstream: Tensor | None,  # () or (N,)
    options: Options,
    into: Tensor | None,  # (N, V_s) for the gradient
) -> tuple[Tensor, ...]:
    """The loss and six per-token outputs, the gradient in `into`."""
    scales = row_scales(token_weights, upstream, options, student.shape[0], compute_dtype(student, teacher))
    labels = labels if options.return_tokens else None
    dtype, tokens = compute_dtype(student, teacher), options.return_tokens
    outputs = Outputs(student.shape[0], dtype, student.device, tokens, labels is not None)
    if options.impl == "triton":
        from .triton_logits import run_logits as run_triton

        run_triton(student, teacher, labels, options, into, outputs, scales)
    else:
        need = into is not None
        rows = DivergenceRows(options, (None, None), labels, outputs, scales, need)
        run_logits((student, teacher), options, rows, into, scales, dtype)
    loss = finish(outputs.divergence, scales, options.reduction)
    return loss, *token_tuple(outputs.tokens(), student)


def _forward(
    student: Tensor,
    teacher: Tensor,
    token_weights: Tensor | None,
    labels: Tensor | None,
    upstream: Tensor | None,
    need: bool,
    *plain: Any,
) -> tuple[Tensor, ...]:
    """The loss, six per-token outputs and the gradient; what was not asked for has no elements."""
    options = Options.from_flat(*plain)
    made = need and (options.reduction != "none" or upstream is not None)
    into = torch.empty_like(student, memory_format=torch.contiguous_format) if made else None
    outputs = _loss(student, teacher, token_weights, labels, upstream, options, into)
    return (*outputs, student.new_empty(0) if into is None else into)


def _fake(
    student: Tensor, teacher: Tensor, token_weights: Tensor | None, labels: Tensor | None, upstream: Tensor | None,
    need: bool, *plain: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    options, dtype = Options.from_flat(*plain), compute_dtype(student, teacher)
    loss = student.new_empty((student.shape[0],) if options.reduction == "none" else (), dtype=dtype)
    made = need and (options.reduction != "none" or upstream is not None)
    grad = torch.empty_like(student, memory_format=torch.contiguous_format) if made else student.new_empty(0)
    return loss, *fake_tokens(student, dtype, options.return_tokens, labels is not None), grad


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.plain = inputs[5:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], output[7])
    ctx.spent = False


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """As in linear_divergence: scale the gradient of the forward, once; run again for "none" and a second backward."""
    nothing = (None,) * (5 + len(ctx.plain))
    if grad is None:  # an undefined gradient: nothing depends on the loss
        return nothing
    *tensors, made = ctx.saved_tensors
    options = Options.from_flat(*ctx.plain[1:])
    if options.reduction == "none" or ctx.spent:
        made = _op(*tensors, grad, *ctx.plain)[7]
    else:
        ctx.spent = True
        made = scale_grad(made, grad, options.impl)
    return made, *nothing[1:]


_op = register("sdft::divergence", SCHEMA, _forward, _fake, _backward, _setup)


class _InPlace(torch.autograd.Function):
    """The same with the gradient in the memory of the logits: eager only, one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (N, V_s), overwritten
        teacher: Tensor,  # (N, V_t)
        token_weights: Tensor | None,  # (N,)
        labels: Tensor | None,  # (N,)
        options: Options,
    ) -> tuple[Tensor, ...]:
        check_writable("student_logits", student, "teacher_logits", teacher)
        into = student.detach() if ctx.needs_input_grad[0] else None
        ctx.made, ctx.impl = into, options.impl
        outputs: tuple[Tensor, ...] = at_boundary(_loss)(
            student.detach(), teacher, token_weights, labels, None, options, into
        )
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        made: tuple[Tensor | None, ...] = _in_place_backward(ctx, grad)
        return made


def _hand_over_in_place(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    made, ctx.made = ctx.made, None
    if made is None:
        raise RuntimeError("inplace=True overwrote the logits, so backward runs once: use inplace=False")
    return scale_grad(made, grad, ctx.impl), None, None, None, None


_in_place_backward = backward_of("divergence", _hand_over_in_place)
_in_place = first_order("divergence", _InPlace.apply)


@overload
def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    return_tokens: Literal[False] = False,
    **options: Unpack[LogitsOptions],
) -> Tensor: ...
@overload
def divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, return_tokens: Literal[True], **options: Unpack[LogitsOptions]
) -> tuple[Tensor, TokenStats]: ...
@overload
def divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, return_tokens: bool, **options: Unpack[LogitsOptions]
) -> Tensor | tuple[Tensor, TokenStats]: ...
def divergence(
    student_logits: Tensor,  # (N, V_s)
    teacher_logits: Tensor,  # (N, V_t)
    *,
    divergence: DivergenceName = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    labels: Tensor | None = None,
    reduction: Reduction = "mean",
    vocab_size: int | None = None,
    return_tokens: bool = False,
    inplace: bool = False,
    chunk_bytes: int | None = None,
    compact: bool = True,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Divergence between the distributions of ready logits: `linear_divergence` without the heads.

    Args:
        student_logits: (N, V_s) fp32, bf16, fp16 or fp64; any softcap or scale is already in them.
        teacher_logits: (N, V_t), not changed. −inf forbids a token.
        inplace: True lets the forward overwrite student_logits with its gradient, which saves one (N, V)
            tensor. Nothing else may read the logits afterwards; autograd refuses the backward of an
            operation that saved them. Logits that share memory with each other (expanded ones) or with the
            teacher's are refused. Not with reduction="none", which needs the logits again, nor under torch.compile.
        chunk_bytes: fp32 workspace of impl="torch"; the default is as in `linear_divergence`. Triton works on the
            logits themselves.

    The other arguments, the return value and the errors are as for `linear_divergence`. The gradient has the dtype of
    the logits. Logits that are rounded to bf16 before this call have already lost exactness (docs/kernels.md, "Why fp32
    logits").
    """
    check_matrix("student_logits", student_logits)
    here = ("student_logits", student_logits)
    check_matrix("teacher_logits", teacher_logits, here)
    rows = student_logits.shape[0]
    if teacher_logits.shape[0] != rows:
        raise ValueError(
            f"teacher_logits has {teacher_logits.shape[0]} rows but student_logits has {rows}: "
            "row n of both must predict the same token"
        )
    for field, value in (here, ("teacher_logits", teacher_logits)):
        if value.shape[1] == 0:
            raise ValueError(f"{field} has no columns: give logits of at least one token")
    check_teacher(teacher_logits=teacher_logits)
    check_tokens(token_weights, labels, rows, here)
    check_flag("inplace", inplace)
    if inplace and reduction == "none":
        raise ValueError(
            "inplace=True cannot serve reduction='none', whose backward reads the logits: use inplace=False"
        )
    if inplace and torch.compiler.is_compiling():
        raise ValueError("inplace=True does not work under torch.compile: use inplace=False there")
    options = make_options(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        reduction=reduction,
        vocab=check_vocab(vocab_size, student_logits.shape[1], teacher_logits.shape[1]),
        return_tokens=return_tokens,
        chunk_bytes=chunk_bytes,
        compact=compact,
        impl=choose_impl(impl, compute_dtype(student_logits, teacher_logits), student_logits.device),
    )
    tensors = (student_logits, teacher_logits, token_weights, labels)
    loss: Tensor
    if inplace:
        loss, *rest = _in_place(*tensors, options)
    else:
        need = student_logits.requires_grad and torch.is_grad_enabled()
        loss, *rest = _op(*tensors, None, need, *options.flat())
    return (loss, token_stats(rest[:6], labels is not None)) if return_tokens else loss


class Divergence(nn.Module):
    """`divergence` with its static options fixed: Divergence(**options)(student_logits, teacher_logits)."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, **tensors: Any
    ) -> Tensor | tuple[Tensor, TokenStats]:
        loss: Tensor | tuple[Tensor, TokenStats]
        loss = divergence(student_logits, teacher_logits, **self.options, **tensors)
        return loss

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
