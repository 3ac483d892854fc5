"""Numbers over finished evaluations: what was learned, what was forgotten, and how sure that is. Knows no models.

Accuracies are fractions in [0, 1]. docs/measures.md has every formula with its source.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdft.errors import SdftError

Array = NDArray[np.float64]
EXACT_SEEDS = 6  # up to here all n^n resamples are taken, 46656 of them
EXACT_FLIPS = 16  # up to here all 2^n signs are


# Learning and forgetting, from an accuracy matrix.


@dataclass(frozen=True)
class Transfer:
    """What a sequence of stages did to the tasks it trained. nan where an entry that it needs was not evaluated."""

    average: float  # accuracy after the last stage, over the trained tasks
    backward: float  # change since a task's own stage; below 0 is forgetting. nan for one stage
    forgetting: float  # fall from a task's best; nan for one stage
    forward: float  # what earlier stages gave a task before its own; nan for one stage


def transfer(accuracy: ArrayLike, trained: Sequence[int] | None = None) -> Transfer:
    """Average accuracy, backward transfer, forgetting and forward transfer of S stages.

    With R the matrix, j(s) the task of stage s, and S stages:

        average     1/S      sum_{s=1..S}    R[S, j(s)]
        backward    1/(S-1)  sum_{s=1..S-1}  R[S, j(s)] - R[s, j(s)]                      (Lopez-Paz & Ranzato 2017)
        forgetting  1/(S-1)  sum_{s=1..S-1}  max_{l=1..S-1} R[l, j(s)] - R[S, j(s)]       (Chaudhry et al. 2018)
        forward     1/(S-1)  sum_{s=2..S}    R[s-1, j(s)] - R[0, j(s)]                    (Lopez-Paz & Ranzato 2017)

    The sources start from random weights; here row 0 is the pretrained base. A best that lies in a stage that was not
    evaluated is missed by `forgetting`.

    accuracy: (S + 1, tasks), row 0 the base, row s after stage s; nan where not evaluated. Tasks that no stage trains
    may have columns, which nothing here reads (`change` does).
    trained: the column of the task of each stage, no column twice; by default stage s trains column s - 1.

    Raises SdftError for a matrix of another shape or with entries outside [0, 1].
    """
    R = _matrix(accuracy)
    S = len(R) - 1
    tasks = list(range(S)) if trained is None else list(trained)
    if len(tasks) != S or len(set(tasks)) != S or not all(0 <= j < R.shape[1] for j in tasks):
        raise SdftError(
            f"trained = {tasks}: {S} stages need {S} different columns out of {R.shape[1]}, one for each stage"
        )
    own = R[np.arange(1, S + 1), tasks]  # (S,) each task right after its stage
    before = R[np.arange(S), tasks]  # (S,) right before
    last, base = R[S, tasks], R[0, tasks]  # (S,)
    best = np.fmax.reduce(R[1:S, tasks], axis=0) if S > 1 else last  # (S,) of the stages before the last
    best = np.where(np.isnan(own), np.nan, best)
    return Transfer(
        average=_mean(last),
        backward=_mean((last - own)[:-1]),
        forgetting=_mean((best - last)[:-1]),
        forward=_mean((before - base)[1:]),
    )


def change(accuracy: ArrayLike) -> Array:
    """(tasks,): accuracy after the last stage minus the base's; for a prior skill, what is left of it minus 1.

    accuracy: as for `transfer`.
    """
    R = _matrix(accuracy)
    return R[-1] - R[0]


def _matrix(accuracy: ArrayLike) -> Array:
    R = np.asarray(accuracy, dtype=np.float64)
    if R.ndim != 2 or R.shape[0] < 2 or R.shape[1] < 1:
        raise SdftError(f"accuracy has the shape {R.shape}; it needs (stages + 1, tasks), row 0 the base")
    outside = R[~np.isnan(R) & ~((R >= 0) & (R <= 1))]
    if len(outside):
        raise SdftError(f"accuracy holds {outside[0]}; entries are fractions in [0, 1], or nan where not evaluated")
    return R


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else math.nan


# Over seeds.


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float  # nan for one value
    high: float
    n: int


def interval(values: ArrayLike, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of one number per seed, with a percentile bootstrap interval (Efron 1979).

    Up to 6 values all n^n resamples are taken, so the result is exact; above, `resamples` are drawn with `seed`.

    **What it means for few seeds.** Of the 27 resamples of three values, one is the smallest three times over, and that
    is more than 2.5%: the 95% interval is just [smallest, largest]. For any continuous distribution it holds the median
    of all seeds with a probability of 75%, not 95% (1 - 2 * 0.5^3). Read it as the range that was seen. Of
    normal values, five hold their mean in 83% of cases and ten in 91% (simulated).

    values: (n,) without nan. Raises SdftError for others, or for a level outside (0, 1).
    """
    x = _vector(values, "values")
    if not 0 < level < 1:
        raise SdftError(f"level = {level}: it must lie between 0 and 1, such as 0.95")
    mean, n = float(x.mean()), len(x)
    if n == 1:
        return Interval(mean, math.nan, math.nan, n)
    if n <= EXACT_SEEDS:
        picked = np.array(list(itertools.product(range(n), repeat=n)))  # (n^n, n)
    else:
        picked = np.random.default_rng(seed).integers(n, size=(resamples, n))
    means = np.sort(x[picked], axis=1).mean(axis=1)  # sorted: the same values in any order have the same sum
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    # Equal values have quantiles that are off the mean by rounding.
    return Interval(mean, min(float(low), mean), max(float(high), mean), n)


