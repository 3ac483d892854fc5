"""What a step trains on: demonstrations, completions sampled in the step, or completions sampled before the first."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sdft.config import get
from sdft.data.dataset import TokenizedExample
from sdft.device import return_freed
from sdft.model import flops
from sdft.rollout import offline
from sdft.rollout.engine import Completion, own_weights
from sdft.training import checkpoint
from sdft.training.retry import retry_with_less
from sdft.training.run import Run


def complete(run: Run, batch: Sequence[TokenizedExample], step: int) -> tuple[list[TokenizedExample], list[Completion]]:
    """The completions of a step, and for each its example: an example is repeated if it has several completions."""
    if run.config.method.completions == "demonstrations":
        return list(batch), [Completion(e.target, truncated=False) for e in batch]
    if run.config.method.completions == "offline":
        pairs = [(e, Completion(ids, ids[-1] not in run.model.stop_ids)) for e in batch for ids in e.samples]
        return [example for example, _ in pairs], [completion for _, completion in pairs]
    rollout = run.config.rollout
    examples = [e for e in batch for _ in range(rollout.per_prompt)]
    # mixed: in turns by step and not by prompt, since two half batches would take nearly twice the time of a whole one.
    by_teacher = rollout.source == "teacher" or (rollout.source == "mixed" and step % 2 == 1)
    prompts = [e.teacher_prompt if by_teacher else e.prompt for e in examples]
    run.engine.sync(run.teacher.weights if run.teacher and by_teacher else own_weights)
    return examples, run.engine.generate(prompts, replace(rollout, batch_size=run.rollout_batch))


def halve_rollout(run: Run) -> str:
    """From now on, half as many prompts generate together. Returns the new setting."""
    run.rollout_batch = max(1, min(run.rollout_batch, run.config.train.batch_size * run.config.rollout.per_prompt) // 2)
    return f"rollout.batch_size = {run.rollout_batch}"


def sample_before_training(run: Run, output: Path) -> dict[str, Any]:
    """rollout.source = offline: gives every example its completions, by the teacher at the start.

    Returns the line for metrics.jsonl. The model must still be as it was loaded, which is the teacher at the start
    unless teacher.model names another.
    """
    config, rollout, device = run.config, run.config.rollout, run.model.device
    weights = run.teacher.weights if run.teacher and config.teacher.model else own_weights
    names = ("per_prompt", "max_new_tokens", "temperature", "top_p", "top_k")
    with weights():
        start = checkpoint.weights_digest(run.model.lm.named_parameters())
    origin = {
        "data": run.data.digest,
        **{f"rollout.{name}": getattr(rollout, name) for name in names},
        **{key: get(config, key) for key in ("train.seed", "model.name", "teacher.model", "model.compute_dtype")},
        "weights": start,
    }

    def sample(prompts: list[list[int]]) -> list[list[int]]:
        found = retry_with_less(
            device,
            "completions before the first step",
            lambda: run.engine.generate(prompts, replace(rollout, batch_size=run.rollout_batch)),
            lambda: halve_rollout(run),
            run.advice,
        )
        return_freed(device)
        return [completion.ids for completion in found]

    run.engine.sync(weights)
    prompts = [e.teacher_prompt for e in run.data.examples]
    found = offline.collect(
        output, origin, prompts, rollout.per_prompt, rollout.batch_size, config.train.seed, sample,
        lambda ids: run.tokenizer.decode(ids, skip_special_tokens=True),
    )  # fmt: skip
    pairs = zip(run.data.examples, found.completions, strict=True)
    run.data = replace(run.data, examples=tuple(replace(e, samples=samples) for e, samples in pairs))
    run.offline = found.digest
    completions = [ids for samples in found.completions for ids in samples]
    tokens = sum(map(len, completions))
    prompt_lengths = [len(e.teacher_prompt) for e in run.data.examples for _ in e.samples]
    count = partial(flops.completion_flops, prompts=prompt_lengths, completions=list(map(len, completions)))
    return {
        "offline_answers": len(completions),
        "answer_tokens": tokens / len(completions),
        "truncated": sum(ids[-1] not in run.model.stop_ids for ids in completions) / len(completions),
        "tokens": tokens,
        **flops.logged(run.model.inner.config, count),
        "seconds": {"rollout": found.seconds},
    }
