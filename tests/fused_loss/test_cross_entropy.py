"""`linear_cross_entropy` against a dense float64 cross-entropy, and its memory, waits and autograd."""

import importlib
import math
from typing import Any

import pytest
import torch
from sdft_kernels import LabelStats, LinearCrossEntropy, linear_cross_entropy, projection
from sdft_kernels.checks import make_options
from sdft_kernels.reference import linear_cross_entropy_reference as reference
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

# The module, not the function of the same name that the package exports.
module = importlib.import_module("sdft_kernels.cross_entropy")
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 2e-3}
N, V, H = 53, 37, 6
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "logits": {"temperature": 1.4, "softcap": 3.0, "scale": 0.8},
    "padded": {"vocab_size": 30},
    "weights": {"token_weights": torch.arange(float(N)) % 3, "ignore_index": -1},
    "sum": {"reduction": "sum", "ignore_index": -1},
    "none": {"reduction": "none", "token_weights": torch.arange(float(N)) % 3 - 1, "ignore_index": -1},
    "by probability": {"by_probability": True, "softcap": 3.0, "ignore_index": -1},
}


def make(dtype: torch.dtype = torch.float64, rows: int = N, vocab: int = V, hidden: int = H) -> list[Tensor]:
    """x, w and bias, which require gradients."""
    gen = torch.Generator().manual_seed(rows + vocab)
    x, w, bias = (torch.randn(shape, generator=gen) for shape in ((rows, hidden), (vocab, hidden), (vocab,)))
    return [t.to(dtype).requires_grad_() for t in (x, w, bias)]


def make_labels(ignore_index: int | None) -> Tensor:
    labels = torch.arange(N) % 30
    return labels if ignore_index is None else labels.masked_fill(torch.arange(N) % 5 == 2, ignore_index)


def check(dtype: torch.dtype, options: dict[str, Any], **call: Any) -> None:
    """Value and gradients by an upstream gradient that is not 1."""
    leaves = make(dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    labels = make_labels(options.get("ignore_index", -100))
    ours = linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], **options, **call)
    truth = reference(*exact[:2], labels, bias=exact[2], **options)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    upstream = torch.linspace(-1, 2, N) if truth.ndim else torch.tensor(-3.0)
    pairs = [(ours, truth)]
    pairs += zip(
        torch.autograd.grad((ours * upstream).sum(), leaves),
        torch.autograd.grad((truth * upstream).sum(), exact),
        strict=True,
    )
    for got, want in pairs:
        bound = BOUNDS[dtype]
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound * max(want.abs().max().item(), 1e-3))


