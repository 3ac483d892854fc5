"""`linear_divergence`: hidden states and heads to loss, the (N, V) logits never whole.

File order: the autograd.Function, the public function, the Module.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .call import Grads, Inputs, Result
from .checks import (
    DivergenceName,
    Impl,
    Options,
    Reduction,
    Same,
    TokenStats,
    check_impl,
    check_matrix,
    check_teacher,
    check_tokens,
    check_vector,
    check_vocab,
    make_options,
)
from .chunks import live_rows
from .reduce import finish, scale_rows, token_tuple
from .torch_impl import run_linear


class _LinearDivergence(torch.autograd.Function):
    """Gradients are made in the forward; the first backward scales and hands over the buffers.

    reduction="none" and a second backward (retain_graph=True) run the loop again, because the upstream
    gradients of single rows are only known then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, H_s)
        w: Tensor,  # (V_s, H_s)
        bias: Tensor | None,  # (V_s,)
        teacher_x: Tensor,  # (N, H_t)
        teacher_w: Tensor,  # (V_t, H_t)
        teacher_bias: Tensor | None,  # (V_t,)
        token_weights: Tensor | None,  # (N,)
        labels: Tensor | None,  # (N,)
        options: Options,
        autocast: torch.dtype | None,
    ) -> tuple[Tensor | None, ...]:
        inputs = Inputs(x, w, bias, teacher_x, teacher_w, teacher_bias, labels)
        needs = ctx.needs_input_grad
        ctx.grads = Grads(needs[0], needs[1], needs[2] and bias is not None)
        ctx.options, ctx.autocast = options, autocast
        ctx.keep = live_rows(token_weights)
        ctx.save_for_backward(x, w, bias, teacher_x, teacher_w, teacher_bias, token_weights)
        now = ctx.grads if options.reduction != "none" else Grads()
        weights, uniform = scale_rows(token_weights, options.reduction, x.shape[0])
        result = run_linear(inputs, options, now, weights, uniform, ctx.keep, autocast)
        ctx.made = result if now else None
        tokens = token_tuple(result.tokens)
        ctx.mark_non_differentiable(*(t for t in tokens if t is not None))
        return finish(result.divergence, token_weights, options.reduction), *tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_divergence has no double backward: call backward without create_graph=True")
        made, ctx.made = ctx.made, None
        x, w, bias = ctx.saved_tensors[:3]
        if made is not None:
            grads = [g if g is None else g.mul_(grad) for g in (made.dx, made.dw, made.dbias)]
        else:
            again = _recompute(ctx, grad)
            grads = [again.dx, again.dw, again.dbias]
        dtypes = (x.dtype, w.dtype, None if bias is None else bias.dtype)
        dx, dw, dbias = (g if g is None else g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True))
        return dx, dw, dbias, *[None] * 7


def _recompute(ctx: Any, grad: Tensor) -> Result:
    """The loop with the upstream gradient in the row weights: grad is () or, for "none", (N,)."""
    *tensors, token_weights = ctx.saved_tensors
    x, w, bias, teacher_x, teacher_w, teacher_bias = tensors
    inputs = Inputs(x, w, bias, teacher_x, teacher_w, teacher_bias, labels=None)
    weights, uniform = scale_rows(token_weights, ctx.options.reduction, tensors[0].shape[0])
    rows = grad.expand(tensors[0].shape[0]) * (uniform if weights is None else weights)
    return run_linear(inputs, ctx.options.without_tokens(), ctx.grads, rows, 1.0, ctx.keep, ctx.autocast)


