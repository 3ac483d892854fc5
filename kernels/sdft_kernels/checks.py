"""The options of a call, their validation, and the per-token outputs.

Every message names the field, the given value and the fix. Nothing here reads the values of a tensor, so no check makes
the host wait for a device.
"""

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

DivergenceName = Literal["reverse_kl", "forward_kl", "jsd"]
Reduction = Literal["mean", "sum", "none"]
Impl = Literal["triton", "torch"]
LinearImpl = Literal["triton", "torch", "triton_dual"]  # of linear_divergence
Same = Literal["same"]
Products = Literal["bfloat16"]

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
PRODUCTS = ("bfloat16",)
REDUCTIONS = ("mean", "sum", "none")
IMPLS = ("triton", "torch")
LINEAR_IMPLS = (*IMPLS, "triton_dual")
HAVE_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels then run on the CPU, for tests
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TokenStats(NamedTuple):
    """Per-token outputs, all (N,), detached, fp32 (fp64 for fp64 inputs); zeros if the weight is zero."""

    divergence: Tensor  # D_n, not multiplied by the token's weight
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprob: Tensor | None  # of labels[n]; None without labels
    teacher_logprob: Tensor | None
    top1_agree: Tensor  # bool: both sides share a most likely token


@dataclass(frozen=True)
class Activation:
    """What one model does to its raw logits: z = softcap·tanh(scale·raw / softcap) / temperature."""

    scale: float
    softcap: float | None
    temperature: float


@dataclass(frozen=True)
class Options:
    """Everything static about one call, validated once."""

    kind: DivergenceName  # jsd with β = 0 or 1 is already forward_kl or reverse_kl here
    beta: float
    reduction: Reduction
    vocab: int
    student: Activation
    teacher: Activation
    return_tokens: bool
    chunk_bytes: int | None
    compact: bool
    impl: str

    @property
    def grad_factor(self) -> float:
        """The constant that the row math leaves out of the gradient with respect to raw logits."""
        inner = self.student.scale / self.student.temperature
        return inner * (self.beta - 1.0) if self.kind == "jsd" else inner

    # The types of flat's values, for an operator's schema. They are few, because at every call with a gradient torch
    # reads the whole schema once for each argument: 107 µs for 26 arguments, 47 µs for 17.
    SCHEMA: ClassVar[str] = "SymInt vocab, SymInt? chunk_bytes, float[] numbers, str words"

    def flat(self) -> tuple[int, int | None, list[float], str]:
        """The options as the values that an operator's schema can hold, in its order; a softcap of 0 is none."""
        s, t = self.student, self.teacher
        numbers = [self.beta, s.scale, s.softcap or 0.0, t.scale, t.softcap or 0.0, s.temperature]
        flags = ("tokens" if self.return_tokens else "-", "compact" if self.compact else "-")
        return self.vocab, self.chunk_bytes, numbers, " ".join((self.kind, self.reduction, self.impl, *flags))

    @classmethod
    def from_flat(cls, vocab: int, chunk_bytes: int | None, numbers: list[float], words: str) -> "Options":
        """The inverse of flat."""
        beta, s_scale, s_cap, t_scale, t_cap, temperature = numbers
        kind, reduction, impl, tokens, compact = words.split()
        return cls(
            kind=kind,  # type: ignore[arg-type]
            beta=beta,
            reduction=reduction,  # type: ignore[arg-type]
            vocab=vocab,
            student=Activation(s_scale, s_cap or None, temperature),
            teacher=Activation(t_scale, t_cap or None, temperature),
            return_tokens=tokens == "tokens",
            chunk_bytes=chunk_bytes,
            compact=compact == "compact",
            impl=impl,
        )


