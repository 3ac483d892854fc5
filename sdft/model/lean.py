"""Norms, MLPs and linear layers of Llama-like blocks that keep less for the backward pass than transformers' own.

What they compute is the same to rounding. Of what a block of SmolLM2 keeps for each token in full fine-tuning, 34 KB of
transformers', they keep 20 with what attention keeps (docs/memory.md):

- a norm keeps its input, which the residual stream has anyway, and one statistic a token; not the normalised values too
- its output has the dtype that products want: autocast would cast it once for every layer that reads it
- the MLP keeps its gate and not the same after its activation
- a linear layer keeps its weight and not the copy of it that autocast multiplies by, which is made again for the
  gradient: one layer's copy at a time, in memory that is still warm
- LoRA layers that share an input share what is kept of it

Legend: B rows, T tokens, H hidden size, I size of the MLP, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# transformers' blocks that are known: RMSNorm, rotary positions, grouped queries, gated MLP, nothing else.
BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


def install(lm: nn.Module) -> None:
    """Puts the functions of this module in the place of the blocks' own; other models stay as they are."""
    block: Any
    module: Any
    for block in lm.modules():
        if type(block).__name__ not in BLOCKS:
            continue
        names = ("q_norm", "k_norm")
        of_heads = [getattr(block.self_attn, name) for name in names if hasattr(block.self_attn, name)]
        for module in (block.input_layernorm, block.post_attention_layernorm, *of_heads):
            module.forward = partial(norm, module)
        for module in block.modules():
            if type(module) is nn.Linear:
                module.forward = partial(linear, module)  # type: ignore[method-assign]
        if type(block.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation"):
            block.mlp.forward = partial(mlp, block.mlp)


def share_inputs(lm: nn.Module) -> None:
    """Keeps peft from casting inputs to the fp32 of LoRA's factors, where autocast casts them back: a copy a layer.

    DoRA is left alone: it takes the norms of its weights in the dtype of its input.
    """
    module: Any
    for module in lm.modules():
        if hasattr(module, "cast_input_dtype_enabled") and not module.lora_variant:
            module.cast_input_dtype_enabled = False


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype, where there is one, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def linear(module: Any, x: Tensor) -> Tensor:
    """x W^T + b, (..., H) -> (..., I), in autocast's dtype where there is one."""
    dtype, weight, bias = autocast_dtype(x), module.weight, module.bias
    if weight.dtype == dtype:
        return nn.functional.linear(x, weight, bias)
    return _Linear.apply(x.to(dtype), weight, bias)


def norm(module: Any, x: Tensor) -> Tensor:
    """RMSNorm (..., H) in fp32; the result in autocast's dtype, where there is one, else in that of x."""
    return _Norm.apply(x, module.weight, module.variance_epsilon, autocast_dtype(x))


def mlp(module: Any, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)), (B, T, H) -> (B, T, H)."""
    if not torch.is_grad_enabled():  # the gate is gone before its product with the other factor is there
        return module.down_proj(nn.functional.silu(module.gate_proj(x)) * module.up_proj(x))
    return module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))


class _Linear(torch.autograd.Function):
    """x W^T + b in the dtype of x, whatever W's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # (T, I)
        dx = grad @ weight.to(grad.dtype) if needs_x else None
        dw = (rows.T @ x.flatten(0, -2)).to(weight.dtype) if needs_weight else None
        return dx, dw, rows.sum(0).to(ctx.bias_dtype) if needs_bias else None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()  # (..., 1)
        scale = torch.rsqrt(square / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, scale)
        normed = wide * scale if wide is x else wide.mul_(scale)
        return normed.mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()
        both = grad * normed
        dw = both.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None  # (H,)
        along = both.mul_(weight).mean(-1, keepdim=True)  # (..., 1)
        dx = torch.addcmul(grad * weight, normed, along, value=-1).mul_(scale)
        return dx.to(x.dtype), dw, None, None


class _Gated(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_up, to_gate = grad * nn.functional.silu(gate), grad * up  # in this order, three of their size are alive
        return torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate), to_up
