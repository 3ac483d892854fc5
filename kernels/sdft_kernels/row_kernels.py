"""Triton: the divergence of rows of logits, its gradient, and the per-token outputs, one program a row.

`row_kernel` streams a row past its program twice, or three times for the JSD, because log(p/m) is not linear in the
normalisers: once for the statistics, once, backwards, for the gradient, so that the tiles read last are still in
cache. `on_chip_kernel` (row_on_chip.py) reads a row once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import INTERPRETED, Activation, Options
from .chunks import Outputs
from .row_math import (
    JSD,
    KINDS,
    activate,
    add_tile,
    divergence,
    finish_gradient,
    gradient,
    jsd_terms,
    lane_sum,
    load_both,
    merge,
    store_zeros,
)
from .row_on_chip import on_chip_kernel
from .tuning import VECTOR_BYTES, limits_of, on_chip_tile, row_tile

FP16_MAX = 65504.0


@triton.jit
def store_gradient(
    s_ptr, t_ptr, g_ptr, s_bias_ptr, t_bias_ptr, start, V, s_inner, s_outer, t_inner, t_outer,
    m_s, z_s, m_t, z_t, center, beta, row_factor, infinite, g_max,
    KIND: tl.constexpr, S_BIAS: tl.constexpr, T_BIAS: tl.constexpr, S_CAP: tl.constexpr, T_CAP: tl.constexpr,
    NARROW: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Read a tile of both logits again and write the student's gradient."""
    cols = start + tl.arange(0, BLOCK)
    s, t = load_both(
        s_ptr, t_ptr, s_bias_ptr, t_bias_ptr, cols, V, s_inner, s_outer, t_inner, t_outer,
        S_BIAS, T_BIAS, S_CAP, T_CAP, MASKED,
    )  # fmt: skip
    g = gradient(s - m_s, t - m_t, z_s, z_t, center, beta, KIND)
    g = finish_gradient(g, s, s_outer, row_factor, infinite, g_max, S_CAP, ROUND)
    if NARROW:
        # The gradient is narrower than the logits whose memory it takes: another warp's logits of this tile
        # may lie where this warp writes. Tiles not read yet never do (see gradient_view).
        tl.debug_barrier()
    if MASKED:
        tl.store(g_ptr + cols, g.to(g_ptr.dtype.element_ty), mask=cols < V)
    else:
        tl.store(g_ptr + cols, g.to(g_ptr.dtype.element_ty))


@triton.jit
def load_label(ptr, bias_ptr, label, V, inner, outer, BIAS: tl.constexpr, CAP: tl.constexpr):
    """The final logit of one token; NaN for a label outside the vocabulary."""
    known = (label >= 0) & (label < V)
    raw = tl.load(ptr + label, mask=known, other=float("nan")).to(tl.float32)
    if BIAS:
        raw += tl.load(bias_ptr + label, mask=known, other=0.0).to(tl.float32)
    return activate(raw, inner, outer, CAP)


