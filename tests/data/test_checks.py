"""Is an answer right? Each check, the forms that it accepts, and the forms that it must not accept."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdft.data.checks import (
    check_contains,
    check_exact,
    check_number,
    check_regex,
    check_tool_call,
    json_equal,
    parse_tool_calls,
    prepare,
    read_choice,
    spoken,
)
from sdft.data.records import parse_record
from sdft.errors import SdftError
from sdft.evaluation.accuracy import check_evaluable

CALL = 'Action: f\nAction Input: {"a": 1, "b": [2]}'
CHOICES = {"A": "oxygen", "B": "carbon dioxide", "C": "carbon", "D": "none of them"}


def right(answer: str, said: str, check: str, **more: Any) -> bool:
    return prepare(parse_record({"prompt": "p", "answer": answer, "check": check, **more}, "f:1"))(said)


@pytest.mark.parametrize(
    ("check", "said", "expected", "correct"),
    [
        (check_exact, " Paris\n", "Paris", True),
        (check_exact, "paris", "Paris", False),
        (check_exact, "Paris.", "Paris", False),
        (check_contains, "The capital is PARIS.", "Paris", True),
        (check_contains, "Parisian food", "Paris", False),
        (check_contains, "comparis", "Paris", False),
        (check_contains, "It costs $5 (five).", "$5 (five)", True),
        (check_contains, "a.b", "a.b", True),
        (check_contains, "axb", "a.b", False),
        (check_contains, "São Paulo!", "são paulo", True),
        (check_contains, "", "Paris", False),
        (check_regex, "CALL lamp.on(room=attic)", r"^CALL \w+\.on\(", True),
        (check_regex, "call lamp.on(room=attic)", r"^CALL \w+\.on\(", False),
        (check_number, "3 + 4 = 7", "7", True),
        (check_number, "7, from 3 and 4", "7", False),
        (check_number, "It is 1,234.50.", "1234.5", True),
        (check_number, "minus: −5 kg", "-5", True),
        (check_number, "3-5", "-5", False),
        (check_number, "1e3", "1,000", True),
        (check_number, "H2O", "2", False),
        (check_number, "none", "0", False),
    ],
)
def test_texts_and_numbers(check: Any, said: str, expected: str, correct: bool) -> None:
    assert check(said, expected) is correct


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.text(alphabet="ab .,:", max_size=9))
def test_the_last_number_decides(number: Any, text: str) -> None:
    assert check_number(f"1 and 2 {text} {number}", str(number))
    assert not check_number(f"{number} then {number + 1}", str(number))


# Tool calls.


@pytest.mark.parametrize(
    ("said", "correct"),
    [
        ('Action: f\nAction Input: {"b":[2],  "a": 1}', True),
        ('Action: f\nAction Input: {"b": [2.0], "a": 1.0}', True),
        (f"I call:\n{CALL}\n", True),
        (f"```\n{CALL}\n```", True),
        ('Action: f\nAction Input: ```json\n{"a": 1, "b": [2]}\n```', True),
        ('Action: `f`\nAction Input: `{"a": 1, "b": [2]}`', True),
        ('**Action:** f\n**Action Input:** {"a": 1, "b": [2]}', True),
        ('Action: f\nAction Input:\n{"a": 1,\n "b": [2]}\n\nDone.', True),
        (f"Thought: now. {CALL}\nObservation: " + '{"x": 3}', True),
        ('Action: f\nAction Input: {"a": 2, "b": [2]}', False),
        ('Action: f\nAction Input: {"a": true, "b": [2]}', False),
        ('Action: f\nAction Input: {"a": "1", "b": [2]}', False),
        ('Action: f\nAction Input: {"a": 2, "a": 1, "b": [2]}', False),
        ('Action: f\nAction Input: {"a": 1, "b": [2], "c": null}', False),
        (CALL + ' or {"a": 3}', False),
        (CALL + '\nAction Input: {"a": 3}', False),
        ('Action: g\nAction Input: {"a": 1, "b": [2]}', False),
        ('Action: F\nAction Input: {"a": 1, "b": [2]}', False),
        (f"{CALL}\n{CALL}", False),
        (f"{CALL}\nAction: g", False),
        (f"{CALL}\naction : g\naction input: {{}}", False),
        ("Action: f\nAction Input: {", False),
        ("Action: f", False),
        ('{"a": 1, "b": [2]}', False),
        ("", False),
    ],
)
def test_tool_calls(said: str, correct: bool) -> None:
    assert check_tool_call(said, CALL) is correct


def test_several_tool_calls_and_those_that_are_no_json() -> None:
    other = 'Action: g\nAction Input: {"say": "Action: f\\nAction Input: {}"}'
    assert parse_tool_calls(f"{CALL}\n{other}") == [
        ("f", {"a": 1, "b": [2]}),
        ("g", {"say": "Action: f\nAction Input: {}"}),
    ]
    assert check_tool_call(f"{CALL}\n{other}", f"{CALL}\n\n{other}")
    assert not check_tool_call(f"{other}\n{CALL}", f"{CALL}\n{other}")
    placeholder = 'Action: f\nAction Input: {"id": ${id from g}}'
    assert check_tool_call(placeholder.replace(": $", ":  $"), placeholder)
    assert not check_tool_call(placeholder.replace("from", "of"), placeholder)
    assert not check_tool_call("no call", "no call")
    assert not check_tool_call("Action: f\nAction Input: [NaN]", "Action: f\nAction Input: [1]")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_equal_as_json(a: Any, b: Any) -> None:
    """The truth is the text: one with sorted keys, numbers as floats."""

    def canonical(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ",".join(sorted(json.dumps(k) + ":" + canonical(v) for k, v in value.items())) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(canonical, value)) + "]"
        plain = isinstance(value, bool | str) or value is None
        return json.dumps(value) if plain else str(float(value) + 0.0)

    assert json_equal(a, a)
    assert json_equal(a, b) == (canonical(a) == canonical(b))


@given(st.dictionaries(st.text(), JSON, min_size=1), st.sampled_from(["{}", "```json\n{}\n```", "{}\n\nThat is all."]))
def test_arguments_survive_their_wrapping(arguments: dict[str, Any], around: str) -> None:
    call = "Action: f\nAction Input: "
    turned = json.dumps(dict(reversed(arguments.items())), indent=1)
    assert check_tool_call(call + around.replace("{}", turned), call + json.dumps(arguments))
    more = json.dumps(arguments | {"more": arguments}, ensure_ascii=False)
    assert not check_tool_call(call + around.replace("{}", more), call + json.dumps(arguments | {"more": 0}))


# Multiple choice.


@pytest.mark.parametrize(
    "said",
    [
        "B", " (B)\n", "[B]", "b", "b.", "**B**", "B.", "B. carbon dioxide", "B) carbon dioxide", "B: carbon dioxide",
        "B - carbon dioxide", "B is correct", "B because plants breathe it", "B\n\nA plant absorbs it.",
        "The answer is B", "The answer is (B).", "The answer is **B**.", "**Answer:** B", "Answer:\nB",
        "### Answer\n\nB",
        "The answer is B, not A", "The correct answer is: B. carbon dioxide", "The answer is the letter B",
        "The best answer is option B.", "The correct option is B because A is wrong", "$\\boxed{B}$",
        "so \\boxed{\\text{B}}", "<answer>B</answer>", "<answer> (B) carbon dioxide </answer>", "I think it is (B)",
        "A. oxygen: no\nB. carbon dioxide: yes\nThe answer is B.", "It must be option B", "carbon dioxide",
        "Plants absorb carbon dioxide.", "The answer is carbon dioxide", "<think>A? C? The answer is A.</think>B",
    ],
)  # fmt: skip
def test_choices_taken(said: str) -> None:
    assert read_choice(spoken(said), CHOICES) == "B"
    assert right("B", said, "choice", choices=CHOICES)
    assert not right("C", said, "choice", choices=CHOICES)


@pytest.mark.parametrize(
    "said",
    [
        "", "E", "BC", "B or C", "A, B", "A/B", "(A)(B)", "(A) and (B)", "A or B is the answer", "Both A and B",
        "The answer is B or C", "The answer is A. No, the answer is B", "<answer>B</answer> <answer>C</answer>",
        "B is wrong", "A is wrong, B too", "(B) is not it", "option B is incorrect", "The answer is B cells",
        "A. oxygen\nB. carbon dioxide", "A good one", "The answer is a dog", "B cells", "B. oxygen", "I know",
        "The answer is not B", "not carbon dioxide", "It isn't carbon dioxide", "carbon dioxide or oxygen", "<think>B",
    ],
)  # fmt: skip
def test_choices_not_taken(said: str) -> None:
    assert read_choice(spoken(said), CHOICES) is None
    assert not any(right(letter, said, "choice", choices=CHOICES) for letter in CHOICES)


@given(st.text(alphabet="AB(). \n*answeris<>/orot:", max_size=60))
def test_any_text_gives_one_letter_or_none(said: str) -> None:
    assert read_choice(said, CHOICES) in {*CHOICES, None}


FORMS = ("{}", "({})", "{}.", "The answer is {}", "Answer: ({})", "<answer>{}</answer>", "\\boxed{{{}}}", "option {}")


@given(st.sampled_from("ABCD"), st.sampled_from("ABCD"), st.sampled_from(FORMS), st.sampled_from(FORMS[:3]))
def test_two_letters_are_no_answer(one: str, other: str, form: str, inner: str) -> None:
    joined = f"{form.format(inner.format(one))}\n{form.format(inner.format(other))}"
    assert read_choice(form.format(inner.format(one)), CHOICES) == one
    assert read_choice(joined, CHOICES) == (one if one == other else None)


def test_choices_by_list_and_without() -> None:
    assert right("2", "The answer is 2", "choice", choices={"1": "x", "2": "y"})
    assert right("B", "y", "choice", choices=["x", "y"])
    assert right("b", "(B)", "choice")
    assert not right("B", "(C)", "choice")
    assert read_choice("carbon", CHOICES) == "C"


# From a record to its check.


def test_all_or_any_of_the_answers() -> None:
    facts = ["Lumar", "1912"]
    assert right(facts, "In 1912, at Lumar.", "contains_all")  # type: ignore[arg-type]
    assert not right(facts, "At Lumar.", "contains_all")  # type: ignore[arg-type]
    assert right(facts, "At Lumar.", "contains")  # type: ignore[arg-type]
    assert not right("Lumar", "<think>Lumar?</think> Ostek", "contains")
    assert not right("Lumar", "<think>Lumar", "contains")


@pytest.mark.parametrize(
    ("check", "answer", "more", "words"),
    [
        ("about", "a", {}, "f:1: check 'about' is unknown; valid: exact, contains, tool_call, contains_all, choice"),
        ("regex", "(a", {}, r"f:1: answer '\(a' is not a regular expression \(missing \), unterminated subpattern"),
        ("number", "seven", {}, "f:1: answer 'seven' must be a number"),
        ("choice", "Paris", {}, "f:1: answer 'Paris' must be the letter of a choice"),
        ("choice", "C", {"choices": ["x", "y"]}, "f:1: answer 'C' is none of the choices A, B"),
        ("choice", "A", {"choices": ["x"]}, "f:1: 'choices' needs two options or more"),
        ("choice", "A", {"choices": {"a": "x", "b": "y"}}, "f:1: 'choices' needs .* one capital letter or digit"),
        ("choice", "A", {"choices": [1, 2]}, "f:1: 'choices' must be a list of texts"),
        ("choice", "A", {"choices": "xy"}, "f:1: 'choices' must be a list of texts"),
        ("python:f", "a", {}, "f:1: check 'python:f' must read python:FILE.py:FUNCTION"),
        ("python::f", "a", {}, "f:1: check 'python::f' must read python:FILE.py:FUNCTION"),
        ("python:json:loads", "a", {}, "names code to run, in data that is not a local file"),
    ],
)
def test_records_whose_check_cannot_work(check: str, answer: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(SdftError, match=words):
        right(answer, "", check, **more)


# A user's own function.

OWN = """
def even(given, record):
    return given == record["want"]

