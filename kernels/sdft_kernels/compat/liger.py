"""Liger-Kernel's divergence losses, with its names, signatures and semantics, on this package's loops.

    import sdft_kernels.compat.liger as liger
    from sdft_kernels.compat.liger import LigerJSD

Written for liger-kernel 0.8.5, which is neither imported nor needed. All four classes have in common:

- The student is the trained side. β = 0 is forward KL, KL(teacher‖student), β = 1 reverse KL, and between them
  the loss is β·KL(teacher‖m) + (1−β)·KL(student‖m) with m = β·teacher + (1−β)·student: in all of Liger's
  classes, and in `linear_divergence`. No τ² factor anywhere.
- Losses are fp32 whatever the inputs (fp64 if an input is fp64); gradients have their tensor's dtype.
- No gradient flows to the teacher, even if its tensors require one, as in Liger.
- Rows whose label is ignore_index count nothing, whatever they hold. A batch without any other has loss 0 and
  zero gradients.
- Options are attributes under Liger's names, read at every call.
- ValueError names an argument that is out of its range or does not fit the others; there is no double backward.

N tokens, V vocabulary, H hidden size; _s the student's, _t the teacher's.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..call import compute_dtype, unsharded
from ..checks import (
    check_beta,
    check_bias,
    check_choice,
    check_flag,
    check_head,
    check_matrix,
    check_plain,
    check_positive,
)
from ..cross_entropy import linear_cross_entropy
from ..linear_divergence import linear_divergence
from .log_space import log_space_jsd, log_space_kl

__all__ = ["LigerFusedLinearJSD", "LigerFusedLinearJSDLoss", "LigerJSD", "LigerKLDIVLoss"]

KL_REDUCTIONS = ("none", "sum", "mean", "batchmean")


class LigerFusedLinearJSDLoss(nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearJSDLoss`: cross-entropy of labels plus divergence, from hidden states.

    loss = weight_hard_loss · hard + weight_soft_loss · soft, each a mean over the tokens whose label is not
    ignore_index: hard is −log p(label) of the student over its V_s tokens at temperature 1, soft the divergence
    with both sides' logits divided by temperature.

    If the heads have different numbers of rows, soft compares the first min(V_s, V_t) tokens; Liger gives the
    missing student tokens the logit 0, which is no small probability, and fails for V_t < V_s. A frozen head has no
    dW (Liger computes it). Logits are fp32 for bf16 inputs too (Liger's are bf16). soft and hard, if returned,
    carry their gradients (Liger drops the gradients of a loss made from them). A part of weight 0 is not computed, or
    has no gradient if it is returned. The hard part runs the loop a second time and projects the student again.

    Args:
        weight_hard_loss, weight_soft_loss: finite factors of the two parts.
        beta: in [0, 1], 0 forward KL, 1 reverse KL.
        ignore_index: the label of rows that count nothing.
        temperature: above 0.
        compiled, chunk_size: accepted, and not read: there is nothing to compile, and chunks have as many tokens
            as fit into the default workspace of `linear_divergence`.
        return_soft_hard_loss: return (loss, soft, hard), not weighted, instead of the loss.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        _check_options(beta, ignore_index, temperature)
        for field, value in (("weight_hard_loss", weight_hard_loss), ("weight_soft_loss", weight_soft_loss)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{field}={value!r} is not a finite number: give one")
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Loss (), or (loss, soft, hard).

        student_input (..., H_s), student_weight (V_s, H_s), teacher_input (..., H_t), teacher_weight (V_t, H_t),
        true_labels (...) int64, student_bias (V_s,), teacher_bias (V_t,).
        """
        student_weight, student_bias = unsharded(student_weight), unsharded(student_bias)
        _check_student(student_input, student_weight, student_bias)
        labels = _flat_labels("true_labels", true_labels, student_input)
        soft_wanted = self.weight_soft_loss != 0 or self.weight_hard_loss == 0
        hard_wanted = self.weight_hard_loss != 0
        soft = hard = student_input.new_zeros((), dtype=torch.float32)
        if soft_wanted or self.return_soft_hard_loss:
            with torch.set_grad_enabled(soft_wanted and torch.is_grad_enabled()):
                soft = _fused(
                    student_input, student_weight, teacher_input, teacher_weight, labels, self.beta, self.ignore_index,
                    self.temperature, student_bias, teacher_bias,
                )  # fmt: skip
        if hard_wanted or self.return_soft_hard_loss:
            with torch.set_grad_enabled(hard_wanted and torch.is_grad_enabled()):
                hard = linear_cross_entropy(
                    student_input.flatten(0, -2),
                    student_weight,
                    labels,
                    bias=student_bias,
                    ignore_index=self.ignore_index,
                )
        parts = [w * part for w, part in ((self.weight_soft_loss, soft), (self.weight_hard_loss, hard)) if w != 0]
        loss = sum(parts[1:], parts[0]) if parts else 0.0 * soft
        return (loss, soft, hard) if self.return_soft_hard_loss else loss

    def extra_repr(self) -> str:
        return (
            f"weight_hard_loss={self.weight_hard_loss}, weight_soft_loss={self.weight_soft_loss}, beta={self.beta}, "
            f"ignore_index={self.ignore_index}, temperature={self.temperature}"
        )


