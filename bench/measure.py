"""One case measured: values first, then memory, then times, with the variants interleaved round by round.

If a variant fails, its row gets a note and the run continues. Only a device that no longer responds ends the run
(DeviceLostError).
"""

import contextlib
import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from .cases import BARS, CHECKED_ROWS, Case, Problem, Truth, bare_gemms, is_exact, strict_gemms
from .peers import VARIANTS, Loss, Variant

ROUNDS, LEAST_ROUNDS = 20, 5
SLOW_MS = 150.0  # a variant above this gets fewer rounds: as many as fit in SLOW_TOTAL_MS
SLOW_TOTAL_MS = 1500.0
FLUSH_BYTES = 512 * 2**20  # ten times an H100's L2 cache

FLOORS = {"bare GEMMs": bare_gemms, "bare GEMMs, no allocation": strict_gemms}
SKIPPED = "skipped: time budget"

Row = dict[str, Any]
Run = Callable[[], Any]


class DeviceLostError(RuntimeError):
    """A kernel broke the CUDA context: nothing more can run in this process."""


class Cpu:
    """Wall-clock time, and memory as the growth of the process's peak resident set (Linux)."""

    name = "cpu"

    def milliseconds(self, run: Run) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    def finish(self) -> None:
        """Nothing to wait for: a CPU runs every operator before it returns."""

    def extra_bytes(self, run: Run) -> int | None:
        if platform.system() != "Linux":
            run()
            return None
        with contextlib.suppress(AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator keeps would hide growth
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = proc_bytes("self/status", "VmRSS")
        run()
        return proc_bytes("self/status", "VmHWM") - before

    def free_bytes(self) -> float:
        return proc_bytes("meminfo", "MemAvailable") if platform.system() == "Linux" else float("inf")


class Cuda:
    """CUDA events around each call; memory from the caching allocator.

    Before each call a buffer much larger than the L2 cache is overwritten. So no input is left in the cache, and the
    host has 0.1 to 0.2 milliseconds to queue the first kernels of the call.
    """

    name = "cuda"

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.name)

    def milliseconds(self, run: Run) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def finish(self) -> None:
        torch.cuda.synchronize()

    def extra_bytes(self, run: Run) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    def free_bytes(self) -> float:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


