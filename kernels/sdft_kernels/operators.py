"""What the operators share: registration, per-token outputs as flat tensors, and the backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import TokenStats


def register(
    name: str,
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup: Callable[..., None],
) -> Callable[..., tuple[Tensor, ...]]:
    """Make forward the operator `name` ("sdft::..."), opaque to torch.compile, with its shapes and its autograd.

    torch.library.custom_op would do the same, and import
    torch._dynamo at the first call: two seconds and 150 MB of which an eager caller has no use.
    """
    torch.library.define(name, schema)
    torch.library.impl(name, "CompositeExplicitAutograd", forward)
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, backward, setup_context=setup)
    namespace, op = name.split("::")
    return getattr(getattr(torch.ops, namespace), op).default


def token_tuple(tokens: TokenStats | None, like: Tensor) -> tuple[Tensor, ...]:
    """The six outputs as an operator returns them: no elements where there is nothing."""
    values = [None] * 6 if tokens is None else tokens
    return tuple(like.new_empty(0) if v is None else v for v in values)


def fake_tokens(x: Tensor, dtype: torch.dtype, wanted: bool, labels: bool) -> tuple[Tensor, ...]:
    """token_tuple's shapes and dtypes, for tracing."""
    there = (wanted, wanted, wanted, wanted and labels, wanted and labels, wanted)
    kinds = (dtype,) * 5 + (torch.bool,)
    return tuple(
        x.new_empty(x.shape[0], dtype=kind) if here else x.new_empty(0) for here, kind in zip(there, kinds, strict=True)
    )


def token_stats(values: list[Tensor], labels: bool) -> TokenStats:
    """The inverse of token_tuple, for outputs that were asked for."""
    divergence, s_entropy, t_entropy, s_logprob, t_logprob, agree = values
    return TokenStats(
        divergence, s_entropy, t_entropy, s_logprob if labels else None, t_logprob if labels else None, agree
    )


def scale_grad(made: Tensor, factor: Tensor, impl: str) -> Tensor:
    """made·factor, in made's own memory and without the host looking at the factor on a GPU.

    Almost always the factor is 1 and there is nothing to do. Written through .data, so that autograd's
    check for overwritten tensors does not stop a second backward, which does not read them.
    """
    if type(made) is not Tensor:  # torch.compile is tracing
        return made * factor
    if made.numel() == 0:
        return made
    if impl != "torch" and made.is_contiguous():
        from .row_kernels import scale_

        return scale_(made.data, factor)
    if made.device.type == "cpu":
        return made if factor.item() == 1.0 else made.data.mul_(factor)
    return made.data.mul_(factor)


def hand_over(
    ctx: Any,
    grad: Tensor,  # dLoss
    tensors: Sequence[Any],  # the call's, those first that may get a gradient
    made: Sequence[Tensor],  # by the forward
    wanted: Sequence[bool],
    again: Callable[[], Sequence[Tensor]],
    impl: str = "torch",
    rerun: bool = False,
) -> list[Tensor | None]:
    """The gradients that the forward made, scaled and in their tensors' dtypes, once; ctx.spent says whether they are.

    With `rerun` (reduction="none") and in a second backward (retain_graph=True) the loop runs again: rows' upstream
    gradients were not known before, and the buffers belong to the caller now.
    """
    if rerun or ctx.spent:
        made = again()
    else:
        ctx.spent = True
        made = [scale_grad(g, grad, impl) for g in made]
    return [g.to(like.dtype) if want else None for g, like, want in zip(made, tensors, wanted, strict=False)]


def refuse_double_backward(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no double backward: call backward without create_graph=True")
