"""The blocks that decoding computes by itself beside transformers' own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sdft.config import LoraConfig
from sdft.model.loading import add_lora
from sdft.rollout import decode

KINDS = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")
LENGTHS = (5, 2, 7)
NEW = 4


@torch.no_grad()
def hidden_states(model: Any, padded: bool) -> list[Tensor]:
    """Of three prompts' last token and of the next ones, (B, H) each; after two of them a row is dropped."""
    width, rows = max(LENGTHS), len(LENGTHS)
    ids = torch.randint(3, 250, (rows, width + NEW), generator=torch.Generator().manual_seed(3))
    first = torch.tensor([width - n if padded else 0 for n in LENGTHS])[:, None]
    mask = (torch.arange(width + NEW) >= first).long() if padded else None
    position = (torch.arange(width + NEW) - first).clamp(min=0)
    out = []
    with model.autocast(), decode.decoder(model, width + NEW) as start:
        passage = start(rows, width + NEW)
        for n in range(NEW):
            new = slice(0, width) if n == 0 else slice(width + n - 1, width + n)
            out.append(passage(ids[:, new], position[:, new], None if mask is None else mask[:, : new.stop]).float())
            if n == 2:
                keep = torch.tensor([0, 2])
                passage.keep(keep)
                ids, position, mask = ids[keep], position[keep], None if mask is None else mask[keep]
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
def test_fused_blocks_are_transformers_own(
    kind: str, compute: str, weights: str, near: float, padded: bool, load_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_tiny(kind, compute_dtype=compute, weights_dtype=weights)[1]
    model.lm.eval()
    assert is_fused(model)
    got = hidden_states(model, padded)
    monkeypatch.setattr(decode, "FUSED", ())
    want = hidden_states(model, padded)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= near * other.norm()
    assert (got[0] - got[1]).norm() > 0.1 * got[0].norm()  # the bound could be missed


@pytest.mark.parametrize(
    "settings", [{}, {"rslora": True}, {"targets": ("q_proj", "down_proj")}, {"targets": ("v_proj",)}], ids=str
)
def test_adapters_are_added(settings: Any, load_tiny: Any, nudge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_tiny("qwen2")[1]
    plain = hidden_states(model, True)
    add_lora(model, LoraConfig(rank=2, **settings), 0)
    nudge(model, size=0.3)
    model.lm.eval()
    assert is_fused(model)
    got = hidden_states(model, True)
    monkeypatch.setattr(decode, "FUSED", ())
    for one, other, before in zip(got, hidden_states(model, True), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert (one - before).norm() > 0.01 * one.norm()


def test_what_is_not_known_runs_as_transformers_has_it(load_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("gemma3", "gpt2", "phi", "granite"):
        assert not is_fused(load_tiny(kind)[1])
    model = load_tiny("mistral")[1]
    model.lm.config.sliding_window = 32
    assert is_fused(model, 32)
    assert not is_fused(model, 33)
    model = load_tiny("llama")[1]
    add_lora(model, LoraConfig(rank=2, dora=True), 0)
    assert not is_fused(model)


def test_operators_of_one_token(load_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than transformers' blocks take, with four products a block instead of seven."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        operators = products = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operators += 1
            self.products += function is torch.ops.mkldnn._linear_pointwise.default
            return function(*args, **(kwargs or {}))

    model = load_tiny("llama", compute_dtype="bfloat16")[1]
    model.lm.eval()
    counts = []
    for fused in (decode.FUSED, ()):
        monkeypatch.setattr(decode, "FUSED", fused)
        with torch.no_grad(), model.autocast(), decode.decoder(model, 9) as start:
            passage = start(2, 9)
            passage(torch.ones(2, 8, dtype=torch.long), torch.arange(8).expand(2, 8), None)
            with Count() as count:
                passage(torch.ones(2, 1, dtype=torch.long), torch.full((2, 1), 8), None)
        counts.append((count.operators, count.products))
    assert counts[0][0] < 0.85 * counts[1][0], counts
    assert [products for _, products in counts] == [2 * 4, 2 * 7]
