"""The operators sdft::linear_divergence and sdft::divergence: compile, autograd, checkpointing, memory, waiting."""

import gc
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sdft_kernels import Divergence, LinearDivergence, divergence, linear_divergence
from sdft_kernels.checks import make_options
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch.library import opcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

IMPLS = ("torch", "triton")
# The module, not the function of the same name that the package exports.
linear_module = importlib.import_module("sdft_kernels.linear_divergence")
logits_module = importlib.import_module("sdft_kernels.divergence")

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def make(rows: int = 4, vocab: int = 40, hidden: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x and w, which require gradients, and the teacher's."""
    gen = torch.Generator().manual_seed(rows + vocab)
    x, w, tx, tw = (torch.randn(n, hidden, generator=gen).to(dtype) for n in (rows, vocab, rows, vocab))
    return [x.requires_grad_(), w.requires_grad_(), tx, tw]


def grads_of(loss: Tensor, tensors: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [t for t in tensors if t.requires_grad], **options)


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, list[StorageWeakRef]]]:
    """One entry per run of a loop: which implementation, its Grads, and its gradients' storages."""
    seen: list[tuple[str, Any, list[StorageWeakRef]]] = []
    run = linear_module.run_linear

    def spy(inputs: Any, options: Any, rows: Any, grads: Any, *rest: Any) -> Any:
        gradients = run(inputs, options, rows, grads, *rest)
        refs = [StorageWeakRef(g.untyped_storage()) for g in gradients.made()]
        seen.append((options.impl, grads, refs))
        return gradients

    monkeypatch.setattr(linear_module, "run_linear", spy)
    return seen


def flat(vocab: int, impl: str, *, compact: bool = True, **options: Any) -> tuple[Any, ...]:
    defaults = {"divergence": "jsd", "beta": 0.3, "temperature": 1.0, "reduction": "mean", "chunk_bytes": None}
    return make_options(**defaults | {"return_tokens": False} | options, vocab=vocab, compact=compact, impl=impl).flat()


OPCHECK: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"reduction": "none"},
    "tokens": {"return_tokens": True, "weighted": True, "labelled": True},
    "frozen": {"needs": (True, False), "return_tokens": True},
    "bf16": {"dtype": torch.bfloat16, "biased": True},
    "fp16": {"dtype": torch.float16, "weighted": True, "compact": False},
}


@pytest.mark.parametrize(
    ("which", "impl"),
    [(which, "torch") for which in OPCHECK]
    # Triton's interpreter takes seconds for each; the operator is the same, only the loop differs.
    + [pytest.param(which, "triton", marks=() if which == "tokens" else pytest.mark.slow) for which in OPCHECK],
)
def test_operators_keep_the_rules_of_torch_library(which: str, impl: str) -> None:
    options = dict(OPCHECK[which])
    dtype, needs = options.pop("dtype", torch.float32), options.pop("needs", (True, True))
    weights = torch.tensor([1.0, 0, 2, 0.5]) if options.pop("weighted", False) else None
    labels = torch.arange(4) if options.pop("labelled", False) else None
    x, w, tx, tw = make(dtype=dtype)
    bias = torch.zeros(40, dtype=dtype, requires_grad=True) if options.pop("biased", False) else None
    w.requires_grad_(needs[1])
    tokens = (weights, labels, None)
    needs = (*needs, bias is not None)
    opcheck(
        torch.ops.sdft.linear_divergence.default,
        (x, w, bias, tx, tw, None, *tokens, *needs, None, *flat(40, impl, **options)),
        rtol=1e-2 if dtype != torch.float32 else None,
        atol=1e-2 if dtype != torch.float32 else None,
    )
    s, t = (x.detach() @ w.detach().T).requires_grad_(), tx @ tw.T
    opcheck(torch.ops.sdft.divergence.default, (s, t, *tokens, True, *flat(40, impl, **options)))


def compiled_against_eager(f: Callable[..., Any], tensors: list[Tensor], backend: Any, **compile_options: Any) -> None:
    fast = torch.compile(f, backend=backend, fullgraph=True, **compile_options)
    eager_out, out = f(*tensors), fast(*tensors)
    torch.testing.assert_close(out, eager_out)
    loss, eager_loss = ((o[0] if isinstance(o, tuple) else o).square().sum() for o in (out, eager_out))
    for a, b in zip(grads_of(loss, tensors), grads_of(eager_loss, tensors), strict=True):
        torch.testing.assert_close(a, b)


