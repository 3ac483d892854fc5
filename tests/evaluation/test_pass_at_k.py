"""pass@k: against counts of subsets, and against the probabilities of the model."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdft.config import RolloutConfig
from sdft.data.records import parse_record
from sdft.errors import SdftError
from sdft.evaluation import pass_at_k
from sdft.evaluation.pass_at_k import Samples
from sdft.rollout.engine import Completion
from sdft.rollout.sampling import ModelEngine


def test_pass_at_k_by_hand() -> None:
    assert Samples(5, (0, 1, 2, 5)).pass_at(2) == pytest.approx((0.0 + 2 / 5 + 1 - (3 * 2) / (5 * 4) + 1.0) / 4)
    assert Samples(5, (1,)).powers() == [1, 2, 4, 5]


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_fraction_of_subsets(case: tuple[int, int, int]) -> None:
    n, c, k = case
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert Samples(n, (c,)).pass_at(k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_k_of_many_samples_is_stable() -> None:
    n, c, k = 10_000, 3, 5_000
    exact = 1 - math.prod((n - k - i) / (n - i) for i in range(c))
    assert Samples(n, (c,)).pass_at(k) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("k", [0, 4])
def test_k_is_at_most_the_number_of_samples(k: int) -> None:
    with pytest.raises(SdftError, match=rf"k = {k}: it must lie between 1 and the number of samples \(3\)"):
        Samples(3, (1,)).pass_at(k)


def test_samples_are_counted_for_their_own_prompt(load_tiny: Any) -> None:
    tokenizer, _ = load_tiny()
    examples = [parse_record({"prompt": p, "answer": p.upper()}, "f:1") for p in ("a", "b", "c")]
    said = iter(["A", "A", "x", "A", "B", "x", "x", "A", "x", "x", "x", "x"])
    asked: list[list[int]] = []

    class Scripted:
        def generate(self, prompts: Any, sampling: Any, seed: Any = None) -> list[Completion]:
            asked.extend(prompts)
            return [Completion(tokenizer(next(said))["input_ids"], False) for _ in prompts]

        def sync(self, weights: Any = None) -> None: ...

    got = pass_at_k.sample_answers(Scripted(), tokenizer, examples, [[1], [2], [3]], 4, RolloutConfig())
    assert asked == [[1]] * 4 + [[2]] * 4 + [[3]] * 4
    assert got == pass_at_k.Samples(4, (3, 1, 0))
    assert got.pass_at(1) == pytest.approx((3 + 1 + 0) / 12)
    assert got.pass_at(2) == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert got.pass_at(4) == pytest.approx(2 / 3)
    with pytest.raises(SdftError, match="k = 5"):
        got.pass_at(5)


@torch.no_grad()
def test_samples_follow_the_models_own_probabilities(load_tiny: Any) -> None:
    """Completions of one token, right if it is the likeliest: as often as the softmax predicts."""
    tokenizer, model = load_tiny()
    p = model.lm(torch.tensor([[65]])).logits[0, -1].double().softmax(-1)
    likely = int(p[:94].argmax())  # a printable one, alone in its answer
    text = tokenizer.decode([likely])
    examples = [parse_record({"prompt": "x", "answer": text, "check": "exact"}, "f:1")]
    one = RolloutConfig(max_new_tokens=1, batch_size=500)
    got = pass_at_k.sample_answers(ModelEngine(model), tokenizer, examples, [[65]], 2000, one, seed=1)
    want = float(p[likely])
    assert got.pass_at(1) == pytest.approx(want, abs=4 * (want * (1 - want) / 2000) ** 0.5)
    assert got == pass_at_k.sample_answers(ModelEngine(model), tokenizer, examples, [[65]], 2000, one, seed=1)
    assert got != pass_at_k.sample_answers(ModelEngine(model), tokenizer, examples, [[65]], 2000, one, seed=2)


def test_bad_samples(load_tiny: Any) -> None:
    tokenizer, model = load_tiny()
    with pytest.raises(SdftError, match=r"rollout.temperature = 0 gives the same answer"):
        pass_at_k.sample_answers(ModelEngine(model), tokenizer, [], [[1]], 3, RolloutConfig(temperature=0.0))
    with pytest.raises(SdftError, match="0 samples of 1 prompts"):
        pass_at_k.sample_answers(ModelEngine(model), tokenizer, [], [[1]], 0, RolloutConfig())
