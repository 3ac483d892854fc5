"""pass@k: how often one of k sampled completions is correct."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdft.config import RolloutConfig
from sdft.data.records import Example
from sdft.errors import SdftError
from sdft.evaluation.accuracy import judge
from sdft.rollout.engine import Engine


@dataclass(frozen=True)
class Samples:
    """How many of n sampled completions of each prompt are correct."""

    n: int
    correct: tuple[int, ...]  # one for each prompt

    def pass_at(self, k: int) -> float:
        """Mean over prompts of the chance that one of k of the n samples is correct (unbiased, Chen et al. 2021).

        For c correct samples that chance is 1 - C(n - c, k) / C(n, k). Raises SdftError for k below 1 or above n.
        """
        from scipy.stats import hypergeom

        if not 1 <= k <= self.n:
            raise SdftError(f"k = {k}: it must lie between 1 and the number of samples ({self.n})")
        return float(hypergeom.sf(0, self.n, self.correct, k).mean())

    def powers(self) -> list[int]:
        """The powers of two up to n, and n: the k that are shown."""
        return sorted({2**i for i in range(self.n.bit_length())} | {self.n})


def sample_answers(
    engine: Engine,
    tokenizer: Any,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    n: int,
    rollout: RolloutConfig,
    seed: int = 0,
) -> Samples:
    """n sampled completions of each prompt (token ids, one for each example), judged by the example's check.

    rollout: the sampling; its temperature must be above 0, and its per_prompt is not read. Raises SdftError if there
    are no prompts, or if all samples would be the same.
    """
    if n < 1 or not prompts:
        raise SdftError(f"{n} samples of {len(prompts)} prompts: both must be 1 or more")
    if rollout.temperature == 0:
        raise SdftError("rollout.temperature = 0 gives the same answer every time; set it above 0 for pass@k")
    # The samples of a prompt lie next to each other, so a batch holds all samples of as many prompts as fit.
    repeated = [p for p in prompts for _ in range(n)]
    completions = engine.generate(repeated, rollout, seed)
    answers = judge(tokenizer, [e for e in examples for _ in range(n)], completions)
    return Samples(n, tuple(sum(a.correct for a in answers[i : i + n]) for i in range(0, len(answers), n)))
