"""Triton: the divergence of rows of logits, its gradient, and the per-token outputs, one program a row.

The statistics of reverse and forward KL take one pass over the row, merged online from tile to tile; JSD takes
two, because log(p/m) is not linear in the normalisers. The gradient is one more pass, backwards, so that
the tiles read last are still in cache. Math and names: design section 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import INTERPRETED, Activation, Options
from .chunks import Outputs
from .tuning import device_class, row_blocks

REVERSE = tl.constexpr(0)
FORWARD = tl.constexpr(1)
JSD = tl.constexpr(2)
FP16_MAX = 65504.0
KINDS = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2}
MAX_RATIO = tl.constexpr(80.0)  # e^u overflows past 88; beyond 80 the smaller side cannot be seen (see rows.py)


@triton.jit
def tanh(x):
    """tanh from exp, and from its series where 1 − exp would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    near = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))


@triton.jit
def activate(raw, inner, outer, CAP: tl.constexpr):
    """Raw logits -> final ones: raw·inner, or outer·tanh(raw·inner) under a softcap."""
    z = raw * inner
    if CAP:
        z = outer * tanh(z)
    return z


@triton.jit
def finite_or_zero(m):
    """The maximum to subtract: 0 in place of −inf, so that −inf − −inf never arises."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def rescaled(total, ratio):
    """A running Σ e^{z−m}·f after the maximum has grown; an infinite sum whose terms have underflowed is gone."""
    return tl.where(ratio == 0.0, 0.0, total * ratio)


@triton.jit
def weighted_sum(weight, f, AXIS: tl.constexpr):
    """Σ weight·f, 0 where the weight is 0 whatever f is."""
    return tl.sum(tl.where(weight == 0.0, 0.0, weight * f), AXIS)


@triton.jit
def along(m, AXIS: tl.constexpr):
    """A row's number beside its logits: as it is for one row, (BM, 1) for a block of them."""
    if AXIS == 1:
        m = m[:, None]
    return m


@triton.jit
def log_mixture(u, beta):
    """log(m/p) = log(1 − β + β·e^u) for u = log q − log p; exactly 0 at u = 0."""
    return tl.log((1.0 - beta) + beta * tl.exp(u))


@triton.jit
def log_ratio(s, t, s_lse, t_lse):
    """u = log q − log p, clamped where e^u would overflow; t − s is exact where the two are near."""
    return tl.minimum(tl.maximum((t - s) - (t_lse - s_lse), -MAX_RATIO), MAX_RATIO)


