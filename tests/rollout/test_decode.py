"""Decoding token by token gives the hidden states of the model that scores."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sdft.config import LoraConfig
from sdft.model.lora import add_lora
from sdft.rollout import decode

KINDS = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")
LENGTHS = (5, 2, 7)
NEW = 4


Steps = list[Tensor]  # hidden states (B, H) of three prompts' last token, then of the next ones; later a row is gone


def tokens_of_a_batch() -> Tensor:
    return torch.randint(3, 250, (len(LENGTHS), max(LENGTHS) + NEW), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def decoded(model: Any, padded: bool) -> Steps:
    """By the decoder, all rows together; after two tokens a row is dropped."""
    width, rows, ids = max(LENGTHS), len(LENGTHS), tokens_of_a_batch()
    first = torch.tensor([width - n if padded else 0 for n in LENGTHS])[:, None]
    mask = (torch.arange(width + NEW) >= first).long() if padded else None
    position = (torch.arange(width + NEW) - first).clamp(min=0)
    out = []
    with model.autocast(), decode.decoder(model, width + NEW) as start:
        batch = start(rows, width + NEW)
        for n in range(NEW):
            new = slice(0, width) if n == 0 else slice(width + n - 1, width + n)
            out.append(batch(ids[:, new], position[:, new], None if mask is None else mask[:, : new.stop]).float())
            if n == 2:
                keep = torch.tensor([0, 2])
                batch.keep(keep)
                ids, position, mask = ids[keep], position[keep], None if mask is None else mask[keep]
    return out


@torch.no_grad()
def computed_whole(model: Any, padded: bool) -> Steps:
    """By the model that scores: every row alone, without padding, from its first token each time."""
    width, out = max(LENGTHS), []
    for n in range(NEW):
        rows = [0, 1, 2] if n < 3 else [0, 2]
        starts = [width - LENGTHS[row] if padded else 0 for row in rows]
        ids = [tokens_of_a_batch()[row, at : width + n][None] for row, at in zip(rows, starts, strict=True)]
        out.append(torch.cat([model.hidden(i)[:, -1].float() for i in ids]))
    return out


def is_fused(model: Any, longest: int = 64) -> bool:
    with torch.no_grad():
        return decode.Blocks.of(model, longest) is not None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("compute", "weights", "near"),
    [("float32", "float32", 1e-5), ("bfloat16", "float32", 0.03), ("bfloat16", "bfloat16", 0.05)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_blocks_compute_what_the_model_does(
    kind: str, compute: str, weights: str, near: float, padded: bool, load_tiny: Any
) -> None:
    model = load_tiny(kind, compute_dtype=compute, weights_dtype=weights)[1]
    model.lm.eval()
    assert is_fused(model)
    got = decoded(model, padded)
    for one, other in zip(got, computed_whole(model, padded), strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= near * other.norm()
    assert (got[0] - got[1]).norm() > 0.1 * got[0].norm()  # the bound could be missed


@pytest.mark.parametrize(
    "settings", [{}, {"rslora": True}, {"targets": ("q_proj", "down_proj")}, {"targets": ("v_proj",)}], ids=str
)
def test_adapters_are_added(settings: Any, load_tiny: Any, nudge: Any) -> None:
    model = load_tiny("qwen2")[1]
    plain = decoded(model, True)
    add_lora(model, LoraConfig(rank=2, **settings), 0)
    nudge(model, size=0.3)
    model.lm.eval()
    assert is_fused(model)
    got = decoded(model, True)
    for one, other, before in zip(got, computed_whole(model, True), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert (one - before).norm() > 0.01 * one.norm()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "phi", "granite"])
def test_other_models_run_in_transformers(kind: str, padded: bool, load_tiny: Any) -> None:
    model = load_tiny(kind)[1]
    model.lm.eval()
    assert not is_fused(model)
    for one, other in zip(decoded(model, padded), computed_whole(model, padded), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_the_fused_blocks_do_not_compute_is_left_to_transformers(load_tiny: Any) -> None:
    model = load_tiny("mistral")[1]
    model.lm.config.sliding_window = 32
    assert is_fused(model, 32)
    assert not is_fused(model, 33)
    model = load_tiny("llama")[1]
    add_lora(model, LoraConfig(rank=2, dora=True), 0)
    assert not is_fused(model)
