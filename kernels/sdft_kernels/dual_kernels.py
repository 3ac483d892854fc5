"""Triton: both sides' logits by one kernel that stores 4 bytes an entry instead of 8, and the gradient from these.

`tile_kernel` multiplies tiles of hidden states and heads. From the fp32 sums it makes the statistics of every row of
the tile, and stores for each entry

    E    max(e^x_s, e^x_t) in bf16      D    x_s − x_t in fp16

x_s and x_t are the logits of both sides, each relative to its maximum in the row of the tile. The larger exponential is
stored, so that neither side is lost if it underflows on the other, and so that an error of D, which grows with |D|,
meets e^−|D|. `tiles_row_kernel` merges the statistics of a row's tiles and writes the per-row values, which E and D
do not touch, and then the gradient over E.

C tokens of a chunk, V vocabulary, H hidden size; _s the student's, _t the teacher's.
"""

import triton
import triton.language as tl

from .row_math import (
    FORWARD,
    REVERSE,
    divergence,
    exp,
    finish_gradient,
    merge,
    round_to_bf16,
    store_zeros,
    weighted,
)

FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def tile_product(
    a_ptr, b_ptr, a_stride, a_step, b_stride, b_step, rows, cols, C, V, H,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(BM, BN) fp32: rows of a (C, H) times rows `cols` of b (V, H). Rows and columns past the end repeat others."""
    total = tl.zeros((BM, BN), tl.float32)
    k = tl.arange(0, BK)
    a_ptr += (rows % C).to(tl.int64)[:, None] * a_stride + k[None, :] * a_step
    b_ptr += (cols % V).to(tl.int64)[None, :] * b_stride + k[:, None] * b_step
    for start in range(0, H, BK):
        a = tl.load(a_ptr, mask=k[None, :] < H - start, other=0.0)
        b = tl.load(b_ptr, mask=k[:, None] < H - start, other=0.0)
        if WIDE:  # Triton's interpreter multiplies the bit patterns of bf16
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total)
        a_ptr += BK * a_step
        b_ptr += BK * b_step
    return total


@triton.jit(do_not_specialize=["room", "apart", "C"])
def tile_kernel(
    x_ptr, w_ptr, teacher_x_ptr, teacher_w_ptr,  # (C, H) and (V, H) of both sides
    e_ptr, d_ptr,  # (C, V) bf16 and fp16, rows `stride` apart
    statistics_ptr,  # (5, or 8 if TOKENS; tiles of a row; room) fp32, `apart` entries from one statistic to the next
    x_stride, x_step, w_stride, w_step, tx_stride, tx_step, tw_stride, tw_step, stride, room, apart,
    C, V, H, TH, s_inner, t_inner,
    KIND: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """E, D and statistics, tile by tile. A program takes every num_programs-th tile.

    All tokens of a chunk come before the next columns, so that the heads are read from memory once.
    """
    apart = tl.cast(apart, tl.int64)
    down = tl.cdiv(C, BM)
    across = tl.cdiv(V, BN)
    for tile in range(tl.program_id(0), down * across, tl.num_programs(0)):
        column = tile // down
        rows = tile % down * BM + tl.arange(0, BM)
        cols = column * BN + tl.arange(0, BN)
        s = s_inner * tile_product(
            x_ptr, w_ptr, x_stride, x_step, w_stride, w_step, rows, cols, C, V, H, BM, BN, BK, WIDE
        )
        t = t_inner * tile_product(
            teacher_x_ptr, teacher_w_ptr, tx_stride, tx_step, tw_stride, tw_step, rows, cols, C, V, TH, BM, BN, BK, WIDE
        )
        s = tl.where(cols[None, :] < V, s, -float("inf"))
        t = tl.where(cols[None, :] < V, t, -float("inf"))

        here = rows < C
        at = statistics_ptr + column.to(tl.int64) * room + rows
        m_s = tl.max(s, 1)
        m_t = tl.max(t, 1)
        tl.store(at, m_s, mask=here)
        tl.store(at + apart, m_t, mask=here)
        if TOKENS:
            top = tl.max(tl.where(t == m_t[:, None], s, -float("inf")), 1)
            tl.store(at + 5 * apart, top, mask=here)
        s -= m_s[:, None]
        t -= m_t[:, None]
        e_s = exp(s)
        e_t = exp(t)
        tl.store(at + 2 * apart, tl.sum(e_s, 1), mask=here)
        tl.store(at + 3 * apart, tl.sum(e_t, 1), mask=here)
        if TOKENS:
            tl.store(at + 6 * apart, tl.sum(weighted(e_s, s), 1), mask=here)
            tl.store(at + 7 * apart, tl.sum(weighted(e_t, t), 1), mask=here)
        d = s - t
        if KIND == REVERSE:
            tl.store(at + 4 * apart, tl.sum(weighted(e_s, d), 1), mask=here)
        if KIND == FORWARD:
            tl.store(at + 4 * apart, tl.sum(weighted(e_t, -d), 1), mask=here)

        e = tl.maximum(e_s, e_t)
        if WIDE:
            e = round_to_bf16(e)
        d = tl.minimum(tl.maximum(d, -FP16_MAX), FP16_MAX)
        where = rows.to(tl.int64)[:, None] * stride + cols[None, :]
        mask = here[:, None] & (cols[None, :] < V)
        tl.store(e_ptr + where, e.to(tl.bfloat16), mask=mask)
        tl.store(d_ptr + where, d.to(tl.float16), mask=mask)


@triton.jit
def one_logit(x_ptr, w_ptr, x_step, w_step, H, inner, BLOCK: tl.constexpr):
    """x · w times inner, for one row of each."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, H, BLOCK):
        k = (start + tl.arange(0, BLOCK)).to(tl.int64)
        x = tl.load(x_ptr + k * x_step, mask=k < H, other=0.0).to(tl.float32)
        total += x * tl.load(w_ptr + k * w_step, mask=k < H, other=0.0).to(tl.float32)
    return inner * tl.sum(total, 0)


@triton.jit
def both(a, b):
    """(T,) and (T,) -> (2, T)."""
    return tl.trans(tl.join(a, b))


@triton.jit(do_not_specialize=["room", "apart", "lo"])
def tiles_row_kernel(
    e_ptr, d_ptr, g_ptr, statistics_ptr,  # of tile_kernel; g_ptr is e_ptr's memory in the dtype of the gradient
    x_ptr, w_ptr, teacher_x_ptr, teacher_w_ptr,  # (N, H) and (V, H), read for LABELS
    weight_ptr, label_ptr, index_ptr,  # (N,) dLoss/dD, sampled tokens; (rows,) which token a program works on
    out_ptr, s_entropy_ptr, t_entropy_ptr, s_logprob_ptr, t_logprob_ptr, agree_ptr,  # (N,) outputs
    x_stride, x_step, w_stride, w_step, tx_stride, tx_step, tw_stride, tw_step, stride, room, apart,
    V, H, TH, lo, s_inner, t_inner, factor, g_max,
    KIND: tl.constexpr, GRAD: tl.constexpr, TOKENS: tl.constexpr, LABELS: tl.constexpr, WEIGHTS: tl.constexpr,
    INDEX: tl.constexpr, ROUND: tl.constexpr,
    TILES: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,  # tiles to merge at a time, columns of one, a block
):  # fmt: skip
    """All work on one row after tile_kernel: values from the merged statistics, the gradient from E and D."""
    here = tl.program_id(0).to(tl.int64)
    n = lo + here
    if INDEX:
        n = tl.load(index_ptr + n)
    if GRAD:
        g_ptr += here * stride
    row_factor = factor
    if WEIGHTS:
        weight = tl.load(weight_ptr + n).to(tl.float32)
        if weight == 0.0:  # the outputs are zero already
            if GRAD:
                store_zeros(g_ptr, V, BLOCK)
            return
        row_factor = factor * weight

    across = tl.cdiv(V, BN)
    apart = tl.cast(apart, tl.int64)
    statistics_ptr += here
    low = tl.full((TILES,), -float("inf"), tl.float32)
    none = tl.zeros((TILES,), tl.float32)
    m_s, z_s, b_s, m_t, z_t, b_t, a, top = low, none, none, low, none, none, none, low
    for first in range(0, across, TILES):
        tiles = first + tl.arange(0, TILES)
        there = tiles < across
        at = statistics_ptr + tiles.to(tl.int64) * room
        m_s = both(m_s, tl.load(at, mask=there, other=-float("inf")))
        m_t = both(m_t, tl.load(at + apart, mask=there, other=-float("inf")))
        z_s = both(z_s, tl.load(at + 2 * apart, mask=there, other=0.0))
        z_t = both(z_t, tl.load(at + 3 * apart, mask=there, other=0.0))
        a = both(a, tl.load(at + 4 * apart, mask=there, other=0.0))
        if TOKENS:
            top = both(top, tl.load(at + 5 * apart, mask=there, other=-float("inf")))
            b_s = both(b_s, tl.load(at + 6 * apart, mask=there, other=0.0))
            b_t = both(b_t, tl.load(at + 7 * apart, mask=there, other=0.0))
        m_s, z_s, b_s, m_t, z_t, b_t, a, top = merge(m_s, z_s, b_s, m_t, z_t, b_t, a, top, KIND, TOKENS)
    m_s, z_s, b_s, m_t, z_t, b_t, a, top = merge(m_s, z_s, b_s, m_t, z_t, b_t, a, top, KIND, TOKENS)
    value, center = divergence(z_s, z_t, a, 0.0, 0.0, 0.0, KIND)
    tl.store(out_ptr + n, value)

    if TOKENS:
        tl.store(s_entropy_ptr + n, tl.log(z_s) - b_s / z_s)
        tl.store(t_entropy_ptr + n, tl.log(z_t) - b_t / z_t)
        tl.store(agree_ptr + n, tl.where(top >= m_s, 1, 0).to(tl.int8))
        if LABELS:  # the logits of one token are not among the statistics; E has them to three digits
            label = tl.load(label_ptr + n)
            known = (label >= 0) & (label < V)  # another label reads as NaN
            label = tl.where(known, label, 0)
            s = one_logit(x_ptr + n * x_stride, w_ptr + label * w_stride, x_step, w_step, H, s_inner, BLOCK)
            t = one_logit(
                teacher_x_ptr + n * tx_stride, teacher_w_ptr + label * tw_stride, tx_step, tw_step, TH, t_inner, BLOCK
            )
            tl.store(s_logprob_ptr + n, tl.where(known, s - m_s - tl.log(z_s), float("nan")))
            tl.store(t_logprob_ptr + n, tl.where(known, t - m_t - tl.log(z_t), float("nan")))

    if GRAD:
        e_ptr += here * stride
        d_ptr += here * stride
        for first in range(0, across, BLOCK // BN):
            tiles = first + tl.arange(0, BLOCK // BN)
            cols = tiles[:, None] * BN + tl.arange(0, BN)[None, :]
            e = tl.load(e_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
            d = tl.load(d_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
            from_tile = statistics_ptr + tiles.to(tl.int64) * room
            up_s = tl.load(from_tile, mask=tiles < across, other=0.0)[:, None] - m_s
            up_t = tl.load(from_tile + apart, mask=tiles < across, other=0.0)[:, None] - m_t
            p = e * exp(tl.minimum(d, 0.0)) * (exp(up_s) / z_s)
            if KIND == REVERSE:
                g = weighted(p, d + (up_s - up_t) - center)
            if KIND == FORWARD:
                g = p - e * exp(-tl.maximum(d, 0.0)) * (exp(up_t) / z_t)
            g = finish_gradient(g, g, 1.0, row_factor, value == float("inf"), g_max, False, ROUND)
            tl.store(g_ptr + cols, g.to(g_ptr.dtype.element_ty), mask=cols < V)
