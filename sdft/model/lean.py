"""Norms, MLPs and linear layers for Llama-like blocks, which keep less for the backward pass than in transformers.

The values are the same up to rounding. In full fine-tuning a block of SmolLM2 keeps 34 KB a token with the modules of
transformers and 20 KB with these, what attention keeps included (docs/memory.md):

- A norm keeps its input, which the residual stream has anyway, and one statistic a token, not the normalised values.
- Its output has the dtype of the products: autocast would cast it once for every layer that reads it.
- The MLP keeps its gate, and not the gate after its activation as well.
- A linear layer keeps its weight, not the copy that autocast multiplies by. The copy is made again for the gradient,
  one layer's at a time, in memory that is still in the cache. If its weight is frozen, it does not keep its input.
- LoRA layers that share an input share what is kept of it.

Legend: B rows, T tokens, H hidden size, I size of the MLP.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Blocks of transformers with RMSNorm, rotary positions, grouped queries and a gated MLP, and nothing else.
BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


def install(lm: nn.Module) -> None:
    """Replaces the norms, MLPs and linear layers of BLOCKS. Parameters and their names stay, as do other models."""
    for block in [m for m in lm.modules() if type(m).__name__ in BLOCKS]:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, LeanLinear(child))
                elif type(child).__name__.endswith("RMSNorm"):
                    setattr(parent, name, LeanNorm(child))
        mlp: Any = block.mlp
        if type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation"):
            block.mlp = LeanMLP(mlp)


def share_inputs(lm: nn.Module) -> None:
    """Keeps peft from casting inputs to the fp32 of LoRA's factors. Autocast casts them back: a copy for each layer.

    DoRA is left alone: it takes the norms of its weights in the dtype of its input.
    """
    module: Any
    for module in lm.modules():
        if hasattr(module, "cast_input_dtype_enabled") and not module.lora_variant:
            module.cast_input_dtype_enabled = False


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of autocast if it is on, else the dtype of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class LeanLinear(nn.Linear):
    """x W^T + b, (..., in) -> (..., out), in autocast's dtype if it is on; holds the parameters of another layer."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        dtype = autocast_dtype(input)
        if self.weight.dtype == dtype:
            return nn.functional.linear(input, self.weight, self.bias)
        return _Linear.apply(input.to(dtype), self.weight, self.bias)


class LeanNorm(nn.Module):
    """RMSNorm (..., H) in fp32; the result has autocast's dtype if it is on, else the dtype of x."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.variance_epsilon, autocast_dtype(x))


class LeanMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), (B, T, H) -> (B, T, H)."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # the gate is freed before its product with the other factor is made
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x)))


class _Linear(torch.autograd.Function):
    """x W^T + b in the dtype of x, whatever the dtype of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
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
