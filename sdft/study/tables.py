"""The sections of a report that are tables."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from operator import itemgetter
from statistics import mean
from typing import Any

from sdft.study import measures
from sdft.study.found import Found, Row, answers_in, stage_metrics
from sdft.study.render import Block, Heading, Table, Text
from sdft.study.spec import Cell, stage_folder

SAMPLES = 3  # records of each evaluation set whose completions are shown
LONGEST = 240  # characters of a completion that are shown
KEY = ["method", "learning rate", "seeds"]


# Numbers as text.


def percent(value: float, sign: str = "") -> str:
    """A fraction in percent; sign "+" writes the sign of a positive number."""
    if math.isnan(value):
        return "–"
    points = round(100 * value, 1) + 0.0  # no -0.0
    return f"{points:{sign}.1f}" if points else "0.0"


def percents(found: measures.Interval, sign: str = "") -> str:
    """A mean with its interval, in percent."""
    if found.n == 1:
        return percent(found.mean, sign)
    return f"{percent(found.mean, sign)} ({percent(found.low, sign)} to {percent(found.high, sign)})"


def over_seeds(values: Sequence[float], sign: str = "") -> str:
    """The mean of one fraction per seed with its interval, in percent."""
    return "–" if any(math.isnan(v) for v in values) else percents(measures.interval(values), sign)


# Sections.


def accuracies(f: Found) -> Iterator[Block]:
    """Accuracies after the last stage, and pass@k if it was measured."""
    others = [name for name in f.study.sets if name not in f.columns]
    yield _accuracy_table(f, f.columns)
    if others:
        yield Text("The tasks' other evaluation sets:")
        yield _accuracy_table(f, others)
    if f.study.samples:
        for name in f.study.accuracy_sets:
            yield from _pass_at(f, name)


def _accuracy_table(f: Found, columns: Sequence[str]) -> Table:
    rows = [["base", "", "", *(percent(f.base[c]) for c in columns)]]
    for row in f.complete_rows:
        rows.append([*row.key, *(over_seeds(row.last(itemgetter(c))) for c in columns)])
    return Table([*KEY, *columns], rows)


def _pass_at(f: Found, name: str) -> Iterator[Block]:
    """pass@k on a task's accuracy set after the last stage."""
    # A stage has none if `samples` was added to the study later.
    by_row = [[stages[-1].get("pass_at", {}).get(name, {}) for stages in row.complete.values()] for row in f.rows]
    ks = sorted({k for found in by_row for one in found for k in one}, key=int)
    if not ks:
        return
    rows = []
    if name in f.base_pass:
        rows.append(["base", "", "", *(percent(f.base_pass[name].get(k, math.nan)) for k in ks)])
    for row, found in zip(f.rows, by_row, strict=True):
        whole = [one for one in found if one.keys() == set(ks)]
        if whole:
            rows.append([*row.key[:2], str(len(whole)), *(over_seeds([one[k] for one in whole]) for k in ks)])
    yield Text(
        f"The chance that one of k sampled completions is right, from {ks[-1]} samples of each prompt of {name}:"
    )
    yield Table([*KEY, *(f"pass@{k}" for k in ks)], rows)


def transfer(f: Found) -> Iterator[Block]:
    """What was learned and forgotten over the stages."""
    rows = []
    for row in f.complete_rows:
        moved = [measures.transfer(f.matrix(stages)) for stages in row.complete.values()]
        kept = [prior - f.prior(f.base) for prior in row.last(f.prior)]
        rows.append(
            [
                *row.key,
                over_seeds([m.average for m in moved]),
                over_seeds([m.forgetting for m in moved]),
                over_seeds([m.backward for m in moved], "+"),
                over_seeds([m.forward for m in moved], "+"),
                over_seeds(kept, "+"),
            ]
        )
    head = ["average accuracy", "forgetting", "backward transfer", "forward transfer", "prior skills against the base"]
    yield Table([*KEY, *head], rows)
    yield Text(
        "Average accuracy: over the tasks, after the last stage. Forgetting: the fall from a task's best accuracy. "
        "Backward transfer: the change since a task's own stage. Forward transfer: what earlier stages added to a task "
        "before its own stage. The last column is the change of the mean over the prior skills. The first column is in "
        "percent, the others are in percentage points."
        + (" A study of one task has no transfer." if len(f.study.tasks) == 1 else "")
    )


