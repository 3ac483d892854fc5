"""Token ids -> sampled completions, by transformers' generate: batched, left-padded, with a KV cache."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from sdft.config import RolloutConfig
from sdft.models import LanguageModel


@dataclass(frozen=True)
class Completion:
    ids: list[int]  # the end-of-turn token included where it was reached
    truncated: bool  # max_new_tokens came first


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: RolloutConfig,
    weights: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> list[Completion]:
    """One completion for each prompt, in order.

    prompts: token ids, of any lengths. config: sampling; temperature 0 is greedy. weights: a context in which
    the model holds the weights that generate (teacher.weights). Draws from torch's global generator.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
    done: dict[int, Completion] = {}
    with weights():
        for start in range(0, len(order), config.batch_size):
            part = order[start : start + config.batch_size]
            for i, completion in zip(part, _generate_batch(model, [prompts[i] for i in part], config), strict=True):
                done[i] = completion
    return [done[i] for i in range(len(prompts))]


def _generate_batch(model: LanguageModel, prompts: Sequence[Sequence[int]], config: RolloutConfig) -> list[Completion]:
    from transformers import GenerationConfig

    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), model.pad_id)  # (B, T)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=config.temperature > 0,
        pad_token_id=model.pad_id,
        eos_token_id=list(model.stop_ids),
        use_cache=True,
        **(sampling if config.temperature > 0 else {}),
    )
    training, inner = model.lm.training, model.inner
    # generate() fills what `settings` leaves out from the model's own (penalties, min_p, suppressed tokens), but
    # samples must come from the policy itself.
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    model.lm.eval()
    try:
        with torch.no_grad(), model.autocast():
            out = inner.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
            )
    finally:
        inner.generation_config = own
        model.lm.train(training)
    return [_cut(row, model.stop_ids) for row in out[:, width:].tolist()]


def _cut(ids: list[int], stop_ids: Sequence[int]) -> Completion:
    for i, token in enumerate(ids):
        if token in stop_ids:
            return Completion(ids[: i + 1], truncated=False)
    return Completion(ids, truncated=True)