@triton.jit(do_not_specialize=["lo"])
def row_kernel(
    s_ptr, t_ptr, g_ptr,  # (C, V) logits of both sides and the gradient, rows apart by the strides below
    s_bias_ptr, t_bias_ptr,  # (V,)
    weight_ptr, label_ptr, index_ptr,  # (N,) dLoss/dD, sampled tokens; (rows,) which token a program works on
    d_ptr, s_entropy_ptr, t_entropy_ptr, s_logprob_ptr, t_logprob_ptr, agree_ptr,  # (N,) outputs
    s_stride, t_stride, g_stride, V, lo,
    s_inner, s_outer, t_inner, t_outer, beta, factor, g_max,
    KIND: tl.constexpr, GRAD: tl.constexpr, TOKENS: tl.constexpr, LABELS: tl.constexpr, WEIGHTS: tl.constexpr,
    INDEX: tl.constexpr, GATHER: tl.constexpr, S_BIAS: tl.constexpr, T_BIAS: tl.constexpr, S_CAP: tl.constexpr,
    T_CAP: tl.constexpr, NARROW: tl.constexpr, ROUND: tl.constexpr,
    BLOCK: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr,  # a tile, its threads, one access of a thread
):  # fmt: skip
    """All work on one row. Token n = index[lo + program] or lo + program; GATHER: the logits lie at n too."""
    here = tl.program_id(0).to(tl.int64)
    n = lo + here
    if INDEX:
        n = tl.load(index_ptr + n)
    if GATHER:
        here = n
    s_ptr += here * s_stride
    t_ptr += here * t_stride
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
    whole = V // BLOCK * BLOCK  # columns in unmasked tiles

    low = tl.full((THREADS,), -float("inf"), tl.float32)
    none = tl.zeros((THREADS,), tl.float32)
    m_s, z_s, b_s, m_t, z_t, b_t, a, top = low, none, none, low, none, none, none, low
    for start in range(0, whole, BLOCK):
        s, t = load_both(
            s_ptr, t_ptr, s_bias_ptr, t_bias_ptr, start + tile, V, s_inner, s_outer, t_inner, t_outer,
            S_BIAS, T_BIAS, S_CAP, T_CAP, False,
        )  # fmt: skip
        m_s, z_s, b_s, m_t, z_t, b_t, a, top = add_tile(
            s, t, m_s, z_s, b_s, m_t, z_t, b_t, a, top, KIND, TOKENS, 1, THREADS, EACH
        )
    if whole < V:
        s, t = load_both(
            s_ptr, t_ptr, s_bias_ptr, t_bias_ptr, whole + tile, V, s_inner, s_outer, t_inner, t_outer,
            S_BIAS, T_BIAS, S_CAP, T_CAP, True,
        )  # fmt: skip
        m_s, z_s, b_s, m_t, z_t, b_t, a, top = add_tile(
            s, t, m_s, z_s, b_s, m_t, z_t, b_t, a, top, KIND, TOKENS, 1, THREADS, EACH
        )
    m_s, z_s, b_s, m_t, z_t, b_t, a, top = merge(m_s, z_s, b_s, m_t, z_t, b_t, a, top, KIND, TOKENS)

    k_p, k_q = 0.0, 0.0
    if KIND == JSD:
        p_lanes, q_lanes = none, none
        for start in range(0, whole, BLOCK):
            s, t = load_both(
                s_ptr, t_ptr, s_bias_ptr, t_bias_ptr, start + tile, V, s_inner, s_outer, t_inner, t_outer,
                S_BIAS, T_BIAS, S_CAP, T_CAP, False,
            )  # fmt: skip
            of_p, of_q = jsd_terms(s - m_s, t - m_t, z_s, z_t, beta)
            p_lanes += lane_sum(of_p, 1, THREADS, EACH)
            q_lanes += lane_sum(of_q, 1, THREADS, EACH)
        if whole < V:
            s, t = load_both(
                s_ptr, t_ptr, s_bias_ptr, t_bias_ptr, whole + tile, V, s_inner, s_outer, t_inner, t_outer,
                S_BIAS, T_BIAS, S_CAP, T_CAP, True,
            )  # fmt: skip
            of_p, of_q = jsd_terms(s - m_s, t - m_t, z_s, z_t, beta)
            p_lanes += lane_sum(of_p, 1, THREADS, EACH)
            q_lanes += lane_sum(of_q, 1, THREADS, EACH)
        k_p, k_q = tl.sum(p_lanes, 0), tl.sum(q_lanes, 0)
    d, center = divergence(z_s, z_t, a, k_p, k_q, beta, KIND)
    tl.store(d_ptr + n, d)

    if TOKENS:
        tl.store(s_entropy_ptr + n, tl.log(z_s) - b_s / z_s)
        tl.store(t_entropy_ptr + n, tl.log(z_t) - b_t / z_t)
        tl.store(agree_ptr + n, tl.where(top >= m_s, 1, 0).to(tl.int8))
        if LABELS:
            label = tl.load(label_ptr + n)
            s_label = load_label(s_ptr, s_bias_ptr, label, V, s_inner, s_outer, S_BIAS, S_CAP)
            t_label = load_label(t_ptr, t_bias_ptr, label, V, t_inner, t_outer, T_BIAS, T_CAP)
            tl.store(s_logprob_ptr + n, s_label - m_s - tl.log(z_s))
            tl.store(t_logprob_ptr + n, t_label - m_t - tl.log(z_t))

    if GRAD:
        infinite = d == float("inf")
        if LABELS:
            tl.debug_barrier()  # the labels' logits are read before any gradient overwrites them
        if whole < V:
            store_gradient(
                s_ptr, t_ptr, g_ptr, s_bias_ptr, t_bias_ptr, whole, V, s_inner, s_outer, t_inner, t_outer,
                m_s, z_s, m_t, z_t, center, beta, row_factor, infinite, g_max,
                KIND, S_BIAS, T_BIAS, S_CAP, T_CAP, NARROW, ROUND, BLOCK, True,
            )  # fmt: skip
        for back in range(0, whole, BLOCK):
            store_gradient(
                s_ptr, t_ptr, g_ptr, s_bias_ptr, t_bias_ptr, whole - BLOCK - back, V, s_inner, s_outer,
                t_inner, t_outer, m_s, z_s, m_t, z_t, center, beta, row_factor, infinite, g_max,
                KIND, S_BIAS, T_BIAS, S_CAP, T_CAP, NARROW, ROUND, BLOCK, False,
            )  # fmt: skip


