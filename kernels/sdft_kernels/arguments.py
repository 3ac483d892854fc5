"""The keyword arguments of the public functions as types, apart from return_tokens, which decides what is returned."""

from typing import Literal, TypedDict

from torch import Tensor

from .checks import DivergenceName, Impl, LinearImpl, Products, Reduction, Same

Tail = Literal["bucket", "renormalise"]


class HeadOptions(TypedDict, total=False):
    """Arguments of every function that takes the student's hidden states and head."""

    bias: Tensor | None
    softcap: float | None
    scale: float
    products: Products | None


class LossOptions(TypedDict, total=False):
    """Arguments of every function."""

    temperature: float
    token_weights: Tensor | None
    reduction: Reduction
    vocab_size: int | None
    chunk_bytes: int | None


class LabelOptions(HeadOptions, LossOptions, total=False):
    """Arguments of `linear_cross_entropy`."""

    by_probability: bool
    ignore_index: int | None
    compact: bool


class TeacherOptions(LossOptions, total=False):
    """Arguments of every function that compares with a teacher."""

    divergence: DivergenceName
    beta: float
    labels: Tensor | None


class LogitsOptions(TeacherOptions, total=False):
    """Arguments of `divergence`."""

    inplace: bool
    compact: bool
    impl: Impl | None


class LinearOptions(HeadOptions, TeacherOptions, total=False):
    """Arguments of `linear_divergence`."""

    teacher_bias: Tensor | None
    teacher_softcap: float | Same | None
    teacher_scale: float | Same
    compact: bool
    impl: LinearImpl | None


class TopkOptions(TeacherOptions, total=False):
    """Arguments of `topk_divergence`."""

    tail: Tail
    tail_floor: float


class LinearTopkOptions(HeadOptions, TopkOptions, total=False):
    """Arguments of `linear_topk_divergence`."""