def linear_divergence(
    x: Tensor,  # (N, H_s)
    w: Tensor,  # (V_s, H_s)
    teacher_x: Tensor,  # (N, H_t)
    teacher_w: Tensor,  # (V_t, H_t)
    *,
    divergence: DivergenceName = "reverse_kl",
    beta: float = 0.5,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | Same | None = "same",
    scale: float = 1.0,
    teacher_scale: float | Same = "same",
    token_weights: Tensor | None = None,
    labels: Tensor | None = None,
    reduction: Reduction = "mean",
    vocab_size: int | None = None,
    return_tokens: bool = False,
    chunk_bytes: int | None = None,
    impl: Impl | None = None,
) -> Any:
    """Divergence between the student's and the teacher's next-token distributions, from hidden states.

    Logits are z = softcap·tanh(scale·(h Wᵀ + b) / softcap) / temperature on each side, in fp32 (fp64 if an
    input is fp64), chunk by chunk. Math and names: design section 2.

    Args:
        x: (N, H_s) student hidden states, fp32, bf16, fp16 or fp64. Flatten batch and time first.
        w: (V_s, H_s) student head.
        teacher_x: (N, H_t) teacher hidden states; row n predicts the same token as row n of x.
        teacher_w: (V_t, H_t) teacher head. It may be w.detach().
        divergence: "reverse_kl" KL(p‖q), "forward_kl" KL(q‖p), or "jsd": β·KL(q‖m) + (1−β)·KL(p‖m) with
            m = βq + (1−β)p; p is the student. No τ² factor.
        beta: for "jsd", in [0, 1]. 0 is forward KL and 1 is reverse KL, exactly.
        bias, teacher_bias: (V_s,) and (V_t,). −inf forbids a token. A teacher that forbids what the student
            allows gives +inf reverse KL (the other way round for forward KL); that row's gradient is 0.
        temperature: divides both sides' logits, above 0.
        softcap, teacher_softcap: tanh cap of the logits, None for none; "same" is the student's.
        scale, teacher_scale: factor of the raw logits, above 0; "same" is the student's.
        token_weights: (N,) floating, None for ones. Rows of weight zero are gathered away before any GEMM,
            and finding them makes the host wait for this tensor (nothing else in here does).
        labels: (N,) int64, the sampled tokens, read for return_tokens only. Values are not checked
            beforehand: the gather refuses one outside the vocabulary.
        reduction: "mean" Σ w_n D_n / Σ w_n (0 if no row has weight), "sum" Σ w_n D_n, or "none", the (N,)
            values w_n D_n. "none" runs the loop a second time in the backward.
        vocab_size: compare the first vocab_size rows of both heads; None is min(V_s, V_t).
        return_tokens: also return TokenStats.
        chunk_bytes: workspace for logits, upcast weights and scratch; the tokens per chunk are the largest
            power of two that fits (at least one). None is 256 MiB.
        impl: "torch", or None to choose; "triton" is not there yet.

    Returns:
        The loss, () or (N,) for "none", fp32 (fp64 if an input is fp64); with return_tokens also TokenStats.
        Gradients flow to those of x, w and bias that require them, accumulated over chunks in fp32 and
        returned in the tensor's own dtype.

    Raises:
        ValueError: an argument is out of its range or does not fit the others; the message names it.
        NotImplementedError: impl="triton".
    """
    check_impl(impl)
    _check_tensors(x, w, teacher_x, teacher_w, bias, teacher_bias)
    check_tokens(token_weights, labels, x.shape[0], ("x", x))
    options = make_options(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        reduction=reduction,
        vocab=check_vocab(vocab_size, w.shape[0], teacher_w.shape[0]),
        return_tokens=return_tokens,
        chunk_bytes=chunk_bytes,
        softcap=softcap,
        teacher_softcap=teacher_softcap,
        scale=scale,
        teacher_scale=teacher_scale,
    )
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    loss, *tokens = _LinearDivergence.apply(
        x, w, bias, teacher_x, teacher_w, teacher_bias, token_weights, labels, options, autocast
    )
    return (loss, TokenStats(*tokens)) if return_tokens else loss


def _check_tensors(
    x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor, bias: Tensor | None, teacher_bias: Tensor | None
) -> None:
    check_matrix("x", x)
    here = ("x", x)
    for field, value in (("w", w), ("teacher_x", teacher_x), ("teacher_w", teacher_w)):
        check_matrix(field, value, here)
    for head, hidden, h, s in (("w", "x", w, x), ("teacher_w", "teacher_x", teacher_w, teacher_x)):
        if h.shape[1] != s.shape[1]:
            raise ValueError(
                f"{head} has hidden size {h.shape[1]} but {hidden} has {s.shape[1]}: {head} must be (V, {s.shape[1]})"
            )
        if h.shape[0] == 0:
            raise ValueError(f"{head} has no rows: give a head of at least one token")
    if teacher_x.shape[0] != x.shape[0]:
        raise ValueError(
            f"teacher_x has {teacher_x.shape[0]} rows but x has {x.shape[0]}: row n of both must predict the same token"
        )
    check_vector("bias", bias, w.shape[0], here)
    check_vector("teacher_bias", teacher_bias, teacher_w.shape[0], here)
    check_teacher(teacher_x=teacher_x, teacher_w=teacher_w, teacher_bias=teacher_bias)


class LinearDivergence(nn.Module):
    """`linear_divergence` with its static options fixed: LinearDivergence(**options)(x, w, teacher_x, teacher_w).

    Options are those of the function that are not tensors; tensors (bias, token_weights, labels) go to the call.
    """

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(self, x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor, **tensors: Any) -> Any:
        return linear_divergence(x, w, teacher_x, teacher_w, **self.options, **tensors)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
