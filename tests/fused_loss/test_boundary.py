"""What a call accepts and refuses: memory to write to, weights of any size, devices, derivatives that do not exist."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sdft_kernels import divergence, linear_cross_entropy, linear_divergence, linear_topk_divergence, topk_divergence
from sdft_kernels.compat.liger import LigerJSD, LigerKLDIVLoss
from sdft_kernels.operators import register
from torch import Tensor
from torch.autograd import forward_ad

N, V, H = 4, 11, 3
IMPLS = ("torch", "triton")
logits_module = importlib.import_module("sdft_kernels.divergence")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


W, TX, TW, T = normal(V, H, seed=1), normal(N, H, seed=2), normal(V, H, seed=3), normal(N, V, seed=4)
IDS, LOGPROBS = torch.arange(N * 2).view(N, 2), normal(N, 2, seed=5) - 3
# By the name that an error gives the loss: the loss as a function of one tensor, and this tensor.
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "linear_divergence": (lambda x: linear_divergence(x, W, TX, TW), normal(N, H)),
    "divergence": (lambda s: divergence(s, T), normal(N, V)),
    "divergence ": (lambda s: divergence(s * 1.0, T.clone(), inplace=True), normal(N, V)),
    "the top-k divergence": (lambda x: linear_topk_divergence(x, W, IDS, LOGPROBS), normal(N, H)),
    "the top-k divergence ": (lambda s: topk_divergence(s, IDS, LOGPROBS), normal(N, V)),
    "LigerJSD": (lambda s: LigerJSD()(s, T.log_softmax(1)), normal(N, V).log_softmax(1)),
    "LigerKLDIVLoss": (lambda s: LigerKLDIVLoss()(s, T.softmax(1)), normal(N, V).log_softmax(1)),
    "linear_cross_entropy": (lambda x: linear_cross_entropy(x, W, IDS[:, 0]), normal(N, H)),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_forward_mode_is_refused_by_name(name: str) -> None:
    """The derivative came out as 0 or None before."""
    loss, at = LOSSES[name]
    with pytest.raises(RuntimeError, match=f"{name.strip()} has no forward-mode derivative: use backward"):
        torch.func.jvp(loss, (at,), (torch.ones_like(at),))
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=f"{name.strip()} has no forward-mode derivative: use backward"),
    ):
        loss(forward_ad.make_dual(at, torch.ones_like(at)))


@pytest.mark.parametrize("name", list(LOSSES))
def test_transforms_of_torch_func_are_refused_by_name(name: str) -> None:
    loss, at = LOSSES[name]
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=f"{name.strip()} does not work under torch.func.grad"):
            transform(loss)(at)
    with pytest.raises(RuntimeError, match=f"{name.strip()} does not work under .*torch.func.vmap"):
        torch.func.vmap(loss)(torch.stack([at, at]))
    leaf = at.clone().requires_grad_()
    assert torch.autograd.grad(loss(leaf), leaf)[0].isfinite().all(), "and it still has a gradient"


@pytest.mark.parametrize("impl", IMPLS)
def test_in_place_on_shared_memory_is_refused_by_name(impl: str) -> None:
    both = normal(2 * N + 1, 2 * V)
    teacher = normal(N, V, seed=6)
    overlapping = {
        "one row for all": both[:1, :V].expand(N, V),
        "one column for all": both[:N, :1].expand(N, V),
        "rows that overlap": both.flatten().as_strided((N, V), (V - 1, 1)),
        "columns over rows": both.flatten().as_strided((N, V), (3, 2)),
    }
    for what, s in overlapping.items():
        with pytest.raises(ValueError, match=r"student_logits with strides .*share memory: use inplace=False"):
            divergence(s, teacher, inplace=True, impl=impl)
        assert divergence(s, teacher, impl=impl).isfinite(), what
    apart = {
        "halves": (both[:N, :V], both[N : 2 * N, :V]),
        "alternating rows": (both[: 2 * N : 2, :V], both[1 : 2 * N : 2, :V]),
        "sides of one row": (both[:N, :V], both[:N, V:]),
        "teacher first": (both[:N, V:], both[:N, :V]),
        "transposed": (both[:V, :N].T, teacher),
        "every second column": (both[:N, ::2], teacher),
    }
    for what, (s, t) in apart.items():
        leaf = s.clone().requires_grad_()
        divergence(leaf, t.clone(), impl=impl).backward()
        divergence(s.requires_grad_(), t.detach(), inplace=True, impl=impl)  # the check sees where it writes
        torch.testing.assert_close(s.detach(), leaf.grad, msg=lambda m, w=what: f"{w}: {m}")
        both = normal(2 * N + 1, 2 * V)
    memory = normal(2 * N, V)
    for s, t in ((memory[:N], memory[1 : N + 1]), (memory[:N], memory[:N]), (memory[:N], memory.T[:N, :N])):
        with pytest.raises(ValueError, match="over teacher_logits, which lies in the same memory"):
            divergence(s, t, inplace=True, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1.0, 3e38, 1e-41, 1e-45])
def test_the_mean_is_right_for_weights_of_any_size(size: float, impl: str) -> None:
    """A sum that overflows made the loss 0, and a denormal sum made it infinite or NaN."""
    weights = torch.tensor([1.0, 0.5, 0.0, 1.0])
    x = normal(N, H).requires_grad_()
    want = linear_divergence(x, W, TX, TW, token_weights=weights.round())
    got = linear_divergence(x, W, TX, TW, token_weights=weights.round() * size, impl=impl)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


def test_every_operator_runs_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device. Two devices are faked: tensors that name one, and the current device."""
    current = [0]

    @contextmanager
    def device(where: torch.device) -> Iterator[None]:
        before, current[0] = current[0], where.index
        yield
        current[0] = before

    class OnSecond(Tensor):
        device = property(lambda self: torch.device("cuda", 1))  # type: ignore[assignment]

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    seen: list[tuple[str, int]] = []

    def note(phase: str, x: Tensor) -> Tensor:
        seen.append((phase, current[0]))
        return x.clone()

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return note("backward", grad)

    op = register(
        "sdft::where", "(Tensor x) -> Tensor", lambda x: note("forward", x), torch.empty_like, backward,
        lambda ctx, inputs, output: None,
    )  # fmt: skip
    x = torch.ones(3).as_subclass(OnSecond).requires_grad_()
    torch.autograd.grad(op(x), x, torch.ones(3).as_subclass(OnSecond))
    assert seen == [("forward", 1), ("backward", 1)]

    def loss(student: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return (note("in place", student).sum(), *(torch.empty(0) for _ in range(6)))

    monkeypatch.setattr(logits_module, "_loss", loss)
    monkeypatch.setattr(logits_module, "scale_grad", lambda made, *_: note("in place, backward", made))
    monkeypatch.setattr(logits_module, "choose_impl", lambda *_: "torch")
    s = (torch.ones(2, 3).requires_grad_() * 1).as_subclass(OnSecond)
    out = divergence(s, torch.ones(2, 3).as_subclass(OnSecond), inplace=True)
    torch.autograd.grad(out, s, torch.ones(()).as_subclass(OnSecond))
    assert seen[2:] == [("in place", 1), ("in place, backward", 1)]
    assert current == [0]
