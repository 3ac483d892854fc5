"""The loss of ready logits: the same as the dense reference, in place or not."""

import math
from typing import Any

import pytest
import torch
from sdft_kernels import Divergence, divergence
from sdft_kernels.reference import divergence_reference
from torch import Tensor

NAMES = ("reverse_kl", "forward_kl", "jsd")
EPS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3}


def pair(rows: int, vocab: int, t_vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(rows + vocab)
    return (torch.randn(rows, v, generator=gen, dtype=torch.float64).to(dtype) for v in (vocab, t_vocab))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 5, 5), (1, 1, 1), (53, 107, 99), (7, 4001, 4001)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_the_reference(
    shape: tuple[int, int, int], name: str, dtype: torch.dtype, weighted: bool, reduction: str
) -> None:
    s, t = pair(*shape, dtype)
    weights = torch.arange(float(shape[0])) % 3 if weighted else None
    options: dict[str, Any] = {"divergence": name, "beta": 0.3, "temperature": 1.7, "token_weights": weights}
    labels = torch.arange(shape[0]) % min(shape[1:])
    truth_leaf, leaf = s.double().clone().requires_grad_(), s.clone().requires_grad_()
    common = {"reduction": reduction, "labels": labels, "return_tokens": True, **options}
    truth, truth_tokens = divergence_reference(truth_leaf, t.double(), **common)
    ours, tokens = divergence(leaf, t, **common)
    (2.5 * truth).sum().backward()
    (2.5 * ours).sum().backward()
    bound = {"rtol": EPS[dtype], "atol": EPS[dtype] * 1e-1, "check_dtype": False}
    torch.testing.assert_close(ours, truth, **bound)
    torch.testing.assert_close(leaf.grad, truth_leaf.grad, **bound)
    for a, b in zip(tokens, truth_tokens, strict=True):
        torch.testing.assert_close(a, b, **(bound | {"atol": max(EPS[dtype], 2e-6)}))


def test_in_place_overwrites_and_agrees() -> None:
    s, t = pair(20, 50, 45, torch.float32)
    weights = torch.arange(20.0) % 3
    for given in (None, weights):
        leaf = s.clone().requires_grad_()
        divergence(leaf, t, token_weights=given).backward()
        raw = s.clone().requires_grad_()
        middle = raw * 1.0
        loss = divergence(middle, t, token_weights=given, inplace=True)
        assert not torch.equal(middle, s)
        (grad,) = torch.autograd.grad(loss, raw, retain_graph=True)
        torch.testing.assert_close(grad, leaf.grad)
        with pytest.raises(RuntimeError, match="backward runs once"):
            torch.autograd.grad(loss, raw)
    kept = s.clone()
    divergence(kept, t, inplace=True)
    assert torch.equal(kept, s), "no gradient wanted, nothing to write"


@pytest.mark.parametrize("name", NAMES)
def test_forbidden_tokens_and_gradcheck(name: str) -> None:
    s, t = pair(6, 9, 9, torch.float64)
    module = Divergence(divergence=name, beta=0.4)
    # The first backward scales what the forward made, later ones recompute: a rounding apart.
    assert torch.autograd.gradcheck(module, (s.clone().requires_grad_(), t), nondet_tol=1e-12)
    s[:, 2] = t[:, 2] = -math.inf
    leaf, truth_leaf = s.clone().requires_grad_(), s.clone().requires_grad_()
    ours, truth = divergence(leaf, t, divergence=name), divergence_reference(truth_leaf, t, divergence=name)
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(*torch.autograd.grad(ours + truth, (leaf, truth_leaf)))
    t[0, 4] = -math.inf
    leaf = s.clone().requires_grad_()
    value = divergence(leaf, t, divergence=name, reduction="none")
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    assert torch.isfinite(grad).all()
    assert value[0].isinf() == (name == "reverse_kl")
    assert torch.isfinite(value[1:]).all()


def test_errors_name_the_field() -> None:
    s, t = pair(4, 6, 6, torch.float32)
    for bad, message in (
        ((s, t[:3], {}), "teacher_logits has 3 rows but student_logits has 4"),
        ((s, t.clone().requires_grad_(), {}), "teacher_logits requires grad"),
        ((s[None], t, {}), "student_logits has shape"),
        ((s, t, {"inplace": True, "reduction": "none"}), "inplace=True cannot serve reduction='none'"),
        ((s, t, {"vocab_size": 7}), "vocab_size=7 must be in 1..6"),
    ):
        with pytest.raises(ValueError, match=message):
            divergence(bad[0], bad[1], **bad[2])
    with pytest.raises(ValueError, match="impl='triton_no_logits' is unknown"):
        divergence(s, t, impl="triton_no_logits")
    with pytest.raises(ValueError, match="impl='triton' has no float64"):
        divergence(s.double(), t.double(), impl="triton")
    leaf = s.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="divergence has no double backward"):
        torch.autograd.grad(divergence(leaf, t), leaf, create_graph=True)
