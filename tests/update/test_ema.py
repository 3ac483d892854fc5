"""The averaged teacher against float64 by hand, and its averages on the host."""

import threading
from itertools import pairwise
from typing import Any

import pytest
import torch

from sdft.config import LoraConfig, TeacherConfig
from sdft.model.lora import add_lora
from sdft.score.batch import lay_out
from sdft.update import offload
from sdft.update.ema import make_teacher

ALPHA = 0.05
BATCH = lay_out([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]], 258, torch.device("cpu"))


def move(model: Any, seed: int, size: float = 0.01) -> None:
    """A student's step: every trained weight changes."""
    draw = torch.Generator().manual_seed(seed)
    for p in model.trainable().values():
        p.data.add_((torch.randn(p.shape, generator=draw) * size).to(p.dtype))


def values(model: Any) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in model.trainable().items()}


def test_ema_is_the_average_in_float64(model: Any) -> None:
    teacher = make_teacher(model, TeacherConfig(ema_alpha=ALPHA))
    want = {k: p.double() for k, p in values(model).items()}
    for step in range(60):
        move(model, step)
        teacher.update()
        for k, p in values(model).items():
            want[k] = want[k] + ALPHA * (p.double() - want[k])
    for k, exact in want.items():
        assert teacher.masters[k].dtype == torch.float32
        torch.testing.assert_close(teacher.masters[k].double(), exact, rtol=1e-5, atol=1e-6)
        assert (exact - values(model)[k].double()).abs().max() > 0.01  # it lags, so this is no accident


def test_masters_move_where_bf16_would_not(load_tiny: Any) -> None:
    model = load_tiny(weights_dtype="bfloat16")[1]
    teacher = make_teacher(model, TeacherConfig(ema_alpha=0.01))
    weight, before = model.lm.lm_head.weight, model.lm.lm_head.weight.detach().clone()
    weight.data.mul_(1.01)  # 1% of 1% is below bf16's resolution
    for _ in range(20):
        teacher.update()
    moved = teacher.masters["lm_head.weight"] - before.float()
    torch.testing.assert_close(moved, (1 - 0.99**20) * (weight.float() - before.float()), rtol=1e-2, atol=1e-7)


def test_tracked_is_the_fraction_of_the_way(model: Any) -> None:
    for kind, value in (("base", 0.0), ("live", 1.0)):
        assert make_teacher(model, TeacherConfig(kind=kind)).tracked().item() == value
    teacher = make_teacher(model, TeacherConfig(ema_alpha=ALPHA))
    assert teacher.tracked().item() == 0
    move(model, 0, 0.1)
    for steps in range(1, 11):  # a student that went once and stays: exact whatever is sampled
        teacher.update()
        assert teacher.tracked().item() == pytest.approx(1 - (1 - ALPHA) ** steps, rel=1e-4)


def test_tracked_is_near_the_whole_sum_on_a_wandering_student(load_tiny: Any) -> None:
    model = load_tiny()[1]
    start = values(model)
    teacher = make_teacher(model, TeacherConfig(ema_alpha=0.1))
    for step in range(20):
        move(model, step, 0.05)
        teacher.update()
    along = whole = 0.0
    for k, p in values(model).items():
        student, average = (p - start[k]).double(), (teacher.masters[k] - start[k]).double()
        along, whole = along + (student * average).sum().item(), whole + student.square().sum().item()
    assert teacher.tracked().item() == pytest.approx(along / whole, abs=0.02)
    assert 0.3 < along / whole < 0.8


# Averages on the host. On a CPU the same code runs, thread and all, without streams.


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PART", 1000)


@pytest.mark.usefixtures("small_parts")
def test_offloaded_masters_are_the_same_bit_for_bit(model: Any) -> None:
    plain, away = (make_teacher(model, TeacherConfig(ema_alpha=ALPHA, offload=o)) for o in (False, True))
    for step in range(6):
        move(model, step)
        plain.update()
        away.update()
        if step % 2:  # read in every step, and only at the end
            assert torch.equal(away.hidden(BATCH)[0], plain.hidden(BATCH)[0])
        assert away.tracked().item() == pytest.approx(plain.tracked().item(), rel=1e-5)
        away.wait()  # before the student moves again
    want, got = plain.state(), away.state()
    assert list(got) == list(want)
    assert all(torch.equal(got[k], want[k]) and got[k].dtype == torch.float32 for k in want)
    for k, p in model.trainable().items():  # what the device holds
        assert away.tensors[k].dtype == p.dtype
        assert torch.equal(away.tensors[k], got[f"masters.{k}"].to(p.dtype))
        assert not torch.equal(away.tensors[k], p)


@pytest.mark.usefixtures("small_parts")
def test_state_goes_between_offloaded_and_not(model: Any) -> None:
    teachers = [make_teacher(model, TeacherConfig(ema_alpha=ALPHA, offload=o)) for o in (False, True, False)]
    move(model, 0, 0.1)
    teachers[0].update()
    for before, after in pairwise(teachers):
        after.load_state({k: t.clone() for k, t in before.state().items()})
        assert torch.equal(after.hidden(BATCH)[0], before.hidden(BATCH)[0])
        assert torch.equal(after.tracked(), before.tracked())


