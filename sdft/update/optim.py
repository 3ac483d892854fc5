"""Parameter groups, learning-rate schedule, clipping. The schedule is a function of the step: it has no state."""

import importlib.util
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sdft import parallel
from sdft.config import OptimConfig
from sdft.errors import SdftError
from sdft.update.offload import HostWorker, cut_into_parts, views_of_part


def check_optimizer(config: OptimConfig, device: torch.device) -> None:
    """Raises SdftError for an optimizer that this device or this installation lacks."""
    if config.name == "adamw":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SdftError(
            f"optim.name = {config.name!r} needs bitsandbytes, which is not installed; "
            "run: pip install bitsandbytes, or set 'adamw'"
        )
    if config.name == "paged_adamw_8bit" and device.type != "cuda":
        raise SdftError(f"optim.name = 'paged_adamw_8bit' needs a CUDA device, not {device}; set 'adamw_8bit'")
    if device.type not in ("cuda", "cpu"):
        raise SdftError(f"optim.name = {config.name!r} runs on CUDA and the CPU, not on {device}; set 'adamw'")


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name != "adamw":
        from sdft.update.adamw_8bit import AdamW8bit

        return AdamW8bit(groups, **settings, is_paged=config.name == "paged_adamw_8bit")
    if config.offload:
        return OffloadedAdamW(groups, **settings)
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(groups, **settings, fused=fused)


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose moments live in CPU memory and whose update runs there; the weights stay on the device.

    A step brings gradients and weights to the host and the new weights back, 64 MiB of each at a time, the next
    part on its way while one is computed. State and results are as by torch.optim.AdamW(fused=True) on the CPU;
    either loads the other's state.
    (torchao's CPUOffloadOptimizer takes gradients away before they can be clipped, and after a resume overwrites the
    weights with its own copies.)
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.worker = HostWorker(self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; the device's next work sees it, the host waits for the
        gradients only."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not self.state[p]:
                    self.state[p] = {"step": torch.zeros(()), "exp_avg": _host_zeros(p), "exp_avg_sq": _host_zeros(p)}
            self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        states = [self.state[p] for p in parameters]
        weights = [p.detach().contiguous() for p in parameters]  # flat views need that
        gradients = [p.grad.contiguous() for p in parameters if p.grad is not None]
        parts = list(cut_into_parts([p.numel() for p in parameters]))
        jobs = [
            (views_of_part(weights, part) + views_of_part(gradients, part), views_of_part(weights, part))
            for part in parts
        ]

        def work(number: int, host: list[Tensor]) -> list[Tensor]:
            part = parts[number]
            own, grads = host[: len(part)], host[len(part) :]
            adamw(
                own,
                grads,
                views_of_part([s["exp_avg"] for s in states], part),
                views_of_part([s["exp_avg_sq"] for s in states], part),
                [],
                [states[index]["step"].clone() for index, _ in part],  # it counts up here, once a piece
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )
            return own

        self.worker.wait_for_device()  # gradients, and copies that were made above
        self.worker.run(jobs, work)
        self.worker.make_device_wait()
        for parameter, updated in zip(parameters, weights, strict=True):
            if not parameter.is_contiguous():
                parameter.copy_(updated)
        for state in states:
            state["step"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would move the moments to the parameters' device."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state.clear()
        for index, state in state_dict["state"].items():
            self.state[parameters[index]] = {name: value.to("cpu", copy=True) for name, value in state.items()}


def _host_zeros(parameter: Tensor) -> Tensor:
    return torch.zeros(parameter.shape, dtype=parameter.dtype)


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
    """Scales the gradients to norm `clip_norm` at most; returns the norm before, 0-dim on the device.

    Gradients that are DTensors count whole: the norm is over the parts of all ranks.
    """
    bound = config.clip_norm or float("inf")
    return parallel.whole(nn.utils.clip_grad_norm_(list(parameters), bound, foreach=True))
