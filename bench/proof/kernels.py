"""One call by kernel: the time of each kernel, and of each phase of bench/costs.py with its rates.

The products are told apart by their shapes, which the profiler records: (C, H)(H, V) makes logits, (V, C)(C, H) dW,
(C, V)(V, H) dX. Kernels of other torch operators are `copies`; the rest are the Triton kernels of the loss, `rows`.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from sdft_kernels import tuning
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..cases import Case, Problem
from ..peers import ours
from .check import CANDIDATES
from .machine import device_for, median
from .phase import Item, Place, Row

TOKENS = 16_384
TILES = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 16))  # entries of the vocabulary, warps


def items(place: Place) -> list[Item]:
    if place.tiny:
        case = Case("tiny", 4)
        return [
            Item("tiny", partial(profiled, case, "triton", place)),
            Item("tiles of the row kernel", partial(tiles, case, place)),
        ]
    cases = (Case("Qwen2.5-7B", TOKENS), Case("SmolLM2-135M", TOKENS))
    calls = [
        Item(f"{impl}: {case}", partial(profiled, case, impl, place))
        for impl in ("triton", *CANDIDATES)
        for case in cases
    ]
    return [*calls, Item("tiles of the row kernel", partial(tiles, cases[1], place))]


def profiled(case: Case, impl: str, place: Place, rows: list[Row]) -> None:
    problem, loss = Problem.make(case, place.device), ours(case.divergence, impl=impl)
    clock = device_for(place)
    whole = median(clock, partial(problem.step, loss))
    on_gpu = place.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        problem.step(loss)
        clock.finish()
    events = profiler.key_averages(group_by_input_shape=True)
    who = case.label() | {"impl": impl}
    phases, kernels = account(events, on_gpu, len(problem.w))
    busy = sum(ms for _, ms in kernels.values()) if on_gpu else whole
    phases["rows"] = max(0.0, busy - sum(phases.values()))
    rows.append(who | {"phase": "whole call", "ms": whole, "kernels ms": busy})
    rows += [who | {"phase": name, "ms": ms} for name, ms in phases.items()]
    most = sorted(kernels.items(), key=lambda pair: -pair[1][1])[:12]
    rows += [who | {"kernel": name[:80], "calls": calls, "ms": ms} for name, (calls, ms) in most]


def tiles(case: Case, place: Place, rows: list[Row]) -> None:
    """A call with other tiles than tuning.py's, which were chosen by compiled resources: ms of the whole call.

    The kernel that keeps a row on the chip, if there is one, is not part of these; it is timed on a separate line.
    """
    problem, loss = Problem.make(case, place.device), ours(case.divergence, impl="triton")
    clock = device_for(place)
    device = torch.device(place.device, 0) if place.device == "cuda" else torch.device("cpu")
    who = case.label() | {"impl": "triton"}
    rows.append(who | {"tile": "as chosen", "ms": median(clock, partial(problem.step, loss))})
    kept, on_chip, limits = tuning.ROW_BLOCKS, tuning.KL_ON_CHIP, tuning.limits_of(device)
    try:
        tuning.KL_ON_CHIP = ()  # type: ignore[assignment]
        for block, warps in TILES[: 1 if place.tiny else None]:
            tuning.ROW_BLOCKS = {limits.warp_size: tuning.RowBlocks(block, warps, warps)}
            ms = median(clock, partial(problem.step, loss))
            rows.append(who | {"tile": f"{block} entries, {warps} warps", "ms": ms})
    finally:
        tuning.ROW_BLOCKS, tuning.KL_ON_CHIP = kept, on_chip


def account(events: Iterable[Any], on_gpu: bool, vocab: int) -> tuple[dict[str, float], dict[str, tuple[int, float]]]:
    """Milliseconds of each phase except `rows`, which torch does not launch; calls and milliseconds of kernels."""
    phases = dict.fromkeys(("logits", "rows", "dW", "dX", "copies"), 0.0)
    kernels: dict[str, tuple[int, float]] = {}
    for event in events:
        ms = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
        if on_gpu and event.device_type == DeviceType.CUDA:
            calls, before = kernels.get(event.key, (0, 0.0))
            kernels[event.key] = calls + event.count, before + ms
        elif event.key.startswith("aten::"):
            phases[phase_of(event.key, event.input_shapes, vocab) or "copies"] += ms
    return phases, kernels


def phase_of(operator: str, shapes: list[list[int]], vocab: int) -> str | None:
    """The phase of a product by the shapes of its factors; None for other operators."""
    if operator not in ("aten::mm", "aten::addmm", "aten::addmm_"):
        return None
    a, b = shapes[:2] if operator == "aten::mm" else shapes[1:3]
    if len(a) != 2 or len(b) != 2:
        return None
    return "logits" if b[1] == vocab else "dW" if a[0] == vocab else "dX" if a[1] == vocab else "logits"
