"""The dense reference against the formulas, written out from probabilities."""

import math

import pytest
import torch
from sdft_kernels.reference import divergence_reference, linear_divergence_reference


def logits(rows: int = 5, vocab: int = 11, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    s = torch.randn(rows, vocab, generator=gen, dtype=torch.float64, requires_grad=True)
    return s, torch.randn(rows, vocab, generator=gen, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_values_and_gradients_are_the_formulas(name: str, beta: float) -> None:
    s, t = logits()
    p, q = s.detach().softmax(-1), t.softmax(-1)
    m = beta * q + (1 - beta) * p
    reverse, forward = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    to_m = (p / m).log()
    value, slope = {
        "reverse_kl": (reverse, p * ((p / q).log() - reverse[:, None])),
        "forward_kl": (forward, p - q),
        "jsd": (
            beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * to_m).sum(-1),
            (1 - beta) * p * (to_m - (p * to_m).sum(-1, keepdim=True)),
        ),
    }[name]
    out = divergence_reference(s, t, divergence=name, beta=beta, reduction="none")
    torch.testing.assert_close(out, value)
    (grad,) = torch.autograd.grad(out.sum(), s)
    torch.testing.assert_close(grad, slope)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_gradcheck(name: str) -> None:
    gen = torch.Generator().manual_seed(1)
    x, tx, w, tw = (torch.randn(n, 3, generator=gen, dtype=torch.float64) for n in (4, 4, 6, 6))
    bias = torch.randn(6, generator=gen, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.0, 0.3, 2.0], dtype=torch.float64)

    def f(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        options = {"divergence": name, "softcap": 2.0, "temperature": 0.8, "scale": 0.7, "token_weights": weights}
        return linear_divergence_reference(x, w, tx, tw, bias=bias, **options)

    assert torch.autograd.gradcheck(f, [v.requires_grad_() for v in (x, w, bias)])


def test_forbidden_tokens() -> None:
    s, t = logits()
    s = s.detach().clone()
    s[:, 2] = t[:, 2] = -math.inf
    rest = [c for c in range(11) if c != 2]
    for name in ("reverse_kl", "forward_kl", "jsd"):
        leaf = s.clone().requires_grad_()
        out = divergence_reference(leaf, t, divergence=name, reduction="none")
        torch.testing.assert_close(out, divergence_reference(s[:, rest], t[:, rest], divergence=name, reduction="none"))
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        assert torch.isfinite(grad).all()
        assert (grad[:, 2] == 0).all()
