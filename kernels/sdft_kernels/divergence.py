"""`divergence`: the same loss for those who already hold the logits of both sides.

File order: the autograd.Function, the public function, the Module.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .checks import (
    DivergenceName,
    Impl,
    Options,
    Reduction,
    TokenStats,
    check_impl,
    check_matrix,
    check_teacher,
    check_tokens,
    check_vocab,
    make_options,
)
from .chunks import live_rows
from .reduce import finish, scale_rows, token_tuple
from .torch_logits import run_logits


class _Divergence(torch.autograd.Function):
    """The gradient is made in the forward; see _LinearDivergence, which this mirrors."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (N, V_s)
        teacher: Tensor,  # (N, V_t)
        token_weights: Tensor | None,  # (N,)
        labels: Tensor | None,  # (N,)
        options: Options,
        inplace: bool,
    ) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[0]
        ctx.options, ctx.inplace = options, inplace
        ctx.keep = live_rows(token_weights)
        weights, uniform = scale_rows(token_weights, options.reduction, student.shape[0])
        into = None
        if need and options.reduction != "none":
            into = student.detach() if inplace else torch.empty_like(student)
        values, tokens = run_logits(student.detach(), teacher, labels, options, into, weights, uniform, ctx.keep)
        ctx.made = into
        if not inplace:
            ctx.save_for_backward(student, teacher, token_weights)
        outputs = token_tuple(tokens)
        ctx.mark_non_differentiable(*(t for t in outputs if t is not None))
        return finish(values, token_weights, options.reduction), *outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("divergence has no double backward: call backward without create_graph=True")
        made, ctx.made = ctx.made, None
        if made is not None:
            return made.mul_(grad), *[None] * 5
        if ctx.inplace:
            raise RuntimeError("inplace=True overwrote the logits, so backward runs once: use inplace=False")
        return _recompute(ctx, grad), *[None] * 5


def _recompute(ctx: Any, grad: Tensor) -> Tensor:
    """The gradient with the upstream gradient in the row weights: grad is () or, for "none", (N,)."""
    student, teacher, token_weights = ctx.saved_tensors
    weights, uniform = scale_rows(token_weights, ctx.options.reduction, student.shape[0])
    rows = grad.expand(student.shape[0]) * (uniform if weights is None else weights)
    into = torch.empty_like(student)
    run_logits(student, teacher, None, ctx.options.without_tokens(), into, rows, 1.0, ctx.keep)
    return into


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
    impl: Impl | None = None,
) -> Any:
    """Divergence between the distributions of ready logits: `linear_divergence` without the heads.

    Args:
        student_logits: (N, V_s) fp32, bf16, fp16 or fp64; any softcap or scale is already in them.
        teacher_logits: (N, V_t), left as they are. −inf where a token is forbidden.
        inplace: True lets the forward overwrite student_logits with its gradient, which saves one (N, V)
            tensor. Nothing else may read the logits afterwards; autograd refuses the backward of an
            operation that saved them. Not with reduction="none", which needs them again.
        chunk_bytes: fp32 workspace; None is 256 MiB.

    The other arguments, the return value and the errors are those of `linear_divergence`. The gradient has
    the logits' own dtype: rounding logits to bf16 before this call already costs exactness (design section 3).
    """
    check_impl(impl)
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
    if inplace and reduction == "none":
        raise ValueError(
            "inplace=True cannot serve reduction='none', whose backward reads the logits: use inplace=False"
        )
    options = make_options(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        reduction=reduction,
        vocab=check_vocab(vocab_size, student_logits.shape[1], teacher_logits.shape[1]),
        return_tokens=return_tokens,
        chunk_bytes=chunk_bytes,
    )
    loss, *tokens = _Divergence.apply(student_logits, teacher_logits, token_weights, labels, options, inplace)
    return (loss, TokenStats(*tokens)) if return_tokens else loss


class Divergence(nn.Module):
    """`divergence` with its static options fixed: Divergence(**options)(student_logits, teacher_logits)."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, **tensors: Any) -> Any:
        return divergence(student_logits, teacher_logits, **self.options, **tensors)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
