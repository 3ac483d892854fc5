"""Work on the CPU for tensors of a GPU: part by part, through pinned memory, on a second stream of the GPU.

The EMA teacher and the optimizer use it if their state lives in CPU memory. On a CPU the same code runs without
streams, and its tests run there.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

PART = 2**24  # entries; 64 MiB in fp32


def cut_into_parts(sizes: Sequence[int]) -> Iterator[list[tuple[int, slice]]]:
    """Cuts flat tensors of these sizes into parts of at most PART entries: lists of (which tensor, which entries)."""
    part: list[tuple[int, slice]] = []
    room = PART
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            part.append((index, slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield part
                part, room = [], PART
    if part:
        yield part


def views_of_part(tensors: Sequence[Tensor], part: Sequence[tuple[int, slice]]) -> list[Tensor]:
    """Flat views of a part's entries. Raises RuntimeError for a tensor that is not contiguous."""
    return [tensors[index].view(-1)[entries] for index, entries in part]


class HostWorker:
    """Carries tensors to the host and back, and works on them there, while the device continues with its own work."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def wait_for_device(self) -> None:
        """Whatever this worker is given next sees the results of all that the device was given before."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def make_device_wait(self) -> None:
        """Whatever the device is given next sees the results of all that this worker was given; no wait of the host."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def run(
        self,
        jobs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
        work: Callable[[int, list[Tensor]], Sequence[Tensor]],
    ) -> None:
        """For every job (sources, targets), tensors of the device: targets <- work(job's number, sources on the host).

        The sources of the next job travel while `work` runs; no more pinned memory than that is in use. At the return
        all sources were read, but results may still be on their way: see `make_device_wait`.
        """
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            ahead = self._fetch(jobs[0][0]) if jobs else None
            for number, (_, targets) in enumerate(jobs):
                assert ahead is not None
                host, arrived = ahead
                ahead = self._fetch(jobs[number + 1][0]) if number + 1 < len(jobs) else None
                if arrived is not None:
                    arrived.synchronize()
                for target, result in zip(targets, work(number, host), strict=True):
                    target.copy_(result, non_blocking=True)

    def _fetch(self, sources: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
        # PyTorch's allocator of pinned memory reuses a buffer only after the copies that use it.
        pinned = self.stream is not None
        host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned) for t in sources]
        for copy, source in zip(host, sources, strict=True):
            copy.copy_(source, non_blocking=True)
        return host, None if self.stream is None else self.stream.record_event()