def proc_bytes(file: str, field: str) -> int:
    """A field of a file below /proc with lines of the form `Field:  123 kB`, in bytes."""
    for line in Path("/proc", file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def run_case(
    case: Case,
    device: Cpu | Cuda,
    rows: list[Row],
    deadline: float = float("inf"),
    variants: Iterable[Variant] = VARIANTS,
    rounds: int = ROUNDS,
    checked_rows: int | None = None,
) -> None:
    """Append a row for each floor and variant. After the deadline (time.monotonic) variants are skipped.

    rounds: of the timing; slower variants than SLOW_MS get fewer. checked_rows: rows compared with float64; None is
    CHECKED_ROWS.
    """
    torch._dynamo.reset()  # a case must not run uncompiled because earlier ones filled the cache
    gc.collect()  # slow once the other libraries are loaded: only here, and after an exception that held tensors
    wanted = [v for v in variants if applies(v, case, device)]
    mine = {v.name: case.label() | {"variant": v.name} for v in wanted}
    floor_rows = {name: case.label() | {"variant": name} for name in FLOORS}
    rows.extend([*floor_rows.values(), *mine.values()])
    problem = Problem.make(case, device.name)
    small = problem.first(checked_rows or CHECKED_ROWS[device.name])
    losses = checked(case, device, small, wanted, mine, deadline)
    del small
    runs: dict[str, Run] = {}
    for name, make in FLOORS.items():
        with noted(floor_rows[name], device):
            floor = make(problem)
            floor()
            runs[name] = floor
    for variant in [v for v in wanted if v.name in losses]:
        row, loss = mine[variant.name], losses[variant.name]
        if time.monotonic() > deadline:
            row["note"] = SKIPPED
            continue
        need = variant.planes * case.label()["N"] * case.label()["V"] * problem.x.itemsize
        if need > device.free_bytes():
            row["note"] = out_of_memory(need)
            continue

        def run(loss: Loss = loss) -> None:
            problem.step(loss)

        with noted(row, device, need):
            run()  # compiles and tunes
            problem.clear()
            extra = device.extra_bytes(run)
            row["extra MB"] = None if extra is None else max(0, extra - problem.returned_bytes()) / 1e6
            runs[variant.name] = run
        problem.clear()
    interleaved(runs, floor_rows | mine, device, rounds)
    problem.clear()
    for key, floor_row in zip(("of the floor", "of the strict floor"), floor_rows.values(), strict=True):
        for row in mine.values():
            if "ms" in row and "ms" in floor_row:
                row[key] = floor_row["ms"] / row["ms"]


def applies(variant: Variant, case: Case, device: Cpu | Cuda) -> bool:
    """Whether the variant supports this divergence and device, and the case has time for it."""
    known = case.divergence in variant.divergences and device.name in variant.devices
    return known and variant.name not in case.without


def checked(
    case: Case, device: Cpu | Cuda, small: Problem, variants: list[Variant], rows: dict[str, Row], deadline: float
) -> dict[str, Loss]:
    """Write the errors of every variant against float64 into its row. Returns the losses of the variants that ran."""
    truth = Truth.of(small, case.divergence)
    losses = {}
    for variant in variants:
        row = rows[variant.name]
        if time.monotonic() > deadline:
            row["note"] = SKIPPED
            continue
        with noted(row, device):
            loss = variant.make(case.divergence)
            errors = truth.errors(small, loss)
            row |= errors
            if not is_exact(errors, case.products):
                row["note"] = f"inexact: an error is above {BARS[case.products]}"
            losses[variant.name] = loss
        small.clear()
    return losses


def interleaved(runs: dict[str, Run], rows: dict[str, Row], device: Cpu | Cuda, most: int) -> None:
    """Write median and 10th and 90th percentile in milliseconds into each row. Every round runs each variant once."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    rounds = {}
    for name, run in runs.items():
        with noted(rows[name], device):
            rounds[name] = rounds_for(device.milliseconds(run), most)
    for done in range(most):
        for name in [name for name, count in rounds.items() if done < count]:
            with noted(rows[name], device):
                times[name].append(device.milliseconds(runs[name]))
                continue
            del rounds[name]
    for name, count in rounds.items():
        tenths = statistics.quantiles(times[name], n=10, method="inclusive")
        rows[name] |= {"ms": statistics.median(times[name]), "p10": tenths[0], "p90": tenths[-1], "rounds": count}


def rounds_for(ms: float, most: int) -> int:
    return most if ms <= SLOW_MS else min(most, max(LEAST_ROUNDS, int(SLOW_TOTAL_MS / ms)))


@contextlib.contextmanager
def noted(row: Row, device: Cpu | Cuda, need: float = 0.0) -> Any:
    """Write an exception of the body into the row's note. Raises DeviceLostError if the device no longer works."""
    try:
        yield
        device.finish()
        return
    except Exception as error:
        row["note"] = reason(error, need)
    gc.collect()
    try:
        device.finish()
    except RuntimeError as error:
        raise DeviceLostError(row["variant"]) from error


def reason(error: Exception, need: float = 0.0) -> str:
    """An exception as the text of a table cell."""
    first = " ".join(str(error).split()).replace("|", "/")[:160]
    if isinstance(error, ImportError):
        return f"missing: {first}"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in first:
        return out_of_memory(need)
    return f"raises {type(error).__name__}: {first}"


def out_of_memory(need: float) -> str:
    return f"out of memory (needs about {need / 1e9:.1f} GB)" if need else "out of memory"
