"""The problems: their tensors, their float64 reference, and the bare products, which no loss can beat."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sdft_kernels.reference import linear_divergence_reference
from torch import Tensor

from .peers import VARIANTS, Loss
from .shapes import HEADS, Shape

# Largest relative error of dX and dW, with the teacher near the student. Rounding them to bf16 alone costs 0.002.
BARS = {"float32": 1e-3, "bfloat16": 5e-3}
LOSS_BAR = 1e-2
CHECKED_ROWS = {"cpu": 64, "cuda": 4096}  # compared with float64
TRUTH_ROWS = 256  # at a time: a dense float64 loss holds about 25 (rows, V) tensors
FLOOR_ROWS = 8192  # at a time: large enough for a GEMM, small enough to leave the device's memory to the variants


def all_but(*names: str) -> tuple[str, ...]:
    return tuple(v.name for v in VARIANTS if v.name not in names)


COMPILED = tuple(v.name for v in VARIANTS if v.compiled)
TORCH = ("sdft_kernels torch",)  # no tensor cores on a GPU: seconds a call if N is large


@dataclass(frozen=True)
class Case:
    """One row block of the table: a shape, a dtype, a divergence."""

    model: str
    tokens: int
    dtype: str = "bfloat16"
    divergence: str = "reverse_kl"
    frozen: bool = False  # no gradient for the head
    without: tuple[str, ...] = ()  # variants that would take too long
    trainer: bool = False  # as in the trainer: fp32 heads and hidden states under bf16 autocast

    def label(self) -> dict[str, Any]:
        vocab, hidden = HEADS[self.model]
        return {
            "model": self.model,
            "V": vocab,
            "H": hidden,
            "N": self.tokens,
            "dtype": f"{self.dtype} under bf16 autocast" if self.trainer else self.dtype,
            "divergence": self.divergence,
            "head": "frozen" if self.frozen else "trained",
        }

    def shape(self) -> Shape:
        """The case for the model of the costs."""
        vocab, hidden = HEADS[self.model]
        return Shape(self.tokens, vocab, hidden, self.products, not self.frozen, cast=self.trainer)

    @property
    def products(self) -> str:
        """The dtype of the products' operands."""
        return "bfloat16" if self.trainer else self.dtype

    def __str__(self) -> str:
        return " ".join(str(v) for k, v in self.label().items() if k not in "VH")


BIG = ("Qwen2.5-7B", "Llama-3.1-8B", "Gemma-3-1B", "SmolLM2-135M")
CPU_CASES = (
    Case("SmolLM2-135M", 2048, "float32", without=all_but(*TORCH, "dense", "Liger chunked")),
    Case("SmolLM2-135M", 2048, "float32", "forward_kl", without=all_but(*TORCH)),
    Case("SmolLM2-135M", 2048, "float32", "jsd", without=all_but(*TORCH)),
    Case("SmolLM2-135M", 2048, "bfloat16", without=all_but(*TORCH, "dense", "Liger chunked")),
    Case("small", 512, "float32"),
    Case("small", 512, "float32", frozen=True, without=COMPILED),
    Case("small", 512, "float32", "forward_kl", without=COMPILED),
    Case("small", 512, "bfloat16", without=COMPILED),
)
TINY_CASES = (
    Case("tiny", 32, "float32", without=COMPILED),
    Case("tiny", 64, "float32", without=COMPILED),
    Case("tiny", 32, "bfloat16", frozen=True, without=COMPILED),
    Case("tiny", 32, "float32", "forward_kl", without=COMPILED),
    Case("tiny", 32, "float32", "jsd", without=COMPILED),
)


