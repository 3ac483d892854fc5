"""The loss and other projects' losses: errors against float64 first, then memory and time, interleaved."""

from functools import partial

from ..cases import Case
from ..measure import run_case
from .machine import device_for
from .phase import Item, Place, Row

ROUNDS = 10
WITHOUT = (
    "sdft_kernels torch",
    "dense, compiled",
)  # no tensor cores on a GPU; half a minute of compilation for each shape
CHUNKED = ("Liger chunked",)  # compilation takes a while too


def items(place: Place) -> list[Item]:
    if place.tiny:
        cases = [
            Case("tiny", 32, "float32", without=CHUNKED + WITHOUT[1:]),
            Case("tiny", 32, frozen=True, without=CHUNKED + WITHOUT[1:]),
        ]
    else:
        cases = [
            Case("Qwen2.5-7B", 4096, without=WITHOUT),
            Case("SmolLM2-135M", 4096, without=WITHOUT),
            Case("SmolLM2-135M", 4096, divergence="forward_kl", without=WITHOUT + CHUNKED),
            Case("Qwen2.5-7B", 4096, frozen=True, without=WITHOUT),
            Case("Qwen2.5-7B", 4096, divergence="forward_kl", without=WITHOUT + CHUNKED),
            Case("Qwen2.5-7B", 16_384, without=WITHOUT + CHUNKED),
        ]
    return [Item(str(case), partial(measured, case, place)) for case in cases]


def measured(case: Case, place: Place, rows: list[Row]) -> None:
    run_case(case, device_for(place), rows, place.deadline, rounds=2 if place.tiny else ROUNDS)
