"""Schedule, decay groups, clipping."""

import importlib
import importlib.util
import io
import math
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdft.config import OptimConfig
from sdft.errors import SdftError
from sdft.update import offload
from sdft.update.optim import OffloadedAdamW, check_optimizer, clip, learning_rate, make_optimizer


def rates(steps: int, **settings: object) -> list[float]:
    """Learning rates as fractions of half the peak."""
    config = OptimConfig(**{"lr": 0.5, "warmup_steps": 4} | settings)
    return [4 * learning_rate(step, steps, config) for step in range(steps)]


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


# What a device or an installation does not have.


@pytest.mark.parametrize(
    ("name", "device", "installed", "words"),
    [
        ("adamw_8bit", "cpu", False, r"'adamw_8bit' needs bitsandbytes, which is not installed; run: pip install bits"),
        ("paged_adamw_8bit", "cpu", True, r"'paged_adamw_8bit' needs a CUDA device, not cpu; set 'adamw_8bit'"),
        ("adamw_8bit", "mps", True, r"'adamw_8bit' runs on CUDA and the CPU, not on mps; set 'adamw'"),
        ("adamw", "mps", False, ""),
        ("adamw_8bit", "cpu", True, ""),
        ("paged_adamw_8bit", "cuda:1", True, ""),
    ],
)
def test_an_optimizer_that_cannot_run_is_refused(
    name: Any, device: str, installed: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object() if installed else None)
    with pytest.raises(SdftError, match=words) if words else nullcontext():
        check_optimizer(OptimConfig(name=name), torch.device(device))


# The moments in CPU memory. Whole runs: test_offload.py


def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        draw = torch.Generator().manual_seed(step)
        for i, p in enumerate(parameters):
            # The last parameter has no gradient at first, as one that a step does not use.
            late = i == len(parameters) - 1 and step < 2
            p.grad = None if late else torch.randn(p.shape, generator=draw).to(p.dtype)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)
        optimizer.step()


def parameters_of(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes]


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state, saved to a file without code and loaded."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("part", [50, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_adamw_is_adamw(dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PART", part)
    # A cut between the lanes of a vector instruction rounds the last bit of its neighbours otherwise.
    same = {"rtol": 0, "atol": 0} if part > 50 else {"rtol": 1e-5, "atol": 1e-6 if dtype == torch.float32 else 1e-2}
    shapes = [(7, 11), (5,), (40, 3), (2, 2)]
    config = OptimConfig(weight_decay=0.1, betas=(0.8, 0.9))
    plain, away = parameters_of(shapes, dtype), parameters_of(shapes, dtype)
    away[0].data = away[0].data.t().contiguous().t()  # not contiguous
    want, got = make_optimizer(plain, config), make_optimizer(away, replace(config, offload=True))
    assert type(want) is torch.optim.AdamW
    assert type(got) is OffloadedAdamW
    steps(want, plain, 0, 4)
    steps(got, away, 0, 4)
    torch.testing.assert_close(away, plain, **same)
    torch.testing.assert_close(got.state_dict()["state"], want.state_dict()["state"], **same)

    again = make_optimizer(away, replace(config, offload=True))
    again.load_state_dict(saved(got))
    steps(want, plain, 4, 6)
    steps(again, away, 4, 6)
    torch.testing.assert_close(away, plain, **same)


# 8 bits.


@pytest.fixture
def bitsandbytes() -> Any:
    """In CI it must be there; elsewhere its tests are skipped with a reason."""
    if os.environ.get("CI"):
        return importlib.import_module("bitsandbytes")
    return pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")


EIGHT = OptimConfig(name="adamw_8bit", weight_decay=0.1, betas=(0.8, 0.9))
SHAPES = [(70, 100), (64, 64), (5000,), (30,), (3, 1111)]  # whole blocks of 256 and not, too small for 8 bits and not


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_change_nothing(bitsandbytes: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdft.update import adamw_8bit

    monkeypatch.setattr(adamw_8bit, "SLICE", 1024)
    whole, sliced = parameters_of(SHAPES, dtype), parameters_of(SHAPES, dtype)
    got = make_optimizer(sliced, EIGHT)
    groups = [
        {**g, "params": [whole[i] for i in n]} for g, n in zip(got.param_groups, [[0, 1, 4], [2, 3]], strict=True)
    ]
    want = bitsandbytes.optim.AdamW8bit(groups, betas=EIGHT.betas)
    steps(want, whole, 0, 4)
    steps(got, sliced, 0, 4)
    assert all(torch.equal(a, b) for a, b in zip(sliced, whole, strict=True))
    assert [got.state[p]["state1"].dtype == torch.uint8 for p in sliced] == [True, True, True, False, False]


@pytest.mark.usefixtures("bitsandbytes")
def test_eight_bits_follow_adamw() -> None:
    plain, small = parameters_of(SHAPES), parameters_of(SHAPES)
    start = [p.detach().clone() for p in plain]
    steps(make_optimizer(plain, replace(EIGHT, name="adamw")), plain, 0, 8)
    optimizer = make_optimizer(small, EIGHT)
    steps(optimizer, small, 0, 8)
    for a, b, s in zip(small, plain, start, strict=True):
        assert ((a - b).norm() / (b - s).norm()).item() < 0.05
    state = sum(t.nbytes for t in optimizer.state[small[0]].values() if isinstance(t, torch.Tensor))
    assert state < 2.1 * small[0].numel() + 2 * 1024  # 8 with adamw; the two tables of 1 kB are shared


@pytest.mark.usefixtures("bitsandbytes")
def test_eight_bits_resume_exactly() -> None:
    whole, split = parameters_of(SHAPES), parameters_of(SHAPES)
    steps(make_optimizer(whole, EIGHT), whole, 0, 5)
    first = make_optimizer(split, EIGHT)
    steps(first, split, 0, 3)
    second = make_optimizer(split, EIGHT)
    second.load_state_dict(saved(first))
    steps(second, split, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(split, whole, strict=True))


@pytest.mark.usefixtures("bitsandbytes")
def test_a_run_with_eight_bits_resumes_exactly(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from sdft.training import loop

    settings = {"optim.name": "adamw_8bit", "train.save_every": 2}
    whole = load_file(loop.train(make_config(**settings)) / "model.safetensors")
    split = settings | {"train.output": str(tmp_path / "split")}
    with monkeypatch.context() as patch:
        own = loop.train_step
        patch.setattr(loop, "train_step", lambda run, step, output: 1 / 0 if step == 3 else own(run, step, output))
        with pytest.raises(ZeroDivisionError):
            loop.train(make_config(**split))
    resumed = load_file(loop.train(make_config(**split | {"train.resume": True})) / "model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
