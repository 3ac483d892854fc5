"""Values of every kernel against float64, and forbidden waits and copies, for `gpu-proof` and test_gpu.py.

A check yields its numbers: errors relative to float64 of the same inputs, each with a bound. Large shapes have the
sizes that are hardest for Triton (odd rows, tiles that are not full); `tiny` shrinks them for Triton's interpreter.
N tokens, V vocabulary, H hidden size.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import sdft_kernels
import torch
from sdft_kernels import reference
from sdft_kernels.checks import IMPLS
from torch import Tensor

from .phase import Item, Place, Row

# Options come from tables here, so that no overload of a function can be told.
divergence: Any = sdft_kernels.divergence
linear_divergence: Any = sdft_kernels.linear_divergence
linear_topk_divergence: Any = sdft_kernels.linear_topk_divergence
linear_cross_entropy: Any = sdft_kernels.linear_cross_entropy
exact_divergence: Any = reference.linear_divergence_reference
divergence_reference: Any = reference.divergence_reference
topk_divergence_reference: Any = reference.topk_divergence_reference
cross_entropy_reference: Any = reference.linear_cross_entropy_reference

KINDS = ("reverse_kl", "forward_kl", "jsd")
BOUNDS = {torch.float32: 5e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}  # of gradients
VALUES = 1e-2  # of losses and per-token outputs; the dtype's rounding of the inputs is in both sides
SCALER = 2.0**12  # a loss scaler's factor, without which fp16 gradients are subnormal
CANDIDATES = tuple(impl for impl in IMPLS if impl not in ("triton", "torch"))  # never the default


@dataclass(frozen=True)
class Found:
    """One number of a check. It is right if it is at most its bound; NaN is not."""

    what: str
    error: float
    bound: float

    @property
    def right(self) -> bool:
        return self.error <= self.bound


@dataclass(frozen=True)
class Check:
    """One item of the list."""

    name: str
    run: Callable[[Place], Iterator[Found]]
    needs_gpu: bool = False  # it calls the CUDA runtime
    gigabytes: float = 0.0  # of free GPU memory
    module: str = ""  # a package that it needs

    def __str__(self) -> str:
        return self.name


def items(place: Place) -> list[Item]:
    return [Item(check.name, partial(recorded, check, place)) for check in CHECKS]


def recorded(check: Check, place: Place, rows: list[Row]) -> None:
    """Appends a row for every number of the check."""
    why = cannot(check, place)
    if why:
        rows.append({"what": check.name, "note": why})
        return
    with exact_products():
        for found in check.run(place):
            rows.append({"what": found.what, "error": found.error, "bound": found.bound, "right": found.right})


def cannot(check: Check, place: Place) -> str:
    """Why the check cannot run there; empty if it can."""
    if check.module and importlib.util.find_spec(check.module) is None:
        return f"{check.module} is missing"
    if place.device != "cuda":
        return "needs a GPU" if check.needs_gpu else ""
    free = torch.cuda.mem_get_info()[0] / 1e9
    return f"needs {check.gigabytes:.0f} GB of free GPU memory" if check.gigabytes > free else ""


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Turns TF32 off, because the loss does not round to it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# Inputs and comparisons.


def draw(
    place: Place, rows: int, vocab: int, hidden: int, dtype: torch.dtype, *, noise: float = 0.15, shared: bool = False
) -> list[Tensor]:
    """x, w, teacher_x and teacher_w; the teacher is near the student. Tiny: at most 5 rows, 203 tokens, 16 channels."""
    if place.tiny:
        rows, vocab, hidden = min(rows, 5), min(vocab, 203), min(hidden, 16)
    gen = torch.Generator(place.device).manual_seed(rows + vocab)

    def normal(n: int) -> Tensor:
        return torch.randn(n, hidden, generator=gen, device=place.device)

    x, w = normal(rows), normal(vocab) / hidden**0.5
    teacher_x = x + noise * normal(rows)
    teacher_w = w if shared else w + noise * normal(vocab) / hidden**0.5
    x, w, teacher_x = x.to(dtype), w.to(dtype), teacher_x.to(dtype)
    return [x, w, teacher_x, w if shared else teacher_w.to(dtype)]


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, or ‖a‖ if b is 0."""
    norm = b.double().norm()
    return ((a.double() - b).norm() / torch.where(norm == 0, 1.0, norm)).item()


