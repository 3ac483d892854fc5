"""Hidden states and heads -> losses of tokens.

Legend: B sequences, T completion tokens, N = B·T rows, H hidden size, V vocabulary, k named tokens.
"""

from typing import Any

import torch
from sdft_kernels import linear_cross_entropy, linear_divergence
from torch import Tensor, nn

from sdft.model.language_model import Head, backbone

TOPK_BYTES = 2**28  # workspace for the logits of both sides while the student's top k are selected


def inner(lm: Any) -> Any:
    """The causal LM without a peft wrapper around it; its adapters stay."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def hidden_states(lm: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    """The hidden states that predict the last `keep` tokens: (B, S) ids and mask -> (B·keep, H)."""
    states = backbone(inner(lm))(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return states[:, -keep - 1 : -1].flatten(0, 1)


def options(head: Head, temperature: float) -> dict[str, Any]:
    """The student's head as the arguments of both losses."""
    return {"bias": head.bias, "scale": head.scale, "softcap": head.softcap, "temperature": temperature}


def fused(
    x: Tensor,  # (N, H_s)
    head: Head,
    teacher_x: Tensor,  # (N, H_t)
    teacher_head: Head,
    beta: float,
    temperature: float,
    weights: Tensor,  # (N,)
) -> tuple[Tensor, Any]:
    """sum_n w_n D_n and the values of the tokens. β is the same in TRL: 0 forward KL, 1 reverse KL, else JSD."""
    return linear_divergence(
        x,
        head.weight,
        teacher_x.detach(),
        teacher_head.weight.detach(),
        divergence="jsd",
        beta=beta,
        teacher_bias=None if teacher_head.bias is None else teacher_head.bias.detach(),
        teacher_scale=teacher_head.scale,
        teacher_softcap=teacher_head.softcap,
        token_weights=weights,
        reduction="sum",
        return_tokens=True,
        **options(head, temperature),
    )


def label_logprobs(x: Tensor, head: Head, labels: Tensor, temperature: float) -> Tensor:
    """log p(label_n) of rows (N, H): (N,) fp32, with its gradient."""
    return -linear_cross_entropy(
        x, head.weight, labels, ignore_index=None, reduction="none", **options(head, temperature)
    )


@torch.no_grad()
def students_topk(
    x: Tensor,  # (N, H_s)
    head: Head,
    teacher_x: Tensor,  # (N, H_t)
    teacher_head: Head,
    k: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The student's k likeliest tokens (N, k) int64, and their log-probabilities by the teacher (N, k) fp32.

    Logits have the dtype of the hidden states, as in TRL, and are computed for a block of rows at a time.
    """
    rows = max(1, TOPK_BYTES // (4 * 4 * head.weight.shape[0]))  # two sides, each also in fp32
    ids, logprobs = [], []
    for some, teachers in zip(x.split(rows), teacher_x.split(rows), strict=True):
        ids.append(head.logits(some).topk(k, dim=-1).indices)
        logits = teacher_head.logits(teachers).float() / temperature  # (rows, V)
        logprobs.append(logits.gather(1, ids[-1]) - logits.logsumexp(-1, keepdim=True))
    return torch.cat(ids), torch.cat(logprobs)
