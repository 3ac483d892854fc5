"""Merged statistics of parts of the vocabulary, and gradients of the parts, equal those of the whole vocabulary."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from sdft_kernels import linear_divergence
from sdft_kernels.checks import DIVERGENCES, Options, make_options
from sdft_kernels.reference import linear_divergence_reference
from sdft_kernels.rows import (
    RowStats,
    activate_,
    deactivate_,
    gradient_,
    math_planes,
    merge,
    merge_mixtures,
    mixture_,
    row_stats,
    statistics_,
)
from torch import Tensor

N, V, H = 6, 61, 5
CUTS = {"halves": [0, 31, V], "uneven": [0, 1, 8, 38, 41, V], "one": [0, V]}
LOGITS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "capped": {"temperature": 0.7, "softcap": 3.0, "scale": 1.3},
}


def make() -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(n, H, generator=gen, dtype=torch.float64) for n in (N, V, N, V)]


def in_parts(
    x: Tensor, w: Tensor, tx: Tensor, tw: Tensor, bias: Tensor, tbias: Tensor, labels: Tensor, options: Options,
    cuts: list[int], regroup: bool,
) -> tuple[RowStats, Tensor]:  # fmt: skip
    """Outputs, and dD/dlogits (N, V), as ranks that hold the rows of the heads between the cuts would make them."""
    ends = list(pairwise(cuts))
    raw = [x @ w[lo:hi].T for lo, hi in ends]
    s = [activate_(z, bias[lo:hi], options.student) for z, (lo, hi) in zip(raw, ends, strict=True)]
    kept = [z.clone() for z in s]
    t = [activate_(tx @ tw[lo:hi].T, tbias[lo:hi], options.teacher) for lo, hi in ends]
    scratch = [torch.empty(math_planes(options), *z.shape, dtype=z.dtype) for z in s]
    own = [statistics_(a, b, c, options, labels, lo) for a, b, c, (lo, _) in zip(s, t, scratch, ends, strict=True)]
    kind = options.kind
    groups = [merge(own[:1] + own[2:], kind), own[1]] if regroup and len(own) > 2 else own  # merging is associative
    whole = merge(groups, kind)
    mixture = None
    if kind == "jsd":
        parts = zip(s, t, scratch, own, strict=True)
        mixture = merge_mixtures([mixture_(a, b, c, options.beta, part, whole) for a, b, c, part in parts])
    for a, b, c, part, z in zip(s, t, scratch, own, kept, strict=True):
        gradient_(a, b, c, kind, whole, mixture, part)
        if options.student.softcap is not None:
            deactivate_(a, z, options.student)
    return row_stats(options, whole, mixture), torch.cat(s, 1) * options.grad_factor


@pytest.mark.parametrize("cuts", list(CUTS))
@pytest.mark.parametrize("logits", list(LOGITS))
@pytest.mark.parametrize("name", DIVERGENCES)
def test_parts_make_the_whole(name: str, logits: str, cuts: str) -> None:
    x, w, tx, tw = make()
    bias, tbias = torch.linspace(-1, 1, V).double(), torch.linspace(1, -1, V).double()
    if cuts == "uneven" and logits == "plain":  # tokens, and a whole part, that both sides forbid
        bias[38:41] = tbias[38:41] = bias[5] = tbias[5] = -math.inf
    labels = torch.tensor([0, 7, 8, 37, 60, 30])
    weights = torch.linspace(0.5, 2, N, dtype=torch.float64)
    common: dict[str, Any] = {"divergence": name, "beta": 0.3, "reduction": "sum"} | LOGITS[logits]
    options = make_options(vocab=V, return_tokens=True, chunk_bytes=None, **common)
    stats, grad = in_parts(x, w, tx, tw, bias, tbias, labels, options, CUTS[cuts], regroup=True)
    leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
    call = {"bias": leaves[2], "teacher_bias": tbias, "labels": labels, "return_tokens": True, **common}
    for function in (linear_divergence, linear_divergence_reference):
        loss, tokens = function(leaves[0], leaves[1], tx, tw, token_weights=weights, **call)
        wanted = torch.autograd.grad(loss, leaves)
        g = grad * weights[:, None]
        for got, want in zip((g @ w, g.T @ x, g.sum(0)), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * want.abs().max().item())
        for got, want in zip(stats, tokens, strict=True):
            assert got is not None
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_an_infinite_divergence_stays_infinite_and_its_gradient_is_zero(name: str) -> None:
    """One side forbids a whole part that the other allows."""
    x, w, tx, tw = make()
    bias, tbias, free = torch.zeros(V).double(), torch.zeros(V).double(), torch.zeros(V).double()
    (tbias if name == "reverse_kl" else bias)[8:38] = -math.inf
    options = make_options(divergence=name, beta=0.5, temperature=1.0, reduction="sum", vocab=V, return_tokens=True,
                           chunk_bytes=None)  # fmt: skip
    labels = torch.zeros(N, dtype=torch.int64)
    stats, grad = in_parts(x, w, tx, tw, bias, tbias, labels, options, CUTS["uneven"], regroup=False)
    assert stats.divergence.tolist() == [math.inf] * N
    assert not grad.any()
    # And where the side that is sure forbids it, the divergence is finite.
    swapped = (free, bias) if name == "forward_kl" else (tbias, free)
    stats, grad = in_parts(x, w, tx, tw, *swapped, labels, options, CUTS["uneven"], regroup=False)
    _, tokens = linear_divergence_reference(
        x, w, tx, tw, bias=swapped[0], teacher_bias=swapped[1], divergence=name, labels=labels, return_tokens=True
    )
    torch.testing.assert_close(stats.divergence, tokens.divergence, rtol=1e-12, atol=0)
    assert grad.isfinite().all()


def test_statistics_of_a_whole_vocabulary_are_not_merged() -> None:
    s, t = torch.randn(2, 5), torch.randn(2, 5)
    options = make_options(divergence="jsd", beta=0.5, temperature=1.0, reduction="sum", vocab=5, return_tokens=False,
                           chunk_bytes=None)  # fmt: skip
    whole = statistics_(s, t, torch.empty(2, 2, 5), options, None)
    with pytest.raises(AssertionError, match="give statistics_ a start"):
        merge([whole, whole], "jsd")
