"""The machine of the proof: versions, the rate of one product and of one copy, installed packages."""

import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sdft_kernels import tuning

from ..measure import Cpu, Cuda
from ..report import describe
from .phase import Item, Place, Row

# Packages that the phases import. If one is missing, its rows get a note; `make wheels` downloads most of them.
MODULES = (
    "triton", "transformers", "huggingface_hub", "httpx", "peft", "accelerate", "safetensors", "datasets", "tomli_w",
    "trl", "liger_kernel", "fla", "matplotlib",
)  # fmt: skip
REPEATS, WARM_UP = 10, 3


def items(place: Place) -> list[Item]:
    return [
        Item("versions", partial(versions, place)),
        Item("rates", partial(rates, place)),
        Item("packages", packages),
    ]


def device_for(place: Place) -> Cpu | Cuda:
    return Cuda() if place.device == "cuda" else Cpu()


def versions(place: Place, rows: list[Row]) -> None:
    rows.append(describe("python -m bench.proof"))
    if place.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        rows[-1] |= {
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "cluster": tuning.limits_of(torch.device("cuda", 0)).cluster,
        }


def rates(place: Place, rows: list[Row]) -> None:
    """FLOP/s of a square product of random matrices; bytes/s, read and written together, of a copy."""
    clock = device_for(place)
    size = 256 if place.tiny else 8192
    for dtype in (torch.bfloat16, torch.float32):
        n = size if dtype == torch.bfloat16 else size // 2
        a, b = (torch.randn(n, n, device=place.device).to(dtype) for _ in range(2))
        ms = median(clock, partial(torch.mm, a, b))
        rows.append({"what": f"{dtype} {n}^3".removeprefix("torch."), "ms": ms, "TFLOP/s": 2e-9 * n**3 / ms})
    source = torch.randn(2**20 if place.tiny else 2**30, device=place.device)
    target = torch.empty_like(source)
    ms = median(clock, partial(target.copy_, source))
    rows.append({"what": f"copy of {source.nbytes / 1e9:.2g} GB", "ms": ms, "TB/s": 2e-9 * source.nbytes / ms})


def median(clock: Cpu | Cuda, run: Callable[[], Any]) -> float:
    """Milliseconds of a run, after warm-up; fewer runs on a CPU, which runs only the tiny program."""
    warm_up, repeats = (WARM_UP, REPEATS) if clock.name == "cuda" else (1, 3)
    for _ in range(warm_up):
        run()
    return statistics.median(clock.milliseconds(run) for _ in range(repeats))


def packages(rows: list[Row]) -> None:
    for module in MODULES:
        found = importlib.util.find_spec(module) is not None
        names = importlib.metadata.packages_distributions().get(module, [module]) if found else []
        rows.append({"what": module, "version": importlib.metadata.version(names[0]) if names else "missing"})