@pytest.mark.parametrize("which", list(CASES))
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_against_the_reference(dtype: torch.dtype, which: str) -> None:
    for chunk_bytes in (None, 2**13):
        check(dtype, CASES[which], chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_operands_as_a_gpu_takes_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 gradients are stored larger there, or they would vanish."""
    monkeypatch.setattr(projection, "prefers_narrow", lambda device: True)
    for which in ("plain", "weights", "none", "by probability"):
        check(dtype, CASES[which], chunk_bytes=2**13)


def test_error_is_at_most_twice_that_of_dense_fp32() -> None:
    x, w, _ = make(torch.float32, 64, 30_011, 32)
    x, w, labels = x.detach() * 2, w.detach(), torch.arange(64) * 400

    def grads(function: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        return torch.autograd.grad(function(*leaves, labels), leaves)

    exact = grads(reference, torch.float64)
    for got, dense, want in zip(
        grads(linear_cross_entropy, torch.float32), grads(reference, torch.float32), exact, strict=True
    ):
        assert (got.double() - want).norm() <= 2 * (dense.double() - want).norm()


def test_gradcheck() -> None:
    labels = make_labels(None)[:5]
    leaves = make(torch.float64, 5, 31, 4)
    # The first backward scales what the forward made, later ones compute it again: a rounding apart.
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_cross_entropy(x, w, labels, bias=b, softcap=2.0), leaves, nondet_tol=1e-12
    )


def test_by_probability_has_the_gradient_of_minus_the_probability() -> None:
    x, w, _ = make()
    labels, weights = make_labels(None), torch.linspace(0, 1, N, dtype=torch.float64)
    loss = linear_cross_entropy(x, w, labels, token_weights=weights, by_probability=True, reduction="sum")
    chosen = (x @ w.T).softmax(1).gather(1, labels[:, None])[:, 0]
    for got, want in zip(
        torch.autograd.grad(loss, (x, w)), torch.autograd.grad(-(weights * chosen).sum(), (x, w)), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_tokens() -> None:
    x, w, _ = make(torch.float32)
    labels = make_labels(-1)
    log_p = (x @ w.T).double().log_softmax(1).detach()
    labels[:4] = log_p[:4].argmax(1)
    live = labels != -1
    want = log_p.gather(1, labels.clamp_min(0)[:, None])[:, 0].masked_fill(~live, 0.0)
    options: dict[str, Any] = {"ignore_index": -1, "return_tokens": True}
    for by_probability, loss in ((False, -want), (True, -want * want.exp())):
        for compact in (True, False):
            _, tokens = linear_cross_entropy(x, w, labels, by_probability=by_probability, compact=compact, **options)
            assert isinstance(tokens, LabelStats)
            torch.testing.assert_close(tokens.logprob.double(), want, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(tokens.loss.double(), loss.masked_fill(~live, 0.0), rtol=1e-5, atol=1e-6)
            assert torch.equal(tokens.top1, (log_p.argmax(1) == labels) & live)
            assert tokens.top1[:2].all()
            assert not tokens.loss.requires_grad


@pytest.mark.parametrize("labels", [[], [-100] * 3])
def test_no_token_counts(labels: list[int]) -> None:
    x, w, _ = make(torch.float32, len(labels))
    for options in ({}, {"compact": False}, {"by_probability": True}):
        loss = linear_cross_entropy(x, w, torch.tensor(labels, dtype=torch.int64), **options)
        assert loss.item() == 0
        for grad in torch.autograd.grad(loss, (x, w)):
            assert not grad.any()


@pytest.mark.parametrize("compact", [True, False])
def test_rows_that_count_nothing_leave_no_trace(compact: bool) -> None:
    x, w, _ = make()
    labels = make_labels(-1)
    weights = torch.ones(N)
    weights[7] = 0
    labels[7] = V + 5  # no token
    dead = (labels == -1) | (weights == 0)
    clean = reference(x[~dead], w, labels[~dead])
    want = torch.autograd.grad(clean, (x, w))
    spoilt = x.detach().masked_fill(dead[:, None], math.nan).requires_grad_()
    loss = linear_cross_entropy(spoilt, w, labels, token_weights=weights, ignore_index=-1, compact=compact)
    torch.testing.assert_close(loss, clean)
    for got, exact in zip(torch.autograd.grad(loss, (spoilt, w)), want, strict=True):
        torch.testing.assert_close(got, exact)


def test_a_forbidden_label_has_an_infinite_loss_and_no_gradient() -> None:
    x, w, _ = make(torch.float32, 3)
    bias = torch.zeros(V).index_fill(0, torch.tensor([4]), -math.inf)
    labels = torch.tensor([1, 4, 4])
    loss, tokens = linear_cross_entropy(x, w, labels, bias=bias, reduction="sum", return_tokens=True)
    assert tokens.loss.isinf().tolist() == [False, True, True]
    (grad,) = torch.autograd.grad(loss, x)
    assert (grad[0] != 0).all()
    assert not grad[1:].any()
    # Weighted by its probability, which is 0, it counts nothing.
    loss = linear_cross_entropy(x, w, labels, bias=bias, by_probability=True)
    assert torch.isfinite(loss)
    assert not torch.autograd.grad(loss, x)[0][1:].any()


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    x, w, bias = make(torch.float32)
    for reduction, needs in (("mean", (True, True, True)), ("none", (True, False, True))):
        plain = make_options(
            divergence="forward_kl",
            beta=0.5,
            temperature=1.0,
            reduction=reduction,
            vocab=V,
            return_tokens=True,
            chunk_bytes=None,
        ).flat()
        opcheck(
            torch.ops.sdft.linear_cross_entropy.default,
            (
                x,
                w.detach().requires_grad_(needs[1]),
                bias,
                make_labels(None),
                torch.ones(N),
                None,
                *needs,
                None,
                False,
                *plain,
            ),
        )


def test_compiled_is_one_opaque_operator_and_equals_eager() -> None:
    x, w, _ = make(torch.float32)
    labels, seen = make_labels(-100), []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def f(x: Tensor, w: Tensor) -> Any:
        return LinearCrossEntropy(by_probability=True)(x * 2, w, labels)

    compiled = torch.compile(f, backend=keep, fullgraph=True)
    compiled(x, w)
    assert [name for name in seen if "sdft" in name] == ["sdft.linear_cross_entropy.default"]
    assert not any("softmax" in name or "matmul" in name for name in seen)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(g(x, w), (x, w)) for g in (compiled, f)), strict=True):
        torch.testing.assert_close(a, b)


def test_backward_again_double_backward_and_checkpoint() -> None:
    x, w, _ = make()
    labels = make_labels(-100)
    loss = linear_cross_entropy(x, w, labels)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(2.0 * loss, (x, w), retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no double backward"):
        torch.autograd.grad(loss, x, create_graph=True)
    again = checkpoint(LinearCrossEntropy(), x, w, labels, use_reentrant=False)
    for a, b, c in zip(first, second, torch.autograd.grad(again, (x, w)), strict=True):
        torch.testing.assert_close(2 * a, b)
        torch.testing.assert_close(a, c)


class Watch(TorchDispatchMode):
    """Names of operators, and bytes of the largest new tensor. It does not see inside an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func._schema.name)
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.most = max(self.most, value.untyped_storage().nbytes())
        return out


