"""Accuracy by greedy generation, the verdict on the teacher."""

from typing import Any

import pytest

from sdft.data.records import parse_record
from sdft.errors import SdftError
from sdft.evaluation import accuracy
from sdft.evaluation.accuracy import Answer, EvalResult, Uplift, check_evaluable
from sdft.rollout.engine import Completion
from sdft.rollout.sampling import ModelEngine


def test_records_that_cannot_be_evaluated() -> None:
    good = parse_record({"prompt": "p", "answer": "a"}, "f:1")
    check_evaluable([good])
    with pytest.raises(SdftError, match="f:2: an evaluation record needs an 'answer'"):
        check_evaluable([good, parse_record({"prompt": "p"}, "f:2")])
    with pytest.raises(SdftError, match="f:2: check 'about' is unknown; valid: exact, contains, tool_call"):
        check_evaluable([good, parse_record({"prompt": "p", "answer": "a", "check": "about"}, "f:2")])


def test_evaluate_is_greedy_and_compares_each_by_its_check(load_tiny: Any) -> None:
    tokenizer, _ = load_tiny()
    said = {"p1": "Paris!", "p2": "Paris!", "p3": "nothing"}
    examples = [
        parse_record({"prompt": "p1", "answer": ["London", "Paris"]}, "f:1"),
        parse_record({"prompt": "p2", "answer": "Paris", "check": "exact"}, "f:2"),
        parse_record({"prompt": "p3", "answer": "nothing"}, "f:3"),
    ]
    prompts = accuracy.student_prompts(tokenizer, examples, "")

    class Scripted:
        def generate(self, asked: Any, sampling: Any, seed: Any = None) -> list[Completion]:
            assert (sampling.temperature, sampling.max_new_tokens, sampling.batch_size) == (0.0, 9, 2)
            answers = [next(a for q, a in said.items() if q in tokenizer.decode(ids)) for ids in asked]
            return [Completion([*tokenizer(answer)["input_ids"], 257], False) for answer in answers]

        def sync(self, weights: Any = None) -> None: ...

    result = accuracy.evaluate(Scripted(), tokenizer, examples, prompts, 9, 2)
    assert [(a.prompt, a.given, a.correct) for a in result.answers] == [
        ("p1", "Paris!", True), ("p2", "Paris!", False), ("p3", "nothing", True)
    ]  # fmt: skip
    assert result.accuracy == pytest.approx(2 / 3)


def test_evaluate_runs_the_model(load_tiny: Any) -> None:
    tokenizer, model = load_tiny()
    examples = [parse_record({"prompt": p, "answer": "x", "check": "exact"}, "f:1") for p in ("a", "bb")]
    prompts = accuracy.student_prompts(tokenizer, examples, "be brief")
    assert "be brief" in tokenizer.decode(prompts[0])
    engine = ModelEngine(model)
    first = accuracy.evaluate(engine, tokenizer, examples, prompts, 5, 64)
    assert first == accuracy.evaluate(engine, tokenizer, examples, prompts, 5, 1)  # greedy, whatever the batch
    assert first.accuracy == 0


def result(correct: int) -> EvalResult:
    return EvalResult(tuple(Answer("p", ("e",), "g", i < correct) for i in range(100)))


@pytest.mark.parametrize(
    ("student", "teacher", "works", "words"),
    [
        (
            0,
            88,
            True,
            "Yes: the demonstration makes the teacher much better (0% without the demonstration, 88% with it)",
        ),
        (0, 50, True, "Partly: the teacher is better than the student but often wrong"),
        (0, 19, False, "No: the teacher hardly uses the demonstration"),
        (0, 0, False, "Try teacher.context = 'as_turns'"),
        (85, 90, False, "No: the demonstration adds little (85% without the demonstration, 90% with it)"),
        (90, 40, False, "No: the demonstration adds little"),
        (0, 70, True, "Yes"),
        (59, 70, True, "Yes"),
    ],
)
def test_verdict(student: int, teacher: int, works: bool, words: str) -> None:
    uplift = Uplift(result(student), result(teacher))
    assert uplift.uplift == pytest.approx((teacher - student) / 100)
    got, text = uplift.verdict()
    assert got is works
    assert words in text


def test_answers_know_their_length_and_their_end() -> None:
    class Words:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return " ".join(str(i) for i in ids)

    examples = [parse_record({"prompt": p, "answer": "5"}, "f:1") for p in ("a", "b")]
    got = accuracy.judge(Words(), examples, [Completion([4, 5, 257], False), Completion([1, 2], True)])
    assert [(a.correct, a.tokens, a.truncated) for a in got] == [(True, 3, False), (False, 2, True)]
