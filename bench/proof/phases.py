"""The phases of the proof, in order, with their time on a GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A part of the proof that has a process and a budget of time."""

    name: str  # for --only
    seconds: float  # of WHOLE; time that a phase does not use goes to the phases after it
    about: str  # the heading in the results
    module: str  # its `items(place)` is the list to run
    processes: int = 1  # that run the items in parallel; more than one if nothing is timed, because kernels compile


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
WHOLE = 575.0  # seconds of the whole program; the limit is 590, and the install of the wheels before it takes some
WRITING = 20.0  # of these seconds, for pictures and tables at the end
