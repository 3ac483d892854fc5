"""Accuracy by greedy generation, and the teacher uplift of `sdft check`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdft.config import RolloutConfig
from sdft.data import checks
from sdft.data.prompts import encode_chat, student_messages
from sdft.data.records import Example
from sdft.errors import SdftError
from sdft.rollout.engine import Completion, Engine


@dataclass(frozen=True)
class Answer:
    """A completion, judged."""

    prompt: str  # the last message of the user
    expected: tuple[str, ...]  # what the record accepts
    given: str  # the completion as text
    correct: bool
    tokens: int = 0  # of the completion, with the token that ends it
    truncated: bool = False  # max_new_tokens cut it off


@dataclass(frozen=True)
class EvalResult:
    answers: tuple[Answer, ...]

    @property
    def accuracy(self) -> float:
        """Fraction of correct answers."""
        return sum(a.correct for a in self.answers) / len(self.answers)


def check_evaluable(examples: Sequence[Example]) -> None:
    """Raises SdftError if an example has no answer, or a check that does not work. Call it before long work.

    Each function of a user that the examples name is called once, with an empty answer.
    """
    tried = set()
    for example in examples:
        own = example.check.startswith("python:")
        if not example.answers and not own:
            raise SdftError(f"{example.source}: an evaluation record needs an 'answer' (or a 'demonstration')")
        right = checks.prepare(example)
        if own and example.check not in tried:
            right("")
            tried.add(example.check)


def evaluate(
    engine: Engine,
    tokenizer: Any,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
) -> EvalResult:
    """Greedy completions of `prompts` (token ids, one for each example), each judged by its example's check.

    max_new_tokens: longest completion. batch_size: prompts that are completed together.
    """
    greedy = RolloutConfig(temperature=0.0, max_new_tokens=max_new_tokens, batch_size=batch_size)
    completions = engine.generate(prompts, greedy)
    return EvalResult(tuple(judge(tokenizer, examples, completions)))


def judge(tokenizer: Any, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Answer]:
    """The completions (one for each example) as text, each judged by its example's check."""
    answers = []
    for example, completion in zip(examples, completions, strict=True):
        given = tokenizer.decode(completion.ids, skip_special_tokens=True)
        correct = checks.prepare(example)(given)
        answers.append(
            Answer(
                example.messages[-1]["content"],
                example.answers,
                given,
                correct,
                len(completion.ids),
                completion.truncated,
            )
        )
    return answers


def student_prompts(tokenizer: Any, examples: Sequence[Example], system: str) -> list[list[int]]:
    """Token ids of the examples' prompts, without demonstrations."""
    return [encode_chat(tokenizer, student_messages(e, system), e.source) for e in examples]


@dataclass(frozen=True)
class Uplift:
    """The same prompts, completed without the demonstration (student) and with it (teacher)."""

    student: EvalResult
    teacher: EvalResult

    @property
    def uplift(self) -> float:
        """Teacher accuracy minus student accuracy."""
        return self.teacher.accuracy - self.student.accuracy

    def verdict(self) -> tuple[bool, str]:
        """Whether SDFT can work here, and why, in words."""
        student, teacher = self.student.accuracy, self.teacher.accuracy
        figures = f"{student:.0%} without the demonstration, {teacher:.0%} with it"
        if teacher < 0.2:
            return False, (
                f"No: the teacher hardly uses the demonstration ({figures}); it has nothing to teach. Try "
                "teacher.context = 'as_turns' with two turns or more, a larger model, or SFT."
            )
        if self.uplift < 0.1:
            return False, (
                f"No: the demonstration adds little ({figures}); the student knows this already, or the context "
                "does not bring the demonstration across."
            )
        if teacher < 0.7:
            return True, (
                f"Partly: the teacher is better than the student but often wrong ({figures}); the student will "
                "not pass it. More turns or a larger model would help."
            )
        return True, f"Yes: the demonstration makes the teacher much better ({figures})."
