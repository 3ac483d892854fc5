"""impl="triton" under Triton's interpreter: values and gradients against the dense reference in float64.

Tiles are cut to 64 entries, so that a few hundred tokens make several whole tiles and a ragged one. Every
buffer of the loss starts as NaN, so an entry that was not written, or was read by mistake, shows.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdft_kernels import divergence, linear_divergence, row_kernels, tuning
from sdft_kernels.reference import divergence_reference, linear_divergence_reference
from torch import Tensor

ROOT = Path(__file__).parents[2]
NAMES = ("reverse_kl", "forward_kl", "jsd")
FLOOR = 3e-7  # fp32 errors below this do not count
Case = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, of inf − inf in masked entries


def nan_filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fill(*args: Any, **kwargs: Any) -> Tensor:
        out = make(*args, **kwargs)
        return out.fill_(math.nan) if out.is_floating_point() else out

    return fill


@pytest.fixture(autouse=True, scope="module")
def nan_in_new_memory() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, nan_filled(getattr(owner, name)))
        assert torch.empty_like(torch.empty(2)).new_empty(1).isnan().all()
        yield


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        set_tile(patch, 64)
        yield


def set_tile(patch: pytest.MonkeyPatch, block: int) -> None:
    blocks = {k: row._replace(block=block) for k, row in tuning.ROW_BLOCKS.items()}
    patch.setattr(tuning, "ROW_BLOCKS", blocks | {2: blocks[32]})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def make(rows: int, vocab: int, hidden: int, dtype: torch.dtype = torch.float32, *, noise: float = 0.3) -> Case:
    """Hidden states and heads whose logits have unit scale; the teacher is the student plus noise."""
    x, w = normal(rows, hidden), normal(vocab, hidden, seed=1) / hidden**0.5
    tx, tw = x + noise * normal(rows, hidden, seed=2), w + noise * normal(vocab, hidden, seed=3) / hidden**0.5
    return {k: v.to(dtype) for k, v in {"x": x, "w": w, "teacher_x": tx, "teacher_w": tw}.items()}


def evaluate(f: Any, case: Case, upstream: Any = 1.0, dtype: torch.dtype | None = None, **options: Any) -> Case:
    """Loss, per-token outputs and the gradients of x, w and bias (of the student's logits), all float64."""
    tensors = {k: v.detach().to(dtype or v.dtype) for k, v in case.items()}
    if tensors["w"].data_ptr() != case["w"].data_ptr() and case["w"] is case["teacher_w"]:
        tensors["teacher_w"] = tensors["w"]
    leaves = {k: tensors[k].detach().requires_grad_() for k in ("x", "w", "bias") if k in tensors}
    tensors |= leaves
    four = [tensors.pop(k) for k in ("x", "w", "teacher_x", "teacher_w")]
    four[3] = four[3].detach()
    loss, tokens = f(*four, **tensors, return_tokens=True, **options)
    grads = torch.autograd.grad((loss * upstream).sum(), list(leaves.values()))
    return collect(loss, tokens, dict(zip(leaves, grads, strict=True)))


def evaluate_logits(f: Any, s: Tensor, t: Tensor, upstream: Any = 1.0, **options: Any) -> Case:
    leaf = s.detach().requires_grad_()
    loss, tokens = f(leaf, t, return_tokens=True, **options)
    (grad,) = torch.autograd.grad((loss * upstream).sum(), leaf)
    return collect(loss, tokens, {"logits": grad})


def collect(loss: Tensor, tokens: Any, grads: Case) -> Case:
    out = {"loss": loss.detach(), **{"d" + k: g for k, g in grads.items()}}
    out |= {k: v for k, v in tokens._asdict().items() if v is not None}
    return {k: v.double() for k, v in out.items()}


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item() if b.numel() else 0.0


def compare(ours: Case, truth: Case, dense: Case | None = None, bound: float = 0.0) -> None:
    """Within `bound` of the truth, or within twice the error of the dense computation."""
    assert ours.keys() == truth.keys()
    for key, value in truth.items():
        if key == "top1_agree":
            assert torch.equal(ours[key], value), key
            continue
        assert torch.isfinite(ours[key]).all(), key
        assert ours[key].shape == value.shape, key
        limit = bound if dense is None else max(bound, 2 * error(dense[key], value))
        assert (ours[key] - value).norm() <= (limit + FLOOR) * value.norm() + 1e-12, (key, error(ours[key], value))


WEIGHTS = torch.tensor([1.0, 0.0, 0.25, 2.0, 0.0])
# (rows, vocabulary, hidden), what the case holds besides, options
LINEAR: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "one": ((1, 1, 1), {}),
    "one token of vocabulary": ((3, 1, 5), {"labels": torch.zeros(3).long()}),
    "less than a tile": ((3, 37, 5), {"labels": torch.tensor([0, 36, 5])}),
    "one whole tile": ((2, 64, 8), {"reduction": "sum"}),
    "two whole tiles": ((2, 128, 8), {"labels": torch.tensor([0, 127])}),
    "tiles and a tail": ((3, 130, 16), {"labels": torch.tensor([129, 0, 64]), "upstream": -3.5}),
    "bias": ((3, 150, 7), {"bias": normal(150).float(), "labels": torch.tensor([149, 3, 70])}),
    "both biases": ((2, 150, 7), {"bias": normal(150).float(), "teacher_bias": normal(150, seed=9).float()}),
    "softcap": (
        (2, 150, 7),
        {"softcap": 1.5, "teacher_softcap": 3.0, "bias": normal(150).float(), "labels": torch.tensor([149, 3])},
    ),
    "student softcap": ((2, 130, 7), {"softcap": 1.0, "teacher_softcap": None}),
    "teacher softcap": ((2, 130, 7), {"teacher_softcap": 1.0, "scale": 2.0}),
    "scales": ((2, 150, 7), {"temperature": 0.6, "scale": 0.25, "teacher_scale": 1.5}),
    "weights": ((5, 150, 7), {"token_weights": WEIGHTS, "labels": torch.arange(5) * 30}),
    "weights, all rows": ((5, 150, 7), {"token_weights": WEIGHTS, "labels": torch.arange(5), "compact": False}),
    "sum of weights": ((5, 70, 7), {"token_weights": WEIGHTS, "reduction": "sum"}),
    "none": ((5, 70, 7), {"reduction": "none", "upstream": torch.linspace(-1, 2, 5)}),
    "none, weights": ((5, 70, 7), {"reduction": "none", "token_weights": WEIGHTS, "upstream": torch.arange(5)}),
    "none, all rows": (
        (5, 70, 7),
        {"reduction": "none", "token_weights": WEIGHTS, "upstream": torch.arange(5), "compact": False},
    ),
    "vocab_size": ((2, 150, 7), {"vocab_size": 129, "bias": normal(150).float()}),
    "chunks": ((5, 70, 7), {"chunk_bytes": 2 * (8 * 128 + 16 * 7)}),
    "chunks, weights": ((5, 70, 7), {"chunk_bytes": 1, "token_weights": WEIGHTS}),
}
TENSORS = ("bias", "teacher_bias", "token_weights", "labels")


