"""What a run tells: one JSON line a step, a progress bar, optional trackers."""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from sdft import files
from sdft.errors import SdftError
from sdft.loss import TokenLoss

PHASES = ("rollout", "score", "loss", "backward", "update")


class Phases:
    """Seconds spent in each phase of a step; on CUDA by events, so that timing makes the host wait for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.spans.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Sums by phase; on CUDA this waits for the last event."""
        if self.cuda and self.spans:
            self.spans[-1][2].synchronize()  # not the whole device: the teacher's average may still be on its way
        total = dict.fromkeys(PHASES, 0.0)
        for name, start, end in self.spans:
            total[name] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        return total


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on the GPU, or resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def token_metrics(parts: Sequence[TokenLoss], positions: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Means over the trained tokens of a step, and the divergence by position in the answer.

    parts: one TokenLoss a micro-batch; positions: the answer position of each of its rows. Positions are grouped
    by powers of two: the first few tokens carry several times what the others do (design section 4).
    """
    values = torch.cat([part.loss for part in parts]) if parts else torch.zeros(0)
    if not len(values):
        return {}
    out: dict[str, Any] = {"token_loss": values.mean().item()}
    for name in ("student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob", "top1_agree"):
        if getattr(parts[0], name) is not None:
            out[name] = torch.cat([getattr(part, name) for part in parts]).float().mean().item()
    where = torch.tensor([p for part in positions for p in part])
    bucket = torch.log2(where.float() + 1).floor().long()
    sums = torch.zeros(int(bucket.max()) + 1).index_add_(0, bucket, values.float().cpu())
    counts = torch.bincount(bucket)
    out["loss_by_position"] = {
        f"{2**b - 1}-{2 ** (b + 1) - 2}": (sums[b] / n).item() for b, n in enumerate(counts.tolist()) if n
    }
    return out


class MetricsLog:
    """metrics.jsonl of a run, and its trackers. Opening it for a resumed run drops lines after `step`."""

    def __init__(self, output: Path, step: int, trackers: Sequence[str], config: dict[str, Any]) -> None:
        self.path = output / "metrics.jsonl"
        kept = [line for line in read_metrics(output) if line["step"] <= step] if step else []
        files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file: TextIO = self.path.open("a")
        self.trackers = [_tracker(name, output, config) for name in trackers]

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line and flushes it, so that a killed run keeps it; NaN and inf, which JSON lacks, are null.

        Raises SdftError where the disk is full.
        """
        with self._told():
            self.file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
            self.file.flush()
        numbers = dict(_flatten(line))
        for tracker in self.trackers:
            tracker(numbers, line["step"])

    def sync(self) -> None:
        """Waits until every line is on the disk: a checkpoint must not outlive, in a power cut, the lines before it."""
        with self._told():
            os.fsync(self.file.fileno())

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SdftError(f"{self.path}: not written: {files.why(error)}; then --resume goes on") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it would write again what `write` has told could not be written
            self.file.close()


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl, none where there is no such file; a half-written last line is left out."""
    path, lines = output / "metrics.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flatten(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            yield prefix + key, value


def check_trackers(names: Sequence[str]) -> None:
    """Raises SdftError for a tracker whose package is missing."""
    import importlib.util

    for name in names:
        if importlib.util.find_spec(name) is None:
            raise SdftError(f"train.trackers names {name!r}, which is not installed; run: pip install {name}")


def _tracker(name: str, output: Path, config: dict[str, Any]) -> Any:
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(output / "tensorboard"))

        def log(numbers: dict[str, float], step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return log
    import wandb

    run = wandb.init(project="sdft", name=output.name, dir=str(output), config=config)
    return lambda numbers, step: run.log(numbers, step=step)


class ProgressBar:
    """One live line on a terminal; elsewhere a plain line for each step."""

    def __init__(self, step: int, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console()
        self.live = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.live.add_task("", total=steps, completed=step)
        self.steps = steps
        self.first, self.began = step, time.perf_counter()
        self.live.start()

    def update(self, step: int, line: dict[str, Any]) -> None:
        """Shows a finished step."""
        times = " ".join(f"{name} {line['seconds'][name]:.2f}s" for name in PHASES)
        text = (
            f"loss {line['loss']:.4f}  {line['tokens_per_second']:.0f} tok/s  {times}  "
            f"peak {line['peak_memory'] / 2**30:.1f} GiB"
        )
        self.live.update(self.task, completed=step, description=text)
        if not self.console.is_terminal:
            left = (time.perf_counter() - self.began) / (step - self.first) * (self.steps - step)
            self.say(f"{step}/{self.steps}  {text}  ETA {left:.0f}s")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.console.is_terminal:
            self.live.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        self.live.stop()