@pytest.fixture
def held(load_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An offloaded teacher after an update whose average waits for `let_go`, with the student moved before it."""
    model = load_tiny()[1]
    teacher = make_teacher(model, TeacherConfig(ema_alpha=ALPHA, offload=True))
    let_go, own = threading.Event(), teacher.host.run

    def run(*args: Any) -> None:
        assert let_go.wait(60)
        own(*args)

    monkeypatch.setattr(teacher.host, "run", run)
    move(model, 0, 0.1)
    teacher.update()
    yield teacher, let_go
    let_go.set()


READERS = {
    "hidden": lambda t: t.hidden(BATCH),
    "weights": lambda t: t.weights().__enter__(),
    "state": lambda t: t.state(),
    "update": lambda t: t.update(),
    "wait": lambda t: t.wait(),
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_the_teacher_waits_for_the_average(reader: str, held: Any) -> None:
    teacher, let_go = held
    before = {k: t.clone() for k, t in teacher.masters.items()}
    assert teacher.tracked().item() == pytest.approx(ALPHA, rel=1e-3)  # logged at once
    assert not teacher.pending.done()
    assert all(torch.equal(teacher.masters[k], before[k]) for k in before)
    threading.Timer(0.1, let_go.set).start()
    first = teacher.pending
    READERS[reader](teacher)
    assert first.done()
    assert not any(torch.equal(teacher.masters[k], before[k]) for k in before)


@pytest.mark.parametrize("reader", READERS)
def test_a_failed_average_is_told_to_everyone(reader: str, load_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_tiny()[1]
    teacher = make_teacher(model, TeacherConfig(offload=True))
    monkeypatch.setattr(teacher.host, "run", lambda *a: 1 / 0)
    before = values(model)
    teacher.update()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            READERS[reader](teacher)
    assert all(torch.equal(p, before[k]) for k, p in model.trainable().items())


@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_an_update_keeps_no_whole_copy_of_the_weights(weights_dtype: str, load_tiny: Any) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    model = load_tiny(weights_dtype=weights_dtype)[1]
    teacher = make_teacher(model, TeacherConfig())

    class Largest(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and func is torch.ops.aten._to_copy.default:
                self.made = max(self.made, out.numel())
            return out

    with pytest.MonkeyPatch.context() as patch, Largest() as largest:
        patch.setattr(offload, "PART", 1000)
        teacher.update()
    assert max(p.numel() for p in model.trainable().values()) > 8000
    assert largest.made == (1000 if weights_dtype == "bfloat16" else 0)


def test_the_lag_of_averaged_factors_is_their_covariance(load_tiny: Any) -> None:
    """avg(B) avg(A) - avg(B A) = -sum_i w_i (B_i - avg B)(A_i - avg A): zero if one of them does not move, and a
    quarter if both move half as far."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.default.weight"

    def lag(size_a: float, size_b: float) -> tuple[torch.Tensor, torch.Tensor]:
        model = load_tiny()[1]
        add_lora(model, LoraConfig(rank=3), 0)
        a, b = (model.trainable()[name.format(f)] for f in "AB")
        teacher = make_teacher(model, TeacherConfig(ema_alpha=ALPHA))
        history = [(a.double().clone(), b.double().clone())]
        draw = torch.Generator().manual_seed(0)
        for _ in range(30):
            a.data += size_a * torch.randn(a.shape, generator=draw)
            b.data += size_b * torch.randn(b.shape, generator=draw)
            teacher.update()
            history.append((a.detach().double().clone(), b.detach().double().clone()))
        w = [(1 - ALPHA) ** 30, *(ALPHA * (1 - ALPHA) ** (30 - i) for i in range(1, 31))]
        mean_a = sum(x * a for x, (a, _) in zip(w, history, strict=True))
        mean_b = sum(x * b for x, (_, b) in zip(w, history, strict=True))
        product = sum(x * b @ a for x, (a, b) in zip(w, history, strict=True))
        covariance = sum(x * (b - mean_b) @ (a - mean_a) for x, (a, b) in zip(w, history, strict=True))
        ours = teacher.masters[name.format("B")].double() @ teacher.masters[name.format("A")].double()
        torch.testing.assert_close(ours - product, -covariance, rtol=1e-3, atol=1e-6)
        return ours - product, product

    assert lag(0.0, 0.1)[0].abs().max() < 1e-6
    whole, half = (lag(size, size)[0].norm().item() for size in (0.1, 0.05))
    assert half == pytest.approx(whole / 4, rel=1e-3)
    difference, product = lag(0.1, 0.1)
    assert difference.norm() > 0.1 * product.norm()  # on a random walk, where A goes as far as B, it is no small thing
