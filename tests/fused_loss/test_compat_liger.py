"""Liger-shaped classes against float64 written out, and against the code of Liger if it is installed."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sdft_kernels.compat.liger as liger
import torch
from sdft_kernels import chunks
from sdft_kernels.compat import log_space
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

BETAS = (0.0, 0.1, 0.5, 1.0)
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 6e-3}
IGNORED = {
    "none ignored": [3, 0, 10, 5, 7, 1, 2],
    "some ignored": [3, -100, 10, 5, -100, -100, 2],
    "all ignored": [-100] * 7,
}
Values = dict[str, Tensor]


def make(dtype: torch.dtype = torch.float64, rows: int = 7, vocab: int = 11, hidden: int = 5) -> Values:
    """Student and teacher of other hidden sizes, biases, and log-probabilities of both."""
    gen = torch.Generator().manual_seed(rows * 101 + vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    made = {
        "x": normal(rows, hidden), "w": normal(vocab, hidden), "bias": normal(vocab),
        "tx": normal(rows, hidden + 2), "tw": normal(vocab, hidden + 2) / 2, "tbias": normal(vocab),
        "log_p": normal(rows, vocab).log_softmax(-1), "log_q": normal(rows, vocab).log_softmax(-1),
    }  # fmt: skip
    return {k: v.to(dtype) for k, v in made.items()}


def rows_truth(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """(N,) divergences of log-probabilities p (student) and q (teacher), by the definitions."""
    if beta == 0:
        return (q.exp() * (q - p)).sum(-1)
    if beta == 1:
        return (p.exp() * (p - q)).sum(-1)
    log_m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * (q.exp() * (q - log_m)).sum(-1) + (1 - beta) * (p.exp() * (p - log_m)).sum(-1)


def mean_truth(values: Tensor, labels: Tensor | None, ignore_index: int = -100) -> Tensor:
    if labels is None:
        return values.mean()
    return values[labels != ignore_index].sum() / max(1, int((labels != ignore_index).sum()))


def fused_truth(
    v: Values, labels: Tensor | None, beta: float, temperature: float, ignore_index: int = -100
) -> tuple[Tensor, Tensor | None]:
    """Soft and hard part of hidden states."""
    s, t = v["x"] @ v["w"].T, v["tx"] @ v["tw"].T
    s, t = s + v["bias"] if "bias" in v else s, t + v["tbias"] if "tbias" in v else t
    vocab = min(s.shape[1], t.shape[1])
    p, q = ((z[:, :vocab] / temperature).log_softmax(-1) for z in (s, t))
    soft = mean_truth(rows_truth(p, q.detach(), beta), labels, ignore_index)
    if labels is None:
        return soft, None
    chosen = s.log_softmax(-1).gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    return soft, mean_truth(-chosen, labels, ignore_index)


def leaves_of(v: Values, names: str, dtype: torch.dtype | None = None) -> Values:
    """Copies, those of `names` requiring a gradient."""
    copies = {k: t.detach().clone().to(dtype or t.dtype) for k, t in v.items()}
    return {k: t.requires_grad_(k in names.split()) for k, t in copies.items()}


def grads_of(loss: Tensor, v: Values) -> Values:
    leaves = {k: t for k, t in v.items() if t.requires_grad}
    made = torch.autograd.grad(loss, list(leaves.values()))
    assert all(g.dtype == leaf.dtype for g, leaf in zip(made, leaves.values(), strict=True))
    return dict(zip(leaves, made, strict=True))


def check(ours: Tensor, ours_v: Values, truth: Tensor, truth_v: Values, bound: float) -> None:
    """Value and all gradients."""
    pairs = {"loss": (ours.detach(), truth.detach())}
    a, b = grads_of(ours * 1.5, ours_v), grads_of(truth * 1.5, truth_v)  # an upstream gradient that is not 1
    pairs |= {k: (a[k], b[k]) for k in b}
    for name, (got, want) in pairs.items():
        atol = bound * max(want.abs().max().item(), 1e-3)
        torch.testing.assert_close(
            got.double(), want.double(), rtol=bound, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def label_tensor(name: str) -> Tensor:
    return torch.tensor(IGNORED[name])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one or two of seven rows."""
    monkeypatch.setattr(chunks, "CACHE_BYTES", 400)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("ignored", list(IGNORED))
