"""oneDNN's switch for products of fp32 matrices on a CPU: in bf16 for our bf16 calls, and fp32 for our fp32 calls.

torch has the switch once per process. A bf16 call turns it on, and until the call ends the operands of every other
thread's fp32 products may be rounded to bf16. So our fp32 calls wait until no bf16 call runs, and our bf16 calls wait
until no fp32 call runs. Other code of the same process does not wait. A child that is forked during a bf16 call starts
with the switch off.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@cache
def has_bf16_products() -> bool:
    """Whether `products(bf16=True)` pays: a CPU with AVX-512, through oneDNN.

    With AMX, oneDNN multiplies bf16 tiles. Without AMX it multiplies in fp32; on an AMD EPYC it took half of the time
    of MKL, which torch uses for fp32 products.
    """
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.backends.mkldnn, "matmul")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


class _Switch:
    """How many calls of either kind run; `before` is the value of the switch before the first bf16 call."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.running = {True: 0, False: 0}  # by whether the call is bf16
        self.before = "none"

    def enter(self, bf16: bool) -> None:
        with self.condition:
            self.condition.wait_for(lambda: not self.running[not bf16])
            first = bf16 and not self.running[True]
            if first:
                self.before = _precision()
            self.running[bf16] += 1  # before the switch is on, so that a child forked in between turns it back
            if first:
                _set_precision("bf16")

    def leave(self, bf16: bool) -> None:
        with self.condition:
            if bf16 and self.running[True] == 1:
                _set_precision(self.before)
            self.running[bf16] -= 1
            self.condition.notify_all()


def _precision() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


def _set_precision(value: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = value  # type: ignore[attr-defined]


_switch = _Switch()


def _after_fork() -> None:
    """The threads that ran calls do not exist in the child: nothing runs, and nothing will turn the switch back."""
    global _switch
    if _switch.running[True]:
        _set_precision(_switch.before)
    _switch = _Switch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def products(bf16: bool) -> Iterator[None]:
    """Products of fp32 matrices by this thread: by bf16 operands, fp32 sums and fp32 results, or plain fp32.

    bf16 loses nothing if the operands came from bf16. Without `has_bf16_products` there is nothing to switch.
    """
    if not has_bf16_products():
        yield
        return
    switch = _switch
    switch.enter(bf16)
    try:
        yield
    finally:
        switch.leave(bf16)
