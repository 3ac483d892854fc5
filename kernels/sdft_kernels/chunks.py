"""Shared by every loop: sizes, row selection, and per-row outputs.

N rows of a call, C of them per chunk, R per block, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import Options, TokenStats
from .workspace import default_workspace, device_memory

CACHE_BYTES = 3 * 2**19  # logits and scratch of one block per CPU thread: they stay in a core's 2 MiB of cache
ALL_ROWS = 2**62
BLOCK_BYTES = 64 * 2**20  # of scratch on other devices, on which many small launches would cost more than the traffic


def power_of_two_below(value: int) -> int:
    """The largest power of two <= value, at least 1."""
    return 1 << max(0, value.bit_length() - 1)


def budget_of(options: Options, device: torch.device) -> int:
    """Workspace bytes of one call."""
    return default_workspace(device_memory(device)) if options.chunk_bytes is None else options.chunk_bytes


def block_rows(options: Options, sides: int, planes: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows per elementwise block of `sides` logits and `planes` scratch, the scratch within a quarter of the budget."""
    row_bytes = options.vocab * dtype.itemsize
    most = power_of_two_below(budget_of(options, device) // (4 * max(1, planes) * row_bytes))
    if device.type != "cpu":
        if planes == 0:
            return ALL_ROWS
        return min(most, power_of_two_below(BLOCK_BYTES // (2 * row_bytes)))
    threads = torch.get_num_threads()
    return min(most, threads * max(1, CACHE_BYTES // ((sides + planes) * row_bytes)))


def live_rows(weights: Tensor | None) -> Tensor | None:
    """Indices of the rows with a nonzero weight, or None for all of them.

    Counting them makes the host wait for the weights; in return no product computes the other rows.
    """
    if weights is None:
        return None
    index = weights.nonzero().squeeze(1)
    return None if index.numel() == weights.numel() else index


def take(tensor: Tensor, index: Tensor | None, lo: int, hi: int) -> Tensor:
    """Rows lo:hi of tensor, or of its rows at index."""
    return tensor[lo:hi] if index is None else tensor.index_select(0, index[lo:hi])


def put(out: Tensor, index: Tensor | None, lo: int, hi: int, value: Tensor) -> None:
    """The inverse of take, into out."""
    if index is None:
        out[lo:hi].copy_(value)
    else:
        out.index_copy_(0, index[lo:hi], value.to(out.dtype))


def clear_untouched(into: Tensor | None, rows: int, vocab: int, keep: Tensor | None) -> None:
    """Set to zero what no chunk writes: padded columns, and rows of weight zero."""
    if into is None:
        return
    into[:, vocab:].zero_()
    if keep is not None:
        gone = torch.ones(rows, dtype=torch.bool, device=into.device)
        gone[keep] = False
        into.masked_fill_(gone.unsqueeze(1), 0.0)


class Outputs:
    """Per-row results of N tokens, filled block by block."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device, tokens: bool, labels: bool):
        def new(wanted: bool = True, kind: torch.dtype = dtype) -> Tensor | None:
            return torch.zeros(rows, dtype=kind, device=device) if wanted else None

        self.divergence = torch.zeros(rows, dtype=dtype, device=device)
        self.rest = (new(tokens), new(tokens), new(tokens and labels), new(tokens and labels))
        self.agree = new(tokens, torch.bool)

    def tokens(self) -> TokenStats | None:
        if self.agree is None:
            return None
        return TokenStats(self.divergence, *self.rest, self.agree)  # type: ignore[arg-type]


def blocks(rows: int, size: int) -> Iterator[tuple[int, int]]:
    """(lo, hi) ranges of at most size rows."""
    for lo in range(0, rows, size):
        yield lo, min(lo + size, rows)
