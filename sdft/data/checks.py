"""Is an answer right? A check compares what a model said with what a record accepts.

A record names its check (default `contains`) and what it accepts (`answer`, or else its demonstrations):

- `exact`: equal except for white space around it.
- `contains`: in the answer as whole words, in upper or lower case. `contains_all`: every entry of `answer` is.
- `tool_call`: the same `Action:` / `Action Input:` pairs in the same order, arguments equal as JSON.
- `choice`: the letter of a multiple choice. If the record has `choices` (a list of texts, or {letter: text}), only
  these letters count, and an answer may also give the text of an option.
- `number`: the last number in the answer.
- `regex`: a Python pattern that is found in the answer.
- `python:FILE.py:FUNCTION` or `python:MODULE:FUNCTION`: your function, `(given: str, record: dict) -> bool`. FILE is
  relative to the working folder. The code is run: read it first if you did not write it.

All checks except `python` look only at the text after a thinking model's `</think>`; a thought without an end is no
answer.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from sdft.data.records import Example
from sdft.data.user_checks import call_function, load_function
from sdft.errors import SdftError

Check = Callable[[str], bool]  # the answer -> is it right?


def check_exact(given: str, expected: str) -> bool:
    """Equal except for white space around it."""
    return given.strip() == expected.strip()


def check_contains(given: str, expected: str) -> bool:
    """The expected text is in the answer as whole words, in upper or lower case."""
    return re.search(rf"(?<!\w){re.escape(expected.strip())}(?!\w)", given, re.IGNORECASE) is not None


def check_regex(given: str, expected: str) -> bool:
    """The pattern is found in the answer."""
    return re.search(expected, given) is not None


def check_number(given: str, expected: str) -> bool:
    """The last number in the answer equals the expected one: 1,000 = 1000.0; H2O and x1 hold none."""
    found = re.findall(r"(?<![\w.])[-+\N{MINUS SIGN}]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d{1,4})?", given)
    return bool(found) and _number(found[-1]) == _number(expected)


def _number(text: str) -> Decimal:
    return Decimal(text.strip().replace(",", "").replace("\N{MINUS SIGN}", "-"))


# Tool calls.

# An input without an action is found too: it counts as a further call.
CALL = re.compile(r"\baction(?:[ \t]+input)?[ \t]*:[*` \t]*(?P<name>[^\n]*)", re.IGNORECASE)
INPUT = re.compile(r"\s*\**action[ \t]+input[ \t]*:\**\s*(?:`+\w*\s*)?", re.IGNORECASE)


def check_tool_call(given: str, expected: str) -> bool:
    """The same calls in the same order: function names equal, arguments equal as JSON.

    Numbers are equal by value (1 = 1.0, but 1 is not true); the order of keys does not matter. Fences and text around
    the calls are ignored. A further call is wrong, also a call without arguments, and arguments without a call.
    """
    calls, wanted = parse_tool_calls(given), parse_tool_calls(expected)
    return bool(wanted) and len(calls) == len(wanted) and all(map(_same_call, calls, wanted))


def parse_tool_calls(text: str) -> list[tuple[str, Any]]:
    """(function, arguments) of every `Action: name` / `Action Input: {...}` pair, in order.

    Arguments stay text if they are not JSON, have a key twice, or share their line with other text; white space in them
    becomes one blank. Such a call equals only a call that is written the same way. Arguments are None if
    `Action Input:` is missing.
    """
    calls: list[tuple[str, Any]] = []
    position = 0
    while call := CALL.search(text, position):
        name = call["name"].strip().strip("*`").strip()
        position = call.end()
        arguments: Any = None
        if start := INPUT.match(text, position):
            arguments, position = _arguments(text, start.end())
        calls.append((name, arguments))
    return calls


def _arguments(text: str, start: int) -> tuple[Any, int]:
    """The JSON at `start`, or else the text up to the next call; and the position after it."""
    try:
        value, end = DECODER.raw_decode(text, start)
        # `{"a": 1} or {"a": 2}` is a guess, so its first part does not count.
        if re.match(r"[^\w{}\[\]\"'\n]*(?:\n|\Z)", text[end:]):
            return value, end
    except (ValueError, RecursionError):
        pass
    following = re.search(r"\n[*` \t]*action[ \t]*:", text[start:], re.IGNORECASE)
    end = start + following.start() if following else len(text)
    return " ".join(text[start:end].strip().removesuffix("```").split()), end


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key twice")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)


def _same_call(a: tuple[str, Any], b: tuple[str, Any]) -> bool:
    return a[0] == b[0] and json_equal(a[1], b[1])


def json_equal(a: Any, b: Any) -> bool:
    """Equal as JSON: numbers by value, keys in any order; 1 and true are not equal, though Python's True == 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(json_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(json_equal, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


# Multiple choice.

# The forms in which an answer may give its letter; the first form that occurs decides.
STATED = (
    r"<answer>|\\boxed\{(?:\s*\\(?:text|mathrm|mathbf)\{)?",
    r"(?<![</])\b(?:answer|(?:correct|right|best) (?:option|choice))\b[^\w\n(\[]*"
    r"(?:(?:is|be|would be|should be|must be)\b)?[^\w(\[]*(?:(?:the )?(?:option|choice|letter)\b)?[^\w(\[]*",
    r"^[^\w(\[\n]*",
    r"(?=\(\w\)|\[\w\])|\b(?:option|choice)[ \t]+",
)
# A word after the letter makes the letter part of a sentence ("A dog", "B is wrong"), unless it supports the letter.
SUPPORT = r"because\b|since\b|as\b|for\b|is (?:my|the)?\s*(?:correct|right|best|true|answer)\b"
PART_OF_A_SENTENCE = re.compile(rf"[ \t]+(?!{SUPPORT})\w", re.IGNORECASE)
NEGATION = re.compile(r"\b(?:not?|nor|never|neither|except|cannot)\b|n['’]t\b", re.IGNORECASE)


