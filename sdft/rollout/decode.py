"""Hidden states of the next token, while sampling: one token at a time, and nothing that only training needs.

Legend: B rows that generate together, T new tokens of each (the prompt, then 1), t tokens so far, H hidden size, G
query heads for each of K key heads, D their size, I size of the MLP.
Llama-like blocks run here with fewer operators than in transformers and nothing between them, q with k with v and gate
with up in one product: on two CPU cores a token of 8 rows of SmolLM2 takes 26 ms instead of 35, 16 of them products.
All other blocks run in transformers. Both keep keys and values in buffers that are never copied to grow.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdft.device import prepared_linear, return_freed
from sdft.model import lean
from sdft.model.language_model import LanguageModel, backbone

FUSED = lean.BLOCKS  # transformers' blocks that `FusedDecoder` computes
RETURN_EVERY = 15  # blocks whose weights are laid out, between two calls of return_freed


class BatchDecoder(Protocol):
    """Runs one batch through the model, token by token; keeps the keys and values of the tokens so far."""

    def __call__(self, ids: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """ids, position (B, T); mask (B, t), 0 for padding tokens -> hidden states (B, H) of the last token."""

    def keep(self, rows: Tensor) -> None:
        """Drops all rows of the batch but these."""


@contextlib.contextmanager
def decoder(model: LanguageModel, longest: int) -> Iterator[Callable[[int, int], BatchDecoder]]:
    """start(B, tokens) begins a batch of at most so many tokens a row, none of them more than `longest`.

    Within the context the model's weights must not change: linear layers are laid out for decoding once. They are
    cast to the compute dtype (autocast would cast the frozen ones, LoRA's base, at every use); a plain LoRA adapter is
    added to its weight, which saves two products of three; and on the CPU weights lie in oneDNN's blocks, without which
    a product with a few rows reads its weight at half the speed of memory. On a GPU whose weights have the compute
    dtype already, nothing is copied.
    """
    copied = model.device.type == "cpu" or model.weights_dtype != model.compute_dtype
    fused = Blocks.of(model, longest) if copied else None
    if fused is not None:
        with torch.autocast(model.device.type, enabled=False):  # which asks at every operator
            yield lambda rows, tokens: FusedDecoder(fused, rows, tokens)
        return
    with decoding_weights(model) if copied else contextlib.nullcontext():
        yield lambda rows, tokens: LibraryDecoder(model, tokens)


# Llama-like blocks.


class Blocks:
    """The weights of a Llama-like model, laid out for decoding."""

    def __init__(self, model: LanguageModel) -> None:
        base: Any = backbone(model.inner)
        self.model, self.rotary, self.final = model, base.rotary_emb, _norm(base.norm)
        self.embed, first = model.inner.get_input_embeddings(), base.layers[0].self_attn
        self.head_dim, self.groups, self.scaling = first.head_dim, first.num_key_value_groups, first.scaling
        self.keys = model.inner.config.num_key_value_heads
        self.blocks = []
        for i, block in enumerate(base.layers, start=1):
            attention, mlp = block.self_attn, block.mlp
            self.blocks.append(
                (
                    _norm(block.input_layernorm),
                    _together(model, attention.q_proj, attention.k_proj, attention.v_proj),
                    [_norm(n) for n in (attention.q_norm, attention.k_norm)] if hasattr(attention, "q_norm") else [],
                    _together(model, attention.o_proj),
                    _norm(block.post_attention_layernorm),
                    _together(model, mlp.gate_proj, mlp.up_proj),
                    mlp.act_fn,
                    _together(model, mlp.down_proj),
                )
            )
            if i % RETURN_EVERY == 0:
                return_freed(model.device)

    @classmethod
    def of(cls, model: LanguageModel, longest: int) -> "Blocks | None":
        """None for a model of another kind, or with a linear layer that is not one plain matrix."""
        layers = getattr(backbone(model.inner), "layers", ())
        if not layers or any(type(block).__name__ not in FUSED for block in layers):
            return None
        window = getattr(model.inner.config, "sliding_window", None)
        if window is not None and window < longest:
            return None
        for block in layers:
            a, m = block.self_attn, block.mlp
            linears = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)
            if any(_parts(linear, model.weights_dtype) is None for linear in linears):
                return None
        return cls(model)


class FusedDecoder:
    """A `BatchDecoder` of `Blocks`."""

    def __init__(self, blocks: Blocks, rows: int, tokens: int) -> None:
        self.blocks, self.seen = blocks, 0
        shape = (2, rows, blocks.keys, tokens, blocks.head_dim)  # keys and values
        self.cache = [
            torch.empty(shape, dtype=blocks.model.compute_dtype, device=blocks.model.device) for _ in blocks.blocks
        ]

    def keep(self, rows: Tensor) -> None:
        self.cache = [both[:, rows] for both in self.cache]

    def __call__(self, ids: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        blocks, (batch, new) = self.blocks, ids.shape
        start, end = self.seen, self.seen + new
        groups, keys, dim = blocks.groups, blocks.keys, blocks.head_dim
        dtype = blocks.model.compute_dtype
        x = blocks.embed(ids)  # (B, T, H)
        cos, sin = blocks.rotary(x, position)  # (B, T, D)
        # Turning by half a head and changing signs is x.roll with the signs in the sine.
        cos, sin = cos[:, :, None], torch.cat((-sin[..., : dim // 2], sin[..., dim // 2 :]), -1)[:, :, None]
        visible = self._visible(new, mask, x.device)
        for (norm, qkv, qk_norms, out, after, gate_up, activation, down), (k_room, v_room) in zip(
            blocks.blocks, self.cache, strict=True
        ):
            heads = qkv(norm(x)).view(batch, new, (groups + 2) * keys, dim)  # (B, T, GK + 2K, D)
            qk = heads[:, :, : (groups + 1) * keys]
            if qk_norms:
                qk = torch.cat(
                    [n(part) for n, part in zip(qk_norms, qk.split([groups * keys, keys], 2), strict=True)], 2
                )
            qk = qk.to(x.dtype)
            qk = torch.addcmul(qk * cos, qk.roll(dim // 2, -1), sin).to(dtype)
            k_room[:, :, start:end] = qk[:, :, groups * keys :].transpose(1, 2)
            v_room[:, :, start:end] = heads[:, :, (groups + 1) * keys :].transpose(1, 2)
            # The queries of one key head are taken for tokens of one query head: nothing is repeated.
            q = qk[:, :, : groups * keys].reshape(batch, new, keys, groups, dim).permute(0, 2, 3, 1, 4)
            a = nn.functional.scaled_dot_product_attention(
                q.reshape(batch, keys, groups * new, dim),
                k_room[:, :, :end],
                v_room[:, :, :end],
                attn_mask=visible,
                scale=blocks.scaling,
            )  # (B, K, GT, D)
            a = a.view(batch, keys, groups, new, dim).permute(0, 3, 1, 2, 4).reshape(batch, new, -1)  # (B, T, GKD)
            x = x + out(a)
            gate, up = gate_up(after(x)).chunk(2, -1)  # (B, T, I) each
            x = x + down(activation(gate) * up)
        self.seen = end
        return blocks.final(x[:, -1])

    def _visible(self, new: int, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """Added to the scores: (B or 1, 1, GT, t) or, for one token, (B, 1, 1, t); None if every token sees all."""
        if new == 1 and mask is None:
            return None
        at = torch.arange(self.seen + new, device=device)
        mine = at[self.seen :, None]  # (T, 1)
        seen = (at <= mine)[None]  # (1, T, t)
        if mask is not None:  # a padding token sees itself: a row of nothing but -inf would be NaN
            seen = seen & (mask[:, None].bool() | (at == mine))
        scores = torch.zeros_like(seen, dtype=self.blocks.model.compute_dtype).masked_fill_(~seen, float("-inf"))
        return scores.repeat(1, self.blocks.groups if new > 1 else 1, 1)[:, None]


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """An RMSNorm of transformers; in fp32 with fewer operators, to rounding the same."""
    if module.weight.dtype != torch.float32:
        return module
    # x / sqrt(|x|^2 / n + eps) = sqrt(n) x / hypot(|x|, sqrt(n eps))
    size = module.weight.numel()
    weight, small = module.weight * size**0.5, module.weight.new_tensor((size * module.variance_epsilon) ** 0.5)
    return lambda x: x * weight / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), small)


def _together(model: LanguageModel, *linears: nn.Module) -> Callable[[Tensor], Tensor]:
    """x -> what these linear layers make of it, laid end to end, by one product."""
    weights = [decoding_weight(m, model.weights_dtype).to(model.compute_dtype) for m in linears]  # type: ignore[union-attr]
    biases: list[Any] = [m.bias for m in linears]
    bias = None
    if any(b is not None for b in biases):
        parts = zip(biases, weights, strict=True)
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b.to(w.dtype) for b, w in parts])
    return prepared_linear(torch.cat(weights) if len(weights) > 1 else weights[0], bias, model.compute_dtype)


# All other models, by transformers.


class LibraryDecoder:
    """A `BatchDecoder` of the blocks and the cache of transformers."""

    def __init__(self, model: LanguageModel, tokens: int) -> None:
        self.model, self.cache = model, preallocated_cache(model, tokens)

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)

    def __call__(self, ids: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        return backbone(self.model.inner)(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=self.cache, use_cache=True
        ).last_hidden_state[:, -1]


@contextlib.contextmanager
def decoding_weights(model: LanguageModel) -> Iterator[None]:
    """A context in which layers that are prepared for decoding replace the model's linear layers."""
    # The embedding sets the dtype of the residual stream, and the head is read by sampling.decoding_head.
    kept = (model.inner.get_input_embeddings().weight, model.head().weight)
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    within: set[nn.Module] = set()  # parts of merged layers, which are called no more
    try:
        for parent in list(model.inner.modules()):
            for name, layer in [] if parent in within else list(parent.named_children()):
                weight = decoding_weight(layer, model.weights_dtype)
                if weight is not None and all(weight is not w for w in kept):
                    replaced.append((parent, name, layer))
                    setattr(parent, name, _PreparedLinear(layer, weight, model.compute_dtype))
                    within.update(layer.modules())
        yield
    finally:
        for parent, name, layer in replaced:
            setattr(parent, name, layer)


class _PreparedLinear(lean.LeanLinear):
    """x W^T + b by `prepared_linear`; weight and bias are the layer's, for code that reads them."""

    def __init__(self, layer: Any, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__(layer)
        self.product = prepared_linear(weight, self.bias, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input)


def decoding_weight(module: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """The weight (out, in) of a linear layer, its plain LoRA adapters added; None for anything else.

    dtype: of the model's weights; quantized ones and the adapters' own factors have others.
    """
    parts = _parts(module, dtype)
    if parts is None:
        return None
    weight, adapters = parts
    return weight + sum(module.get_delta_weight(a) for a in adapters) if adapters else weight  # type: ignore[operator]


def _parts(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, list[str]] | None:
    """The weight of a linear layer by itself, and the names of the adapters to be added; None for anything else."""
    base: Any = getattr(module, "base_layer", module)
    if type(base) not in (nn.Linear, lean.LeanLinear) or base.weight.dtype != dtype:
        return None
    if base is module or getattr(module, "disable_adapters", False):
        return base.weight, []
    if not hasattr(module, "get_delta_weight"):
        return None
    active = [a for a in module.active_adapters if a in module.lora_A]  # type: ignore[union-attr, operator]
    if any(a in module.lora_variant for a in active):  # type: ignore[operator]  # DoRA and its kind: not a sum
        return None
    return base.weight, active


def preallocated_cache(model: LanguageModel, longest: int) -> Any:
    """The cache of transformers for this model; its plain layers are filled in place instead of grown by copying."""
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
