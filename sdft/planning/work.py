"""The sequences of a run's steps, by their lengths, and the micro-batches that they are cut into.

Legend: T tokens of a forward pass, N completion tokens in it, B sequences.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sdft.config import Config
from sdft.data.dataset import TokenizedExample, batch_indices, tokenize
from sdft.data.formats import load_records
from sdft.errors import SdftError, first_line
from sdft.model.shape import ModelShape, Work
from sdft.score.batch import micro_batches

MOST_STEPS = 10_000  # steps of a run that are searched for the one with the most tokens


@dataclass(frozen=True)
class Pass:
    """The forward passes of one micro-batch."""

    student: int  # T of the student's pass, padding included
    teacher: int  # T of the teacher's pass; 0 if there is no teacher
    rows: int  # N
    sequences: int = 1  # B rows of ids, each padded to the longest; 1 if the sequences lie end to end


def uniform_work(config: Config, prompt: int, teacher_prompt: int, completion: int) -> Work:
    """A step whose sequences all have the same lengths."""
    repeats = 1 if config.method.completions == "demonstrations" else config.rollout.per_prompt
    count = config.train.batch_size * repeats
    return Work(
        (prompt,) * count,
        (teacher_prompt,) * count if config.method.needs_teacher else (),
        (completion,) * count,
        (teacher_prompt,) * config.rollout.batch_size if config.method.completions == "offline" else (),
    )


def shape_of(config: Config) -> ModelShape:
    """The shape of model.name, from its config.json; reads no weights."""
    from transformers import AutoConfig

    from sdft.model.sources import find_base

    name, extra, _ = find_base(config.model.name)
    try:
        found = AutoConfig.from_pretrained(name, trust_remote_code=config.model.trust_remote_code, **extra)
    except Exception as error:  # transformers raises many kinds here
        raise SdftError(f"model.name = {config.model.name!r}: no config loads ({first_line(error)})") from None
    return ModelShape.from_config(found)


def tokenized(config: Config) -> Sequence[TokenizedExample]:
    """The training data as token ids, without the records that are over a length budget."""
    from sdft.model.loading import load_tokenizer

    tokenizer, stop_ids = load_tokenizer(config.model)
    records = load_records(config.data.train, config.data.split)
    return tokenize(records, tokenizer, stop_ids, config.data, config.teacher).examples


def work_of(config: Config) -> Work:
    """The step of the run that has the most tokens, with completions as long as they may get; reads the data."""
    return max(works_of(config, tokenized(config)), key=lambda work: sum(work.sizes))


def works_of(config: Config, examples: Sequence[TokenizedExample]) -> Iterator[Work]:
    """Every step of the run, at most MOST_STEPS, with completions as long as they may get.

    examples: the run's `tokenized` data.
    """
    demonstrated = config.method.completions == "demonstrations"
    repeats = 1 if demonstrated else config.rollout.per_prompt
    every = tuple(len(e.teacher_prompt) for e in examples for _ in range(repeats))
    for step in range(min(steps_of(config, len(examples)), MOST_STEPS)):
        chosen = [examples[i] for i in batch_indices(len(examples), config.train.batch_size, step, config.train.seed)]
        chosen = [e for e in chosen for _ in range(repeats)]
        yield Work(
            tuple(len(e.prompt) for e in chosen),
            tuple(len(e.teacher_prompt) for e in chosen) if config.method.needs_teacher else (),
            tuple(len(e.target) if demonstrated else config.rollout.max_new_tokens for e in chosen),
            every if config.method.completions == "offline" else (),
        )


def steps_of(config: Config, records: int) -> int:
    """Optimizer steps of a run on this many records."""
    return config.train.steps or math.ceil(config.train.epochs * records / config.train.batch_size)


def passes_of(work: Work, budget: int, packed: bool) -> list[Pass]:
    """The micro-batches of a step. budget: train.micro_batch_tokens."""

    def tokens(prompts: Sequence[int], group: list[int]) -> int:
        lengths = [prompts[i] + work.completions[i] - 1 for i in group]  # the last token predicts nothing
        return sum(lengths) if packed else len(lengths) * max(lengths)

    return [
        Pass(
            tokens(work.prompts, group),
            tokens(work.teacher_prompts, group) if work.teacher_prompts else 0,
            sum(work.completions[i] for i in group),
            1 if packed else len(group),
        )
        for group in micro_batches(work.sizes, budget, packed)
    ]


def share_of(work: Work, budget: int, packed: bool) -> Pass:
    """A micro-batch of `budget` tokens with prompts and completions in the step's proportion.

    Padded, it has as many of the longest sequences as fit.
    """
    seen = work.teacher_prompts or work.prompts
    if packed:
        count, whole = 1, sum(work.sizes)
        prompt, teacher, completion = (budget * sum(part) / whole for part in (work.prompts, seen, work.completions))
    else:
        count = max(1, budget // max(work.sizes))
        prompt, teacher, completion = (count * max(part) for part in (work.prompts, seen, work.completions))
    student, teacher = math.ceil(prompt + completion), math.ceil(teacher + completion)
    return Pass(student, teacher if work.teacher_prompts else 0, math.ceil(completion), count)
