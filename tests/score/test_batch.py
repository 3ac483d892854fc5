"""Rows of student and teacher predict the same tokens; weights of a step; micro-batches."""

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdft.model.packing import enable_packing
from sdft.score.batch import lay_out, micro_batches, sequence_weights

CPU = torch.device("cpu")


def sequences(seed: int, count: int, longest: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mask_first", [0, 2])
def test_rows_are_those_of_sequences_run_alone(family: str, load_tiny: Any, mask_first: int, packed: bool) -> None:
    model = load_tiny(family)[1]
    if packed:
        enable_packing(model, "on")
    model.lm.eval()
    answers = sequences(1, 4, 7)
    for seed, longest in ((2, 5), (3, 30), (4, 150)):  # other prompts, same rows; 150 passes Gemma's window of 64
        prompts = sequences(seed, 4, longest)
        batch = lay_out(prompts, answers, model.pad_id, CPU, mask_first, packed)
        with torch.no_grad():
            got = batch.select(model.hidden(batch.input_ids, batch.lengths))
            alone = [model.hidden(torch.tensor([p + a]))[0] for p, a in zip(prompts, answers, strict=True)]
        want = [h[len(p) - 1 + mask_first : -1] for h, p in zip(alone, prompts, strict=True)]
        torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-4)
        assert batch.labels.tolist() == [t for a in answers for t in a[mask_first:]]
        sizes = [len(p + a) - 1 for p, a in zip(prompts, answers, strict=True)]
        assert batch.real == sum(sizes)
        assert batch.input_ids.shape == ((1, sum(sizes)) if packed else (4, max(sizes)))


def test_everything_masked_leaves_no_rows() -> None:
    batch = lay_out([[1, 2], [3]], [[4], [5, 6]], 0, CPU, mask_first=2)
    assert (batch.rows.shape, batch.labels.shape) == ((0,), (0,))
    assert batch.rows.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.tolist() == [[1, 2], [3, 5]]
    assert batch.select(torch.ones(2, 2, 8)).shape == (0, 8)


@given(seed=st.integers(0, 1000), count=st.integers(1, 6), mask=st.integers(0, 4))
def test_packed_is_padded_without_the_padding(seed: int, count: int, mask: int) -> None:
    prompts, answers = sequences(seed, count, 9), sequences(seed + 1, count, 9)
    padded = lay_out(prompts, answers, 999, CPU, mask)
    packed = lay_out(prompts, answers, 999, CPU, mask, packed=True)
    assert packed.input_ids[0].tolist() == [t for t in padded.input_ids.flatten().tolist() if t != 999]
    assert torch.equal(packed.labels, padded.labels)
    for batch in (packed, padded):  # the row before a label holds the token before it
        sequence = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
        before = [
            s[len(p) - 1 + j] for s, p in zip(sequence, prompts, strict=True) for j in range(mask, len(s) - len(p))
        ]
        assert batch.input_ids.flatten()[batch.rows].tolist() == before
    assert packed.lengths == tuple(len(p) + len(a) - 1 for p, a in zip(prompts, answers, strict=True))


lengths = st.lists(st.integers(0, 20), min_size=1, max_size=12)


@given(trained=lengths)
def test_token_weights_are_the_mean_over_all_tokens(trained: list[int]) -> None:
    total = sum(trained)
    weights = sequence_weights(trained, total, sum(n > 0 for n in trained), "token")
    assert weights == [1 / total if n else 0 for n in trained]


@given(trained=lengths)
def test_sequence_weights_are_a_mean_of_means(trained: list[int]) -> None:
    live = sum(n > 0 for n in trained)
    weights = sequence_weights(trained, sum(trained), live, "sequence")
    shares = [w * n for w, n in zip(weights, trained, strict=True)]
    assert shares == pytest.approx([1 / live if n else 0 for n in trained])
    assert sum(shares) == pytest.approx(1 if live else 0)
    assert all(w == 0 for w, n in zip(weights, trained, strict=True) if not n)


@given(trained=lengths, parts=st.integers(1, 4), average=st.sampled_from(["token", "sequence"]))
def test_weights_of_parts_of_a_step_are_those_of_the_whole(trained: list[int], parts: int, average: Any) -> None:
    total = sum(trained), sum(n > 0 for n in trained)
    whole = sequence_weights(trained, *total, average)
    for part in range(parts):
        assert sequence_weights(trained[part::parts], *total, average) == whole[part::parts]


@given(lengths=lengths, budget=st.integers(0, 60), packed=st.booleans())
def test_micro_batches_partition_by_length(lengths: list[int], budget: int, packed: bool) -> None:
    groups = micro_batches(lengths, budget, packed)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert [lengths[i] for g in groups for i in g] == sorted(lengths)

    def computed(group: list[int]) -> int:
        sizes = [lengths[i] for i in group]
        return sum(sizes) if packed else len(sizes) * max(sizes)

    if not budget:
        assert len(groups) == 1
        return
    assert all(computed(g) <= budget or len(g) == 1 for g in groups)
    for group, after in itertools.pairwise(groups):  # no group could have taken one more
        assert computed([*group, after[0]]) > budget
