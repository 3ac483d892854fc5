"""Measures over finished evaluations: by hand, and by the properties that define them."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sdft.errors import SdftError
from sdft.study.measures import interval, paired, pareto_front, transfer

NAN = math.nan
fractions = st.integers(0, 20).map(lambda i: i / 20)

# Three stages, three tasks; row 0 is the base.
R = [
    [0.1, 0.2, 0.3],
    [0.9, 0.3, 0.3],
    [0.7, 0.8, 0.5],
    [0.6, 0.9, 1.0],
]


def test_transfer_by_hand() -> None:
    got = transfer(R)
    assert got.average == pytest.approx((0.6 + 0.9 + 1.0) / 3)
    assert got.backward == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)
    assert got.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.9)) / 2)
    assert got.forward == pytest.approx(((0.3 - 0.2) + (0.5 - 0.3)) / 2)


def test_forgetting_is_from_the_best_and_backward_transfer_from_the_own_stage() -> None:
    later = [[0, 0, 0], [0.5, 0, 0], [0.9, 0.4, 0], [0.5, 0.4, 0.6]]  # task 0 is best after stage 2
    got = transfer(later)
    assert got.backward == pytest.approx(0.0)
    assert got.forgetting == pytest.approx((0.4 + 0.0) / 2)


def test_columns_and_their_order_are_the_users() -> None:
    shuffled = np.array(R)[:, [2, 0, 1]]
    prior = np.column_stack([np.full(4, 0.5), shuffled])  # a column that no stage trains
    assert transfer(prior, trained=[2, 3, 1]) == transfer(R)


def test_one_stage_has_no_transfer() -> None:
    got = transfer([[0.1], [0.7]])
    assert got.average == 0.7
    assert all(math.isnan(v) for v in (got.backward, got.forgetting, got.forward))


def test_what_was_not_evaluated_is_nan_and_not_left_out() -> None:
    upper = np.array(R)
    upper[1, 1:] = upper[0, 1:] = NAN  # tasks are evaluated from their own stage on
    upper[2, 2] = NAN
    got = transfer(upper)
    whole = transfer(R)
    assert (got.average, got.backward, got.forgetting) == (whole.average, whole.backward, whole.forgetting)
    assert math.isnan(got.forward)
    gone = np.array(R)
    gone[1, 0] = NAN
    got = transfer(gone)
    assert math.isnan(got.backward)
    assert math.isnan(got.forgetting)
    assert got.average == transfer(R).average


@pytest.mark.parametrize(
    ("matrix", "trained", "words"),
    [
        ([0.5, 0.5], None, r"shape \(2,\)"),
        ([[0.5, 0.5]], None, r"shape \(1, 2\)"),
        ([[0.0], [55.0]], None, "holds 55.0; entries are fractions"),
        ([[0.0], [math.inf]], None, "holds inf"),
        ([[0.0], [0.5], [0.5]], None, "2 stages need 2 different columns out of 1"),
        ([[0.0, 0], [0.5, 0], [0.5, 0]], [1, 1], "different columns"),
        ([[0.0, 0], [0.5, 0]], [2], "out of 2"),
    ],
)
def test_bad_matrices(matrix: Any, trained: Any, words: str) -> None:
    with pytest.raises(SdftError, match=words):
        transfer(matrix, trained)


@st.composite
def matrices(draw: Any) -> np.ndarray:
    stages = draw(st.integers(2, 5))
    return draw(arrays(float, (stages + 1, stages), elements=fractions))


@given(matrices())
def test_transfer_properties(matrix: np.ndarray) -> None:
    got = transfer(matrix)
    assert 0 <= got.average <= 1
    # The best before the last stage is at least what the own stage gave.
    assert got.forgetting >= -got.backward - 1e-12
    still = np.repeat(matrix[:1], len(matrix), axis=0)
    assert (transfer(still).backward, transfer(still).forgetting, transfer(still).forward) == (0, 0, 0)


# Over seeds.


@given(st.lists(st.floats(0, 1), min_size=2, max_size=3))
@settings(deadline=None, max_examples=20)
def test_the_interval_of_two_or_three_seeds_is_their_range(values: list[float]) -> None:
    got = interval(values)
    assert (got.mean, got.low, got.high) == pytest.approx((np.mean(values), min(values), max(values)))
    assert got.n == len(values)


def test_a_lower_level_is_narrower() -> None:
    """All 27 resamples in order: their 25% and 75% quantiles are the 7th and the 21st."""
    got = interval([0.2, 0.8, 0.5], level=0.5)
    means = sorted(np.mean(c) for c in itertools.product([0.2, 0.8, 0.5], repeat=3))
    assert (got.low, got.high) == pytest.approx((means[6], means[20]))


def test_one_seed_has_no_interval() -> None:
    got = interval([0.5])
    assert got.mean == 0.5
    assert math.isnan(got.low)
    assert math.isnan(got.high)


def test_many_seeds_are_resampled_by_the_seed_and_cover() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=40)
    assert interval(values) == interval(values)
    assert interval(values) != interval(values, seed=1)
    inside = 0
    for _ in range(200):
        got = interval(draw.normal(loc=3.0, size=40), resamples=500)
        inside += got.low <= 3.0 <= got.high
    assert 0.88 <= inside / 200 <= 0.99  # 95%, up to the error of the bootstrap with 40 values


def test_three_seeds_hold_the_middle_in_three_of_four_cases() -> None:
    """The number in the docstring and in the report."""
    draw = np.random.default_rng(0)
    held = [(got := interval(draw.normal(size=3), resamples=500)).low <= 0 <= got.high for _ in range(1500)]
    assert np.mean(held) == pytest.approx(0.75, abs=0.03)


@given(st.lists(fractions, min_size=2, max_size=8), st.floats(-1, 1))
@settings(deadline=None, max_examples=40)
def test_interval_properties(values: list[float], shift: float) -> None:
    got, moved = interval(values, resamples=200), interval([v + shift for v in values], resamples=200)
    assert min(values) - 1e-12 <= got.low <= got.mean <= got.high <= max(values) + 1e-12
    assert (moved.low, moved.high) == pytest.approx((got.low + shift, got.high + shift), abs=1e-9)


def test_paired_by_hand() -> None:
    got = paired([0.7, 0.8, 0.9], [0.6, 0.5, 0.4])  # differences 0.1, 0.3, 0.5
    assert got.difference.mean == pytest.approx(0.3)
    assert (got.difference.low, got.difference.high) == pytest.approx((0.1, 0.5))
    assert got.p == 0.25  # of 8 sign patterns, only all + and all -
    # Of 0.1, 0.3, -0.2 the signs that give |0.2| or more: all but +-+ and its mirror image.
    assert paired([0.1, 0.3, 0.0], [0.0, 0.0, 0.2]).p == 6 / 8


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=7))
@settings(deadline=None, max_examples=40)
def test_sign_flip_is_the_count_over_all_signs(differences: list[int]) -> None:
    got = paired([d / 10 for d in differences], [0.0] * len(differences))
    flips = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [abs(sum(s * d for s, d in zip(f, differences, strict=True))) for f in flips]
    assert got.p == sum(s >= abs(sum(differences)) for s in sums) / len(flips)  # in whole numbers: no rounding
    assert got.p >= 2 / 2 ** len(differences) or len(differences) == 1


def test_many_seeds_flip_at_random() -> None:
    draw = np.random.default_rng(1)
    a = draw.normal(size=30)
    assert paired(a, np.zeros(30) + a.mean()).p == pytest.approx(1.0, abs=0.05)  # no difference; drawn
    assert paired(a + 5, np.zeros(30)).p == pytest.approx(2 / 10_001)  # the least that 10,000 random ways can show
    values = draw.normal(loc=0.3, size=12)
    assert paired(values, np.zeros(12), resamples=4000).p == pytest.approx(paired(values, np.zeros(12)).p, abs=0.05)


@pytest.mark.parametrize("values", [[], [0.1, NAN], [[0.1]], [math.inf]])
def test_bad_seeds(values: Any) -> None:
    with pytest.raises(SdftError, match="one finite number for each seed"):
        interval(values)


def test_bad_pairs_and_levels() -> None:
    with pytest.raises(SdftError, match="first has 2 values and second 1"):
        paired([0.1, 0.2], [0.1])
    with pytest.raises(SdftError, match=r"level = 95"):
        interval([0.1, 0.2], level=95)


# New against prior.


def test_pareto_by_hand() -> None:
    points = [(0.9, 0.1), (0.5, 0.5), (0.1, 0.9), (0.4, 0.4), (0.5, 0.5), (0.5, 0.3), (0.9, 0.05)]
    assert pareto_front(points) == [2, 1, 4, 0]
    assert pareto_front(np.zeros((0, 2))) == []


@given(arrays(float, st.tuples(st.integers(1, 12), st.just(2)), elements=fractions))
def test_pareto_properties(points: np.ndarray) -> None:
    def beats(a: np.ndarray, b: np.ndarray) -> bool:
        return bool((a >= b).all() and (a > b).any())

    front = pareto_front(points)
    assert front
    for i in range(len(points)):
        assert (i in front) == (not any(beats(points[j], points[i]) for j in range(len(points))))
    assert list(points[front, 0]) == sorted(points[front, 0])
    assert list(points[front, 1]) == sorted(points[front, 1], reverse=True)


@pytest.mark.parametrize("points", [[1.0, 2.0], [[1.0, 2.0, 3.0]], [[0.5, NAN]]])
def test_bad_points(points: Any) -> None:
    with pytest.raises(SdftError, match=r"\(n, 2\) numbers"):
        pareto_front(points)
