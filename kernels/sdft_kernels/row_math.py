"""Triton: the math of a row of logits, in three steps: statistics, merge, gradient.

The statistics of any set of a row's entries are eight numbers. The statistics of two sets merge into the statistics of
their union; a set may be the entries of one thread, of one block of threads, or of one part of the vocabulary.
Formulas: reference.py. Every logit is taken relative to the maximum of its side, because sums of s − t would lose the
digits of a common offset. Exponentials are powers of two, the unit that the hardware computes.

    m    the maximum                        z    Σ e^(· − m)
    b    Σ e^(· − m)·(· − m), for entropies (0 unless TOKENS)
    a    Σ e^(s − m_s)·((s − m_s) − (t − m_t)); for the forward KL Σ e^(t − m_t)·((t − m_t) − (s − m_s))
    top  the student's best logit among the teacher's best tokens (unless not TOKENS)
"""

import triton
import triton.language as tl

REVERSE = tl.constexpr(0)
FORWARD = tl.constexpr(1)
JSD = tl.constexpr(2)
KINDS = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2}
LOG2E = tl.constexpr(1.4426950408889634)
MAX_RATIO = tl.constexpr(80.0)  # e^u overflows past 88; beyond 80 the smaller side cannot be seen (see rows.py)


@triton.jit
def exp(x):
    """e^x, 0 below the smallest normal number."""
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh(x):
    """tanh from exp, or from its series if 1 − exp would cancel."""
    e = exp(-2.0 * tl.abs(x))
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
def load_logits(ptr, bias_ptr, cols, V, inner, outer, BIAS: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr):
    """The final logits of one row at `cols`, in fp32; −inf past the vocabulary."""
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
def load_both(
    s_ptr, t_ptr, s_bias_ptr, t_bias_ptr, cols, V, s_inner, s_outer, t_inner, t_outer,
    S_BIAS: tl.constexpr, T_BIAS: tl.constexpr, S_CAP: tl.constexpr, T_CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Final logits of the student and of the teacher at `cols`."""
    s = load_logits(s_ptr, s_bias_ptr, cols, V, s_inner, s_outer, S_BIAS, S_CAP, MASKED)
    t = load_logits(t_ptr, t_bias_ptr, cols, V, t_inner, t_outer, T_BIAS, T_CAP, MASKED)
    return s, t


@triton.jit
def finite_or_zero(m):
    """The maximum to subtract: 0 in place of −inf, so that −inf − −inf never arises."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def weighted(weight, f):
    """weight·f; 0 if the weight is 0, whatever f is."""
    return tl.where(weight == 0.0, 0.0, weight * f)


# A tile (BLOCK,) lies in registers as (CTAS, REPEATS, THREADS, EACH): a thread block reads its part of the tile in
# REPEATS rounds, EACH entries side by side by each thread. "Lanes" are (CTAS·THREADS,): one number of every thread.


@triton.jit
def lane_sum(x, CTAS: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr):
    """A tile -> lanes: each thread adds up its entries."""
    x = tl.reshape(x, (CTAS, x.shape[0] // (CTAS * THREADS * EACH), THREADS, EACH))
    return tl.reshape(tl.sum(tl.sum(x, 3), 1), (CTAS * THREADS,))


@triton.jit
def lane_max(x, CTAS: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr):
    """A tile -> lanes: each thread's largest entry."""
    x = tl.reshape(x, (CTAS, x.shape[0] // (CTAS * THREADS * EACH), THREADS, EACH))
    return tl.reshape(tl.max(tl.max(x, 3), 1), (CTAS * THREADS,))


@triton.jit
def across(lanes, BLOCK: tl.constexpr, CTAS: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr):
    """Lanes -> a tile: each thread's number at all its entries."""
    lanes = tl.reshape(lanes, (CTAS, 1, THREADS, 1))
    return tl.reshape(tl.broadcast_to(lanes, (CTAS, BLOCK // (CTAS * THREADS * EACH), THREADS, EACH)), (BLOCK,))


@triton.jit
def add_tile(s, t, m_s, z_s, b_s, m_t, z_t, b_t, a, top, KIND: tl.constexpr, TOKENS: tl.constexpr,
             CTAS: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr):  # fmt: skip
    """Statistics step: a tile of both sides into the running statistics of its threads, lanes.

    No thread waits for another here.
    """
    BLOCK: tl.constexpr = s.shape[0]
    new_s = tl.maximum(m_s, lane_max(s, CTAS, THREADS, EACH))
    new_t = tl.maximum(m_t, lane_max(t, CTAS, THREADS, EACH))
    base_s = finite_or_zero(new_s)
    base_t = finite_or_zero(new_t)
    r_s = exp(m_s - base_s)
    r_t = exp(m_t - base_t)
    up_s = base_s - finite_or_zero(m_s)
    up_t = base_t - finite_or_zero(m_t)
    if KIND == REVERSE:
        a = weighted(r_s, a + z_s * (up_t - up_s))
    if KIND == FORWARD:
        a = weighted(r_t, a + z_t * (up_s - up_t))
    if TOKENS:
        b_s = weighted(r_s, b_s - z_s * up_s)
        b_t = weighted(r_t, b_t - z_t * up_t)
        here = lane_max(tl.where(t == across(new_t, BLOCK, CTAS, THREADS, EACH), s, -float("inf")), CTAS, THREADS, EACH)
        top = tl.where(new_t > m_t, here, tl.maximum(top, here))
    # One side after the other, so that fewer values stay in registers.
    x_s = s - across(base_s, BLOCK, CTAS, THREADS, EACH)
    x_t = t - across(base_t, BLOCK, CTAS, THREADS, EACH)
    e_t = exp(x_t)
    z_t = z_t * r_t + lane_sum(e_t, CTAS, THREADS, EACH)
    if KIND == FORWARD:
        a += lane_sum(weighted(e_t, x_t - x_s), CTAS, THREADS, EACH)
    if TOKENS:
        b_t += lane_sum(weighted(e_t, x_t), CTAS, THREADS, EACH)
    e_s = exp(x_s)
    z_s = z_s * r_s + lane_sum(e_s, CTAS, THREADS, EACH)
    if KIND == REVERSE:
        a += lane_sum(weighted(e_s, x_s - x_t), CTAS, THREADS, EACH)
    if TOKENS:
        b_s += lane_sum(weighted(e_s, x_s), CTAS, THREADS, EACH)
    return new_s, z_s, b_s, new_t, z_t, b_t, a, top


@triton.jit
def merge(m_s, z_s, b_s, m_t, z_t, b_t, a, top, KIND: tl.constexpr, TOKENS: tl.constexpr):
    """Merge step: the statistics (T,) of T disjoint sets of a row's entries -> single numbers, the statistics of all.

    An infinite sum is lost if its terms underflow relative to another set.
    """
    new_s = tl.max(m_s, 0)
    new_t = tl.max(m_t, 0)
    base_s = finite_or_zero(new_s)
    base_t = finite_or_zero(new_t)
    r_s = exp(m_s - base_s)
    r_t = exp(m_t - base_t)
    up_s = base_s - finite_or_zero(m_s)
    up_t = base_t - finite_or_zero(m_t)
    if KIND == REVERSE:
        a = tl.sum(weighted(r_s, a + z_s * (up_t - up_s)), 0)
    if KIND == FORWARD:
        a = tl.sum(weighted(r_t, a + z_t * (up_s - up_t)), 0)
    if KIND == JSD:
        a = 0.0
    if TOKENS:
        b_s = tl.sum(weighted(r_s, b_s - z_s * up_s), 0)
        b_t = tl.sum(weighted(r_t, b_t - z_t * up_t), 0)
        top = tl.max(tl.where(m_t == new_t, top, -float("inf")), 0)
    return new_s, tl.sum(z_s * r_s, 0), b_s, new_t, tl.sum(z_t * r_t, 0), b_t, a, top


@triton.jit
def log_mixture(u, beta):
    """log(m/p) = log(1 − β + β·e^u) for u = log q − log p; exactly 0 at u = 0."""
    return tl.log((1.0 - beta) + beta * exp(u))


@triton.jit
def log_ratio(x_s, x_t, log_z_s, log_z_t):
    """u = log q − log p, clamped so that e^u does not overflow; x_t − x_s is exact if the two are near."""
    return tl.minimum(tl.maximum((x_t - x_s) - (log_z_t - log_z_s), -MAX_RATIO), MAX_RATIO)


@triton.jit
def jsd_terms(x_s, x_t, z_s, z_t, beta):
    """p·log(m/p) and q·log(q/m) of every entry; the JSD needs their sums over the row."""
    u = log_ratio(x_s, x_t, tl.log(z_s), tl.log(z_t))
    mix = log_mixture(u, beta)
    return weighted(exp(x_s) / z_s, mix), weighted(exp(x_t) / z_t, u - mix)


@triton.jit
def divergence(z_s, z_t, a, k_p, k_q, beta, KIND: tl.constexpr):
    """(D, center) of a row; `center` is what makes its gradient sum to 0."""
    if KIND == REVERSE:
        center = a / z_s  # = D + log z_s − log z_t
        d = center + tl.log(z_t / z_s)
    if KIND == FORWARD:
        center = a * 0.0
        d = a / z_t + tl.log(z_s / z_t)
    if KIND == JSD:
        center = k_p
        d = beta * k_q - (1.0 - beta) * k_p
    return d, center


@triton.jit
def gradient(x_s, x_t, z_s, z_t, center, beta, KIND: tl.constexpr):
    """Gradient step: dD/ds of a tile (jsd: over −(1 − β)), from logits relative to their maxima."""
    e_s = exp(x_s)
    if KIND == FORWARD:
        g = e_s * (1.0 / z_s) - exp(x_t) * (1.0 / z_t)
    else:
        f = x_s - x_t if KIND == REVERSE else log_mixture(log_ratio(x_s, x_t, tl.log(z_s), tl.log(z_t)), beta)
        g = weighted(e_s * (1.0 / z_s), f - center)
    return g


@triton.jit
def finish_gradient(g, s, outer, row_factor, infinite, g_max, CAP: tl.constexpr, ROUND: tl.constexpr):
    """The softcap's chain rule, the row's factor, and the limits of a stored gradient."""
    g *= row_factor
    if CAP:
        slope = s / outer
        g *= 1.0 - slope * slope
    g = tl.where(infinite, 0.0, g)  # an infinite divergence has no useful gradient: the value stays
    g = tl.minimum(tl.maximum(g, -g_max), g_max)  # fp16 only; the bound is +inf elsewhere
    if ROUND:
        g = round_to_bf16(g)
    return g


@triton.jit
def round_to_bf16(g):
    """Round to the nearest bf16, still as fp32: Triton's interpreter truncates, a GPU rounds."""
    bits = g.to(tl.uint32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def store_zeros(g_ptr, V, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(g_ptr + cols, tl.zeros((BLOCK,), g_ptr.dtype.element_ty), mask=cols < V)
