"""A check of values: its numbers, how they are recorded, and the inputs and comparisons that checks of the loss share.

N tokens, V vocabulary, H hidden size.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sdft_kernels
import torch
from sdft_kernels import reference
from sdft_kernels.checks import IMPLS, LINEAR_IMPLS
from torch import Tensor

from .phase import Place, Row

# Options come from tables here, so mypy cannot choose an overload of a function.
divergence: Any = sdft_kernels.divergence
linear_divergence: Any = sdft_kernels.linear_divergence
linear_topk_divergence: Any = sdft_kernels.linear_topk_divergence
linear_cross_entropy: Any = sdft_kernels.linear_cross_entropy
exact_divergence: Any = reference.linear_divergence_reference
divergence_reference: Any = reference.divergence_reference
topk_divergence_reference: Any = reference.topk_divergence_reference
cross_entropy_reference: Any = reference.linear_cross_entropy_reference

KINDS = ("reverse_kl", "forward_kl", "jsd")
BOUNDS = {torch.float32: 5e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}  # of gradients
VALUES = 1e-2  # of losses and per-token outputs; the dtype's rounding of the inputs is in both sides
SCALER = 2.0**12  # a loss scaler's factor, without which fp16 gradients are subnormal
CANDIDATES = tuple(impl for impl in LINEAR_IMPLS if impl not in IMPLS)  # never the default
OF_CANDIDATES = (KINDS[:2], (torch.bfloat16, torch.float16))  # the divergences and dtypes that they take


@dataclass(frozen=True)
class Found:
    """One number of a check. It is right if it is at most its bound; NaN is not."""

    what: str
    error: float
    bound: float

    @property
    def right(self) -> bool:
        return self.error <= self.bound


@dataclass(frozen=True)
class Check:
    """One item of the list."""

    name: str
    run: Callable[[Place], Iterator[Found]]
    needs_gpu: bool = False  # it calls the CUDA runtime
    gigabytes: float = 0.0  # of free GPU memory
    module: str = ""  # a package that it needs

    def __str__(self) -> str:
        return self.name


def recorded(check: Check, place: Place, rows: list[Row]) -> None:
    """Appends a row for every number of the check."""
    why = cannot(check, place)
    if why:
        rows.append({"what": check.name, "note": why})
        return
    with exact_products():
        for found in check.run(place):
            rows.append({"what": found.what, "error": found.error, "bound": found.bound, "right": found.right})


def cannot(check: Check, place: Place) -> str:
    """Why the check cannot run there; empty if it can."""
    if check.module and importlib.util.find_spec(check.module) is None:
        return f"{check.module} is missing"
    if place.device != "cuda":
        return "needs a GPU" if check.needs_gpu else ""
    free = torch.cuda.mem_get_info()[0] / 1e9
    return f"needs {check.gigabytes:.0f} GB of free GPU memory" if check.gigabytes > free else ""


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Turns TF32 off, because the loss does not round to it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# Inputs and comparisons.


def draw(
    place: Place, rows: int, vocab: int, hidden: int, dtype: torch.dtype, *, noise: float = 0.15, shared: bool = False
) -> list[Tensor]:
    """x, w, teacher_x and teacher_w; the teacher is near the student. Tiny: at most 5 rows, 203 tokens, 16 channels."""
    if place.tiny:
        rows, vocab, hidden = min(rows, 5), min(vocab, 203), min(hidden, 16)
    gen = torch.Generator(place.device).manual_seed(rows + vocab)

    def normal(n: int) -> Tensor:
        return torch.randn(n, hidden, generator=gen, device=place.device)

    x, w = normal(rows), normal(vocab) / hidden**0.5
    teacher_x = x + noise * normal(rows)
    teacher_w = w if shared else w + noise * normal(vocab) / hidden**0.5
    x, w, teacher_x = x.to(dtype), w.to(dtype), teacher_x.to(dtype)
    return [x, w, teacher_x, w if shared else teacher_w.to(dtype)]


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, or ‖a‖ if b is 0."""
    norm = b.double().norm()
    return ((a.double() - b).norm() / torch.where(norm == 0, 1.0, norm)).item()


def compare(
    what: str,
    inputs: list[Tensor],
    bound: float,
    *,
    frozen: bool = False,
    impl: str | None = "triton",
    exact: list[Tensor] | None = None,
    loop: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Found]:
    """Loss, per-token outputs and gradients of x and, unless frozen, w.

    exact: the same inputs as the products see them, if that differs (autocast). loop: options that change no value.
    """
    graded = 1 if frozen else 2
    ours = [t.detach().requires_grad_(i < graded) for i, t in enumerate(inputs)]
    truth = [t.detach().double().requires_grad_(i < graded) for i, t in enumerate(exact or inputs)]
    labels = torch.arange(len(inputs[0]), device=inputs[0].device) * 37 % min(len(inputs[1]), len(inputs[3]))
    given: dict[str, Any] = {"labels": labels, "return_tokens": True} | options
    chosen: dict[str, Any] = {"impl": impl} | (loop or {})
    loss, tokens = linear_divergence(*ours, **given, **chosen)
    want, true = exact_divergence(*truth, **given)
    yield Found(f"{what}: loss", relative(loss, want), VALUES)
    pairs = zip(tokens[:5], true[:5], strict=True)
    yield Found(f"{what}: tokens", max(relative(got, value) for got, value in pairs), VALUES)
    grads = torch.autograd.grad(loss.sum() * SCALER, ours[:graded])
    wanted = torch.autograd.grad(want.sum() * SCALER, truth[:graded])
    for name, got, value in zip(("dX", "dW"), grads, wanted, strict=False):
        yield Found(f"{what}: {name}", relative(got, value), bound)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
