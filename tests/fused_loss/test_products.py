"""Products of the loss: the dtype of their operands, how often a head is cast, and where dW is written."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sdft_kernels import linear_cross_entropy, linear_divergence, linear_topk_divergence, operands
from sdft_kernels.reference import linear_divergence_reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

linear_module = importlib.import_module("sdft_kernels.linear_divergence")
projection = importlib.import_module("sdft_kernels.projection")
triton_rows = importlib.import_module("sdft_kernels.triton_rows")
N, V, H = 12, 300, 16
IMPLS = ("torch", "triton")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(hidden: torch.dtype, head: torch.dtype, rows: int = N) -> list[Tensor]:
    """x, w, teacher_x and teacher_w."""
    x, w = normal(rows, H), normal(V, H, seed=1) / H**0.5
    tx, tw = x + 0.3 * normal(rows, H, seed=2), w + 0.1 * normal(V, H, seed=3)
    return [x.to(hidden).requires_grad_(), w.to(head).requires_grad_(), tx.to(hidden), tw.to(head)]


def gradients(f: Callable[..., Any], tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The loss, dX and dW."""
    loss = f(*tensors, **options)
    return [loss.detach(), *torch.autograd.grad(loss, tensors[:2])]


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


class Seen(TorchDispatchMode):
    """Shapes and dtypes of all that is made, and of all that is cast to bf16. It sees inside an operator's function."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[tuple[int, ...], torch.dtype]] = set()
        self.cast: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if isinstance(out, Tensor):
            self.made.add((tuple(out.shape), out.dtype))
            source = args[1] if name == "aten::copy_" else args[0] if name == "aten::_to_copy" else None
            if source is not None and source.dtype == torch.float32 and out.dtype == torch.bfloat16:
                self.cast.append(tuple(source.shape))
        return out


def run_inside(tensors: list[Tensor], needs: tuple[bool, bool], rounding: torch.dtype | None, **options: Any) -> Seen:
    """The operator's own function under Seen, as Triton runs it, without the work on rows."""
    given: dict[str, Any] = {"divergence": "jsd", "beta": 0.5, "temperature": 1.0, "reduction": "mean", "vocab": V}
    given |= {"return_tokens": False, "chunk_bytes": None, "impl": "triton"} | options
    flat = linear_module.make_options(**given).flat()
    x, w, tx, tw = (t.detach() for t in tensors)
    with pytest.MonkeyPatch.context() as patch, Seen() as seen:
        patch.setattr(triton_rows, "launch_rows", lambda *_, **__: None)
        linear_module._forward(x, w, None, tx, tw, None, None, None, None, *needs, False, rounding, *flat)
    return seen


def test_fp32_heads_are_cast_once_a_call_if_the_workspace_has_room() -> None:
    """The trainer's default, fp32 weights under bf16 autocast, cast the head for every product of every chunk."""
    rows = 4 * N
    tensors = make(torch.float32, torch.float32, rows)
    head, row = V * H * 2, 2 * 4 * 320 + 4 * 4 * H  # bytes of a head in bf16, of a token in a chunk

    def casts(room: int, heads: int, tokens: int = 16) -> list[int]:
        """Vocabulary rows of every cast of a head; the workspace has room for the casts and for a chunk's tokens."""
        given = tensors if heads == 2 else [*tensors[:3], tensors[1]]
        seen = run_inside(given, (True, True), torch.bfloat16, chunk_bytes=room + tokens * row)
        return [shape[0] for shape in seen.cast if shape[1:] == (H,) and shape[0] not in (2, 16, rows)]

    assert casts(2 * head, 2) == [V, V]
    assert casts(head, 1) == [V]
    tiles = casts(0, 2, tokens=3)
    assert max(tiles) < V, "no room: a tile at a time"
    assert sum(tiles) == 3 * rows // 2 * V, "for three products of every chunk of two tokens"


