"""Where memory runs short: what is free goes back to the system, and a step that did not fit is run again in halves."""

import ctypes
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdft.errors import SdftError, first_line

T = TypeVar("T")
KERNELS = 64  # that oneDNN keeps; a step's distinct products at one time are fewer
# Of freed blocks in a forward pass, the last after its last block, and in its backward pass, the first before it; what
# is given back must be faulted in again.
RETURNS = (2, 6)
# oneDNN's own cache, and the one of PyTorch's layer above it (ideep), whose every entry holds its product's too.
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def settle() -> None:
    """Settings of the process that keep memory from growing with the steps; call it before the first product.

    oneDNN keeps the code it makes for each shape of a product, 1024 of them by default, and PyTorch keeps 1024 of its
    descriptions. Steps rarely repeat a shape: 0.4 GB after 15 steps of SmolLM2, and 8 MB more with each.
    """
    for cache in CACHES:
        os.environ.setdefault(cache, str(KERNELS))


def return_freed(device: torch.device) -> None:
    """Gives what glibc holds of freed blocks back to the system, where tensors live in its heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # musl has none
    if device.type == "cpu" and trim is not None:
        trim(0)


def return_freed_within(lm: nn.Module, device: torch.device) -> None:
    """return_freed a few times (RETURNS) in every forward pass that keeps activations, and in its backward pass.

    Tensors that a block frees lie between those it keeps, and glibc's heap grows around the holes: 8% of the peak of
    SmolLM2's full fine-tuning, 10% with LoRA.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    def give_back(*_: Any) -> None:
        return_freed(device)

    def after(forward: bool, backward: bool, block: nn.Module, args: Any, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output  # (B, T, H)
        if hidden.requires_grad:
            if forward:
                give_back()
            if backward:
                hidden.register_hook(give_back)

    blocks = [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer)] if device.type == "cpu" else []
    forward, backward = ({len(blocks) * i // n for i in range(1, n + 1)} for n in RETURNS)
    for i, block in enumerate(blocks, start=1):
        if i in forward | backward:
            block.register_forward_hook(partial(after, i in forward, i in backward))


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # PyTorch's CPU allocator


def within(
    device: torch.device, what: str, work: Callable[[], T], shrink: Callable[[], str], advise: Callable[[], str]
) -> T:
    """work(); where memory runs out, shrink() and work() once more, with the same random numbers.

    what: names the work in messages. shrink: makes the work smaller, drops what the failed attempt left behind, and
    says what it did. Raises SdftError where memory runs out again, with what advise() says.
    """
    cuda = device.type == "cuda"
    draws = torch.get_rng_state()
    cuda_draws = torch.cuda.get_rng_state(device) if cuda else draws
    told = ""
    for _ in range(2):
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            if told:
                break
            told = first_line(error)
        # Out of the handler: the error's traceback holds on to what the failed attempt had allocated.
        print(f"{what}: out of memory ({told}); once more with {shrink()}.", flush=True)
        torch.set_rng_state(draws)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.set_rng_state(cuda_draws, device)
    raise SdftError(
        f"{what}: out of memory also in halves ({told}). {advise()} The newest checkpoint is whole: --resume goes on "
        "from it"
    )
