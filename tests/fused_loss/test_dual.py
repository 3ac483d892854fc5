"""impl="triton_dual" under Triton's interpreter: values and gradients against the dense reference in float64.

Tiles are cut to 16 tokens and 32 entries, so that 131 entries make several tiles and a ragged one. Every buffer
starts as NaN, so an entry that was not written, or was read by mistake, shows.
"""

import math
from typing import Any

import pytest
import torch
from sdft_kernels import divergence, linear_divergence, tuning, workspace
from sdft_kernels.reference import divergence_reference, linear_divergence_reference
from torch import Tensor

KINDS = ("reverse_kl", "forward_kl")
BOUNDS = {torch.bfloat16: 5e-3, torch.float16: 2e-3}  # of gradients; E has 8 bits in both, G has the dtype's
WEIGHTS = torch.tensor([1.0, 0.0, 0.25, 2.0, 0.0])
Tensors = list[Tensor]

pytestmark = [  # of numpy: inf − inf in masked entries, and rows that hold NaN
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:All-NaN slice"),
]


@pytest.fixture(autouse=True)
def small_tiles_and_nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "ANY_DUAL_TILE", tuning.DualTile(16, 32, 16, 4, 1))
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(math.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", filled)


def make(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype, *, noise: float = 0.3, shared: bool = False, other: int = 0
) -> Tensors:
    """x, w, teacher_x and teacher_w (of hidden size `other` if given); the teacher is the student plus noise."""
    generator = torch.Generator().manual_seed(rows + vocab + hidden)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, w = normal(rows, hidden), normal(vocab, hidden) / hidden**0.5
    teacher_x, teacher_w = x + noise * normal(rows, hidden), w + noise * normal(vocab, hidden) / hidden**0.5
    if other:
        teacher_x, teacher_w = normal(rows, other), normal(vocab, other) / other**0.5
    x, w, teacher_x, teacher_w = (t.to(dtype) for t in (x, w, teacher_x, teacher_w))
    return [x, w, teacher_x, w if shared else teacher_w]


def results(f: Any, tensors: Tensors, graded: int, upstream: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """Loss, per-token outputs, dX, and dW unless `graded` is 1."""
    leaves = [t.detach().requires_grad_() for t in tensors[:graded]]
    loss, tokens = f(*leaves, *(t.detach() for t in tensors[graded:]), return_tokens=True, **options)
    grads = torch.autograd.grad((loss * upstream).sum(), leaves)
    found = {"loss": loss.detach()} | {k: v for k, v in tokens._asdict().items() if v is not None}
    return found | dict(zip(("dX", "dW"), grads, strict=False))


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-6)).item()


def check(tensors: Tensors, *, graded: int = 2, upstream: Any = 1.0, **options: Any) -> None:
    """Values within 1e-4 of float64, gradients within the dtype's bound."""
    scaled = upstream * 2.0**10  # a loss scaler's factor, without which fp16 gradients are subnormal
    ours = results(linear_divergence, tensors, graded, scaled, options | {"impl": "triton_dual"})
    exact = {k: v for k, v in options.items() if k not in ("compact", "chunk_bytes")}
    truth = results(linear_divergence_reference, [t.double() for t in tensors], graded, scaled, exact)
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        limit = BOUNDS[tensors[0].dtype] if name in ("dX", "dW") else 1e-4
        assert torch.isfinite(ours[name]).all(), name
        assert error(ours[name], value) <= limit, (name, error(ours[name], value))


CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "one": ((1, 1, 1), {}),
    "less than a tile": ((3, 13, 5), {"labels": torch.tensor([0, 12, 5])}),
    "whole tiles": ((16, 64, 32), {"reduction": "sum"}),
    "one token, ragged": ((1, 131, 19), {"labels": torch.tensor([130]), "temperature": 0.7, "scale": 1.5}),
    "weights": ((5, 131, 19), {"token_weights": WEIGHTS, "labels": torch.arange(5) * 30, "temperature": 0.7}),
    "weights, all rows": ((5, 131, 19), {"token_weights": WEIGHTS, "compact": False, "teacher_scale": 1.5}),
    "frozen head": ((5, 131, 19), {"graded": 1, "token_weights": WEIGHTS, "chunk_bytes": 2000}),
    "none": ((5, 131, 19), {"reduction": "none", "upstream": torch.linspace(-1, 2, 5)}),
    "part of the vocabulary": ((3, 131, 19), {"vocab_size": 100}),
}


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", CASES)
def test_values_and_gradients(which: str, kind: str, dtype: torch.dtype) -> None:
    shape, options = CASES[which]
    check(make(*shape, dtype), divergence=kind, **options)


