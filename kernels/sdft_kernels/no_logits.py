"""Triton without logits: both projections, the statistics and the gradient tile by tile, nothing of size N·V kept.

A candidate beside triton_impl, not the default: it computes every tile of both sides' logits twice (JSD: three
times), 12 NVH FLOPs (16) where the chunked loop takes 8. Skipping the gradient's products where a tile holds
next to none of it saves at most 4 of them; what it surely saves is the traffic and the memory of the logits. After
Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009), which does so for the loss of labels.

Three steps: statistics of every row, a range of the vocabulary per program, merged afterwards; for JSD a second
pass over the tiles; then the gradient, where one program computes one tile of both sides' logits once more.
dX and dW are sums of atomic additions: not the same from run to run in the last fp32 bits.

N tokens, R of them at work (those with a weight), V vocabulary, H hidden size; BM, BN, BK a tile of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .call import Grads, Inputs, Result, new_grads
from .checks import INTERPRETED, Options
from .chunks import Outputs, put
from .row_kernels import (
    FORWARD,
    FP16_MAX,
    KINDS,
    REVERSE,
    activate,
    finite_or_zero,
    gradient,
    inner_outer,
    merge_jsd,
    merge_tile,
    rescaled,
    round_to_bf16,
)
from .triton_impl import fp16_scales, operand_dtype
from .tuning import device_class, splits_of, tile_blocks

STATS = 8  # of a row in one range of the vocabulary, in the order of statistics_kernel's stores
GROUP = tl.constexpr(8)  # row blocks that share a tile of the head while it is in cache
MERGE_BLOCK = {"BM": 16, "BK": 64}


@triton.jit
def token_rows(index_ptr, row, R, INDEX: tl.constexpr):
    """Which tokens the rows of a block are; past the last row, that one again, so that no load needs a mask."""
    n = tl.minimum(row, R - 1).to(tl.int64)
    if INDEX:
        n = tl.load(index_ptr + n)
    return n


@triton.jit
def tile_logits(
    x_ptr, w_ptr, bias_ptr, n, start, V, H, x_stride, w_stride, inner, outer,
    BIAS: tl.constexpr, CAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """(BM, BN) final logits of tokens n from column `start`: fp32 sums, −inf past the vocabulary."""
    cols = start + tl.arange(0, BN)
    inside = tl.minimum(cols, V - 1)
    x_rows = x_ptr + n[:, None] * x_stride
    w_rows = w_ptr + inside[None, :].to(tl.int64) * w_stride
    raw = tl.zeros((BM, BN), tl.float32)
    for k in range(0, H, BK):
        ks = k + tl.arange(0, BK)
        x = tl.load(x_rows + ks[None, :], mask=ks[None, :] < H, other=0.0)  # (BM, BK)
        w = tl.load(w_rows + ks[:, None], mask=ks[:, None] < H, other=0.0)  # (BK, BN)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        raw = tl.dot(x, w, raw, input_precision="ieee")
    if BIAS:
        raw += tl.load(bias_ptr + inside).to(tl.float32)[None, :]
    z = activate(raw, inner, outer, CAP)
    return tl.where(cols[None, :] < V, z, -float("inf"))


@triton.jit(do_not_specialize=["R", "per_split"])
def statistics_kernel(
    x_ptr, w_ptr, bias_ptr, tx_ptr, tw_ptr, t_bias_ptr,  # both sides' operands
    index_ptr,  # (R,)
    part_ptr,  # (STATS, splits, R)
    R, V, H, T_H, x_stride, w_stride, tx_stride, tw_stride, s_inner, s_outer, t_inner, t_outer, per_split,
    KIND: tl.constexpr, TOKENS: tl.constexpr, INDEX: tl.constexpr,
    S_BIAS: tl.constexpr, T_BIAS: tl.constexpr, S_CAP: tl.constexpr, T_CAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Statistics of BM rows over per_split tiles of the vocabulary."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    n = token_rows(index_ptr, row, R, INDEX)
    low = tl.full((BM,), -float("inf"), tl.float32)
    zero = tl.zeros((BM,), tl.float32)
    m_s, z_s, b_s, m_t, z_t, b_t, a, top = low, zero, zero, low, zero, zero, zero, low
    first = split * per_split * BN
    for start in range(first, tl.minimum(first + per_split * BN, V), BN):
        s = tile_logits(x_ptr, w_ptr, bias_ptr, n, start, V, H, x_stride, w_stride, s_inner, s_outer,
                        S_BIAS, S_CAP, BM, BN, BK, WIDEN)  # fmt: skip
        t = tile_logits(tx_ptr, tw_ptr, t_bias_ptr, n, start, V, T_H, tx_stride, tw_stride, t_inner, t_outer,
                        T_BIAS, T_CAP, BM, BN, BK, WIDEN)  # fmt: skip
        m_s, z_s, b_s, m_t, z_t, b_t, a, top = merge_tile(s, t, m_s, z_s, b_s, m_t, z_t, b_t, a, top, KIND, TOKENS, 1)

    out = part_ptr + split.to(tl.int64) * R + row
    step = splits.to(tl.int64) * R
    mask = row < R
    tl.store(out, m_s, mask=mask)
    tl.store(out + step, z_s, mask=mask)
    tl.store(out + 2 * step, m_t, mask=mask)
    tl.store(out + 3 * step, z_t, mask=mask)
    tl.store(out + 4 * step, a, mask=mask)
    if TOKENS:
        tl.store(out + 5 * step, b_s, mask=mask)
        tl.store(out + 6 * step, b_t, mask=mask)
        tl.store(out + 7 * step, top, mask=mask)


@triton.jit
def label_logits(
    x_ptr, w_ptr, bias_ptr, n, label, V, H, x_stride, w_stride, inner, outer,
    BIAS: tl.constexpr, CAP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(BM,) final logits of one label each, NaN for one outside the vocabulary.

    Computed anew: picking them out of the tiles would cost two selections per logit, and registers.
    """
    known = (label >= 0) & (label < V)
    label = tl.where(known, label, 0)
    raw = tl.zeros((BM,), tl.float32)
    for k in range(0, H, BK):
        ks = (k + tl.arange(0, BK))[None, :]
        x = tl.load(x_ptr + n[:, None] * x_stride + ks, mask=ks < H, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + label[:, None] * w_stride + ks, mask=ks < H, other=0.0).to(tl.float32)
        raw += tl.sum(x * w, 1)
    if BIAS:
        raw += tl.load(bias_ptr + label).to(tl.float32)
    return tl.where(known, activate(raw, inner, outer, CAP), float("nan"))


