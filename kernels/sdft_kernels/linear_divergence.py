"""`linear_divergence`: hidden states and heads to loss, without a whole (N, V) tensor of logits.

File order: the operator (opaque to torch.compile) with its autograd, the public function, the Module.
"""

from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor, nn

from .arguments import LinearOptions
from .call import Grads, Inputs, Rows, Scales, compute_dtype, product_rounding, unsharded
from .checks import (
    LINEAR_IMPLS,
    DivergenceName,
    LinearImpl,
    Options,
    Products,
    Reduction,
    Same,
    TokenStats,
    check_bias,
    check_head,
    check_matrix,
    check_teacher,
    check_tokens,
    check_vocab,
    choose_impl,
    make_options,
)
from .chunks import Outputs
from .loop import run_linear
from .operands import operand_dtype
from .operators import linear_operator, token_kinds, token_stats, token_tuple
from .projection import Projection, product_dtype
from .reduce import finish, row_scales
from .torch_rows import DivergenceRows


def _rows(
    inputs: Inputs, labels: Tensor | None, options: Options, outputs: Outputs, scales: Scales, grads: Grads,
    rounding: torch.dtype | None,
) -> tuple[Rows, type[Projection]]:  # fmt: skip
    """The work on rows and the source of logits, by the implementation in options. Imports Triton only if it runs."""
    bias = (inputs.bias, inputs.teacher_bias)
    if options.impl == "torch":
        return DivergenceRows(options, bias, labels, outputs, scales, bool(grads)), Projection
    if options.impl == "triton_dual":
        from .dual import DualProjection, DualRows

        return DualRows(inputs, options, labels, outputs, scales.keep, grads), DualProjection
    from .triton_rows import TritonRows

    dtype = operand_dtype(product_dtype(inputs.x, inputs.w, rounding), inputs.dtype, inputs.x.device)
    return TritonRows(options, bias, labels, outputs, scales.keep, dtype if grads else None), Projection


def _forward(
    x: Tensor,  # (N, H_s)
    w: Tensor,  # (V_s, H_s)
    bias: Tensor | None,  # (V_s,)
    teacher_x: Tensor,  # (N, H_t)
    teacher_w: Tensor,  # (V_t, H_t)
    teacher_bias: Tensor | None,  # (V_t,)
    token_weights: Tensor | None,  # (N,)
    labels: Tensor | None,  # (N,)
    upstream: Tensor | None,  # dLoss: None in the forward; () or (N,) if a backward runs the loop again
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    rounding: torch.dtype | None,
    *plain: Any,
) -> tuple[Tensor, ...]:
    """The loss, six per-token outputs, and dX, dW, db; what was not asked for has no elements.

    For reduction="none" the gradients come only with `upstream`, which holds the upstream gradient of each row.
    """
    options = Options.from_flat(*plain)
    labels = labels if options.return_tokens else None
    inputs = Inputs(x, w, bias, teacher_x, teacher_w, teacher_bias)
    scales = row_scales(token_weights, upstream, options, x.shape[0], inputs.dtype)
    known = upstream is not None or options.reduction != "none"
    grads = Grads(need_x, need_w, need_bias) if known else Grads()
    outputs = Outputs(x.shape[0], inputs.dtype, x.device, options.return_tokens, labels is not None)
    rows, project = _rows(inputs, labels, options, outputs, scales, grads, rounding)
    made = run_linear(inputs, options, rows, grads, scales, rounding, project)
    loss = finish(outputs.divergence, scales, options.reduction)
    return loss, *token_tuple(outputs.tokens(), x), *made.flat(x)


def _describe(
    options: Options, x: Tensor, w: Tensor, bias: Tensor | None, teacher_x: Tensor, teacher_w: Tensor,
    teacher_bias: Tensor | None, token_weights: Tensor | None, labels: Tensor | None,
) -> tuple[torch.dtype, list[torch.dtype | None]]:  # fmt: skip
    dtype = compute_dtype(x, w, teacher_x, teacher_w)
    return dtype, token_kinds(dtype, options.return_tokens, labels is not None)


_op = linear_operator(
    "sdft::linear_divergence", _forward, _describe, stats=6,
    tensors="Tensor teacher_x, Tensor teacher_w, Tensor? teacher_bias, Tensor? token_weights, Tensor? labels",
)  # fmt: skip


