"""The sizes of a causal language model, and the sequences that one optimizer step works on.

Both are plain numbers: what counts operations (flops.py), memory or rows needs no weights.
"""

from dataclasses import dataclass, field
from typing import Any

from sdft.errors import SdftError

# Model types whose blocks consist of `ModelShape.linears` and norms, and of nothing else.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal language model, from its config.json."""

    family: str  # model_type
    layers: int
    hidden: int
    inner: int  # of the MLP
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # head and embedding are one matrix
    qkv_bias: bool = False
    out_bias: bool = False  # of o_proj
    mlp_bias: bool = False
    qk_norm: bool = False
    config: Any = field(default=None, compare=False, repr=False)  # the Hugging Face config, for the simulation

    @classmethod
    def from_config(cls, config: Any) -> "ModelShape":
        """The shape of a Hugging Face config. Raises SdftError if a size is missing."""
        text = config.get_text_config()
        family = text.model_type
        try:
            heads = text.num_attention_heads
            attention_bias = bool(getattr(text, "attention_bias", False))
            return cls(
                family=family,
                layers=text.num_hidden_layers,
                hidden=text.hidden_size,
                inner=getattr(text, "intermediate_size", None)
                or getattr(text, "n_inner", None)
                or 4 * text.hidden_size,
                heads=heads,
                kv_heads=getattr(text, "num_key_value_heads", None) or heads,
                head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
                vocab=text.vocab_size,
                tied=bool(config.tie_word_embeddings),
                qkv_bias=attention_bias or family == "qwen2",
                out_bias=attention_bias and family != "qwen2",
                mlp_bias=bool(getattr(text, "mlp_bias", False)),
                qk_norm=family == "qwen3",
                config=config,
            )
        except AttributeError as error:
            raise SdftError(
                f"model.name: a config of type {family!r} lacks a size that the plan needs ({error})"
            ) from None

    @property
    def queries(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Channels of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of one block."""
        h, i, q, k = self.hidden, self.inner, self.queries, self.keys
        return {
            "q_proj": (q, h), "k_proj": (k, h), "v_proj": (k, h), "o_proj": (h, q),
            "gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i),
        }  # fmt: skip

    @property
    def block(self) -> int:
        """Entries of the linear layers' matrices in one block."""
        return sum(o * i for o, i in self.linears.values())

    @property
    def head(self) -> int:
        """Entries of the head, or of the embedding."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Entries of all weights; a tied head once."""
        small = 2 * self.hidden + 2 * self.head_dim * self.qk_norm
        small += self.qkv_bias * (self.queries + 2 * self.keys) + self.out_bias * self.hidden
        small += self.mlp_bias * (2 * self.inner + self.hidden)
        return self.layers * (self.block + small) + self.hidden + self.head * (1 if self.tied else 2)


@dataclass(frozen=True)
class Work:
    """Tokens of each sequence of one optimizer step."""

    prompts: tuple[int, ...]  # as the student sees them
    teacher_prompts: tuple[int, ...]  # with the demonstration; empty if there is no teacher (sft, dft)
    completions: tuple[int, ...]
    offline: tuple[int, ...] = ()  # prompts of all completions that are sampled before the first step

    @property
    def sizes(self) -> list[int]:
        """Tokens of each sequence, on the side that has more: micro-batches are cut by these."""
        seen = self.teacher_prompts or self.prompts
        return [max(p, t) + c for p, t, c in zip(self.prompts, seen, self.completions, strict=True)]