class LigerFusedLinearJSD(nn.Module):
    """`liger_kernel.transformers.LigerFusedLinearJSD`: the divergence from hidden states.

    The mean over the tokens whose label is not ignore_index, or over all of them without labels. Heads with
    different numbers of rows compare their first min(V_s, V_t) tokens (Liger's kernel reads past the end of a row).
    As in Liger a frozen head has no dW. dW of a bf16 head is summed in fp32 and rounded once (Liger rounds the sum
    after every chunk unless accum_dtype is wider).

    Args:
        jsd_beta: in [0, 1], 0 forward KL, 1 reverse KL.
        ignore_index: the label of rows that count nothing.
        temperature: above 0; divides both sides' logits.
        accum_dtype: accepted, and not read: dW is summed in fp32 (fp64 for fp64 inputs).
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_options(jsd_beta, ignore_index, temperature, "jsd_beta")
        self.jsd_beta = jsd_beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """Loss (). student_input (..., H_s), student_weight (V_s, H_s), teacher_input (..., H_t), teacher_weight
        (V_t, H_t), shift_labels (...) int64 or None: already shifted: the token of row n."""
        student_weight = unsharded(student_weight)
        _check_student(student_input, student_weight, None)
        labels = None if shift_labels is None else _flat_labels("shift_labels", shift_labels, student_input)
        return _fused(
            student_input, student_weight, teacher_input, teacher_weight, labels, self.jsd_beta, self.ignore_index,
            self.temperature,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"jsd_beta={self.jsd_beta}, ignore_index={self.ignore_index}, temperature={self.temperature}"


class LigerJSD(nn.Module):
    """`liger_kernel.transformers.LigerJSD`: the divergence of log-probabilities that you already hold.

    As in Liger the gradient is taken with respect to the log-probabilities themselves, so a `log_softmax` before it
    works, and nothing is normalised here. Nothing of the size (N, V) is kept between forward and backward (Liger
    makes the gradient in the forward, even if none is needed, and an fp32 (N, V) of loss entries). A token of
    probability 0 counts 0, where Liger's 0·(−inf) is NaN; a row of infinite divergence keeps the value and gets
    gradient 0. The loss is fp32; Liger rounds it to the dtype of log_q. This runs on torch's elementwise
    operations, on a GPU too: `sdft_kernels.divergence`, from logits, saves the log_softmax, and the fused classes
    save the logits.

    Args:
        beta: in [0, 1], 0 forward KL, 1 reverse KL.
        ignore_index: the label of rows that count nothing.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100):
        super().__init__()
        _check_options(beta, ignore_index)
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """Loss (), the mean over the rows not ignored. log_q (N, V) the *student's* log-probabilities, log_p (N, V)
        the teacher's (Liger's names), shift_labels (N,) int64 or None."""
        _check_options(self.beta, self.ignore_index)
        _check_pair("log_q", log_q, "log_p", log_p)
        labels = None if shift_labels is None else _flat_labels("shift_labels", shift_labels, log_q)
        return log_space_jsd(log_q, log_p, labels, self.beta, self.ignore_index)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, ignore_index={self.ignore_index}"


