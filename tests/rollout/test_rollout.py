"""Completions: greedy against a naive loop, sampling against the softmax of the model."""

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch

from sdft.config import LoraConfig, RolloutConfig
from sdft.model.lora import add_lora
from sdft.rollout import sampling
from sdft.rollout.engine import Completion
from sdft.rollout.sampling import ModelEngine

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
    assert ModelEngine(model).generate(PROMPTS, greedy()) == want
    assert model.lm.training  # as it was


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_order_does_not_depend_on_the_batch_size(load_tiny: Any, batch_size: int) -> None:
    model = load_tiny()[1]
    model.lm.eval()
    assert ModelEngine(model).generate(PROMPTS, greedy(batch_size=batch_size)) == [naive(model, p, 12) for p in PROMPTS]


def test_stop_tokens_cut_and_the_rest_is_truncated(load_tiny: Any) -> None:
    model = load_tiny()[1]
    model.lm.eval()
    free = [naive(model, p, 12).ids for p in PROMPTS]
    model.stop_ids = (
        257,
        free[0][3],
        free[2][5],
    )  # tokens that these completions reach, the stop token of the model first
    got = ModelEngine(model).generate(PROMPTS, greedy())
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
        return ModelEngine(model).generate(PROMPTS, RolloutConfig(max_new_tokens=8))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def sample_counts(model: Any, prompt: list[int], draws: int, **settings: Any) -> torch.Tensor:
    torch.manual_seed(5)
    config = RolloutConfig(max_new_tokens=1, batch_size=2000, **settings)
    counts = Counter(c.ids[0] for c in ModelEngine(model).generate([prompt] * draws, config))
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
    assert not chi_square_ok(counts, probabilities(tiny, PROMPTS[0], temperature * 1.25))  # the test can fail


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
        return [
            *ModelEngine(tiny).generate(PROMPTS, RolloutConfig(max_new_tokens=8)),
            *ModelEngine(tiny).generate(PROMPTS, greedy()),
        ]

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
    model = load_tiny()[1]
    model.lm.eval()
    before = ModelEngine(model).generate(PROMPTS, greedy())

    @contextlib.contextmanager
    def other() -> Any:
        model.lm.lm_head.weight.data.neg_()
        yield
        model.lm.lm_head.weight.data.neg_()

    engine = ModelEngine(model)
    engine.sync(other)
    within = engine.generate(PROMPTS, greedy())
    with other():
        assert within == [naive(model, p, 12) for p in PROMPTS] != before
    engine.sync()
    assert engine.generate(PROMPTS, greedy()) == before


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5, "top_p": 0.9}, {"top_k": 5}, {"temperature": 0.0}], ids=str
)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])  # whose logits are soft-capped
def test_log_probabilities_are_those_of_the_models_whole_distribution(
    kind: str, settings: dict[str, Any], load_tiny: Any
) -> None:
    """At temperature 1 and over the whole vocabulary, however the tokens are drawn; against float64 without a cache."""
    model = load_tiny(kind)[1]
    got = ModelEngine(model).generate(PROMPTS, RolloutConfig(max_new_tokens=8, batch_size=3, **settings), seed=2)
    model.lm.eval().double()
    for prompt, completion in zip(PROMPTS, got, strict=True):
        ids = torch.tensor(completion.ids)
        logits = model.lm(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
        want = logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs).double(), want, rtol=1e-5, atol=1e-5)