@dataclass
class Problem:
    """The tensors of a case: peaked logits (σ = 4), a teacher near the student, separate heads."""

    x: Tensor
    w: Tensor
    teacher_x: Tensor
    teacher_w: Tensor
    products: torch.dtype  # dtype of the operands; autocast rounds to it if the tensors have another

    @classmethod
    def make(cls, case: Case, device: str) -> "Problem":
        vocab, hidden = HEADS[case.model]
        gen = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, case.dtype)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, hidden, generator=gen, device=device)

        x, w = normal(case.tokens), (normal(vocab) * 4 / hidden**0.5).to(dtype)
        teacher_x = x + 0.05 * normal(case.tokens)
        w, teacher_w = w.requires_grad_(not case.frozen), w.detach().clone()
        products = getattr(torch, case.products)
        return cls(x.to(dtype).requires_grad_(), w, teacher_x.to(dtype), teacher_w, products)

    def first(self, rows: int) -> "Problem":
        """The same problem with the first rows only."""
        x = self.x.detach()[:rows].clone().requires_grad_()
        return Problem(x, self.w, self.teacher_x[:rows], self.teacher_w, self.products)

    def operands(self) -> list[Tensor]:
        """x, w, teacher_x and teacher_w as the products see them, without gradients."""
        return [t.detach().to(self.products) for t in (self.x, self.w, self.teacher_x, self.teacher_w)]

    def clear(self) -> None:
        self.x.grad = self.w.grad = None

    def step(self, loss: Loss) -> Tensor:
        """Forward and backward from cleared gradients."""
        self.clear()
        with torch.autocast(self.x.device.type, self.products, enabled=self.products != self.x.dtype):
            value = loss(self.x, self.w, self.teacher_x, self.teacher_w)
        value.backward()
        return value.detach()

    def returned_bytes(self) -> int:
        """Bytes that every variant must return: dX, and dW, which is accumulated in fp32."""
        return self.x.nbytes + self.w.requires_grad * self.w.numel() * 4


@dataclass
class Truth:
    """The mean divergence of a problem and its gradients in float64."""

    value: float
    dx: Tensor
    dw: Tensor | None

    @classmethod
    def of(cls, problem: Problem, divergence: str) -> "Truth":
        x, w, teacher_x, teacher_w = (t.double() for t in problem.operands())
        x.requires_grad_()
        w.requires_grad_(problem.w.requires_grad)
        value = 0.0
        for rows, teacher_rows in zip(x.split(TRUTH_ROWS), teacher_x.split(TRUTH_ROWS), strict=True):
            part: Any = linear_divergence_reference(
                rows, w, teacher_rows, teacher_w, divergence=divergence, reduction="sum"
            )
            part = part / len(x)
            part.backward()
            value += part.item()
        assert x.grad is not None
        return cls(value, x.grad, w.grad)

    def errors(self, problem: Problem, loss: Loss) -> dict[str, float]:
        """Relative errors of a loss and its gradients."""
        value = problem.step(loss).item()
        errors = {"D error": abs(value - self.value) / abs(self.value), "dX error": relative(problem.x.grad, self.dx)}
        if self.dw is not None:
            errors["dW error"] = relative(problem.w.grad, self.dw)
        problem.clear()
        return errors


def relative(got: Tensor | None, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖, some rows at a time."""
    assert got is not None
    pairs = zip(got.split(TRUTH_ROWS * 16), want.split(TRUTH_ROWS * 16), strict=True)
    return (sum((g.double() - w).square().sum() for g, w in pairs).sqrt() / want.norm()).item()


def is_exact(errors: dict[str, float], dtype: str) -> bool:
    """Whether every error is within its bar; NaN is not."""
    return all(error <= (LOSS_BAR if key == "D error" else BARS[dtype]) for key, error in errors.items())


def bare_gemms(problem: Problem) -> Callable[[], None]:
    """Both logits, dX and, unless the head is frozen, dW, as plain products that allocate their outputs."""
    x, w, teacher_x, teacher_w = problem.operands()
    frozen = not problem.w.requires_grad

    def run() -> None:
        for rows, teacher_rows in zip(x.split(FLOOR_ROWS), teacher_x.split(FLOOR_ROWS), strict=True):
            s, _ = rows @ w.t(), teacher_rows @ teacher_w.t()
            _ = s @ w, None if frozen else s.t() @ rows

    return run


def strict_gemms(problem: Problem) -> Callable[[], None]:
    """The same GEMMs into buffers that exist already: no page of memory is touched for the first time."""
    x, w, teacher_x, teacher_w = problem.operands()
    z = torch.zeros(min(len(x), FLOOR_ROWS), len(w), dtype=x.dtype, device=x.device)
    dx, dw = torch.zeros_like(x[: len(z)]), None if not problem.w.requires_grad else torch.zeros_like(w)

    def run() -> None:
        for rows, teacher_rows in zip(x.split(FLOOR_ROWS), teacher_x.split(FLOOR_ROWS), strict=True):
            n = len(rows)
            torch.mm(rows, w.t(), out=z[:n])
            torch.mm(teacher_rows, teacher_w.t(), out=z[:n])
            torch.mm(z[:n], w, out=dx[:n])
            if dw is not None:
                torch.mm(z[:n].t(), rows, out=dw)

    return run
