"""The training methods: what each trains on, and what it compares the student with.

Nothing here imports torch, so a config can name its method in well under a second.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Method:
    """One way to train, as chosen by loss.method and rollout.source."""

    name: str
    completions: Literal["demonstrations", "sampled", "offline"]
    """What a step trains on: demonstrations, samples drawn in the step, or samples drawn before the first step."""
    needs_teacher: bool
    """Whether a teacher scores the completions too."""
    loss: Literal["divergence", "cross_entropy", "weighted_cross_entropy"]
    """Which of `sdft.loss.LOSSES` compares."""

    def masked_tokens(self, mask_first: int) -> int:
        """How many first tokens of a completion are left out of the loss, if loss.mask_first is `mask_first`.

        The mask is for a teacher's preamble ("Based on the example..."); a demonstration has none.
        """
        return 0 if self.completions == "demonstrations" else mask_first


METHODS = {
    method.name: method
    for method in (
        Method("sdft", "sampled", True, "divergence"),
        Method("sft", "demonstrations", False, "cross_entropy"),
        Method("dft", "demonstrations", False, "weighted_cross_entropy"),
    )
}


def choose_method(name: str, source: str) -> Method:
    """The method of loss.method = `name` and rollout.source = `source`."""
    method = METHODS[name]
    return replace(method, completions="offline") if source == "offline" else method
