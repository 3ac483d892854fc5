"""A teacher known by its top-k log-probabilities, against the dense reference in float64; docs/topk.md's claims."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdft_kernels import TopkStats, divergence, linear_topk_divergence, topk_divergence
from sdft_kernels.reference import dense_logits, divergence_reference, topk_divergence_reference
from sdft_kernels.topk import make_options, read_teacher
from torch import Tensor
from torch.library import opcheck

NAMES = ("reverse_kl", "forward_kl", "jsd")
TAILS = ("bucket", "renormalise")
EPS = {torch.float64: 1e-10, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
N, V, H, K = 23, 61, 9, 6


def make(rows: int = N, vocab: int = V, k: int = K, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, and the k best of a random teacher: ids and log-probabilities, float64."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, H, generator=gen, dtype=torch.float64)
    w = torch.randn(vocab, H, generator=gen, dtype=torch.float64) / 2
    teacher = (2 * torch.randn(rows, vocab, generator=gen, dtype=torch.float64)).log_softmax(1)
    logprobs, ids = teacher.topk(k)
    return x, w, ids, logprobs


def ragged(ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as servers send them: short ones, repeats, ids of a padded vocabulary, in any order."""
    ids, logprobs = ids.flip(1), logprobs.flip(1)
    ids[1, 3:] = -1
    logprobs[2, 1] = -math.inf
    ids[5, 4] = ids[5, 1]
    logprobs[5, 4] = -0.01  # the second entry of an id, which does not count
    ids[4, 0] = V + 2
    return ids, logprobs


def close(ours: Tensor, truth: Tensor, bound: float) -> None:
    torch.testing.assert_close(ours.double(), truth, rtol=bound, atol=bound * max(truth.abs().max().item(), 1e-3))


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_against_the_reference(name: str, tail: str, dtype: torch.dtype, reduction: str) -> None:
    x, w, ids, logprobs = make()
    ids, logprobs = ragged(ids, logprobs)
    weights = torch.arange(float(N)) % 3
    bias = torch.linspace(-1, 1, V, dtype=torch.float64)
    common: dict[str, Any] = {"divergence": name, "beta": 0.3, "tail": tail, "reduction": reduction}
    common |= {"token_weights": weights}
    act = {"scale": 0.8, "softcap": 3.0, "temperature": 1.4}
    leaves = [t.to(dtype).requires_grad_() for t in (x, w, bias)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    options = make_options(divergence=name, beta=0.3, reduction="mean", vocab=V, return_tokens=False, chunk_bytes=None,
                           **act)  # fmt: skip
    logits = dense_logits(*exact, options.student, V)
    truth = topk_divergence_reference(logits, ids, logprobs, **common)
    ours = linear_topk_divergence(
        leaves[0], leaves[1], ids.int(), logprobs, bias=leaves[2], chunk_bytes=10_000, **act, **common
    )
    close(ours, truth, EPS[dtype])
    upstream = torch.linspace(-1, 2, N) if reduction == "none" else torch.tensor(-3.0)
    wanted = torch.autograd.grad((truth * upstream).sum(), [*exact], retain_graph=True)
    for ours_grad, grad in zip(torch.autograd.grad((ours * upstream).sum(), leaves), wanted, strict=True):
        assert ours_grad.dtype == dtype
        close(ours_grad, grad, EPS[dtype])
    ready = logits.detach().to(dtype).requires_grad_()
    exact_ready = ready.detach().double().requires_grad_()
    truth = topk_divergence_reference(exact_ready, ids, logprobs, **common)
    ours = topk_divergence(ready, ids, logprobs, chunk_bytes=10_000, **common)
    close(ours, truth, EPS[dtype])
    (grad,) = torch.autograd.grad((truth * upstream).sum(), exact_ready)
    close(torch.autograd.grad((ours * upstream).sum(), ready)[0], grad, EPS[dtype])


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_gradcheck(name: str, tail: str, k: int) -> None:
    x, w, ids, logprobs = make(5, 7, k)
    bias = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def f(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return linear_topk_divergence(x, w, ids, logprobs, bias=bias, divergence=name, tail=tail, softcap=2.0)

    # The first backward scales what the forward made, later ones compute it again: a rounding apart.
    assert torch.autograd.gradcheck(f, tuple(t.requires_grad_() for t in (x, w, bias)), nondet_tol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    vocab=st.integers(2, 40),
    scale=st.floats(0.01, 12),
    seed=st.integers(0, 10**6),
    name=st.sampled_from(NAMES),
    beta=st.floats(0.05, 0.95),
)
def test_the_bucket_bounds_the_full_divergence_from_below_and_grows_with_k(
    vocab: int, scale: float, seed: int, name: str, beta: float
) -> None:
    gen = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(3, vocab, generator=gen, dtype=torch.float64) for _ in range(2))
    options: dict[str, Any] = {"divergence": name, "beta": beta, "reduction": "none"}
    full = divergence_reference(s, t, **options)
    logprobs, ids = t.log_softmax(1).sort(descending=True)
    before = torch.zeros(3, dtype=torch.float64)
    for k in range(1, vocab + 1):
        value = topk_divergence(s, ids[:, :k], logprobs[:, :k], tail_floor=0.0, **options)
        # Rounding of 1 − Σq, 2e-16 of mass, is all that a teacher's tail below it can be: those k are skipped.
        known = logprobs[:, :k].logsumexp(1).exp() < 1 - 1e-6
        if k == vocab:
            torch.testing.assert_close(value, full, rtol=1e-9, atol=1e-12)
            known = torch.ones(3, dtype=torch.bool)
        slack = 1e-9 * (1 + full)
        assert (value <= full + slack)[known].all()
        assert (value >= before - slack)[known].all()
        before = torch.where(known, value, before)


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_named_is_the_full_divergence(name: str) -> None:
    x, w, ids, logprobs = make(k=V)
    logits = (x @ w.T).requires_grad_()
    teacher = torch.empty_like(logprobs).scatter_(1, ids, logprobs)
    full = divergence(logits, teacher, divergence=name)
    (grad,) = torch.autograd.grad(full, logits)
    for tail in TAILS:
        ours = topk_divergence(logits, ids, logprobs, divergence=name, tail=tail)
        torch.testing.assert_close(ours, full)
        torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], grad)


