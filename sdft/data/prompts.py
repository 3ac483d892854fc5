"""Examples -> chat messages -> token ids: the student's prompt, and the teacher's, which holds the demonstration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdft.config import TeacherConfig
from sdft.data.records import Example, Message
from sdft.errors import SdftError

IN_PROMPT = """{request}

Here is an example of a response to this request:

{demonstration}

Now give a response of your own to the request, in the same spirit as the example."""


def student_messages(example: Example, system: str = "") -> list[Message]:
    """The student's prompt; `system` is put in front if the example has no system message."""
    messages = list(example.messages)
    if system and messages[0]["role"] != "system":
        messages.insert(0, Message(role="system", content=system))
    return messages


def teacher_messages(example: Example, config: TeacherConfig, system: str = "") -> list[Message]:
    """The teacher's prompt, T(x, c) of the paper: the request with the demonstrations, by `config.context`.

    in_prompt and template rewrite the last user turn. as_turns puts `config.turns` user/assistant turns in front of the
    conversation, each with a demonstration; the demonstrations are repeated if there are fewer. none shows nothing.
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
    # replace, not format: requests and demonstrations may contain braces.
    parts = template.split("{demonstration}")
    request = messages[-1]["content"]
    content = shown_text.join(part.replace("{request}", request) for part in parts)
    return [*messages[:-1], Message(role="user", content=content)]


def set_chat_template(tokenizer: Any, path: str) -> None:
    """Gives the tokenizer the template in `path`, if one is named. Raises SdftError if the tokenizer has none then."""
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
    """Token ids of the conversation, up to the start of the assistant's turn."""
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises any error that its author wrote, for example for a system message
        raise SdftError(f"{where}: the chat template refuses this conversation: {error}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_target(
    tokenizer: Any, messages: Sequence[Message], response: str, stop_ids: Sequence[int], where: str
) -> list[int]:
    """Token ids of `response` as the assistant's turn, with the token that ends the turn."""
    start = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    turn = [*messages, Message(role="assistant", content=response)]
    whole = tokenizer.apply_chat_template(turn, tokenize=False)
    # A template that rewrites earlier text (think blocks) does not continue the prompt; then the plain text is taken.
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
