"""Block sizes and warps of every Triton kernel, per class of device: the whole of our autotuning.

Chosen by compiled resources (bench/resources.py: no spills, registers that leave enough warps per
multiprocessor), NOT YET by time on a GPU. bench/gpu.py --sweep is the measurement that would overrule them.
"""

from typing import NamedTuple

import torch

from .checks import Options


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


class TileBlocks(NamedTuple):
    """Of no_logits: tokens and vocabulary entries of a tile, hidden entries per step of its sums and of its use."""

    rows: int
    vocab: int
    hidden: int
    out: int
    warps: int
    stages: int


# For reverse KL without a softcap, and for all else, which keeps more values in registers.
TILE_BLOCKS = {
    "sm_80": (TileBlocks(128, 64, 32, 32, 8, 3), TileBlocks(128, 64, 32, 32, 8, 3)),
    "sm_90": (TileBlocks(128, 128, 64, 64, 8, 3), TileBlocks(128, 64, 64, 64, 8, 4)),
    "sm_100": (TileBlocks(128, 128, 64, 64, 8, 3), TileBlocks(128, 64, 64, 64, 8, 4)),
    "gfx942": (TileBlocks(128, 64, 32, 32, 8, 2), TileBlocks(128, 64, 32, 32, 8, 2)),
}
TILE_BLOCKS_FP32 = TileBlocks(64, 64, 16, 32, 8, 2)  # every device: no tensor cores multiply fp32 exactly


def tile_blocks(device: torch.device, options: Options, itemsize: int) -> TileBlocks:
    """For operands of `itemsize` bytes."""
    if itemsize == 4:
        return TILE_BLOCKS_FP32
    capped = options.student.softcap is not None or options.teacher.softcap is not None
    return TILE_BLOCKS[device_class(device)][options.kind != "reverse_kl" or capped]


def splits_of(device: torch.device, row_blocks: int) -> int:
    """Ranges of the vocabulary that fill a device about eight times over, so that the last wave costs little."""
    if device.type != "cuda":
        return 2
    return -(-8 * torch.cuda.get_device_properties(device).multi_processor_count // row_blocks)