@pytest.mark.parametrize("beta", BETAS)
def test_chunked(beta: float, ignored: str, dtype: torch.dtype) -> None:
    v, labels = make(dtype), label_tensor(ignored)
    ours, exact = leaves_of(v, "x w bias"), leaves_of(v, "x w bias", torch.float64)
    for hard, soft, temperature in ((0.5, 0.5, 1.0), (0.3, 0.9, 2.0), (0.0, 1.0, 0.7)):
        module = liger.LigerFusedLinearJSDLoss(hard, soft, beta, temperature=temperature, return_soft_hard_loss=True)
        four = [ours[k] for k in ("x", "w", "tx", "tw")]
        loss, got_soft, got_hard = module(*four, labels, ours["bias"], ours["tbias"])
        want_soft, want_hard = fused_truth(exact, labels, beta, temperature)
        assert want_hard is not None
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got_soft.double(), want_soft, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
        torch.testing.assert_close(got_hard.double(), want_hard, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
        check(loss, ours, hard * want_hard + soft * want_soft, exact, BOUNDS[dtype])
        module.return_soft_hard_loss = False
        assert module(*four, labels, ours["bias"], ours["tbias"]).item() == loss.item()


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("ignored", [None, *IGNORED])
@pytest.mark.parametrize("beta", BETAS)
def test_fused(beta: float, ignored: str | None, dtype: torch.dtype) -> None:
    v = {k: t for k, t in make(dtype).items() if "bias" not in k}
    labels = None if ignored is None else label_tensor(ignored)
    ours, exact = leaves_of(v, "x w"), leaves_of(v, "x w", torch.float64)
    loss = liger.LigerFusedLinearJSD(beta, temperature=1.7)(*(ours[k] for k in ("x", "w", "tx", "tw")), labels)
    check(loss, ours, fused_truth(exact, labels, beta, 1.7)[0], exact, BOUNDS[dtype])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("ignored", [None, *IGNORED])
@pytest.mark.parametrize("beta", BETAS)
def test_jsd(beta: float, ignored: str | None, dtype: torch.dtype) -> None:
    """The gradient is with respect to the log-probabilities themselves, normalised or not."""
    v = make(dtype)
    labels = None if ignored is None else label_tensor(ignored)
    for shift in (0.0, 0.25):
        given = {"log_p": v["log_p"] + shift, "log_q": v["log_q"] - shift}
        ours, exact = leaves_of(given, "log_p"), leaves_of(given, "log_p", torch.float64)
        loss = liger.LigerJSD(beta)(ours["log_p"], ours["log_q"], labels)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        truth = mean_truth(rows_truth(exact["log_p"], exact["log_q"], beta), labels)
        check(loss, ours, truth, exact, BOUNDS[dtype])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("reduction", liger.KL_REDUCTIONS)
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div(log_target: bool, reduction: str, dtype: torch.dtype) -> None:
    v = make(dtype)
    v = {"log_p": v["log_p"], "q": v["log_q"] if log_target else v["log_q"].exp()}
    v["q"][2, 3] = -math.inf if log_target else 0.0
    ours, exact = leaves_of(v, "log_p"), leaves_of(v, "log_p", torch.float64)
    module = liger.LigerKLDIVLoss(reduction=reduction, log_target=log_target)
    assert isinstance(module, nn.KLDivLoss)
    got = module(ours["log_p"], ours["q"])
    q = exact["q"].exp() if log_target else exact["q"]
    entries = torch.where(q == 0, 0.0, q * (q.log() - exact["log_p"]))
    want = {"none": entries, "sum": entries.sum(), "mean": entries.mean(), "batchmean": entries.sum() / 7}[reduction]
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
    factor = torch.arange(77.0).reshape(7, 11).double() if reduction == "none" else 1.0
    check((got * factor).sum(), ours, (want * factor).sum(), exact, BOUNDS[dtype])


def test_eps_bounds_the_logarithm_of_the_target() -> None:
    q, p = torch.tensor([[1e-5, 1 - 1e-5]]), torch.tensor([[-2.0, -3.0]])
    loss = liger.LigerKLDIVLoss(1e-3, reduction="none")(p, q)
    assert loss[0, 0].item() == pytest.approx(1e-5 * (math.log(1e-3) + 2.0))


def test_zero_probabilities_are_no_nan() -> None:
    """Where Liger multiplies 0 by infinity."""
    p = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]).log()
    q = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]]).log()
    for beta, finite in ((0.0, True), (0.4, True), (1.0, False)):  # row 1: the teacher forbids what the student allows
        log_p = p.clone().requires_grad_()
        loss = liger.LigerJSD(beta)(log_p, q)
        assert loss.isfinite() if finite else loss.item() == math.inf
        (grad,) = torch.autograd.grad(loss, log_p)
        assert grad.isfinite().all()
        assert finite or not grad[1].any()
    assert liger.LigerKLDIVLoss(reduction="sum")(p, q.exp()).isfinite()