@pytest.mark.parametrize(("head", "teacher_head"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_two_heads_take_turns_in_one_buffer(head: torch.dtype, teacher_head: torch.dtype) -> None:
    """The workspace has room for one row of the wide head, and so for all of the narrow head."""
    x, w = normal(5, 8, seed=1).double().requires_grad_(), normal(2, 8, seed=2).to(head)
    tx, tw = normal(5, 1, seed=3), normal(2, 1, seed=4).to(teacher_head)
    loss = linear_divergence(x, w, tx, tw, chunk_bytes=100)
    true = linear_divergence_reference(x, w.double(), tx.double(), tw.double())
    assert isinstance(true, Tensor)
    assert error(loss.detach(), true.detach()) < 1e-12
    assert error(*(torch.autograd.grad(value, x)[0] for value in (loss, true))) < 1e-12


@pytest.mark.parametrize("room", [1, 4, 100])
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_over_fp32_weights(impl: str, room: int) -> None:
    """Values do not depend on how often the heads are cast."""
    tensors = make(torch.float32, torch.float32)
    rounded = [t.detach().bfloat16().double() for t in tensors]
    want = gradients(linear_divergence_reference, [t.requires_grad_(i < 2) for i, t in enumerate(rounded)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(linear_divergence, tensors, impl=impl, chunk_bytes=room * V * H)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert error(a, b) < 5e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_bf16_products_of_bf16_hidden_states_and_an_fp32_head(impl: str) -> None:
    """FSDP2's mixed precision, without autocast."""
    tensors = make(torch.bfloat16, torch.float32)
    exact = [t.detach().double() for t in tensors]
    rounded = [t.detach().bfloat16().double() for t in tensors]
    for options, values in (({}, exact), ({"products": "bfloat16"}, rounded)):
        want = gradients(linear_divergence_reference, [t.requires_grad_(i < 2) for i, t in enumerate(values)])
        got = gradients(linear_divergence, tensors, impl=impl, **options)
        assert [g.dtype for g in got] == [torch.float32, torch.bfloat16, torch.float32]
        assert error(got[0], want[0]) < 1e-5
        assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 5e-3
    seen = run_inside(tensors, (True, True), torch.bfloat16)
    assert (V, H) in seen.cast
    assert (V, H) not in run_inside(tensors, (True, True), None).cast


def test_bf16_products_of_the_other_losses() -> None:
    x, w, _, _ = make(torch.bfloat16, torch.float32)
    narrow = w.detach().bfloat16()
    labels, ids, logprobs = torch.arange(N), torch.arange(2 * N).view(N, 2), normal(N, 2) - 3
    for loss in (
        lambda w, **o: linear_cross_entropy(x, w, labels, **o),
        lambda w, **o: linear_topk_divergence(x, w, ids, logprobs, **o),
    ):
        assert loss(w, products="bfloat16") == loss(narrow) != loss(w)
    with pytest.raises(ValueError, match="products='bfloat16' would round float64 inputs"):
        linear_cross_entropy(x.double(), w, labels, products="bfloat16")


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_of_a_bf16_head_is_written_in_bf16_if_one_chunk_holds_the_call(impl: str) -> None:
    tensors = make(torch.bfloat16, torch.bfloat16)
    want = gradients(
        linear_divergence_reference, [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    )
    for budget in (None, 2**14):
        got = gradients(linear_divergence, tensors, impl=impl, chunk_bytes=budget)
        assert got[2].dtype == torch.bfloat16
        assert error(got[2], want[2]) < 4e-3
    whole, parts = ((V, H), torch.bfloat16), ((V, H), torch.float32)
    # dX is not asked for: its product on a CPU would widen the head.
    assert {whole, parts} & run_inside(tensors, (False, True), None).made == {whole}
    assert {whole, parts} <= run_inside(tensors, (False, True), None, chunk_bytes=2**14).made


def test_operands_are_wide_where_the_gpu_has_no_narrow_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 before sm_80, and fp16 with fp16 accumulation, raised inside the product."""
    gpu, bf16, fp16, fp32 = torch.device("cuda"), torch.bfloat16, torch.float16, torch.float32
    properties = {"capability": (7, 5)}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: properties["capability"])
    assert operands.operand_dtype(bf16, fp32, gpu) == fp32
    assert operands.operand_dtype(fp16, fp32, gpu) == fp16
    for properties["capability"] in ((8, 0), (9, 0), (12, 0)):
        assert operands.operand_dtype(bf16, fp32, gpu) == bf16
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        assert operands.operand_dtype(fp16, fp32, gpu) == fp32
        assert operands.operand_dtype(bf16, fp32, gpu) == bf16
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert operands.operand_dtype(bf16, fp32, gpu) == fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_with_wide_operands(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on such a GPU: values are those of the rounded inputs, and no product has narrow operands."""
    for module in (projection, linear_module):
        monkeypatch.setattr(module, "operand_dtype", lambda product, result, device: result)
    tensors = make(dtype, dtype)
    want = gradients(
        linear_divergence_reference, [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    )
    for budget in (None, 2**14):
        got = gradients(linear_divergence, tensors, impl="triton", chunk_bytes=budget)
        assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 4e-3
    products: list[torch.dtype] = []

    def note(a: Tensor, b: Tensor, out: Tensor, **factors: float) -> None:
        products.extend((a.dtype, b.dtype))
        operands.mm32(a, b, out, **factors)

    monkeypatch.setattr(projection, "mm32", note)
    run_inside(tensors, (True, True), None)
    assert set(products) == {torch.float32}
