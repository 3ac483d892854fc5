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

from dataclasses import dataclass, field
from typing import Any, TypedDict

from sdft.errors import SdftError

Record = dict[str, Any]  # a record as it stands in a file


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
    """One record as an Example. Raises SdftError, which starts with `where`, for a bad record."""
    if not isinstance(row, dict):
        raise SdftError(f"{where}: a record must be a JSON object, not {type(row).__name__}")
    # A table of `datasets` has a null for a field that a record lacks.
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
