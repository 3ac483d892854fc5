"""The peak memory of every phase of a step, before any weight is loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sdft.config import Config
from sdft.device import RETURNS
from sdft.model.shape import FAMILIES, ModelShape, Work
from sdft.planning.depth import SimulatedModel, simulated_model
from sdft.planning.held import Held
from sdft.planning.machine import MIB, Machine, compute_dtype
from sdft.planning.simulate import Peaks
from sdft.planning.work import Pass, passes_of, share_of

# What takes the memory, in the order that pictures show.
TERMS = (
    "weights", "teacher", "moments", "gradients", "activations", "cast weights", "KV cache", "loss", "transient",
    "runtime",
)  # fmt: skip
PHASES = ("rollout", "score", "loss", "backward", "update")

Terms = dict[str, int]  # bytes by term


@dataclass(frozen=True)
class Plan:
    """Predicted peaks: for each phase, bytes by term."""

    phases: dict[str, Terms]
    memory: int  # of the device
    budget: int | None  # the largest train.micro_batch_tokens that fits; 0: a whole step at once; None: nothing fits
    step_tokens: int  # tokens of a whole step, on the side of each sequence that has more
    notes: tuple[str, ...]  # what was assumed

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        return max(map(self.total, self.phases))

    @property
    def fits(self) -> bool:
        return self.peak <= self.memory


def predict(shape: ModelShape, config: Config, work: Work, machine: Machine) -> Plan:
    """The plan of a config whose step holds the sequences of `work`.

    Raises SdftError if the model cannot be simulated.
    """
    costs = Costs(shape, config, machine)
    phases = costs.step(work)
    return Plan(phases, machine.memory, largest_budget(costs, work), sum(work.sizes), tuple(_assumptions(costs, work)))


def peak(shape: ModelShape, config: Config, work: Work, machine: Machine) -> int:
    """The peak of `predict` in bytes, without the search for the largest token budget."""
    return max(sum(terms.values()) for terms in Costs(shape, config, machine).step(work).values())


class Costs:
    """Bytes of one model under one config on one machine, by phase and term."""

    def __init__(self, shape: ModelShape, config: Config, machine: Machine) -> None:
        known = shape.family in FAMILIES and config.model.attention != "eager"
        self.packed = known and config.train.packing != "off"
        self.shape, self.config, self.machine = shape, config, machine
        compute = compute_dtype(config.model, machine)
        self.model: SimulatedModel = simulated_model(shape, config, compute, self.packed, machine.kind)
        self.held = Held(shape, config, machine, self.model.counts)

    def step(self, work: Work) -> dict[str, Terms]:
        """The phases of a step, cut into micro-batches as in the config."""
        passes = passes_of(work, self.config.train.micro_batch_tokens, self.packed)
        # The peaks grow with the tokens, so the micro-batches with the most of them are enough.
        heaviest = {max(passes, key=lambda one: (one.student, one.rows)), max(passes, key=lambda one: one.teacher)}
        return self.phases(work, {one: self.model.peaks(one, again=len(passes) > 1) for one in heaviest})

    def share(self, work: Work, budget: int) -> dict[str, Terms]:
        """The phases of a step in micro-batches of `budget` tokens, all alike.

        Only micro-batches of the longest sequence's tokens times a power of two are simulated. Peaks are nearly linear
        in the tokens, and convex: a straight line between two of them is on the side of more memory.
        """
        longest, whole = max(work.sizes), sum(work.sizes)
        below = longest << max(0, (budget // longest).bit_length() - 1)
        one, low, high = (share_of(work, b, self.packed) for b in (budget, below, min(2 * below, whole)))
        return self.phases(work, {one: self.model.between(low, high, one.student, again=budget < whole)})

    def phases(self, work: Work, passes: dict[Pass, Peaks]) -> dict[str, Terms]:
        """The phases of a step with these micro-batches, each at the moment that takes the most."""
        phases: dict[str, Terms] = {phase: {} for phase in PHASES}

        def add(phase: str, *parts: Terms) -> None:
            terms = self._sum(*parts)
            if sum(terms.values()) > sum(phases[phase].values()):
                phases[phase] = terms

        for part in self._rollout(work):
            add("rollout", part)
        for one, peaks in passes.items():
            for (phase, place), uses in peaks.items():
                if phase == "teacher":
                    add("score", uses, {"cast weights": self.held.swapped})
                elif phase == "student":
                    add("score", uses)
                elif phase == "loss":
                    add("loss", self.in_loss(uses, one))
                elif phase == "backward":
                    add("backward", self.in_backward(uses, one, place))
        freed = max(map(self._freed, passes.values()))
        add("update", {"gradients": self.held.gradients, "transient": freed})
        return {phase: terms for phase, terms in phases.items() if terms}

    def in_loss(self, uses: Terms, one: Pass) -> Terms:
        """The loss: what the simulation found, and the workspace."""
        return {**uses, "loss": self.held.loss(one.rows)}

    def in_backward(self, uses: Terms, one: Pass, place: str) -> Terms:
        """The backward pass at a place of it (depth.py)."""
        return uses

    def _sum(self, *parts: Terms) -> Terms:
        terms = dict.fromkeys(TERMS, 0)
        always = {name: getattr(self.held, name) for name in ("weights", "teacher", "moments", "runtime")}
        for part in (always, *parts):
            for term, size in part.items():
                terms[term] += size
        terms["transient"] += math.ceil(self.machine.slack * (sum(terms.values()) - terms["runtime"]))
        return terms

    def _rollout(self, work: Work) -> list[Terms]:
        rollout = self.config.rollout
        extra: Terms = {}
        if work.offline:
            prompts: Sequence[int] = work.offline
            extra = {"moments": -self.held.moments}  # AdamW makes them in the first step
        elif work.teacher_prompts:
            prompts = work.prompts
            if rollout.source != "student":
                extra = {"cast weights": self.held.swapped}
        else:
            return []
        longest = max(prompts) if work.offline or rollout.source == "student" else max(*prompts, *work.teacher_prompts)
        together = min(rollout.batch_size, len(prompts))
        terms = self.held.rollout(together, longest, self.model.prompt_pass(together * longest))
        return [{name: terms.get(name, 0) + extra.get(name, 0) for name in {*terms, *extra}}]

    def _freed(self, peaks: Peaks) -> int:
        """In the update, what glibc's heap holds of the blocks that the backward pass freed after its last trim."""
        if self.machine.kind != "cpu":
            return 0
        saved = peaks["loss", "before"]
        return (saved.get("activations", 0) + saved.get("cast weights", 0)) // RETURNS[1]


