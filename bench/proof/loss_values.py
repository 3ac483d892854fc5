"""Values and gradients of the loss against float64 of the same inputs.

Large shapes have the sizes that are hardest for Triton: odd rows, tiles that are not full.
N tokens, V vocabulary, H hidden size.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .check import (
    BOUNDS,
    KINDS,
    SCALER,
    VALUES,
    Found,
    compare,
    cross_entropy_reference,
    divergence,
    divergence_reference,
    draw,
    exact_divergence,
    linear_cross_entropy,
    linear_divergence,
    linear_topk_divergence,
    relative,
    topk_divergence_reference,
)
from .phase import Place

# The loss from hidden states.


def matches(place: Place, kind: str, dtype: torch.dtype, impl: str) -> Iterator[Found]:
    for shared, frozen in product((False, True), repeat=2):
        what = f"{'shared' if shared else 'two'} head{'' if shared else 's'}, {'frozen' if frozen else 'trained'}"
        inputs = draw(place, 253, 5001, 128, dtype, shared=shared)
        yield from compare(what, inputs, BOUNDS[dtype], frozen=frozen, impl=impl, divergence=kind, beta=0.3)


def near(place: Place, impl: str, kinds: Sequence[str] = KINDS) -> Iterator[Found]:
    """bf16 with a teacher so near that bf16 logits would be all rounding (KL about .003), as in self-distillation."""
    for kind in kinds:
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


def strides(place: Place, impl: str, dtype: torch.dtype = torch.float32, biases: bool = True) -> Iterator[Found]:
    """Vectors that are not contiguous: every second entry, one entry for all, a column; and matrices likewise."""
    inputs = draw(place, 130, 5001, 64, dtype)
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
        if "bias" in chosen and not biases:
            continue
        yield from compare(name, inputs, BOUNDS[dtype], impl=impl, reduction="sum", **chosen)
    turned = [t.t().contiguous().t() for t in inputs]
    yield from compare("matrices stored by columns", turned, BOUNDS[dtype], impl=impl)
    wide = [torch.cat([t, t], dim=1)[:, : t.shape[1]] for t in inputs]
    yield from compare("rows apart", wide, BOUNDS[dtype], impl=impl)


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