@dataclass(frozen=True)
class Paired:
    difference: Interval  # of the means, first minus second
    p: float  # two-sided, of the sign-flip permutation test


def paired(first: ArrayLike, second: ArrayLike, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Paired:
    """Two methods over the same seeds: the mean difference, its interval, and how often chance gives as much.

    p is the fraction of the 2^n ways to give the n differences signs whose mean is at least as far from 0 (Fisher's
    sign-flip test); exact up to 16 seeds, above from `resamples` random ways and the observed one. **With n seeds it is
    never below 2 / 2^n: 0.25 for three seeds, 0.0625 for five**, so three seeds alone cannot show a difference at 5%.

    first, second: (n,), entry i of both by the same seed, without nan. Raises SdftError for others.
    """
    a, b = _vector(first, "first"), _vector(second, "second")
    if len(a) != len(b):
        raise SdftError(f"first has {len(a)} values and second {len(b)}; they must come from the same seeds, in order")
    d, n = a - b, len(a)
    if n <= EXACT_FLIPS:
        flips = np.array(list(itertools.product((1.0, -1.0), repeat=n)))  # (2^n, n), the observed signs first
    else:
        drawn = np.random.default_rng(seed).choice((1.0, -1.0), size=(resamples, n))
        flips = np.concatenate([np.ones((1, n)), drawn])
    sums = np.abs(flips @ d)
    tie = 1e-12 * np.abs(d).sum()  # equal sums differ by rounding
    return Paired(interval(d, level, resamples, seed), float((sums >= sums[0] - tie).mean()))


def _vector(values: ArrayLike, name: str) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise SdftError(f"{name} = {np.array2string(x, threshold=6)}: it needs one finite number for each seed")
    return x


# Over the items of an evaluation set.


@dataclass(frozen=True)
class ItemComparison:
    difference: float  # accuracy of the first minus that of the second
    only_first: int  # items that only the first answered correctly
    only_second: int
    p: float  # two-sided, of McNemar's exact test


def mcnemar(first: ArrayLike, second: ArrayLike) -> ItemComparison:
    """Two runs over the same items: do they differ by more than chance on these items? McNemar's exact test (1947).

    Of the items that just one run got right, each is as likely the first's as the second's if the runs are alike; p is
    the two-sided binomial tail. It speaks of these two models and says nothing of other seeds.

    first, second: (n,) booleans, entry i of both the same item. Raises SdftError for different lengths or none.
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.dtype != bool or b.dtype != bool or a.shape != b.shape or a.ndim != 1 or not len(a):
        raise SdftError(
            f"first is {a.dtype} {a.shape} and second {b.dtype} {b.shape}; both need one boolean for each item, "
            "the same items in the same order"
        )
    x, y = int((a & ~b).sum()), int((~a & b).sum())
    tail = ways = 1  # C(x + y, i) from i = 0 on, in whole numbers
    for i in range(min(x, y)):
        ways = ways * (x + y - i) // (i + 1)
        tail += ways
    return ItemComparison((x - y) / len(a), x, y, min(1.0, 2 * tail / 2 ** (x + y)))


def pass_at_k(samples: ArrayLike, correct: ArrayLike, k: int) -> Array:
    """Chance that one of k samples is correct: 1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021), per prompt.

    As a product of ratios, since the binomials overflow.

    samples: () or (prompts,), n >= k samples drawn of each prompt. correct: (prompts,), c of them were correct.
    Raises SdftError for k or c out of range.
    """
    n, c = np.broadcast_arrays(np.asarray(samples), np.asarray(correct))
    if not np.issubdtype(n.dtype, np.integer) or not np.issubdtype(c.dtype, np.integer):
        raise SdftError(f"samples ({n.dtype}) and correct ({c.dtype}) are counts; give integers")
    if k < 1 or (n < k).any():
        raise SdftError(f"k = {k}: it must lie between 1 and the number of samples ({n.min()})")
    if (c < 0).any() or (c > n).any():
        raise SdftError(f"correct must lie between 0 and the number of samples; it is {c[(c < 0) | (c > n)][0]}")
    out = np.ones(n.shape)
    for i in range(k):  # C(n - c, k) / C(n, k) = prod_i (n - c - i) / (n - i)
        out *= np.maximum(n - c - i, 0) / (n - i)
    return np.asarray(1.0 - out)


# New against prior.


def pareto_front(points: ArrayLike) -> list[int]:
    """Indices of the points that no other point beats, by rising first coordinate, then by index.

    A point is beaten by one that is at least as good in both coordinates and better in one; so equal points are both
    on the front or both off it.

    points: (n, 2), more is better, such as (new, prior). Raises SdftError for another shape or a nan.
    """
    x = np.asarray(points, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != 2 or np.isnan(x).any():
        raise SdftError(f"points has the shape {x.shape}; it needs (n, 2) numbers, none of them nan")
    as_good = np.all(x[None] >= x[:, None], axis=-1)  # (n, n), [i, j]: j is at least as good as i
    better = np.any(x[None] > x[:, None], axis=-1)
    front = np.flatnonzero(~np.any(as_good & better, axis=1))
    return [int(i) for i in sorted(front, key=lambda i: (x[i, 0], i))]
