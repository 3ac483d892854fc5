"""A causal language model in two halves: the backbone (token ids -> hidden states) and the head (-> logits).

The trainer never calls them together, because the logits of all positions must never exist.

Legend: B rows of ids, T tokens of a row, N tokens that reach the head, H hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdft.errors import SdftError
from sdft.model import attention


@dataclass(frozen=True)
class Head:
    """The function from hidden states (N, H) to logits: softcap * tanh(scale * (h W^T + b) / softcap)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V); for a handful of rows only."""
        z = nn.functional.linear(hidden, self.weight.to(hidden.dtype), _to(self.bias, hidden.dtype))
        return self.cap(z)

    def cap(self, z: Tensor) -> Tensor:
        """h W^T + b (N, V) -> logits: scaled and soft-capped."""
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


@dataclass
class LanguageModel:
    """A causal LM, and the properties of it that the trainer needs."""

    lm: Any  # PreTrainedModel, or a PeftModel around one
    device: torch.device
    compute_dtype: torch.dtype
    pad_id: int
    stop_ids: tuple[int, ...]
    packed: bool = False  # sequences may lie end to end: attention keeps them apart
    own_base: bool = False  # an earlier adapter is merged into the base weights, which are in no other folder

    @property
    def inner(self) -> Any:
        """The Hugging Face model without a peft wrapper around it (adapters inside stay)."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    def head(self) -> Head:
        """The present head; its tensors are those of the model, not copies."""
        return read_head(self.inner)

    def hidden(self, input_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Last hidden states after the final norm: (B, T) int64 -> (B, T, H).

        lengths: tokens of the sequences that lie end to end in the one row of input_ids (B = 1); they do not see each
        other. None: each row is a sequence, padded on the right. This needs no mask, because a token of a causal model
        does not see later tokens.
        """
        packed: dict[str, Any] = {}
        if lengths is not None:
            packed = attention.packed_arguments(lengths, self.device, self.inner.config._attn_implementation)
        with self.autocast():
            return backbone(self.inner)(input_ids=input_ids, use_cache=False, **packed).last_hidden_state

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Matrix products in the compute dtype. One context per forward: its cache of cast weights must not
        outlive an update or the teacher's turn in the same module."""
        # Adapters are fp32 even if their base weights are bf16.
        needed = self.compute_dtype != torch.float32 and any(
            p.is_floating_point() and p.dtype != self.compute_dtype for p in self.lm.parameters()
        )
        with torch.autocast(self.device.type, dtype=self.compute_dtype) if needed else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context in which the model is in eval mode."""
        training = self.lm.training
        self.lm.eval()
        try:
            yield
        finally:
            self.lm.train(training)

    @property
    def weights_dtype(self) -> torch.dtype:
        return next(self.inner.parameters()).dtype

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name; a tied weight once."""
        return {name: p for name, p in self.lm.named_parameters() if p.requires_grad}


def backbone(lm: Any) -> nn.Module:
    """The part of a causal LM that maps token ids to hidden states."""
    module = getattr(lm, lm.base_model_prefix, None)
    if module is None or module is lm:
        raise SdftError(f"model {type(lm).__name__} has no separate backbone; sdft needs a causal LM with one")
    return module


def read_head(lm: Any) -> Head:
    """The head of a causal LM; with the soft cap (Gemma) and the scale of logits (Cohere, Granite) of its config."""
    head, config = lm.get_output_embeddings(), lm.config.get_text_config()
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise SdftError(f"model {type(lm).__name__} has no linear head with a weight; sdft needs one")
    if hasattr(head, "base_layer"):  # its weight is the frozen base weight, so the loss would ignore the adapter
        raise SdftError(
            f"model {type(lm).__name__} has a LoRA adapter on its head, which the fused loss cannot see; "
            "merge it first: sdft merge"
        )
    scale = getattr(config, "logit_scale", None) or 1.0
    if divisor := getattr(config, "logits_scaling", None):
        scale = scale / divisor
    return Head(
        head.weight, getattr(head, "bias", None), float(scale), getattr(config, "final_logit_softcapping", None)
    )


@torch.no_grad()
def check_head(model: LanguageModel) -> None:
    """Raises SdftError if backbone and head do not give the logits of the model.

    Models differ between hidden states and logits; the logits of four tokens show whether `read_head` fits the model.
    """
    with model.evaluating():
        got = model.head().logits(model.hidden(_few_ids(model))[0]).float()  # (4, V)
    if not near(got, few_logits(model)):
        raise SdftError(
            f"model {type(model.inner).__name__} does more between hidden states and logits than a linear head, "
            "a scale and a soft cap; its divergence would be wrong, so it is refused"
        )


def _few_ids(model: LanguageModel) -> Tensor:
    return torch.arange(4, device=model.device)[None] + 3  # (1, 4)


def few_logits(model: LanguageModel) -> Tensor:
    with model.evaluating(), model.autocast():
        return model.inner(input_ids=_few_ids(model), use_cache=False).logits[0].float()  # (4, V)


def near(got: Tensor, want: Tensor, bound: float = 0.05) -> bool:
    return bool((got - want).abs().max() <= bound * want.abs().max().clamp(min=1e-3))