@triton.jit(do_not_specialize=["R", "splits"])
def merge_kernel(
    x_ptr, w_ptr, bias_ptr, tx_ptr, tw_ptr, t_bias_ptr,
    index_ptr, weight_ptr, label_ptr,  # (R,), (N,), (N,)
    part_ptr,  # (STATS, splits, R)
    row_ptr,  # (5, R): maxima of the student and the teacher, log-sum-exps above them, center
    d_ptr, s_entropy_ptr, t_entropy_ptr, s_logprob_ptr, t_logprob_ptr, agree_ptr,  # (N,) outputs
    R, V, H, T_H, x_stride, w_stride, tx_stride, tw_stride, s_inner, s_outer, t_inner, t_outer, splits,
    KIND: tl.constexpr, TOKENS: tl.constexpr, LABELS: tl.constexpr, WEIGHTS: tl.constexpr, INDEX: tl.constexpr,
    S_BIAS: tl.constexpr, T_BIAS: tl.constexpr, S_CAP: tl.constexpr, T_CAP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Merge a row's ranges; store its outputs (but JSD's divergence) and what the gradient needs."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    n = token_rows(index_ptr, row, R, INDEX)
    m_s = tl.full((BM,), -float("inf"), tl.float32)
    m_t, top, zero = m_s, m_s, tl.zeros((BM,), tl.float32)
    z_s, b_s, z_t, b_t, a = zero, zero, zero, zero, zero
    rows = tl.cast(R, tl.int64)
    step = splits * rows
    for split in range(0, splits):
        part = part_ptr + split * rows + tl.minimum(row, R - 1)
        m_s2, m_t2 = tl.load(part), tl.load(part + 2 * step)
        z_s2, z_t2 = tl.load(part + step), tl.load(part + 3 * step)
        new_s, new_t = tl.maximum(m_s, m_s2), tl.maximum(m_t, m_t2)
        ref_s, ref_t = finite_or_zero(new_s), finite_or_zero(new_t)
        r_s, r_s2 = tl.exp(m_s - ref_s), tl.exp(m_s2 - ref_s)
        r_t, r_t2 = tl.exp(m_t - ref_t), tl.exp(m_t2 - ref_t)
        up_s, up_s2 = ref_s - finite_or_zero(m_s), ref_s - finite_or_zero(m_s2)
        up_t, up_t2 = ref_t - finite_or_zero(m_t), ref_t - finite_or_zero(m_t2)
        if KIND == REVERSE:
            a2 = tl.load(part + 4 * step) + z_s2 * (up_t2 - up_s2)
            a = rescaled(a + z_s * (up_t - up_s), r_s) + rescaled(a2, r_s2)
        if KIND == FORWARD:
            a2 = tl.load(part + 4 * step) + z_t2 * (up_s2 - up_t2)
            a = rescaled(a + z_t * (up_s - up_t), r_t) + rescaled(a2, r_t2)
        if TOKENS:
            b_s2 = tl.load(part + 5 * step) - z_s2 * up_s2
            b_t2 = tl.load(part + 6 * step) - z_t2 * up_t2
            b_s = rescaled(b_s - z_s * up_s, r_s) + rescaled(b_s2, r_s2)
            b_t = rescaled(b_t - z_t * up_t, r_t) + rescaled(b_t2, r_t2)
            here = tl.where(m_t2 == new_t, tl.load(part + 7 * step), -float("inf"))
            top = tl.where(new_t > m_t, here, tl.maximum(top, here))
        z_s = z_s * r_s + z_s2 * r_s2
        z_t = z_t * r_t + z_t2 * r_t2
        m_s, m_t = new_s, new_t

    s_lse = tl.log(z_s)  # counted from the maximum
    t_lse = tl.log(z_t)
    mask = row < R
    out = row_ptr + row
    tl.store(out, m_s, mask=mask)
    tl.store(out + R, m_t, mask=mask)
    tl.store(out + 2 * R, s_lse, mask=mask)
    tl.store(out + 3 * R, t_lse, mask=mask)
    if WEIGHTS:  # the outputs of a row of weight 0 are zero already
        mask = mask & (tl.load(weight_ptr + n) != 0.0)
    if KIND == REVERSE:
        tl.store(out + 4 * R, a / z_s, mask=row < R)
        tl.store(d_ptr + n, a / z_s + tl.log(z_t / z_s), mask=mask)
    if KIND == FORWARD:
        tl.store(out + 4 * R, zero, mask=row < R)
        tl.store(d_ptr + n, a / z_t + tl.log(z_s / z_t), mask=mask)
    if TOKENS:
        tl.store(s_entropy_ptr + n, s_lse - b_s / z_s, mask=mask)
        tl.store(t_entropy_ptr + n, t_lse - b_t / z_t, mask=mask)
        tl.store(agree_ptr + n, tl.where(top >= m_s, 1, 0).to(tl.int8), mask=mask)
    if LABELS:
        label = tl.load(label_ptr + n)
        s = label_logits(x_ptr, w_ptr, bias_ptr, n, label, V, H, x_stride, w_stride, s_inner, s_outer,
                         S_BIAS, S_CAP, BM, BK)  # fmt: skip
        t = label_logits(tx_ptr, tw_ptr, t_bias_ptr, n, label, V, T_H, tx_stride, tw_stride, t_inner, t_outer,
                         T_BIAS, T_CAP, BM, BK)  # fmt: skip
        tl.store(s_logprob_ptr + n, s - m_s - s_lse, mask=mask)
        tl.store(t_logprob_ptr + n, t - m_t - t_lse, mask=mask)


