"""Parameter groups, learning-rate schedule, clipping. The schedule is a function of the step: it has no state."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sdft.config import OptimConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of step `step` (from 0) of `steps`: linear warm-up to lr, then the schedule down to min_lr_ratio * lr.

    The first step already trains (rate lr / warmup_steps), and the last one ends just above the minimum.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[config.schedule]
    if config.schedule != "constant":
        factor = config.min_lr_ratio + (1.0 - config.min_lr_ratio) * factor
    return config.lr * factor


def clip(parameters: Iterable[nn.Parameter], config: OptimConfig) -> Tensor:
    """Scales the gradients to norm `clip_norm` at most; returns the norm before, 0-dim on the device."""
    bound = config.clip_norm or float("inf")
    return nn.utils.clip_grad_norm_(list(parameters), bound, foreach=True)