class LigerKLDIVLoss(nn.KLDivLoss):
    """`liger_kernel.transformers.LigerKLDIVLoss`: KL(y_true‖y_pred), y_pred log-probabilities.

    Entry by entry y·(log max(y, eps) − y_pred), or e^y·(y − y_pred) with log_target=True; an entry of probability 0
    counts 0, even if y_pred is −inf (NaN in Liger and in torch). Reduced as in torch: "none" (N, V), "sum",
    "mean" over all N·V entries, "batchmean" over the N rows. There is no ignore_index, as in Liger. Only "none"
    makes an (N, V) in the forward, and that is its result.

    Args:
        eps: at least 0; the least probability whose logarithm is taken.
        size_average, reduce, reduction, log_target: as in torch.nn.KLDivLoss.
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf:
            raise ValueError(f"eps={eps!r} is not a finite number of at least 0: give one, 1e-10 for example")
        check_choice("reduction", self.reduction, KL_REDUCTIONS)
        check_flag("log_target", self.log_target)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Loss (), or (N, V) for "none". y_pred (N, V) log-probabilities; y_true (N, V) probabilities, or their
        logarithms with log_target=True."""
        check_choice("reduction", self.reduction, KL_REDUCTIONS)
        _check_pair("y_pred", y_pred, "y_true", y_true)
        return log_space_kl(y_pred, y_true, self.reduction, self.log_target, self.eps)


def _fused(
    student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor,
    labels: Tensor | None, beta: float, ignore_index: int, temperature: float,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mean divergence over the rows not ignored; the student's tensors are checked."""
    here = ("student_input", student_input)
    teacher_weight, teacher_bias = (
        unsharded(t.detach() if isinstance(t, Tensor) else t) for t in (teacher_weight, teacher_bias)
    )
    _check_hidden("teacher_input", teacher_input, here)
    check_matrix("teacher_weight", teacher_weight, here)
    if teacher_input.shape[:-1] != student_input.shape[:-1]:
        raise ValueError(
            f"teacher_input has shape {tuple(teacher_input.shape)} but student_input has {tuple(student_input.shape)}: "
            "all sizes but the last must agree, row n of both must predict the same token"
        )
    check_head("teacher_weight", teacher_weight, "teacher_input", teacher_input)
    check_bias("teacher_bias", teacher_bias, teacher_weight.shape[0], here)
    dtype = compute_dtype(student_input, student_weight, teacher_input, teacher_weight)
    return linear_divergence(
        student_input.flatten(0, -2),
        student_weight,
        teacher_input.detach().flatten(0, -2),
        teacher_weight.detach(),
        divergence="jsd",
        beta=beta,
        bias=student_bias,
        teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
        temperature=temperature,
        token_weights=None if labels is None else (labels != ignore_index).to(dtype),
    )


def _check_options(beta: float, ignore_index: int, temperature: float = 1.0, name: str = "beta") -> None:
    check_beta(name, beta)
    if type(ignore_index) is not int:
        raise ValueError(f"ignore_index={ignore_index!r} is not an integer: give the label to ignore, -100 by default")
    check_positive("temperature", temperature)


def _check_hidden(field: str, value: object, like: tuple[str, Tensor] | None = None) -> None:
    """Raise ValueError unless value is a floating tensor of at least two dimensions."""
    check_matrix(field, value.flatten(0, -2) if isinstance(value, Tensor) and value.ndim > 2 else value, like)


def _check_student(student_input: Tensor, student_weight: Tensor, student_bias: Tensor | None) -> None:
    _check_hidden("student_input", student_input)
    check_matrix("student_weight", student_weight, ("student_input", student_input))
    check_head("student_weight", student_weight, "student_input", student_input)
    check_bias("student_bias", student_bias, student_weight.shape[0], ("student_input", student_input))


def _check_pair(field: str, student: Tensor, other: str, teacher: Tensor) -> None:
    check_matrix(field, student)
    check_matrix(other, teacher, (field, student))
    if student.shape != teacher.shape:
        raise ValueError(
            f"{other} has shape {tuple(teacher.shape)} but {field} has {tuple(student.shape)}: they must be the same"
        )
    if student.shape[1] == 0:
        raise ValueError(f"{field} has no columns: give log-probabilities of at least one token")


def _flat_labels(field: str, labels: Tensor, student: Tensor) -> Tensor:
    """Labels (N,) of the student's rows."""
    check_plain(field, labels)
    rows = student.shape[:-1]
    if labels.shape not in (rows, (rows.numel(),)):
        raise ValueError(f"{field} has shape {tuple(labels.shape)}: it must be {tuple(rows)}, one label per row")
    if labels.dtype != torch.int64:
        raise ValueError(f"{field} has dtype {labels.dtype}: convert it with .long()")
    if labels.device != student.device:
        raise ValueError(f"{field} is on {labels.device} but the student is on {student.device}: move one of them")
    return labels.flatten()