@pytest.mark.parametrize("gap", [-40.0, -12.0, 0.0, 12.0, 40.0])
def test_the_students_tail_keeps_its_digits_near_0_and_near_1(gap: float) -> None:
    """In float32, against float64: values and gradients of the tail's tokens, relative."""
    logits = torch.tensor([[gap, 0.3, -0.2, 0.1]])
    ids, logprobs = torch.tensor([[0]]), torch.tensor([[math.log(0.5)]])
    for name in NAMES:
        leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        ours, tokens = topk_divergence(leaf, ids, logprobs, divergence=name, return_tokens=True)
        truth = topk_divergence_reference(exact, ids, logprobs.double(), divergence=name)
        torch.testing.assert_close(ours.double(), truth, rtol=5e-6, atol=0)
        grad, want = (torch.autograd.grad(v, t)[0] for v, t in ((ours, leaf), (truth, exact)))
        # The gradient of a nearly sure event is p·(r − D), a small difference; that of the others is p·r, exact.
        rare = slice(1, 4) if gap >= 0 else slice(0, 1)
        torch.testing.assert_close(grad[:, rare].double(), want[:, rare], rtol=2e-5, atol=0)
        torch.testing.assert_close(grad.double(), want, rtol=0, atol=1e-7)
        away = logits.double().softmax(1)[:, 1:].sum(1)
        torch.testing.assert_close(tokens.student_tail.double(), away, rtol=1e-6, atol=0)


def test_the_teachers_tail_keeps_its_digits_and_has_a_floor() -> None:
    small = 3e-6
    logprobs = torch.tensor([[math.log1p(-small)], [0.0], [1e-7]])
    ids = torch.zeros(3, 1, dtype=torch.int64)
    mass = read_teacher(ids, logprobs, 5, torch.float32).mass
    assert mass[0].item() == pytest.approx(small, rel=1e-6)
    assert mass[1:].tolist() == pytest.approx([0.0, -1e-7])
    logits = torch.zeros(3, 5, requires_grad=True)
    loss, tokens = topk_divergence(logits, ids, logprobs, reduction="none", return_tokens=True)
    assert tokens.teacher_tail.tolist() == pytest.approx([small, 0, 0], rel=1e-6)
    assert loss[1].item() == pytest.approx(0.2 * math.log(0.2) + 0.8 * math.log(0.8 / 1e-7), rel=1e-5)
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()
    sure = topk_divergence(logits, ids, logprobs, reduction="none", tail_floor=0.0)
    assert sure.isinf().tolist() == [False, True, True]
    assert (torch.autograd.grad(sure[1:].sum(), logits)[0] == 0).all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