def test_forward_kl_that_is_infinite() -> None:
    log_p = torch.tensor([[0.0, -math.inf], [-0.7, -0.7]]).requires_grad_()
    loss = liger.LigerJSD(0.0)(log_p, torch.tensor([[0.5, 0.5], [0.3, 0.7]]).log())
    assert loss.item() == math.inf
    (grad,) = torch.autograd.grad(loss, log_p)
    assert grad[0].tolist() == [0.0, 0.0]
    assert grad[1].any()


def test_ignored_rows_hold_anything() -> None:
    v, labels = make(torch.float32), label_tensor("some ignored")
    rows = labels == -100
    for name in ("x", "tx", "log_p", "log_q"):
        v[name][rows] = math.nan
    v = leaves_of(v, "x w log_p")
    fused = liger.LigerFusedLinearJSD(0.5)(v["x"], v["w"], v["tx"], v["tw"], labels)
    chunked = liger.LigerFusedLinearJSDLoss()(v["x"], v["w"], v["tx"], v["tw"], labels)
    jsd = liger.LigerJSD(0.3)(v["log_p"], v["log_q"], labels)
    for loss in (fused, chunked, jsd):
        assert loss.isfinite()
        for grad in torch.autograd.grad(loss, [v["log_p"]] if loss is jsd else [v["x"], v["w"]]):
            assert grad.isfinite().all()
            assert grad.shape[0] == 11 or not grad[rows].any()


@pytest.mark.parametrize("ignore_index", [-100, -1, 4])
def test_ignore_index(ignore_index: int) -> None:
    v, labels = make(), torch.tensor([3, 4, ignore_index, 4, 0, ignore_index, 10])
    four = [v[k] for k in ("x", "w", "tx", "tw")]
    bare = {k: t for k, t in v.items() if "bias" not in k}
    want = fused_truth(bare, labels, 0.5, 1.0, ignore_index)
    got = liger.LigerFusedLinearJSDLoss(ignore_index=ignore_index, return_soft_hard_loss=True)(*four, labels)
    torch.testing.assert_close(got[1:], want)
    torch.testing.assert_close(liger.LigerFusedLinearJSD(ignore_index=ignore_index)(*four, labels), want[0])


@pytest.mark.parametrize("more", ["w", "tw"])
def test_padded_vocabularies(more: str) -> None:
    """The rows that only one head has are no tokens of the divergence; a logit of 0 would make them likely ones."""
    v = {k: t for k, t in make().items() if "bias" not in k}
    v[more] = torch.cat([v[more], 3 * torch.ones(2, v[more].shape[1]).double()])
    ours, exact = leaves_of(v, "x w"), leaves_of(v, "x w")
    labels = label_tensor("some ignored")
    loss = liger.LigerFusedLinearJSDLoss(0.2, 0.8, 0.5)(*(ours[k] for k in ("x", "w", "tx", "tw")), labels)
    soft, hard = fused_truth(exact, labels, 0.5, 1.0)
    assert hard is not None
    check(loss, ours, 0.2 * hard + 0.8 * soft, exact, 1e-11)


def test_batches_of_sequences() -> None:
    v = make(rows=6)
    labels = torch.tensor([1, -100, 3, 4, 5, -100])
    for module in (liger.LigerFusedLinearJSD(0.5), liger.LigerFusedLinearJSDLoss()):
        flat = module(v["x"], v["w"], v["tx"], v["tw"], labels)
        whole = module(v["x"].view(2, 3, -1), v["w"], v["tx"].view(2, 3, -1), v["tw"], labels.view(2, 3))
        assert flat.item() == whole.item()