def compare(
    what: str,
    inputs: list[Tensor],
    bound: float,
    *,
    frozen: bool = False,
    impl: str | None = "triton",
    exact: list[Tensor] | None = None,
    loop: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Found]:
    """Loss, per-token outputs and gradients of x and, unless frozen, w.

    exact: the same inputs as the products see them, if that differs (autocast). loop: options that change no value.
    """
    graded = 1 if frozen else 2
    ours = [t.detach().requires_grad_(i < graded) for i, t in enumerate(inputs)]
    truth = [t.detach().double().requires_grad_(i < graded) for i, t in enumerate(exact or inputs)]
    labels = torch.arange(len(inputs[0]), device=inputs[0].device) * 37 % min(len(inputs[1]), len(inputs[3]))
    given: dict[str, Any] = {"labels": labels, "return_tokens": True} | options
    chosen: dict[str, Any] = {"impl": impl} | (loop or {})
    loss, tokens = linear_divergence(*ours, **given, **chosen)
    want, true = exact_divergence(*truth, **given)
    yield Found(f"{what}: loss", relative(loss, want), VALUES)
    pairs = zip(tokens[:5], true[:5], strict=True)
    yield Found(f"{what}: tokens", max(relative(got, value) for got, value in pairs), VALUES)
    grads = torch.autograd.grad(loss.sum() * SCALER, ours[:graded])
    wanted = torch.autograd.grad(want.sum() * SCALER, truth[:graded])
    for name, got, value in zip(("dX", "dW"), grads, wanted, strict=False):
        yield Found(f"{what}: {name}", relative(got, value), bound)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The loss from hidden states.


def matches(place: Place, kind: str, dtype: torch.dtype, impl: str) -> Iterator[Found]:
    for shared, frozen in product((False, True), repeat=2):
        what = f"{'shared' if shared else 'two'} head{'' if shared else 's'}, {'frozen' if frozen else 'trained'}"
        inputs = draw(place, 253, 5001, 128, dtype, shared=shared)
        yield from compare(what, inputs, BOUNDS[dtype], frozen=frozen, impl=impl, divergence=kind, beta=0.3)


def near(place: Place, impl: str) -> Iterator[Found]:
    """bf16 with a teacher so near that bf16 logits would be all rounding (KL about .003), as in self-distillation."""
    for kind in KINDS:
        inputs = draw(place, 253, 5001, 128, torch.bfloat16, noise=0.05)
        yield from compare(kind, inputs, BOUNDS[torch.bfloat16], impl=impl, divergence=kind)