@triton.jit(do_not_specialize=["R", "per_split"])
def jsd_kernel(
    x_ptr, w_ptr, bias_ptr, tx_ptr, tw_ptr, t_bias_ptr,
    index_ptr,
    part_ptr,  # (2, splits, R): k_p and k_q
    row_ptr,  # (5, R)
    R, V, H, T_H, x_stride, w_stride, tx_stride, tw_stride, s_inner, s_outer, t_inner, t_outer, per_split, beta,
    INDEX: tl.constexpr, S_BIAS: tl.constexpr, T_BIAS: tl.constexpr, S_CAP: tl.constexpr, T_CAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """k_p = Σ p·log(m/p) and k_q = Σ q·log(q/m) of BM rows over per_split tiles."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    n = token_rows(index_ptr, row, R, INDEX)
    stats = row_ptr + tl.minimum(row, R - 1)
    m_s, m_t = tl.load(stats)[:, None], tl.load(stats + R)[:, None]
    s_lse, t_lse = tl.load(stats + 2 * R)[:, None], tl.load(stats + 3 * R)[:, None]
    k_p, k_q = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    first = split * per_split * BN
    for start in range(first, tl.minimum(first + per_split * BN, V), BN):
        s = tile_logits(x_ptr, w_ptr, bias_ptr, n, start, V, H, x_stride, w_stride, s_inner, s_outer,
                        S_BIAS, S_CAP, BM, BN, BK, WIDEN)  # fmt: skip
        t = tile_logits(tx_ptr, tw_ptr, t_bias_ptr, n, start, V, T_H, tx_stride, tw_stride, t_inner, t_outer,
                        T_BIAS, T_CAP, BM, BN, BK, WIDEN)  # fmt: skip
        k_p, k_q = merge_jsd(s - m_s, t - m_t, s_lse, t_lse, k_p, k_q, beta, 1)
    out = part_ptr + split.to(tl.int64) * R + row
    tl.store(out, k_p, mask=row < R)
    tl.store(out + splits.to(tl.int64) * R, k_q, mask=row < R)


@triton.jit(do_not_specialize=["R"])
def gradient_kernel(
    x_ptr, w_ptr, bias_ptr, tx_ptr, tw_ptr, t_bias_ptr,
    index_ptr, weight_ptr,  # (R,), (N,)
    row_ptr, d_ptr,  # (5, R), (N,) divergences
    dx_ptr, dw_ptr, db_ptr,  # (R, H), (V, H), (V,) fp32, added to
    R, V, H, T_H, x_stride, w_stride, tx_stride, tw_stride, s_inner, s_outer, t_inner, t_outer, beta,
    factor, g_max, skip, curvature,
    KIND: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr, WEIGHTS: tl.constexpr,
    INDEX: tl.constexpr, S_BIAS: tl.constexpr, T_BIAS: tl.constexpr, S_CAP: tl.constexpr, T_CAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile, multiplied on into dX, dW and db unless it is negligible in every row.

    A tile is negligible in a row where Σ|dD/ds| over it is at most skip·R_n with R_n = min(1, √(2·curvature·D)).
    R_n estimates Σ|dD/ds| over the whole row: near the teacher D ≈ Var(u)/2 and the sum ≈ √Var(u).
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(R, BM)
    group = pid // (GROUP * tl.cdiv(V, BN)) * GROUP
    size = tl.minimum(blocks - group, GROUP)
    inner = pid % (GROUP * tl.cdiv(V, BN))
    row = (group + inner % size) * BM + tl.arange(0, BM)
    start = inner // size * BN

    n = token_rows(index_ptr, row, R, INDEX)
    s = tile_logits(x_ptr, w_ptr, bias_ptr, n, start, V, H, x_stride, w_stride, s_inner, s_outer,
                    S_BIAS, S_CAP, BM, BN, BK, WIDEN)  # fmt: skip
    t = tile_logits(tx_ptr, tw_ptr, t_bias_ptr, n, start, V, T_H, tx_stride, tw_stride, t_inner, t_outer,
                    T_BIAS, T_CAP, BM, BN, BK, WIDEN)  # fmt: skip
    stats = row_ptr + tl.minimum(row, R - 1)
    m_s, m_t = tl.load(stats)[:, None], tl.load(stats + R)[:, None]
    s_lse, t_lse, center = (
        tl.load(stats + 2 * R)[:, None],
        tl.load(stats + 3 * R)[:, None],
        tl.load(stats + 4 * R)[:, None],
    )
    d = tl.load(d_ptr + n)
    row_factor = tl.full((BM,), 1.0, tl.float32) * factor
    if WEIGHTS:
        row_factor *= tl.load(weight_ptr + n).to(tl.float32)
    # Nothing flows to rows past the last, of weight 0, or of infinite divergence, whatever they hold.
    live = (row < R) & (row_factor != 0.0) & (d != float("inf"))
    g = gradient(s - m_s, t - m_t, s_lse, t_lse, center, beta, KIND)
    g = tl.where(live[:, None], g, 0.0)
    limit = skip * tl.minimum(1.0, tl.sqrt(tl.maximum(2.0 * curvature * d, 0.0)))
    # Written so that NaN is not negligible. The factors, equal for the row or at most 1, play no part.
    counts = tl.where(tl.sum(tl.abs(g), 1) <= limit, 0, 1)
    if tl.max(counts, 0) == 0:
        return

    g *= row_factor[:, None]
    if S_CAP:
        slope = tl.where(s == -float("inf"), 0.0, s / s_outer)  # −inf only past the vocabulary
        g *= 1.0 - slope * slope
    g = tl.minimum(tl.maximum(g, -g_max), g_max)  # fp16 only; the bound is +inf elsewhere
    cols = start + tl.arange(0, BN)
    if DB:
        tl.atomic_add(db_ptr + cols, tl.sum(g, 0), mask=cols < V, sem="relaxed")
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if not WIDEN:
        g = g.to(dtype)
    elif dtype == tl.bfloat16:
        g = round_to_bf16(g)
    else:
        g = g.to(dtype).to(tl.float32)
    if DX:
        w_rows = w_ptr + tl.minimum(cols, V - 1).to(tl.int64)[:, None] * w_stride
        dx_rows = dx_ptr + row.to(tl.int64)[:, None] * H
    if DW:
        x_rows = x_ptr + n[:, None] * x_stride
        dw_rows = dw_ptr + cols.to(tl.int64)[:, None] * H
    for k in range(0, H, BH):
        ks = (k + tl.arange(0, BH))[None, :]
        if DX:
            w = tl.load(w_rows + ks, mask=ks < H, other=0.0)  # (BN, BH)
            if WIDEN:
                w = w.to(tl.float32)
            add = tl.dot(g, w, input_precision="ieee")
            tl.atomic_add(dx_rows + ks, add, mask=(row < R)[:, None] & (ks < H), sem="relaxed")
        if DW:
            x = tl.load(x_rows + ks, mask=live[:, None] & (ks < H), other=0.0)  # (BM, BH)
            if WIDEN:
                x = x.to(tl.float32)
            add = tl.dot(tl.trans(g), x, input_precision="ieee")
            tl.atomic_add(dw_rows + ks, add, mask=(cols < V)[:, None] & (ks < H), sem="relaxed")


def run_linear(
    inputs: Inputs,
    options: Options,
    grads: Grads,
    row_weights: Tensor | None,  # (N,) dLoss/dD_n, or None for `uniform` on every row
    uniform: float,
    keep: Tensor | None,  # (R,) indices of the rows that count, or None for all
    autocast: torch.dtype | None,
) -> Result:
    """Loss values of every row and Σ_n row_weights[n]·∂D_n. options.chunk_bytes plays no part: there are no chunks."""
    with torch.no_grad(), torch.autocast(inputs.x.device.type, enabled=False):
        outputs = Outputs(
            inputs.x.shape[0], inputs.dtype, inputs.x.device, options.return_tokens, inputs.labels is not None
        )
        result = new_grads(inputs, options, grads, Result(outputs.divergence, outputs.tokens()), keep is None)
        result.zero_grads()
        call = _Call(inputs, options, keep, autocast)
        if call.rows:
            stats = call.statistics(outputs, row_weights)
            if grads:
                call.gradients(result, stats, row_weights, uniform)
        return result


def as_operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast whole where the dtype is another (unlike triton_impl.Head), rows contiguous."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def skip_rule(options: Options, dtype: torch.dtype, tiles: int) -> tuple[float, float]:
    """(skip, curvature) of gradient_kernel: all that a row skips is within half a rounding of its gradient.

    For jsd the kernel's gradient is over −(1 − β), and D ≈ β(1 − β)·Var(u)/2.
    """
    share = torch.finfo(dtype).eps / 4 / tiles  # of bf16 2^-9, of fp16 2^-12, of fp32 2^-25
    if options.kind != "jsd":
        return share, 1.0
    return share / (1.0 - options.beta), options.beta * (1.0 - options.beta)


class _Call:
    """The operands, sizes and flags that every kernel of one call takes."""

    def __init__(self, inputs: Inputs, options: Options, keep: Tensor | None, autocast: torch.dtype | None):
        self.inputs, self.options, self.keep = inputs, options, keep
        self.rows = inputs.x.shape[0] if keep is None else keep.numel()
        s_dtype = operand_dtype(inputs.x, inputs.w, autocast)
        t_dtype = operand_dtype(inputs.teacher_x, inputs.teacher_w, autocast)
        x, w = as_operand(inputs.x, s_dtype), as_operand(inputs.w, s_dtype)
        tx = as_operand(inputs.teacher_x, t_dtype)
        tw = w if inputs.shared_head and s_dtype == t_dtype else as_operand(inputs.teacher_w, t_dtype)
        self.x, self.operands = x, (x, w, inputs.bias, tx, tw, inputs.teacher_bias)
        self.sizes = (
            self.rows, options.vocab, x.shape[1], tx.shape[1], x.stride(0), w.stride(0), tx.stride(0), tw.stride(0),
            *inner_outer(options.student), *inner_outer(options.teacher),
        )  # fmt: skip
        self.flags = {
            "INDEX": keep is not None, "S_BIAS": inputs.bias is not None, "T_BIAS": inputs.teacher_bias is not None,
            "S_CAP": options.student.softcap is not None, "T_CAP": options.teacher.softcap is not None,
            "enable_fp_fusion": True,
        }  # fmt: skip
        heavy = options.kind != "reverse_kl" or self.flags["S_CAP"] or self.flags["T_CAP"]
        self.blocks = tile_blocks(device_class(x.device), max(s_dtype.itemsize, t_dtype.itemsize), heavy)
        self.tile = {
            "BM": self.blocks.rows, "BN": self.blocks.vocab, "BK": self.blocks.hidden, "WIDEN": INTERPRETED,
            "num_warps": self.blocks.warps, "num_stages": self.blocks.stages,
        }  # fmt: skip
        self.row_blocks = triton.cdiv(self.rows, self.blocks.rows)
        self.tiles = triton.cdiv(options.vocab, self.blocks.vocab)

    def statistics(self, outputs: Outputs, row_weights: Tensor | None) -> Tensor:
        """Fill the outputs; returns the rows' five numbers, (5, R)."""
        rows, options, device = self.rows, self.options, self.x.device
        per_split = triton.cdiv(self.tiles, splits_of(device, self.row_blocks))
        splits = triton.cdiv(self.tiles, per_split)
        parts = torch.empty(STATS, splits, rows, dtype=torch.float32, device=device)
        stats = torch.empty(5, rows, dtype=torch.float32, device=device)
        s_entropy, t_entropy, s_logprob, t_logprob = outputs.rest
        form = {"KIND": KINDS[options.kind], "TOKENS": options.return_tokens} | self.flags
        statistics_kernel[(splits, self.row_blocks)](
            *self.operands, self.keep, parts, *self.sizes, per_split, **form, **self.tile
        )
        merge_kernel[(triton.cdiv(rows, MERGE_BLOCK["BM"]),)](
            *self.operands, self.keep, row_weights, self.inputs.labels, parts, stats,
            outputs.divergence, s_entropy, t_entropy, s_logprob, t_logprob,
            None if outputs.agree is None else outputs.agree.view(torch.int8), *self.sizes, splits,
            LABELS=s_logprob is not None, WEIGHTS=row_weights is not None, **form, **MERGE_BLOCK,
        )  # fmt: skip
        if options.kind == "jsd":
            jsd_kernel[(splits, self.row_blocks)](
                *self.operands, self.keep, parts, stats, *self.sizes, per_split, options.beta, **self.flags, **self.tile
            )
            k_p, k_q = parts[:2].sum(1)
            stats[4] = k_p
            d = options.beta * k_q - (1.0 - options.beta) * k_p
            if row_weights is not None and self.keep is None:  # no row of keep has weight 0
                d = torch.where(row_weights == 0, 0.0, d)
            put(outputs.divergence, self.keep, 0, rows, d)
        return stats

    def gradients(
        self,
        result: Result,  # gradients are zero; divergence is filled
        stats: Tensor,  # (5, R)
        row_weights: Tensor | None,
        uniform: float,
    ) -> None:
        """Add to the gradients that result has room for."""
        options, dx = self.options, result.dx
        if dx is not None and (self.keep is not None or dx.dtype != torch.float32):
            dx = torch.zeros(self.rows, dx.shape[1], dtype=torch.float32, device=dx.device)
        factor, fp16 = uniform * options.grad_factor, self.x.dtype == torch.float16
        if fp16:
            row_weights, factor, after = fp16_scales(row_weights, factor)
        gradient_kernel[(self.row_blocks * self.tiles,)](
            *self.operands, self.keep, row_weights, stats, result.divergence, dx, result.dw, result.dbias,
            *self.sizes, options.beta, factor, FP16_MAX if fp16 else float("inf"),
            *skip_rule(options, self.x.dtype, self.tiles),
            KIND=KINDS[options.kind], DX=dx is not None, DW=result.dw is not None, DB=result.dbias is not None,
            WEIGHTS=row_weights is not None, BH=self.blocks.out, **self.flags, **self.tile,
        )  # fmt: skip
        if result.dx is not None and dx is not None and dx is not result.dx:
            put(result.dx, self.keep, 0, self.rows, dx)
        if fp16:
            result.scale_grads(after)
