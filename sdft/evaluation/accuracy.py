"""Task accuracy by greedy generation, and the teacher-uplift check. Knows nothing of training."""

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
    prompt: str  # the request, as text
    expected: tuple[str, ...]
    given: str
    correct: bool
    tokens: int = 0  # of the answer, its end included
    truncated: bool = False  # it has no end: max_new_tokens came first


@dataclass(frozen=True)
class EvalResult:
    answers: tuple[Answer, ...]

    @property
    def accuracy(self) -> float:
        """Fraction of correct answers."""
        return sum(a.correct for a in self.answers) / len(self.answers)


def check_evaluable(examples: Sequence[Example], path: str) -> None:
    """Raises SdftError for an example without an answer or whose check does not work, before any generation.

    A user's function is called with an empty answer, once for each that the examples name.
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
    """Greedy answers to `prompts` (token ids, one for each example), each compared by its example's check."""
    greedy = RolloutConfig(temperature=0.0, max_new_tokens=max_new_tokens, batch_size=batch_size)
    completions = engine.generate(prompts, greedy)
    return EvalResult(tuple(judge(tokenizer, examples, completions)))


def judge(tokenizer: Any, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Answer]:
    """Completions, one for each example, as text and compared by the example's check."""
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
    """Token ids of the examples' requests, without demonstration."""
    return [encode_chat(tokenizer, student_messages(e, system), e.source) for e in examples]


@dataclass(frozen=True)
class Uplift:
    """What `sdft check` found: the same requests answered without and with the demonstration."""

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
