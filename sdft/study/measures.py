"""Numbers over finished evaluations: what was learned, what was forgotten, and how sure that is.

Accuracies are fractions in [0, 1]. docs/measures.md has every formula with its source.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdft.errors import SdftError

Array = NDArray[np.float64]


# Learning and forgetting, from an accuracy matrix.


@dataclass(frozen=True)
class Transfer:
    """What a sequence of stages did to the tasks it trained. A measure is nan if it needs an entry that is nan."""

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

    The sources start from random weights; here row 0 is the pretrained base. `forgetting` does not see a best accuracy
    in a stage that was not evaluated.

    accuracy: (S + 1, columns), row 0 the base, row s after stage s; nan if not evaluated. A column that no stage trains
    is not read.
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
    """Mean of one number per seed, with scipy's percentile bootstrap interval (Efron 1979).

    **What it means for few seeds.** One of the 27 resamples of three values is the smallest value three times, and 1/27
    is more than 2.5%. So the 95% interval of three values is [smallest, largest]. For any continuous distribution it
    holds the median of all seeds with a probability of 75%, not 95% (1 - 2 * 0.5^3). Read it as the range that was
    seen. The interval of five normal values holds their mean in 83% of cases, and of ten in 91% (simulated).

    values: (n,) without nan. The same values in the same order and the same `seed` give the same interval. Raises
    SdftError for other values, or for a level outside (0, 1).
    """
    from scipy.stats import bootstrap

    x = _vector(values, "values")
    if not 0 < level < 1:
        raise SdftError(f"level = {level}: it must lie between 0 and 1, such as 0.95")
    mean, n = float(x.mean()), len(x)
    if n == 1:
        return Interval(mean, math.nan, math.nan, n)
    found = bootstrap(
        (x,), np.mean, n_resamples=resamples, confidence_level=level, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    # The quantiles of equal values may differ from the mean by rounding.
    return Interval(mean, min(float(found.low), mean), max(float(found.high), mean), n)


@dataclass(frozen=True)
class Paired:
    difference: Interval  # of the means, first minus second
    p: float  # two-sided, of the sign-flip permutation test


def paired(first: ArrayLike, second: ArrayLike, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Paired:
    """Two methods over the same seeds: the mean difference, its interval, and the p of scipy's permutation test.

    p is the fraction of the 2^n ways to give the n differences signs whose mean is at least as far from 0 as the mean
    that was seen (Fisher's sign-flip test). It is exact as long as 2^n is at most `resamples`; for more seeds,
    `resamples` ways are drawn. **With n seeds p is never below 2 / 2^n: 0.25 for three seeds, 0.0625 for five.** So
    three seeds alone cannot show a difference at 5%.

    first, second: (n,), entry i of both by the same seed, without nan. Raises SdftError for other values.
    """
    from scipy.stats import permutation_test

    a, b = _vector(first, "first"), _vector(second, "second")
    if len(a) != len(b):
        raise SdftError(f"first has {len(a)} values and second {len(b)}; they must come from the same seeds, in order")
    difference = interval(a - b, level, resamples, seed)
    if len(a) == 1:
        return Paired(difference, 1.0)  # both signs are as far from 0
    test = permutation_test(
        (a, b), _mean_difference, permutation_type="samples", vectorized=True, n_resamples=resamples,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Paired(difference, float(test.pvalue))


def _mean_difference(first: Array, second: Array, axis: int) -> Any:
    # scipy compares the means for equality, and equal means may differ by rounding.
    return (first - second).mean(axis=axis).round(12)


def _vector(values: ArrayLike, name: str) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise SdftError(f"{name} = {np.array2string(x, threshold=6)}: it needs one finite number for each seed")
    return x


# New against prior.


def pareto_front(points: ArrayLike) -> list[int]:
    """Indices of the points that no other point beats, by rising first coordinate, then by index.

    A point beats another if it is at least as good in both coordinates and better in one. So two equal points are both
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
