"""What only a GPU can show. One command there: python -m pytest -m gpu"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sdft_kernels import linear_divergence
from sdft_kernels.reference import linear_divergence_reference as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT MEASURED ON A GPU: this machine has none"),
]


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_match_float64(divergence: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(253, 128), torch.randn(1001, 128) / 8
    teacher_x, teacher_w = x + 0.05 * torch.randn_like(x), w + 0.005 * torch.randn_like(w)
    inputs = [t.to("cuda", dtype) for t in (x, w, teacher_x, teacher_w)]
    truth = [t.double() for t in inputs]
    for pair in (inputs, truth):
        pair[0].requires_grad_()
        pair[1].requires_grad_()
    loss = linear_divergence(*inputs, divergence=divergence)
    want = reference(*truth, divergence=divergence)
    loss.backward()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=0.01)
    for got, exact in zip(inputs[:2], truth[:2], strict=True):
        assert got.grad is not None
        assert exact.grad is not None
        assert (got.grad.double() - exact.grad).norm() < 0.005 * exact.grad.norm()


def test_memory_stays_within_the_chunk_budget() -> None:
    n, v, h = 8192, 50_000, 64
    x, w, teacher_x = (torch.randn(s, h, device="cuda", dtype=torch.bfloat16) for s in (n, v, n))
    x.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_divergence(x, w, teacher_x, w, chunk_bytes=2**26).backward()
    extra = torch.cuda.max_memory_allocated() - before - 4 * n * h
    assert extra < 1.5 * 2**26  # two (N, V) fp32 logits would take 3.3 GB


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_trains_and_resumes(make_config: Callable[..., Any], rank: int) -> None:
    from dataclasses import replace

    from sdft.metrics import read_metrics
    from sdft.train import train

    config = make_config(**{"model.device": "cuda", "model.compute_dtype": "bfloat16", "lora.rank": rank})
    train(config)
    lines = read_metrics(Path(config.train.output))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["seconds"]["rollout"] > 0 for line in lines)
    train(replace(config, train=replace(config.train, resume=True)))
