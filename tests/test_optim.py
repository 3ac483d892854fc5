"""Schedule, decay groups, clipping."""

import math

import pytest
import torch
from torch import nn

from sdft.config import OptimConfig
from sdft.optim import clip, learning_rate, make_optimizer


def rates(steps: int, **settings: object) -> list[float]:
    config = OptimConfig(**{"lr": 2.0, "warmup_steps": 4} | settings)
    return [learning_rate(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warmup_is_linear_and_trains_from_the_first_step(schedule: str) -> None:
    assert rates(20, schedule=schedule)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_schedules() -> None:
    assert rates(8, schedule="linear") == pytest.approx([0.5, 1, 1.5, 2, 2, 1.5, 1, 0.5])
    assert rates(8, schedule="constant") == [0.5, 1, 1.5, 2, 2, 2, 2, 2]
    want = [1 + math.cos(math.pi * i / 4) for i in range(4)]
    assert rates(8, schedule="cosine") == pytest.approx([0.5, 1, 1.5, 2, *want])
    assert rates(8, schedule="cosine", min_lr_ratio=0.1)[4:] == pytest.approx([0.2 + 0.9 * w for w in want])
    assert rates(8, schedule="linear", min_lr_ratio=0.5)[4:] == pytest.approx([2, 1.75, 1.5, 1.25])


def test_odd_lengths() -> None:
    assert rates(3) == [0.5, 1.0, 1.5]  # shorter than the warm-up
    assert rates(4) == [0.5, 1.0, 1.5, 2.0]
    assert rates(1, warmup_steps=0) == [2.0]
    assert all(rate > 0 for rate in rates(50))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def test_vectors_are_never_decayed() -> None:
    config = OptimConfig(lr=0.1, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-6)
    optimizer = make_optimizer(model().parameters(), config)
    decays = {tuple(p.shape): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {(4, 3): 0.5, (4,): 0.0}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4
    assert all((g["betas"], g["eps"]) == ((0.8, 0.9), 1e-6) for g in optimizer.param_groups)


def test_the_update_is_adamw_by_hand() -> None:
    config = OptimConfig(lr=0.1, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-6)
    net = model()
    optimizer = make_optimizer(net.parameters(), config)
    want = [p.detach().double() for p in net.parameters()]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in want]
    for step in range(1, 6):
        torch.manual_seed(step)
        for i, p in enumerate(net.parameters()):
            p.grad = torch.randn_like(p)
            g, (m, v) = p.grad.double(), moments[i]
            m.mul_(0.8).add_(0.2 * g)
            v.mul_(0.9).add_(0.1 * g * g)
            decay = 0.5 if p.ndim > 1 else 0.0
            update = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
            want[i] = want[i] * (1 - 0.1 * decay) - 0.1 * update
        optimizer.step()
    for p, w in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_only_adapters_without_matrices_or_vectors() -> None:
    """A group that would be empty is left out."""
    assert len(make_optimizer([nn.Parameter(torch.ones(2, 2))], OptimConfig()).param_groups) == 1
    assert len(make_optimizer([nn.Parameter(torch.ones(2))], OptimConfig()).param_groups) == 1


@pytest.mark.parametrize(("bound", "factor"), [(1.0, 0.2), (10.0, 1.0), (0.0, 1.0)])
def test_clip(bound: float, factor: float) -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])  # the third has none
    assert clip(parameters, OptimConfig(clip_norm=bound)).item() == pytest.approx(5.0)
    got = torch.cat([parameters[0].grad, parameters[1].grad])
    torch.testing.assert_close(got, factor * torch.tensor([3.0, 0.0, 4.0]), rtol=1e-5, atol=0)