def split(case: Case, options: dict[str, Any]) -> tuple[Case, dict[str, Any]]:
    """The case with its biases, and the options; token weights and labels stay options."""
    biases = {k: v for k, v in options.items() if k in ("bias", "teacher_bias")}
    return case | biases, {k: v for k, v in options.items() if k not in biases}


def run_three(case: Case, name: str, options: dict[str, Any]) -> tuple[Case, Case, Case]:
    """(Triton's, float64's, the dense computation's) results."""
    case, options = split(case, {"divergence": name, "beta": 0.3, **options})
    ours = evaluate(linear_divergence, case, impl="triton", **options)
    options = {k: v for k, v in options.items() if k not in ("compact", "chunk_bytes")}
    truth = evaluate(linear_divergence_reference, case, dtype=torch.float64, **options)
    return ours, truth, evaluate(linear_divergence_reference, case, dtype=torch.float32, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", list(LINEAR))
def test_fp32_is_within_twice_the_dense_error(which: str, name: str) -> None:
    shape, options = LINEAR[which]
    ours, truth, dense = run_three(make(*shape), name, options)
    # A vocabulary of one token has no loss: nothing but the absolute part of the bar holds there.
    compare(ours, truth, dense, bound=1e-6)


MIXED: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {
        "bias": normal(150).float(), "softcap": 2.0, "scale": 0.7, "temperature": 0.8, "token_weights": WEIGHTS,
        "labels": torch.arange(5), "chunk_bytes": 1,
    },
    "all rows": {"token_weights": WEIGHTS * 300, "compact": False, "reduction": "sum", "upstream": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", list(MIXED))
def test_narrow_inputs(which: str, name: str, dtype: torch.dtype) -> None:
    case = make(5, 150, 32, dtype)
    ours, truth, _ = run_three(case, name, MIXED[which])
    compare(ours, truth, bound=4e-3 if dtype == torch.bfloat16 else 1e-3)


def test_fp16_gradients_neither_vanish_nor_overflow() -> None:
    """1/N, a huge sum of weights, a small temperature, a single huge weight: none is left to fp16's range."""
    case = make(4, 150, 32, torch.float16)
    for options in (
        {"token_weights": torch.tensor([1e-6, 2e-6, 0.0, 1e-6]), "reduction": "sum"},
        {"token_weights": torch.tensor([1e4, 1.0, 1.0, 1.0]), "reduction": "sum"},
        {"temperature": 0.05},
        {"scale": 200.0, "temperature": 100.0, "teacher_softcap": 5.0},
    ):
        tensors = [v.clone() for v in case.values()]
        exact = [v.double() for v in case.values()]
        for pair in (tensors, exact):
            pair[0].requires_grad_()
        # The operator's own gradient is fp32; a loss scaler brings it into fp16's range before it is cast.
        size = 1.0
        for factor in (1.0, 2.0**14):
            (want,) = torch.autograd.grad(linear_divergence_reference(*exact, **options), exact[0])
            size = factor if want.abs().max() * factor < 6e4 else size
        loss = linear_divergence(*tensors, impl="triton", **options)
        (got,) = torch.autograd.grad(loss * size, tensors[0])
        assert error(got.double() / size, want) < 2e-3, options


@pytest.mark.parametrize("kl", [0.04, 0.02, 0.003])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_exact_where_the_teacher_is_near(name: str, kl: float, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tile(monkeypatch, 4096)
    case = make(16, 2048, 256, torch.bfloat16, noise=(2 * kl) ** 0.5)
    case["teacher_w"] = case["w"]
    ours, truth, _ = run_three(case, name, {})
    assert error(ours["dx"], truth["dx"]) < 5e-3
    assert error(ours["dw"], truth["dw"]) < 5e-3
    assert error(ours["divergence"], truth["divergence"]) < 1e-2
    # The bar can be missed: the same from logits that were rounded to bf16.
    s, t = (case[h].double() @ case["w"].double().T for h in ("x", "teacher_x"))
    rounded = evaluate_logits(divergence_reference, s.bfloat16().double(), t.bfloat16().double(), divergence=name)
    assert error(rounded["dlogits"] @ case["w"].double(), truth["dx"]) > 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fp32_on_a_long_vocabulary_with_models_far_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tile(monkeypatch, 2048)
    torch.manual_seed(5)
    shapes = {"x": (5, 17), "w": (262147, 17), "teacher_x": (5, 17), "teacher_w": (262147, 17)}
    ours, truth, dense = run_three({k: torch.randn(shape) for k, shape in shapes.items()}, name, {"temperature": 0.7})
    compare(ours, truth, dense, bound=1e-6)


@pytest.mark.parametrize("tile", [4096, 2048, 256, 128, 32])
def test_results_do_not_depend_on_tiles_or_chunks(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tile(monkeypatch, tile)
    case = make(4, 300, 16)
    for name in NAMES:
        options = {"labels": torch.arange(4) * 99, "divergence": name, "beta": 0.3}
        truth = evaluate(linear_divergence_reference, case, dtype=torch.float64, **options)
        compare(evaluate(linear_divergence, case, impl="triton", **options), truth, bound=2e-6)
    for chunk_bytes in (1, 2 * (8 * 320 + 16 * 16), 3 * (8 * 320 + 16 * 16)):
        options = {"labels": torch.arange(4) * 99, "chunk_bytes": chunk_bytes}
        truth = evaluate(linear_divergence_reference, case, dtype=torch.float64, labels=options["labels"])
        compare(evaluate(linear_divergence, case, impl="triton", **options), truth, bound=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shipped_tile_on_a_long_vocabulary(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    set_tile(monkeypatch, 4096)
    ours, truth, dense = run_three(make(2, 9001, 16, dtype), "jsd", {"labels": torch.tensor([9000, 17])})
    compare(ours, truth, dense, bound=1e-6 if dtype == torch.float32 else 4e-3)


def test_frozen_parts_shared_heads_and_other_widths() -> None:
    case = make(4, 150, 16)
    whole = evaluate(linear_divergence_reference, case, dtype=torch.float64)
    for trained in (("x",), ("w",), ("x", "w")):
        tensors = {k: v.detach().requires_grad_(k in trained) for k, v in case.items()}
        loss = linear_divergence(*tensors.values(), impl="triton")
        for k, g in zip(trained, torch.autograd.grad(loss, [tensors[k] for k in trained]), strict=True):
            assert error(g.double(), whole["d" + k]) < 2e-6
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3)):
        shared = make(4, 150, 16, dtype)
        shared["teacher_w"] = shared["w"]
        for options in ({}, {"token_weights": WEIGHTS[:4]}, {"vocab_size": 70, "chunk_bytes": 1}):
            ours, truth, _ = run_three(shared, "jsd", options)
            compare(ours, truth, bound=bound)
    for t_vocab, t_hidden in ((170, 16), (90, 9), (150, 33)):
        other = case | {"teacher_x": normal(4, t_hidden).float(), "teacher_w": normal(t_vocab, t_hidden).float()}
        ours, truth, dense = run_three(other, "reverse_kl", {"labels": torch.arange(4)})
        compare(ours, truth, dense, bound=1e-6)
        assert (ours["dw"][t_vocab:] == 0).all()
    mixed = case | {"w": case["w"].bfloat16(), "teacher_x": case["teacher_x"].half()}
    ours, truth, _ = run_three(mixed, "reverse_kl", {})
    compare(ours, truth, bound=4e-3)


def test_a_head_cast_tile_by_tile() -> None:
    """A bf16 head under an fp32 budget of a few rows: several vocabulary tiles in every product."""
    case = make(3, 150, 16)
    case |= {"w": case["w"].bfloat16(), "teacher_w": case["teacher_w"].bfloat16()}
    ours, truth, _ = run_three(case, "reverse_kl", {"chunk_bytes": 8 * 16 * 4 * 20})
    compare(ours, truth, bound=4e-3)
    assert error(ours["dx"], truth["dx"]) < 2e-6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("compact", [True, False])
def test_nothing_to_learn_from(reduction: str, compact: bool) -> None:
    for rows in (0, 3):
        case = make(rows, 70, 3) | {"bias": torch.zeros(70)}
        weights = {"token_weights": torch.zeros(rows)}
        out = evaluate(linear_divergence, case, impl="triton", reduction=reduction, compact=compact, **weights)
        assert out["loss"].shape == ((rows,) if reduction == "none" else ())
        assert all((v == 0).all() for v in out.values())
        if rows == 0:
            out = evaluate(linear_divergence, case, impl="triton", reduction=reduction)
            assert all((v == 0).all() for v in out.values())


@pytest.mark.parametrize("compact", [True, False])
def test_rows_of_weight_zero_may_hold_anything(compact: bool) -> None:
    case = make(5, 70, 7)
    good = evaluate(linear_divergence, case, impl="triton", token_weights=WEIGHTS)
    case["x"][1], case["teacher_x"][4], case["x"][4] = math.nan, math.nan, math.inf
    bad = evaluate(linear_divergence, case, impl="triton", token_weights=WEIGHTS, compact=compact)
    compare(bad, good, bound=1e-6)


def jsd_gradient(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """Of the mean, from log m without m: where both sides underflow, autograd through m gives NaN."""
    log_p, log_q = s.double().log_softmax(1), t.double().log_softmax(1)
    log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
    f, p = log_p - log_m, log_p.exp()
    return (1 - beta) * p * (f - (p * f).sum(1, keepdim=True)) / len(s)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_and_offsets(name: str) -> None:
    s = normal(4, 150).float() * 2
    t = s + 0.3 * normal(4, 150, seed=5).float()
    for a, b in (
        (s * 2500, t * 2500),  # ±1e4
        (s * 2500, t),
        (s, t * 2500),
        (s, t + 1000.0),
        (s + 1e4, t - 1e4),
        (s * 4 + torch.arange(150) / 4, t * 4),  # the maximum moves from tile to tile
    ):
        ours = evaluate_logits(divergence, a, b, divergence=name, beta=0.3, impl="triton")
        truth = evaluate_logits(divergence_reference, a.double(), b.double(), divergence=name, beta=0.3)
        dense = evaluate_logits(divergence_reference, a, b, divergence=name, beta=0.3)
        if name == "jsd":
            truth["dlogits"] = dense["dlogits"] = jsd_gradient(a, b, 0.3)
        compare(ours, truth, dense, bound=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_near_teachers_and_peaked_students(name: str) -> None:
    s = normal(8, 300).float()
    for a, noise in ((s * 3, 0.01), (s * 8, 0.3), (s * 7, 1.0)):
        b = a + noise * normal(8, 300, seed=6).float()
        ours = evaluate_logits(divergence, a, b, divergence=name, beta=0.3, impl="triton")
        truth = evaluate_logits(divergence_reference, a.double(), b.double(), divergence=name, beta=0.3)
        dense = evaluate_logits(divergence_reference, a, b, divergence=name, beta=0.3)
        compare(ours, truth, dense)


@pytest.mark.parametrize("name", NAMES)
def test_identical_models_have_no_loss(name: str) -> None:
    case = make(4, 150, 8)
    case |= {"teacher_x": case["x"], "teacher_w": case["w"]}
    out = evaluate(linear_divergence, case, divergence=name, beta=0.3, impl="triton")
    assert out["loss"].abs() < 1e-7
    assert out["dx"].abs().max() < 1e-7
    assert out["dw"].abs().max() < 1e-7
    assert out["top1_agree"].all()


@pytest.mark.parametrize("name", NAMES)
def test_forbidden_tokens(name: str) -> None:
    case = make(3, 150, 5)
    options: dict[str, Any] = {"divergence": name, "beta": 0.3}
    few = torch.zeros(150)
    few[[3, 70, 149]] = -math.inf
    first_tile, last_tile = torch.zeros(150), torch.zeros(150)
    first_tile[:64], last_tile[128:] = -math.inf, -math.inf
    for forbid in (few, first_tile, last_tile):
        both = case | {"bias": forbid, "teacher_bias": forbid}
        ours, truth = (
            evaluate(f, both, dtype=d, **options, **more)
            for f, d, more in (
                (linear_divergence, None, {"impl": "triton"}),
                (linear_divergence_reference, torch.float64, {}),
            )
        )
        compare(ours, truth, bound=2e-6)
        # One side alone: infinite where the averaging distribution still allows the token, finite otherwise.
        for side, other, infinite in (("teacher_bias", "bias", "reverse_kl"), ("bias", "teacher_bias", "forward_kl")):
            one = case | {side: forbid, other: torch.zeros(150)}
            out = evaluate(linear_divergence, one, impl="triton", **options)
            want = evaluate(linear_divergence_reference, one, dtype=torch.float64, **options)
            if name == infinite:
                assert out["loss"] == math.inf
                assert all((out[k] == 0).all() for k in ("dx", "dw", "dbias"))
                out, want = ({k: v for k, v in o.items() if k.endswith(("entropy", "agree"))} for o in (out, want))
            compare(out, want, bound=2e-6)


def test_one_infinite_row_leaves_the_others_alone() -> None:
    s, t = normal(3, 150).float(), normal(3, 150, seed=4).float()
    fine = evaluate_logits(divergence, s, t, impl="triton", reduction="none")
    t[1, 130] = -math.inf
    out = evaluate_logits(divergence, s, t, impl="triton", reduction="none")
    assert out["loss"][1] == math.inf
    assert (out["dlogits"][1] == 0).all()
    assert torch.equal(out["dlogits"][[0, 2]], fine["dlogits"][[0, 2]])


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_a_forbidden_token_without_probability_costs_nothing(name: str) -> None:
    """Its infinite term is in the sum until the maximum of a later tile makes its weight 0."""
    s, t = normal(2, 150).float(), normal(2, 150, seed=4).float()
    likely, other = (s, t) if name == "reverse_kl" else (t, s)
    other[:, 5] = -math.inf
    likely[:, 100] += 1000
    ours = evaluate_logits(divergence, s, t, divergence=name, impl="triton")
    truth = evaluate_logits(divergence_reference, s.double(), t.double(), divergence=name)
    # p is 1 for one token: its gradient is a difference of two equal log-ratios, of which a float keeps seven digits.
    assert (ours.pop("dlogits") - truth.pop("dlogits")).abs().max() < 1e-6
    compare(ours, truth, bound=1e-6)


def test_autocast_rounds_the_operands_alone() -> None:
    case = make(4, 150, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = evaluate(linear_divergence, case, impl="triton")
    rounded = {k: v.bfloat16() for k, v in case.items()}
    compare(ours, evaluate(linear_divergence_reference, rounded, dtype=torch.float64), bound=4e-3)
    x, w = case["x"].clone().requires_grad_(), case["w"].clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_divergence(x, w, case["teacher_x"], case["teacher_w"], impl="triton")
    loss.backward()
    assert x.grad.dtype == w.grad.dtype == loss.dtype == torch.float32
    assert error(w.grad.double(), ours["dw"]) == 0


def test_labels_outside_the_vocabulary_read_as_nan() -> None:
    s, t = normal(3, 70).float(), normal(3, 70, seed=1).float()
    labels = torch.tensor([-1, 69, 70])
    _, tokens = divergence(s, t, labels=labels, return_tokens=True, impl="triton")
    for side, logits in ((tokens.student_logprob, s), (tokens.teacher_logprob, t)):
        assert side.isnan().tolist() == [True, False, True]
        torch.testing.assert_close(side[1], logits.log_softmax(-1)[1, 69])


def layouts(logits: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The same logits in other layouts, each with the memory around them."""
    n, v = logits.shape
    around = {
        "row stride": torch.full((n, v + 13), 7.0, dtype=logits.dtype),
        "window": torch.full((n + 2, v + 9), 7.0, dtype=logits.dtype),
        "transposed": torch.full((v, n), 7.0, dtype=logits.dtype),
        "columns apart": torch.full((n, 2 * v), 7.0, dtype=logits.dtype),
    }
    views = {
        "row stride": around["row stride"][:, :v],
        "window": around["window"][1:-1, 3 : v + 3],
        "transposed": around["transposed"].t(),
        "columns apart": around["columns apart"][:, ::2],
    }
    for view in views.values():
        view.copy_(logits)
    return {k: (views[k], around[k]) for k in views}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_ready_logits_in_every_layout(inplace: bool, dtype: torch.dtype) -> None:
    s, t = normal(4, 150).to(dtype), normal(4, 141, seed=1).to(dtype)
    options = {"token_weights": WEIGHTS[:4], "labels": torch.arange(4) * 40, "temperature": 1.3, "vocab_size": 140}
    truth = evaluate_logits(divergence_reference, s.double(), t.double(), **options)
    bound = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    teachers = layouts(t)
    for compact, (which, (view, around)) in zip((True, False, True, False), layouts(s).items(), strict=True):
        before = around.clone()
        teacher = teachers[which][0]
        raw = view.detach().requires_grad_()
        more = {"impl": "triton", "compact": compact, "inplace": inplace, "return_tokens": True}
        loss, tokens = divergence(raw, teacher, **more, **options)
        (grad,) = torch.autograd.grad(loss, raw)
        compare(collect(loss, tokens, {"logits": grad}), truth, bound=bound)
        assert (grad[:, 140:] == 0).all(), which
        assert torch.equal(teacher, t), which
        assert inplace == (grad.data_ptr() == view.data_ptr()), which
        if inplace:  # nothing around the logits has changed
            view.copy_(s)
        assert torch.equal(around, before), which


@pytest.mark.parametrize("name", NAMES)
def test_ready_logits_options(name: str) -> None:
    s, t = normal(5, 130).float(), normal(5, 130, seed=1).float()
    for options in (
        {},
        {"reduction": "none", "upstream": torch.arange(5.0), "token_weights": WEIGHTS, "compact": False},
        {"reduction": "none", "upstream": torch.arange(5.0), "token_weights": WEIGHTS},
        {"reduction": "sum", "temperature": 0.7, "labels": torch.arange(5), "upstream": 4.0},
    ):
        dense_options = {k: v for k, v in options.items() if k != "compact"}
        ours = evaluate_logits(divergence, s, t, divergence=name, beta=0.3, impl="triton", **options)
        truth = evaluate_logits(
            divergence_reference, s.double(), t.double(), divergence=name, beta=0.3, **dense_options
        )
        dense = evaluate_logits(divergence_reference, s, t, divergence=name, beta=0.3, **dense_options)
        compare(ours, truth, dense, bound=1e-6)
    empty = evaluate_logits(divergence, s[:0], t[:0], divergence=name, impl="triton")
    assert all((v == 0).all() for v in empty.values())


@pytest.fixture
def on_chip(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rows of 32 entries and more on chip, as if there were clusters of two blocks that hold tiles of 32."""
    launches, kernel = [], row_kernels.on_chip_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> Any:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(row_kernels, "on_chip_kernel", Counted())
    monkeypatch.setattr(tuning, "INTERPRETER", tuning.Limits(warp_size=2, cluster=2))
    monkeypatch.setattr(tuning, "SMALLEST_ON_CHIP", 32)
    for ways in ("KL_ON_CHIP", "JSD_ON_CHIP"):
        monkeypatch.setattr(tuning, ways, (tuning.OnChip(4, 1, 99), tuning.OnChip(2, 1, 20)))
    tuning.limits_of.cache_clear()
    yield
    tuning.limits_of.cache_clear()
    assert launches


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "which", ["less than a tile", "tiles and a tail", "scales", "weights, all rows", "none", "chunks"]
)
def test_fp32_rows_on_chip(which: str, name: str, on_chip: None) -> None:
    test_fp32_is_within_twice_the_dense_error(which, name)


@pytest.mark.parametrize("name", NAMES)
def test_other_rows_on_chip(name: str, on_chip: None) -> None:
    test_extreme_logits_and_offsets(name)
    test_near_teachers_and_peaked_students(name)
    s, t = normal(3, 150).float(), normal(3, 150, seed=4).float()
    s[:, [3, 70, 149]] = t[:, [3, 70, 149]] = -math.inf
    ours = evaluate_logits(divergence, s, t, divergence=name, beta=0.3, impl="triton", labels=torch.tensor([5, 3, 148]))
    truth = evaluate_logits(divergence_reference, s.double(), t.double(), divergence=name, beta=0.3)
    assert ours.pop("student_logprob")[1] == ours.pop("teacher_logprob")[1] == -math.inf
    compare(ours, truth, bound=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_rows_on_chip_near_the_teacher(name: str, on_chip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = (tuning.OnChip(2, 64, 9),)
    monkeypatch.setattr(tuning, "KL_ON_CHIP", ways)
    monkeypatch.setattr(tuning, "JSD_ON_CHIP", ways)
    case = make(8, 2048, 256, torch.bfloat16, noise=0.006**0.5)
    case["teacher_w"] = case["w"]
    ours, truth, _ = run_three(case, name, {})
    assert error(ours["dx"], truth["dx"]) < 5e-3
    assert error(ours["dw"], truth["dw"]) < 5e-3
    assert error(ours["divergence"], truth["divergence"]) < 1e-2


@pytest.mark.parametrize("inplace", [False, True])
def test_ready_logits_on_chip(inplace: bool, on_chip: None) -> None:
    test_ready_logits_in_every_layout(inplace, torch.float16)


def test_labels_and_infinite_rows_on_chip(on_chip: None) -> None:
    test_labels_outside_the_vocabulary_read_as_nan()
    test_one_infinite_row_leaves_the_others_alone()


@pytest.mark.parametrize(
    ("major", "multiprocessors", "version", "cluster"),
    [(9, 132, "3.9.0", 16), (9, 78, "3.9.0", 8), (10, 148, "3.10.0", 16), (9, 132, "3.7.1", 1), (12, 170, "3.9.0", 1),
     (8, 108, "3.9.0", 1)],
)  # fmt: skip
def test_clusters_are_used_where_they_are(
    major: int, multiprocessors: int, version: str, cluster: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(major=major, multi_processor_count=multiprocessors, warp_size=32)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(tuning.triton, "__version__", version)
    tuning.limits_of.cache_clear()
    assert tuning.limits_of(torch.device("cuda", 0)) == (32, cluster)
    tuning.limits_of.cache_clear()


def test_what_stays_on_chip() -> None:
    hopper, ampere = tuning.Limits(32, 16), tuning.Limits(32, 1)
    for vocab, kind, blocks in (
        (32000, "reverse_kl", 8), (49152, "reverse_kl", 8), (128256, "forward_kl", 16), (151936, "reverse_kl", 16),
        (151936, "jsd", None), (262144, "reverse_kl", None), (8192, "reverse_kl", None),
    ):  # fmt: skip
        tile = tuning.on_chip_tile(hopper, vocab, kind, 8)
        assert (tile and tile.blocks) == blocks, (vocab, kind)
        assert tile is None or tile.block * tile.pieces >= vocab
        assert tuning.on_chip_tile(ampere, vocab, kind, 8) is None


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab=st.integers(1, 200),
    t_extra=st.integers(0, 5),
    size=st.floats(0.1, 10),
    noise=st.floats(0.1, 3),
    temperature=st.floats(0.3, 3),
    name=st.sampled_from(NAMES),
    beta=st.floats(0.05, 0.95),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    weights=st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=4, max_size=4),
    softcap=st.none() | st.floats(0.5, 20),
    bias=st.booleans(),
    chunk_bytes=st.sampled_from([1, 3000, None]),
    compact=st.booleans(),
    impl=st.sampled_from(["triton", "torch"]),
)
def test_both_implementations_agree_with_float64(
    rows: int, vocab: int, t_extra: int, size: float, noise: float, temperature: float, weights: Any, bias: bool,
    compact: bool, impl: str, chunk_bytes: int | None, name: str, **options: Any,
) -> None:  # fmt: skip
    """The same bars for both, TokenStats included: so they agree with each other, too."""
    case = make(rows, vocab, 6, noise=noise)
    case["x"] = case["x"] * size
    case["teacher_w"] = torch.cat([case["teacher_w"], torch.ones(t_extra, 6)])
    if bias:
        case |= {"bias": normal(vocab, seed=8).float(), "teacher_bias": normal(vocab + t_extra, seed=9).float()}
    options |= {"divergence": name, "temperature": temperature, "labels": torch.arange(rows) % vocab}
    options["token_weights"] = None if weights is None else torch.tensor(weights[:rows])
    ours = evaluate(linear_divergence, case, impl=impl, compact=compact, chunk_bytes=chunk_bytes, **options)
    truth = evaluate(linear_divergence_reference, case, dtype=torch.float64, **options)
    dense = evaluate(linear_divergence_reference, case, **options)
    for key, value in truth.items():
        if key == "top1_agree":
            continue
        # Logits of hundreds round by more than the loss they make; each output has its own absolute part.
        limit = max(4 * error(dense[key], value), 1e-5)
        assert (ours[key] - value).norm() <= limit * value.norm() + 1e-5, (key, error(ours[key], value))


@pytest.mark.parametrize("steps", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_has_the_same_losses(steps: int, make_config: Callable[..., Any], tmp_path: Path) -> None:
    from sdft.training.loop import train
    from sdft.training.metrics import read_metrics

    sizes = {"train.steps": steps, "train.batch_size": 2, "rollout.max_new_tokens": 3, "model.device": "cpu"}
    config = make_config(**sizes)
    curves = []
    for impl in ("torch", "triton"):
        one = replace(config, loss=replace(config.loss, impl=impl))
        one = replace(one, train=replace(one.train, output=str(tmp_path / impl)))
        train(one)
        curves.append([line["loss"] for line in read_metrics(tmp_path / impl)])
    assert len(curves[0]) == steps
    assert len(set(curves[0])) > steps // 2
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-3, atol=1e-6)


COMPILE = """
import re, sys
sys.path.insert(0, "bench")
import resources as R
for flags in ({}, {"INDEX": True, "WEIGHTS": True}, {"INDEX": True, "GATHER": True, "LABELS": True, "TOKENS": True}):
    variant = R.row_variant("sm_90", "jsd", "fp32", "bf16", **flags)
    print(R.compiled(variant, R.DEVICES["sm_90"].target).asm["ttir"])
    print("----")
variant = R.row_variant("sm_90", "jsd", "fp32", "bf16", LABELS=True, TOKENS=True)
tile = R.tuning.row_tile(R.DEVICES["sm_90"].limits, 1, False, 8)
variant.constants.update(V=1, BLOCK=tile.block, THREADS=tile.threads, EACH=tile.each)
R.compiled(variant, R.DEVICES["sm_90"].target)
print("one token compiles")
"""


def test_offsets_are_64_bit_and_a_vocabulary_of_one_compiles() -> None:
    """N·V passes 2^31. Tested on the compiled code, because the interpreter would have to hold such logits."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *modules, last = done.stdout.split("----")
    assert "one token compiles" in last
    assert len(modules) == 3
    for module in modules:
        for pointer in ("s_ptr", "t_ptr", "g_ptr", "d_ptr"):
            kinds = re.findall(rf"tt\.addptr %{pointer}\S*, %\S+ : !tt\.ptr<\w+>, (i\d+)", module)
            assert kinds, pointer
            assert set(kinds) == {"i64"}, (pointer, kinds)
