"""impl="triton_dual": both sides' logits by one Triton kernel that keeps 4 bytes an entry, a candidate for the default.

`DualProjection` is the source of the loop, `DualRows` the work on rows; what they hand over is explained in
dual_kernels.py. The gradient takes the place of E. If the head is trained, the gradients of several chunks stay, so
that dW is accumulated less often.

N tokens of a call, C of them in a chunk, V vocabulary, H hidden size; _s the student's, _t the teacher's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import Grads, Inputs, Rows
from .checks import INTERPRETED, Options
from .chunks import Outputs, take
from .dual_kernels import tile_kernel, tiles_row_kernel
from .operands import has_narrow_products
from .projection import Projection
from .row_kernels import FP16_MAX
from .row_math import KINDS
from .tuning import DUAL_MERGED, DUAL_ROW_BLOCK, DualTile, dual_tile
from .workspace import GPU_PAD, Plan, plan_dual

DTYPES = (torch.bfloat16, torch.float16)
DIVERGENCES = ("reverse_kl", "forward_kl")
NAME = "impl='triton_dual'"
OTHERS = "use impl='triton' or 'torch'"


def check_dual(inputs: Inputs, options: Options, rounding: torch.dtype | None) -> None:
    """Raise ValueError for what the implementation does not do, and RuntimeError for a GPU that it does not run on."""
    tensors = {"x": inputs.x, "w": inputs.w, "teacher_x": inputs.teacher_x, "teacher_w": inputs.teacher_w}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len({*dtypes.values()}) > 1 or inputs.x.dtype not in DTYPES or rounding not in (None, inputs.x.dtype):
        under = "" if rounding is None else f", and products in {rounding}"
        given = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{NAME} takes bf16 or fp16 in all matrices, not {given}{under}: {OTHERS}")
    if options.kind not in DIVERGENCES:
        raise ValueError(f"{NAME} does not do divergence={options.kind!r}: give one of {DIVERGENCES}, or {OTHERS}")
    for name, bias in (("bias", inputs.bias), ("teacher_bias", inputs.teacher_bias)):
        if bias is not None:
            raise ValueError(f"{NAME} takes no {name}: {OTHERS}")
    for name, side in (("softcap", options.student), ("teacher_softcap", options.teacher)):
        if side.softcap is not None:
            raise ValueError(f"{NAME} takes no {name}: {OTHERS}")
    device = inputs.x.device
    if device.type == "cuda" and not has_narrow_products(device, inputs.x.dtype):
        raise RuntimeError(f"{NAME} needs products of {inputs.x.dtype} with fp32 sums, which {device} lacks: {OTHERS}")


class DualProjection(Projection):
    """The source of E, D and statistics in place of logits."""

    def _plan(self, count: int, budget: int, casts: list[int], stride: int, rows: Rows) -> Plan:
        assert isinstance(rows, DualRows)
        self.rows = rows
        hidden = [h.shape[1] for h, _ in self.inputs.sides]
        chunk, self.kept = plan_dual(count, self.vocab, hidden, budget, rows.statistics_bytes, rows.trained)
        return Plan(chunk, tuple(casts))  # no head needs a cast

    def _buffers(self, stride: int) -> None:
        device = self.inputs.x.device
        self.e = torch.empty(self.chunk * self.kept, stride, dtype=torch.bfloat16, device=device)
        self.d = torch.empty(self.chunk, stride, dtype=torch.float16, device=device)
        self.statistics = torch.empty(self.rows.statistics_bytes // 4 * self.chunk, device=device)  # fp32
        self.first = 0  # the first token whose gradient dW lacks

    def logits(self, lo: int, hi: int) -> list[Tensor]:
        """E (C, V or more) in its place among the chunks that are kept, D, and the statistics (5 or 8, tiles, C)."""
        (x, w), (teacher_x, teacher_w) = (
            (take(hidden, self.keep, lo, hi), weight) for hidden, weight in self.inputs.sides
        )
        e, d = self.e[lo - self.first : hi - self.first], self.d[: hi - lo]
        tile, tiles = self.rows.tile, self.rows.tiles
        statistics = self.statistics.view(-1, tiles, self.chunk)
        blocks = -(-(hi - lo) // tile.rows) * tiles
        options = self.rows.options
        tile_kernel[(min(blocks, processors(x.device)),)](
            x, w, teacher_x, teacher_w, e, d, statistics, *x.stride(), *w.stride(), *teacher_x.stride(),
            *teacher_w.stride(), e.stride(0), self.chunk, tiles * self.chunk, hi - lo, self.vocab, x.shape[1],
            teacher_x.shape[1], *self.rows.inner, KIND=KINDS[options.kind], TOKENS=options.return_tokens,
            WIDE=INTERPRETED, **tile.constants(), **tile.options,
        )  # fmt: skip
        return [e, d, statistics]

    def gradients(self, g: Tensor, lo: int, hi: int) -> None:
        """g (C, V): rows lo:hi of dX = g W; dW += Gᵀ x for the gradients G of all chunks that were kept."""
        self.input_gradient(g, lo, hi)
        if self.dw is None:
            self.first = hi
        elif hi == self.count or hi - self.first == self.chunk * self.kept:
            kept = self.e.view(g.dtype)[: hi - self.first, : self.vocab]
            self.weight_gradient(kept, take(self.inputs.x, self.keep, self.first, hi), self.first, hi)
            self.first = hi

    def release(self) -> None:
        super().release()
        self.e = self.d = self.statistics = self.inputs.x.new_empty(0)


class DualRows:
    """The divergence of the student's rows from the teacher's, from what DualProjection makes."""

    sides = 2
    pad = GPU_PAD
    narrow = True
    row_bytes = 0

    def __init__(
        self,
        inputs: Inputs,
        options: Options,
        labels: Tensor | None,  # (N,)
        outputs: Outputs,
        keep: Tensor | None,  # indices of the rows that count, or None for all
        grads: Grads,
    ):
        self.inputs, self.options, self.labels, self.outputs, self.keep = inputs, options, labels, outputs, keep
        self.graded, self.trained = bool(grads), grads.w
        self.tile = tile_of(inputs.x.device)
        self.tiles = -(-options.vocab // self.tile.cols)  # of a row
        self.statistics_bytes = 4 * (8 if options.return_tokens else 5) * self.tiles  # of a token
        self.inner = [side.scale / side.temperature for side in (options.student, options.teacher)]

    def block_bytes(self, rows: int) -> int:
        return 0

    def run(self, logits: Sequence[Tensor], lo: int, hi: int, weights: Tensor | None, factor: float) -> Tensor:
        """As in call.Rows, but `logits` are E, D and statistics; the gradient takes the memory of E."""
        e, d, statistics = logits
        (x, w), (teacher_x, teacher_w) = self.inputs.sides
        g = e.view(x.dtype)
        outputs, options = self.outputs, self.options
        tokens = options.return_tokens
        tiles_row_kernel[(hi - lo,)](
            e, d, g, statistics, x, w, teacher_x, teacher_w, weights, self.labels, self.keep,
            outputs.divergence, *outputs.rest, None if outputs.agree is None else outputs.agree.view(torch.int8),
            *x.stride(), *w.stride(), *teacher_x.stride(), *teacher_w.stride(), e.stride(0), statistics.shape[2],
            statistics.stride(0), options.vocab, x.shape[1], teacher_x.shape[1], lo, *self.inner, factor,
            FP16_MAX if g.dtype == torch.float16 else float("inf"),
            KIND=KINDS[options.kind], GRAD=self.graded, TOKENS=tokens, LABELS=tokens and self.labels is not None,
            WEIGHTS=weights is not None, INDEX=self.keep is not None, ROUND=INTERPRETED and g.dtype == torch.bfloat16,
            TILES=min(DUAL_MERGED, 1 << (self.tiles - 1).bit_length()), BN=self.tile.cols,
            BLOCK=max(DUAL_ROW_BLOCK, self.tile.cols), num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        return g[:, : options.vocab]


def tile_of(device: torch.device) -> DualTile:
    return dual_tile(torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0)


def processors(device: torch.device) -> int:
    """Programs of tile_kernel: one for each multiprocessor; a few in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
