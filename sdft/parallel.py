"""The processes ("ranks") that train together, as one place for sums over them and for work that one of them does.

With one process, every function returns what it was given and calls nothing of torch.distributed. This module opens
no process group: whoever starts several processes (torchrun) does.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank, from 0; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the one process that prints and writes files."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's items of a list that is the same on all ranks: every world-size-th, from the number of the rank."""
    return items[rank() :: world_size()] if world_size() > 1 else items


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, which have one shape and dtype; a new tensor if there are several ranks."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def sum_counts(counts: Sequence[int], device: torch.device) -> list[int]:
    """The sums of all ranks' counts, place by place. device: one that the process group can send from."""
    if world_size() == 1:
        return list(counts)
    return [int(n) for n in sum_over_ranks(torch.tensor(counts, device=device, dtype=torch.int64)).tolist()]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on one rank at least."""
    return sum_counts([flag], device)[0] > 0


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be a DTensor (parts on several ranks); a plain tensor unchanged."""
    if world_size() == 1:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def barrier() -> None:
    """Waits until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def report(text: str) -> None:
    """Prints a line, on the main process only."""
    if is_main():
        print(text, flush=True)
