"""The loss and other projects' losses: errors against float64 first, then memory and time, interleaved."""

from functools import partial

from ..cases import Case
from ..measure import run_case
from ..peers import VARIANTS
from .machine import device_for
from .phase import Item, Place, Row

ROUNDS = 10
TORCH = ("sdft_kernels torch",)  # no tensor cores on a GPU: seconds a call


def items(place: Place) -> list[Item]:
    if place.tiny:
        cases = [Case("tiny", 32, "float32", without=compiled()), Case("tiny", 32, frozen=True, without=compiled())]
    else:
        cases = [
            Case("Qwen2.5-7B", 4096, without=TORCH),
            Case("Qwen2.5-7B", 4096, frozen=True, without=TORCH + compiled()),
            Case("SmolLM2-135M", 4096, without=TORCH),
            Case("SmolLM2-135M", 4096, divergence="forward_kl", without=TORCH + compiled()),
            Case("Qwen2.5-7B", 16_384, without=TORCH + compiled()),
        ]
    return [Item(str(case), partial(measured, case, place)) for case in cases]


def compiled() -> tuple[str, ...]:
    """Variants that compile for half a minute."""
    return tuple(variant.name for variant in VARIANTS if variant.compiled)


def measured(case: Case, place: Place, rows: list[Row]) -> None:
    run_case(case, device_for(place), rows, place.deadline, rounds=2 if place.tiny else ROUNDS)