@overload
def linear_divergence(
    x: Tensor,
    w: Tensor,
    teacher_x: Tensor,
    teacher_w: Tensor,
    *,
    return_tokens: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...
@overload
def linear_divergence(
    x: Tensor,
    w: Tensor,
    teacher_x: Tensor,
    teacher_w: Tensor,
    *,
    return_tokens: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, TokenStats]: ...
@overload
def linear_divergence(
    x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor, *, return_tokens: bool, **options: Unpack[LinearOptions]
) -> Tensor | tuple[Tensor, TokenStats]: ...
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
    compact: bool = True,
    products: Products | None = None,
    impl: LinearImpl | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Divergence between the student's and the teacher's next-token distributions, from hidden states.

    Logits are z = softcap·tanh(scale·(h Wᵀ + b) / softcap) / temperature on each side, in fp32 (fp64 if an
    input is fp64), chunk by chunk. docs/kernels.md explains the loop, reference.py has the formulas.

    Args:
        x: (N, H_s) student hidden states, fp32, bf16, fp16 or fp64. Flatten batch and time first.
        w: (V_s, H_s) student head. This, teacher_w and the biases may be DTensors (FSDP2): they are gathered
            here, and the gradient goes back averaged over the ranks and sharded.
        teacher_x: (N, H_t) teacher hidden states; row n predicts the same token as row n of x.
        teacher_w: (V_t, H_t) teacher head. It may be w.detach().
        divergence: "reverse_kl" KL(p‖q), "forward_kl" KL(q‖p), or "jsd": β·KL(q‖m) + (1−β)·KL(p‖m) with
            m = βq + (1−β)p; p is the student. No τ² factor.
        beta: for "jsd", in [0, 1]. 0 is forward KL and 1 is reverse KL, exactly.
        bias, teacher_bias: (V_s,) and (V_t,), floating. −inf forbids a token. A teacher that forbids what the student
            allows gives +inf reverse KL (the other way round for forward KL); that row's gradient is 0.
        temperature: divides both sides' logits, above 0.
        softcap, teacher_softcap: tanh cap of the logits, None for none; "same" is the student's.
        scale, teacher_scale: factor of the raw logits, above 0; "same" is the student's.
        token_weights: (N,) floating, None for ones. Rows of weight zero count nothing, whatever they hold.
        labels: (N,) int64, the sampled tokens, read for return_tokens only. Values are not checked
            beforehand: one outside the vocabulary is refused by the gather (torch) or reads as NaN (triton).
        reduction: "mean" Σ w_n D_n / Σ w_n (0 if no row has weight), "sum" Σ w_n D_n, or "none", the (N,)
            values w_n D_n. "none" runs the loop a second time in the backward.
        vocab_size: compare the first vocab_size rows of both heads; None is min(V_s, V_t).
        return_tokens: also return TokenStats.
        chunk_bytes: workspace for logits, upcast weights and scratch; as many tokens go into a chunk as fit (at
            least one). None is a 64th of a GPU's memory (1.25 GiB of 80 GiB), 256 MiB on a CPU. No more is taken than
            the tokens need.
        compact: gather rows of weight zero away before any GEMM. To find them, the host waits for token_weights; it
            waits for nothing else. False computes these rows for nothing instead. Without token_weights there is
            nothing to find.
        products: "bfloat16" rounds the operands of the products to bf16 outside autocast as well: for bf16 hidden
            states and an fp32 head, as under FSDP2's mixed precision. Sums and results stay fp32. None: operands
            have the dtype of the inputs, or of autocast.
        impl: "triton" (GPU), "torch" (anywhere), or None: Triton on a GPU, else torch. "triton_dual" (GPU) is not
            measured yet, and never chosen by None: reverse and forward KL of bf16 or fp16 matrices, without bias and
            softcap.

    Returns:
        The loss, () or (N,) for "none", fp32 (fp64 if an input is fp64); with return_tokens also TokenStats.
        Gradients flow to x, w and bias if they require them, accumulated over chunks in fp32 and
        returned in the tensor's dtype.

    Raises:
        ValueError: an argument is out of its range or does not fit the others; the message names it.
        RuntimeError: an explicit impl cannot run here; or a double backward.
    """
    w, bias, teacher_w, teacher_bias = (unsharded(t) for t in (w, bias, teacher_w, teacher_bias))
    _check_tensors(x, w, teacher_x, teacher_w, bias, teacher_bias)
    check_tokens(token_weights, labels, x.shape[0], ("x", x))
    dtype = compute_dtype(x, w, teacher_x, teacher_w)
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
        compact=compact,
        impl=choose_impl(impl, dtype, x.device, LINEAR_IMPLS),
    )
    rounding = product_rounding(products, x.device, dtype)
    if options.impl == "triton_dual":
        from .dual import check_dual

        check_dual(Inputs(x, w, bias, teacher_x, teacher_w, teacher_bias), options, rounding)
    needs = (v is not None and v.requires_grad and torch.is_grad_enabled() for v in (x, w, bias))
    loss, *rest = _op(
        x, w, bias, teacher_x, teacher_w, teacher_bias, token_weights, labels, None,
        *needs, rounding, *options.flat(),
    )  # fmt: skip
    return (loss, token_stats(rest[:6], labels is not None)) if return_tokens else loss


def _check_tensors(
    x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor, bias: Tensor | None, teacher_bias: Tensor | None
) -> None:
    check_matrix("x", x)
    here = ("x", x)
    for field, value in (("w", w), ("teacher_x", teacher_x), ("teacher_w", teacher_w)):
        check_matrix(field, value, here)
    check_head("w", w, "x", x)
    check_head("teacher_w", teacher_w, "teacher_x", teacher_x)
    if teacher_x.shape[0] != x.shape[0]:
        raise ValueError(
            f"teacher_x has {teacher_x.shape[0]} rows but x has {x.shape[0]}: row n of both must predict the same token"
        )
    check_bias("bias", bias, w.shape[0], here)
    check_bias("teacher_bias", teacher_bias, teacher_w.shape[0], here)
    check_teacher(teacher_x=teacher_x, teacher_w=teacher_w, teacher_bias=teacher_bias)


class LinearDivergence(nn.Module):
    """`linear_divergence` with its static options fixed: LinearDivergence(**options)(x, w, teacher_x, teacher_w).

    Options are those of the function that are not tensors; tensors (bias, token_weights, labels) go to the call.
    """

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(
        self, x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor, **tensors: Any
    ) -> Tensor | tuple[Tensor, TokenStats]:
        loss: Tensor | tuple[Tensor, TokenStats]
        loss = linear_divergence(x, w, teacher_x, teacher_w, **self.options, **tensors)
        return loss

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