def test_the_teacher_may_require_grad() -> None:
    """Other trainers pass teacher.lm_head.weight without detach()."""
    v = leaves_of(make(), "x w tx tw tbias log_p log_q")
    labels = label_tensor("none ignored")
    four = [v[k] for k in ("x", "w", "tx", "tw")]
    liger.LigerFusedLinearJSDLoss()(*four, labels, None, v["tbias"]).backward()
    liger.LigerFusedLinearJSD()(*four).backward()
    liger.LigerJSD()(v["log_p"], v["log_q"]).backward()
    liger.LigerKLDIVLoss(log_target=True)(v["log_p"], v["log_q"]).backward()
    assert all(v[k].grad is None for k in ("tx", "tw", "tbias", "log_q"))
    assert all(v[k].grad is not None for k in ("x", "w", "log_p"))


def losses(v: Values) -> list[Tensor]:
    """One of every class."""
    labels, four = label_tensor("some ignored").to(v["x"].device), [v[k] for k in ("x", "w", "tx", "tw")]
    return [
        liger.LigerFusedLinearJSDLoss(0.4, 0.6)(*four, labels, v["bias"], v["tbias"]),
        liger.LigerFusedLinearJSD(0.3)(*four, labels),
        liger.LigerJSD(0.3)(v["log_p"], v["log_q"], labels),
        liger.LigerKLDIVLoss(log_target=True)(v["log_p"], v["log_q"]),
    ]


@pytest.mark.parametrize("which", range(4))
def test_a_second_backward_and_no_double_one(which: int) -> None:
    v = leaves_of(make(), "x w bias log_p")
    loss = losses(v)[which]
    leaves = [t for t in v.values() if t.requires_grad]
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    assert any(a is not None for a in first)
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, 3 * b)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)


@pytest.mark.parametrize("which", range(4))
def test_checkpointing(which: int) -> None:
    a, b = leaves_of(make(), "x w bias log_p"), leaves_of(make(), "x w bias log_p")
    losses(a)[which].backward()
    checkpoint(lambda: losses(b)[which], use_reentrant=False).backward()
    assert [n for n in a if a[n].grad is not None]
    for name in a:
        torch.testing.assert_close(a[name].grad, b[name].grad)


def test_soft_and_hard_carry_their_own_gradients() -> None:
    """Liger drops their gradients."""
    v, labels = leaves_of(make(), "x w"), label_tensor("some ignored")
    module = liger.LigerFusedLinearJSDLoss(0.4, 0.6, return_soft_hard_loss=True)
    loss, soft, hard = module(v["x"], v["w"], v["tx"], v["tw"], labels)
    leaves = [v["x"], v["w"]]
    whole = torch.autograd.grad(loss, leaves, retain_graph=True)
    parts = torch.autograd.grad(0.6 * soft + 0.4 * hard, leaves)
    torch.testing.assert_close(whole, parts)


def test_parts_of_weight_zero() -> None:
    v, labels = leaves_of(make(), "x w"), label_tensor("some ignored")
    four = [v[k] for k in ("x", "w", "tx", "tw")]
    bare = {k: t for k, t in v.items() if "bias" not in k}
    want_soft, want_hard = fused_truth(bare, labels, 0.5, 1.0)
    assert want_hard is not None
    for hard, soft, want in ((0.0, 1.0, want_soft), (1.0, 0.0, want_hard), (0.0, 0.0, 0 * want_soft)):
        module = liger.LigerFusedLinearJSDLoss(hard, soft, return_soft_hard_loss=True)
        loss, got_soft, got_hard = module(*four, labels)
        torch.testing.assert_close(got_soft, want_soft)
        torch.testing.assert_close(got_hard, want_hard)
        torch.testing.assert_close(
            torch.autograd.grad(loss, v["x"])[0], torch.autograd.grad(want, v["x"], retain_graph=True)[0]
        )
        assert hard or not got_hard.requires_grad


