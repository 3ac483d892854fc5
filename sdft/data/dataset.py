"""Examples -> token ids: length budgets, the digest of the data, and which examples a step takes."""

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdft.config import DataConfig, TeacherConfig
from sdft.data.prompts import encode_chat, encode_target, set_chat_template, student_messages, teacher_messages
from sdft.data.records import Example
from sdft.errors import SdftError


@dataclass(frozen=True)
class TokenizedExample:
    prompt: list[int]  # the student's prompt, up to the start of the completion
    teacher_prompt: list[int]  # the teacher's prompt: the same request, with the demonstration
    target: list[int]  # the demonstration as a completion, with the end-of-turn token (sft, dft)
    samples: tuple[list[int], ...] = ()  # completions sampled before the first step (rollout.source = offline)


@dataclass(frozen=True)
class Dataset:
    examples: tuple[TokenizedExample, ...]
    dropped: int  # records over a length budget
    digest: str  # sha256 of every token id: two runs saw the same data


def tokenize(
    examples: Sequence[Example], tokenizer: Any, stop_ids: Sequence[int], data: DataConfig, teacher: TeacherConfig
) -> Dataset:
    """Token ids of every example. An example over a length budget is dropped and counted, or refused.

    A prompt is never cut: with half a demonstration, or half a question, the student would learn the wrong thing, and
    nothing would show it.
    """
    set_chat_template(tokenizer, data.chat_template)
    kept, dropped, digest = [], 0, hashlib.sha256()
    demonstrated = teacher.context != "none"
    for example in examples:
        if not example.demonstrations and demonstrated:
            raise SdftError(f"{example.source}: 'demonstration' is missing; training needs one in every record")
        asked = student_messages(example, data.system)
        shown = teacher_messages(example, teacher, data.system)
        own = [d for d in example.demonstrations if d.prompt is None] or None
        target = own[0].response if own else (example.answers[0] if example.answers else None)
        if target is None and demonstrated:
            raise SdftError(f"{example.source}: no demonstration answers this request and 'answer' is missing")
        item = TokenizedExample(
            prompt=encode_chat(tokenizer, asked, example.source),
            teacher_prompt=encode_chat(tokenizer, shown, example.source),
            target=[] if target is None else encode_target(tokenizer, asked, target, stop_ids, example.source),
        )
        for ids, limit, name in (
            (item.prompt, data.max_prompt_tokens, "data.max_prompt_tokens"),
            (item.teacher_prompt, teacher.max_prompt_tokens, "teacher.max_prompt_tokens"),
        ):
            if len(ids) > limit:
                if data.over_length == "error":
                    raise SdftError(
                        f"{example.source}: prompt of {len(ids)} tokens is over {name} = {limit}; raise the budget, "
                        "shorten the record, or set data.over_length = 'drop'"
                    )
                dropped += 1
                break
        else:
            kept.append(item)
            digest.update(json.dumps([item.prompt, item.teacher_prompt, item.target]).encode())
    if not kept:
        raise SdftError(
            f"all {dropped} records are over the length budget; raise data.max_prompt_tokens "
            f"({data.max_prompt_tokens}) or teacher.max_prompt_tokens ({teacher.max_prompt_tokens})"
        )
    return Dataset(tuple(kept), dropped, digest.hexdigest())


def batch_indices(size: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The examples of step `step` (from 0): endless shuffled passes over the data, cut into batches.

    The result depends on the arguments only, so a checkpoint needs no position in the data.
    """
    places = (divmod(position, size) for position in range(step * batch_size, (step + 1) * batch_size))
    return [_epoch_order(size, seed, epoch)[index] for epoch, index in places]


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def _epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
