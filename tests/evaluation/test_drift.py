"""Divergence from the base against dense float64."""

import copy
from typing import Any

import pytest
import torch

from sdft.config import LoraConfig, RolloutConfig, TeacherConfig
from sdft.errors import SdftError
from sdft.evaluation import drift
from sdft.model.lora import add_lora
from sdft.model.packing import enable_packing
from sdft.rollout.sampling import ModelEngine
from sdft.score.teacher import Teacher
from sdft.update.ema import make_teacher

PROMPTS = [[10, 20, 30], [40], [50, 60, 70, 80, 90, 100, 110], [7, 7]]
GREEDY = RolloutConfig(temperature=0.0, max_new_tokens=9)


@torch.no_grad()
def log_probs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """(n, V) float64 for the tokens of one completion, from all logits of the Hugging Face model."""
    model.lm.eval()
    return model.lm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


def by_hand(model: Any, base: Any, answers: list[list[int]]) -> list[torch.Tensor]:
    rows = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        p, q = log_probs(model, prompt, answer), log_probs(base, prompt, answer)
        rows.append(
            torch.stack([(p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1), -(p.exp() * p).sum(-1),
                         -(q.exp() * q).sum(-1)])
        )  # fmt: skip
    return list(torch.cat(rows, 1))


def moved(load_tiny: Any, nudge: Any, kind: str = "llama") -> tuple[Any, Any, Teacher]:
    """A model away from its base, another model that is the base, and a teacher that holds the base."""
    base, model = load_tiny(kind)[1], load_tiny(kind)[1]
    teacher = make_teacher(model, TeacherConfig(kind="base"))
    nudge(model)
    return model, base, teacher


def values(found: drift.Drift) -> list[torch.Tensor]:
    return [found.kl, found.kl_back, found.entropy, found.base_entropy]


def test_both_directions_are_the_dense_ones(family: str, load_tiny: Any, nudge: Any) -> None:
    model, base, teacher = moved(load_tiny, nudge, family)
    answers = [c.ids for c in ModelEngine(model).generate(PROMPTS, GREEDY)]
    want = by_hand(model, base, answers)
    assert want[0].mean() > 0.01
    model.lm.train()
    for held in (base, teacher):
        got = drift.drift(model, held, PROMPTS, GREEDY, batch_tokens=20)
        assert got.lengths == tuple(len(a) for a in answers)
        for g, w in zip(values(got), want, strict=True):
            torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-5)
    assert model.lm.training  # as it was
    summary = got.summary()
    assert summary["kl_to_base"] == pytest.approx(float(want[0].mean()), rel=1e-3)
    assert summary["kl_from_base"] == pytest.approx(float(want[1].mean()), rel=1e-3)
    assert summary["entropy"] == pytest.approx(float(want[2].mean()), rel=1e-3)
    assert summary["answer_tokens"] == sum(map(len, answers)) / 4


def test_adapters_and_packing(load_tiny: Any, nudge: Any) -> None:
    model, base = load_tiny()[1], load_tiny()[1]
    add_lora(model, LoraConfig(rank=4), 0)
    teacher = make_teacher(model, TeacherConfig(kind="base"))  # holds nothing: the adapter switched off
    nudge(model, size=0.2)
    want = by_hand(model, base, [c.ids for c in ModelEngine(model).generate(PROMPTS, GREEDY)])
    enable_packing(model, "on")
    for held in (base, teacher):
        got = drift.drift(model, held, PROMPTS, GREEDY)
        torch.testing.assert_close(got.kl.double(), want[0], rtol=1e-3, atol=1e-5)


def test_a_model_is_not_away_from_itself(load_tiny: Any) -> None:
    model = load_tiny()[1]
    got = drift.drift(model, copy.copy(model), PROMPTS, GREEDY)
    assert got.kl.abs().max() < 1e-6
    torch.testing.assert_close(got.entropy, got.base_entropy)


def test_sampled_answers_are_those_of_the_seed(load_tiny: Any, nudge: Any) -> None:
    model, base, _ = moved(load_tiny, nudge)
    sampled = RolloutConfig(max_new_tokens=9)
    before = torch.get_rng_state()
    one = drift.drift(model, base, PROMPTS, sampled, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    again, other = (drift.drift(model, base, PROMPTS, sampled, seed=s) for s in (3, 4))
    assert one.lengths == again.lengths
    assert torch.equal(one.kl, again.kl)
    assert other.kl.shape != one.kl.shape or not torch.equal(other.kl, one.kl)


def test_means_over_tokens_and_completions() -> None:
    flat = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0])
    got = drift.Drift((3, 2), (False, True), flat, 2 * flat, flat, flat)
    assert got.summary()["answer_tokens"] == 2.5
    assert got.summary()["truncated"] == 0.5
    assert got.summary()["kl_to_base"] == pytest.approx(36 / 5)


def test_answers_that_end(load_tiny: Any, nudge: Any) -> None:
    model, base, _ = moved(load_tiny, nudge)
    free = ModelEngine(model).generate(PROMPTS, GREEDY)
    model.stop_ids = (free[0].ids[2], 257)
    got, ended = drift.drift(model, base, PROMPTS, GREEDY), ModelEngine(model).generate(PROMPTS, GREEDY)
    assert got.truncated == tuple(c.truncated for c in ended)
    assert got.lengths == tuple(len(c.ids) for c in ended)
    assert got.lengths[0] <= 3
    assert not got.truncated[0]


def test_bad_bases_and_prompts(load_tiny: Any) -> None:
    model = load_tiny()[1]
    with pytest.raises(SdftError, match="no prompts are given"):
        drift.drift(model, model, [], GREEDY)
    with pytest.raises(SdftError, match="a teacher of kind 'ema', which moves"):
        drift.drift(model, make_teacher(model, TeacherConfig()), PROMPTS, GREEDY)
