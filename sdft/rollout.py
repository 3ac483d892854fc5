"""Token ids -> sampled completions: prompts of like lengths together, left-padded, with a preallocated KV cache.

Legend: B prompts that generate together, T tokens of the longest, V vocabulary.
A loop of our own, because transformers' generate grows its cache by copying it for every token, runs finished rows to
the end and computes more than sampling needs: 1.2 times the time on the CPU, 2.6 with LoRA (docs/performance.md).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdft.config import RolloutConfig
from sdft.models import LanguageModel, backbone

# Tokens between two looks at what is finished. A look makes the host wait for a device that would run ahead of it.
CHECK_EVERY = {"cpu": 1, "cuda": 8}


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
    training = model.lm.training
    model.lm.eval()
    try:
        with torch.no_grad(), weights(), decoding_weights(model), model.autocast():
            head = decoding_head(model)
            for start in range(0, len(order), config.batch_size):
                part = order[start : start + config.batch_size]
                ids = _generate_batch(model, head, [prompts[i] for i in part], config)
                done |= {i: _cut(row, model.stop_ids) for i, row in zip(part, ids, strict=True)}
    finally:
        model.lm.train(training)
    return [done[i] for i in range(len(prompts))]


@contextlib.contextmanager
def decoding_weights(model: LanguageModel) -> Iterator[None]:
    """Within it, linear layers hold their weights as decoding wants them: laid out once, not anew for every token.

    They are cast to the compute dtype (autocast would cast the frozen ones, LoRA's base, at every use); a plain LoRA
    adapter is added to its weight, which saves two products of three; and on the CPU weights lie in oneDNN's blocks,
    without which a product with a few rows reads its weight at half the speed of memory. On a GPU whose weights have
    the compute dtype already, nothing is copied.
    """
    if model.device.type != "cpu" and model.weights_dtype == model.compute_dtype:
        yield
        return
    # The embedding's dtype is that of the residual stream, and the head has a way of its own (decoding_head).
    kept = (model.inner.get_input_embeddings().weight, model.head().weight)
    changed: list[nn.Module] = []
    within: set[nn.Module] = set()  # parts of merged layers, which come after them and are never asked
    try:
        for m in model.inner.modules():
            weight = None if m in within else decoding_weight(m, model.weights_dtype)
            if weight is not None and all(weight is not w for w in kept):
                m.forward = linear(weight, getattr(m, "bias", None), model)
                changed.append(m)
                within.update(m.modules())
        yield
    finally:
        for m in changed:
            del m.__dict__["forward"]


def decoding_weight(module: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """The weight (out, in) of a linear layer, its plain LoRA adapters added; None for anything else.

    dtype: of the model's weights; quantized ones and the adapters' own factors have others.
    """
    base = getattr(module, "base_layer", None)
    if type(module) is nn.Linear:
        return module.weight if module.weight.dtype == dtype else None
    if type(base) is not nn.Linear or base.weight.dtype != dtype or not hasattr(module, "get_delta_weight"):
        return None
    if module.disable_adapters:
        return base.weight
    active = [a for a in module.active_adapters if a in module.lora_A]  # type: ignore[union-attr, operator]
    if any(a in module.lora_variant for a in active):  # type: ignore[operator]  # DoRA and its kind: not a sum
        return None
    return base.weight + sum(module.get_delta_weight(a) for a in active)  # type: ignore[operator]


def linear(weight: Tensor, bias: Tensor | None, model: LanguageModel) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + b in the compute dtype, with a copy of the weight that is laid out for it."""
    dtype = model.compute_dtype
    weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    if model.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        blocks = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), blocks, bias, "none", [], "")
    return lambda x: nn.functional.linear(x.to(dtype), weight, bias)


def decoding_head(model: LanguageModel) -> Callable[[Tensor], Tensor]:
    """Hidden states (B, H) -> logits (B, V) in fp32."""
    head = model.head()
    project = linear(head.weight, head.bias, model)
    return lambda hidden: head.cap(project(hidden).float())


def _generate_batch(
    model: LanguageModel, head: Callable[[Tensor], Tensor], prompts: Sequence[Sequence[int]], config: RolloutConfig
) -> list[list[int]]:
    """Ids of each completion, with whatever comes after its end."""
    width, device = max(len(p) for p in prompts), model.device
    longest = width + config.max_new_tokens
    ids = torch.tensor([[model.pad_id] * (width - len(p)) + [*p] for p in prompts], device=device)  # (B, T)
    lengths = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
    where = torch.arange(longest, device=device)
    mask = None
    if any(len(p) < width for p in prompts):
        mask = (where >= width - lengths[:, None]).long()  # (B, T + new)
    position = (where[:width] - width + lengths[:, None]).clamp(min=0)  # (B, T)
    stop = torch.tensor(model.stop_ids, device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)  # (B,)
    cache, pick = preallocated_cache(model, longest), sampler(config)
    rows = list(range(len(prompts)))  # which completion each row of the batch is
    out: list[list[int]] = [[] for _ in prompts]
    drawn: list[Tensor] = []  # tokens (B,) not yet handed to `out`
    for n in range(config.max_new_tokens):
        hidden = backbone(model.inner)(
            input_ids=ids,
            attention_mask=None if mask is None else mask[:, : width + n],
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]  # (B, H)
        ids = pick(head(hidden))  # (B, 1)
        drawn.append(ids[:, 0])
        finished |= torch.isin(ids[:, 0], stop)
        position = position[:, -1:] + 1
        if (n + 1) % CHECK_EVERY.get(device.type, 8) == 0 or n + 1 == config.max_new_tokens:
            for row, tokens in zip(rows, torch.stack(drawn, dim=1).tolist(), strict=True):
                out[row] += tokens
            drawn = []
            ended = finished.tolist()
            if all(ended):
                break
            if sum(ended) * 4 >= len(rows):  # a row is dropped with its cache, which is copied for that
                keep = (~finished).nonzero()[:, 0]
                rows = [row for row, end in zip(rows, ended, strict=True) if not end]
                ids, position, finished = ids[keep], position[keep], finished[keep]
                mask = None if mask is None else mask[keep]
                cache.batch_select_indices(keep)
    return out


def preallocated_cache(model: LanguageModel, longest: int) -> Any:
    """transformers' cache for this model, whose plain layers are filled in place instead of grown by copying."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Preallocated(DynamicLayer):
        """Keys and values (B, heads, tokens so far, D) are views of buffers for `longest` tokens."""

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            self.room = [x.new_empty(*x.shape[:2], longest, x.shape[3]) for x in (key_states, value_states)]

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
            for buffer, new in zip(self.room, (key_states, value_states), strict=True):
                buffer[:, :, start:end] = new
            self.keys, self.values = (buffer[:, :, :end] for buffer in self.room)
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            end = self.get_seq_length()
            self.room = [buffer[indices] for buffer in self.room]
            self.keys, self.values = (buffer[:, :, :end] for buffer in self.room)

    cache = DynamicCache(config=model.inner.config)
    cache.layers = [Preallocated() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


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


def _cut(ids: list[int], stop_ids: Sequence[int]) -> Completion:
    for i, token in enumerate(ids):
        if token in stop_ids:
            return Completion(ids[: i + 1], truncated=False)
    return Completion(ids, truncated=True)
