"""What a record is: one JSON object with a prompt and a demonstration, read as an `Example`.

    {"prompt": "dim the radio in the attic", "demonstration": "CALL radio.down(room=attic)"}

- `prompt` (one user turn) or `messages` (chat turns that end with a user turn).
- `demonstration`: a string, or a list of demonstrations. Each demonstration is a response to the request of the record,
  or a pair {"prompt": ..., "response": ...} that shows another request answered. Training and `sdft check` need one,
  unless teacher.context is none.
- `answer` (optional): what an evaluation accepts, a string or a list; default: the demonstrations.
- `check` (optional): how a completion is compared with `answer`, one of the checks in checks.py; `choices`: the options
  of a multiple choice.
"""

import difflib
import functools
from dataclasses import dataclass, field
from typing import Any, TypedDict

from sdft.errors import SdftError

Record = dict[str, Any]  # a record as it stands in a file

KEYS = ("prompt", "messages", "demonstration", "answer", "check", "choices")


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True)
class Demonstration:
    response: str
    prompt: str | None = None  # None: the response answers the example's request


@dataclass(frozen=True)
class Example:
    messages: tuple[Message, ...]  # the last message is the user's request
    demonstrations: tuple[Demonstration, ...] = ()
    answers: tuple[str, ...] = ()
    check: str = "contains"
    source: str = ""  # file:line, for error messages
    record: Record = field(default_factory=dict, compare=False, repr=False)  # as it stands in the file


def parse_record(row: Any, where: str) -> Example:
    """One record as an Example. Raises SdftError, which starts with `where`, for a bad record.

    Other keys than KEYS are allowed, since a `python` check may read them, but not a misspelt one of KEYS.
    """
    if not isinstance(row, dict):
        raise SdftError(f"{where}: a record must be a JSON object, not {type(row).__name__}")
    # A table of `datasets` has a null for a field that a record lacks.
    row = {key: value for key, value in row.items() if value is not None}
    _refuse_misspelt(row, where)
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
        answers=tuple(_text(a, "answer", where, "a non-empty string, or a list of them") for a in answers),
        check=_text(row.get("check", "contains"), "check", where),
        source=where,
        record=row,
    )


def _refuse_misspelt(row: Record, where: str) -> None:
    """Raises SdftError for a key that is nearly one of KEYS which the record lacks, and for a key `system`."""
    for key in row:
        near = None if key in KEYS else _nearest(key)
        if near == "system":
            if "messages" not in row and row[key] != "":
                raise SdftError(
                    f"{where}: {key!r} is no key of a record; put a system message first in 'messages', or set "
                    "data.system"
                )
        elif near and near not in row and not (near in ("prompt", "messages") and {"prompt", "messages"} & set(row)):
            raise SdftError(f"{where}: unknown key {key!r}; did you mean {near!r}? If not, rename {key!r}")


@functools.cache
def _nearest(key: str) -> str | None:
    """The known key that `key` is nearly the same as, or None."""
    return next(iter(difflib.get_close_matches(key.lower(), (*KEYS, "system"), n=1, cutoff=0.82)), None)


def _text(value: Any, name: str, where: str, valid: str = "a non-empty string") -> str:
    if not isinstance(value, str) or not value.strip():
        raise SdftError(f"{where}: {name!r} must be {valid}, not {value!r}")
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
        if odd := [key for key in item if key not in ("prompt", "response") and item[key] is not None]:
            raise SdftError(f"{where}: a pair in 'demonstration' has the keys 'prompt' and 'response', not {odd[0]!r}")
        prompt, response = item.get("prompt"), item.get("response")
        return Demonstration(
            response=_text(response, "demonstration.response", where),
            prompt=None if prompt is None else _text(prompt, "demonstration.prompt", where),
        )
    valid = "a non-empty string, a {'prompt', 'response'} pair, or a list of these"
    return Demonstration(response=_text(item, "demonstration", where, valid))
