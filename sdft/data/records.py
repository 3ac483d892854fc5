"""Records (JSONL, datasets) -> examples -> student and teacher token ids.

A record is one JSON object:

    {"prompt": "dim the radio in the attic", "demonstration": "CALL radio.down(room=attic)"}

- `prompt` (one user turn) or `messages` (chat turns that end with a user turn).
- `demonstration`: a string, or a list of demonstrations. Each is an answer to this very request, or a pair
  {"prompt": ..., "response": ...} that shows another request answered. Needed for training and `sdft check`, unless
  teacher.context is none.
- `answer` (optional): what an evaluation accepts, a string or a list; default: the demonstrations.
- `check` (optional): how it is compared, one of those of checks.py; `choices`: the options of a multiple choice.
"""

import functools
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from sdft import files
from sdft.config import DataConfig, TeacherConfig
from sdft.errors import SdftError


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True)
class Demonstration:
    response: str
    prompt: str | None = None  # None: it answers the example's own request


@dataclass(frozen=True)
class Example:
    messages: tuple[Message, ...]  # ends with the user's request
    demonstrations: tuple[Demonstration, ...] = ()
    answers: tuple[str, ...] = ()
    check: str = "contains"
    source: str = ""  # file:line, for error messages
    record: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # as it stands in the file


@dataclass(frozen=True)
class TokenizedExample:
    prompt: list[int]  # the student's prompt, up to where the answer starts
    teacher_prompt: list[int]  # the same request after the demonstration
    target: list[int]  # the demonstration as an answer, end-of-turn token included (sft, dft)
    samples: tuple[list[int], ...] = ()  # answers sampled before the first step (rollout.source = offline)


@dataclass(frozen=True)
class Dataset:
    examples: tuple[TokenizedExample, ...]
    dropped: int  # records over a length budget
    digest: str  # sha256 of every token id: two runs saw the same data


def load_records(path: str, split: str = "train") -> list[Example]:
    """Reads examples from a .jsonl file, a folder saved by `datasets`, or a hub data set (fetched by name).

    Raises SdftError that names file and line for a record that is empty, not JSON, or lacks a field.
    """
    if path.endswith((".jsonl", ".json")):
        lines = files.read_json_lines(Path(path), "data file")
        rows: Iterable[tuple[str, Any]] = ((line.where, line.row) for line in lines)
    else:
        rows = ((f"{path}[{i}]", row) for i, row in enumerate(_read_datasets(path, split)))
    examples = [parse_record(row, where) for where, row in rows]
    if not examples:
        raise SdftError(f"{path}: no records in it")
    return examples


