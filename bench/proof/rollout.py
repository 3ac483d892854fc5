"""Tokens a second of our decoder and of transformers' generate, at temperature 1; greedy completions compared."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..trainers import NO_TOKEN
from .check import Check, Found, recorded, relative
from .phase import Item, Place, Row
from .steps import random_model

PROMPT = 64  # tokens of the longest prompt; the shortest has half
NEW = 128
SETTINGS = (("float32", 32), ("bfloat16", 32), ("bfloat16", 128))  # dtype of the weights, prompts


def items(place: Place) -> list[Item]:
    sizes = ("tiny",) if place.tiny else ("0.5B", "1.5B")
    speeds = [
        Item(f"{size}, {dtype} weights, {prompts} prompts", partial(speed, size, dtype, prompts, place))
        for size in sizes
        for dtype, prompts in ([("float32", 3)] if place.tiny else SETTINGS)
    ]
    return [*(Item(check.name, partial(recorded, check, place)) for check in CHECKS), *speeds]


def load(size: str, place: Place, weights: str, compute: str) -> Any:
    """A LanguageModel that never stops early."""
    from sdft.config import ModelConfig
    from sdft.model.loading import load as load_model
    from sdft.model.loading import load_tokenizer

    dtypes: dict[str, Any] = {"weights_dtype": weights, "compute_dtype": compute}
    config = ModelConfig(name=random_model(size, place), device=place.device, **dtypes)
    tokenizer, _ = load_tokenizer(config)
    return load_model(config, tokenizer, (NO_TOKEN,))


def prompts_of(count: int, vocab: int) -> list[list[int]]:
    gen = torch.Generator().manual_seed(0)
    lengths = torch.randint(PROMPT // 2, PROMPT + 1, (count,), generator=gen)
    return [torch.randint(3, vocab, (int(n),), generator=gen).tolist() for n in lengths]


def ours(model: Any, prompts: list[list[int]], new: int, temperature: float) -> list[list[int]]:
    from sdft.config import RolloutConfig
    from sdft.rollout.sampling import ModelEngine

    config = RolloutConfig(max_new_tokens=new, temperature=temperature, batch_size=len(prompts))
    return [completion.ids for completion in ModelEngine(model).generate(prompts, config)]


def theirs(model: Any, prompts: list[list[int]], new: int, temperature: float) -> list[list[int]]:
    """generate of transformers on the same left-padded batch, with the stop tokens forbidden."""
    width = max(map(len, prompts))
    ids = torch.tensor([[model.pad_id] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with model.evaluating(), torch.no_grad(), model.autocast():
        out = model.lm.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, pad_token_id=model.pad_id,
            **sampling,
        )  # fmt: skip
    return out[:, width:].tolist()


def speed(size: str, weights: str, count: int, place: Place, rows: list[Row]) -> None:
    new = 4 if place.tiny else NEW
    model = load(size, place, weights, "float32" if place.tiny else "bfloat16")
    prompts = prompts_of(count, model.head().weight.shape[0])
    for name, run in (("ours", ours), ("transformers' generate", theirs)):
        run(model, prompts, new, 1.0)  # compiles and tunes
        if place.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        made = run(model, prompts, new, 1.0)
        seconds = time.perf_counter() - start
        tokens = sum(map(len, made))
        peak = torch.cuda.max_memory_allocated() if place.device == "cuda" else None
        who = {"model": size, "weights": weights, "prompts": count, "new tokens": new, "decoder": name}
        rows.append(who | {"tokens/s": tokens / seconds, "ms a token": 1e3 * seconds / new, "peak": peak})


def greedy(place: Place) -> Iterator[Found]:
    """In fp32 throughout: the share of tokens that differ, including all tokens after the first difference."""
    model = load("tiny" if place.tiny else "0.5B", place, "float32", "float32")
    prompts = prompts_of(4, model.head().weight.shape[0])
    mine, other = (run(model, prompts, 4 if place.tiny else 16, 0.0) for run in (ours, theirs))
    pairs = [a == b for row, like in zip(mine, other, strict=True) for a, b in zip(row, like, strict=True)]
    yield Found("share of tokens that differ", 1 - sum(pairs) / len(pairs), 0.05)


def hidden_states(place: Place) -> Iterator[Found]:
    """fp32 weights under bf16 products: decoding a few tokens at a time gives the hidden states of one whole pass."""
    from sdft.rollout.decode import decoder

    model = load("tiny" if place.tiny else "0.5B", place, "float32", "bfloat16")
    vocab = model.head().weight.shape[0]
    ids = torch.randint(3, vocab, (3, 12), generator=torch.Generator().manual_seed(0)).to(place.device)
    position = torch.arange(12, device=place.device).expand(3, 12)
    with model.evaluating(), torch.no_grad(), model.autocast():
        whole = model.hidden(ids)[:, 9:].float()  # (B, 3, H)
        with decoder(model, 12) as start:
            passage = start(3, 12)
            parts = [slice(0, 10), slice(10, 11), slice(11, 12)]
            made = torch.stack([passage(ids[:, p], position[:, p], None).float() for p in parts], dim=1)
    yield Found("hidden states", relative(made, whole), 0.05)


CHECKS = (Check("greedy as transformers' generate", greedy), Check("hidden states of decoding", hidden_states))