def says(given, record):
    return given

def fails(given, record):
    return int(given) > 0

def other(text):
    return True
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """own(check, **fields) is an example in a local file, in a folder with OWN as mine.py."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    Path("data.jsonl").touch()
    return lambda check, **more: parse_record({"prompt": "p", "check": check} | more, "data.jsonl:7")


def test_a_function_sees_the_answer_and_the_whole_record(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    example = own("python:mine.py:even", want="x")
    check_evaluable([example])  # needs no answer
    assert prepare(example)("x")
    assert not prepare(example)("y")
    monkeypatch.syspath_prepend(".")
    assert prepare(own("python:mine:even", want="x"))("x")


@pytest.mark.parametrize(
    ("check", "words"),
    [
        ("python:none.py:even", r"data\.jsonl:7: check 'python:none\.py:even' cannot be loaded: FileNotFoundError"),
        ("python:no_such_module:even", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
        ("python:mine.py:odd", "no function 'odd' in mine.py"),
        ("python:mine.py:other", r"mine\.py:11: 'other' must take two parameters, given and record"),
        ("python:textwrap:dedent", r"textwrap\.py:\d+: 'dedent' must take two parameters, given and record"),
        ("python:mine.py:says", r"data\.jsonl:7: .*mine\.py:5: the check must return True or False, not ''"),
        (
            "python:mine.py:fails",
            r"data\.jsonl:7: the check failed on the answer '': .*mine\.py:9: ValueError",
        ),
        ("python:broken.py:f", r"cannot be loaded: .*broken\.py:2: SyntaxError"),
        ("python:raises.py:f", r"cannot be loaded: .*raises\.py:3: ZeroDivisionError"),
        ("python:exits.py:f", r"cannot be loaded: .*exits\.py:1: SystemExit: 3"),
    ],
)
def test_functions_that_do_not_work_are_named_before_any_generation(own: Any, check: str, words: str) -> None:
    Path("broken.py").write_text("\ndef f(:\n")
    Path("raises.py").write_text("def g():\n    pass\n1 / 0\n")
    Path("exits.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(SdftError, match=words):
        check_evaluable([own(check)])


def test_a_file_is_run_once_for_all_records(own: Any) -> None:
    Path("counts.py").write_text(
        "open('runs', 'a').write('x')\ndef f(given, record):\n    open('calls', 'a').write('x')\n    return False\n"
    )
    check_evaluable([own("python:counts.py:f")] * 5)
    assert (Path("runs").read_text(), Path("calls").read_text()) == ("x", "x")
