"""The fused loss beside its peers: `python -m pytest bench -q` (about a minute and a half on two quiet cores).

Each case first holds every variant to the float64 reference on the first CHECK rows, and a variant that
misses the bar is reported as wrong, without a time. Then the variants run interleaved and the medians are
compared with two floors: the four bare GEMMs (two logits, dX, dW) in the inputs' dtype, whole N at once, with
outputs that torch allocates, and, stricter, into buffers that exist already. No loss can be faster than the
second without skipping work.

Memory is the growth of the process's peak resident set during one call (/proc/self/clear_refs resets the
peak; Linux only), less dX and an fp32 dW, which every variant must return. The results go to
bench/results/<device>.json and .md.
"""

import contextlib
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "kernels"))  # a checkout works without an install

from sdft_kernels import linear_divergence  # noqa: E402
from sdft_kernels.reference import linear_divergence_reference  # noqa: E402

N, V, H = 2048, 49152, 576  # tokens, and the head of SmolLM2-135M
CHECK = 64  # rows judged in float64
ROUNDS = 3
# Largest relative error of dX on the checked rows, teacher ≈ student. A dense loss in bf16 cannot meet it.
BARS = {torch.float32: 1e-3, torch.bfloat16: 5e-3}
CASES = [
    (torch.float32, "reverse_kl"),
    (torch.float32, "forward_kl"),
    (torch.float32, "jsd"),
    (torch.bfloat16, "reverse_kl"),
]
COLUMNS = {  # key of a row: (heading, format)
    "ms": ("ms", ".0f"),
    "of the floor": ("of the bare GEMMs", ".0%"),
    "of the strict floor": ("without allocation", ".0%"),
    "extra MB": ("extra MB", ".0f"),
    "loss error": ("loss error", ".1e"),
    "dX error": ("dX error", ".1e"),
}
ROWS: list[dict[str, Any]] = []

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Case:
    """One problem: student and teacher near each other, separate heads."""

    x: Tensor
    w: Tensor
    teacher_x: Tensor
    teacher_w: Tensor

    @classmethod
    def make(cls, dtype: torch.dtype) -> "Case":
        gen = torch.Generator().manual_seed(0)
        x, w = torch.randn(N, H, generator=gen), torch.randn(V, H, generator=gen) * 2 / H**0.5
        teacher_x = x + 0.05 * torch.randn(N, H, generator=gen)
        teacher_w = w.to(dtype).clone()
        return cls(x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), teacher_x.to(dtype), teacher_w)

    def step(self, loss: Loss) -> float:
        self.x.grad = self.w.grad = None
        value = loss(self.x, self.w, self.teacher_x, self.teacher_w)
        value.backward()
        return value.item()

    def head_rows(self, dtype: torch.dtype) -> "Case":
        x, w, tx, tw = (v.detach().to(dtype) for v in (self.x[:CHECK], self.w, self.teacher_x[:CHECK], self.teacher_w))
        return Case(x.clone().requires_grad_(), w.clone().requires_grad_(), tx, tw)