def check_choice(given: str, expected: str, choices: Mapping[str, str] | None = None) -> bool:
    """The answer gives this letter and no other letter; `choices` maps letters to the options' texts, if known."""
    return read_choice(given, choices or dict.fromkeys("ABCDEFGHIJ", "")) == expected.strip().upper()


def read_choice(given: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer gives; None if it gives no letter or several letters.

    The search goes in this order: `<answer>B</answer>` and `\\boxed{B}`; "the answer is B"; lines that begin with "B",
    "(B)", "B." or "B is right"; "(B)" and "option B" anywhere; the text of exactly one option in a text that denies
    nothing. "A good one" and "B cells" give no letter. "B or C" gives two letters, and so does "B. text" if the text is
    the text of another option.
    """
    for form in STATED:
        starts = [match.end() for match in re.finditer(form, given, re.IGNORECASE | re.MULTILINE)]
        letters = set().union(*(_letters_at(given, start, choices) for start in starts))
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return _by_text(given, choices)


def _letters_at(text: str, start: int, choices: Mapping[str, str]) -> set[str]:
    """The letters of "B", "(B)", "B, C" or "B or C" at `start`, and of the option whose text follows."""
    item = re.compile(rf"[\s*(\[{{]*([{re.escape(''.join(choices))}])(?![\w'’+-])[)\]}}*]*", re.IGNORECASE)
    joint = re.compile(rf"(?:\s*(?:[,/&]|or\b|and\b)+|[ \t]*(?=[(\[]))(?={item.pattern})", re.IGNORECASE)
    letters: set[str] = set()
    match = item.match(text, start)
    while match:
        letters.add(match[1].upper())
        start = match.end()
        then = joint.match(text, start)
        match = item.match(text, then.end()) if then else None
    if PART_OF_A_SENTENCE.match(text, start):
        return set()
    option_text = _plain(text[start:].partition("\n")[0])
    if letters and option_text and option_text not in [_plain(choices[c]) for c in letters]:
        letters |= {c for c, option in choices.items() if _plain(option) == option_text}
    return letters


def _by_text(given: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the only option whose text is in the answer."""
    named, rest = set(), given
    for letter in sorted(
        choices, key=lambda c: -len(choices[c])
    ):  # so "carbon dioxide" does not also count as "carbon"
        if choices[letter].strip() and check_contains(rest, choices[letter]):
            named.add(letter)
            rest = re.sub(re.escape(choices[letter].strip()), " ", rest, flags=re.IGNORECASE)
    return named.pop() if len(named) == 1 and not NEGATION.search(rest) else None


def _plain(text: str) -> str:
    return text.strip(" \t.:;,)]}*-").casefold()


def options_of(record: Mapping[str, Any], where: str) -> dict[str, str] | None:
    """A record's `choices` as {letter: text}; None if it has none. A list gets the letters A, B, C..."""
    raw = record.get("choices")
    if raw is None:
        return None
    if isinstance(raw, list):
        raw = {chr(ord("A") + i): text for i, text in enumerate(raw)}
    if not isinstance(raw, dict) or not all(isinstance(text, str) and text.strip() for text in raw.values()):
        raise SdftError(f"{where}: 'choices' must be a list of texts, or {{letter: text}}")
    if len(raw) < 2 or not all(len(c) == 1 and c.isalnum() and c == c.upper() for c in raw):
        raise SdftError(f"{where}: 'choices' needs two options or more, each with one capital letter or digit")
    return raw


# From a record to its check.


def prepare(example: Example) -> Check:
    """The check of an example, ready to be called with an answer.

    Raises SdftError here, before long work, for an unknown check, a pattern that does not compile, an answer that is
    no number or none of the choices, and a function that cannot be loaded.
    """
    kind, where, answers = example.check, example.source, example.answers
    if kind.startswith("python:"):
        function = load_function(kind, where)
        return lambda given: call_function(function, given, dict(example.record), where)
    if kind not in CHECKS:
        raise SdftError(f"{where}: check {kind!r} is unknown; valid: {', '.join(CHECKS)}, python:FILE.py:FUNCTION")
    compare = CHECKS[kind]
    if kind == "contains_all":
        return lambda given: all(check_contains(spoken(given), fact) for fact in answers)
    if kind == "choice":
        choices = options_of(example.record, where)
        for answer in answers:
            if choices is not None and answer.strip().upper() not in choices:
                raise SdftError(f"{where}: answer {answer!r} is none of the choices {', '.join(choices)}")
            if len(answer.strip()) != 1:
                raise SdftError(f"{where}: answer {answer!r} must be the letter of a choice, such as 'B'")
        compare = functools.partial(check_choice, choices=choices)
    for answer in answers:
        try:
            if kind == "regex":
                re.compile(answer)
            elif kind == "number":
                _number(answer)
        except re.error as error:
            raise SdftError(f"{where}: answer {answer!r} is not a regular expression ({error})") from None
        except InvalidOperation:
            raise SdftError(f"{where}: answer {answer!r} must be a number, for check 'number'") from None
    return lambda given: any(compare(spoken(given), answer) for answer in answers)


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "exact": check_exact,
    "contains": check_contains,
    "tool_call": check_tool_call,
    "contains_all": check_contains,
    "choice": check_choice,
    "number": check_number,
    "regex": check_regex,
}


def spoken(given: str) -> str:
    """The text after a thinking model's thoughts; nothing if they do not end."""
    return "" if "<think>" in given and "</think>" not in given else given.rpartition("</think>")[2]
