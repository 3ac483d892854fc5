"""The phases of the proof, in order, with their time on a GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A part of the proof that has a process and a budget of time."""

    name: str  # as --only takes it
    seconds: float  # of WHOLE; what a phase leaves over belongs to those after it
    about: str  # the heading in the results
    module: str  # whose `items(place)` is the list to run
    processes: int = 1  # that run its items side by side: more than one where nothing is timed, and kernels compile


PHASES = (
    Phase("machine", 30, "The machine: versions, rate of a product, bandwidth, packages", "bench.proof.machine"),
    Phase("values", 70, "Values of the loss against float64, and what a call may not do", "bench.proof.values", 4),
    Phase("ours", 80, "The loss alone, by workspace", "bench.proof.ours"),
    Phase("kernels", 20, "One call by kernel", "bench.proof.kernels"),
    Phase("peers", 75, "The loss and its peers", "bench.proof.peers"),
    Phase("steps", 200, "A training step, ours and TRL's", "bench.proof.steps"),
    Phase("rollout", 40, "Rollout: tokens a second", "bench.proof.rollout"),
    Phase("offload", 40, "What moves to the CPU: the same values", "bench.proof.offload", 2),
)
WHOLE = 575.0  # seconds of the whole program; installing the wheels before it takes some, and the limit is 590
WRITING = 20.0  # of these: pictures and tables at the end