def test_autocast_rounds_the_operands_not_the_logits() -> None:
    v, labels = make(torch.float32), label_tensor("some ignored")
    rounded = {k: t.bfloat16().float() for k, t in v.items()}
    module = liger.LigerFusedLinearJSDLoss(1.0, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(v["x"], v["w"], v["tx"], v["tw"], labels)
    want = module(rounded["x"], rounded["w"], rounded["tx"], rounded["tw"], labels)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


def test_a_batch_without_rows() -> None:
    v, labels = leaves_of(make(rows=0), "x w bias log_p"), torch.empty(0, dtype=torch.int64)
    four = [v[k] for k in ("x", "w", "tx", "tw")]
    for loss in (
        liger.LigerFusedLinearJSDLoss()(*four, labels),
        liger.LigerFusedLinearJSD()(*four),
        liger.LigerJSD()(v["log_p"], v["log_q"]),
        liger.LigerKLDIVLoss()(v["log_p"], v["log_q"]),
    ):
        loss.backward()
        assert loss.item() == 0


@pytest.mark.parametrize("which", range(4))
def test_compiled(which: int) -> None:
    """One graph: every part is an operator."""
    a, b = leaves_of(make(torch.float32), "x w bias log_p"), leaves_of(make(torch.float32), "x w bias log_p")
    torch._dynamo.reset()
    labels = label_tensor("some ignored")
    calls = [
        lambda v: liger.LigerFusedLinearJSDLoss(0.4, 0.6)(*(v[k] for k in ("x", "w", "tx", "tw")), labels, v["bias"]),
        lambda v: liger.LigerFusedLinearJSD(0.3)(*(v[k] for k in ("x", "w", "tx", "tw")), labels),
        lambda v: liger.LigerJSD(0.3)(v["log_p"], v["log_q"], labels),
        lambda v: liger.LigerKLDIVLoss(log_target=True, reduction="batchmean")(v["log_p"], v["log_q"]),
    ]
    eager = calls[which](a)
    compiled = torch.compile(calls[which], backend="aot_eager", fullgraph=True)(b)
    torch.testing.assert_close(compiled, eager)
    eager.backward()
    compiled.backward()
    for name in a:
        torch.testing.assert_close(a[name].grad, b[name].grad)


BAD: list[tuple[str, Any, str]] = [
    ("LigerFusedLinearJSDLoss", {"beta": 1.5}, r"beta=1.5 is outside \[0, 1\]"),
    ("LigerFusedLinearJSDLoss", {"temperature": 0}, "temperature=0 is not a finite number above 0"),
    ("LigerFusedLinearJSDLoss", {"weight_hard_loss": math.nan}, "weight_hard_loss=nan is not a finite number"),
    ("LigerFusedLinearJSDLoss", {"weight_soft_loss": "1"}, "weight_soft_loss='1' is not a finite number"),
    ("LigerFusedLinearJSDLoss", {"ignore_index": None}, "ignore_index=None is not an integer"),
    ("LigerFusedLinearJSD", {"jsd_beta": -0.1}, r"jsd_beta=-0.1 is outside \[0, 1\]"),
    ("LigerFusedLinearJSD", {"temperature": -1.0}, "temperature=-1.0 is not a finite number above 0"),
    ("LigerJSD", {"beta": "half"}, "beta='half' is outside"),
    ("LigerKLDIVLoss", {"reduction": "avg"}, "reduction='avg' is unknown: use one of 'none', 'sum'"),
    ("LigerKLDIVLoss", {"eps": -1.0}, "eps=-1.0 is not a finite number of at least 0"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(liger, name)(**options)


SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(7, 4)}, "student_weight has hidden size 5 but student_input has 4"),
    ({"x": torch.zeros(5)}, "student_input has shape .* must be 2-D"),
    ({"x": torch.zeros(7, 5, dtype=torch.int64)}, "student_input has dtype torch.int64"),
    ({"w": torch.zeros(0, 5)}, "student_weight has no rows"),
    ({"tx": torch.zeros(6, 7)}, "teacher_input has shape .* row n of both must predict the same token"),
    ({"tw": torch.zeros(11, 6)}, "teacher_weight has hidden size 6 but teacher_input has 7"),
    ({"bias": torch.zeros(10)}, r"student_bias has shape \(10,\): it must be \(11,\)"),
    ({"tbias": torch.zeros(10)}, r"teacher_bias has shape \(10,\): it must be \(11,\)"),
    ({"labels": torch.zeros(6, dtype=torch.int64)}, r"true_labels has shape \(6,\): it must be \(7,\)"),
    ({"labels": torch.zeros(7)}, "true_labels has dtype torch.float32: convert it with .long"),
    ({"labels": None}, "true_labels is a NoneType"),
]


