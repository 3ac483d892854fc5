"""Triton: the divergence of rows of logits, each read once and kept on chip until its gradient is written.

A cluster of thread blocks holds a row in its registers and exchanges sums through the shared memory of the cluster: it
moves 10 bytes an entry (fp32 logits, bf16 gradient), row_kernel 18. It has not yet run on a GPU. By its machine code, a
reduction writes every block's part to shared memory, passes a barrier of the cluster, reads the other blocks' parts,
and passes another barrier.
"""

import triton
import triton.language as tl

from .row_math import (
    JSD,
    add_tile,
    divergence,
    finish_gradient,
    gradient,
    jsd_terms,
    lane_max,
    lane_sum,
    load_both,
    merge,
    store_zeros,
)


@triton.jit(do_not_specialize=["lo"])
def on_chip_kernel(
    s_ptr, t_ptr, g_ptr,  # as in row_kernel, argument by argument
    s_bias_ptr, t_bias_ptr,
    weight_ptr, label_ptr, index_ptr,
    d_ptr, s_entropy_ptr, t_entropy_ptr, s_logprob_ptr, t_logprob_ptr, agree_ptr,
    s_stride, t_stride, g_stride, V, lo,
    s_inner, s_outer, t_inner, t_outer, beta, factor, g_max,
    KIND: tl.constexpr, GRAD: tl.constexpr, TOKENS: tl.constexpr, LABELS: tl.constexpr, WEIGHTS: tl.constexpr,
    INDEX: tl.constexpr, GATHER: tl.constexpr, S_BIAS: tl.constexpr, T_BIAS: tl.constexpr, S_CAP: tl.constexpr,
    T_CAP: tl.constexpr, ROUND: tl.constexpr,
    BLOCK: tl.constexpr, PIECES: tl.constexpr,  # PIECES·BLOCK >= V
    CTAS: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr,  # thread blocks, the threads of each, one access
):  # fmt: skip
    """All work on one row.

    The reductions wait for every logit of the row, so the gradient may lie in the logits' memory. A row is divided into
    a few tiles, so that the intermediate values of one tile are gone before the next tile needs registers.
    """
    here = tl.program_id(0).to(tl.int64)
    n = lo + here
    if INDEX:
        n = tl.load(index_ptr + n)
    if GATHER:
        here = n
    if GRAD:
        g_ptr += here * g_stride
    row_factor = factor
    if WEIGHTS:
        weight = tl.load(weight_ptr + n).to(tl.float32)
        if weight == 0.0:  # the outputs are zero already
            if GRAD:
                store_zeros(g_ptr, V, BLOCK)
            return
        row_factor = factor * weight

    tile = tl.arange(0, BLOCK)
    rows_s, rows_t = (), ()
    for i in tl.static_range(PIECES):
        s, t = load_both(
            s_ptr + here * s_stride, t_ptr + here * t_stride, s_bias_ptr, t_bias_ptr, i * BLOCK + tile, V,
            s_inner, s_outer, t_inner, t_outer, S_BIAS, T_BIAS, S_CAP, T_CAP, True,
        )  # fmt: skip
        rows_s += (s,)  # type: ignore[assignment]
        rows_t += (t,)  # type: ignore[assignment]

    low = tl.full((CTAS * THREADS,), -float("inf"), tl.float32)
    none = tl.zeros((CTAS * THREADS,), tl.float32)
    m_s, z_s, b_s, m_t, z_t, b_t, a, top = low, none, none, low, none, none, none, low
    for i in tl.static_range(PIECES):
        m_s, z_s, b_s, m_t, z_t, b_t, a, top = add_tile(
            rows_s[i], rows_t[i], m_s, z_s, b_s, m_t, z_t, b_t, a, top, KIND, TOKENS, CTAS, THREADS, EACH
        )
    m_s, z_s, b_s, m_t, z_t, b_t, a, top = merge(m_s, z_s, b_s, m_t, z_t, b_t, a, top, KIND, TOKENS)
    k_p, k_q = 0.0, 0.0
    if KIND == JSD:
        p_lanes, q_lanes = none, none
        for i in tl.static_range(PIECES):
            of_p, of_q = jsd_terms(rows_s[i] - m_s, rows_t[i] - m_t, z_s, z_t, beta)
            p_lanes += lane_sum(of_p, CTAS, THREADS, EACH)
            q_lanes += lane_sum(of_q, CTAS, THREADS, EACH)
        k_p, k_q = tl.sum(p_lanes, 0), tl.sum(q_lanes, 0)
    d, center = divergence(z_s, z_t, a, k_p, k_q, beta, KIND)
    tl.store(d_ptr + n, d)

    if TOKENS:
        tl.store(s_entropy_ptr + n, tl.log(z_s) - b_s / z_s)
        tl.store(t_entropy_ptr + n, tl.log(z_t) - b_t / z_t)
        tl.store(agree_ptr + n, tl.where(top >= m_s, 1, 0).to(tl.int8))
        if LABELS:  # taken from the logits on chip, because another block's gradient may have overwritten it in memory
            label = tl.load(label_ptr + n)
            s_label, t_label = low, low
            for i in tl.static_range(PIECES):
                mine = i * BLOCK + tile == label
                s_lanes = lane_max(tl.where(mine, rows_s[i], -float("inf")), CTAS, THREADS, EACH)
                t_lanes = lane_max(tl.where(mine, rows_t[i], -float("inf")), CTAS, THREADS, EACH)
                s_label, t_label = tl.maximum(s_label, s_lanes), tl.maximum(t_label, t_lanes)
            s_label, t_label = tl.max(s_label, 0), tl.max(t_label, 0)
            known = (label >= 0) & (label < V)  # another label reads as NaN
            tl.store(s_logprob_ptr + n, tl.where(known, s_label - m_s - tl.log(z_s), float("nan")))
            tl.store(t_logprob_ptr + n, tl.where(known, t_label - m_t - tl.log(z_t), float("nan")))

    if GRAD:
        for i in tl.static_range(PIECES):
            g = gradient(rows_s[i] - m_s, rows_t[i] - m_t, z_s, z_t, center, beta, KIND)
            g = finish_gradient(g, rows_s[i], s_outer, row_factor, d == float("inf"), g_max, S_CAP, ROUND)
            cols = i * BLOCK + tile
            tl.store(g_ptr + cols, g.to(g_ptr.dtype.element_ty), mask=cols < V)
