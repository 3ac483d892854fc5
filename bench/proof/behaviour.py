"""Forbidden waits and copies: a call waits for no device, keeps to its workspace and widens no narrow operand."""

import contextlib
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .check import (
    BOUNDS,
    Found,
    draw,
    linear_divergence,
    relative,
    short,
)
from .phase import Place


def chosen(place: Place) -> Iterator[Found]:
    """impl=None is Triton on a GPU, bit for bit."""
    inputs = draw(place, 64, 1000, 64, torch.bfloat16)
    values = [linear_divergence(*inputs, impl=impl) for impl in (None, "triton")]
    yield Found("difference to impl='triton'", (values[0] - values[1]).abs().item(), 0.0)


def self_test(place: Place) -> Iterator[Found]:
    from sdft_kernels.__main__ import main

    yield Found("exit status of python -m sdft_kernels", float(main([])), 0.0)


def compiled(place: Place) -> Iterator[Found]:
    """torch.compile with Inductor: the same values, and one graph for every number of tokens."""

    def f(*tensors: Any, reduction: str) -> Tensor:
        x, w, teacher_x, teacher_w = tensors
        return linear_divergence(x * 2, w, teacher_x, teacher_w, impl="triton", reduction=reduction).sum()

    for reduction in ("mean", "none"):
        fast: Any = torch.compile(f, fullgraph=True)
        for rows in (64, 70, 90):
            tensors = draw(place, rows, 1000, 64, torch.bfloat16)
            leaves = [t.requires_grad_(i < 2) for i, t in enumerate(tensors)]
            want, got = f(*leaves, reduction=reduction), fast(*leaves, reduction=reduction)
            yield Found(f"{reduction}, {rows} rows: loss", relative(got, want), 1e-5)
            pairs = zip(*(torch.autograd.grad(v, leaves[:2]) for v in (got, want)), strict=True)
            yield Found(f"{reduction}, {rows} rows: gradients", max(relative(a, b) for a, b in pairs), 1e-5)


def narrow_products(place: Place) -> Iterator[Found]:
    """mm(out_dtype=): fp32 results of bf16 operands, without an fp32 copy of the head or of the gradient."""
    from sdft_kernels.operands import mm32

    for dtype in (torch.bfloat16, torch.float16):
        a, b = torch.randn(64, 256, device="cuda").to(dtype), torch.randn(256, 512, device="cuda").to(dtype)
        out = torch.full((64, 576), 7.0, device="cuda")
        view, exact = out[:, :512], a.double() @ b.double()
        mm32(a, b, view)
        yield Found(f"{short(dtype)}: product", relative(view, exact), 1e-6)
        mm32(a, b, view, beta=1.0)
        yield Found(f"{short(dtype)}: twice", relative(view, 2 * exact), 1e-6)
        yield Found(f"{short(dtype)}: memory next to the result", (out[:, 512:] - 7.0).abs().max().item(), 0.0)
        mm32(
            b.t(), a.t(), torch.empty(512, 64, device="cuda")
        )  # as the product for dW; cuBLAS may allocate a workspace once
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        mm32(a, b, view)
        extra = torch.cuda.max_memory_allocated() - before
        yield Found(f"{short(dtype)}: bytes taken", float(extra), 2.0 * b.nbytes)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raises if the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_never_waits(place: Place) -> Iterator[Found]:
    for dtype, reduction in product(BOUNDS, ("mean", "none")):
        inputs = draw(place, 200, 3000, 64, dtype)
        weights = (torch.arange(200, device=place.device) % 3).float()
        upstream = torch.ones((200,) if reduction == "none" else (), device=place.device)

        def step(inputs=inputs, weights=weights, upstream=upstream, reduction=reduction) -> None:  # type: ignore[no-untyped-def]
            leaves = [t.detach().requires_grad_(i < 2) for i, t in enumerate(inputs)]
            loss = linear_divergence(
                *leaves, token_weights=weights, compact=False, impl="triton", reduction=reduction, chunk_bytes=2**21
            )
            torch.autograd.grad(loss, leaves[:2], upstream)

        step()  # compiles
        with no_waiting():
            step()
        yield Found(f"{short(dtype)}, {reduction}: waits", 0.0, 0.0)


def graph_capture(place: Place) -> Iterator[Found]:
    """A call of few tokens captured in a CUDA graph: replayed on other inputs, the same values."""
    tensors = draw(place, 512, 5001, 128, torch.bfloat16)
    leaves = [t.detach().requires_grad_(i < 2) for i, t in enumerate(tensors)]

    def step() -> list[Tensor]:
        loss = linear_divergence(*leaves, compact=False, impl="triton")
        return [loss, *torch.autograd.grad(loss, leaves[:2])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills the allocator's and cuBLAS's pools
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    with torch.no_grad():
        leaves[0].mul_(1.25)
    graph.replay()
    torch.cuda.synchronize()
    got = [t.clone() for t in made]
    for name, a, b in zip(("loss", "dX", "dW"), got, step(), strict=True):
        yield Found(f"replayed: {name}", relative(a, b), 1e-6)


def memory_budget(place: Place) -> Iterator[Found]:
    n, v, h, budget = 8192, 50_000, 64, 2**26
    for frozen in (False, True):
        x, w, teacher_x, teacher_w = draw(place, n, v, h, torch.bfloat16, shared=True)
        x.requires_grad_()
        w = w.detach().requires_grad_(not frozen)
        for _ in range(2):  # in the first, cuBLAS takes its workspace
            x.grad = w.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            linear_divergence(x, w, teacher_x, teacher_w, chunk_bytes=budget).backward()
        extra = torch.cuda.max_memory_allocated() - before
        results = x.nbytes + 4 * n + (0 if frozen else 6 * v * h)  # dX, divergences; dW in fp32 and, at the end, bf16
        what = f"{'frozen' if frozen else 'trained'}: bytes beyond the results"
        yield Found(what, float(extra - results), budget + 2.0**22)  # two (N, V) fp32 logits would take 3.3 GB