@pytest.mark.parametrize(("wrong", "message"), SHAPES)
def test_bad_tensors(wrong: dict[str, Any], message: str) -> None:
    v: dict[str, Any] = {**make(torch.float32), "labels": label_tensor("some ignored"), **wrong}
    with pytest.raises(ValueError, match=message):
        liger.LigerFusedLinearJSDLoss()(*(v[k] for k in ("x", "w", "tx", "tw", "labels", "bias", "tbias")))


def test_bad_pairs() -> None:
    p = torch.zeros(3, 4)
    for module, student, teacher in (
        (liger.LigerJSD(), "log_q", "log_p"),
        (liger.LigerKLDIVLoss(), "y_pred", "y_true"),
    ):
        with pytest.raises(ValueError, match=rf"{teacher} has shape \(3, 5\) but {student} has \(3, 4\)"):
            module(p, torch.zeros(3, 5))
        with pytest.raises(ValueError, match=rf"{student} has shape \(2, 3, 4\): it must be 2-D"):
            module(torch.zeros(2, 3, 4), p)
    with pytest.raises(ValueError, match="shift_labels has shape"):
        liger.LigerJSD()(p, p, torch.zeros(4, dtype=torch.int64))


class Sizes(TorchDispatchMode):
    """Bytes of the largest storage that any operation made."""

    def __init__(self, given: Values) -> None:
        super().__init__()
        self.given = {t.untyped_storage().data_ptr() for t in given.values()}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self.given:
                self.most = max(self.most, value.untyped_storage().nbytes())
        return out


def test_no_logits() -> None:
    """The loops' own functions, since a mode does not see inside an operator; `linear_divergence` has its own test."""
    rows, vocab, hidden = 512, 3000, 8
    v, labels = make(torch.float32, rows, vocab, hidden), torch.arange(512) % 7
    whole = rows * vocab * 4
    with Sizes(v) as seen:
        log_space._jsd(v["log_p"], v["log_q"], labels, None, 0.3, -100)
    assert seen.most <= whole / 2
    with Sizes(v) as seen:
        log_space._kl(v["log_p"], v["log_q"], None, "batchmean", True, 1e-10)
    assert seen.most <= whole / 2
    with Sizes(v) as seen:  # it does see one that is there
        log_space._kl(v["log_p"], v["log_q"], None, "none", True, 1e-10)
    assert seen.most == whole


def test_a_frozen_head_has_no_gradient() -> None:
    v, labels = leaves_of(make(torch.float32, 4, 300, 8), "x"), torch.arange(4)
    liger.LigerFusedLinearJSDLoss()(v["x"], v["w"], v["tx"], v["tw"], labels).backward()
    assert v["w"].grad is None
    assert v["x"].grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT MEASURED ON A GPU: this machine has none")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", range(4))
def test_on_a_gpu(which: int, dtype: torch.dtype) -> None:
    v = make(dtype)
    used = [{"x", "w", "bias"}, {"x", "w"}, {"log_p"}, {"log_p"}][which]
    ours = leaves_of({k: t.cuda() for k, t in v.items()}, " ".join(used))
    exact = leaves_of(v, " ".join(used), torch.float64)
    loss, truth = losses(ours)[which], losses(exact)[which]  # on the CPU in float64: what the tests above hold
    got, want = grads_of(loss, ours), grads_of(truth, exact)
    for name, (a, b) in {"loss": (loss, truth), **{k: (got[k], want[k]) for k in want}}.items():
        assert ((a.detach().double().cpu() - b.detach()).norm() / b.detach().norm()).item() < BOUNDS.get(dtype, 6e-3), (
            name
        )


