"""A call that a CUDA graph can capture: the host waits for nothing, and no values of a tensor decide anything.

The loop runs here on meta tensors, which have no values: code that reads one raises. Launches of Triton kernels are
recorded instead of made. `make gpu-proof` captures a call on a real GPU.
"""

import importlib
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from sdft_kernels import linear_cross_entropy, linear_divergence, linear_topk_divergence, operators
from sdft_kernels.checks import make_options
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

linear_module = importlib.import_module("sdft_kernels.linear_divergence")
logits_module = importlib.import_module("sdft_kernels.divergence")
entropy_module = importlib.import_module("sdft_kernels.cross_entropy")
topk_module = importlib.import_module("sdft_kernels.topk")
importlib.import_module("sdft_kernels.triton_rows")
N, V, H, K = 40, 300, 16, 4
WAITS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique"}
Capture = tuple[list[str], list[str]]


class Host(TorchDispatchMode):
    """Notes the operators whose work the host waits for or takes part in: reads, and copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.names: list[str] = []

    def note(self, name: str, make: Any) -> Any:
        """make, which copies a number of the host to the device of its result."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            out = make(*args, **kwargs)
            if out.device.type != "cpu":
                self.waits.append(name)
            return out

        return noted

    def __enter__(self) -> "Host":
        self.patch = pytest.MonkeyPatch()
        for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")):
            self.patch.setattr(owner, name, self.note(name, getattr(owner, name)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        self.names.append(name)
        kinds = {a.device.type for a in args if isinstance(a, Tensor) and (a.ndim > 0 or name in ("copy_", "_to_copy"))}
        if name in WAITS or "cpu" in kinds:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def autocast_of_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.autocast refuses the meta device."""
    real = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, **given: nullcontext() if kind == "meta" else real(kind, **given)
    )


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the Triton kernels that were launched since."""
    seen: list[str] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            assert all(type(size) is int for size in grid)
            return lambda *args, **kwargs: seen.append(self.name)

    for module in [m for name, m in sys.modules.items() if name.startswith("sdft_kernels.")]:
        for name, value in list(vars(module).items()):
            if type(value).__name__ in ("JITFunction", "InterpretedFunction"):
                monkeypatch.setattr(module, name, Recorded(name))
    return seen


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def options(**given: Any) -> tuple[Any, ...]:
    plain: dict[str, Any] = {"divergence": "reverse_kl", "beta": 0.3, "temperature": 1.0, "reduction": "mean"}
    plain |= {"vocab": V, "return_tokens": False, "chunk_bytes": None, "compact": False, "impl": "triton"}
    return make_options(**plain | given).flat()


LINEAR: dict[str, dict[str, Any]] = {
    "mean": {},
    "jsd in chunks": {"divergence": "jsd", "chunk_bytes": 2**15},
    "tokens": {"return_tokens": True, "softcap": 3.0, "reduction": "sum"},
    "none": {"reduction": "none", "divergence": "forward_kl"},
}


def tensors(hidden: torch.dtype, head: torch.dtype) -> tuple[Tensor, ...]:
    """x, w, bias, teacher_x, teacher_w, teacher_bias."""
    side = meta(N, H, dtype=hidden), meta(V + 4, H, dtype=head), meta(V + 4, dtype=head)
    return *side, meta(N, 2 * H, dtype=hidden), meta(V, 2 * H, dtype=head), meta(V)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("which", list(LINEAR))
def test_a_linear_call_can_be_captured(
    which: str, dtypes: tuple[torch.dtype, torch.dtype], weighted: bool, launches: list[str]
) -> None:
    given = tensors(*dtypes)
    weights = meta(N) if weighted else None
    labels = meta(N, dtype=torch.int64)
    plain = (True, True, True, None, *options(**LINEAR[which]))
    with Host() as host:
        loss, *_, dx, dw, db = linear_module._forward(*given, weights, labels, None, *plain)
        made = [operators.scale_grad(g, loss, "triton") for g in (dx, dw, db) if g.numel()]
        if which == "none":
            *_, dx, dw, db = linear_module._forward(*given, weights, labels, loss, *plain)
    assert not host.waits
    assert "mm" in " ".join(host.names)
    assert launches.count("scale_kernel") == len(made)
    assert len(launches) > len(made)
    assert dx.shape == given[0].shape
    assert dw.shape == given[1].shape
    with Host() as again:
        linear_module._forward(*given, weights, labels, None, *plain)
        for g in made:
            operators.scale_grad(g, loss, "triton")
        if which == "none":
            linear_module._forward(*given, weights, labels, loss, *plain)
    assert again.names == host.names, "a second call does the same work"


@pytest.mark.parametrize("weighted", [False, True])
def test_a_call_on_ready_logits_can_be_captured(weighted: bool, launches: list[str]) -> None:
    weights = meta(N) if weighted else None
    with Host() as host:
        logits_module._forward(meta(N, V), meta(N, V), weights, None, None, True, *options())
    assert not host.waits
    assert launches


def test_losses_without_a_triton_kernel_can_be_captured() -> None:
    x, w, labels = meta(N, H), meta(V, H), meta(N, dtype=torch.int64)
    ids, logprobs = meta(N, K, dtype=torch.int64), meta(N, K)
    for reduction in ("mean", "none"):
        plain = options(impl="torch", reduction=reduction, softcap=2.0, return_tokens=True)
        for upstream in (None, meta(N) if reduction == "none" else meta()):
            with Host() as host:
                given = (True, True, False, None)
                entropy_module._forward(x, w, None, labels, None, upstream, *given, False, *plain)
                entropy_module._forward(x, w, None, labels, None, upstream, *given, True, *plain)
                topk_module._forward(x, w, None, ids, logprobs, None, labels, upstream, *given, "bucket", 1e-7, *plain)
            assert not host.waits


@pytest.fixture
def no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the host reads token weights."""

    def look(*_: Any) -> None:
        raise AssertionError("the host waited")

    monkeypatch.setattr(Tensor, "nonzero", look)


def test_the_defaults_do_not_wait_if_no_token_weights_are_given(no_look: None) -> None:
    x, w = torch.randn(N, H), torch.randn(V, H)
    ids, logprobs = torch.arange(N * K).view(N, K), torch.full((N, K), -3.0)
    linear_divergence(x, w, x, w)
    linear_topk_divergence(x, w, ids, logprobs)
    linear_cross_entropy(x, w, torch.arange(N), ignore_index=None)
    with pytest.raises(AssertionError, match="the host waited"):
        linear_divergence(x, w, x, w, token_weights=torch.ones(N))
