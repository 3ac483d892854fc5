"""Score -> loss -> backward: the gradients of one step, in micro-batches."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sdft import parallel
from sdft.data.dataset import TokenizedExample
from sdft.loss import LOSSES, TokenLoss
from sdft.model import activations
from sdft.rollout.engine import Completion
from sdft.score.batch import lay_out, micro_batches, sequence_weights
from sdft.training.run import Run


@dataclass
class Scored:
    """What the scoring of a step returns; the gradients themselves are in the parameters."""

    loss: torch.Tensor  # 0-dim; the sum over the ranks is the loss of the step
    parts: list[TokenLoss] = field(default_factory=list)  # one for each micro-batch
    positions: list[list[int]] = field(default_factory=list)  # of each trained token in its completion
    real: int = 0  # tokens that were run and are no padding, student's and teacher's
    computed: int = 0  # tokens that were run


def sequence_sizes(run: Run, examples: Sequence[TokenizedExample], completions: Sequence[Completion]) -> list[int]:
    """Tokens of each sequence, on the side that has more: micro-batches are cut by these."""
    return [
        max(len(e.prompt), len(e.teacher_prompt) if run.teacher else 0) + len(c.ids)
        for e, c in zip(examples, completions, strict=True)
    ]


def accumulate_gradients(run: Run, examples: Sequence[TokenizedExample], completions: Sequence[Completion]) -> Scored:
    """Scores and backpropagates this rank's share of a step; gradients add up in the parameters."""
    config, model, device = run.config, run.model, run.model.device
    masked = run.config.method.masked_tokens(config.loss.mask_first)
    token_losses = LOSSES[run.config.method.loss]
    trained = [max(0, len(c.ids) - masked) for c in completions]
    # Over all micro-batches and ranks, before any backward.
    tokens, sequences = parallel.sum_counts([sum(trained), sum(n > 0 for n in trained)], device)
    weights = sequence_weights(trained, tokens, sequences, config.loss.average)
    scored = Scored(torch.zeros((), device=device))
    for group in micro_batches(sequence_sizes(run, examples, completions), run.micro_batch_tokens, model.packed):
        positions = [masked + j for i in group for j in range(trained[i])]
        if not positions:
            continue
        ids = [completions[i].ids for i in group]
        layout = (ids, model.pad_id, device, masked, model.packed)
        row_weights = torch.tensor([weights[i] for i in group for _ in range(trained[i])], device=device)  # (N,)
        batches = [lay_out([examples[i].prompt for i in group], *layout)]
        with run.phases("score"):
            teacher_side = None
            if run.teacher is not None:
                batches.append(lay_out([examples[i].teacher_prompt for i in group], *layout))
                teacher_side = run.teacher.hidden(batches[1])  # (N, H), head
            with activations.saved_activations() if config.model.activation_offload else contextlib.nullcontext():
                hidden = batches[0].select(model.hidden(batches[0].input_ids, batches[0].lengths))  # (N, H)
        labels = batches[0].labels  # (N,)
        with run.phases("loss"), model.autocast():
            loss, part = token_losses(hidden, model.head(), teacher_side, labels, row_weights, config.loss)
        with run.phases("backward"):
            loss.backward()
        scored.loss += loss.detach()
        scored.parts.append(part)
        scored.positions.append(positions)
        scored.real += sum(b.real for b in batches)
        scored.computed += sum(b.input_ids.numel() for b in batches)
    return scored
