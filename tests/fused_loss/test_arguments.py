"""Every argument of every public loss, with wrong values: a ValueError that names the argument, and no other error."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sdft_kernels import divergence, linear_divergence, linear_topk_divergence, topk_divergence
from sdft_kernels.compat import liger

N, V, H, K = 6, 11, 4, 3
TENSORS: dict[str, Any] = {
    "a string": "a",
    "a list": [1.0],
    "a number": 3.0,
    "a scalar": torch.zeros(()),
    "three dimensions": torch.zeros(2, 2, 2),
    "no rows": torch.zeros(0),
    "too large": torch.zeros(V + 1, H + 1),
    "bool": torch.zeros(N, V, dtype=torch.bool),
    "complex": torch.zeros(N, K, dtype=torch.complex64),
    "integers of a row": torch.zeros(N, dtype=torch.int32),
    "integers of a token": torch.zeros(V, dtype=torch.int64),
    "another device": torch.zeros(N, V, device="meta"),
    "sparse": torch.zeros(N, H).to_sparse(),
}
OPTIONS: list[Any] = ["a", -1, math.nan, math.inf, [1], torch.tensor(0.5)]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def made() -> dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]]:
    """By name: the loss, and valid tensors and options for it."""
    labels, ones, logits = torch.zeros(N, dtype=torch.int64), torch.ones(N), normal(N, V)
    rows = {"token_weights": ones, "labels": labels}
    top = {"teacher_ids": torch.arange(N * K).view(N, K) % V, "teacher_logprobs": normal(N, K) - 3}
    heads = {"x": normal(N, H), "w": normal(V, H)}
    pair = heads | {"teacher_x": normal(N, H), "teacher_w": normal(V, H)}
    fused = dict(
        zip(("student_input", "student_weight", "teacher_input", "teacher_weight"), pair.values(), strict=True)
    )
    biases = {"student_bias": torch.zeros(V), "teacher_bias": torch.zeros(V)}
    common = {"divergence": "jsd", "beta": 0.5, "temperature": 1.0, "reduction": "mean", "return_tokens": False}
    common |= {"chunk_bytes": None, "vocab_size": None}
    head = common | {"softcap": None, "scale": 1.0, "products": None}
    full = head | {"teacher_softcap": None, "teacher_scale": 1.0, "compact": True, "impl": None}
    tail = {"tail": "bucket", "tail_floor": 1e-7}
    knobs = {"ignore_index": -100, "temperature": 1.0}

    def at_construction(cls: type) -> Callable[..., Any]:
        return lambda tensors, options: cls(**options)(**tensors)

    def at_call(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda tensors, options: function(**tensors, **options)

    bias = {"bias": torch.zeros(V)}
    both = bias | {"teacher_bias": torch.zeros(V)}
    student = {"student_logits": logits}
    log = logits.log_softmax(1)
    return {
        "linear_divergence": (at_call(linear_divergence), pair | both | rows, full),
        "divergence": (
            at_call(divergence),
            student | {"teacher_logits": logits} | rows,
            common | {"inplace": False, "compact": True, "impl": None},
        ),
        "linear_topk_divergence": (at_call(linear_topk_divergence), heads | top | bias | rows, head | tail),
        "topk_divergence": (at_call(topk_divergence), student | top | rows, common | tail),
        "LigerFusedLinearJSDLoss": (
            at_construction(liger.LigerFusedLinearJSDLoss),
            fused | {"true_labels": labels} | biases,
            knobs | {"beta": 0.5, "weight_hard_loss": 0.5, "weight_soft_loss": 0.5},
        ),
        "LigerFusedLinearJSD": (
            at_construction(liger.LigerFusedLinearJSD),
            fused | {"shift_labels": labels},
            knobs | {"jsd_beta": 0.5},
        ),
        "LigerJSD": (
            at_construction(liger.LigerJSD),
            {"log_q": log, "log_p": log, "shift_labels": labels},
            {"beta": 0.5, "ignore_index": -100},
        ),
        "LigerKLDIVLoss": (
            at_construction(liger.LigerKLDIVLoss),
            {"y_pred": log, "y_true": log},
            {"eps": 1e-10, "reduction": "mean", "log_target": True},
        ),
    }


ALLOWED = {(field, "-1") for field in ("ignore_index", "weight_hard_loss", "weight_soft_loss")}  # not wrong there


@pytest.mark.parametrize("name", list(made()))
def test_what_an_argument_cannot_be_is_refused_by_its_name(name: str) -> None:
    call, tensors, options = made()[name]
    call(tensors, options)
    tensor_cases = [(field, what, {field: wrong}, {}) for field in tensors for what, wrong in TENSORS.items()]
    option_cases = [(field, repr(wrong), {}, {field: wrong}) for field in options for wrong in OPTIONS]
    for field, what, wrong_tensor, wrong_option in tensor_cases + option_cases:
        if (field, what) in ALLOWED:
            continue
        try:
            call(tensors | wrong_tensor, options | wrong_option)
        except ValueError as error:
            assert re.search(rf"\b{field}\b", str(error)), (field, what, error)  # noqa: PT017 (many in one test)
        else:
            pytest.fail(f"{field} was accepted as {what}")


def test_positional_means_the_tensors_alone() -> None:
    """Options are keywords, so that one can be added without moving another."""
    import inspect

    for function, positional in (
        (linear_divergence, 4),
        (divergence, 2),
        (linear_topk_divergence, 4),
        (topk_divergence, 3),
    ):
        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
        assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) == positional
        assert set(kinds[positional:]) == {inspect.Parameter.KEYWORD_ONLY}


# By name, the same values in other memory.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "every second entry": lambda t: torch.stack([t, torch.full_like(t, -7)], -1).flatten(-2)[..., ::2],
    "a column": lambda t: torch.stack([torch.full_like(t, 5), t], -1)[..., 1],
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim == 2 else t,
    "rows apart": lambda t: torch.cat([t, torch.full_like(t, -7)], -1)[..., : t.shape[-1]],
    "one row for all": lambda t: t[:1].expand_as(t),
}


def outcome(
    call: Callable[..., Any], tensors: dict[str, torch.Tensor], options: dict[str, Any], upstream: torch.Tensor
) -> list[torch.Tensor]:
    """The loss, what is returned with it, and the gradients of all inputs of the student's side."""
    students = [f for f in ("x", "w", "bias", "student_logits", "student_input", "student_weight", "student_bias",
                            "log_q", "y_pred") if f in tensors]  # fmt: skip
    leaves = {f: tensors[f].detach().requires_grad_() for f in students}
    out = call(tensors | leaves, options)
    loss, *rest = out if isinstance(out, tuple) else (out,)
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream)
    tokens = [t for stats in rest for t in stats if t is not None]
    return [loss.detach(), *tokens, *grads]