def test_import_is_slim() -> None:
    code = (
        "import sys, sdft_kernels.compat.liger; "
        "heavy = {'transformers', 'sdft', 'peft', 'datasets', 'triton', 'liger_kernel'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Liger's own code. It is in no extra of ours: PATH_TO_A_VENV/bin/python -m pytest tests/fused_loss/test_compat_liger.py

SIGNATURES = ("LigerFusedLinearJSDLoss", "LigerFusedLinearJSD", "LigerJSD", "LigerKLDIVLoss")


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    pytest.importorskip("liger_kernel", reason="liger-kernel 0.8.5 is not installed: Liger's own code was not compared")
    from liger_kernel import chunked_loss, transformers

    return {n: getattr(chunked_loss if n.endswith("JSDLoss") else transformers, n) for n in SIGNATURES}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_theirs(name: str, theirs: dict[str, Any]) -> None:
    """Names, order and defaults; a default more (shift_labels=None) does no harm."""
    import inspect

    for method in ("__init__", "forward"):
        ours = inspect.signature(getattr(getattr(liger, name), method)).parameters
        want = inspect.signature(getattr(theirs[name], method)).parameters
        assert list(ours) == list(want)
        for key, parameter in want.items():
            if parameter.default is not parameter.empty:
                assert ours[key].default == parameter.default, key


@pytest.mark.parametrize("ignored", list(IGNORED))
@pytest.mark.parametrize("beta", BETAS)
def test_chunked_as_theirs(beta: float, ignored: str, theirs: dict[str, Any]) -> None:
    labels = label_tensor(ignored)
    options = {"beta": beta, "temperature": 1.5, "compiled": False, "chunk_size": 3, "return_soft_hard_loss": True}
    results = []
    for cls in (liger.LigerFusedLinearJSDLoss, theirs["LigerFusedLinearJSDLoss"]):
        v = leaves_of(make(torch.float32), "x w bias")
        loss, soft, hard = cls(0.3, 0.9, **options)(v["x"], v["w"], v["tx"], v["tw"], labels, v["bias"], v["tbias"])
        results.append([loss, soft, hard, *torch.autograd.grad(2 * loss, [v["x"], v["w"], v["bias"]])])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def interpreted() -> None:
    from sdft_kernels.checks import INTERPRETED

    if not INTERPRETED:
        pytest.skip("Liger's Triton classes run on the CPU in Triton's interpreter alone: TRITON_INTERPRET=1")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, on the infinities that their kernels mask
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("ignored", [None, *IGNORED])
@pytest.mark.parametrize("beta", BETAS)
def test_triton_classes_as_theirs(beta: float, ignored: str | None, theirs: dict[str, Any]) -> None:
    labels = None if ignored is None else label_tensor(ignored)
    results = []
    for jsd, fused in (
        (liger.LigerJSD, liger.LigerFusedLinearJSD),
        (theirs["LigerJSD"], theirs["LigerFusedLinearJSD"]),
    ):
        v = leaves_of(make(torch.float32), "x w log_p")
        a = jsd(beta)(v["log_p"], v["log_q"], labels)
        b = fused(beta, temperature=1.5)(v["x"], v["w"], v["tx"], v["tw"], labels)
        results.append([a, *torch.autograd.grad(a, v["log_p"]), b, *torch.autograd.grad(b, [v["x"], v["w"]])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Eps(float):
    """Their kernel calls eps.to, and Triton's interpreter hands it the Python number."""

    def to(self, dtype: Any) -> float:
        return float(self)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", liger.KL_REDUCTIONS)
def test_kl_div_as_theirs(reduction: str, log_target: bool, theirs: dict[str, Any]) -> None:
    v = leaves_of(make(torch.float32), "log_p")
    q = v["log_q"] if log_target else v["log_q"].exp()
    options = {"reduction": reduction, "log_target": log_target}
    a = liger.LigerKLDIVLoss(1e-2, **options)(v["log_p"], q)
    b = theirs["LigerKLDIVLoss"](Eps(1e-2), **options)(v["log_p"], q)
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad((loss * loss).sum(), v["log_p"])[0] for loss in (a, b)))


@pytest.mark.usefixtures("theirs")
def test_the_docs_numbers_come_from_a_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.integrations import liger as numbers

    for name, small in {"ROWS": 16, "VOCAB": 512, "HIDDEN": 32}.items():
        monkeypatch.setattr(numbers, name, small)
    numbers.errors()
    numbers.padded()
    lines = capsys.readouterr().out.splitlines()
    found = {side: [ln for ln in lines if f" {side} " in ln] for side in ("ours", "Liger chunked")}
    percent = {
        side: [float(n[:-1]) for ln in here for n in ln.split() if n.endswith("%")] for side, here in found.items()
    }
    assert len(percent["ours"]) == len(percent["Liger chunked"]) == 9
    assert max(percent["ours"]) < 0.5 < min(percent["Liger chunked"])
    assert abs(float(found["ours"][-1].split()[-1])) < 1e-6 < float(found["Liger chunked"][-1].split()[-1])


def test_the_docs_name_every_class() -> None:
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    assert all(f"`{name}`" in page for name in SIGNATURES)
