"""Completions: greedy against a naive loop, sampling against the model's own softmax."""

from collections import Counter
from typing import Any

import pytest
import torch

from sdft.config import RolloutConfig
from sdft.rollout import Completion, generate

PROMPTS = [[10, 20, 30], [40], [50, 60, 70, 80, 90, 100, 110], [7, 7], [120, 121, 122, 123]]


@torch.no_grad()
def naive(model: Any, prompt: list[int], new: int) -> Completion:
    """Greedy, one whole unpadded forward a token: no cache, no batch."""
    ids: list[int] = []
    for _ in range(new):
        ids.append(int(model.lm(torch.tensor([prompt + ids])).logits[0, -1].argmax()))
        if ids[-1] in model.stop_ids:
            return Completion(ids, truncated=False)
    return Completion(ids, truncated=True)


@torch.no_grad()
def probabilities(model: Any, prompt: list[int], temperature: float = 1.0) -> torch.Tensor:
    return torch.softmax(model.lm(torch.tensor([prompt])).logits[0, -1].float() / temperature, -1)


def greedy(**settings: Any) -> RolloutConfig:
    return RolloutConfig(temperature=0.0, **{"max_new_tokens": 12} | settings)


def test_greedy_is_the_naive_loop(family: str, load_tiny: Any) -> None:
    model = load_tiny(family)[1]
    model.lm.eval()
    want = [naive(model, p, 12) for p in PROMPTS]
    model.lm.train()
    assert generate(model, PROMPTS, greedy()) == want
    assert model.lm.training  # as it was


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_order_does_not_depend_on_the_batch_size(load_tiny: Any, batch_size: int) -> None:
    model = load_tiny()[1]
    model.lm.eval()
    assert generate(model, PROMPTS, greedy(batch_size=batch_size)) == [naive(model, p, 12) for p in PROMPTS]


def test_stop_tokens_cut_and_the_rest_is_truncated(load_tiny: Any) -> None:
    model = load_tiny()[1]
    model.lm.eval()
    free = [naive(model, p, 12).ids for p in PROMPTS]
    model.stop_ids = (257, free[0][3], free[2][5])  # tokens that these answers do reach, the model's own stop first
    got = generate(model, PROMPTS, greedy())
    assert got == [naive(model, p, 12) for p in PROMPTS]
    assert len(got[0].ids) <= 4
    assert {c.truncated for c in got} == {True, False}
    assert all((c.ids[-1] in model.stop_ids) != c.truncated for c in got)
    assert all(t not in model.stop_ids for c in got for t in c.ids[:-1])
    assert all(len(c.ids) == 12 for c in got if c.truncated)


def test_sampling_follows_the_seed(load_tiny: Any) -> None:
    model = load_tiny()[1]

    def draw(seed: int) -> list[Completion]:
        torch.manual_seed(seed)
        return generate(model, PROMPTS, RolloutConfig(max_new_tokens=8))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def sample_counts(model: Any, prompt: list[int], draws: int, **settings: Any) -> torch.Tensor:
    torch.manual_seed(5)
    config = RolloutConfig(max_new_tokens=1, batch_size=2000, **settings)
    counts = Counter(c.ids[0] for c in generate(model, [prompt] * draws, config))
    return torch.tensor([counts[t] for t in range(264)], dtype=torch.float64)


def chi_square_ok(counts: torch.Tensor, p: torch.Tensor) -> bool:
    """Whether `counts` look drawn from p: chi-square over the tokens expected 5 times or more and the rest as one,
    within 5 standard deviations of its mean."""
    draws, p = counts.sum(), p.double()
    often = p * draws >= 5
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    due = torch.cat([p[often], p[~often].sum()[None]]) * draws
    freedom = len(due) - 1
    chi = ((seen - due) ** 2 / due.clamp(min=1e-9)).sum()
    return bool(chi < freedom + 5 * (2 * freedom) ** 0.5)


@pytest.fixture
def tiny(load_tiny: Any) -> Any:
    model = load_tiny()[1]
    model.lm.eval()
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_have_the_models_probabilities(tiny: Any, temperature: float) -> None:
    counts = sample_counts(tiny, PROMPTS[0], 8000, temperature=temperature)
    assert chi_square_ok(counts, probabilities(tiny, PROMPTS[0], temperature))
    assert not chi_square_ok(counts, probabilities(tiny, PROMPTS[0], temperature * 1.25))  # it can tell


def test_top_k_and_top_p_keep_what_they_say(tiny: Any) -> None:
    p = probabilities(tiny, PROMPTS[0])
    order = p.argsort(descending=True)
    for settings, kept in (
        ({"top_k": 5}, order[:5]),
        ({"top_p": 0.5}, order[: int((p[order].cumsum(0) < 0.5).sum()) + 1]),
    ):
        left = torch.zeros_like(p).index_copy_(0, kept, p[kept])
        assert chi_square_ok(sample_counts(tiny, PROMPTS[0], 4000, **settings), left / left.sum())


LEAKS = {
    "repetition_penalty": 3.0, "top_k": 2, "top_p": 0.2, "temperature": 0.1, "min_p": 0.5, "typical_p": 0.3,
    "no_repeat_ngram_size": 1, "suppress_tokens": [1, 2, 3, 10, 20], "epsilon_cutoff": 0.05,
    "min_new_tokens": 6, "forced_eos_token_id": 5, "bad_words_ids": [[10]],
}  # fmt: skip


@pytest.mark.parametrize("name", LEAKS)
def test_the_models_generation_config_does_not_leak_into_samples(tiny: Any, name: str) -> None:
    def draw() -> list[Completion]:
        torch.manual_seed(3)
        return [*generate(tiny, PROMPTS, RolloutConfig(max_new_tokens=8)), *generate(tiny, PROMPTS, greedy())]

    want = draw()
    setattr(tiny.lm.generation_config, name, LEAKS[name])
    own = tiny.lm.generation_config
    assert draw() == want
    assert tiny.lm.generation_config is own


def test_a_generation_config_as_models_bring_it_leaves_frequencies_alone(tiny: Any) -> None:
    for name in ("repetition_penalty", "top_k", "min_p", "suppress_tokens"):
        setattr(tiny.lm.generation_config, name, LEAKS[name])
    assert chi_square_ok(sample_counts(tiny, PROMPTS[0], 8000), probabilities(tiny, PROMPTS[0]))


def test_the_given_weights_generate(load_tiny: Any) -> None:
    import contextlib

    model = load_tiny()[1]
    model.lm.eval()
    before = generate(model, PROMPTS, greedy())

    @contextlib.contextmanager
    def other() -> Any:
        model.lm.lm_head.weight.data.neg_()
        yield
        model.lm.lm_head.weight.data.neg_()

    within = generate(model, PROMPTS, greedy(), other)
    with other():
        assert within == [naive(model, p, 12) for p in PROMPTS] != before
    assert generate(model, PROMPTS, greedy()) == before
