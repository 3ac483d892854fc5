"""The seam for rollouts: what a training step, an evaluation and the commands ask of whatever generates."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from sdft.config import RolloutConfig

Weights = Callable[[], AbstractContextManager[None]]
"""A context within which the model in this process has the weights that are meant, such as `Teacher.weights`."""

own_weights: Weights = contextlib.nullcontext
"""The model's own weights: the student's."""


@dataclass(frozen=True)
class Completion:
    ids: list[int]  # the end-of-turn token included if it was reached
    truncated: bool  # max_new_tokens came first
    logprobs: list[float] | None = field(default=None, compare=False)
    """log p of each token under the model that sampled it, in nats: the log-softmax of its logits, as the loss compares
    them at loss.temperature = 1. rollout.temperature, top_k and top_p, which shape the draw, do not enter. None if no
    model sampled the completion in this run: a demonstration, or a completion read from a file."""


class Engine(Protocol):
    """Generates completions: the model in this process (`sampling.ModelEngine`), or a server."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: RolloutConfig, seed: int | None = None
    ) -> list[Completion]:
        """One completion for each prompt (token ids, of any lengths), in order, with log-probabilities.

        sampling: temperature (0 is greedy), top_p, top_k, max_new_tokens, and batch_size, the prompts that are
        completed together. seed: the draws follow from it alone, and torch's generators are left as they were; if it
        is None, the draws continue torch's global generator.
        """
        ...

    def sync(self, weights: Weights = own_weights) -> None:
        """From now on, completions are by the values that these weights have when `generate` is called."""
        ...