def _read_datasets(path: str, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    local = Path(path)
    if not local.exists() and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        raise SdftError(f"data {path}: no such file or folder")
    try:
        if local.is_dir() and any((local / f).exists() for f in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path)
    except Exception as error:  # datasets raises many kinds; all mean the same to the user
        raise SdftError(f"data {path}: datasets cannot load it ({type(error).__name__}: {error})") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise SdftError(f"data {path}: no split {split!r}; set data.split to one of {', '.join(loaded)}")
        loaded = loaded[split]
    return loaded


def parse_record(row: Any, where: str) -> Example:
    """One record as an Example; raises SdftError that starts with `where`."""
    if not isinstance(row, dict):
        raise SdftError(f"{where}: a record must be a JSON object, not {type(row).__name__}")
    # A table of `datasets` holds a null where a record had no such field.
    row = {key: value for key, value in row.items() if value is not None}
    if ("prompt" in row) == ("messages" in row):
        raise SdftError(f"{where}: needs exactly one of 'prompt' and 'messages'; has {', '.join(row) or 'no fields'}")
    if "prompt" in row:
        messages: tuple[Message, ...] = (Message(role="user", content=_text(row["prompt"], "prompt", where)),)
    else:
        messages = _messages(row["messages"], where)
    raw = row.get("demonstration", [])
    raw = raw if isinstance(raw, list) else [raw]
    demonstrations = tuple(_demonstration(item, where) for item in raw)
    answers = row.get("answer", [d.response for d in demonstrations if d.prompt is None])
    answers = answers if isinstance(answers, list) else [answers]
    return Example(
        messages=messages,
        demonstrations=demonstrations,
        answers=tuple(_text(a, "answer", where) for a in answers),
        check=_text(row.get("check", "contains"), "check", where),
        source=where,
        record=row,
    )


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise SdftError(f"{where}: {name!r} must be a non-empty string, not {value!r}")
    return value


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise SdftError(f"{where}: 'messages' must be a list of {{'role', 'content'}} objects")
    messages = tuple(
        Message(role=_text(m.get("role"), "role", where), content=_text(m.get("content"), "content", where))
        for m in value
    )
    if messages[-1]["role"] != "user":
        raise SdftError(
            f"{where}: 'messages' must end with the user's request, not with role {messages[-1]['role']!r}; "
            "put the answer into 'demonstration'"
        )
    return messages


def _demonstration(item: Any, where: str) -> Demonstration:
    if isinstance(item, dict):
        prompt, response = item.get("prompt"), item.get("response")
        return Demonstration(
            response=_text(response, "demonstration.response", where),
            prompt=None if prompt is None else _text(prompt, "demonstration.prompt", where),
        )
    return Demonstration(response=_text(item, "demonstration", where))


# Teacher contexts: T(x, c) of the paper, as chat turns.

IN_PROMPT = """{request}

Here is an example of a response to this request:

{demonstration}

Now give a response of your own to the request, in the same spirit as the example."""


def student_messages(example: Example, system: str = "") -> list[Message]:
    """The request as the student sees it; `system` goes in front where the example brings none."""
    messages = list(example.messages)
    if system and messages[0]["role"] != "system":
        messages.insert(0, Message(role="system", content=system))
    return messages


def teacher_messages(example: Example, config: TeacherConfig, system: str = "") -> list[Message]:
    """The request after the demonstration, by one of the contexts of design section 1.

    in_prompt and template rewrite the last user turn; as_turns puts `turns` earlier user/assistant turns in
    front of the conversation, each a demonstration, in order and repeated as often as it takes; none shows nothing.
    """
    messages = student_messages(example, system)
    if config.context == "none":
        return messages
    if config.context == "as_turns":
        head = [m for m in messages[:1] if m["role"] == "system"]
        turns: list[Message] = []
        for i in range(config.turns):
            shown = example.demonstrations[i % len(example.demonstrations)]
            asked = messages[len(head) :] if shown.prompt is None else [Message(role="user", content=shown.prompt)]
            turns += [*asked, Message(role="assistant", content=shown.response)]
        last = Message(role="user", content=config.request.replace("{request}", messages[-1]["content"]))
        return [*head, *turns, *messages[len(head) : -1], last]
    template = IN_PROMPT if config.context == "in_prompt" else config.template
    shown_text = "\n\n".join(
        d.response if d.prompt is None else f"{d.prompt}\n{d.response}" for d in example.demonstrations
    )
    # replace, not format: requests and demonstrations may hold braces of their own.
    parts = template.split("{demonstration}")
    request = messages[-1]["content"]
    content = shown_text.join(part.replace("{request}", request) for part in parts)
    return [*messages[:-1], Message(role="user", content=content)]


def set_chat_template(tokenizer: Any, path: str) -> None:
    """Gives the tokenizer the template in `path`; raises SdftError where it then has none."""
    if path:
        try:
            tokenizer.chat_template = Path(path).read_text()
        except OSError as error:
            raise SdftError(f"data.chat_template = {path!r} cannot be read ({error.strerror})") from None
    if not tokenizer.chat_template:
        raise SdftError(
            "the model's tokenizer has no chat template, so prompts cannot be laid out; set data.chat_template "
            "to a Jinja file, or take an instruct model"
        )


def encode_chat(tokenizer: Any, messages: Sequence[Message], where: str) -> list[int]:
    """Token ids of the conversation up to where the assistant's answer starts."""
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises what its author wrote: a system message refused, say
        raise SdftError(f"{where}: the chat template refuses this conversation: {error}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_target(
    tokenizer: Any, messages: Sequence[Message], response: str, stop_ids: Sequence[int], where: str
) -> list[int]:
    """Token ids of `response` as the assistant's answer, up to and with the token that ends the turn."""
    start = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    turn = [*messages, Message(role="assistant", content=response)]
    whole = tokenizer.apply_chat_template(turn, tokenize=False)
    # Templates that rewrite earlier text (think blocks) do not continue the prompt: then the plain text it is.
    text = whole[len(start) :] if whole.startswith(start) else response
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    if end is None:
        ids = tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"] + [stop_ids[0]]
    else:
        ids = ids[: end + 1]
    if len(ids) < 2:
        raise SdftError(f"{where}: the demonstration has no tokens")
    return ids


def tokenize(
    examples: Sequence[Example], tokenizer: Any, stop_ids: Sequence[int], data: DataConfig, teacher: TeacherConfig
) -> Dataset:
    """Token ids of every example; those over a length budget are dropped and counted, or refused.

    A prompt is never cut: a teacher that sees half a demonstration, or a student half a question, learns the
    wrong thing without a sign of it.
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
    """Which examples step `step` (from 0) takes: endless shuffled passes, cut into batches, nothing dropped.

    A pure function of its arguments, so the position in the data needs no state beyond the step.
    """
    places = (divmod(position, size) for position in range(step * batch_size, (step + 1) * batch_size))
    return [_epoch_order(size, seed, epoch)[index] for epoch, index in places]


@functools.lru_cache(maxsize=2)  # a batch may lie in two epochs; steps follow each other
def _epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