def watched(rows: int, vocab: int, needs: tuple[bool, ...], weights: Tensor | None, **options: Any) -> Watch:
    x, w, bias = (t.detach() for t in make(torch.float32, rows, vocab, 8))
    defaults: dict[str, Any] = {
        "divergence": "forward_kl",
        "beta": 0.5,
        "temperature": 1.0,
        "reduction": "mean",
        "return_tokens": False,
        "chunk_bytes": None,
    }
    flat = make_options(vocab=vocab, **defaults | options).flat()
    with Watch() as seen:
        module._forward(x, w, bias, torch.arange(rows) % vocab, weights, None, *needs, None, False, *flat)
    return seen


def test_no_logits_of_all_rows_exist_and_no_gradient_of_a_frozen_head() -> None:
    rows, vocab, budget = 512, 3000, 12 * 4 * 3000
    head = vocab * 8 * 4
    assert watched(rows, vocab, (True, True, True), None, chunk_bytes=budget).most <= max(head, budget)
    assert watched(4, 300, (True, False, False), None).most == 300 * 8 * 4  # w itself
    assert watched(2, 300, (True, False, False), None).names.isdisjoint({"aten::nonzero"})


def test_the_host_waits_only_to_gather_rows() -> None:
    """On a CPU the loop looks at one number a block for infinite losses; on a GPU it does not."""
    weights = torch.tensor([1.0, 0, 2, 0.5])
    assert "aten::nonzero" in watched(4, 40, (True, True, False), weights).names
    assert "aten::nonzero" not in watched(4, 40, (True, True, False), weights, compact=False).names
    assert "aten::nonzero" not in watched(4, 40, (True, True, False), None).names


def test_autocast_rounds_the_operands() -> None:
    x, w, _ = make(torch.float32)
    labels = make_labels(None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, w, labels)
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (x, w)]
    truth = reference(*rounded, labels)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    for got, want in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(truth, rounded), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=6e-3, atol=6e-3 * want.abs().max().item())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "x": ({"x": torch.zeros(1, 3, 4)}, r"x has shape \(1, 3, 4\)"),
    "w": ({"w": torch.zeros(7, 5)}, "w has hidden size 5 but x has 4"),
    "labels": ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels has shape \(2,\)"),
    "no labels": ({"labels": None}, "labels is a NoneType: give an int64 tensor"),
    "dtype": ({"labels": torch.zeros(3)}, "labels has dtype torch.float32"),
    "bias": ({"bias": torch.zeros(6)}, r"bias has shape \(6,\)"),
    "by_probability": ({"by_probability": 1}, "by_probability=1 is not a bool"),
    "ignore_index": ({"ignore_index": 0.5}, "ignore_index=0.5 is not an integer"),
    "reduction": ({"reduction": "avg"}, "reduction='avg' is unknown"),
    "vocab_size": ({"vocab_size": 8}, "vocab_size=8 must be in 1..7"),
}


@pytest.mark.parametrize("which", list(BAD))
def test_bad_inputs_are_named(which: str) -> None:
    wrong, message = BAD[which]
    call: dict[str, Any] = {"x": torch.zeros(3, 4), "w": torch.zeros(7, 4), "labels": torch.zeros(3).long()} | wrong
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(call.pop("x"), call.pop("w"), call.pop("labels"), **call)