@triton.jit
def load_logits(ptr, bias_ptr, start, V, inner, outer, BIAS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
                MASKED: tl.constexpr):  # fmt: skip
    """BLOCK final logits of one row from column `start`, fp32; −inf past the vocabulary."""
    cols = start + tl.arange(0, BLOCK)
    if MASKED:
        raw = tl.load(ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        if BIAS:
            raw += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
    else:
        raw = tl.load(ptr + cols).to(tl.float32)
        if BIAS:
            raw += tl.load(bias_ptr + cols).to(tl.float32)
    z = activate(raw, inner, outer, CAP)
    if MASKED and CAP:  # the softcap turns −inf into −outer
        z = tl.where(cols < V, z, -float("inf"))
    return z


@triton.jit
def merge_tile(s, t, m_s, z_s, b_s, m_t, z_t, b_t, a, top, KIND: tl.constexpr, TOKENS: tl.constexpr,
               AXIS: tl.constexpr):  # fmt: skip
    """Fold a tile into the running statistics of its row, or of its BM rows: (BLOCK,), AXIS 0, or (BM, BN), AXIS 1.

    m maximum, z = Σ e^{·−m}, b = Σ e^{·−m}·(·−m) (for entropies), a = Σ e^{s−m_s}((s − m_s) − (t − m_t)) or, for
    the forward KL, Σ e^{t−m_t}((t − m_t) − (s − m_s)); top = the student's best logit among the teacher's best
    tokens. Every logit counts from its side's maximum: sums of s − t would lose the digits of a common offset.
    """
    new_s = tl.maximum(m_s, tl.max(s, AXIS))
    new_t = tl.maximum(m_t, tl.max(t, AXIS))
    x_s = s - along(finite_or_zero(new_s), AXIS)
    x_t = t - along(finite_or_zero(new_t), AXIS)
    e_s = tl.exp(x_s)
    e_t = tl.exp(x_t)
    r_s = tl.exp(m_s - finite_or_zero(new_s))
    r_t = tl.exp(m_t - finite_or_zero(new_t))
    up_s = finite_or_zero(new_s) - finite_or_zero(m_s)
    up_t = finite_or_zero(new_t) - finite_or_zero(m_t)
    if KIND == REVERSE:
        a = rescaled(a + z_s * (up_t - up_s), r_s) + weighted_sum(e_s, x_s - x_t, AXIS)
    if KIND == FORWARD:
        a = rescaled(a + z_t * (up_s - up_t), r_t) + weighted_sum(e_t, x_t - x_s, AXIS)
    if TOKENS:
        b_s = rescaled(b_s - z_s * up_s, r_s) + weighted_sum(e_s, x_s, AXIS)
        b_t = rescaled(b_t - z_t * up_t, r_t) + weighted_sum(e_t, x_t, AXIS)
        here = tl.max(tl.where(t == along(new_t, AXIS), s, -float("inf")), AXIS)
        top = tl.where(new_t > m_t, here, tl.maximum(top, here))
    z_s = z_s * r_s + tl.sum(e_s, AXIS)
    z_t = z_t * r_t + tl.sum(e_t, AXIS)
    return new_s, z_s, b_s, new_t, z_t, b_t, a, top


@triton.jit
def merge_jsd(s, t, s_lse, t_lse, k_p, k_q, beta, AXIS: tl.constexpr):
    """Add a tile to k_p = Σ p·log(m/p) and k_q = Σ q·log(q/m)."""
    u = log_ratio(s, t, s_lse, t_lse)
    mix = log_mixture(u, beta)
    k_p += weighted_sum(tl.exp(s - s_lse), mix, AXIS)
    k_q += weighted_sum(tl.exp(t - t_lse), u - mix, AXIS)
    return k_p, k_q


@triton.jit
def gradient(s, t, s_lse, t_lse, center, beta, KIND: tl.constexpr):
    """dD/ds of a tile (jsd: over −(1 − β)); `center` is what makes the row's gradient sum to 0.

    Each side's logits and log-sum-exp may count from any one reference, the same for the whole row.
    """
    p = tl.exp(s - s_lse)
    if KIND == FORWARD:
        g = p - tl.exp(t - t_lse)
    else:
        f = s - t if KIND == REVERSE else log_mixture(log_ratio(s, t, s_lse, t_lse), beta)
        g = tl.where(p == 0.0, 0.0, p * (f - center))
    return g


@triton.jit
def store_gradient(
    s_ptr, t_ptr, g_ptr, s_bias_ptr, t_bias_ptr, start, V, s_inner, s_outer, t_inner, t_outer,
    m_s, m_t, s_lse, t_lse, center, beta, row_factor, infinite, g_max,
    KIND: tl.constexpr, S_BIAS: tl.constexpr, T_BIAS: tl.constexpr, S_CAP: tl.constexpr, T_CAP: tl.constexpr,
    NARROW: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Read a tile of both logits again and write the student's gradient."""
    s = load_logits(s_ptr, s_bias_ptr, start, V, s_inner, s_outer, S_BIAS, S_CAP, BLOCK, MASKED)
    t = load_logits(t_ptr, t_bias_ptr, start, V, t_inner, t_outer, T_BIAS, T_CAP, BLOCK, MASKED)
    g = gradient(s - m_s, t - m_t, s_lse, t_lse, center, beta, KIND) * row_factor
    if S_CAP:
        slope = s / s_outer
        g *= 1.0 - slope * slope
    g = tl.where(infinite, 0.0, g)
    g = tl.minimum(tl.maximum(g, -g_max), g_max)  # fp16 only; the bound is +inf elsewhere
    if ROUND:
        g = round_to_bf16(g)
    if NARROW:
        # The gradient is narrower than the logits whose memory it takes: another warp's logits of this tile
        # may lie where this warp writes. Tiles not read yet never do (see gradient_view).
        tl.debug_barrier()
    cols = start + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(g_ptr + cols, g.to(g_ptr.dtype.element_ty), mask=cols < V)
    else:
        tl.store(g_ptr + cols, g.to(g_ptr.dtype.element_ty))


@triton.jit
def round_to_bf16(g):
    """To the nearest bf16, still as fp32: Triton's interpreter cuts where a GPU rounds."""
    bits = g.to(tl.uint32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def store_zeros(g_ptr, V, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(g_ptr + cols, tl.zeros((BLOCK,), g_ptr.dtype.element_ty), mask=cols < V)


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
    T_CAP: tl.constexpr, NARROW: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Everything of one row. Token n = index[lo + program] or lo + program; GATHER: the logits lie at n too."""
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

    whole = V // BLOCK * BLOCK  # columns in unmasked tiles
    low = -float("inf")
    m_s, z_s, b_s, m_t, z_t, b_t, a, top = low, 0.0, 0.0, low, 0.0, 0.0, 0.0, low
    for start in range(0, whole, BLOCK):
        s = load_logits(s_ptr, s_bias_ptr, start, V, s_inner, s_outer, S_BIAS, S_CAP, BLOCK, False)
        t = load_logits(t_ptr, t_bias_ptr, start, V, t_inner, t_outer, T_BIAS, T_CAP, BLOCK, False)
        m_s, z_s, b_s, m_t, z_t, b_t, a, top = merge_tile(s, t, m_s, z_s, b_s, m_t, z_t, b_t, a, top, KIND, TOKENS, 0)
    if whole < V:
        s = load_logits(s_ptr, s_bias_ptr, whole, V, s_inner, s_outer, S_BIAS, S_CAP, BLOCK, True)
        t = load_logits(t_ptr, t_bias_ptr, whole, V, t_inner, t_outer, T_BIAS, T_CAP, BLOCK, True)
        m_s, z_s, b_s, m_t, z_t, b_t, a, top = merge_tile(s, t, m_s, z_s, b_s, m_t, z_t, b_t, a, top, KIND, TOKENS, 0)
    s_lse = tl.log(z_s)  # counted from the maximum, as every logit from here on
    t_lse = tl.log(z_t)

    if KIND == REVERSE:
        center = a / z_s  # = D + L_s − L_t
        d = center + tl.log(z_t / z_s)
    if KIND == FORWARD:
        center = 0.0
        d = a / z_t + tl.log(z_s / z_t)
    if KIND == JSD:
        k_p, k_q = 0.0, 0.0
        for start in range(0, whole, BLOCK):
            s = load_logits(s_ptr, s_bias_ptr, start, V, s_inner, s_outer, S_BIAS, S_CAP, BLOCK, False)
            t = load_logits(t_ptr, t_bias_ptr, start, V, t_inner, t_outer, T_BIAS, T_CAP, BLOCK, False)
            k_p, k_q = merge_jsd(s - m_s, t - m_t, s_lse, t_lse, k_p, k_q, beta, 0)
        if whole < V:
            s = load_logits(s_ptr, s_bias_ptr, whole, V, s_inner, s_outer, S_BIAS, S_CAP, BLOCK, True)
            t = load_logits(t_ptr, t_bias_ptr, whole, V, t_inner, t_outer, T_BIAS, T_CAP, BLOCK, True)
            k_p, k_q = merge_jsd(s - m_s, t - m_t, s_lse, t_lse, k_p, k_q, beta, 0)
        center = k_p
        d = beta * k_q - (1.0 - beta) * k_p
    tl.store(d_ptr + n, d)

    if TOKENS:
        tl.store(s_entropy_ptr + n, s_lse - b_s / z_s)
        tl.store(t_entropy_ptr + n, t_lse - b_t / z_t)
        tl.store(agree_ptr + n, tl.where(top >= m_s, 1, 0).to(tl.int8))
        if LABELS:  # a label outside the vocabulary reads as NaN
            label = tl.load(label_ptr + n)
            known = (label >= 0) & (label < V)
            s_raw = tl.load(s_ptr + label, mask=known, other=float("nan")).to(tl.float32)
            t_raw = tl.load(t_ptr + label, mask=known, other=float("nan")).to(tl.float32)
            if S_BIAS:
                s_raw += tl.load(s_bias_ptr + label, mask=known, other=0.0).to(tl.float32)
            if T_BIAS:
                t_raw += tl.load(t_bias_ptr + label, mask=known, other=0.0).to(tl.float32)
            tl.store(s_logprob_ptr + n, activate(s_raw, s_inner, s_outer, S_CAP) - m_s - s_lse)
            tl.store(t_logprob_ptr + n, activate(t_raw, t_inner, t_outer, T_CAP) - m_t - t_lse)

    if GRAD:
        infinite = d == float("inf")  # no useful gradient: the value stays, the gradient is 0
        if LABELS:
            tl.debug_barrier()  # the labels' logits are read before any gradient overwrites them
        if whole < V:
            store_gradient(
                s_ptr, t_ptr, g_ptr, s_bias_ptr, t_bias_ptr, whole, V, s_inner, s_outer, t_inner, t_outer,
                m_s, m_t, s_lse, t_lse, center, beta, row_factor, infinite, g_max,
                KIND, S_BIAS, T_BIAS, S_CAP, T_CAP, NARROW, ROUND, BLOCK, True,
            )  # fmt: skip
        for back in range(0, whole, BLOCK):
            store_gradient(
                s_ptr, t_ptr, g_ptr, s_bias_ptr, t_bias_ptr, whole - BLOCK - back, V, s_inner, s_outer,
                t_inner, t_outer, m_s, m_t, s_lse, t_lse, center, beta, row_factor, infinite, g_max,
                KIND, S_BIAS, T_BIAS, S_CAP, T_CAP, NARROW, ROUND, BLOCK, False,
            )  # fmt: skip


@triton.jit
def scale_kernel(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """x *= factor over `count` entries, read and written only where the factor is not 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, count, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < count).to(tl.float32)
            tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=at < count)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x (contiguous) times the one number in factor, in place; almost always that is 1, and nothing is moved."""
    grid = (max(1, min(1024, triton.cdiv(x.numel(), 4096))),)
    scale_kernel[grid](x, factor, x.numel(), BLOCK=4096, num_warps=8, enable_fp_fusion=True)
    return x


def launch_rows(
    s: Tensor,  # (C, V) raw student logits (rows index[lo:lo + rows] of (N, V) if gather), column stride 1
    t: Tensor,  # the teacher's likewise
    g: Tensor | None,  # where the student's gradient goes; may be s, or a narrower view of its memory
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
    block, warps = row_blocks(device_class(s.device), options.vocab, heavy)
    s_inner, s_outer = inner_outer(options.student)
    t_inner, t_outer = inner_outer(options.teacher)
    s_entropy, t_entropy, s_logprob, t_logprob = outputs.rest
    row_kernel[(rows,)](
        s, t, g, *bias, weights, labels, index,
        outputs.divergence, s_entropy, t_entropy, s_logprob, t_logprob,
        None if outputs.agree is None else outputs.agree.view(torch.int8),
        s.stride(0), t.stride(0), 0 if g is None else g.stride(0), options.vocab, lo,
        s_inner, s_outer, t_inner, t_outer, options.beta, factor,
        FP16_MAX if g is not None and g.dtype == torch.float16 else float("inf"),
        KIND=KINDS[options.kind], GRAD=g is not None, TOKENS=outputs.agree is not None,
        LABELS=s_logprob is not None, WEIGHTS=weights is not None, INDEX=index is not None, GATHER=gather,
        S_BIAS=bias[0] is not None, T_BIAS=bias[1] is not None,
        S_CAP=options.student.softcap is not None, T_CAP=options.teacher.softcap is not None,
        NARROW=g is not None and g.dtype != s.dtype,
        ROUND=INTERPRETED and g is not None and g.dtype == torch.bfloat16, BLOCK=block,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip


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
