"""The numbers of docs/integrations.md: `sdft_kernels.compat.liger` and the chunked class of liger-kernel, on the CPU.

    python -m bench.integrations liger

Errors are |a − b| / |b| against dense float64 of the same bf16 inputs. Memory is the growth of the peak resident set
over loss and backward, gradients included; each row is measured in a separate process.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import sdft_kernels.compat.liger as ours
import torch
from torch import Tensor

from ..measure import Cpu

ROWS, VOCAB, HIDDEN, NOISE = 64, 4096, 256, 0.05  # for the errors: the teacher is near the student
BIG = (1024, 49152, 576)  # for the memory: the head of SmolLM2-135M

Loss = Callable[[Tensor, Tensor], Tensor]


def near(rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The student's hidden states, the head of both sides, the teacher's hidden states."""
    gen = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, hidden, generator=gen), torch.randn(vocab, hidden, generator=gen) / hidden**0.5
    return x.to(dtype), w.to(dtype), (x + NOISE * torch.randn(rows, hidden, generator=gen)).to(dtype)


def dense(x: Tensor, w: Tensor, tx: Tensor, beta: float) -> Tensor:
    p, q = (x @ w.T).log_softmax(-1), (tx @ w.detach().T).log_softmax(-1)
    if beta == 0:
        return (q.exp() * (q - p)).sum(-1).mean()
    if beta == 1:
        return (p.exp() * (p - q)).sum(-1).mean()
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return (beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m)).sum(-1).mean()


def values(loss: Loss, x: Tensor, w: Tensor) -> list[Tensor]:
    """Loss, dX, dW."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    made = loss(x, w)
    return [made.detach().double(), *(g.double() for g in torch.autograd.grad(made, [x, w]))]


def of_module(module: Any, tx: Tensor, teacher_w: Tensor, labels: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return module(x, w, tx, teacher_w, labels)


def errors() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    x, w, tx = near(ROWS, VOCAB, HIDDEN, torch.bfloat16)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    print(f"bf16, N={ROWS} V={VOCAB} H={HIDDEN}: error of loss, dX, dW")
    for beta in (0.0, 0.5, 1.0):
        truth = values(partial(dense, tx=tx.double(), beta=beta), x.double(), w.double())
        modules: dict[str, Any] = {
            "ours": ours.LigerFusedLinearJSDLoss(0.0, 1.0, beta),
            "Liger chunked": LigerFusedLinearJSDLoss(0.0, 1.0, beta, compiled=False),
        }
        for name, module in modules.items():
            made = values(partial(of_module, module, tx, w, labels), x, w)
            found = [((a - b).norm() / b.norm()).item() for a, b in zip(made, truth, strict=True)]
            print(f"  beta {beta}, D = {truth[0].item():.5f}: {name:14s}", *(f"{e:.2%}" for e in found))


def padded() -> None:
    """A student equal to its teacher, whose head has 64 more rows, impossible ones; logits are 5 lower."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    x, w, _ = near(ROWS, VOCAB, HIDDEN, torch.float32)
    bias, more = torch.full((VOCAB,), -5.0), torch.full((64,), -30.0)
    wide = torch.cat([w, torch.zeros(64, HIDDEN)])
    for name, cls in (("ours", ours.LigerFusedLinearJSDLoss), ("Liger chunked", LigerFusedLinearJSDLoss)):
        module = cls(0.0, 1.0, 0.0, compiled=False)
        loss = module(x, w, x, wide, torch.zeros(ROWS, dtype=torch.int64), bias, torch.cat([bias, more]))
        print(f"padded teacher, forward KL of equal models: {name:14s} {loss.item():.4f}")


def memory(what: str) -> int:
    """Bytes of one loss and backward."""
    x, w, tx = near(*BIG, torch.float32)
    labels = torch.zeros(BIG[0], dtype=torch.int64)
    side, name = what.split()
    if side == "theirs":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    else:
        from sdft_kernels.compat.liger import LigerFusedLinearJSDLoss
    hard, soft = {"soft": (0.0, 1.0), "frozen": (0.0, 1.0), "both": (0.5, 0.5), "logs": (0.0, 1.0)}[name]
    if name == "logs":
        log_p, log_q = (torch.randn(BIG[:2]).log_softmax(-1) for _ in range(2))
        log_p.requires_grad_()
        return Cpu().extra_bytes(lambda: ours.LigerJSD()(log_p, log_q).backward()) or 0
    module = LigerFusedLinearJSDLoss(hard, soft, 1.0, compiled=False)
    x.requires_grad_()
    w.requires_grad_(name != "frozen")

    def run() -> None:
        module(x, w, tx, w.detach(), labels).backward()

    return Cpu().extra_bytes(run) or 0


def main(arguments: list[str]) -> None:
    """Prints the numbers. With arguments: the numbers of one process."""
    if arguments:
        print(memory(arguments[0]))
        return
    errors()
    padded()
    for what in ("ours soft", "theirs soft", "ours frozen", "theirs frozen", "ours both", "theirs both", "ours logs"):
        command = [sys.executable, "-m", "bench.integrations", "liger", what]
        grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"fp32, N, V, H = {BIG}: {what:14s} {grown / 1e6:.0f} MB")
