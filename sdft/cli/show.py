"""Results as text and tables on the screen."""

from rich.console import Console
from rich.table import Table

from sdft.api import CheckResult, Evaluation, PlanResult
from sdft.evaluation.harness import Score
from sdft.planning.picture import picture


def plan(found: PlanResult) -> None:
    """Bars and table of the memory, the assumptions, the verdict, and what to change."""
    console = Console()
    for part in picture(found.plan):
        console.print(part)
    for line in found.plan.notes:
        print(f"Assumed: {line}.")
    print(found.verdict)
    for line in found.advice:
        print(f"- {line}")


def check(found: CheckResult, context: str, rows: int) -> None:
    """The first answers of student and teacher, side by side, and the verdict."""
    table = Table("request", "expected", "student", "teacher", title=f"Greedy answers ({context})")
    for student, teacher in list(zip(found.student.answers, found.teacher.answers, strict=True))[:rows]:
        texts = (student.prompt, "".join(student.expected[:1]), student.given, teacher.given)
        table.add_row(*map(shorten, texts))
    Console().print(table, markup=False)
    print(f"Can SDFT work here? {found.verdict}")


def evaluation(found: Evaluation, rows: int, temperature: float) -> None:
    """The first answers, the accuracy, and pass@k if there are samples."""
    answers = found.greedy.answers
    for answer in answers[:rows]:
        print(f"[{'ok' if answer.correct else '--'}] {shorten(answer.prompt)}\n     {shorten(answer.given)}")
    right = sum(answer.correct for answer in answers)
    print(f"accuracy {found.accuracy:.1%} ({right} of {len(answers)})")
    if found.samples:
        passed = "  ".join(f"pass@{k} {found.samples.pass_at(k):.1%}" for k in found.samples.powers())
        print(f"of {found.samples.n} samples at temperature {temperature:g}: {passed}")


def scores(found: dict[str, dict[str, Score]]) -> None:
    """One line for each metric of each task."""
    for task, metrics in found.items():
        for metric, score in metrics.items():
            error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
            print(f"{task}  {metric}  {score.value:.4f}{error}")


def shorten(text: str, width: int = 300) -> str:
    """The text on one line, cut to `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
