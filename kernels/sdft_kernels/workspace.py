"""How much memory a call may take, and how many tokens go into a chunk: arithmetic on sizes, which needs no device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

CPU_BYTES = 256 * 2**20
DEVICE_SHARE = 64
GPU_PAD = 64  # entries: every row of logits starts on a 16-byte boundary in every dtype
ROW_MULTIPLE = 128  # of the tokens in a chunk: whole tiles in every product
FEW_ROWS = 512  # in a chunk below this, the 64 tokens that a multiple of 128 may lose weigh more than half a tile

MOST_KEPT = 4  # chunks whose gradients stay for one product dW
RIDGE = 266  # FLOPs of a bf16 product in the time of a byte of memory, on an H100


class Plan(NamedTuple):
    """How a call of some rows divides its workspace."""

    chunk: int  # tokens of a chunk; the last chunk may have fewer
    casts: tuple[int, ...]  # bytes for each head that needs a cast: the whole head, or a tile of it in a shared buffer


def default_workspace(device_memory: int | None) -> int:
    """Bytes: a 64th of the device's memory (1.25 GiB of 80 GiB, 256 MiB of 16 GiB); None, a CPU: 256 MiB."""
    return CPU_BYTES if device_memory is None else device_memory // DEVICE_SHARE


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory; None for any other device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def plan_linear(
    rows: int,
    vocab: int,
    hidden: Sequence[int],
    budget: int,
    casts: Sequence[int] = (),
    *,
    item: int = 4,
    pad: int = GPU_PAD,
    extra: int = 0,
    other: int = 0,
    tile: int | None = None,
) -> Plan:
    """plan_workspace for hidden states and heads: chunks of logits, hidden states and dX.

    hidden: hidden size of each side with logits, the student's first. item: bytes of a logit. pad: entries; a row of
    logits takes a multiple of them. extra: further bytes of each token in a chunk.
    """
    stride = -(-vocab // pad) * pad
    row_bytes = item * (len(hidden) * stride + sum(hidden) + 2 * hidden[0]) + extra
    return plan_workspace(rows, row_bytes, budget, casts, other, tile)


def plan_dual(
    rows: int, vocab: int, hidden: Sequence[int], budget: int, statistics: int, trained: bool
) -> tuple[int, int]:
    """For impl="triton_dual": the tokens of a chunk, and the chunks whose gradients are kept for one product dW.

    A chunk takes 2 bytes an entry for D, and every chunk that is kept 2 for E and the gradient. hidden: hidden size of
    the student, and of the teacher. statistics: bytes of a token.

    With more chunks kept, fewer tokens fit into each. The number is the best for an H100: a product takes the longer of
    its FLOPs and its bytes; in each chunk the heads are read (6 bytes an entry for 6 FLOPs a token), and for each dW
    its accumulator is read and written (8 bytes for 2 FLOPs a token).
    """
    stride = -(-vocab // GPU_PAD) * GPU_PAD
    plans = []
    for kept in range(1, (MOST_KEPT if trained else 1) + 1):
        other = 2 * sum(hidden) + (2 * kept + 4) * hidden[0] + statistics
        chunk = chunk_rows(rows, 2 * stride * (1 + kept) + other, budget)
        plans.append((chunk, min(kept, -(-max(1, rows) // chunk))))
    return min(plans, key=lambda plan: max(6, 6 * RIDGE / plan[0]) + max(2, 8 * RIDGE / (plan[0] * plan[1])))


def plan_workspace(
    rows: int, row_bytes: int, budget: int, casts: Sequence[int] = (), other: int = 0, tile: int | None = None
) -> Plan:
    """Divide `budget` bytes between casts of heads, `other` fixed bytes, and chunks of the `rows` tokens.

    row_bytes: of one token in a chunk (logits of all sides, hidden states, dX). casts: bytes of each head in the dtype
    of its products, if the head has another dtype, the student's first. tile: bytes of a tile; None is an eighth of the
    budget.

    A head is cast once a call if there is room and that moves the fewest bytes (a kept cast leaves fewer tokens to a
    chunk). Otherwise every product of every chunk casts the head again, a tile at a time.
    """
    tile = budget // 8 if tile is None else min(tile, budget // 8)
    plans = []
    for kept in range(len(casts) + 1):
        sizes = tuple(whole if i < kept else min(whole, tile) for i, whole in enumerate(casts))
        held = sum(size for size, whole in zip(sizes, casts, strict=True) if size == whole)
        shared = max((size for size, whole in zip(sizes, casts, strict=True) if size < whole), default=0)
        left = budget - held - shared - other
        if kept == 0 or left >= row_bytes:
            plans.append(Plan(chunk_rows(rows, row_bytes, left), sizes))
    return min(plans, key=lambda plan: _head_traffic(plan, casts, rows))


def _head_traffic(plan: Plan, casts: Sequence[int], rows: int) -> int:
    """Bytes moved for fp32 heads and bf16 products: casts, reads by the products, and dW's fp32 accumulator."""
    chunks = -(-max(1, rows) // plan.chunk)
    moved = 7 * chunks * max(casts, default=0)  # 3 reads of 2 bytes an entry and 8 bytes of dW, each chunk
    for size, whole, products in zip(plan.casts, casts, (2, 1), strict=False):  # logits and dX; the teacher's logits
        moved += 3 * whole * (1 if size == whole else products * chunks)  # 4 bytes an entry read and 2 written
    return moved


def chunk_rows(rows: int, row_bytes: int, budget: int) -> int:
    """Tokens of a chunk: as many as fit, in chunks of about one size.

    A multiple of 128 from 512 tokens on, of 64 below, and a power of two below 64.
    """
    rows = max(1, rows)
    most = max(1, budget // max(1, row_bytes))
    if rows <= most:
        return rows
    multiple = ROW_MULTIPLE if most >= FEW_ROWS else min(ROW_MULTIPLE // 2, 1 << (most.bit_length() - 1))
    most -= most % multiple
    even = -(-rows // -(-rows // most))
    return min(rows, -(-even // multiple) * multiple)
