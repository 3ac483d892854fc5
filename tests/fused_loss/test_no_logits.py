"""The candidate without logits, in Triton's interpreter, with tiles small enough that there are many of them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sdft_kernels import linear_divergence, no_logits
from sdft_kernels.reference import linear_divergence_reference
from sdft_kernels.tuning import TileBlocks

pytestmark = [
    pytest.mark.skipif(not no_logits.INTERPRETED, reason="for Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, on the infinities that the kernels mask
]

NAMES = ("reverse_kl", "forward_kl", "jsd")
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 2e-3}
Case = dict[str, Tensor]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, three ranges of the vocabulary, and NaN wherever a buffer is left unwritten."""
    set_tiles(monkeypatch)
    monkeypatch.setattr(no_logits, "splits_of", lambda device, row_blocks: 3)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))


def set_tiles(monkeypatch: pytest.MonkeyPatch, rows: int = 16, vocab: int = 32, hidden: int = 16) -> None:
    blocks = TileBlocks(rows, vocab, hidden, hidden, 1, 1)
    monkeypatch.setattr(no_logits, "tile_blocks", lambda target, itemsize, heavy: blocks)


def filled(make: Any) -> Any:
    def nan(*args: Any, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    return nan


def make(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype = torch.float32, *, noise: float = 0.3, t_hidden: int = 0
) -> Case:
    """Random inputs with logits of unit scale; the teacher is the student plus noise, or its own width."""
    gen = torch.Generator().manual_seed(rows * 7919 + vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    x, w = normal(rows, hidden), normal(vocab, hidden) / hidden**0.5
    tx, tw = x + noise * normal(rows, hidden), w + noise * normal(vocab, hidden) / hidden**0.5
    if t_hidden:
        tx, tw = normal(rows, t_hidden), normal(vocab, t_hidden) / t_hidden**0.5
    return {k: v.to(dtype) for k, v in {"x": x, "w": w, "teacher_x": tx, "teacher_w": tw}.items()}


def run(f: Any, case: Case, dtype: torch.dtype | None = None, wanted: str = "x w bias", **options: Any) -> Case:
    """Loss, per-token outputs and the gradients wanted, all float64; `case` may hold biases."""
    tensors = {k: v.detach().to(dtype or v.dtype) for k, v in case.items()}
    if options.get("token_weights") is not None:
        options["token_weights"] = options["token_weights"].to(dtype or torch.float32)
    leaves = {k: tensors[k].requires_grad_() for k in wanted.split() if k in tensors}
    if tensors["teacher_w"].data_ptr() == case["w"].data_ptr():  # a shared head stays shared
        tensors["teacher_w"] = tensors["w"].detach()
    four = [tensors.pop(k) for k in ("x", "w", "teacher_x", "teacher_w")]
    loss, tokens = f(*four, **tensors, return_tokens=True, **options)
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
    assert all(g.dtype == leaf.dtype for g, leaf in zip(grads, leaves.values(), strict=True))
    out = {"loss": loss.detach(), **{"d" + k: g for k, g in zip(leaves, grads, strict=True)}}
    return {k: v.double() for k, v in (out | tokens._asdict()).items() if v is not None}


def truth_of(case: Case, **options: Any) -> Case:
    options.pop("compact", None)
    return run(linear_divergence_reference, case, torch.float64, **options)


def ours_of(case: Case, **options: Any) -> Case:
    return run(linear_divergence, case, impl="triton_no_logits", **options)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def check(ours: Case, truth: Case, bound: float) -> None:
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        atol = bound * max(value.abs().max().item() if value.numel() else 0.0, 1e-2)
        torch.testing.assert_close(ours[name], value, rtol=bound, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", [(0, 5, 4), (1, 1, 1), (17, 37, 5), (53, 300, 40)])
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes(name: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    case = make(*shape, dtype)
    options = {"divergence": name, "labels": torch.arange(shape[0]) * 7 % shape[1]}
    check(ours_of(case, **options), truth_of(case, **options), BOUNDS[dtype])


OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "temperature": {"temperature": 0.6, "scale": 0.25, "teacher_scale": 1.5},
    "softcap": {"softcap": 1.5, "teacher_softcap": None},
    "both softcaps": {"softcap": 1.5, "teacher_softcap": 3.0},
    "vocab_size": {"vocab_size": 50},
    "weights": {"token_weights": torch.arange(20.0) % 4 / 3},
    "not compact": {"token_weights": torch.arange(20.0) % 4 / 3, "compact": False},
    "none weights": {"token_weights": torch.arange(20.0) % 4 / 3, "compact": False, "reduction": "none"},
    "no weight": {"token_weights": torch.zeros(20)},
    "no weight, not compact": {"token_weights": torch.zeros(20), "compact": False},
    "beta": {"beta": 0.2},
    "frozen head": {"wanted": "x"},
    "frozen states": {"wanted": "w bias"},
    "bias alone": {"wanted": "bias"},
}


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("name", NAMES)
def test_options(name: str, options: str) -> None:
    dtype = {"reverse_kl": torch.float32, "forward_kl": torch.bfloat16, "jsd": torch.float16}[name]
    case = make(20, 70, 17, dtype, t_hidden=29)
    gen = torch.Generator().manual_seed(3)
    case |= {k: torch.randn(70, generator=gen).to(dtype) for k in ("bias", "teacher_bias")}
    given = {"divergence": name, "labels": torch.arange(20), **OPTIONS[options]}
    check(ours_of(case, **given), truth_of(case, **given), BOUNDS[dtype])


def test_no_gradient_wanted_and_no_tokens() -> None:
    case = make(9, 40, 5)
    for name in NAMES:
        loss = linear_divergence(*case.values(), divergence=name, impl="triton_no_logits")
        torch.testing.assert_close(loss, linear_divergence(*case.values(), divergence=name, impl="torch"))


@pytest.mark.parametrize("name", NAMES)
def test_as_torch(name: str) -> None:
    """Shared head of another dtype than the states, heads of different lengths, rows apart: as the torch form."""
    case = make(21, 60, 24)
    case["x"] = case["x"].bfloat16()
    case["teacher_x"] = case["teacher_x"].t().contiguous().t()
    shared = case | {"teacher_w": case["w"]}
    mismatched = case | {"teacher_w": case["teacher_w"][:50]}
    for given in (shared, mismatched):
        options = {"divergence": name, "labels": torch.arange(21), "token_weights": torch.arange(21.0) % 3}
        ours, torchs = ours_of(given, **options), run(linear_divergence, given, impl="torch", **options)
        check(ours, torchs, 1e-5 if "dx" not in ours else 5e-3)  # dX is rounded to bf16
        assert relative(ours["dw"], torchs["dw"]) < 2e-6


def test_labels_outside_the_vocabulary_are_nan() -> None:
    out = ours_of(make(3, 40, 5), labels=torch.tensor([40, -1, 39]))
    assert out["student_logprob"].isnan().tolist() == [True, True, False]
    assert torch.isfinite(out["dx"]).all()


@pytest.mark.parametrize("compact", [True, False])
def test_rows_of_weight_zero_may_hold_anything(compact: bool) -> None:
    case = make(20, 40, 5)
    case["x"][3], case["teacher_x"][7] = math.nan, math.inf
    weights = torch.ones(20)
    weights[[3, 7]] = 0
    for name in NAMES:
        out = ours_of(case, divergence=name, token_weights=weights, compact=compact, labels=torch.arange(20))
        assert all(torch.isfinite(v).all() for v in out.values())
        assert (out["dx"][[3, 7]] == 0).all()


@pytest.mark.parametrize("offset", [0.0, 50.0])  # of all the teacher's logits: it changes nothing
@pytest.mark.parametrize("name", NAMES)
def test_fp32_is_within_twice_the_dense_error(name: str, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, 32, 64, 32)
    case = make(93, 507, 123, noise=0.05) | {"teacher_bias": torch.full((507,), offset)}
    truth, ours = truth_of(case, divergence=name), ours_of(case, divergence=name)
    dense = run(linear_divergence_reference, case, divergence=name)
    for key in ("dx", "dw", "divergence"):
        assert relative(ours[key], truth[key]) <= max(1e-6, 2 * relative(dense[key], truth[key])), key


@pytest.mark.parametrize("kl", [0.04, 0.02, 0.003])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_exact_where_the_teacher_is_near(name: str, kl: float, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, 64, 128, 64)
    case = make(64, 2048, 128, torch.bfloat16, noise=(2 * kl) ** 0.5)
    case["teacher_w"] = case["w"]
    truth, ours = truth_of(case, divergence=name), ours_of(case, divergence=name)
    assert relative(ours["dx"], truth["dx"]) < 5e-3
    assert relative(ours["dw"], truth["dw"]) < 5e-3
    assert relative(ours["divergence"], truth["divergence"]) < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_identical_models_have_no_loss(name: str) -> None:
    case = make(9, 50, 8)
    case |= {"teacher_x": case["x"], "teacher_w": case["w"]}
    out = ours_of(case, divergence=name)
    assert out["loss"].abs() < 1e-7
    assert out["dx"].abs().max() < 1e-7
    assert out["dw"].abs().max() < 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits(name: str) -> None:
    case = make(6, 40, 5)
    case["x"] = case["x"] / case["x"].abs().max() * 1e4
    truth, ours = truth_of(case, divergence=name), ours_of(case, divergence=name)
    for key in ("loss", "dx", "dw"):
        assert torch.isfinite(ours[key]).all()
        # Saturated rows have gradients below fp32's range, hence the absolute part.
        assert (ours[key] - truth[key]).norm() <= 1e-4 * truth[key].norm() + 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_forbidden_tokens(name: str) -> None:
    case, none = make(17, 70, 5), {"bias": torch.zeros(70)}
    forbid = torch.zeros(70)
    forbid[[3, 8]] = -math.inf
    forbid[32:64] = -math.inf  # a whole tile
    agreed = case | {"bias": forbid, "teacher_bias": forbid}
    out = ours_of(agreed, divergence=name)
    check(out, truth_of(agreed, divergence=name), 3e-6)
    assert all(torch.isfinite(v).all() for v in out.values())
    # One side alone: infinite where the averaging distribution still allows the token, finite otherwise.
    teacher = ours_of(case | none | {"teacher_bias": forbid}, divergence=name)
    student = ours_of(case | {"bias": forbid}, divergence=name)
    assert teacher["loss"].isinf() == (name == "reverse_kl")
    assert student["loss"].isinf() == (name == "forward_kl")
    for out in (teacher, student):
        assert all(torch.isfinite(out[k]).all() for k in ("dx", "dw", "dbias"))
        if out["loss"].isinf():
            assert out["loss"] > 0
            assert (out["dx"] == 0).all()


def peaked(dtype: torch.dtype) -> Case:
    """Half of the vocabulary, whole tiles of it, has next to no probability: logits lower by about 20."""
    case = make(32, 256, 33, dtype, noise=0.1)
    for x, w in (("x", "w"), ("teacher_x", "teacher_w")):
        case[x][:, -1], case[w][:, -1] = 1.0, 0.0
        case[w][128:, -1] = -20.0
    return case


@pytest.mark.parametrize("name", NAMES)
def test_negligible_tiles_are_skipped_and_cost_no_accuracy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = peaked(torch.bfloat16)
    truth, ours = truth_of(case, divergence=name), ours_of(case, divergence=name)
    rule = no_logits.skip_rule
    monkeypatch.setattr(no_logits, "skip_rule", lambda *args: (0.0, rule(*args)[1]))
    whole = ours_of(case, divergence=name)
    assert (ours["dw"][128:] == 0).all()  # untouched
    assert (ours["dw"][:128] != 0).any(1).all()
    assert (whole["dw"] != 0).any(1).all()
    for key in ("dx", "dw"):
        assert relative(ours[key], truth[key]) < 5e-3
        assert relative(ours[key], truth[key]) < relative(whole[key], truth[key]) + 1e-4
    assert (ours["divergence"] == whole["divergence"]).all()


def test_nan_is_not_negligible() -> None:
    case = make(17, 40, 5)
    case["x"][4] = math.nan
    out = ours_of(case)
    assert out["dx"][4].isnan().all()
    assert out["dw"].isnan().any()
    assert torch.isfinite(out["dx"][:4]).all()


def test_autocast() -> None:
    case = make(33, 64, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = ours_of(case)
    rounded = truth_of({k: v.bfloat16() for k, v in case.items()})
    for key in ("loss", "dx", "dw"):
        assert relative(ours[key], rounded[key]) < 5e-3


def test_a_second_backward_and_an_upstream_factor() -> None:
    case = make(8, 40, 5)
    x, w = case["x"].clone().requires_grad_(), case["w"].clone().requires_grad_()
    loss = linear_divergence(x, w, case["teacher_x"], case["teacher_w"], impl="triton_no_logits")
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w), torch.tensor(2.0))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)
