"""Attention over sequences that lie end to end in one row and do not see each other.

flash-attn takes the bounds of the sequences. Without flash-attn, PyTorch's attention runs once for each sequence: there
is no mask of T x T entries, and nothing is computed that such a mask would hide.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdft.device import has_mixed_attention, mixed_attention
from sdft.model.lean import autocast_dtype

NAME = "sdft_packed"  # as sdpa, and for packed rows


def register() -> None:
    """Registers NAME with transformers, with sdpa's masks for padded rows."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def packed_arguments(lengths: Sequence[int], device: torch.device, implementation: str) -> dict[str, Any]:
    """Arguments of a transformers backbone besides input_ids (1, T) that keep sequences of these lengths apart."""
    positions = torch.tensor([[p for n in lengths for p in range(n)]], device=device)  # (1, T)
    if implementation == NAME:
        # transformers passes a mask of four dimensions through; otherwise it would build a mask of T x T.
        unused = torch.zeros(1, 1, 1, 1, device=device)
        return {"position_ids": positions, "attention_mask": unused, "lengths": tuple(lengths)}
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], device=device, dtype=torch.int32)  # (B + 1,)
    longest = max(lengths)
    return {
        "position_ids": positions,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def attend(
    module: torch.nn.Module,
    query: Tensor,  # (B, heads, T, D)
    key: Tensor,  # (B, heads of keys, T, D)
    value: Tensor,  # (B, heads of keys, T, D)
    attention_mask: Tensor | None,
    lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """PyTorch's scaled dot-product attention (B, T, heads, D); with `lengths`, each sequence by itself."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    kept = torch.is_grad_enabled() and not options.get("dropout")
    mixed = kept and autocast_dtype(query) == torch.bfloat16 and has_mixed_attention(query.device)
    if mixed:
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    parts = []
    for q, k, v in zip(*(x.split(list(lengths), dim=2) for x in (query, key, value)), strict=True):  # (1, heads, t, D)
        mask = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            near = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)  # (t, t)
            mask = near.tril().triu(1 - sliding_window)[None, None]
        elif mixed:
            parts.append(mixed_attention(q, k, v, options.get("scaling")).transpose(1, 2))
            continue
        parts.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])  # (1, t, heads, D)
    return torch.cat(parts, dim=1), None