def largest_budget(costs: Costs, work: Work) -> int | None:
    """The largest train.micro_batch_tokens whose peak is within the machine's memory; see Plan.budget."""

    def fits(phases: dict[str, Terms]) -> bool:
        return max(sum(terms.values()) for terms in phases.values()) <= costs.machine.memory

    (at_once,) = passes_of(work, 0, costs.packed)
    if fits(costs.phases(work, {at_once: costs.model.peaks(at_once, again=False)})):
        return 0
    low, high = max(work.sizes), sum(work.sizes)
    if high == low or not fits(costs.share(work, low)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(costs.share(work, middle)) else (low, middle)
    return low


def _assumptions(costs: Costs, work: Work) -> list[str]:
    """What the prediction rests on, in words."""
    machine, held = costs.machine, costs.held
    layout = "end to end" if costs.packed else "padded"
    words = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
    notes = [
        f"{costs.shape.family}: {held.counts.trained / 1e6:.1f}M weights train; weights are held in "
        f"{words[held.weights_dtype]}, multiplied in {words[held.compute]}; activations by simulation on fake tensors",
        f"a step of {len(work.prompts)} sequences laid {layout}, the longest {max(work.sizes)} tokens, "
        f"completions of {max(work.completions)}",
    ]
    if machine.kind == "cuda":
        notes.append(
            f"on the GPU {machine.runtime / MIB:.0f} MiB before the first tensor, and {machine.slack:.0%} of all "
            "tensors for what the allocator cannot reuse: not measured"
        )
    elif machine.kind == "cpu":
        notes.append(f"the interpreter and libraries, before any weight: {machine.runtime / MIB:.0f} MiB, measured")
    return notes
