"""Block sizes and warps of every Triton kernel, from what a device has: the whole of our autotuning.

Chosen by compiled resources (bench/resources.py: no spills, registers that leave enough warps per
multiprocessor), NOT YET by time on a GPU. bench/gpu.py --sweep is the measurement that would overrule them.
"""

from functools import cache
from typing import NamedTuple

import torch


class Limits(NamedTuple):
    """What of a device a tile depends on."""

    warp_size: int  # threads


class RowBlocks(NamedTuple):
    """Of row_kernel: vocabulary entries per tile, and warps per row."""

    block: int
    warps: int
    heavy_warps: int  # with a bias or a softcap, whose registers would spill otherwise


class RowTile(NamedTuple):
    """A tile of row_kernel: entries, warps, threads, and entries that a thread reads at once."""

    block: int
    warps: int
    threads: int
    each: int
    options: dict[str, int | bool]  # of the compiler


# By threads of a warp: 16 entries a thread, 8 with a bias or a softcap. Rows need next to no shared memory, and every
# GPU with warps of 32 that Triton compiles for has 65536 registers.
ROW_BLOCKS = {32: RowBlocks(2048, 4, 8), 64: RowBlocks(4096, 8, 8)}
INTERPRETER = Limits(32)
HEAVY_REGISTERS = 80  # of a thread, for 24 warps a multiprocessor; left to itself ptxas 12.9 takes 64 and spills
VECTOR_BYTES = 16  # of the widest access of a thread


@cache
def limits_of(device: torch.device) -> Limits:
    """The limits of a device; NVIDIA's for the interpreter, which has none."""
    if device.type != "cuda":
        return INTERPRETER
    return Limits(torch.cuda.get_device_properties(device).warp_size)


def row_tile(limits: Limits, vocab: int, heavy: bool, item_bytes: int) -> RowTile:
    """For rows of `vocab` logits; no tile is longer than the row needs.

    `item_bytes` is an entry's size in the narrowest tensor read: Triton gives a thread 16 bytes of that one, and tiles
    laid out otherwise would have to be exchanged between threads.
    """
    row = ROW_BLOCKS[limits.warp_size]
    block, warps = row.block, row.heavy_warps if heavy else row.warps
    need = max(32, 1 << (vocab - 1).bit_length())
    if need < block:
        block, warps = need, max(1, min(warps, need // 256))
    each = VECTOR_BYTES // item_bytes
    options: dict[str, int | bool] = {"num_warps": warps, "enable_fp_fusion": True}
    if heavy and limits.warp_size == 32:  # an option of NVIDIA's compiler alone
        options["maxnreg"] = HEAVY_REGISTERS
    return RowTile(block, warps, min(warps * limits.warp_size, block // each), each, options)
