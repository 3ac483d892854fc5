"""Block sizes and warps of every Triton kernel, per class of device: the whole of our autotuning.

Chosen by compiled resources (bench/resources.py: no spills, registers that leave enough warps per
multiprocessor), NOT YET by time on a GPU. bench/gpu.py --sweep is the measurement that would overrule them.
"""

from typing import NamedTuple

import torch


class RowBlocks(NamedTuple):
    """Of row_kernel: vocabulary entries per tile, and warps per row."""

    block: int
    warps: int
    heavy_warps: int  # with a bias or a softcap, whose registers would spill otherwise


ROW_BLOCKS = {
    "sm_80": RowBlocks(2048, 4, 8),
    "sm_90": RowBlocks(2048, 4, 8),
    "sm_100": RowBlocks(2048, 4, 8),
    "gfx942": RowBlocks(4096, 8, 8),
}


def device_class(device: torch.device) -> str:
    """The row of the tables for a device; the nearest one below for a device without a row of its own."""
    if torch.version.hip is not None:
        return "gfx942"
    if device.type != "cuda":  # the interpreter
        return "sm_90"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def row_blocks(target: str, vocab: int, heavy: bool) -> tuple[int, int]:
    """(entries per tile, warps) for rows of `vocab` entries on a device class; no tile is longer than the row needs."""
    row = ROW_BLOCKS[target]
    warps = row.heavy_warps if heavy else row.warps
    need = max(32, 1 << (vocab - 1).bit_length())
    return (row.block, warps) if need >= row.block else (need, max(1, min(warps, need // 256)))
