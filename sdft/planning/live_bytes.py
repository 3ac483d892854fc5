"""Counts the bytes of the tensors that operators make, and records when each of them comes and goes."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Allocation:
    """A storage that an operator made."""

    size: int  # bytes
    use: str = "transient"


@dataclass(frozen=True)
class Event:
    """An allocation comes, goes or is added to a sum, or (without one) a named span of time begins."""

    allocation: Allocation | None
    kind: Literal["comes", "goes", "added", "span"]
    span: str = ""


class LiveBytes(TorchDispatchMode):
    """A context in which every storage that an operator makes counts once, until nothing refers to it any more.

    Gradients, saved tensors and temporaries all count; tensors that existed before do not. Fake and real tensors count
    alike. `now` is the sum, `peak` its maximum since the last `take_peak`.
    """

    def __init__(self, existing: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.events: list[Event] = []
        self.live: dict[int, Allocation | None] = {_key(t): None for t in existing}  # None: existed before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in self.live:
                allocation = Allocation(tensor.untyped_storage().nbytes())
                if func is torch.ops.aten._to_copy.default and self.live.get(_key(args[0]), allocation) is None:
                    allocation.use = "cast weights"
                self._add(tensor, allocation)
        return out

    def _add(self, tensor: Tensor, allocation: Allocation) -> None:
        self.live[_key(tensor)] = allocation
        weakref.finalize(tensor.untyped_storage(), self._drop, _key(tensor))
        self.now += allocation.size
        self.peak = max(self.peak, self.now)
        self.events.append(Event(allocation, "comes"))

    def _drop(self, key: int) -> None:
        allocation = self.live.pop(key)
        assert allocation is not None
        self.now -= allocation.size
        self.events.append(Event(allocation, "goes"))

    def take_peak(self) -> int:
        """The peak since the last call, in bytes."""
        peak, self.peak = self.peak, self.now
        return peak

    def begin(self, span: str) -> None:
        """Begins a span of time; it lasts until the next one. Spans of one name count as one."""
        self.events.append(Event(None, "span", span))

    def name(self, tensor: Tensor, use: str) -> None:
        """Records what a tensor is used for."""
        allocation = self.live.get(_key(tensor))
        if allocation is not None:
            allocation.use = use

    def name_rest(self, use: str) -> None:
        """Records what the live tensors are used for, if nothing is known of them yet."""
        for allocation in self.live.values():
            if allocation is not None and allocation.use == "transient":
                allocation.use = use

    def add_to_sum(self, gradient: Tensor) -> None:
        """Records that a gradient is complete: it is kept, or added to an earlier one (see `peaks`)."""
        allocation = self.live.get(_key(gradient))
        assert allocation is not None
        allocation.use = "gradients"
        self.events.append(Event(allocation, "added"))

    def peaks(self, again: bool = False) -> dict[str, dict[str, int]]:
        """For each span the bytes at its peak, by use.

        again: as if the sums of earlier gradients had been there from the start, and each gradient were added to its
        sum as soon as it is complete.
        """
        peaks: dict[str, dict[str, int]] = {}
        most: dict[str, int] = {}
        added: set[int] = set()
        now, span = sum(e.allocation.size for e in self.events if e.allocation and e.kind == "added") * again, ""
        held = {"gradients": now} if again else {}
        for event in self.events:
            if event.allocation is None:
                span = event.span
            elif id(event.allocation) not in added and (event.kind != "added" or again):
                change = event.allocation.size if event.kind == "comes" else -event.allocation.size
                now += change
                held[event.allocation.use] = held.get(event.allocation.use, 0) + change
                if event.kind == "added":
                    added.add(id(event.allocation))
            if now > most.get(span, -1):
                most[span], peaks[span] = now, dict(held)
        return peaks


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