def options(place: Place, kind: str) -> Iterator[Found]:
    inputs = draw(place, 130, 5001, 64, torch.bfloat16)
    rows, vocab = len(inputs[0]), len(inputs[1])
    weights = (torch.arange(rows, device=place.device) % 3).float()
    row = torch.arange(vocab, device=place.device)
    cases: dict[str, dict[str, Any]] = {
        "softcap, temperature, scale": {"softcap": 3.0, "temperature": 0.7, "scale": 0.5},
        "part of the vocabulary": {"vocab_size": vocab * 4 // 5},
        "biases": {"bias": (row % 7).float() / 7, "teacher_bias": (row % 5).bfloat16() / 5},
        "sum": {"reduction": "sum"},
        "none": {"reduction": "none"},
    }
    for name, chosen in cases.items():
        for compact in (True, False):
            yield from compare(
                f"{name}, weights{', compact' if compact else ''}", inputs, 5e-3, divergence=kind,
                token_weights=weights, loop={"compact": compact, "chunk_bytes": 2**14 if place.tiny else 2**21},
                **chosen,
            )  # fmt: skip
    x = inputs[0].detach().requires_grad_()  # one token has no loss; the check is that the kernel runs
    loss = linear_divergence(x, *inputs[1:], divergence=kind, impl="triton", vocab_size=1)
    yield Found("a vocabulary of one: loss", abs(loss.item()), 0.0)
    yield Found("a vocabulary of one: dX", torch.autograd.grad(loss, x)[0].abs().max().item(), 0.0)


def strides(place: Place, impl: str) -> Iterator[Found]:
    """Vectors that are not contiguous: every second entry, one entry for all, a column; and matrices likewise."""
    inputs = draw(place, 130, 5001, 64, torch.float32)
    rows, vocab = len(inputs[0]), len(inputs[1])
    gen = torch.Generator(place.device).manual_seed(1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=gen, device=place.device)

    labels = torch.randint(vocab, (2 * rows,), generator=gen, device=place.device)
    cases: dict[str, dict[str, Any]] = {
        "weights, every second": {"token_weights": uniform(2 * rows)[::2]},
        "weights, one for all": {"token_weights": uniform(1).expand(rows)},
        "weights, a column": {"token_weights": uniform(rows, 3)[:, 1]},
        "labels, every second": {"labels": labels[::2]},
        "labels, one for all": {"labels": labels[:1].expand(rows)},
        "biases, every second": {"bias": uniform(2 * vocab)[::2], "teacher_bias": uniform(vocab, 2)[:, 0]},
        "bias, one for all": {"bias": uniform(1).expand(vocab)},
    }
    for name, chosen in cases.items():
        yield from compare(name, inputs, BOUNDS[torch.float32], impl=impl, reduction="sum", **chosen)
    turned = [t.t().contiguous().t() for t in inputs]
    yield from compare("matrices stored by columns", turned, BOUNDS[torch.float32], impl=impl)
    wide = [torch.cat([t, t], dim=1)[:, : t.shape[1]] for t in inputs]
    yield from compare("rows apart", wide, BOUNDS[torch.float32], impl=impl)


def autocast(place: Place, hidden: torch.dtype) -> Iterator[Found]:
    """fp32 heads under bf16 autocast, as in the trainer; the reference is float64 of the rounded operands."""
    x, w, teacher_x, teacher_w = draw(place, 253, 5001, 128, torch.float32)
    inputs = [x.to(hidden), w, teacher_x.to(hidden), teacher_w]
    for name, budget in (("whole", None), ("in chunks", 2**15 if place.tiny else 2**22)):
        for frozen in (False, True):
            rounded = [t.bfloat16() for t in inputs]
            with torch.autocast(place.device, torch.bfloat16):
                yield from compare(
                    f"{name}, {'frozen' if frozen else 'trained'}", inputs, 5e-3, frozen=frozen, exact=rounded,
                    loop={"chunk_bytes": budget},
                )  # fmt: skip


def narrow_operands(place: Place) -> Iterator[Found]:
    """products="bfloat16": bf16 hidden states and fp32 heads outside autocast, as under FSDP2's mixed precision."""
    x, w, teacher_x, teacher_w = draw(place, 253, 5001, 128, torch.float32)
    inputs = [x.bfloat16(), w, teacher_x.bfloat16(), teacher_w]
    rounded = [t.bfloat16() for t in inputs]
    yield from compare("bf16 operands", inputs, 5e-3, exact=rounded, loop={"products": "bfloat16"})


def long_vocabulary(place: Place, vocab: int) -> Iterator[Found]:
    for kind in KINDS:
        inputs = draw(place, 48, vocab, 64, torch.bfloat16, shared=True)
        yield from compare(kind, inputs, 5e-3, divergence=kind)


def far_apart(place: Place) -> Iterator[Found]:
    """Two unrelated models over 262147 tokens (KL about 28): no further from float64 than twice dense fp32 is."""
    vocab = 2003 if place.tiny else 262_147
    gen = torch.Generator(place.device).manual_seed(0)
    inputs = [torch.randn(n, 17, generator=gen, device=place.device) for n in (5, vocab, 5, vocab)]
    truth: list[Tensor] = []
    dense: list[Tensor] = []
    ours: list[Tensor] = []
    for kind in KINDS:
        for grads, dtype, loss in (
            (truth, torch.float64, exact_divergence),
            (dense, torch.float32, exact_divergence),
            (ours, torch.float32, partial(linear_divergence, impl="triton")),
        ):
            leaves = [t.to(dtype).requires_grad_(i < 2) for i, t in enumerate(inputs)]
            grads[:] = torch.autograd.grad(loss(*leaves, divergence=kind, temperature=0.7), leaves[:2])
        for name, true, plain, got in zip(("dX", "dW"), truth, dense, ours, strict=True):
            bound = 2 * max(relative(plain, true), torch.finfo(torch.float32).eps)
            yield Found(f"{kind}: {name}, twice dense fp32's", relative(got, true), bound)


def other_teacher(place: Place) -> Iterator[Found]:
    """A teacher of another width, with more rows in its head."""
    x, w, *_ = draw(place, 100, 3001, 64, torch.bfloat16)
    _, _, teacher_x, teacher_w = draw(place, 100, 3001, 128, torch.bfloat16)
    wide = torch.cat([teacher_w, teacher_w[:70]])
    for kind in KINDS:
        yield from compare(kind, [x, w, teacher_x, wide], 5e-3, divergence=kind)


def past_two_to_the_31(place: Place) -> Iterator[Found]:
    """One chunk that holds N·V > 2^31 logits a side: the rows at its end are right."""
    n, v, h = (40, 203, 16) if place.tiny else (16_384, 151_936, 64)
    x, w, teacher_x, teacher_w = draw(place, n, v, h, torch.bfloat16, shared=True)
    labels = torch.arange(len(x), device=place.device) % len(w)
    rows = torch.tensor([0, 1, len(x) // 2, len(x) - 1], device=place.device)
    leaf = x.clone().requires_grad_()
    loss, tokens = linear_divergence(
        leaf, w, teacher_x, teacher_w, labels=labels, return_tokens=True, reduction="sum", impl="triton",
        chunk_bytes=24 * 2**30,
    )  # fmt: skip
    (dx,) = torch.autograd.grad(loss, leaf)
    exact = x[rows].double().requires_grad_()
    want, true = exact_divergence(
        exact, w.double(), teacher_x[rows].double(), w.double(), labels=labels[rows], return_tokens=True,
        reduction="sum",
    )  # fmt: skip
    yield Found("divergences", relative(tokens.divergence[rows], true.divergence), VALUES)
    yield Found("log-probabilities", relative(tokens.student_logprob[rows], true.student_logprob), VALUES)
    yield Found("dX", relative(dx[rows], torch.autograd.grad(want, exact)[0]), 5e-3)


# The loss of ready logits and of a teacher's top-k.


def ready_logits(place: Place, dtype: torch.dtype) -> Iterator[Found]:
    n, v = (5, 203) if place.tiny else (33, 10_007)
    gen = torch.Generator(place.device).manual_seed(0)
    student, teacher = (torch.randn(n, v, generator=gen, device=place.device).to(dtype) for _ in range(2))
    for kind, inplace in product(KINDS, (False, True)):
        exact = student.double().requires_grad_()
        want = divergence_reference(exact, teacher.double(), divergence=kind, reduction="sum")
        leaf = student.clone().requires_grad_()
        loss = divergence(leaf, teacher, divergence=kind, reduction="sum", inplace=inplace, impl="triton")
        what = f"{kind}{', in place' if inplace else ''}"
        yield Found(f"{what}: loss", relative(loss, want), 1e-5)
        grad, true = torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(want, exact)[0]
        yield Found(f"{what}: gradient", relative(grad, true), BOUNDS[dtype])


def ready_logits_past_two_to_the_31(place: Place) -> Iterator[Found]:
    n, v = (6, 203) if place.tiny else (16_384, 151_936)
    gen = torch.Generator(place.device).manual_seed(0)
    student = torch.zeros(n, v, device=place.device, dtype=torch.bfloat16)
    teacher = torch.zeros(1, v, device=place.device, dtype=torch.bfloat16).expand(n, v)
    rows = torch.tensor([0, 1, n // 2, n - 1], device=place.device)
    student[rows] = torch.randn(4, v, generator=gen, device=place.device).bfloat16()
    exact = student[rows].double().requires_grad_()
    want = divergence_reference(exact, teacher[rows].double(), reduction="sum")
    _, tokens = divergence(student, teacher, reduction="sum", return_tokens=True, impl="triton")
    yield Found("divergences", relative(tokens.divergence[rows].sum(), want), 1e-5)
    loss = divergence(student.requires_grad_(), teacher, reduction="sum", inplace=True, impl="triton")
    (grad,) = torch.autograd.grad(loss, student)
    yield Found("gradient", relative(grad[rows], torch.autograd.grad(want, exact)[0]), 5e-3)
    yield Found("gradient of a row that agrees", grad[2].abs().max().item(), 1e-6)


def top_k(place: Place, dtype: torch.dtype) -> Iterator[Found]:
    for kind, tail in product(KINDS, ("bucket", "renormalise")):
        x, w, teacher_x, teacher_w = draw(place, 200, 3000, 64, dtype)
        logprobs, ids = (teacher_x.double() @ teacher_w.double().T).log_softmax(1).topk(20)
        ids[::3, 15:] = -1
        ids[::5, 4] = ids[::5, 2]
        leaves = [x.requires_grad_(), w.requires_grad_()]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        loss = linear_topk_divergence(x, w, ids, logprobs.float(), divergence=kind, tail=tail, chunk_bytes=2**21)
        grads = torch.autograd.grad(loss * SCALER, leaves)
        want = topk_divergence_reference(exact[0] @ exact[1].T, ids, logprobs, divergence=kind, tail=tail)
        yield Found(f"{kind}, {tail}: loss", relative(loss, want), 1e-3)
        wanted = torch.autograd.grad(want * SCALER, exact)
        for name, got, value in zip(("dX", "dW"), grads, wanted, strict=True):
            yield Found(f"{kind}, {tail}: {name}", relative(got, value), BOUNDS[dtype])


def cross_entropy(place: Place, dtype: torch.dtype) -> Iterator[Found]:
    """linear_cross_entropy, and with each token's loss times its probability."""
    x, w, *_ = draw(place, 200, 3000, 64, dtype)
    labels = torch.arange(2 * len(x), device=place.device)[::2] * 37 % len(w)
    weights = (torch.arange(len(x), device=place.device) % 3).float()
    for by_probability in (False, True):
        leaves = [t.detach().requires_grad_() for t in (x, w)]
        exact = [t.detach().double().requires_grad_() for t in (x, w)]
        options: dict[str, Any] = {"token_weights": weights, "reduction": "sum"}
        loss = linear_cross_entropy(*leaves, labels, by_probability=by_probability, chunk_bytes=2**21, **options)
        want = cross_entropy_reference(*exact, labels, by_probability=by_probability, **options)
        what = "by probability" if by_probability else "plain"
        yield Found(f"{what}: loss", relative(loss, want), 1e-3)
        grads, wanted = (torch.autograd.grad(v * SCALER, t) for v, t in ((loss, leaves), (want, exact)))
        for name, got, value in zip(("dX", "dW"), grads, wanted, strict=True):
            yield Found(f"{what}: {name}", relative(got, value), BOUNDS[dtype])


def strides_of_logits(place: Place) -> Iterator[Found]:
    """Ready logits whose rows, or entries, lie apart, with weights that do."""
    n, v = (5, 203) if place.tiny else (33, 10_007)
    gen = torch.Generator(place.device).manual_seed(0)
    student, teacher = (torch.randn(n, v, generator=gen, device=place.device) for _ in range(2))
    weights = torch.rand(2 * n, generator=gen, device=place.device)[::2]
    forms = {
        "rows apart": lambda t: torch.cat([t, t], dim=1)[:, :v],
        "by columns": lambda t: t.t().contiguous().t(),
        "every second entry": lambda t: torch.stack([t, t], dim=2).flatten(1)[:, ::2],
    }
    for name, form in forms.items():
        leaf, exact = form(student).detach().requires_grad_(), student.double().requires_grad_()
        options = {"token_weights": weights, "reduction": "sum"}
        loss = divergence(leaf, form(teacher), impl="triton", **options)
        want = divergence_reference(exact, teacher.double(), **options)
        yield Found(f"{name}: loss", relative(loss, want), 1e-5)
        grad, true = torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(want, exact)[0]
        yield Found(f"{name}: gradient", relative(grad, true), BOUNDS[torch.float32])


# Forbidden waits and copies.


def chosen(place: Place) -> Iterator[Found]:
    """impl=None is Triton on a GPU, bit for bit."""
    inputs = draw(place, 64, 1000, 64, torch.bfloat16)
    values = [linear_divergence(*inputs, impl=impl) for impl in (None, "triton")]
    yield Found("difference to impl='triton'", (values[0] - values[1]).abs().item(), 0.0)


def self_test(place: Place) -> Iterator[Found]:
    from sdft_kernels.__main__ import main

    yield Found("exit status of python -m sdft_kernels", float(main([])), 0.0)


def compiled(place: Place) -> Iterator[Found]:
    """torch.compile with Inductor: the same values, and one graph for every number of tokens."""

    def f(*tensors: Any, reduction: str) -> Tensor:
        x, w, teacher_x, teacher_w = tensors
        return linear_divergence(x * 2, w, teacher_x, teacher_w, impl="triton", reduction=reduction).sum()

    for reduction in ("mean", "none"):
        fast: Any = torch.compile(f, fullgraph=True)
        for rows in (64, 70, 90):
            tensors = draw(place, rows, 1000, 64, torch.bfloat16)
            leaves = [t.requires_grad_(i < 2) for i, t in enumerate(tensors)]
            want, got = f(*leaves, reduction=reduction), fast(*leaves, reduction=reduction)
            yield Found(f"{reduction}, {rows} rows: loss", relative(got, want), 1e-5)
            pairs = zip(*(torch.autograd.grad(v, leaves[:2]) for v in (got, want)), strict=True)
            yield Found(f"{reduction}, {rows} rows: gradients", max(relative(a, b) for a, b in pairs), 1e-5)


def narrow_products(place: Place) -> Iterator[Found]:
    """mm(out_dtype=): fp32 results of bf16 operands, without an fp32 copy of the head or of the gradient."""
    from sdft_kernels.operands import mm32

    for dtype in (torch.bfloat16, torch.float16):
        a, b = torch.randn(64, 256, device="cuda").to(dtype), torch.randn(256, 512, device="cuda").to(dtype)
        out = torch.full((64, 576), 7.0, device="cuda")
        view, exact = out[:, :512], a.double() @ b.double()
        mm32(a, b, view)
        yield Found(f"{short(dtype)}: product", relative(view, exact), 1e-6)
        mm32(a, b, view, beta=1.0)
        yield Found(f"{short(dtype)}: twice", relative(view, 2 * exact), 1e-6)
        yield Found(f"{short(dtype)}: what lies beside the result", (out[:, 512:] - 7.0).abs().max().item(), 0.0)
        mm32(
            b.t(), a.t(), torch.empty(512, 64, device="cuda")
        )  # as the product for dW; cuBLAS may allocate a workspace once
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        mm32(a, b, view)
        extra = torch.cuda.max_memory_allocated() - before
        yield Found(f"{short(dtype)}: bytes taken", float(extra), 2.0 * b.nbytes)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raises if the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_never_waits(place: Place) -> Iterator[Found]:
    for dtype, reduction in product(BOUNDS, ("mean", "none")):
        inputs = draw(place, 200, 3000, 64, dtype)
        weights = (torch.arange(200, device=place.device) % 3).float()
        upstream = torch.ones((200,) if reduction == "none" else (), device=place.device)

        def step(inputs=inputs, weights=weights, upstream=upstream, reduction=reduction) -> None:  # type: ignore[no-untyped-def]
            leaves = [t.detach().requires_grad_(i < 2) for i, t in enumerate(inputs)]
            loss = linear_divergence(
                *leaves, token_weights=weights, compact=False, impl="triton", reduction=reduction, chunk_bytes=2**21
            )
            torch.autograd.grad(loss, leaves[:2], upstream)

        step()  # compiles
        with no_waiting():
            step()
        yield Found(f"{short(dtype)}, {reduction}: waits", 0.0, 0.0)


def graph_capture(place: Place) -> Iterator[Found]:
    """A call of few tokens captured in a CUDA graph: replayed on other inputs, the same values."""
    tensors = draw(place, 512, 5001, 128, torch.bfloat16)
    leaves = [t.detach().requires_grad_(i < 2) for i, t in enumerate(tensors)]

    def step() -> list[Tensor]:
        loss = linear_divergence(*leaves, compact=False, impl="triton")
        return [loss, *torch.autograd.grad(loss, leaves[:2])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills the allocator's and cuBLAS's pools
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    with torch.no_grad():
        leaves[0].mul_(1.25)
    graph.replay()
    torch.cuda.synchronize()
    got = [t.clone() for t in made]
    for name, a, b in zip(("loss", "dX", "dW"), got, step(), strict=True):
        yield Found(f"replayed: {name}", relative(a, b), 1e-6)


def memory_budget(place: Place) -> Iterator[Found]:
    n, v, h, budget = 8192, 50_000, 64, 2**26
    for frozen in (False, True):
        x, w, teacher_x, teacher_w = draw(place, n, v, h, torch.bfloat16, shared=True)
        x.requires_grad_()
        w = w.detach().requires_grad_(not frozen)
        for _ in range(2):  # in the first, cuBLAS takes its workspace
            x.grad = w.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            linear_divergence(x, w, teacher_x, teacher_w, chunk_bytes=budget).backward()
        extra = torch.cuda.max_memory_allocated() - before
        results = x.nbytes + 4 * n + (0 if frozen else 6 * v * h)  # dX, divergences; dW in fp32 and, at the end, bf16
        what = f"{'frozen' if frozen else 'trained'}: bytes beyond the results"
        yield Found(what, float(extra - results), budget + 2.0**22)  # two (N, V) fp32 logits would take 3.3 GB


CHECKS = (
    *(Check(f"{kind}, {short(dtype)}", partial(matches, kind=kind, dtype=dtype, impl="triton"))
      for kind, dtype in product(KINDS, BOUNDS)),
    Check("a teacher very near the student", partial(near, impl="triton")),
    Check("vectors and matrices that are not contiguous", partial(strides, impl="triton")),
    *(Check(f"fp32 heads under autocast, hidden states in {short(dtype)}", partial(autocast, hidden=dtype))
      for dtype in (torch.bfloat16, torch.float32)),
    Check("bf16 products of fp32 heads", narrow_operands),
    *(Check(f"options of {kind}", partial(options, kind=kind)) for kind in KINDS),
    *(Check(f"{vocab} tokens", partial(long_vocabulary, vocab=vocab)) for vocab in (151_936, 262_144)),
    Check("models far apart", far_apart),
    Check("a teacher of another width", other_teacher),
    Check("Triton is chosen", chosen, needs_gpu=True),
    Check("the host never waits", host_never_waits, needs_gpu=True),
    Check("memory stays within the budget", memory_budget, needs_gpu=True),
    Check("products of narrow operands", narrow_products, needs_gpu=True),
    *(Check(f"ready logits, {short(dtype)}", partial(ready_logits, dtype=dtype)) for dtype in BOUNDS),
    Check("ready logits that are not contiguous", strides_of_logits),
    *(Check(f"cross-entropy, {short(dtype)}", partial(cross_entropy, dtype=dtype)) for dtype in BOUNDS),
    *(Check(f"top-k, {short(dtype)}", partial(top_k, dtype=dtype)) for dtype in BOUNDS),
    *(Check(f"{impl}: {kind}, {short(dtype)}", partial(matches, kind=kind, dtype=dtype, impl=impl))
      for impl, kind, dtype in product(CANDIDATES, KINDS, BOUNDS)),
    *(Check(f"{impl}: a teacher very near the student", partial(near, impl=impl)) for impl in CANDIDATES),
    *(Check(f"{impl}: not contiguous", partial(strides, impl=impl)) for impl in CANDIDATES),
    Check("ready logits, N V beyond 2^31", ready_logits_past_two_to_the_31, gigabytes=14),
    Check("one chunk of N V beyond 2^31", past_two_to_the_31, gigabytes=32),
    Check("captured in a CUDA graph", graph_capture, needs_gpu=True),
    Check("compiled by Inductor", compiled, needs_gpu=True),
    Check("python -m sdft_kernels", self_test, needs_gpu=True),
)  # fmt: skip
