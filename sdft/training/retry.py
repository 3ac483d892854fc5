"""A second attempt, with less at a time, at work that ran out of memory."""

from collections.abc import Callable
from typing import TypeVar

import torch

from sdft import parallel
from sdft.errors import SdftError, first_line

T = TypeVar("T")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # PyTorch's CPU allocator


def retry_with_less(
    device: torch.device,
    name: str,
    work: Callable[[], T],
    shrink: Callable[[], str],
    advise: Callable[[], str],
) -> T:
    """The result of work(). If memory runs out: shrink(), then work() again with the same random numbers.

    name: of the work, for messages. shrink: makes the work smaller, drops what the failed attempt left behind, and
    returns the setting that it changed, in words. advise: what else to change, in words. Raises SdftError with that
    advice if memory runs out again.
    """
    cuda = device.type == "cuda"
    draws = torch.get_rng_state()
    cuda_draws = torch.cuda.get_rng_state(device) if cuda else draws
    first = ""
    for _ in range(2):
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            if first:
                break
            first = first_line(error)
        # Outside the handler: the error's traceback holds what the failed attempt had allocated.
        parallel.report(f"{name}: out of memory ({first}); once more with {shrink()}.")
        torch.set_rng_state(draws)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.set_rng_state(cuda_draws, device)
    raise SdftError(
        f"{name}: out of memory also in halves ({first}). {advise()} The newest checkpoint is whole: resume from it "
        "with train.resume = true (--resume)"
    )
