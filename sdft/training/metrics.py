"""What a run reports: one JSON line for each step, a progress bar, optional trackers."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from sdft import files, parallel
from sdft.errors import SdftError
from sdft.loss import TokenLoss

PHASES = ("rollout", "score", "loss", "backward", "update")
TOKEN_VALUES = ("loss", "student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob", "top1_agree")
CPU = torch.device("cpu")
BUCKETS = 32  # of positions: the last one begins at token 2^31 - 1


Tracker = Callable[[dict[str, float], int], object]  # numbers by name, step


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
            self.spans[-1][2].synchronize()  # not the whole device: the teacher's average may still be computed
        total = dict.fromkeys(PHASES, 0.0)
        for name, start, end in self.spans:
            total[name] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        return total


def token_metrics(
    parts: Sequence[TokenLoss], positions: Sequence[Sequence[int]], device: torch.device = CPU
) -> dict[str, Any]:
    """Means over the trained tokens of a step, over all ranks, and the loss by position in the completion.

    parts: one TokenLoss for each micro-batch of this rank. positions: of each of its rows, the position in the
    completion. Positions are grouped by powers of two: the first few tokens carry several times what the others do.
    """
    sums = parallel.sum_over_ranks(token_sums(parts, positions).to(device)).cpu()  # (2, fields + buckets)
    totals, counts = sums[0].float(), sums[1].float()
    if not counts[0]:
        return {}
    means = (totals / counts).tolist()
    names = ("token_loss", *TOKEN_VALUES[1:])
    out: dict[str, Any] = {name: means[i] for i, name in enumerate(names) if counts[i]}
    out["loss_by_position"] = {
        f"{2**b - 1}-{2 ** (b + 1) - 2}": means[len(names) + b] for b in range(BUCKETS) if counts[len(names) + b]
    }
    return out


def token_sums(parts: Sequence[TokenLoss], positions: Sequence[Sequence[int]]) -> torch.Tensor:
    """(2, fields + BUCKETS) float64: sums and counts of TOKEN_VALUES, and of the loss by bucket of positions."""
    sums = torch.zeros(2, len(TOKEN_VALUES) + BUCKETS, dtype=torch.float64)
    for i, name in enumerate(TOKEN_VALUES):
        found = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        if found:
            values = torch.cat(found).float()  # (N,)
            sums[0, i], sums[1, i] = values.sum().item(), len(values)
    if parts:
        loss = torch.cat([part.loss for part in parts]).float().cpu()  # (N,)
        bucket = torch.log2(torch.tensor([p + 1.0 for part in positions for p in part])).floor().long()  # (N,)
        sums[0, len(TOKEN_VALUES) :] = torch.zeros(BUCKETS).index_add_(0, bucket, loss)
        sums[1, len(TOKEN_VALUES) :] = torch.bincount(bucket, minlength=BUCKETS)
    return sums


class MetricsLog:
    """metrics.jsonl of a run, and its trackers; on the main process only. For a resumed run, lines after `step` go."""

    def __init__(self, output: Path, step: int, trackers: Sequence[str], config: dict[str, Any]) -> None:
        self.path = output / "metrics.jsonl"
        self.file: TextIO | None = None
        self.trackers: list[Tracker] = []
        if not parallel.is_main():
            return
        kept = [line for line in read_metrics(output) if line["step"] <= step] if step else []
        files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a")
        self.trackers = [_tracker(name, output, config) for name in trackers]

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line and flushes it, so that a killed run keeps it; NaN and inf, which JSON lacks, are null.

        Raises SdftError if the disk is full.
        """
        if self.file is None:
            return
        with self._clear_error():
            self.file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
            self.file.flush()
        numbers = dict(_flatten(line))
        for tracker in self.trackers:
            tracker(numbers, line["step"])

    def sync(self) -> None:
        """Waits until every line is on the disk: after a power cut, no checkpoint may be newer than the lines."""
        if self.file is not None:
            with self._clear_error():
                os.fsync(self.file.fileno())

    @contextlib.contextmanager
    def _clear_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SdftError(
                f"{self.path}: not written: {files.why(error)}; then continue with train.resume = true (--resume)"
            ) from error

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # it would write again what `write` could not
                self.file.close()


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl, without a half-written last one. No lines if the file does not exist."""
    path = output / "metrics.jsonl"
    if not path.exists():
        return []
    return [line.row for line in files.read_json_lines(path, "metrics", allow_half_line=True)]


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


def _tracker(name: str, output: Path, config: dict[str, Any]) -> Tracker:
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
    """One live line on a terminal, else a plain line for each step; on the main process only."""

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
            disable=not self.console.is_terminal or not parallel.is_main(),
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
        if self.console.is_terminal and parallel.is_main():
            self.live.console.print(text, highlight=False, markup=False)
        else:
            parallel.report(text)

    def close(self) -> None:
        self.live.stop()
