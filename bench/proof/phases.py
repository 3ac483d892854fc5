"""The phases of the proof, in order, with their time on a GPU."""

import importlib
from dataclasses import dataclass

from .phase import Item, Place


@dataclass(frozen=True)
class Phase:
    """One module of this package, whose `items(place)` makes the list to run."""

    name: str  # as --only takes it; the module's name
    seconds: float  # of 590; what a phase leaves over belongs to those after it
    about: str  # the heading in the results

    def items(self, place: Place) -> list[Item]:
        return importlib.import_module(f".{self.name}", __package__).items(place)


PHASES = (
    Phase("machine", 15, "The machine: versions, GEMM rate, bandwidth, packages"),
    Phase("values", 115, "Values of the loss against float64, and what a call may not do"),
    Phase("ours", 70, "The loss alone, by workspace"),
    Phase("kernels", 20, "One call by kernel"),
    Phase("peers", 75, "The loss and its peers"),
    Phase("steps", 175, "A training step, ours and TRL's"),
    Phase("rollout", 45, "Rollout: tokens a second"),
    Phase("offload", 45, "What moves to the CPU: the same values"),
)
WHOLE = 590.0  # seconds of the whole program
WRITING = 25.0  # of these: pictures and tables at the end