@triton.jit
def scale_kernel(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """x *= factor over `count` entries; nothing is read or written if the factor is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, count, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < count).to(tl.float32)
            tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=at < count)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x (contiguous) times the one number in factor, in place; almost always the factor is 1, and nothing is moved."""
    grid = (max(1, min(1024, triton.cdiv(x.numel(), 4096))),)
    scale_kernel[grid](x, factor, x.numel(), BLOCK=4096, num_warps=8, enable_fp_fusion=True)
    return x


def launch_rows(
    s: Tensor,  # (C, V) raw student logits (rows index[lo:lo + rows] of (N, V) if gather), column stride 1
    t: Tensor,  # the teacher's likewise
    g: Tensor | None,  # takes the student's gradient; may be s, or a narrower view of its memory
    options: Options,
    bias: tuple[Tensor | None, Tensor | None],  # (V,) of both sides
    outputs: Outputs,
    *,
    rows: int,
    lo: int = 0,
    index: Tensor | None = None,  # (rows of the call,) int64
    gather: bool = False,
    weights: Tensor | None = None,  # (N,)
    labels: Tensor | None = None,  # (N,)
    factor: float = 1.0,
) -> None:
    """Run row_kernel on `rows` rows: outputs filled, the gradient times factor (and row weight) in g."""
    heavy = (
        any(b is not None for b in bias) or options.student.softcap is not None or options.teacher.softcap is not None
    )
    each = max(entries_at_once(tensor) for tensor in (s, t, g, *bias) if tensor is not None)
    tile = row_tile(limits_of(s.device), options.vocab, heavy, each)
    on_chip = None if heavy else on_chip_tile(limits_of(s.device), options.vocab, options.kind, each)
    s_inner, s_outer = inner_outer(options.student)
    t_inner, t_outer = inner_outer(options.teacher)
    s_entropy, t_entropy, s_logprob, t_logprob = outputs.rest
    arguments = (
        s, t, g, *bias, weights, labels, index,
        outputs.divergence, s_entropy, t_entropy, s_logprob, t_logprob,
        None if outputs.agree is None else outputs.agree.view(torch.int8),
        s.stride(0), t.stride(0), 0 if g is None else g.stride(0), options.vocab, lo,
        s_inner, s_outer, t_inner, t_outer, options.beta, factor,
        FP16_MAX if g is not None and g.dtype == torch.float16 else float("inf"),
    )  # fmt: skip
    flags = {
        "KIND": KINDS[options.kind], "GRAD": g is not None, "TOKENS": outputs.agree is not None,
        "LABELS": s_logprob is not None, "WEIGHTS": weights is not None, "INDEX": index is not None, "GATHER": gather,
        "S_BIAS": bias[0] is not None, "T_BIAS": bias[1] is not None,
        "S_CAP": options.student.softcap is not None, "T_CAP": options.teacher.softcap is not None,
        "ROUND": INTERPRETED and g is not None and g.dtype == torch.bfloat16,
    }  # fmt: skip
    if on_chip is not None:
        on_chip_kernel[(rows,)](*arguments, **flags, **on_chip.constants(), **on_chip.options)
    else:
        narrow = g is not None and g.dtype != s.dtype
        row_kernel[(rows,)](*arguments, **flags, NARROW=narrow, **tile.constants(), **tile.options)


def entries_at_once(tensor: Tensor) -> int:
    """Entries of one access of a thread: 16 bytes if every row starts on a 16-byte boundary as far as Triton sees."""
    aligned = tensor.data_ptr() % VECTOR_BYTES == 0 and (tensor.dim() == 1 or tensor.stride(0) % 16 == 0)
    return VECTOR_BYTES // tensor.element_size() if aligned else 1


def inner_outer(act: Activation) -> tuple[float, float]:
    """The two factors of `activate`: z = raw·inner, or outer·tanh(raw·inner)."""
    if act.softcap is None:
        return act.scale / act.temperature, 1.0
    return act.scale / act.softcap, act.softcap / act.temperature


def gradient_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """(C, stride) fp32 logits -> the same memory as (C, stride) of a narrower dtype: each row's second half.

    The gradient pass goes backwards. Entry i of the gradient lies over the logits at (stride + i) / 2 >= i, so
    a tile never writes over logits of the tiles still to come.
    """
    if dtype == logits.dtype:
        return logits
    return logits.view(dtype)[:, logits.shape[1] :]