IN_TRITON = ("every second entry", "transposed", "one row for all")  # the interpreter takes a second for each


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in made() for layout in LAYOUTS]
    + [(f"{name}, triton", layout) for name in ("linear_divergence", "divergence") for layout in IN_TRITON],
)
def test_the_memory_layout_of_the_arguments_changes_nothing(name: str, layout: str) -> None:
    """Triton's kernels read vectors as contiguous; with strides 2 or 0 values and gradients were wrong."""
    name, _, impl = name.partition(", ")
    call, tensors, options = made()[name]
    gen = torch.Generator().manual_seed(1)
    tensors = {
        field: t + 0.3 * torch.rand(t.shape, generator=gen) if t.is_floating_point() else (t + torch.arange(len(t))) % K
        for field, t in tensors.items()
        if field != "teacher_ids"
    } | {field: t for field, t in tensors.items() if field == "teacher_ids"}
    tensors = {field: LAYOUTS[layout](t) for field, t in tensors.items()}
    plain = {field: t.clone(memory_format=torch.contiguous_format) for field, t in tensors.items()}
    changes: list[dict[str, Any]] = [{"impl": impl, "compact": False}] if impl else [{}]
    if "return_tokens" in options:
        changes = [c | {"return_tokens": True, "reduction": r} for c in changes for r in ("sum", "none")]
    for change in changes:
        upstream = (
            LAYOUTS[layout](torch.linspace(0.5, 2, N)) if change.get("reduction") == "none" else torch.tensor(2.0)
        )
        got = outcome(call, tensors, options | change, upstream)
        want = outcome(call, plain, options | change, upstream.clone(memory_format=torch.contiguous_format))
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, i=i: f"output {i}: {m}")