def check_choice(field: str, value: object, valid: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of valid."""
    if value not in valid:
        raise ValueError(f"{field}={value!r} is unknown: use one of {', '.join(map(repr, valid))}")


def check_positive(field: str, value: float | None, *, none_is_off: bool = False) -> None:
    """Raise ValueError unless value is a finite number above zero (or None, if None is allowed)."""
    if value is None and none_is_off:
        return
    hint = " or None for none" if none_is_off else ""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{field}={value!r} is not a finite number above 0: give one{hint}")


def check_beta(field: str, value: object) -> None:
    """Raise ValueError unless value is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{field}={value!r} is outside [0, 1]: 0 is forward KL, 1 is reverse KL")


def check_flag(field: str, value: object) -> None:
    """Raise ValueError unless value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{field}={value!r} is not a bool: give True or False")


def make_options(
    *,
    divergence: str,
    beta: float,
    temperature: float,
    reduction: str,
    vocab: int,
    return_tokens: bool,
    chunk_bytes: int | None,
    softcap: float | None = None,
    teacher_softcap: float | Same | None = "same",
    scale: float = 1.0,
    teacher_scale: float | Same = "same",
    compact: bool = True,
    impl: str = "torch",
) -> Options:
    """Validate the static arguments of one call; ValueError names what is wrong."""
    check_choice("divergence", divergence, DIVERGENCES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_beta("beta", beta)
    check_flag("return_tokens", return_tokens)
    check_flag("compact", compact)
    t_softcap = softcap if teacher_softcap == "same" else teacher_softcap
    t_scale = scale if teacher_scale == "same" else teacher_scale
    check_positive("temperature", temperature)
    check_positive("softcap", softcap, none_is_off=True)
    check_positive("scale", scale)
    for field, value, off in (("teacher_softcap", t_softcap, True), ("teacher_scale", t_scale, False)):
        if isinstance(value, str):
            raise ValueError(f"{field}={value!r} is unknown: give a number, or 'same' for the student's")
        check_positive(field, value, none_is_off=off)
    if chunk_bytes is not None and (type(chunk_bytes) is not int or chunk_bytes <= 0):
        raise ValueError(f"chunk_bytes={chunk_bytes!r} is not a positive integer: give bytes, or None for the default")
    kind = divergence
    if kind == "jsd" and beta in (0, 1):
        kind = "reverse_kl" if beta == 1 else "forward_kl"
    return Options(
        kind=kind,  # type: ignore[arg-type]
        beta=float(beta),
        reduction=reduction,  # type: ignore[arg-type]
        vocab=vocab,
        student=Activation(float(scale), softcap, float(temperature)),
        teacher=Activation(float(t_scale), t_softcap, float(temperature)),
        return_tokens=return_tokens,
        chunk_bytes=chunk_bytes,
        compact=compact,
        impl=impl,
    )


def is_sharded(value: object) -> bool:
    """Whether value is a DTensor. Does not import its module, which would take a second, without need."""
    if value is None or type(value) in (Tensor, torch.nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def check_plain(field: str, value: object) -> Tensor:
    """Return value; raise ValueError unless it is a tensor that lies whole on this rank."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{field} is a {type(value).__name__}: give a tensor")
    if is_sharded(value):
        raise ValueError(
            f"{field} is a DTensor, but the loss takes rows that are whole on this rank: pass {field}.full_tensor(), "
            f"or {field}.to_local() if it is sharded by rows"
        )
    if value.layout != torch.strided:
        raise ValueError(f"{field} has layout {value.layout}: pass {field}.to_dense()")
    return value


def check_matrix(field: str, value: object, like: tuple[str, Tensor] | None = None) -> None:
    """Raise ValueError unless value is a 2-D floating tensor on the same device as `like`."""
    value = check_plain(field, value)
    if value.ndim != 2:
        raise ValueError(f"{field} has shape {tuple(value.shape)}: it must be 2-D; flatten batch and time first")
    if value.dtype not in FLOATS:
        raise ValueError(f"{field} has dtype {value.dtype}: use one of {', '.join(map(str, FLOATS))}")
    if like is not None and value.device != like[1].device:
        raise ValueError(f"{field} is on {value.device} but {like[0]} is on {like[1].device}: move one of them")


def check_head(field: str, w: Tensor, hidden: str, x: Tensor) -> None:
    """Raise ValueError unless w (V, H) can project x (..., H) onto at least one token."""
    if w.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{field} has hidden size {w.shape[1]} but {hidden} has {x.shape[-1]}: {field} must be (V, {x.shape[-1]})"
        )
    if w.shape[0] == 0:
        raise ValueError(f"{field} has no rows: give a head of at least one token")


def check_vector(field: str, value: Tensor | None, length: int, like: tuple[str, Tensor]) -> None:
    """Raise ValueError unless value is None or a 1-D tensor of that length on the same device as `like`."""
    if value is None:
        return
    value = check_plain(field, value)
    if value.shape != (length,):
        raise ValueError(f"{field} has shape {tuple(value.shape)}: it must be ({length},), one entry per row")
    if value.device != like[1].device:
        raise ValueError(f"{field} is on {value.device} but {like[0]} is on {like[1].device}: move one of them")