def test_a_seed_alone_decides_and_leaves_no_trace(tiny: Any) -> None:
    engine, sampling = ModelEngine(tiny), RolloutConfig(max_new_tokens=8)
    before = torch.get_rng_state()
    one = engine.generate(PROMPTS, sampling, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert engine.generate(PROMPTS, sampling, seed=1) == one != engine.generate(PROMPTS, sampling, seed=2)


# What the loop does besides.


@pytest.mark.parametrize("every", [1, 3, 8])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # by fused blocks, and by transformers
def test_finished_rows_are_dropped(kind: str, load_tiny: Any, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_tiny(kind)[1]
    model.lm.eval()
    free = [naive(model, p, 12).ids for p in PROMPTS]
    ends = (ids[n] for ids, n in zip(free[:4], (1, 4, 5, 8), strict=True))
    model.stop_ids = (257, *(token for token in ends if token not in free[4]))  # the last row runs to the end
    want = [naive(model, p, 12) for p in PROMPTS]
    assert len({len(c.ids) for c in want}) >= 3
    monkeypatch.setitem(sampling.CHECK_EVERY, "cpu", every)
    rows = []
    hook = model.lm.get_input_embeddings().register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    assert ModelEngine(model).generate(PROMPTS, greedy()) == want
    hook.remove()
    assert rows[0] == len(PROMPTS)
    assert rows == sorted(rows, reverse=True)
    assert sum(rows) < len(rows) * len(PROMPTS)
    assert len(rows) <= -(-max(len(c.ids) for c in want) // every) * every


def state(model: Any) -> list[Any]:
    return [list(model.lm.modules()), [(p, p.data_ptr(), p.dtype) for p in model.lm.parameters()], model.lm.training]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rank", "dora"), [(0, False), (2, False), (2, True)])  # DoRA runs transformers' blocks
def test_the_model_is_left_as_it_was(rank: int, dora: bool, compute: str, load_tiny: Any) -> None:
    model = load_tiny("llama-tied", compute_dtype=compute)[1]
    if rank:
        add_lora(model, LoraConfig(rank=rank, dora=dora), 0)
    before = state(model)
    ModelEngine(model).generate(PROMPTS, greedy())
    assert state(model) == before
    with pytest.raises(IndexError):
        ModelEngine(model).generate([[9999]], greedy())
    assert state(model) == before


@pytest.mark.parametrize("rank", [0, 2])
def test_weights_are_cast_once_and_not_for_every_token(rank: int, load_tiny: Any) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    model = load_tiny("llama-tied", compute_dtype="bfloat16")[1]
    model.stop_ids = ()
    if rank:
        add_lora(model, LoraConfig(rank=rank), 0)
    sizes = {tuple(p.shape) for p in model.lm.parameters() if p.ndim == 2 and min(p.shape) >= 16}

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
                self.count += tuple(out.shape) in sizes
            return out

    counts = []
    for new in (2, 9):
        with Casts() as casts:
            ModelEngine(model).generate(PROMPTS, greedy(max_new_tokens=new))
        counts.append(casts.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("kind", ["llama", "phi", "gemma3"])
def test_bf16_logits_are_those_of_the_scorer(kind: str, load_tiny: Any) -> None:
    """The first token's probabilities, by frequency: what generates is the policy that is trained."""
    model = load_tiny(kind, compute_dtype="bfloat16")[1]
    model.lm.eval()
    with torch.no_grad(), model.autocast():
        hidden = model.hidden(torch.tensor([PROMPTS[2]]))[0, -1:]
        p = model.head().logits(hidden).float().softmax(-1)[0]
    assert chi_square_ok(sample_counts(model, PROMPTS[2], 8000), p)


def test_tokens_without_probability_are_never_drawn() -> None:
    pick = sampling.sampler(RolloutConfig())
    logits = torch.full((20000, 7), float("-inf"))
    logits[:, 2] = logits[:, 5] = 0.0
    torch.manual_seed(0)
    counts = pick(logits).flatten().bincount(minlength=7)
    assert counts[2] + counts[5] == 20000
    assert abs(counts[2] - 10000) < 5 * 5000**0.5
    for only in (0, 6):
        assert (pick(torch.full((500, 7), -1e4).index_fill_(1, torch.tensor([only]), 50.0)) == only).all()


@pytest.mark.parametrize(
    "settings", [{}, {"dora": True}, {"rslora": True}, {"targets": ("q_proj", "down_proj")}], ids=str
)
@pytest.mark.parametrize("off", [False, True])
def test_adapters_generate_as_they_score(settings: dict[str, Any], off: bool, load_tiny: Any, nudge: Any) -> None:
    model = load_tiny()[1]
    add_lora(model, LoraConfig(rank=2, **settings), 0)
    plain = ModelEngine(model).generate(PROMPTS, greedy())
    nudge(model, size=0.3)
    model.lm.eval()
    with model.lm.disable_adapter() if off else contextlib.nullcontext():
        got = ModelEngine(model).generate(PROMPTS, greedy())
        assert got == [naive(model, p, 12) for p in PROMPTS]
    assert (got == plain) == off