def liger(name: str) -> Loss | str:
    """Liger's chunked JSD with β = 0 or 1 for the KLs, compiled as it is by default, or why not."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        return f"not importable: {error}"
    beta = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}[name]
    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)

    def loss(x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor) -> Tensor:
        labels = torch.zeros(x.shape[0], dtype=torch.int64)
        return module(x, w, teacher_x, teacher_w, labels)

    return loss


def variants(name: str) -> dict[str, Loss | str]:
    def ours(*tensors: Tensor) -> Tensor:
        return linear_divergence(*tensors, divergence=name)

    def dense(*tensors: Tensor) -> Tensor:
        return linear_divergence_reference(*tensors, divergence=name)

    if name != "reverse_kl":  # the peers cost the same for every divergence, and several times what we do
        return {"sdft_kernels": ours}
    return {"sdft_kernels": ours, "dense autograd": dense, "Liger chunked": liger(name)}


def bare_gemms(case: Case) -> Callable[[], Any]:
    """The four GEMMs as anyone writes them, outputs and all."""
    x, w = case.x.detach(), case.w.detach()

    def run() -> tuple[Tensor, Tensor]:
        s, _ = x @ w.t(), case.teacher_x @ case.teacher_w.t()
        return s @ w, s.t() @ x

    return run


def strict_gemms(case: Case) -> Callable[[], Any]:
    """The four GEMMs into buffers that exist already: no page of memory is touched for the first time."""
    x, w = case.x.detach(), case.w.detach()
    z, dx, dw = torch.zeros(N, V, dtype=x.dtype), torch.zeros_like(x), torch.zeros_like(w)

    def run() -> None:
        torch.mm(x, w.t(), out=z)
        torch.mm(case.teacher_x, case.teacher_w.t(), out=z)
        torch.mm(z, w, out=dx)
        torch.mm(z.t(), x, out=dw)

    return run


def errors(case: Case, loss: Loss, truth: Case, value: float) -> tuple[float, float]:
    """Relative errors of the loss and of dX on the first CHECK rows."""
    small = case.head_rows(case.x.dtype)
    mine = small.step(loss)
    assert small.x.grad is not None
    assert truth.x.grad is not None
    slope = ((small.x.grad.double() - truth.x.grad).norm() / truth.x.grad.norm()).item()
    return abs(mine - value) / abs(value), slope


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def extra_memory(run: Callable[[], Any], returned: int) -> float | None:
    """Peak growth of the resident set while run() works, in MB, less what it must return."""
    if platform.system() != "Linux":
        return None
    gc.collect()
    with contextlib.suppress(AttributeError):  # musl has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept would hide growth
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    return max(0, status("VmHWM") - before - returned) / 1e6


def interleaved(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each, one after another in every round; measuring memory has warmed them up."""
    times: dict[str, list[float]] = {k: [] for k in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {k: statistics.median(v) for k, v in times.items()}


@pytest.mark.parametrize(("dtype", "name"), CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_linear_divergence(benchmark: Any, dtype: torch.dtype, name: str) -> None:
    case = Case.make(dtype)
    truth = case.head_rows(torch.float64)
    value = truth.step(lambda *t: linear_divergence_reference(*t, divergence=name))
    label = {"dtype": str(dtype).removeprefix("torch."), "divergence": name, "KL": value}
    floors = {"bare GEMMs": bare_gemms(case), "bare GEMMs, no allocation": strict_gemms(case)}
    for floor in floors.values():
        floor()  # warm up
    runs: dict[str, Callable[[], Any]] = {}
    for variant, loss in variants(name).items():
        row = {**label, "variant": variant}
        ROWS.append(row)
        if isinstance(loss, str):
            row["note"] = loss
            continue
        row["loss error"], row["dX error"] = errors(case, loss, truth, value)
        if not (row["dX error"] <= BARS[dtype] and row["loss error"] <= 1e-2):
            row["note"] = "wrong: not timed"
            continue
        returned = case.x.nbytes + case.w.numel() * 4
        case.x.grad = case.w.grad = None
        row["extra MB"] = extra_memory(lambda loss=loss: case.step(loss), returned)
        runs[variant] = lambda loss=loss: case.step(loss)
    assert "sdft_kernels" in runs, ROWS
    medians = interleaved({**floors, **runs})
    for row in ROWS:
        if row["variant"] in medians and all(row[k] == v for k, v in label.items()):
            row["ms"] = medians[row["variant"]]
            row["of the floor"] = medians["bare GEMMs"] / row["ms"]
            row["of the strict floor"] = medians["bare GEMMs, no allocation"] / row["ms"]
    ROWS.extend({**label, "variant": name, "ms": medians[name]} for name in floors)
    benchmark.extra_info.update(label, medians_ms=medians)
    benchmark.pedantic(runs["sdft_kernels"], rounds=1, iterations=1)


def device_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def markdown(meta: dict[str, Any]) -> str:
    headings = " | ".join(heading for heading, _ in COLUMNS.values())
    lines = [
        f"N = {N}, V = {V}, H = {H}; {', '.join(f'{k} {v}' for k, v in meta.items())}.",
        "",
        f"| dtype | divergence | variant | {headings} | note |",
        "|---|---|---|" + "---:|" * len(COLUMNS) + "---|",
    ]
    for row in ROWS:
        numbers = ["" if row.get(key) is None else format(row[key], form) for key, (_, form) in COLUMNS.items()]
        cells = [row["dtype"], row["divergence"], row["variant"], *numbers, row.get("note", "")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module", autouse=True)
def report() -> Any:
    """Write what was measured when the module is done, also when a case failed."""
    ROWS.clear()
    yield
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    load = f"{os.getloadavg()[0]:.1f}"
    meta = {
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "load average at the end": load,
        "date": date.today().isoformat(),
        "command": "python -m pytest bench -q",
    }
    stem = HERE / "results" / f"cpu-{platform.machine()}-{torch.get_num_threads()}threads"
    stem.with_suffix(".json").write_text(json.dumps({**meta, "N": N, "V": V, "H": H, "rows": ROWS}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(meta))
    print("\n" + markdown(meta))
