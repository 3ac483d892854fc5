"""Work on the CPU for tensors of a GPU: bucket by bucket, through pinned memory, on a stream of its own.

Used by the teacher's masters and the optimizer's state where they live in CPU memory. On a CPU the same code runs
without streams, which is how it is tested there.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

BUCKET = 2**24  # entries; 64 MiB in fp32


def buckets(sizes: Sequence[int]) -> Iterator[list[tuple[int, slice]]]:
    """Cuts flat tensors of these sizes into buckets of at most BUCKET entries: lists of (which tensor, which part)."""
    bucket: list[tuple[int, slice]] = []
    room = BUCKET
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            bucket.append((index, slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield bucket
                bucket, room = [], BUCKET
    if bucket:
        yield bucket


def pieces(tensors: Sequence[Tensor], bucket: Sequence[tuple[int, slice]]) -> list[Tensor]:
    """Flat views of a bucket's entries. Raises RuntimeError for a tensor that is not contiguous."""
    return [tensors[index].view(-1)[part] for index, part in bucket]


class HostLane:
    """A stream that carries tensors to the host and back while the device goes on with its own work."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def follow_device(self) -> None:
        """What the lane does from now on sees all that the device was given so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def lead_device(self) -> None:
        """What the device is given from now on sees all that the lane was given so far. The host does not wait."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def each(
        self,
        jobs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
        work: Callable[[int, list[Tensor]], Sequence[Tensor]],
    ) -> None:
        """For every job (sources, targets), tensors of the device: targets <- work(job's number, sources on the host).

        The sources of one more job travel while `work` runs; no more pinned memory than that is in use. Results may
        still be on their way at the return (`lead_device`), the sources are all read by then.
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
        # PyTorch's allocator of pinned memory gives a buffer away again only after the copies that use it.
        pinned = self.stream is not None
        host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned) for t in sources]
        for mine, source in zip(host, sources, strict=True):
            mine.copy_(source, non_blocking=True)
        return host, None if self.stream is None else self.stream.record_event()
