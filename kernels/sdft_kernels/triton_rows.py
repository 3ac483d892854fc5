"""The work on rows of logits by Triton: one program of row_kernel a row, on every row of a chunk at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import Options
from .chunks import Outputs
from .row_kernels import gradient_view, launch_rows
from .workspace import GPU_PAD


class TritonRows:
    """The divergence of the student's rows from the teacher's."""

    sides = 2
    pad = GPU_PAD
    narrow = True
    row_bytes = 0

    def __init__(
        self,
        options: Options,
        bias: tuple[Tensor | None, Tensor | None],  # (V or more,) of both sides
        labels: Tensor | None,  # (N,)
        outputs: Outputs,
        keep: Tensor | None,  # indices of the rows that count, or None for all
        grad_dtype: torch.dtype | None,  # of the gradient; None if none is wanted
    ):
        self.options, self.bias, self.labels, self.outputs, self.keep = options, bias, labels, outputs, keep
        self.grad_dtype = grad_dtype

    def block_bytes(self, rows: int) -> int:
        return 0

    def run(self, logits: Sequence[Tensor], lo: int, hi: int, weights: Tensor | None, factor: float) -> Tensor:
        s, t = logits
        g = None if self.grad_dtype is None else gradient_view(s, self.grad_dtype)
        launch_rows(
            s, t, g, self.options, self.bias, self.outputs,
            rows=hi - lo, lo=lo, index=self.keep, weights=weights, labels=self.labels, factor=factor,
        )  # fmt: skip
        return (s if g is None else g)[:, : self.options.vocab]
