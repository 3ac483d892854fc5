"""Is an answer right? Each check compares what was said with what a record accepts. Knows nothing of models.

A record names its check (default `contains`) and what is accepted (`answer`, or its demonstrations):

- `exact`: equal but for surrounding white space.
- `contains`: stands in the answer as whole words, whatever the case. `contains_all`: every one of `answer` does.
- `tool_call`: the same `Action:` / `Action Input:` pairs in the same order, arguments equal as JSON.
- `choice`: the letter of a multiple choice; `choices` in the record (a list of texts, or {letter: text}) says which
  letters there are, and lets an answer name its option by text.
- `number`: the last number in the answer.
- `regex`: a pattern in Python's syntax that is found in the answer.
- `python:FILE.py:FUNCTION` or `python:MODULE:FUNCTION`: a function of yours, `(given: str, record: dict) -> bool`.
  FILE counts from the working folder. The code runs as it stands: read it first if it is not yours.

All but `python` look at what follows a thinking model's `</think>`; a thought without an end is no answer.
"""

import functools
import importlib
import importlib.util
import inspect
import json
import re
import traceback
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from sdft.data.records import Example
from sdft.errors import SdftError

Check = Callable[[str], bool]  # the answer -> is it right?


def check_exact(given: str, expected: str) -> bool:
    """Equal but for surrounding white space."""
    return given.strip() == expected.strip()


def check_contains(given: str, expected: str) -> bool:
    """The expected text stands in the answer as whole words, whatever the case."""
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

# An input without an action of its own is found too, as a call too many.
CALL = re.compile(r"\baction(?:[ \t]+input)?[ \t]*:[*` \t]*(?P<name>[^\n]*)", re.IGNORECASE)
INPUT = re.compile(r"\s*\**action[ \t]+input[ \t]*:\**\s*(?:`+\w*\s*)?", re.IGNORECASE)


def check_tool_call(given: str, expected: str) -> bool:
    """The same calls in the same order: function names equal, arguments equal as JSON.

    Numbers are equal by value (1 = 1.0, but not true), the order of keys does not matter. Fences and text around the
    calls are passed over; a call too many is wrong, also one without arguments, or arguments without a call.
    """
    calls, wanted = parse_tool_calls(given), parse_tool_calls(expected)
    return bool(wanted) and len(calls) == len(wanted) and all(map(_same_call, calls, wanted))


def parse_tool_calls(text: str) -> list[tuple[str, Any]]:
    """(function, arguments) of every `Action: name` / `Action Input: {...}` pair, in order.

    Arguments that are not JSON, have a key twice, or share their line with more text stay text, white space as one
    blank: such a call equals only one written the same way. None where `Action Input:` is missing.
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
    """The JSON at `start`, or the text up to the next call; and where the search for that goes on."""
    try:
        value, end = DECODER.raw_decode(text, start)
        # Not `{"a": 1} or {"a": 2}`: who takes the first of these takes a guess for an answer.
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
    """Equal as JSON: numbers by value, objects whatever the order of their keys; Python's True == 1 is not."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(json_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(json_equal, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


# Multiple choice.

# Where an answer may give its letter; the first kind that occurs decides.
STATED = (
    r"<answer>|\\boxed\{(?:\s*\\(?:text|mathrm|mathbf)\{)?",
    r"(?<![</])\b(?:answer|(?:correct|right|best) (?:option|choice))\b[^\w\n(\[]*"
    r"(?:(?:is|be|would be|should be|must be)\b)?[^\w(\[]*(?:(?:the )?(?:option|choice|letter)\b)?[^\w(\[]*",
    r"^[^\w(\[\n]*",
    r"(?=\(\w\)|\[\w\])|\b(?:option|choice)[ \t]+",
)
# A word after the letter makes it part of a sentence ("A dog", "B is wrong"), unless it speaks for the letter.
SPEAKS_FOR_IT = r"because\b|since\b|as\b|for\b|is (?:my|the)?\s*(?:correct|right|best|true|answer)\b"
PART_OF_A_SENTENCE = re.compile(rf"[ \t]+(?!{SPEAKS_FOR_IT})\w", re.IGNORECASE)
NEGATION = re.compile(r"\b(?:not?|nor|never|neither|except|cannot)\b|n['’]t\b", re.IGNORECASE)


def check_choice(given: str, expected: str, choices: Mapping[str, str] | None = None) -> bool:
    """The answer names this letter and no other; `choices` maps letters to the options' texts, where known."""
    return read_choice(given, choices or dict.fromkeys("ABCDEFGHIJ", "")) == expected.strip().upper()


