"""One call of the loss as the implementations see it: its tensors, the gradients wanted, and what it leaves.

N tokens, V vocabulary, H hidden size; _s the student's, _t the teacher's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import Options, TokenStats, is_sharded


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call, untouched."""

    x: Tensor  # (N, H_s)
    w: Tensor  # (V_s, H_s)
    bias: Tensor | None  # (V_s,)
    teacher_x: Tensor  # (N, H_t)
    teacher_w: Tensor  # (V_t, H_t)
    teacher_bias: Tensor | None  # (V_t,)
    labels: Tensor | None  # (N,)

    @property
    def dtype(self) -> torch.dtype:
        """What sums and outputs are in: fp64 if any matrix is, else fp32."""
        return compute_dtype(self.x, self.w, self.teacher_x, self.teacher_w)

    @property
    def shared_head(self) -> bool:
        """True where both sides project with the same memory."""
        w, t = self.w, self.teacher_w
        return (w.data_ptr(), w.shape, w.stride(), w.dtype) == (t.data_ptr(), t.shape, t.stride(), t.dtype)


@dataclass(frozen=True)
class Grads:
    """Which gradients to compute."""

    x: bool = False
    w: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.x or self.w or self.bias


@dataclass
class Result:
    """What a loop leaves: per-row values (not weighted) and the weighted gradients."""

    divergence: Tensor  # (N,) zeros where the weight is zero
    tokens: TokenStats | None
    dx: Tensor | None = None  # (N, H_s) in x's dtype (fp32 for fp16)
    dw: Tensor | None = None  # (V_s, H_s) fp32 (fp64 for fp64 inputs)
    dbias: Tensor | None = None  # (V_s,) the same

    def zero_grads(self) -> "Result":
        for grad in self.grads():
            grad.zero_()
        return self

    def scale_grads(self, factor: Tensor | float) -> None:
        for grad in self.grads():
            grad.mul_(factor)

    def grads(self) -> list[Tensor]:
        """Those that there are."""
        return [grad for grad in (self.dx, self.dw, self.dbias) if grad is not None]


def unsharded(tensor: Any) -> Any:
    """A DTensor (a parameter under FSDP2) whole, as a plain tensor; anything else as it is.

    The gradient goes back averaged over the ranks of its mesh, as FSDP2 and DDP give it, and sharded again. Where the
    ranks computed the same (tensor parallelism) the average is that same gradient. `full_tensor()` alone would keep
    of each rank's own gradient that rank's rows.
    """
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any input is, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """What autocast would round the operands of a product in `dtype` to there; None where it leaves them alone."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and dtype != torch.float64 else None


def dx_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """dX is in x's dtype, but fp16 would underflow here, before a loss scaler's factor arrives in the backward."""
    return dtype if x.dtype == torch.float16 else x.dtype


def new_grads(inputs: Inputs, options: Options, grads: Grads, result: Result, all_rows: bool) -> Result:
    """Allocate the gradients; rows and columns that no chunk writes are zero."""
    if grads.x:
        make = torch.empty_like if all_rows else torch.zeros_like
        result.dx = make(inputs.x, dtype=dx_dtype(inputs.x, inputs.dtype), memory_format=torch.contiguous_format)
    if grads.w:
        result.dw = torch.empty_like(inputs.w, dtype=inputs.dtype, memory_format=torch.contiguous_format)
        result.dw[options.vocab :].zero_()
    if grads.bias and inputs.bias is not None:
        result.dbias = torch.zeros_like(inputs.bias, dtype=inputs.dtype)
    return result
