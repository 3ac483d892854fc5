"""Where memory runs short: freed memory goes back to the system, and a step that did not fit is run again in halves."""

import ctypes
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from sdft import SdftError

T = TypeVar("T")

# glibc's mallopt parameters, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def return_freed() -> None:
    """Has glibc give freed blocks of a MiB or more back to the system at once; does nothing elsewhere.

    By default its threshold grows with the blocks it sees, up to 32 MiB. As the shapes of a step change, smaller ones
    then stay behind in the heap: after 100 steps of SmolLM2 a third more memory was resident than in use.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)
        mallopt(M_TRIM_THRESHOLD, 2**20)


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # PyTorch's CPU allocator


def within(device: torch.device, what: str, work: Callable[[], T], shrink: Callable[[], str]) -> T:
    """work(); where memory runs out, shrink() and work() once more, with the same random numbers.

    what: names the work in messages. shrink: makes the work smaller, drops what the failed attempt left behind, and
    says what it did. Raises SdftError where memory runs out again.
    """
    cuda = device.type == "cuda"
    draws = torch.get_rng_state()
    cuda_draws = torch.cuda.get_rng_state(device) if cuda else draws
    for last in (False, True):
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            told = next(iter(str(error).splitlines()), "") or type(error).__name__
            if last:
                raise SdftError(
                    f"{what}: out of memory also in halves ({told}); `sdft plan CONFIG.toml` shows what takes it and "
                    "what would fit. The newest checkpoint is whole: --resume goes on from it"
                ) from None
        # Out of the handler: the error's traceback holds on to what the failed attempt had allocated.
        print(f"{what}: out of memory ({told}); once more with {shrink()}.", flush=True)
        torch.set_rng_state(draws)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.set_rng_state(cuda_draws, device)
    raise AssertionError
