"""`linear_cross_entropy`: hidden states, head and labels to loss, without a whole (N, V) tensor of logits.

File order: the work on rows, the operator (opaque to torch.compile) with its autograd, the public function, the Module.
N tokens, V vocabulary, H hidden size, R rows of a block.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor, nn

from .arguments import LabelOptions
from .call import Grads, Inputs, Scales, compute_dtype, product_rounding, unsharded
from .checks import (
    Options,
    Products,
    Reduction,
    check_bias,
    check_flag,
    check_head,
    check_matrix,
    check_tokens,
    check_vocab,
    make_options,
)
from .loop import run_linear
from .operators import linear_operator
from .reduce import finish, row_scales
from .rows import log_softmax_
from .torch_rows import TorchRows, Where, looks_infinite


class LabelStats(NamedTuple):
    """Per-token outputs, all (N,), detached, fp32 (fp64 for fp64 inputs); zeros if the token counts nothing."""

    loss: Tensor  # not multiplied by the token's weight
    logprob: Tensor  # log p(label)
    top1: Tensor  # bool: no token is more likely than the label


class LabelRows(TorchRows):
    """The cross-entropy of labels."""

    def __init__(
        self,
        options: Options,
        bias: Tensor | None,  # (V or more,)
        labels: Tensor,  # (N,)
        by_probability: bool,
        scales: Scales,
        need_grad: bool,
        dtype: torch.dtype,
    ):
        super().__init__(options, bias, labels, scales, need_grad, dtype, labels.device)
        self.by_probability = by_probability
        loss, logprob = (torch.zeros(labels.shape[0], dtype=dtype, device=labels.device) for _ in range(2))
        self.stats = LabelStats(loss, logprob, torch.zeros_like(labels, dtype=torch.bool))
        self.outputs = (loss, logprob, self.stats.top1 if options.return_tokens else None)

    def math_(
        self, s: Tensor, t: Sequence[Tensor], labels: Tensor | None, scratch: Tensor, where: Where
    ) -> tuple[Sequence[Tensor | None], Tensor | None]:
        assert labels is not None, "a cross-entropy has labels"
        labels = labels.unsqueeze(1)  # (R, 1)
        log_p = log_softmax_(s)
        chosen = log_p.gather(1, labels)
        top1 = (chosen >= log_p.amax(1, keepdim=True)).squeeze(1) if self.options.return_tokens else None
        chosen = chosen.squeeze(1)  # (R,)
        probability = chosen.exp()
        value = -chosen
        factor = None
        if self.by_probability:
            value = (value * probability).masked_fill_(probability == 0, 0.0)
            factor = probability
        elif looks_infinite(value):  # an infinite loss has no useful gradient
            factor = (value != torch.inf).to(s.dtype)
        if self.need_grad:  # p, less 1 at the label
            log_p.exp_().scatter_add_(1, labels, log_p.new_full((1, 1), -1.0).expand_as(labels))
        return (value, chosen, top1), factor


def _forward(
    x: Tensor,  # (N, H)
    w: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    token_weights: Tensor | None,  # (N,)
    upstream: Tensor | None,  # dLoss: None in the forward; () or (N,) if a backward runs the loop again
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    rounding: torch.dtype | None,
    by_probability: bool,
    *plain: Any,
) -> tuple[Tensor, ...]:
    """The loss, three per-token outputs, and dX, dW, db; what was not asked for has no elements."""
    options = Options.from_flat(*plain)
    scales = row_scales(token_weights, upstream, options, x.shape[0], compute_dtype(x, w))
    known = upstream is not None or options.reduction != "none"
    grads = Grads(need_x, need_w, need_bias) if known else Grads()
    rows = LabelRows(options, bias, labels, by_probability, scales, bool(grads), compute_dtype(x, w))
    made = run_linear(Inputs(x, w, bias), options, rows, grads, scales, rounding)
    loss = finish(rows.stats.loss, scales, options.reduction)
    stats = rows.stats if options.return_tokens else [x.new_empty(0) for _ in range(3)]
    return loss, *stats, *made.flat(x)


def _describe(
    options: Options, x: Tensor, w: Tensor, bias: Tensor | None, labels: Tensor, token_weights: Tensor | None
) -> tuple[torch.dtype, list[torch.dtype | None]]:
    dtype = compute_dtype(x, w)
    return dtype, [dtype, dtype, torch.bool] if options.return_tokens else [None, None, None]


_op = linear_operator(
    "sdft::linear_cross_entropy", _forward, _describe, stats=3, tensors="Tensor labels, Tensor? token_weights",
    plain="bool by_probability",
)  # fmt: skip


@overload
def linear_cross_entropy(
    x: Tensor, w: Tensor, labels: Tensor, *, return_tokens: Literal[False] = False, **options: Unpack[LabelOptions]
) -> Tensor: ...
@overload
def linear_cross_entropy(
    x: Tensor, w: Tensor, labels: Tensor, *, return_tokens: Literal[True], **options: Unpack[LabelOptions]
) -> tuple[Tensor, LabelStats]: ...
@overload
def linear_cross_entropy(
    x: Tensor, w: Tensor, labels: Tensor, *, return_tokens: bool, **options: Unpack[LabelOptions]
) -> Tensor | tuple[Tensor, LabelStats]: ...
def linear_cross_entropy(
    x: Tensor,  # (N, H)
    w: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    token_weights: Tensor | None = None,
    by_probability: bool = False,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    vocab_size: int | None = None,
    return_tokens: bool = False,
    chunk_bytes: int | None = None,
    compact: bool = True,
    products: Products | None = None,
) -> Tensor | tuple[Tensor, LabelStats]:
    """Cross-entropy −log p(label) of the labels by the model's next-token distributions p, from hidden states.

    Logits are computed as in `linear_divergence`: fp32 (fp64 if x or w is), a chunk of rows at a time. Runs on any
    device through torch.

    Args:
        x: (N, H) hidden states, fp32, bf16, fp16 or fp64. Flatten batch and time first. Row n predicts labels[n].
        w: (V, H) head; it and the bias may be DTensors, as in `linear_divergence`.
        labels: (N,) int64. Values are not checked beforehand: the gather refuses one outside the vocabulary.
        bias: (V,), floating. −inf forbids a token. A forbidden label has an infinite loss; that row's gradient is 0.
        temperature, softcap, scale: of the logits, as in `linear_divergence`.
        token_weights: (N,) floating, None for ones. Rows of weight zero count nothing, whatever they hold.
        by_probability: multiply each token's loss with p(label), a constant for the gradient: Dynamic Fine-Tuning
            (Wu et al. 2025, arXiv 2508.05629). The gradient of a token is then the gradient of −p(label).
        ignore_index: rows with this label have weight zero; None if there are none.
        reduction: "mean" Σ w_n l_n / Σ w_n (0 if no row has weight), "sum" Σ w_n l_n, or "none", the (N,) values
            w_n l_n. "none" runs the loop a second time in the backward.
        vocab_size: the tokens are the first vocab_size rows of w; None is all of them.
        return_tokens: also return LabelStats.
        chunk_bytes: as in `linear_divergence`.
        compact: gather rows of weight zero away before any GEMM. Finding them makes the host wait for token_weights
            and labels; False, or ignore_index=None without token_weights, does not wait.
        products: as in `linear_divergence`.

    Returns:
        The loss, () or (N,) for "none", fp32 (fp64 if x or w is fp64); with return_tokens also LabelStats. Gradients
        as from `linear_divergence`; a frozen head costs none.

    Raises:
        ValueError: an argument is out of its range or does not fit the others; the message names it.
        RuntimeError: a double backward.
    """
    w, bias = unsharded(w), unsharded(bias)
    here = ("x", x)
    check_matrix("x", x)
    check_matrix("w", w, here)
    check_head("w", w, "x", x)
    check_bias("bias", bias, w.shape[0], here)
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels is a {type(labels).__name__}: give an int64 tensor")
    check_tokens(token_weights, labels, x.shape[0], here)
    check_flag("by_probability", by_probability)
    if ignore_index is not None and type(ignore_index) is not int:
        raise ValueError(f"ignore_index={ignore_index!r} is not an integer: give the label to ignore, or None for none")
    options = make_options(
        divergence="forward_kl",  # a cross-entropy is the forward KL from a teacher that is sure of the label
        beta=0.5,
        temperature=temperature,
        reduction=reduction,
        vocab=check_vocab(vocab_size, w.shape[0], w.shape[0]),
        return_tokens=return_tokens,
        chunk_bytes=chunk_bytes,
        softcap=softcap,
        scale=scale,
        compact=compact,
    )
    dtype = compute_dtype(x, w)
    if token_weights is not None:
        token_weights = token_weights.to(torch.promote_types(token_weights.dtype, dtype))
    if ignore_index is not None:
        counts = labels != ignore_index
        token_weights = counts.to(dtype) if token_weights is None else token_weights.masked_fill(~counts, 0.0)
    needs = (v is not None and v.requires_grad and torch.is_grad_enabled() for v in (x, w, bias))
    loss, *rest = _op(
        x, w, bias, labels, token_weights, None, *needs, product_rounding(products, x.device, dtype), by_probability,
        *options.flat(),
    )  # fmt: skip
    return (loss, LabelStats(*rest[:3])) if return_tokens else loss


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` with its static options fixed: LinearCrossEntropy(**options)(x, w, labels).

    Options are those of the function that are not tensors; tensors (bias, token_weights) go to the call.
    """

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(self, x: Tensor, w: Tensor, labels: Tensor, **tensors: Any) -> Tensor | tuple[Tensor, LabelStats]:
        loss: Tensor | tuple[Tensor, LabelStats] = linear_cross_entropy(x, w, labels, **self.options, **tensors)
        return loss

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