def best_rates(f: Found) -> Iterator[Block]:
    """Each method at its best learning rate."""
    what = "the tasks' accuracy"
    if f.study.prior_skills:
        what = "two numbers, the tasks' mean accuracy and the prior skills' mean accuracy"
    yield Text(
        f"The best learning rate of a method has the highest mean of {what}, over its finished seeds. Only the rates "
        "with the most finished seeds are compared; of equal rates the lowest is taken. The rate is chosen on the same "
        "records that the table is about, so every method looks a little better here than on new records."
    )
    measured = (f.new, f.prior, f.score)
    base = ["base", "", "", *(percent(value(f.base)) for value in measured)]
    rows = [[*row.key, *(over_seeds(row.last(value)) for value in measured)] for row in f.best.values()]
    yield Table([*KEY, "tasks", "prior skills", "mean of both"], [base, *rows])


def differences(f: Found) -> Iterator[Block]:
    """Each pair of methods at their best learning rates, over the seeds that both have finished."""
    rows, most = [], 0
    for (first, a), (second, b) in combinations(f.best.items(), 2):
        common = [seed for seed in a.complete if seed in b.complete]
        if not common:
            rows.append([f"{first} minus {second}", "–", "no seed in common", "–", "–"])
            continue
        most = max(most, len(common))
        rows += [[f"{first} minus {second}", *cells] for cells in _paired(f, a, b, common)]
    if rows:
        yield Heading("Differences, seed by seed", 3)
        yield Table(["difference", "of", "seeds", "percentage points", "p"], rows, words=2)
        if most:
            yield Text(what_seeds_show(most))


def _paired(f: Found, a: Row, b: Row, seeds: Sequence[int]) -> Iterator[list[str]]:
    wanted = {"tasks": f.new, "prior skills": f.prior, "mean of both": f.score}
    for what, value in wanted.items() if f.study.prior_skills else [("tasks", f.new)]:
        first, second = ([value(row.complete[seed][-1]["accuracy"]) for seed in seeds] for row in (a, b))
        pair = measures.paired(first, second)
        yield [what, str(len(seeds)), percents(pair.difference, "+"), f"{pair.p:.3g}"]


def what_seeds_show(n: int) -> str:
    """What n seeds can show and what they cannot, in words."""
    text = (
        "p belongs to the two-sided sign-flip test: if the methods were alike, chance would give a difference as large "
        "as this one with probability p. "
    )
    if n == 1:
        return text + "One seed shows nothing about chance: p is 1, and there is no interval. Run more seeds."
    least = 2 / 2**n
    text += f"With {n} seeds, p is never below {least:.3g}"
    if least > 0.05:
        text += (
            f". So {n} seeds cannot show a difference at the 5% level, however large it is; six seeds can. At "
            f"{least:.3g}, the difference has the same sign for all seeds. "
        )
    else:
        text += ". "
    if n == 3:
        text += (
            "The interval of three values is their range: it holds the median of all seeds in 75% of cases, not in 95%."
        )
    else:
        text += "The intervals of few seeds are too narrow: of five normal values they hold the mean in 83% of cases."
    return text + " Nothing is corrected for the number of comparisons."


