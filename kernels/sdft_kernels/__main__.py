"""`python -m sdft_kernels`: what runs on this machine and why, then values and gradients against float64.

The exit status is 0 if every value is right, else 1.
"""

import argparse
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import __version__, divergence, linear_cross_entropy, linear_divergence, linear_topk_divergence
from .checks import DIVERGENCES, HAVE_TRITON, INTERPRETED, Impl, choose_impl
from .reference import (
    divergence_reference,
    linear_cross_entropy_reference,
    linear_divergence_reference,
    topk_divergence_reference,
)

ROWS, VOCAB, HIDDEN, TOP = 37, 517, 48, 8  # odd sizes: every kernel meets a block that is not full
LONG_VOCAB = 20011  # GPUs with clusters of thread blocks keep such a row on chip
# Relative error of a gradient. fp32 gives 1e-6 and bf16 2e-3 (the gradient's own rounding); a wrong kernel gives 1.
BOUNDS = {torch.float32: 5e-5, torch.bfloat16: 1e-2}
VALUE_BOUND = 1e-3
Case = tuple[str, Callable[..., Any], Callable[..., Any], list[Tensor]]  # name, ours, truth, two leaves to grade


def devices() -> list[torch.device]:
    """The CPU, and the GPU that torch would use if there is one."""
    return [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])


def reason(device: torch.device) -> str:
    """The implementation that impl=None chooses on the device for fp32 and narrower, and why, in words."""
    impl = choose_impl(None, torch.float32, device)
    if impl == "triton":
        return "triton: a GPU, and Triton is installed (float64 inputs take torch)"
    if device.type == "cuda":
        return "torch: Triton is not installed; pip install triton for the fused kernels"
    return "torch: Triton's kernels need a CUDA or ROCm GPU"


def report() -> None:
    """Print what is installed here, and what would run."""
    triton = importlib.metadata.version("triton") if HAVE_TRITON else "not installed"
    print(f"sdft_kernels {__version__}, torch {torch.__version__}, triton {triton}")
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for device in devices():
        if device.type == "cpu":
            name = f"{torch.get_num_threads()} threads"
        else:
            name = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(device).total_memory >> 30} GiB"
        print(f"{device.type} ({name}): impl={reason(device)}")


def cases(dtype: torch.dtype, device: torch.device, impl: Impl) -> Iterator[Case]:
    """A case of each function for each divergence; on a GPU over a long vocabulary too."""
    yield from cases_over(VOCAB, dtype, device, impl)
    if impl == "triton" and device.type == "cuda":
        yield from cases_over(LONG_VOCAB, dtype, device, impl)


def cases_over(vocab: int, dtype: torch.dtype, device: torch.device, impl: Impl) -> Iterator[Case]:
    """A case of each function for each divergence, over `vocab` tokens."""
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    x, w = normal(ROWS, HIDDEN), normal(vocab, HIDDEN) / HIDDEN**0.5
    tx, tw = x + 0.3 * normal(ROWS, HIDDEN), w + 0.3 * normal(vocab, HIDDEN) / HIDDEN**0.5
    weights = (torch.arange(ROWS) % 4).double()
    x, w, tx, tw = (t.to(dtype).to(device) for t in (x, w, tx, tw))
    weights = weights.to(device)
    s, t = (x.float() @ w.float().T).to(dtype), (tx.float() @ tw.float().T).to(dtype)
    logprobs, ids = t.double().log_softmax(1).topk(TOP)
    exact_tx, exact_tw, exact_t = tx.double(), tw.double(), t.double()
    shared: dict[str, Any] = {"temperature": 1.2, "token_weights": weights}
    for name in DIVERGENCES:
        options = {"divergence": name, "beta": 0.3, **shared}
        yield (
            f"linear_divergence {name}, {vocab} tokens",
            lambda x, w, o=options: linear_divergence(x, w, tx, tw, impl=impl, **o),
            lambda x, w, o=options: linear_divergence_reference(x, w, exact_tx, exact_tw, **o),
            [x, w],
        )
        yield (
            f"divergence {name}, {vocab} tokens",
            lambda s, o=options: divergence(s, t, impl=impl, **o),
            lambda s, o=options: divergence_reference(s, exact_t, **o),
            [s],
        )
        if impl == "torch":  # it has no other implementation
            yield (
                f"linear_topk_divergence {name}",
                lambda x, w, o=options: linear_topk_divergence(x, w, ids, logprobs.float(), **o),
                lambda x, w, o=options: topk_divergence_reference(x @ w.T, ids, logprobs, **o),
                [x, w],
            )
    if impl == "torch":
        yield (
            "linear_cross_entropy",
            lambda x, w: linear_cross_entropy(x, w, ids[:, 0], **shared),
            lambda x, w: linear_cross_entropy_reference(x, w, ids[:, 0], **shared),
            [x, w],
        )


def errors(ours: Callable[..., Any], truth: Callable[..., Any], inputs: list[Tensor]) -> tuple[float, float]:
    """The relative error of the value, and the largest relative error of a gradient."""
    mine = [t.detach().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    value, want = ours(*mine), truth(*exact)
    grads, wanted = torch.autograd.grad(value, mine), torch.autograd.grad(want, exact)

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).norm() / b.norm())

    return relative(value.detach(), want.detach()), max(relative(g, e) for g, e in zip(grads, wanted, strict=True))


def self_test() -> int:
    """Run every case on every device with every implementation that runs there; the number that failed."""
    failed = 0
    for device in devices():
        triton = HAVE_TRITON and (device.type == "cuda" or INTERPRETED)
        impls: tuple[Impl, ...] = ("torch", "triton") if triton else ("torch",)
        for impl in impls:
            for dtype, bound in BOUNDS.items():
                start, count, worst = time.perf_counter(), 0, 0.0
                for name, ours, truth, inputs in cases(dtype, device, impl):
                    where = f"{device.type}, {impl}, {str(dtype).removeprefix('torch.')}: {name}"
                    count += 1
                    try:
                        value, grad = errors(ours, truth, inputs)
                    except Exception as error:  # after an error of a driver or compiler, the other cases still run
                        failed += 1
                        print(f"FAILED {where}: {type(error).__name__}: {error}")
                        continue
                    worst = max(worst, grad)
                    if not (value <= VALUE_BOUND and grad <= bound):  # NaN fails
                        failed += 1
                        print(f"FAILED {where}: relative error of the value {value:.1e}, of a gradient {grad:.1e}")
                seconds = time.perf_counter() - start
                print(
                    f"{device.type}, {impl}, {str(dtype).removeprefix('torch.')}: {count} cases in {seconds:.1f} s, "
                    f"gradients within {worst:.1e} of float64 (allowed {bound:.0e})"
                )
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Print the report, run the self-test; the exit status."""
    argparse.ArgumentParser(prog="python -m sdft_kernels", description=(__doc__ or "").strip()).parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False  # the loss does not round to TF32
    report()
    failed = self_test()
    print("self-test passed" if failed == 0 else f"self-test FAILED: {failed} cases")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
