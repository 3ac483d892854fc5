"""The fused loss against the dense reference in float64, and against the promises of its docstring."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdft_kernels import LinearDivergence, TokenStats, linear_divergence
from sdft_kernels.reference import linear_divergence_reference
from torch import Tensor

NAMES = ("reverse_kl", "forward_kl", "jsd")
EPS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 2e-3}
Case = dict[str, Tensor]


def make(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype = torch.float64, *, noise: float = 0.3, t_hidden: int = 0
) -> Case:
    """Random inputs with logits of unit scale; the teacher is the student plus noise, or has another width."""
    gen = torch.Generator().manual_seed(rows * 7919 + vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    x, w = normal(rows, hidden), normal(vocab, hidden) / hidden**0.5
    tx, tw = x + noise * normal(rows, hidden), w + noise * normal(vocab, hidden) / hidden**0.5
    if t_hidden:
        tx, tw = normal(rows, t_hidden), normal(vocab, t_hidden) / t_hidden**0.5
    return {k: v.to(dtype) for k, v in {"x": x, "w": w, "teacher_x": tx, "teacher_w": tw}.items()}


def outputs(f: Any, case: Case, dtype: torch.dtype | None = None, upstream: Any = 1.0, **options: Any) -> Case:
    """Loss, per-token outputs and gradients, all float64."""
    given = {**case, **{k: options.pop(k) for k in list(options) if k in ("bias", "teacher_bias")}}
    tensors = {k: v.detach().to(dtype or v.dtype) for k, v in given.items() if v is not None}
    leaves = {k: tensors[k].requires_grad_() for k in ("x", "w", "bias") if k in tensors}
    four = [tensors.pop(k) for k in ("x", "w", "teacher_x", "teacher_w")]
    loss, tokens = f(*four, **tensors, return_tokens=True, **options)
    grads = torch.autograd.grad((loss * upstream).sum(), list(leaves.values()))
    out = {"loss": loss.detach(), **{"d" + k: g for k, g in zip(leaves, grads, strict=True)}}
    out |= {k: v for k, v in tokens._asdict().items() if v is not None and v.dtype != torch.bool}
    return {k: v.double() for k, v in out.items()}


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def check(case: Case, bound: float, **options: Any) -> None:
    truth = outputs(linear_divergence_reference, case, torch.float64, **options)
    ours = outputs(linear_divergence, case, chunk_bytes=60_000, **options)
    for name, value in truth.items():
        torch.testing.assert_close(
            ours[name],
            value,
            rtol=bound,
            atol=bound * max(value.abs().max().item(), 1e-3),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 37, 5), (7, 1, 3), (53, 107, 23), (253, 507, 123)])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_in_float64(shape: tuple[int, int, int], name: str) -> None:
    rows, vocab, _ = shape
    check(make(*shape), 1e-9, divergence=name, labels=torch.arange(rows) % vocab)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "upstream": torch.linspace(-1, 2, 61, dtype=torch.float64)},
    "upstream": {"upstream": -3.7},
    "temperature": {"temperature": 0.6, "scale": 0.25, "teacher_scale": 1.5},
    "softcap": {"softcap": 1.5, "teacher_softcap": None},
    "vocab_size": {"vocab_size": 90},
    "weights": {"token_weights": torch.arange(61.0) % 4 / 3},
    "none_weights": {"token_weights": torch.arange(61.0) % 4 / 3, "reduction": "none", "temperature": 2.0},
    "beta": {"beta": 0.2},
}


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", list(OPTIONS))
def test_options_and_dtypes(options: str, name: str, dtype: torch.dtype) -> None:
    case = make(61, 101, 17, dtype, t_hidden=29)
    gen = torch.Generator().manual_seed(3)
    biases = {k: torch.randn(101, generator=gen).to(dtype) for k in ("bias", "teacher_bias")}
    labels = torch.arange(61) % 90
    check(case, EPS[dtype], divergence=name, labels=labels, **biases, **OPTIONS[options])


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    case = make(4, 6, 3)
    weights = torch.tensor([1.0, 0.0, 0.3, 2.0], dtype=torch.float64)
    for reduction in ("mean", "none"):  # gradcheck calls the backward again and again: the recompute path too

        def f(x: Tensor, w: Tensor, bias: Tensor, reduction: str = reduction) -> Tensor:
            options = {"divergence": name, "softcap": 2.0, "temperature": 0.8, "token_weights": weights}
            return linear_divergence(
                x, w, case["teacher_x"], case["teacher_w"], bias=bias, reduction=reduction, **options
            )

        inputs = [case["x"].clone(), case["w"].clone(), torch.zeros(6, dtype=torch.float64)]
        assert torch.autograd.gradcheck(f, [v.requires_grad_() for v in inputs], nondet_tol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_fp32_is_within_twice_the_dense_error(name: str) -> None:
    case = make(253, 507, 123, torch.float32, noise=0.05)
    truth = outputs(linear_divergence_reference, case, torch.float64, divergence=name)
    dense = outputs(linear_divergence_reference, case, divergence=name)
    ours = outputs(linear_divergence, case, divergence=name)
    for key in ("dx", "dw", "divergence"):
        assert relative(ours[key], truth[key]) <= 2 * relative(dense[key], truth[key]), key


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_fp32_on_a_long_vocabulary_with_models_far_apart(name: str) -> None:
    """D = 28 at V = 262147: what the rounding of the log-sum-exp does to D must not reach the gradient."""
    torch.manual_seed(5)
    shapes = {"x": (5, 17), "w": (262147, 17), "teacher_x": (5, 17), "teacher_w": (262147, 17)}
    case = {key: torch.randn(shape) for key, shape in shapes.items()}
    options: dict[str, Any] = {"divergence": name, "temperature": 0.7}
    truth = outputs(linear_divergence_reference, case, torch.float64, **options)
    dense = outputs(linear_divergence_reference, case, **options)
    ours = outputs(linear_divergence, case, impl="torch", **options)
    for key in ("dx", "dw", "divergence"):
        assert relative(ours[key], truth[key]) <= 2 * relative(dense[key], truth[key]), key


@pytest.mark.parametrize("kl", [0.04, 0.02, 0.003])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_exact_where_the_teacher_is_near(name: str, kl: float) -> None:
    case = make(128, 4096, 256, torch.bfloat16, noise=(2 * kl) ** 0.5)
    case["teacher_w"] = case["w"]
    truth = outputs(linear_divergence_reference, case, torch.float64, divergence=name)
    ours = outputs(linear_divergence, case, divergence=name)
    if name != "jsd":
        assert truth["divergence"].mean().item() == pytest.approx(kl, rel=0.15)
    assert relative(ours["dx"], truth["dx"]) < 5e-3
    assert relative(ours["dw"], truth["dw"]) < 5e-3
    assert relative(ours["divergence"], truth["divergence"]) < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_identical_models_have_no_loss(name: str) -> None:
    case = make(9, 50, 8, torch.float32)
    case |= {"teacher_x": case["x"], "teacher_w": case["w"]}
    out = outputs(linear_divergence, case, divergence=name)
    assert out["loss"].abs() < 1e-7
    assert out["dx"].abs().max() < 1e-7
    assert out["dw"].abs().max() < 1e-7


def test_jsd_ends_are_the_kls() -> None:
    case = make(9, 50, 8)
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        jsd, kl = (
            outputs(linear_divergence, case, **o) for o in ({"divergence": "jsd", "beta": beta}, {"divergence": name})
        )
        assert all(torch.equal(jsd[k], kl[k]) for k in kl)


def test_extreme_logits() -> None:
    case = make(6, 40, 5, torch.float32)
    case["x"] = case["x"] / case["x"].abs().max() * 1e4
    for name in NAMES:
        truth = outputs(linear_divergence_reference, case, torch.float64, divergence=name)
        ours = outputs(linear_divergence, case, divergence=name)
        for key in ("loss", "dx", "dw"):
            assert torch.isfinite(ours[key]).all()
            # Saturated rows have gradients below fp32's range, hence the absolute part.
            assert (ours[key] - truth[key]).norm() <= 1e-4 * truth[key].norm() + 1e-6


def test_padded_vocabulary_and_frozen_parts() -> None:
    case = make(12, 40, 8)
    wide = torch.cat([case["w"], torch.full((5, 8), 99.0, dtype=torch.float64)])
    a = outputs(linear_divergence, case)
    b = outputs(linear_divergence, case | {"w": wide})
    assert torch.equal(a["loss"], b["loss"])
    assert (b["dw"][40:] == 0).all()
    torch.testing.assert_close(a["dw"], b["dw"][:40])
    x, w = case["x"].clone().requires_grad_(), case["w"].clone()
    linear_divergence(x, w, case["teacher_x"], case["teacher_w"]).backward()
    torch.testing.assert_close(x.grad, a["dx"])
    x, w = case["x"].clone(), case["w"].clone().requires_grad_()
    linear_divergence(x, w, case["teacher_x"], case["teacher_w"]).backward()
    torch.testing.assert_close(w.grad, a["dw"])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_learn_from(rows: int, reduction: str) -> None:
    case = make(rows, 10, 3, torch.float32)
    out = outputs(linear_divergence, case, reduction=reduction, token_weights=torch.zeros(rows), bias=torch.zeros(10))
    assert out["loss"].sum() == 0
    assert out["loss"].shape == ((rows,) if reduction == "none" else ())
    assert all((out[k] == 0).all() for k in ("dx", "dw", "dbias"))
    if rows == 0:
        empty = outputs(linear_divergence, case, reduction=reduction)
        assert empty["loss"].sum() == 0
        assert (empty["dw"] == 0).all()


def test_chunks_do_not_matter() -> None:
    case = make(97, 60, 9)
    whole = outputs(linear_divergence, case)
    for chunk_bytes in (1, 10_000, 33_333):
        part = outputs(linear_divergence, case, chunk_bytes=chunk_bytes)
        for key, value in whole.items():
            torch.testing.assert_close(part[key], value, rtol=1e-11, atol=1e-14)


def test_token_outputs() -> None:
    case = make(20, 30, 6)
    labels, weights = torch.arange(20), torch.ones(20)
    weights[4] = 0
    four = [case[k] for k in ("x", "w", "teacher_x", "teacher_w")]
    _, ours = linear_divergence(*four, labels=labels, token_weights=weights, return_tokens=True)
    _, truth = linear_divergence_reference(*four, labels=labels, token_weights=weights, return_tokens=True)
    assert isinstance(ours, TokenStats)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)
    _, bare = linear_divergence(*four, return_tokens=True)
    assert bare.student_logprob is None
    assert not any(t.requires_grad for t in ours)


@pytest.mark.parametrize("name", NAMES)
def test_forbidden_tokens(name: str) -> None:
    case = make(7, 20, 5)
    forbid = torch.zeros(20, dtype=torch.float64)
    forbid[[3, 8]] = -math.inf
    agreed = outputs(linear_divergence, case, bias=forbid, teacher_bias=forbid, divergence=name)
    truth = outputs(linear_divergence_reference, case, bias=forbid, teacher_bias=forbid, divergence=name)
    for key, value in truth.items():
        torch.testing.assert_close(agreed[key], value)
        assert torch.isfinite(value).all()
    # One side alone: infinite where the averaging distribution still allows the token, finite otherwise.
    teacher = outputs(linear_divergence, case, bias=torch.zeros(20).double(), teacher_bias=forbid, divergence=name)
    student = outputs(linear_divergence, case, bias=forbid, divergence=name)
    assert teacher["loss"].isinf() == (name == "reverse_kl")
    assert student["loss"].isinf() == (name == "forward_kl")
    for out in (teacher, student):
        assert all(torch.isfinite(out[k]).all() for k in ("dx", "dw", "dbias"))
        if out["loss"].isinf():
            assert out["loss"] > 0
            assert (out["dx"] == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(1, 40),
    noise=st.floats(0, 5),
    beta=st.floats(0.05, 0.95),
    temperature=st.floats(0.3, 3),
)
def test_properties(rows: int, vocab: int, noise: float, beta: float, temperature: float) -> None:
    case = make(rows, vocab, 4, torch.float32, noise=noise)
    four = [case[k] for k in ("x", "w", "teacher_x", "teacher_w")]
    swapped = four[2:] + four[:2]
    common: dict[str, Any] = {"temperature": temperature, "reduction": "none"}
    for name in NAMES:
        value = linear_divergence(*four, divergence=name, beta=beta, **common)
        assert (value >= -2e-6).all()
    forward = linear_divergence(*four, divergence="forward_kl", **common)
    torch.testing.assert_close(
        forward, linear_divergence(*swapped, divergence="reverse_kl", **common), rtol=1e-4, atol=1e-5
    )
    half, other = (linear_divergence(*f, divergence="jsd", beta=0.5, **common) for f in (four, swapped))
    torch.testing.assert_close(half, other, rtol=1e-4, atol=1e-6)
    assert (half <= math.log(2) + 1e-6).all()
    mirrored = linear_divergence(*swapped, divergence="jsd", beta=1 - beta, **common)
    torch.testing.assert_close(
        linear_divergence(*four, divergence="jsd", beta=beta, **common), mirrored, rtol=1e-4, atol=1e-6
    )


def test_autocast() -> None:
    case = make(33, 64, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = outputs(linear_divergence, case)
        x, w = case["x"].clone().requires_grad_(), case["w"].clone().requires_grad_()
        loss = linear_divergence(x, w, case["teacher_x"], case["teacher_w"])
    loss.backward()
    assert x.grad.dtype == w.grad.dtype == loss.dtype == torch.float32
    rounded = outputs(linear_divergence_reference, {k: v.bfloat16() for k, v in case.items()}, torch.float64)
    for key in ("loss", "dx", "dw"):
        assert relative(ours[key], rounded[key]) < 5e-3
    torch.testing.assert_close(w.grad.double(), ours["dw"])
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_backward_again_double_backward_and_checkpoint() -> None:
    case = make(8, 20, 5)
    x, w = case["x"].clone().requires_grad_(), case["w"].clone().requires_grad_()
    loss = linear_divergence(x, w, case["teacher_x"], case["teacher_w"])
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w), 2.0 * torch.ones_like(loss), retain_graph=True)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)
    with pytest.raises(RuntimeError, match="linear_divergence has no double backward"):
        torch.autograd.grad(loss, x, create_graph=True)
    four = (x, w, case["teacher_x"], case["teacher_w"])
    again = torch.utils.checkpoint.checkpoint(LinearDivergence(divergence="reverse_kl"), *four, use_reentrant=False)
    for a, b in zip(first, torch.autograd.grad(again, (x, w)), strict=True):
        torch.testing.assert_close(a, b)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "divergence": ({"divergence": "kl"}, "divergence='kl' is unknown"),
    "reduction": ({"reduction": "avg"}, "reduction='avg' is unknown"),
    "impl": ({"impl": "cuda"}, "impl='cuda' is unknown: use one of 'triton', 'torch'"),
    "beta": ({"beta": 1.5}, r"beta=1.5 is outside \[0, 1\]"),
    "temperature": ({"temperature": 0}, "temperature=0 is not a finite number above 0"),
    "softcap": ({"softcap": -1.0}, "softcap=-1.0"),
    "teacher_softcap": ({"teacher_softcap": "none"}, "teacher_softcap='none'"),
    "teacher_scale": ({"teacher_scale": 0.0}, "teacher_scale=0.0"),
    "chunk_bytes": ({"chunk_bytes": 0}, "chunk_bytes=0"),
    "vocab_size": ({"vocab_size": 9}, "vocab_size=9 must be in 1..8"),
    "x 3-D": ({"x": torch.zeros(1, 5, 3)}, r"x has shape \(1, 5, 3\)"),
    "x int": ({"x": torch.zeros(5, 3, dtype=torch.int64)}, "x has dtype torch.int64"),
    "w": ({"w": torch.zeros(8, 4)}, "w has hidden size 4 but x has 3"),
    "teacher_w": ({"teacher_w": torch.zeros(8, 4)}, "teacher_w has hidden size 4 but teacher_x has 3"),
    "teacher_x": ({"teacher_x": torch.zeros(4, 3)}, "teacher_x has 4 rows but x has 5"),
    "device": ({"teacher_x": torch.zeros(5, 3, device="meta")}, "teacher_x is on meta but x is on cpu"),
    "bias": ({"bias": torch.zeros(7)}, r"bias has shape \(7,\): it must be \(8,\)"),
    "token_weights": ({"token_weights": torch.ones(4)}, "token_weights has shape"),
    "weights dtype": ({"token_weights": torch.ones(5, dtype=torch.bool)}, "token_weights has dtype torch.bool"),
    "weights grad": ({"token_weights": torch.ones(5, requires_grad=True)}, "token_weights requires grad"),
    "labels": ({"labels": torch.zeros(5)}, "labels has dtype torch.float32"),
    "teacher grad": ({"teacher_x": torch.zeros(5, 3, requires_grad=True)}, "teacher_x requires grad"),
    "head grad": ({"teacher_w": torch.zeros(8, 3, requires_grad=True)}, "teacher_w requires grad"),
}


@pytest.mark.parametrize("which", list(BAD))
def test_bad_inputs_are_named(which: str) -> None:
    wrong, message = BAD[which]
    case: dict[str, Any] = make(5, 8, 3, torch.float32) | wrong
    four = [case.pop(k) for k in ("x", "w", "teacher_x", "teacher_w")]
    with pytest.raises(ValueError, match=message):
        linear_divergence(*four, **case)


def test_an_explicit_impl_that_cannot_run_is_refused_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdft_kernels import checks

    case = make(5, 8, 3, torch.float32)
    monkeypatch.setattr(checks, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run on cpu: move the tensors"):
        linear_divergence(*case.values(), impl="triton")
    monkeypatch.setattr(checks, "HAVE_TRITON", False)
    with pytest.raises(RuntimeError, match="impl='triton' needs triton, which is not installed"):
        linear_divergence(*case.values(), impl="triton")
    with pytest.raises(ValueError, match="impl='triton' has no float64"):
        linear_divergence(*make(5, 8, 3).values(), impl="triton")
    assert torch.isfinite(linear_divergence(*case.values(), impl="torch"))