def distances(f: Found) -> Iterator[Block]:
    """The distance from the base after the last stage."""
    kinds = {"new": "prompts of the last task"}
    kinds["prior"] = "prompts that no task trains" if f.study.drift_on else "prompts of prior skills"
    keys = ("kl_to_base", "kl_from_base", "entropy", "base_entropy", "answer_tokens")
    rows = []
    for name, row in f.best.items():
        for kind, words in kinds.items():
            last = [stages[-1].get("drift", {}) for stages in row.complete.values()]
            found = [drift[kind] for drift in last if kind in drift]
            if found:
                rows.append([name, words, str(len(found)), *(f"{mean(one[k] for one in found):.3g}" for k in keys)])
    if not rows:
        yield Text("Not measured.")
        return
    head = ["KL(model, base)", "KL(base, model)", "entropy", "base's entropy", "tokens of a completion"]
    yield Table(["method", "completions of", "seeds", *head], rows, words=2)
    yield Text(
        "After the last stage, each method at its best learning rate, means over the seeds. The model's own greedy "
        "completions are scored by both models; divergences and entropies are in nats per token, over the whole "
        "vocabulary."
    )


def costs(f: Found) -> Iterator[Block]:
    """Tokens, operations and seconds of a seed."""
    rows = []
    for row in f.complete_rows:
        spent = [_cost(f, cell, row.complete[cell.seed]) for cell in row.complete_cells]
        means = [mean(values) for values in zip(*spent, strict=True)]
        rows.append([*row.key, *("–" if math.isnan(value) else f"{value:,.0f}" for value in means)])
    head = ["completion tokens", "TFLOP", "seconds in steps", "seconds of training", "seconds of evaluating"]
    yield Table([*KEY, *head], rows)
    yield Text(
        "One seed through all stages, mean over the seeds. Completion tokens: of rollouts, or of the demonstrations "
        "that were trained on. TFLOP: 1e12 operations of the training (docs/measures.md). Training includes loading, "
        "evaluations during the run, and saving. If a stage was interrupted, its seconds of training count from the "
        "last start, and its seconds in steps count all steps."
    )


def _cost(f: Found, cell: Cell, stages: Sequence[dict[str, Any]]) -> list[float]:
    lines = [line for n in range(len(stages)) for run in stage_metrics(f.study, cell, n) for line in run]
    return [
        sum(stage["tokens"] for stage in stages),
        sum(stage.get("flops", math.nan) for stage in stages) / 1e12,
        sum(sum(line.get("seconds", {}).values()) for line in lines) if lines else math.nan,
        *(sum(stage["seconds"][key] for stage in stages) for key in ("train", "evaluate")),
    ]


def completions(f: Found) -> Iterator[Block]:
    """Completions of the base and of each method, side by side."""
    s, seen, rows = f.study, {}, []
    for name, row in f.best.items():
        seed, last = min(row.complete, key=s.seeds.index), len(s.tasks) - 1
        seen[name] = stage_folder(s, Cell(row.method, row.rate, seed), last) / "answers"
    for column in f.columns:
        answers = [answers_in(folder, column) for folder in (s.output / "base/answers", *seen.values())]
        same = zip(*answers, strict=False)  # nothing is shown if a file is missing
        for record in sorted(same, key=_disagreement, reverse=True)[:SAMPLES]:  # equals stay in the file's order
            expected = " / ".join(record[0]["expected"])
            given = [("✓ " if a["correct"] else "✗ ") + _short(a["given"]) for a in record]
            rows.append([column, _short(record[0]["prompt"]), _short(expected), *given])
    if not rows:
        yield Text("The completions are not there.")
        return
    yield Text(
        "After the last stage, each method at its best learning rate and with the first of its finished seeds. For "
        f"every set, the {SAMPLES} records on which the base and the methods disagree most (right completions times "
        "wrong ones), the first of equals: this is not a fair sample. ✓ right, ✗ wrong; a text is cut after "
        f"{LONGEST} characters (…)."
    )
    yield Table(["set", "prompt", "expected", "base", *seen], rows, words=4 + len(seen))


def _disagreement(answers: Sequence[dict[str, Any]]) -> int:
    right = sum(a["correct"] for a in answers)
    return right * (len(answers) - right)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST].rstrip() + "…"
