"""One call of the loss as the implementations see it: its tensors, the gradients wanted, and its results.

N tokens, V vocabulary, H hidden size; _s the student's, _t the teacher's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .checks import PRODUCTS, Products, check_choice, is_sharded


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call, untouched."""

    x: Tensor  # (N, H_s)
    w: Tensor  # (V_s, H_s)
    bias: Tensor | None  # (V_s,)
    teacher_x: Tensor | None = None  # (N, H_t); None for a loss without a teacher's hidden states
    teacher_w: Tensor | None = None  # (V_t, H_t)
    teacher_bias: Tensor | None = None  # (V_t,)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of sums and outputs: fp64 if any matrix is fp64, else fp32."""
        return compute_dtype(self.x, self.w, self.teacher_x, self.teacher_w)

    @property
    def sides(self) -> list[tuple[Tensor, Tensor]]:
        """Hidden states and head of the student, and of the teacher if there is one."""
        student = [(self.x, self.w)]
        if self.teacher_x is None or self.teacher_w is None:
            return student
        return [*student, (self.teacher_x, self.teacher_w)]

    @property
    def shared_head(self) -> bool:
        """True if both sides project with the same memory."""
        w, t = self.w, self.teacher_w
        if t is None or w is t:
            return w is t
        same = (w.shape, w.stride(), w.dtype) == (t.shape, t.stride(), t.dtype)
        return same and w.data_ptr() == t.data_ptr() != 0  # 0: no memory, as on the meta device


@dataclass(frozen=True)
class Grads:
    """Which gradients to compute."""

    x: bool = False
    w: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.x or self.w or self.bias


class Scales(NamedTuple):
    """Which rows of a call count, and what the gradient of each is multiplied with."""

    keep: Tensor | None  # indices of the rows that count, or None for all
    weights: Tensor | None  # (N,) dLoss/dD_n, or None for `uniform` on every row
    uniform: float
    masked: bool  # rows of weight zero are among those that are computed, and must leave no trace


class Rows(Protocol):
    """The work on the logits of a chunk. Its values go to outputs (N,) that were given to it when it was made."""

    sides: int  # blocks of logits that it reads: 1 the student's, 2 the teacher's as well
    pad: int  # a row of logits takes a multiple of this many entries
    narrow: bool  # whether it writes the gradient in the dtype of the products' operands
    row_bytes: int  # of workspace for each token of a chunk, apart from its logits

    def block_bytes(self, rows: int) -> int:
        """Bytes of workspace that do not grow with the chunk, for a call of `rows` tokens."""

    def run(self, logits: Sequence[Tensor], lo: int, hi: int, weights: Tensor | None, factor: float) -> Tensor:
        """Work on rows lo:hi of the rows that count: values to the outputs; the gradient times weights and factor.

        logits: (C, V or more) raw logits of each side, destroyed. The result is (C, V) in the memory of the
        student's logits; it has no meaning if no gradient is wanted.
        """


@dataclass
class Gradients:
    """The gradients that a call makes; None for one that is not wanted."""

    dx: Tensor | None = None  # (N, H_s) in x's dtype (fp32 for fp16)
    dw: Tensor | None = None  # (V_s, H_s) in w's dtype (fp32 for fp16)
    dbias: Tensor | None = None  # (V_s,) fp32 (fp64 for fp64 inputs)

    @classmethod
    def new(cls, inputs: Inputs, wanted: Grads, all_rows: bool) -> "Gradients":
        """dX and db, not filled yet, apart from the rows and columns that no chunk writes, which are zero."""
        x, bias, dtype = inputs.x, inputs.bias, inputs.dtype
        made = cls()
        if wanted.x:
            make = torch.empty_like if all_rows else torch.zeros_like
            made.dx = make(x, dtype=grad_dtype(x, dtype), memory_format=torch.contiguous_format)
        if wanted.bias and bias is not None:
            made.dbias = torch.zeros_like(bias, dtype=dtype)
        return made

    def zero_(self) -> "Gradients":
        for grad in self.made():
            grad.zero_()
        return self

    def scale_(self, factor: Tensor | float) -> None:
        for grad in self.made():
            grad.mul_(factor)

    def flat(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dX, dW and db as an operator returns them: no elements if there is nothing."""
        dx, dw, dbias = (like.new_empty(0) if g is None else g for g in (self.dx, self.dw, self.dbias))
        return dx, dw, dbias

    def made(self) -> list[Tensor]:
        """The gradients that are not None."""
        return [grad for grad in (self.dx, self.dw, self.dbias) if grad is not None]


def unsharded(tensor: Any) -> Any:
    """A DTensor (a parameter under FSDP2) gathered into a plain tensor; anything else unchanged.

    The gradient is averaged over the ranks of the mesh, as under FSDP2 and DDP, and sharded again. If all ranks
    computed the same (tensor parallelism), the average is the same gradient. With `full_tensor()` alone, each rank
    would keep only its rows of the gradient that it computed itself.
    """
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any input is, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype that autocast rounds operands of a product in `dtype` to on the device; None if it does not."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and dtype != torch.float64 else None


def product_rounding(asked: Products | None, device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype that operands of products in `dtype` are rounded to: as asked, or by autocast; None if they are not."""
    if asked is None:
        return autocast_dtype(device, dtype)
    check_choice("products", asked, PRODUCTS)
    if dtype == torch.float64:
        raise ValueError(f"products={asked!r} would round float64 inputs: use products=None, or convert the inputs")
    return torch.bfloat16


def grad_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient: its tensor's, but not fp16, which would underflow before a loss scaler's factor."""
    return dtype if tensor.dtype == torch.float16 else tensor.dtype


def new_dw(w: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """Memory for dW (V, H), not filled yet, apart from the rows past the vocabulary, which are zero."""
    dw = torch.empty_like(w, dtype=dtype, memory_format=torch.contiguous_format)
    dw[vocab:].zero_()
    return dw
