"""Token ids -> sampled completions: prompts of like lengths together, left-padded, finished rows dropped.

Legend: B prompts that generate together, T tokens of the longest, V vocabulary.
This loop is not transformers' generate, which grows its cache by copying it for every token, runs finished rows to the
end and computes more than sampling needs (docs/performance.md).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sdft.config import RolloutConfig
from sdft.device import prepared_linear
from sdft.model.language_model import LanguageModel
from sdft.rollout.decode import BatchDecoder, decoder
from sdft.rollout.engine import Completion, Weights, own_weights

# Tokens between two looks at what is finished. A look makes the host wait for a device that would run ahead of it.
CHECK_EVERY = {"cpu": 1, "cuda": 8}


class ModelEngine:
    """The engine that generates with the model in this process."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.weights = own_weights

    def sync(self, weights: Weights = own_weights) -> None:
        """See `Engine.sync`. Nothing is copied: the model has the weights while it generates."""
        self.weights = weights

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: RolloutConfig, seed: int | None = None
    ) -> list[Completion]:
        """See `Engine.generate`. The draws of a prompt depend on which prompts are completed with it."""
        model = self.model
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
        done: dict[int, Completion] = {}
        longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
        with (
            torch.no_grad(), seeded(seed, model.device), model.evaluating(), self.weights(), model.autocast(),
            decoder(model, longest) as start,
        ):  # fmt: skip
            head = decoding_head(model)
            for at in range(0, len(order), sampling.batch_size):
                part = order[at : at + sampling.batch_size]
                rows = generate_batch(model, start, head, [prompts[i] for i in part], sampling)
                done |= {i: _cut(*row, model.stop_ids) for i, row in zip(part, rows, strict=True)}
        return [done[i] for i in range(len(prompts))]


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """A context in which torch draws from `seed`; afterwards its generators are as before. None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def decoding_head(model: LanguageModel) -> Callable[[Tensor], Tensor]:
    """Hidden states (B, H) -> logits (B, V) in fp32."""
    head = model.head()
    project = prepared_linear(head.weight, head.bias, model.compute_dtype)
    return lambda hidden: head.cap(project(hidden).float())


def generate_batch(
    model: LanguageModel,
    start: Callable[[int, int], BatchDecoder],
    head: Callable[[Tensor], Tensor],
    prompts: Sequence[Sequence[int]],
    sampling: RolloutConfig,
) -> list[tuple[list[int], list[float]]]:
    """Ids and log-probabilities of each completion, with whatever comes after its end."""
    width, device = max(len(p) for p in prompts), model.device
    longest = width + sampling.max_new_tokens
    ids = torch.tensor([[model.pad_id] * (width - len(p)) + [*p] for p in prompts], device=device)  # (B, T)
    lengths = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
    places = torch.arange(longest, device=device)
    mask = None
    if any(len(p) < width for p in prompts):
        mask = (places >= width - lengths[:, None]).long()  # (B, T + new)
    position = (places[:width] - width + lengths[:, None]).clamp(min=0)  # (B, T)
    stop = torch.tensor(model.stop_ids, device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)  # (B,)
    decode, pick = start(len(prompts), longest), sampler(sampling)
    rows = list(range(len(prompts)))  # which completion each row of the batch is
    out: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    drawn: list[Tensor] = []  # tokens (B,) not yet in `out`
    likely: list[Tensor] = []  # their log-probabilities (B,)
    for n in range(sampling.max_new_tokens):
        hidden = decode(ids, position, None if mask is None else mask[:, : width + n])  # (B, H)
        logits = head(hidden)  # (B, V)
        ids = pick(logits)  # (B, 1)
        drawn.append(ids[:, 0])
        likely.append(logits.log_softmax(-1).gather(1, ids)[:, 0])
        finished |= torch.isin(ids[:, 0], stop)
        position = position[:, -1:] + 1
        if (n + 1) % CHECK_EVERY.get(device.type, 8) == 0 or n + 1 == sampling.max_new_tokens:
            columns = torch.stack(drawn, dim=1).tolist(), torch.stack(likely, dim=1).tolist()
            for row, tokens, logprobs in zip(rows, *columns, strict=True):
                out[row][0].extend(tokens)
                out[row][1].extend(logprobs)
            drawn, likely = [], []
            ended = finished.tolist()
            if all(ended):
                break
            if sum(ended) * 4 >= len(rows):  # a row is dropped with its keys and values, which are copied for that
                keep = (~finished).nonzero()[:, 0]
                rows = [row for row, end in zip(rows, ended, strict=True) if not end]
                ids, position, finished = ids[keep], position[keep], finished[keep]
                mask = None if mask is None else mask[keep]
                decode.keep(keep)
    return out


def sampler(config: RolloutConfig) -> Callable[[Tensor], Tensor]:
    """Logits (B, V) fp32 -> tokens (B, 1), by the config's temperature, top-k and top-p, in this order."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if config.temperature == 0:
        return lambda logits: logits.argmax(-1, keepdim=True)
    warpers: list[Any] = [TemperatureLogitsWarper(config.temperature)] if config.temperature != 1 else []
    warpers += [TopKLogitsWarper(config.top_k)] if config.top_k else []
    warpers += [TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []

    def pick(logits: Tensor) -> Tensor:
        for warp in warpers:
            logits = warp(None, logits)
        # By the inverse of the distribution function: multinomial draws V exponentials for each row, 7 ms on a CPU. In
        # float64, because a sum of V terms in fp32 would shift the likelihood of rare tokens.
        total = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, V)
        draw = torch.rand(len(logits), 1, device=logits.device, dtype=torch.float64) * total[:, -1:]  # (B, 1)
        return torch.searchsorted(total, draw, right=True).clamp(max=logits.shape[1] - 1)

    return pick


def _cut(ids: list[int], logprobs: list[float], stop_ids: Sequence[int]) -> Completion:
    for i, token in enumerate(ids):
        if token in stop_ids:
            return Completion(ids[: i + 1], False, logprobs[: i + 1])
    return Completion(ids, True, logprobs)