def test_shared_heads_other_widths_and_strides() -> None:
    check(make(5, 131, 19, torch.float16, shared=True), labels=torch.arange(5))
    check(make(5, 131, 19, torch.float16, other=37), labels=torch.arange(5))
    tensors = make(5, 131, 19, torch.bfloat16)
    check([t.t().contiguous().t() for t in tensors], divergence="forward_kl", labels=torch.arange(10)[::2])
    check([torch.cat([t, t], 1)[:, :19] for t in tensors], token_weights=WEIGHTS[:1].expand(5))


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_dw_of_several_chunks_at_once(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tokens in chunks of two: the last group of kept gradients is not full, the last chunk neither."""
    monkeypatch.setattr("sdft_kernels.dual.plan_dual", lambda *_: (2, kept))
    check(make(7, 70, 19, torch.float16), token_weights=torch.arange(7.0) % 3, compact=kept == 2)


@pytest.mark.parametrize("kl", [0.02, 0.003])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_exact_where_the_teacher_is_near(kind: str, kl: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    tensors = make(16, 2048, 256, torch.bfloat16, noise=(2 * kl) ** 0.5, shared=True)
    check(tensors, divergence=kind)
    # The bar can be missed: the same from logits that were rounded to bf16.
    x, w, teacher_x, _ = (t.double() for t in tensors)
    grads = []
    for dtype in (torch.float64, torch.bfloat16):
        s = (x @ w.T).to(dtype).double().requires_grad_()
        loss = divergence_reference(s, (teacher_x @ w.T).to(dtype).double(), divergence=kind)
        grads.append(torch.autograd.grad(loss[0] if isinstance(loss, tuple) else loss, s)[0] @ w)
    assert error(grads[1], grads[0]) > 5e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_models_far_apart(kind: str, dtype: torch.dtype) -> None:
    """Logits of hundreds: e^s underflows where q is large, and s − t passes 16, where fp16 has steps of 1/64."""
    # fp16 gradients of a KL of a thousand overflow, as under impl="triton".
    temperature = 0.3 if dtype == torch.float16 else 0.02
    check(make(5, 131, 19, dtype, noise=4.0), divergence=kind, temperature=temperature, upstream=2.0**-5)
    check(make(5, 131, 19, dtype, other=23), divergence=kind, temperature=5 * temperature, upstream=2.0**-5)


def test_rows_of_weight_zero_may_hold_anything() -> None:
    for compact in (True, False):
        tensors = make(5, 70, 7, torch.float16)
        good = results(linear_divergence, tensors, 2, 1.0, {"impl": "triton_dual", "token_weights": WEIGHTS})
        tensors[0][1], tensors[2][4] = math.nan, math.inf
        options = {"impl": "triton_dual", "token_weights": WEIGHTS, "compact": compact}
        bad = results(linear_divergence, tensors, 2, 1.0, options)
        assert all(torch.equal(bad[name], value) for name, value in good.items())


def test_identical_models_have_no_gradient_and_no_rows_no_loss() -> None:
    x, w, *_ = make(5, 131, 19, torch.bfloat16)
    same = results(linear_divergence, [x, w, x, w], 2, 1.0, {"impl": "triton_dual"})
    assert all((same[name] == 0).all() for name in ("loss", "dX", "dW"))
    none = results(linear_divergence, [x[:0], w, x[:0], w], 2, 1.0, {"impl": "triton_dual"})
    assert all((none[name] == 0).all() for name in ("loss", "dX", "dW"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "jsd": ({"divergence": "jsd"}, "does not do divergence='jsd'"),
    "bias": ({"bias": torch.zeros(40)}, "takes no bias"),
    "teacher_bias": ({"teacher_bias": torch.zeros(40)}, "takes no teacher_bias"),
    "softcap": ({"softcap": 3.0}, "takes no softcap"),
    "teacher_softcap": ({"teacher_softcap": 3.0}, "takes no teacher_softcap"),
    "products": ({"products": "bfloat16"}, "and products in torch.bfloat16"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_it_does_not_do_is_refused_by_name(which: str) -> None:
    options, message = REFUSED[which]
    with pytest.raises(ValueError, match=f"impl='triton_dual' .*{message}.*: .*use impl='triton' or 'torch'"):
        linear_divergence(*make(2, 40, 8, torch.float16), impl="triton_dual", **options)


def test_other_dtypes_and_ready_logits_are_refused_by_name() -> None:
    half = make(2, 40, 8, torch.float16)
    for tensors in ([t.float() for t in half], [half[0], half[1].float(), *half[2:]], [half[0].bfloat16(), *half[1:]]):
        with pytest.raises(ValueError, match="takes bf16 or fp16 in all matrices, not x torch"):
            linear_divergence(*tensors, impl="triton_dual")
    with pytest.raises(ValueError, match="impl='triton_dual' is unknown: use one of 'triton', 'torch'"):
        divergence(half[1], half[3], impl="triton_dual")  # type: ignore[arg-type]


def test_the_chunks_of_a_7b_head() -> None:
    """4 bytes an entry where the logits take 8; several chunks' gradients stay only if dW needs them."""
    mib, stride = 2**20, 152064
    for budget in (256 * mib, 512 * mib, 1266 * mib, 4096 * mib):
        for trained in (True, False):
            chunk, kept = workspace.plan_dual(16384, stride, (3584, 3584), budget, 4 * 8 * 2376, trained)
            held = chunk * (2 * stride * (1 + kept) + 4 * 8 * 2376)
            assert 0.7 * budget < held < budget
            assert kept == 1 or (trained and budget < 1024 * mib)
        assert chunk > 1.5 * workspace.plan_linear(16384, stride, [3584, 3584], budget).chunk
