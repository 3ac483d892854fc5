"""The machine of a run, and what it holds that no tensor shows: contexts, libraries, compiled kernels."""

import importlib
import os
import re
from dataclasses import dataclass

import torch

from sdft.config import Config, ModelConfig
from sdft.device import CACHED_KERNELS, has_fast_bf16, resident_bytes, return_freed
from sdft.errors import SdftError, first_line

GIB, MIB = 2**30, 2**20
CUDA_CONTEXT = 500 * MIB  # of a process on the GPU before its first tensor: 300 to 550 MiB on recent drivers
CUBLAS_WORKSPACE = 32 * MIB  # PyTorch's default on Hopper; 8 MiB on earlier GPUs
FRAGMENTATION = 0.05  # of the tensors on a GPU, for what PyTorch's caching allocator rounds up or cannot reuse: assumed
# Bytes of the code that oneDNN compiles for one shape of a bf16 product on a CPU with AMX: measured 0.57 to 0.96 MiB by
# shape. In fp32 it is a twentieth.
KERNEL = 7 * MIB // 10
# What `sdft train` imports before it loads a weight. planning does not import the trainer, so the list stands here;
# tests/planning/test_machine.py compares it with the trainer's imports.
LIBRARIES = ("transformers.modeling_utils", "transformers.generation.utils", "datasets", "sdft.loss")


@dataclass(frozen=True)
class Machine:
    """Where a run takes place."""

    kind: str  # cuda, cpu, ...
    memory: int  # bytes of the device
    runtime: int  # bytes that are taken before the first tensor
    slack: float = 0.0  # what the allocator adds to the tensors, as a fraction
    bf16: bool = True  # whether it multiplies bf16 fast

    @property
    def kernels_bf16(self) -> int:
        """Bytes of oneDNN's compiled bf16 products: a few steps of different lengths fill its cache."""
        return CACHED_KERNELS * KERNEL if self.kind == "cpu" else 0


def this_machine(config: Config, memory: int = 0) -> Machine:
    """The machine that a run of this config would use.

    memory: bytes of its device; 0 takes the device that is here. Raises SdftError for a device that torch does not
    know, and for a GPU if its size is not given and there is no GPU here.
    """
    kind = config.model.device.split(":")[0]
    try:
        torch.device("cpu" if config.model.device == "auto" else config.model.device)
    except RuntimeError as error:
        raise SdftError(f"model.device = {config.model.device!r} cannot be used: {first_line(error)}") from None
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        bf16 = True
        if torch.cuda.is_available():
            bf16 = has_fast_bf16(torch.device("cuda"))
            index = torch.device(config.model.device if config.model.device != "auto" else "cuda").index
            memory = memory or torch.cuda.get_device_properties(index or 0).total_memory
        if not memory:
            raise SdftError(
                "model.device = 'cuda', but there is no GPU here; give its size: memory = '24GB' (--memory 24GB)"
            )
        return Machine(kind, memory, CUDA_CONTEXT + CUBLAS_WORKSPACE, FRAGMENTATION, bf16)
    memory = memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(kind, memory, process_size(config), 0.0, has_fast_bf16(torch.device(kind)))


def compute_dtype(config: ModelConfig, machine: Machine) -> torch.dtype:
    """The dtype of matrix products on the machine, as the trainer would choose it there."""
    if config.compute_dtype == "bfloat16" or config.weights_dtype == "bfloat16":
        return torch.bfloat16
    return torch.bfloat16 if config.compute_dtype == "auto" and machine.bf16 else torch.float32


def process_size(config: Config) -> int:
    """Resident bytes of this process with the libraries of a run, before any weight."""
    for library in (*LIBRARIES, *(("peft",) if config.lora.rank else ())):
        importlib.import_module(library)
    dtype = torch.float32 if config.model.compute_dtype == "float32" else torch.bfloat16
    x = torch.ones(64, 64, dtype=dtype, requires_grad=True)
    (x @ x).float().sum().backward()  # loads the libraries that multiply
    return_freed(x.device)
    return resident_bytes()


def parse_size(text: str) -> int:
    """ "12GB", "12 GiB", "900MB" -> bytes. GB is read as GiB, as the makers of GPUs use it."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)i?b?\s*", text.lower())
    try:
        size = float(found[1]) if found else 0.0
    except ValueError:
        size = 0.0
    if not found or size <= 0:
        raise SdftError(f"memory = {text!r} (--memory) is not a size; write it like 12GB or 900MB")
    return int(size * 1024 ** (" kmgt".index(found[2] or " ")))
