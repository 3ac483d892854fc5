"""Shared by the operators: registration, entry to a call, per-token outputs as flat tensors, the backward."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .call import grad_dtype
from .checks import Options, TokenStats


def register(
    name: str,
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup: Callable[..., None],
    public: str | None = None,
) -> Callable[..., Any]:
    """Make forward the operator `name` ("sdft::..."), opaque to torch.compile, with its shapes and its autograd.

    `public` is the name that errors give the operator; None is the part of `name` after "::". The result is called
    like `forward`. torch.library.custom_op would do the same, but import torch._dynamo at the first call: two seconds
    and 150 MB, useless to an eager caller.
    """
    namespace, op = name.split("::")
    public = public or op
    torch.library.define(name, schema)
    torch.library.impl(name, "CompositeExplicitAutograd", at_boundary(forward))
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, backward_of(public, backward), setup_context=setup)

    def refuse_vmap(*_: Any) -> None:
        raise RuntimeError(no_transform(public))

    torch.library.register_vmap(name, refuse_vmap)
    return first_order(public, getattr(getattr(torch.ops, namespace), op).default)


def linear_operator(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    describe: Callable[..., tuple[torch.dtype, Sequence[torch.dtype | None]]],
    *,
    tensors: str,
    plain: str = "",
    stats: int,
    public: str | None = None,
) -> Callable[..., Any]:
    """The operator of a loss from hidden states x (or logits, if w is None), with its shapes and its autograd.

    Arguments: x, w, bias, `tensors` of the schema, upstream (dLoss: None in the forward, () or (N,) if a backward
    runs the loop again), three flags (which of dX, dW and db to make), the dtype that operands are rounded to or None,
    `plain` values of the schema, and Options.flat(). Results: the loss, `stats` per-token outputs (N,), dX, dW and db;
    an absent result has no elements. describe(options, *the tensors but upstream) gives the dtype of the values, and
    the dtype of each per-token output or None.
    """
    count = 4 + tensors.count("Tensor")  # with x, w, bias and upstream
    schema = (
        f"(Tensor x, Tensor? w, Tensor? bias, {tensors}, Tensor? upstream, bool need_x, bool need_w, bool need_bias, "
        f"ScalarType? rounding, {plain + ', ' if plain else ''}{Options.SCHEMA}) "
        f"-> ({', '.join(['Tensor'] * (stats + 4))})"
    )

    def options_of(args: Sequence[Any]) -> Options:
        return Options.from_flat(*args[-Options.SCHEMA.count(",") - 1 :])

    def fake(*args: Any) -> tuple[Tensor, ...]:
        x, w, bias = args[:3]
        options = options_of(args)
        dtype, kinds = describe(options, *args[: count - 1])
        known = args[count - 1] is not None or options.reduction != "none"
        wanted = [v is not None and need and known for v, need in zip(args, args[count : count + 3], strict=False)]
        row = [x.new_empty(0) if kind is None else x.new_empty(x.shape[0], dtype=kind) for kind in kinds]
        return (
            x.new_empty((x.shape[0],) if options.reduction == "none" else (), dtype=dtype),
            *row,
            x.new_empty(x.shape, dtype=grad_dtype(x, dtype)) if wanted[0] else x.new_empty(0),
            x.new_empty(w.shape, dtype=grad_dtype(w, dtype)) if wanted[1] else x.new_empty(0),
            x.new_empty(bias.shape, dtype=dtype) if wanted[2] else x.new_empty(0),
        )

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plain = inputs[count:]
        ctx.set_materialize_grads(False)  # otherwise outputs without a gradient would get zeros of their size
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[: count - 1], *output[-3:])
        ctx.spent = False

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (count + len(ctx.plain))
        if grad is None:  # an undefined gradient: nothing depends on the loss
            return nothing
        saved = ctx.saved_tensors  # once: under checkpointing every access would compute again
        given, made = saved[: count - 1], saved[count - 1 :]
        options = options_of(ctx.plain)
        grads = hand_over(
            ctx, grad, given, made, ctx.plain[:3], lambda: operator(*given, grad, *ctx.plain)[-3:],
            options.impl, options.reduction == "none",
        )  # fmt: skip
        return *grads, *nothing[3:]

    operator = register(name, schema, forward, fake, backward, setup, public)
    return operator


def at_boundary(forward: Callable[..., Any]) -> Callable[..., Any]:
    """forward with every vector contiguous, on the device of its first tensor.

    Kernels take vectors as pointers, and vectors are small. Triton launches on the current device, even if the
    tensors are on another.
    """

    @wraps(forward)
    def call(*args: Any) -> Any:
        with on_device(args[0]):
            return forward(*(a.contiguous() if isinstance(a, Tensor) and a.ndim == 1 else a for a in args))

    return call


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current device. A fake tensor may name a GPU although CUDA is not initialised."""
    real = tensor.device.type == "cuda" and torch.cuda.is_initialized()
    return torch.cuda.device(tensor.device) if real else nullcontext()