def check_bias(field: str, value: Tensor | None, vocab: int, like: tuple[str, Tensor]) -> None:
    """Raise ValueError unless value is None or a floating (V,) tensor on the same device as `like`."""
    check_vector(field, value, vocab, like)
    if value is not None and value.dtype not in FLOATS:
        raise ValueError(f"{field} has dtype {value.dtype}: use one of {', '.join(map(str, FLOATS))}")


def check_tokens(token_weights: Tensor | None, labels: Tensor | None, rows: int, like: tuple[str, Tensor]) -> None:
    """Validate the two per-token inputs. Their values are not read: a label >= vocab_size is not refused here."""
    check_vector("token_weights", token_weights, rows, like)
    check_vector("labels", labels, rows, like)
    if token_weights is not None and not token_weights.is_floating_point():
        raise ValueError(f"token_weights has dtype {token_weights.dtype}: convert it with .float()")
    if token_weights is not None and token_weights.requires_grad:
        raise ValueError("token_weights requires grad, and no gradient flows to it: pass token_weights.detach()")
    if labels is not None and labels.dtype != torch.int64:
        raise ValueError(f"labels has dtype {labels.dtype}: convert it with .long()")


def check_teacher(**tensors: Tensor | None) -> None:
    """Refuse teacher inputs that require grad: the teacher is a constant of the loss."""
    for field, value in tensors.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{field} requires grad, but no gradient flows to the teacher: pass {field}.detach()")


def check_writable(field: str, value: Tensor, other: str, reader: Tensor) -> None:
    """Raise ValueError if two entries of value (N, V), or an entry of value and one of reader, share memory."""
    rows, columns = value.shape
    row, column = value.stride()
    step = math.gcd(row, column)  # entries (i, j) and (i + column / step, j - row / step) are the same memory
    if rows * columns > 1 and (step == 0 or (column // step < rows and row // step < columns)):
        raise ValueError(
            f"inplace=True would write {field} with strides {value.stride()}, whose entries share memory: "
            f"use inplace=False, or pass {field}.clone()"
        )
    if _share_memory(value, reader):
        raise ValueError(
            f"inplace=True would write {field} over {other}, which lies in the same memory: use inplace=False, or "
            f"pass {other}.clone()"
        )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether entries of a and b, both 2-D, lie in the same memory; True if that is not easily excluded."""
    if a.numel() == 0 or b.numel() == 0 or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    first, last = zip(*(_range(t) for t in (a, b)), strict=True)
    if last[0] <= first[1] or last[1] <= first[0]:
        return False
    # Rows of both may alternate: row n of a up to its last column, then row n of b, within one row stride.
    row = a.stride(0)
    if a.dtype == b.dtype and a.stride() == b.stride() == (row, 1) and row > 0:
        gap = (first[1] - first[0]) // a.itemsize % row
        return not (a.shape[1] <= gap and gap + b.shape[1] <= row)
    return True


def _range(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte of a tensor and of the first byte after it."""
    entries = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + tensor.itemsize * entries


def check_vocab(vocab_size: int | None, student: int, teacher: int) -> int:
    """Return the number of vocabulary rows compared: vocab_size, or the smaller of the two."""
    most = min(student, teacher)
    if vocab_size is None:
        return most
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 0 < vocab_size <= most:
        raise ValueError(
            f"vocab_size={vocab_size!r} must be in 1..{most}: the student has {student} rows, the teacher {teacher}"
        )
    return vocab_size


def choose_impl(impl: str | None, dtype: torch.dtype, device: torch.device, known: tuple[str, ...] = IMPLS) -> str:
    """The implementation to run: Triton on a GPU and torch elsewhere, or the one asked for.

    Raises ValueError if the implementation does not exist or does not fit the dtype, and RuntimeError if it cannot run
    here: an explicit choice is never replaced by another.
    """
    if impl is None:
        return "triton" if device.type == "cuda" and dtype != torch.float64 and HAVE_TRITON else "torch"
    check_choice("impl", impl, known)
    if impl == "torch":
        return impl
    if dtype == torch.float64:
        raise ValueError(f"impl={impl!r} has no float64: use impl='torch', or convert the inputs with .float()")
    if not HAVE_TRITON:
        raise RuntimeError(f"impl={impl!r} needs triton, which is not installed: pip install triton, or impl='torch'")
    if device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"impl={impl!r} cannot run on {device}: move the tensors to a CUDA or ROCm GPU, or use impl='torch' or None"
        )
    return impl