def test_forbidden_tokens(name: str, tail: str) -> None:
    logprobs, ids = torch.tensor([[0.6, 0.3]]).log().expand(4, 2), torch.tensor([[0, 1]]).expand(4, 2)
    logits = torch.zeros(4, 4)
    logits[1, 0] = -math.inf  # a named token
    logits[2, 2:] = -math.inf  # the whole tail, where the teacher has a tenth
    logits[3, :2] = -math.inf  # all named tokens
    leaf = logits.requires_grad_()
    values = topk_divergence(leaf, ids, logprobs, divergence=name, tail=tail, reduction="none")
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    assert grad.isfinite().all()
    infinite = [False, True, tail == "bucket", True] if name == "forward_kl" else [False] * 4
    if tail == "renormalise":
        infinite[3] = True
    assert values.isinf().tolist() == infinite
    assert (grad[values.isinf()] == 0).all()
    # A tail forbidden by the student and empty, but for rounding, in the teacher: they agree.
    sure = torch.tensor([[0.6, 0.4]]).log()
    value = topk_divergence(logits[2:3], ids[:1], sure, divergence=name, tail=tail)
    assert value.isfinite()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_with_nothing_named_and_rows_without_weight(name: str, tail: str) -> None:
    x, w, ids, logprobs = make()
    x[2] = math.nan
    ids[5] = -1
    logprobs[6] = -math.inf
    weights = torch.ones(N)
    weights[2] = 0
    x.requires_grad_()
    options: dict[str, Any] = {"divergence": name, "tail": tail, "return_tokens": True, "token_weights": weights}
    labels = torch.arange(N)
    loss, tokens = linear_topk_divergence(x, w, ids, logprobs, labels=labels, **options)
    assert isinstance(tokens, TopkStats)
    assert (tokens.divergence[[2, 5, 6]] == 0).all()
    assert tokens.student_tail[5:7].tolist() == pytest.approx([1, 1])
    assert tokens.teacher_tail[[2, 5, 6]].tolist() == [0, 1, 1]
    (grad,) = torch.autograd.grad(loss, x)
    assert (grad[[2, 5, 6]] == 0).all()
    live = weights.bool()
    torch.testing.assert_close(loss, tokens.divergence[live].mean())
    want = (x @ w.T).detach().log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(tokens.student_logprob[live], want[live])
    empty = linear_topk_divergence(x[:0], w, ids[:0], logprobs[:0], divergence=name, tail=tail)
    assert empty.item() == 0
    assert torch.autograd.grad(empty, x)[0].abs().sum() == 0


def test_a_padded_vocabulary() -> None:
    x, w, ids, logprobs = make()
    ids, logprobs = ragged(ids, logprobs)
    w.requires_grad_()
    padded = torch.cat([w.detach(), 100 * torch.ones(5, H, dtype=w.dtype)]).requires_grad_()
    ours = linear_topk_divergence(x, padded, ids, logprobs, vocab_size=V)
    want = linear_topk_divergence(x, w, ids, logprobs)
    assert torch.equal(ours, want)
    (grad,) = torch.autograd.grad(ours, padded)
    assert torch.equal(grad[:V], torch.autograd.grad(want, w)[0])
    assert (grad[V:] == 0).all()
    logits = (x @ padded.T).detach().requires_grad_()
    ready = topk_divergence(logits, ids, logprobs, vocab_size=V)
    torch.testing.assert_close(ready, want)
    assert (torch.autograd.grad(ready, logits)[0][:, V:] == 0).all()


