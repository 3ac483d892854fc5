"""One optimizer step: batch -> rollout -> score -> loss -> backward -> update -> metrics."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdft import files, parallel
from sdft.data.dataset import TokenizedExample, batch_indices
from sdft.device import peak_memory, return_freed
from sdft.errors import FruitlessError
from sdft.model import flops
from sdft.model.shape import Work
from sdft.rollout.engine import Completion
from sdft.training.completions import complete, halve_rollout
from sdft.training.gradients import Scored, accumulate_gradients, sequence_sizes
from sdft.training.metrics import token_metrics
from sdft.training.retry import retry_with_less
from sdft.training.run import Run
from sdft.update import optim


class NonFiniteError(FruitlessError):
    """A loss or gradient is NaN or inf. The weights are untouched, the batch is saved."""


@dataclass(frozen=True)
class Update:
    """The outcome of an update. All values are of the whole step, and the same on every rank."""

    loss: float
    norm: float  # of the gradient, before it was clipped
    rate: float  # the learning rate
    finite: bool  # False: loss or norm is NaN or inf, and no weight has changed


def train_step(run: Run, step: int, output: Path) -> dict[str, Any]:
    """One optimizer step, the number `step` from 0; returns its metrics.

    Raises NonFiniteError, with the weights untouched, if train.on_nonfinite is stop; SdftError if memory runs out
    also with half as much at a time.
    """
    config, device, began = run.config, run.model.device, time.perf_counter()
    seed_step(config.train.seed, step)
    indices = batch_indices(len(run.data.examples), config.train.batch_size, step, config.train.seed)
    batch = parallel.share([run.data.examples[i] for i in indices])
    run.phases.spans.clear()
    with run.phases("rollout"):
        examples, completions = retry_with_less(
            device,
            f"step {step + 1}, rollout",
            lambda: complete(run, batch, step),
            lambda: halve_rollout(run),
            run.advice,
        )
    scored = retry_with_less(
        device,
        f"step {step + 1}, gradients",
        lambda: accumulate_gradients(run, examples, completions),
        lambda: halve_tokens(run, sum(sequence_sizes(run, examples, completions))),
        run.advice,
    )
    with run.phases("update"):
        update = update_weights(run, step, scored.loss)
    if not update.finite:
        on_nonfinite(run, step, examples, completions, update, output)
    return metrics_of(run, examples, completions, scored, update, began)


def seed_step(seed: int, step: int) -> None:
    """Every draw of a step follows from (seed, step): a resumed run samples what the undisturbed one would have."""
    torch.manual_seed(random.Random(f"{seed}/{step}").getrandbits(63))


def halve_tokens(run: Run, whole: int) -> str:
    """From now on, half as many tokens in a forward pass; drops the gradients of the attempt that failed.

    whole: tokens of the step. Returns the new setting.
    """
    run.optimizer.zero_grad(set_to_none=True)
    run.micro_batch_tokens = max(1, min(run.micro_batch_tokens or whole, whole) // 2)
    return f"train.micro_batch_tokens = {run.micro_batch_tokens}"


def update_weights(run: Run, step: int, loss: torch.Tensor) -> Update:
    """Clips the gradients, updates the student's weights and then the teacher's, and drops the gradients.

    loss: of this rank's share, 0-dim. Nothing is updated if the loss or the norm is not finite.
    """
    rate = optim.learning_rate(step, run.steps, run.config.optim)
    norm = optim.clip(run.model.trainable().values(), run.config.optim)
    loss = parallel.sum_over_ranks(loss)
    # The step's one wait for the device: an update with NaN in it could not be taken back.
    finite = bool(torch.isfinite(norm + loss))
    if finite:
        if run.teacher is not None:
            run.teacher.wait()  # it may still be reading the weights
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if finite and run.teacher is not None:
        run.teacher.update()
    return_freed(run.model.device)
    return Update(loss.item(), norm.item(), rate, finite)


def metrics_of(
    run: Run,
    examples: Sequence[TokenizedExample],
    completions: Sequence[Completion],
    scored: Scored,
    update: Update,
    began: float,
) -> dict[str, Any]:
    """The step's line in metrics.jsonl, over all ranks. began: time.perf_counter() at the start of the step."""
    config, device = run.config, run.model.device
    work = Work(
        tuple(len(e.prompt) for e in examples),
        tuple(len(e.teacher_prompt) for e in examples) if run.teacher else (),
        tuple(len(c.ids) for c in completions),
    )
    counted = flops.logged(run.model.inner.config, lambda shape: flops.step_flops(shape, config, work).total)
    truncated = sum(c.truncated for c in completions)
    counts = [sum(work.completions), len(completions), truncated, scored.real, scored.computed, *counted.values()]
    tokens, sequences, truncated, real, computed, *operations = parallel.sum_counts(counts, device)
    seconds = run.phases.seconds()
    return {
        "loss": update.loss,
        "grad_norm": update.norm,
        "lr": update.rate,
        **({} if update.finite else {"skipped": True}),
        **({"teacher_tracked": run.teacher.tracked().item()} if run.teacher else {}),
        **token_metrics(scored.parts, scored.positions, device),
        "answer_tokens": tokens / sequences,
        "truncated": truncated / sequences,
        **({"micro_batch_tokens": run.micro_batch_tokens} if run.micro_batch_tokens else {}),
        "real_tokens": real / max(1, computed),
        "tokens": tokens,
        "tokens_per_second": tokens / (time.perf_counter() - began),
        **dict(zip(counted, operations, strict=True)),
        "seconds": seconds,
        "peak_memory": peak_memory(device),
    }


def on_nonfinite(
    run: Run,
    step: int,
    examples: Sequence[TokenizedExample],
    completions: Sequence[Completion],
    update: Update,
    output: Path,
) -> None:
    """Saves the batch whose loss or gradient is not finite; raises NonFiniteError unless the step is to be skipped."""
    path = output / f"nonfinite-step-{step + 1:06d}.json"
    rows = [
        {"prompt": e.prompt, "teacher_prompt": e.teacher_prompt, "completion": c.ids}
        for e, c in zip(examples, completions, strict=True)
    ]
    found = {"step": step + 1, "loss": str(update.loss), "grad_norm": str(update.norm), "batch": rows}
    if parallel.is_main():
        files.write_text(path, json.dumps(found))
    if run.config.train.on_nonfinite == "stop":
        raise NonFiniteError(
            f"step {step + 1}: loss {update.loss}, gradient norm {update.norm}; the weights are untouched and the "
            f"batch is in {path}. Lower optim.lr in another run, or resume with train.resume = true and "
            "train.on_nonfinite = 'skip' (--resume --train.on-nonfinite skip)"
        )