COMPILED: dict[str, dict[str, Any]] = {
    "mean": {},
    "none": {"reduction": "none", "token_weights": torch.tensor([1.0, 0, 2, 0.5])},
    "tokens": {"return_tokens": True, "labels": torch.arange(4), "divergence": "jsd"},
    "weights": {"token_weights": torch.tensor([1.0, 0, 2, 0.5]), "compact": False},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("which", list(COMPILED))
def test_compiled_equals_eager_and_is_one_opaque_operator(which: str, impl: str) -> None:
    backend = AotEagerAndRecordGraphs()

    def f(x: Tensor, w: Tensor, tx: Tensor, tw: Tensor) -> Any:
        return linear_divergence(x * 2, w, tx, tw, impl=impl, **COMPILED[which])

    compiled_against_eager(f, make(), backend)
    assert len(backend.graphs) == 1
    (forward,), (backward,) = backend.fw_graphs, backend.bw_graphs
    ours = [str(n.target) for n in forward.graph.nodes if "sdft" in str(n.target)]
    assert ours == ["sdft.linear_divergence.default"]
    assert not any(op in forward.code for op in ("softmax", "aten.mm", "aten.exp", "nonzero"))
    again = [n for n in backward.graph.nodes if "sdft" in str(n.target)]
    assert len(again) == (1 if which == "none" else 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_ready_logits(impl: str) -> None:
    s, t = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    for options in ({"reduction": "none"}, {"return_tokens": True, "temperature": 2.0}):
        compiled_against_eager(lambda a, b, o=options: divergence(a, b, impl=impl, **o), [s, t], "aot_eager")
    compiled_against_eager(Divergence(impl=impl), [s, t], "aot_eager")
    with pytest.raises(Exception, match="inplace=True does not work under torch"):
        torch.compile(lambda a, b: divergence(a, b, inplace=True, impl=impl), backend="eager", fullgraph=True)(s, t)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    def f(x: Tensor, w: Tensor, tx: Tensor, tw: Tensor) -> Any:
        return linear_divergence(x * 2 + 1, w, tx, tw, impl="triton") * 0.5

    compiled_against_eager(f, make(), "inductor")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_new_number_of_tokens_does_not_recompile(impl: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    module = LinearDivergence(impl=impl, reduction="sum")
    fast = torch.compile(module, backend=counter, fullgraph=True)
    _, w, _, tw = make()
    for rows in (3, 5, 2, 7):
        x, _, tx, _ = make(rows)
        tensors = [x, w, tx, tw]
        got, want = fast(*tensors), module(*tensors)
        torch.testing.assert_close(got, want)
        for a, b in zip(grads_of(got, tensors), grads_of(want, tensors), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2  # the first N as it is, then any N


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_around_and_inside_a_compiled_function(impl: str) -> None:
    tensors = make()

    def inside(*four: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_divergence(*four, impl=impl)

    def bare(*four: Tensor) -> Tensor:
        return linear_divergence(*four, impl=impl)

    exact, want = bare(*tensors), inside(*tensors)
    assert exact != want
    assert want.dtype == torch.float32
    want_grads = grads_of(want, tensors)
    got = torch.compile(inside, backend="aot_eager", fullgraph=True)(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = torch.compile(bare, backend="aot_eager", fullgraph=True)(*tensors)
    for loss in (got, around):
        torch.testing.assert_close(loss, want)
        for a, b in zip(grads_of(loss, tensors), want_grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_runs_the_loop_twice(reentrant: bool, impl: str, loops: list[Any]) -> None:
    tensors = make()

    def f(x: Tensor, w: Tensor) -> Tensor:
        return linear_divergence(x.tanh(), w, *tensors[2:], impl=impl) * 3.0

    plain = grads_of(f(*tensors[:2]), tensors)
    loops.clear()
    x, w = (t.detach().clone().requires_grad_() for t in tensors[:2])
    checkpoint(f, x, w, use_reentrant=reentrant).backward()
    assert [impl_ for impl_, *_ in loops] == [impl, impl]
    if reentrant:  # its forward knows that no gradient is wanted yet
        assert not loops[0][1]
    for a, b in zip((x.grad, w.grad), plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_hands_over_the_buffers_of_the_forward(impl: str, loops: list[Any]) -> None:
    for factor in (1.0, 2.0**16, -0.25):
        tensors = make()
        loss = linear_divergence(*tensors, impl=impl)
        want = [factor * g.clone() for g in grads_of(linear_divergence(*tensors, impl=impl), tensors)]
        loops.clear()
        loss = linear_divergence(*tensors, impl=impl)
        (loss * factor).backward()
        assert len(loops) == 1
        buffers = [storage.cdata for storage in loops[0][2]]
        for tensor, exact, buffer in zip(tensors, want, buffers, strict=False):
            torch.testing.assert_close(tensor.grad, exact)
            assert StorageWeakRef(tensor.grad.untyped_storage()).cdata == buffer, "a copy was made"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_scaler(impl: str, dtype: torch.dtype) -> None:
    """fp16 gradients that a scaler makes visible are not lost before its factor arrives."""
    tensors = make(dtype=dtype)
    exact = [t.detach().float().requires_grad_(t.requires_grad) for t in tensors]
    small = 1e-6
    truth = grads_of(linear_divergence(*exact, impl="torch") * small, exact)
    scaled = grads_of(linear_divergence(*tensors, impl=impl) * small * 2.0**20, tensors)
    for got, want in zip(scaled, truth, strict=True):
        assert got.dtype == dtype
        assert (got.float() / 2.0**20 - want).norm() < 5e-3 * want.norm()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_is_right_and_leaves_the_first_alone(impl: str, reduction: str, loops: list[Any]) -> None:
    tensors = make()
    loss = linear_divergence(*tensors, impl=impl, reduction=reduction).sum()
    want = [g.clone() for g in grads_of(linear_divergence(*tensors, impl=impl, reduction=reduction).sum(), tensors)]
    loops.clear()
    (3.0 * loss).backward(retain_graph=True)
    first = [t.grad.clone() for t in tensors[:2]]
    second = grads_of(loss, tensors, grad_outputs=torch.tensor(-2.0), retain_graph=True)
    third = grads_of(loss, tensors)
    for t, one, two, three, exact in zip(tensors, first, second, third, want, strict=False):
        torch.testing.assert_close(one, 3 * exact)
        torch.testing.assert_close(two, -2 * exact)
        torch.testing.assert_close(three, exact)
        assert torch.equal(t.grad, one)
    assert len(loops) == (2 if reduction == "mean" else 3)


@pytest.mark.parametrize("impl", IMPLS)
def test_double_backward_is_refused_by_name(impl: str) -> None:
    tensors = make()
    for reduction in ("mean", "none"):
        loss = linear_divergence(*tensors, impl=impl, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="linear_divergence has no double backward"):
            grads_of(loss, tensors, create_graph=True)
        s, t = (tensors[0] @ tensors[1].T).detach().requires_grad_(), torch.randn(4, 40)
        with pytest.raises(RuntimeError, match="divergence has no double backward"):
            torch.autograd.grad(divergence(s, t, impl=impl, reduction=reduction).sum(), s, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradients_without_grad_mode(impl: str, loops: list[Any]) -> None:
    tensors = make()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not linear_divergence(*tensors, impl=impl).requires_grad
            s = tensors[0] @ tensors[1].T
            kept = s.clone()
            divergence(s, s.flip(0), impl=impl, inplace=True)
            assert torch.equal(s, kept)
    frozen = [t.detach() for t in tensors]
    linear_divergence(*frozen, impl=impl)
    assert [bool(grads) for _, grads, _ in loops] == [False] * 3
    one = [tensors[0], *frozen[1:]]
    linear_divergence(*one, impl=impl).backward()
    assert loops[-1][1] == linear_module.Grads(x=True)
    assert math.isfinite(one[0].grad.sum())


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_outlives_its_use(impl: str, loops: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Triton's interpreter holds a kernel's arguments in a reference cycle; only scale_ gives it a gradient.
    monkeypatch.setattr("sdft_kernels.row_kernels.scale_", lambda x, factor: x.mul_(factor))
    tensors = make()
    linear_divergence(*tensors, impl=impl)  # what a first call imports leaves cycles, too
    gc.collect()
    gc.disable()  # a cycle would keep the gradient of the head until the collector runs
    try:
        loss = linear_divergence(*tensors, impl=impl)
        assert [s.expired() for s in loops[-1][2]] == [False, False]
        del loss
        assert [s.expired() for s in loops[-1][2]] == [True, True]
        loss = linear_divergence(*tensors, impl=impl)
        loss.backward()
        assert [s.expired() for s in loops[-1][2]] == [False, False]
        tensors[0].grad = tensors[1].grad = None
        assert [s.expired() for s in loops[-1][2]] == [True, True]
        assert loss.isfinite()
    finally:
        gc.enable()


class Watch(TorchDispatchMode):
    """Refuses what makes a host wait for its device; keeps the peak of new storages and the shapes of all results.

    A mode does not see inside an operator, so the tests run the Python function of the operator under it.
    """

    WAITS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.shapes: set[tuple[int, ...]] = set()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        self.names.add(name)
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)} - set(self.live)
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known:
                self.shapes.add(tuple(value.shape))
                storage = value.untyped_storage()
                self.live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out

    def waits(self) -> set[str]:
        return self.names & set(self.WAITS)


def watched(impl: str, tensors: list[Tensor], weights: Tensor | None, needs: tuple[bool, ...], **options: Any) -> Watch:
    x, w, tx, tw = (t.detach() for t in tensors)
    labels = torch.zeros(len(x), dtype=torch.int64) if options.get("return_tokens") else None
    with Watch() as seen:
        linear_module._forward(
            x, w, None, tx, tw, None, weights, labels, None, *needs, None, *flat(w.shape[0], impl, **options)
        )
    return seen


def test_the_host_waits_for_nothing() -> None:
    some = torch.tensor([1.0, 0, 2, 0.5])
    for dtype, reduction, weights in (
        (torch.float32, "none", some), (torch.bfloat16, "mean", None), (torch.float16, "mean", some)
    ):  # fmt: skip
        options = {"compact": False, "return_tokens": True, "reduction": reduction}
        assert not watched("triton", make(dtype=dtype), weights, (True, True, False), **options).waits()
    assert {"addmm", "zeros"} <= watched("triton", make(), None, (True, True, False)).names  # it does see inside
    assert watched("triton", make(), torch.ones(4), (True, True, False)).waits() == {"nonzero"}  # compact=True, as said
    s, t = torch.randn(4, 40), torch.randn(4, 40)
    with Watch() as seen:
        logits_module._forward(s, t, torch.ones(4), None, None, True, *flat(40, "triton", compact=False))
    assert not seen.waits()
    tensors = make()
    loss = 3.0 * linear_divergence(*tensors, impl="triton")
    with Watch() as seen:
        loss.backward()
    assert seen.names
    assert not seen.waits()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weighted", [False, True])
def test_memory_stays_within_the_budget(weighted: bool, impl: str) -> None:
    # Few tokens of a long vocabulary: Triton's interpreter takes its time for each.
    rows, vocab, hidden = 16, 3000, 4
    budget = 4 * (8 * 3008 + 16 * hidden)  # four tokens
    tensors = make(rows, vocab, hidden)
    weights = torch.ones(rows) if weighted else None
    head, x, slack = vocab * hidden * 4, rows * hidden * 4, 2**13
    seen = watched(impl, tensors, weights, (True, True, False), chunk_bytes=budget)
    assert seen.peak <= budget + head + x + slack
    assert seen.peak < rows * vocab * 4  # one fp32 copy of the logits is already more
    assert (vocab, hidden) in seen.shapes
    seen = watched(impl, tensors, weights, (True, False, False), chunk_bytes=budget)
    assert seen.peak <= budget + x + slack
    assert (vocab, hidden) not in seen.shapes, "a gradient for a frozen head"
    assert (rows, hidden) in seen.shapes
    seen = watched(impl, tensors, weights, (False, False, False), chunk_bytes=budget)
    assert seen.peak <= budget + slack