def test_a_frozen_head_has_no_gradient_and_a_second_backward_agrees() -> None:
    x, w, ids, logprobs = make()
    x.requires_grad_()
    loss = linear_topk_divergence(x, w, ids, logprobs)
    made = [t for t in loss.grad_fn.saved_tensors if t is not None and t.shape == w.shape]  # type: ignore[union-attr]
    assert len(made) == 1, "w itself, and no dW"
    first, second = (torch.autograd.grad(3 * loss, x, retain_graph=True)[0].clone() for _ in range(2))
    torch.testing.assert_close(first, second)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(loss, x, create_graph=True)
    with torch.no_grad():
        assert linear_topk_divergence(x, w, ids, logprobs).grad_fn is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_rounds_the_operands_and_not_the_logits(reduction: str) -> None:
    x, w, ids, logprobs = (t.float() if t.is_floating_point() else t for t in make())
    leaves = [x.requires_grad_(), w.requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_topk_divergence(x, w, ids, logprobs, reduction=reduction)
    low = [t.detach().bfloat16().requires_grad_() for t in leaves]
    want = linear_topk_divergence(*low, ids, logprobs, reduction=reduction)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want)
    for ours, grad in zip(torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(want.sum(), low), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, grad.float(), rtol=1e-2, atol=1e-4)


def test_the_operator_keeps_the_rules_of_torch_library_and_compiles() -> None:
    x, w, ids, logprobs = (t.float() if t.is_floating_point() else t for t in make())
    x.requires_grad_()
    w.requires_grad_()
    for reduction in ("mean", "none"):
        plain = make_options(divergence="jsd", beta=0.3, temperature=1.0, reduction=reduction, vocab=V,
                             return_tokens=True, chunk_bytes=None).flat()  # fmt: skip
        tokens = (torch.ones(N), torch.arange(N), None)
        for hidden, head, needs in (
            (x, w, (True, True, False)),
            ((x @ w.T).detach().requires_grad_(), None, (True, False, False)),
        ):
            args = (hidden, head, None, ids, logprobs, *tokens, *needs, None, "bucket", 1e-7, *plain)
            opcheck(torch.ops.sdft.topk_divergence.default, args)

    def f(x: Tensor, w: Tensor) -> Tensor:
        return linear_topk_divergence(x * 2, w, ids, logprobs)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(g(x, w), (x, w)) for g in (compiled, f)), strict=True):
        torch.testing.assert_close(a, b)


def test_no_logits_of_all_rows_exist() -> None:
    """The largest tensor made during a call and its backward stays within the budget."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rows, vocab, budget = 512, 2048, 2**19
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(rows, H, generator=gen, requires_grad=True)
    w = torch.randn(vocab, H, generator=gen)
    ids = torch.randint(vocab, (rows, 4), generator=gen)
    logprobs = torch.full((rows, 4), math.log(0.1))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, list | tuple) else [out]:
                if isinstance(t, Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    with Watch():
        linear_topk_divergence(x, w, ids, logprobs, chunk_bytes=budget, softcap=5.0).backward()
    assert 0 < largest <= budget < rows * vocab * 4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"teacher_ids": [[1]]}, "teacher_ids is a list: give a tensor"),
    ({"teacher_ids": torch.zeros(N - 1, K).long()}, r"teacher_ids has shape \(22, 6\): it must be \(23, k\)"),
    ({"teacher_ids": torch.zeros(N, 0).long()}, r"teacher_ids has shape \(23, 0\): .* k of at least 1"),
    ({"teacher_ids": torch.zeros(N, 2).long()}, r"teacher_logprobs has shape \(23, 6\) but teacher_ids has \(23, 2\)"),
    ({"teacher_ids": torch.zeros(N, K)}, "teacher_ids has dtype torch.float32: convert it with .long()"),
    ({"teacher_logprobs": torch.zeros(N, K).long()}, "teacher_logprobs has dtype torch.int64"),
    ({"teacher_logprobs": torch.zeros(N, K, requires_grad=True)}, "teacher_logprobs requires grad"),
    ({"teacher_logprobs": torch.zeros(N, K, device="meta")}, "teacher_logprobs is on meta but x is on cpu"),
    ({"tail": "ignore"}, "tail='ignore' is unknown: use one of 'bucket', 'renormalise'"),
    ({"tail_floor": 1.0}, r"tail_floor=1.0 is outside \[0, 1\)"),
    ({"divergence": "kl"}, "divergence='kl' is unknown"),
    ({"temperature": 0}, "temperature=0 is not a finite number above 0"),
    ({"vocab_size": V + 1}, f"vocab_size={V + 1} must be in 1..{V}"),
    ({"w": torch.zeros(V, H + 1)}, "w has hidden size 10 but x has 9"),
    ({"w": torch.zeros(0, H)}, "w has no rows"),
    ({"bias": torch.zeros(3)}, r"bias has shape \(3,\): it must be \(61,\)"),
    ({"token_weights": torch.ones(N).long()}, "token_weights has dtype torch.int64"),
    ({"labels": torch.ones(N)}, "labels has dtype torch.float32"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    x, w, ids, logprobs = make()
    with pytest.raises(ValueError, match=message):
        linear_topk_divergence(**{"x": x, "w": w, "teacher_ids": ids, "teacher_logprobs": logprobs} | change)
    if not {"w", "bias"} & set(change):
        with pytest.raises(ValueError, match=message.replace("x is on", "student_logits is on")):
            topk_divergence(**{"student_logits": x @ w.T, "teacher_ids": ids, "teacher_logprobs": logprobs} | change)


def descend(loss: Any, logits: Tensor, steps: int = 600, rate: float = 4.0) -> Tensor:
    """The student's probabilities after plain gradient descent on its logits."""
    for _ in range(steps):
        logits = logits.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(logits), logits)
        logits = logits - rate * grad
    return logits.detach().softmax(1)


