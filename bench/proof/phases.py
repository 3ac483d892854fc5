"""The phases of the proof, in order, with their time on a GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A part of the proof that has a process and a budget of time."""

    name: str  # as --only takes it
    seconds: float  # of 590; what a phase leaves over belongs to those after it
    about: str  # the heading in the results
    module: str  # whose `items(place)` is the list to run


PHASES = (
    Phase("machine", 15, "The machine: versions, GEMM rate, bandwidth, packages", "bench.proof.machine"),
    Phase("values", 115, "Values of the loss against float64, and what a call may not do", "bench.proof.values"),
    Phase("ours", 70, "The loss alone, by workspace", "bench.proof.ours"),
    Phase("kernels", 20, "One call by kernel", "bench.proof.kernels"),
    Phase("peers", 75, "The loss and its peers", "bench.proof.peers"),
    Phase("steps", 175, "A training step, ours and TRL's", "bench.proof.steps"),
    Phase("rollout", 45, "Rollout: tokens a second", "bench.proof.rollout"),
    Phase("offload", 45, "What moves to the CPU: the same values", "bench.proof.offload"),
)
WHOLE = 590.0  # seconds of the whole program
WRITING = 25.0  # of these: pictures and tables at the end
