"""Block sizes and warps of every Triton kernel, by the properties of the device. There is no other tuning.

They were chosen by compiled resources (bench/resources.py: no spills, registers that leave enough warps per
multiprocessor), NOT YET by time on a GPU: `make gpu-proof` times other tiles.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton


class Limits(NamedTuple):
    """The properties of a device that a tile depends on."""

    warp_size: int  # threads
    cluster: int  # the most thread blocks that exchange data on chip; 1 without clusters


class RowBlocks(NamedTuple):
    """For row_kernel: vocabulary entries per tile, and warps per row."""

    block: int
    warps: int
    heavy_warps: int  # with a bias or a softcap, whose registers would spill otherwise


class RowTile(NamedTuple):
    """A tile of row_kernel: entries, threads, entries that a thread reads at once, and options of the compiler."""

    block: int
    threads: int
    each: int
    options: dict[str, int | bool]

    def constants(self) -> dict[str, int]:
        return {"BLOCK": self.block, "THREADS": self.threads, "EACH": self.each}


class OnChip(NamedTuple):
    """A way to hold a row on chip: thread blocks of a cluster, warps of each, and tiles that their registers hold."""

    blocks: int
    warps: int
    pieces: int


class OnChipTile(NamedTuple):
    """A row on chip as `pieces` tiles; the rest as in RowTile, with the threads of each of the cluster's blocks."""

    block: int
    pieces: int
    blocks: int
    threads: int
    each: int
    options: dict[str, int | bool]

    def constants(self) -> dict[str, int]:
        lanes = {"CTAS": self.blocks, "THREADS": self.threads, "EACH": self.each}
        return {"BLOCK": self.block, "PIECES": self.pieces, **lanes}


class DualTile(NamedTuple):
    """For dual_kernels.tile_kernel: tokens, vocabulary entries, and entries of the hidden size that meet at a time."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        return {"BM": self.rows, "BN": self.cols, "BK": self.depth}

    @property
    def options(self) -> dict[str, int | bool]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# By threads of a warp: 16 entries a thread, 8 with a bias or a softcap. Rows need next to no shared memory, and every
# GPU with warps of 32 that Triton compiles for has 65536 registers.
ROW_BLOCKS = {32: RowBlocks(2048, 4, 8), 64: RowBlocks(4096, 8, 8)}
INTERPRETER = Limits(warp_size=32, cluster=1)
# The first that a row fits is taken. Small clusters wait least; two blocks of 8 warps share a multiprocessor, so that
# one loads while the other computes. More pieces spill.
KL_ON_CHIP = (OnChip(8, 8, 3), OnChip(16, 8, 3), OnChip(16, 16, 3))
JSD_ON_CHIP = (OnChip(8, 16, 2), OnChip(16, 16, 2))
ON_CHIP_EACH = 8  # entries of a piece in one thread
ON_CHIP_REGISTERS = 128  # of a thread, for 16 warps a multiprocessor
SMALLEST_ON_CHIP = 16384  # entries of a row; a shorter one leaves most threads of a cluster without work
WHOLE_GPU = 132  # multiprocessors of an H100 SXM; an H20 has 78, an H100 PCIe 114
# Reductions across a cluster: Triton 3.6 and 3.7 stop with a compiler error.
CLUSTERS_SINCE = (3, 8)
HEAVY_REGISTERS = 80  # of a thread, for 24 warps a multiprocessor; left to itself ptxas 12.9 takes 64 and spills
UNALIGNED_REGISTERS = 112  # for 16 warps; an address for every entry
VECTOR_BYTES = 16  # of the widest access of a thread

# Hopper and large Blackwell GPUs, by compute capability: their products read both operands from shared memory, 96 KiB
# here. Elsewhere operands pass through registers, and 24 KiB fit any GPU. With 128 x 128 entries every variant spills.
DUAL_TILES = dict.fromkeys((9, 10), DualTile(128, 64, 64, 8, 4))
ANY_DUAL_TILE = DualTile(128, 64, 32, 8, 3)
DUAL_MERGED = 512  # tiles that tiles_row_kernel merges at a time, by 8 warps
DUAL_ROW_BLOCK = 2048  # entries of which it makes the gradient at a time


@cache
def limits_of(device: torch.device) -> Limits:
    """The limits of a device; for the interpreter those of an NVIDIA GPU before Hopper."""
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    # Hopper and large Blackwell GPUs; RTX 50 has clusters of one block only. A cluster lies in one group of
    # multiprocessors, and groups of at least 16 are sure only if few multiprocessors are switched off.
    clusters = torch.version.hip is None and found.major in (9, 10) and version >= CLUSTERS_SINCE
    largest = 16 if found.multi_processor_count >= WHOLE_GPU else 8
    return Limits(found.warp_size, largest if clusters else 1)


def dual_tile(major: int) -> DualTile:
    """The tile of both sides' logits for a GPU of that compute capability."""
    return DUAL_TILES.get(major, ANY_DUAL_TILE)


def row_tile(limits: Limits, vocab: int, heavy: bool, each: int) -> RowTile:
    """The tile for rows of `vocab` logits; no tile is longer than the row needs.

    `each` is the most entries that one access of a thread has in any tensor read or written: Triton lays all tiles out
    for that one, and statistics kept for another layout would be exchanged between threads.
    """
    row = ROW_BLOCKS[limits.warp_size]
    block, warps = row.block, row.heavy_warps if heavy else row.warps
    need = max(32, 1 << (vocab - 1).bit_length())
    if need < block:
        block, warps = need, max(1, min(warps, need // 256))
    each = min(each, block)
    options: dict[str, int | bool] = {"num_warps": warps, "enable_fp_fusion": True}
    if limits.warp_size == 32 and (heavy or each == 1):  # an option of NVIDIA's compiler alone
        options["maxnreg"] = HEAVY_REGISTERS if heavy else UNALIGNED_REGISTERS
    return RowTile(block, min(warps * limits.warp_size, block // each), each, options)


def on_chip_tile(limits: Limits, vocab: int, kind: str, each: int) -> OnChipTile | None:
    """How a cluster holds a row of `vocab` logits, or None if there are no clusters or the row does not fit."""
    if vocab < SMALLEST_ON_CHIP:
        return None
    for way in JSD_ON_CHIP if kind == "jsd" else KL_ON_CHIP:
        threads = way.warps * limits.warp_size
        block = way.blocks * threads * ON_CHIP_EACH
        pieces = -(-vocab // block)
        if way.blocks <= limits.cluster and pieces <= way.pieces:
            options: dict[str, int | bool] = {"num_ctas": way.blocks, "num_warps": way.warps, "enable_fp_fusion": True}
            options["maxnreg"] = ON_CHIP_REGISTERS
            return OnChipTile(block, pieces, way.blocks, threads, each, options)
    return None
