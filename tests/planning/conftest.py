"""Small models for the plan, in the proportions of real ones."""

from collections.abc import Callable
from typing import Any

import pytest

from sdft.config import Config, override
from sdft.model.shape import Work


def _lm_config(family: str = "llama", **changes: Any) -> Any:
    import transformers as t

    kinds = {
        "llama": t.LlamaConfig, "mistral": t.MistralConfig, "qwen2": t.Qwen2Config, "qwen3": t.Qwen3Config,
        "gemma3": t.Gemma3TextConfig, "gpt2": t.GPT2Config,
    }  # fmt: skip
    sizes = {
        "vocab_size": 1000, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    if family in ("qwen3", "gemma3"):
        sizes["head_dim"] = 32  # twice the hidden size in all
    if family == "gpt2":
        sizes = {"vocab_size": 1000, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 4096}
    return kinds[family](**sizes | changes)


@pytest.fixture(scope="session")
def lm_config() -> Callable[..., Any]:
    """lm_config(family, num_hidden_layers=..., ...) is a Hugging Face config of a small model."""
    return _lm_config


@pytest.fixture(scope="session")
def planned() -> Callable[..., Config]:
    """planned(**{"lora.rank": 4, ...}) is the config of a run of three prompts a step."""

    def make(**changes: Any) -> Config:
        base = {"teacher.kind": "base", "train.batch_size": 3, "rollout.max_new_tokens": 32}
        return override(Config(), base | changes)

    return make


@pytest.fixture(scope="session")
def work() -> Work:
    """A step of three sequences."""
    return Work((60, 80, 100), (200, 250, 300), (32, 32, 32))