def backward_of(public: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """backward(ctx, *grads) on the device of the gradients, without a second derivative."""

    @wraps(backward)
    def call(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{public} has no double backward: call backward without create_graph=True")
        given = [g for g in grads if g is not None]
        with on_device(given[0]) if given else nullcontext():
            return backward(ctx, *grads)

    return call


def first_order(public: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """function, which has a backward and no other derivative: forward mode and torch.func raise with its name."""

    @wraps(function)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args)
        if any(isinstance(a, Tensor) and unpack_dual(a).tangent is not None for a in args):
            raise RuntimeError(
                f"{public} has no forward-mode derivative: use backward or torch.autograd.grad, not torch.func.jvp or "
                "torch.autograd.forward_ad"
            )
        try:
            return function(*args)
        except RuntimeError as error:
            if "functorch transforms" in str(error):  # torch's message names neither the loss nor the fix
                raise RuntimeError(no_transform(public)) from error
            raise

    return call


def no_transform(public: str) -> str:
    return (
        f"{public} does not work under torch.func.grad, torch.func.jacrev or torch.func.vmap: "
        "use backward or torch.autograd.grad, and call it once for each member of a batch"
    )


def token_tuple(tokens: TokenStats | None, like: Tensor) -> tuple[Tensor, ...]:
    """The six outputs as an operator returns them: no elements if there is nothing."""
    values = [None] * 6 if tokens is None else tokens
    return tuple(like.new_empty(0) if v is None else v for v in values)


def token_kinds(dtype: torch.dtype, wanted: bool, labels: bool) -> list[torch.dtype | None]:
    """token_tuple's dtypes, None if there is nothing."""
    there = (wanted, wanted, wanted, wanted and labels, wanted and labels, wanted)
    return [kind if here else None for here, kind in zip(there, (dtype,) * 5 + (torch.bool,), strict=True)]


def fake_tokens(x: Tensor, dtype: torch.dtype, wanted: bool, labels: bool) -> tuple[Tensor, ...]:
    """token_tuple's shapes and dtypes, for tracing."""
    kinds = token_kinds(dtype, wanted, labels)
    return tuple(x.new_empty(0) if kind is None else x.new_empty(x.shape[0], dtype=kind) for kind in kinds)


def token_stats(values: list[Tensor], labels: bool) -> TokenStats:
    """The inverse of token_tuple, for outputs that were asked for."""
    divergence, s_entropy, t_entropy, s_logprob, t_logprob, agree = values
    return TokenStats(
        divergence, s_entropy, t_entropy, s_logprob if labels else None, t_logprob if labels else None, agree
    )


def scale_grad(made: Tensor, factor: Tensor, impl: str) -> Tensor:
    """made·factor in the memory of made; on a GPU the host does not read the factor.

    The factor is almost always 1, and then nothing is written. The write goes through .data, so that autograd's check
    for overwritten tensors does not stop a second backward, which does not read them.
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
    tensors: Sequence[Any],  # of the call; first those that may get a gradient
    made: Sequence[Tensor],  # by the forward
    wanted: Sequence[bool],
    again: Callable[[], Sequence[Tensor]],
    impl: str = "torch",
    rerun: bool = False,
) -> list[Tensor | None]:
    """The gradients that the forward made, scaled and in their tensors' dtypes, once; then ctx.spent is True.

    With `rerun` (reduction="none") and in a second backward (retain_graph=True) the loop runs again: the upstream
    gradients of rows were not known before, or the buffers belong to the caller now.
    """
    if rerun or ctx.spent:
        made = again()
    else:
        ctx.spent = True
        made = [scale_grad(g, grad, impl) for g in made]
    return [g.to(like.dtype) if want else None for g, like, want in zip(made, tensors, wanted, strict=False)]