def test_without_the_tail_reverse_kl_teaches_the_student_to_leave_the_named_tokens() -> None:
    """docs/topk.md: Σ p log(p/q) over the named tokens alone is least, and negative, at p = q/e."""
    _, _, ids, logprobs = make(1, 20, 5)
    q = logprobs.exp()  # 0.9 of the teacher's mass
    rest = torch.full((1, 20), (1 - q.sum().item()) / 15, dtype=q.dtype)
    start = rest.scatter(1, ids, q).log()  # the student is the teacher already, as far as anyone can know

    def ignore_the_tail(logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(1).gather(1, ids)
        return (log_p.exp() * (log_p - logprobs)).sum()

    assert ignore_the_tail(start).item() == pytest.approx(0, abs=1e-12)
    p = descend(ignore_the_tail, start)
    torch.testing.assert_close(p.gather(1, ids), q / math.e, rtol=1e-4, atol=0)
    assert ignore_the_tail(p.log()).item() == pytest.approx(-q.sum().item() / math.e, rel=1e-6)
    logits = start.clone().requires_grad_()
    forward = -(q * logits.log_softmax(1).gather(1, ids)).sum()  # and forward KL without it: into them, all of it
    away = torch.autograd.grad(forward, logits)[0].scatter(1, ids, 0.0).sum().item()
    assert away == pytest.approx(q.sum().item() * (1 - q.sum().item()))
    for tail in TAILS:
        kept = descend(lambda z, t=tail: topk_divergence(z, ids, logprobs, tail=t), start, steps=50)
        torch.testing.assert_close(kept, start.exp())  # already there: nothing moves


@pytest.mark.parametrize("name", NAMES)
def test_the_bucket_finds_the_teacher_and_the_renormalised_form_its_proportions(name: str) -> None:
    _, _, ids, logprobs = make(1, 20, 5)
    q = logprobs.exp()
    start = torch.randn(1, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p = descend(lambda z: topk_divergence(z, ids, logprobs, divergence=name), start)
    torch.testing.assert_close(p.gather(1, ids), q, rtol=1e-3, atol=0)
    p = descend(lambda z: topk_divergence(z, ids, logprobs, divergence=name, tail="renormalise"), start)
    named = p.gather(1, ids)
    torch.testing.assert_close(named / named.sum(), q / q.sum(), rtol=1e-3, atol=0)
    others = torch.ones_like(p).scatter_(1, ids, 0.0).bool()
    before = start.softmax(1)[others]
    torch.testing.assert_close(p[others] / p[others].sum(), before / before.sum())  # no gradient ever reached them
    # Σ of the named logits never changes, so their mass is not free to leave; nor does it come to the teacher's.
    assert abs(named.sum().item() - q.sum().item()) > 0.05


def test_the_example_of_the_docs_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "topk.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["loss"].item() > 0
    assert names["x"].grad.abs().sum() > 0
    assert names["w"].grad.abs().sum() > 0
