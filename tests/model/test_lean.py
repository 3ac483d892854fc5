"""Norms, MLPs and linear layers that keep less for the backward pass: the values of transformers, fewer bytes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sdft.model import lean

KINDS = ("llama", "mistral", "qwen2", "qwen3")
MODES = {  # weights, autocast
    "fp32": (torch.float32, None),
    "autocast": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, None),
}


def tiny(kind: str, **changes: Any) -> nn.Module:
    """A backbone of two blocks, its norms' weights not all 1."""
    import transformers as t

    config = {"llama": t.LlamaConfig, "mistral": t.MistralConfig, "qwen2": t.Qwen2Config, "qwen3": t.Qwen3Config}[kind]
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
    model = t.AutoModel.from_config(config(vocab_size=64, num_hidden_layers=2, head_dim=8, **sizes, **changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def gradients(model: nn.Module, autocast: torch.dtype | None = None) -> list[Tensor]:
    """Hidden states and the gradient of every weight of a fixed sum of them, in float64."""
    ids = torch.arange(2 * 11).view(2, 11) * 7 % 64
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        hidden = model(input_ids=ids, use_cache=False).last_hidden_state  # (2, 11, H)
    pull = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (hidden.double() * pull).sum().backward()
    return [hidden.detach().double(), *(p.grad.double() for p in model.parameters())]


def off(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative error of one of them."""
    return max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_as_near_to_float64_as_transformers_own(kind: str, mode: str) -> None:
    weights, autocast = MODES[mode]
    own = tiny(kind).to(weights)
    ours, exact = copy.deepcopy(own), copy.deepcopy(own).double()
    lean.install(ours)
    want = gradients(exact)
    error, theirs = off(gradients(ours, autocast), want), off(gradients(own, autocast), want)
    assert error <= (1e-5 if mode == "fp32" else 1.2 * theirs)


@pytest.mark.parametrize(("mode", "share"), [("fp32", 0.8), ("autocast", 0.75), ("bf16", 0.75)])
@pytest.mark.parametrize("kind", KINDS)
def test_less_is_kept(kind: str, mode: str, share: float) -> None:
    weights, autocast = MODES[mode]
    own = tiny(kind).to(weights)
    ours = copy.deepcopy(own)
    lean.install(ours)
    assert kept(ours, autocast) < share * kept(own, autocast)


def kept(model: nn.Module, autocast: torch.dtype | None, tokens: int = 400) -> int:
    """Bytes that a forward pass leaves for its backward, weights apart."""
    storages: dict[int, Tensor] = {}  # the tensors themselves, so that no storage is used again

    def pack(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.int64)  # of many, cast copies of weights count little
    with saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            hidden = model(input_ids=ids, use_cache=False).last_hidden_state
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        total = sum(t.untyped_storage().nbytes() for at, t in storages.items() if at not in own)
    assert hidden.requires_grad
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_no_copy_of_a_weight_is_kept(kind: str) -> None:
    """Of few tokens the cast copies of the weights are nearly all that transformers' blocks keep under autocast."""
    own = tiny(kind)
    ours = copy.deepcopy(own)
    lean.install(ours)
    matrices = sum(m.weight.numel() for m in own.modules() if type(m) is nn.Linear)
    tokens = 8
    assert kept(own, torch.bfloat16, tokens) > 2 * matrices
    assert kept(own, torch.bfloat16, tokens) - kept(ours, torch.bfloat16, tokens) > 2 * matrices


def test_a_linear_layer_makes_only_the_gradients_that_are_asked_for() -> None:
    block: Any = tiny("qwen2").layers[0]  # type: ignore[index]
    lean.install(nn.ModuleList([block]))
    layer = block.self_attn.q_proj  # with a bias
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 9, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
        assert layer.weight.grad is None
        torch.testing.assert_close(layer.bias.grad, torch.full_like(layer.bias, 18))
        torch.testing.assert_close(x.grad[0, 0], layer.weight.sum(0), rtol=0.02, atol=0.02)  # type: ignore[index]
        layer.weight.requires_grad_(True)
        layer(x.detach()).float().sum().backward()
    torch.testing.assert_close(layer.weight.grad[0], x.detach().sum((0, 1)), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_without_gradients_nothing_changes(mode: str) -> None:
    weights, autocast = MODES[mode]
    model = tiny("llama").to(weights)
    lean.install(model)
    ids = torch.arange(12)[None]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        want = model(input_ids=ids).last_hidden_state
        with torch.no_grad():
            got = model(input_ids=ids).last_hidden_state
    assert torch.equal(got, want.detach())


def test_checkpointing_gives_the_same_gradients() -> None:
    block = tiny("llama").layers[0]  # type: ignore[index]
    lean.install(nn.ModuleList([block]))
    x = torch.randn(2, 9, 48, requires_grad=True)
    found = []
    for run in (lambda: block.mlp(block.input_layernorm(x)), None):
        forward = run or (lambda: checkpoint(lambda t: block.mlp(block.input_layernorm(t)), x, use_reentrant=False))
        found.append(torch.autograd.grad(forward().square().sum(), [x, *block.mlp.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_frozen_norm_gets_no_gradient() -> None:
    block: Any = tiny("qwen3").layers[0]  # type: ignore[index]
    lean.install(nn.ModuleList([block]))
    block.input_layernorm.weight.requires_grad_(False)
    x = torch.randn(2, 9, 48, requires_grad=True)
    block.input_layernorm(x).sum().backward()
    assert block.input_layernorm.weight.grad is None
    assert x.grad is not None


def test_what_is_not_known_is_left_alone() -> None:
    import transformers as t

    other = t.AutoModel.from_config(t.GPT2Config(vocab_size=64, n_embd=48, n_layer=1, n_head=6))
    gelu = tiny("llama", hidden_act="gelu")
    for model in (other, gelu):
        lean.install(model)
    assert not any(type(m).__name__.startswith("Lean") for m in other.modules())
    names = [type(m).__name__ for m in gelu.layers[0].children()]  # type: ignore[index, union-attr]
    assert "LlamaMLP" in names
    assert "LeanNorm" in names


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_parameters_stay(kind: str) -> None:
    model = tiny(kind)
    before = dict(model.named_parameters())
    lean.install(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_the_input_of_a_frozen_weight_is_not_kept() -> None:
    layer = lean.LeanLinear(nn.Linear(64, 8).requires_grad_(False))
    x = torch.randn(400, 64, requires_grad=True)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert all(t.numel() < x.numel() for t in kept)
