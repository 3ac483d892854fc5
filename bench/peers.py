"""Everything that is timed, one function each: ours, dense PyTorch, and the losses of other libraries.

A maker takes the name of a divergence and returns loss(x, w, teacher_x, teacher_w), the mean over tokens. It
imports its library only then, and an exception becomes the note of its row. Every library here defines β
as we do: 0 is forward KL, 1 is reverse KL.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from sdft_kernels import linear_divergence
from torch import Tensor

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BETA = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}
TOP_K = 100  # SDFTConfig.distillation_topk


@dataclass(frozen=True)
class Variant:
    """A loss, its name, and what the benchmark needs to run it."""

    name: str
    make: Callable[[str], Loss]
    planes: int = 0  # (N, V) tensors at its peak, measured for the KLs (jsd takes more); 0 if it keeps no whole logits
    compiled: bool = False  # costs many seconds of compilation for every new shape
    divergences: tuple[str, ...] = tuple(BETA)
    devices: tuple[str, ...] = ("cpu", "cuda")


def ours(divergence: str, impl: str | None = None, chunk_bytes: int | None = None) -> Loss:
    """`sdft_kernels.linear_divergence`."""
    return partial(linear_divergence, divergence=divergence, impl=impl, chunk_bytes=chunk_bytes)


def dense(divergence: str) -> Loss:
    """The plain implementation: both logits, their log-softmax, and autograd."""
    beta = BETA[divergence]

    def loss(x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor) -> Tensor:
        s, t = (logits.log_softmax(-1) for logits in both_logits(x, w, teacher_x, teacher_w))
        if divergence == "reverse_kl":
            return (s.exp() * (s - t)).sum(-1).mean()
        if divergence == "forward_kl":
            return (t.exp() * (t - s)).sum(-1).mean()
        m = torch.logaddexp(s + math.log(1 - beta), t + math.log(beta))
        return (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1).mean()

    return loss


def dense_compiled(divergence: str) -> Loss:
    """The same under torch.compile, for exactly this shape."""
    return torch.compile(dense(divergence), dynamic=False)


def liger_fused(divergence: str) -> Loss:
    """Liger-Kernel's Triton JSD from hidden states, accumulating dW in fp32."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=BETA[divergence], accum_dtype=torch.float32)
    return lambda *tensors: module(*tensors, None)  # no labels: every row counts


def liger_chunked(divergence: str) -> Loss:
    """Liger-Kernel's chunked loss, compiled as by default; its cross-entropy part has weight 0."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[divergence])
    return lambda x, *others: module(x, *others, torch.zeros(x.shape[0], dtype=torch.int64, device=x.device))


def fla_fused(divergence: str) -> Loss:
    """flash-linear-attention's Triton forward KL from hidden states."""
    from fla.modules.fused_kl_div import FusedKLDivLoss

    module = FusedKLDivLoss()
    return lambda x, w, teacher_x, teacher_w: module(x, teacher_x, w, teacher_w)


def trl_chunked(divergence: str) -> Loss:
    """The loss of TRL's DistillationTrainer: Triton over tiles of fp32 logits, made again in the backward pass."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor) -> Tensor:
        values, _ = ChunkedDivergenceFunction.apply(x, w, None, teacher_x, teacher_w, None, BETA[divergence])
        return values.mean()

    return loss


def trl_full(divergence: str) -> Loss:
    """TRL's SDFTTrainer, distillation_mode="full_logits"."""
    from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss as values

    return lambda *tensors: values(*both_logits(*tensors), distillation_alpha=BETA[divergence]).mean()


def trl_top_k(divergence: str) -> Loss:
    """TRL's SDFTTrainer, distillation_mode="topk_logits" (its default), the tail in one bucket."""
    from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss as values

    def loss(*tensors: Tensor) -> Tensor:
        student, teacher = both_logits(*tensors)
        return values(
            student,
            teacher,
            distillation_topk=min(TOP_K, student.shape[-1]),
            distillation_alpha=BETA[divergence],
            distillation_add_tail=True,
        ).mean()

    return loss


def trl_gkd(divergence: str) -> Loss:
    """TRL's GKDTrainer."""
    from trl.experimental.gkd import GKDTrainer

    # Without labels "batchmean" divides by the first dimension, which is the rows here.
    return lambda *tensors: GKDTrainer.generalized_jsd_loss(*both_logits(*tensors), beta=BETA[divergence])


def both_logits(x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor) -> tuple[Tensor, Tensor]:
    """The logits that losses of ready logits take, in the inputs' dtype as a model returns them."""
    return x @ w.T, teacher_x @ teacher_w.T


VARIANTS = (
    Variant("sdft_kernels triton", partial(ours, impl="triton"), devices=("cuda",)),
    Variant("sdft_kernels torch", partial(ours, impl="torch")),
    Variant("dense", dense, planes=5),
    Variant("dense, compiled", dense_compiled, planes=3, compiled=True),
    Variant("Liger fused JSD", liger_fused),
    Variant("Liger chunked", liger_chunked, compiled=True),
    Variant("TRL chunked", trl_chunked),
    Variant("TRL SDFT, full logits", trl_full, planes=7),
    Variant(f"TRL SDFT, top {TOP_K}", trl_top_k, planes=5),
    Variant("TRL GKD", trl_gkd, planes=9),
    Variant("flash-linear-attention", fla_fused, divergences=("forward_kl",)),
)
