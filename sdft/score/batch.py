"""Prompts and completions -> token ids and the rows that predict completion tokens.

Legend: B sequences, T tokens of a row of ids, N completion tokens of the batch.
Sequences lie end to end in one row of ids (packed), or each in a separate row, padded to the longest. Row n of
the student's and of the teacher's batch predicts the same token, so the two sides line up whatever the lengths of
their prompts.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # (1, T) int64 packed; (B, T) padded on the right
    lengths: tuple[int, ...] | None  # packed: tokens of each sequence, in order; None: padded
    real: int  # tokens that are not padding
    rows: Tensor  # (N,) int64 index into the positions of input_ids: the one before each completion token
    labels: Tensor  # (N,) int64, the completion tokens

    def select(self, hidden: Tensor) -> Tensor:
        """Hidden states, shaped like input_ids with H behind -> (N, H), those that predict a completion token."""
        return hidden.flatten(0, 1).index_select(0, self.rows)


def lay_out(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
    mask_first: int = 0,
    packed: bool = False,
) -> Batch:
    """Prompt + completion per sequence, end to end (packed) or padded on the right.

    The first `mask_first` tokens of each completion are context only: they get no row, so no head ever sees them.
    """
    # The last token predicts nothing that is trained, so it need not be run.
    sequences = [[*p, *c][:-1] for p, c in zip(prompts, completions, strict=True)]
    lengths = [len(s) for s in sequences]
    width = max(lengths)
    if packed:
        ids = [[token for s in sequences for token in s]]
        starts = [0, *itertools.accumulate(lengths)]
    else:
        ids = [[*s, *[pad_id] * (width - len(s))] for s in sequences]
        starts = [b * width for b in range(len(sequences))]
    rows = [
        start + len(prompt) - 1 + j
        for start, prompt, completion in zip(starts, prompts, completions, strict=False)
        for j in range(mask_first, len(completion))
    ]
    labels = [token for completion in completions for token in completion[mask_first:]]
    return Batch(
        torch.tensor(ids, device=device),
        tuple(lengths) if packed else None,
        sum(lengths),
        torch.tensor(rows, device=device, dtype=torch.int64),
        torch.tensor(labels, device=device, dtype=torch.int64),
    )


def sequence_weights(
    trained: Sequence[int], tokens: int, sequences: int, average: Literal["token", "sequence"]
) -> list[float]:
    """For each sequence, the weight of each of its trained tokens; over the whole optimizer step they sum to 1.

    trained: the sequences' numbers of trained tokens. tokens, sequences: of the whole step (all micro-batches of all
    ranks), how many tokens train and how many sequences have such a token; so micro-batches add up to the mean over
    the step, and not to a mean of means. average: "token" gives every trained token the same weight, "sequence" gives
    every sequence the same weight, shared equally among its tokens. The weight is 0 for a sequence without any.
    """
    if average == "token":
        return [1.0 / tokens if n else 0.0 for n in trained]
    return [1.0 / (n * sequences) if n else 0.0 for n in trained]


def micro_batches(lengths: Sequence[int], budget: int, packed: bool) -> list[list[int]]:
    """Indices of sequences in groups whose forward pass computes at most `budget` tokens (0: one group).

    lengths: tokens of each sequence. packed: laid end to end; otherwise each is padded to its group's longest.
    Like lengths come together, shortest first; a sequence over the budget gets a separate group.
    """
    groups: list[list[int]] = [[]]
    total = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        total = total + lengths[i] if packed else (len(groups[-1]) + 1) * lengths[i]
        if budget and groups[-1] and total > budget:
            groups.append([])
            total = lengths[i]
        groups[-1].append(i)
    return groups