def read_choice(given: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer gives, or None where it gives none or several.

    Looked for in this order: `<answer>B</answer>` and `\\boxed{B}`; "the answer is B"; lines that begin with "B",
    "(B)", "B." or "B is right"; "(B)" and "option B" anywhere; the text of exactly one option, denying nothing.
    "A good one" and "B cells" give no letter, "B or C" gives two, and so does "B. text" with the text of another.
    """
    for form in STATED:
        starts = [match.end() for match in re.finditer(form, given, re.IGNORECASE | re.MULTILINE)]
        letters = set().union(*(_letters_at(given, start, choices) for start in starts))
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return _by_text(given, choices)


def _letters_at(text: str, start: int, choices: Mapping[str, str]) -> set[str]:
    """The letters of "B", "(B)", "B, C" or "B or C" at `start`, and that of an option whose text stands after it."""
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
    said = _plain(text[start:].partition("\n")[0])
    if letters and said and said not in [_plain(choices[c]) for c in letters]:
        letters |= {c for c, option in choices.items() if _plain(option) == said}
    return letters


def _by_text(given: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the only option whose text stands in the answer."""
    named, rest = set(), given
    for letter in sorted(choices, key=lambda c: -len(choices[c])):  # so "carbon dioxide" does not also say "carbon"
        if choices[letter].strip() and check_contains(rest, choices[letter]):
            named.add(letter)
            rest = re.sub(re.escape(choices[letter].strip()), " ", rest, flags=re.IGNORECASE)
    return named.pop() if len(named) == 1 and not NEGATION.search(rest) else None


def _plain(text: str) -> str:
    return text.strip(" \t.:;,)]}*-").casefold()


def options_of(record: Mapping[str, Any], where: str) -> dict[str, str] | None:
    """A record's `choices` as {letter: text}; None without. A list gets the letters A, B, C..."""
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

    Everything that can go wrong goes wrong here, before long work: raises SdftError for a check that is unknown,
    a pattern that does not compile, an answer that is no number or none of the choices, a function that cannot be
    loaded.
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
    """What follows a thinking model's thoughts; nothing where they do not end."""
    return "" if "<think>" in given and "</think>" not in given else given.rpartition("</think>")[2]


# A user's own function.

UserCheck = Callable[[str, dict[str, Any]], Any]


def load_function(check: str, where: str) -> UserCheck:
    """The function of a check `python:FILE.py:FUNCTION` or `python:MODULE:FUNCTION`; `where` names the record.

    Raises SdftError where there is no such function, with file and line where its file fails. Its parameters must be
    named `given` and `record`, so that no record can have any other function called; and data that are fetched, not
    read from a local file, may name no code at all.
    """
    place, _, name = check.partition(":")[2].rpartition(":")
    if not place or not name:
        raise SdftError(f"{where}: check {check!r} must read python:FILE.py:FUNCTION or python:MODULE:FUNCTION")
    if not Path(re.sub(r"(:\d+|\[\d+\])$", "", where)).exists():
        raise SdftError(f"{where}: check {check!r} names code to run, in data that is not a local file; save it first")
    try:
        module = _load_file(Path(place).resolve()) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise SdftError(f"{where}: check {check!r} cannot be loaded: {_told(error)}") from error
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        raise SdftError(f"{where}: check {check!r}: no function {name!r} in {place}")
    if list(inspect.signature(function).parameters) != ["given", "record"]:
        raise SdftError(f"{where}: {_place(function)}: {name!r} must take two parameters, given and record")
    return function


@functools.cache  # once for all records that name it
def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"sdft_check_{path.stem}", path)
    assert spec is not None, path  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call_function(function: UserCheck, given: str, record: dict[str, Any], where: str) -> bool:
    """What a user's function says of an answer; raises SdftError with file and line where it fails or says no bool."""
    try:
        right = function(given, record)
    except Exception as error:
        raise SdftError(f"{where}: the check failed on the answer {given!r}: {_told(error)}") from error
    if not isinstance(right, bool):
        raise SdftError(f"{where}: {_place(function)}: the check must return True or False, not {right!r}")
    return right


def _place(function: Any) -> str:
    return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"


def _told(error: BaseException) -> str:
    """The error, after the file and line of the user's code where it happened in that."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    theirs = [f for f in frames if f.filename != __file__]
    return f"{theirs[-1].filename}:{theirs[-1].lineno}: {_kind(error)}" if theirs else _kind(error)


def _kind(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
