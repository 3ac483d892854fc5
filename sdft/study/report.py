"""The report of a study: report.md with its pictures, and report.html in one file.

Everything is read from the files in OUTPUT; no model is loaded and nothing is run. The same files give the same bytes.
"""

from collections.abc import Iterator
from pathlib import Path

from sdft import files
from sdft.config import describe
from sdft.errors import SdftError
from sdft.study import figures, results, tables
from sdft.study.found import Found, answers_in, collect
from sdft.study.render import Block, Heading, Items, Picture, Table, Text, to_html, to_markdown
from sdft.study.spec import Cell, Study, cells, stage_configs


def write_report(s: Study) -> Path:
    """Writes OUTPUT/report.html, OUTPUT/report.md and OUTPUT/report/*.png; returns the path of report.md.

    If the study is not finished, the report shows what is finished and names what is missing. Each file is written
    whole or not at all. Raises SdftError if no stage is finished, or if OUTPUT holds results of other settings.
    """
    found = collect(s)
    if not any(row.cells for row in found.rows):
        raise SdftError(f"{s.output}: no stage is finished yet, so there is nothing to report; run `sdft study` first")
    blocks = document(found)
    for block in blocks:
        if isinstance(block, Picture):
            files.write_bytes(s.output / "report" / f"{block.name}.png", block.png)
    files.write_text(s.output / "report.html", to_html(blocks))
    files.write_text(s.output / "report.md", to_markdown(blocks))
    return s.output / "report.md"


def document(f: Found) -> list[Block]:
    """The whole report."""
    blocks = [*_introduction(f), Heading("New skills against prior skills"), *figures.pareto(f)]
    if not f.best:
        return [*blocks, Text("No cell has finished its last task yet: the tables follow when one has.")]
    sections = {
        "Accuracy after the last stage": [tables.accuracies],
        "Learning and forgetting": [tables.transfer],
        "Each method at its best learning rate": [tables.best_rates, tables.differences],
        "How far from the base": [tables.distances],
        "Stage by stage": [figures.stages],
        "How it trained": [figures.training],
        "Completions side by side": [tables.completions],
        "Cost": [tables.costs],
    }
    for title, parts in sections.items():
        blocks.append(Heading(title))
        for part in parts:
            blocks += part(f)
    return blocks


def _introduction(f: Found) -> Iterator[Block]:
    s = f.study
    yield Heading(f"Study: {s.output.name}", 1)
    yield Text(
        f"Model {s.config.model.name}; tasks in the order learned: {', '.join(t.name for t in s.tasks)}; "
        f"seeds {', '.join(map(str, s.seeds))}. Accuracies are in percent. Completions are greedy; each record's check "
        "decides whether a completion is right. After a mean, its 95% bootstrap interval over the seeds stands in "
        "brackets. docs/measures.md has every formula with its source."
    )
    yield Heading("Methods", 3)
    yield Items(list(_methods(s)))
    yield Heading("What was measured", 3)
    yield _sets(f)
    yield from _missing(f)


def _methods(s: Study) -> Iterator[str]:
    for method in s.methods:
        configs = stage_configs(s, Cell(method, method.learning_rates[0], s.seeds[0]), 0, s.config.model.name)
        yield f"{method.name}: " + " Then ".join(describe(c) for c in configs)


def _sets(f: Found) -> Table:
    role = {f.study.accuracy_set(t): f"accuracy of task {t.name}" for t in f.study.tasks}
    role |= {name: "prior skill" for name in f.study.prior_skills}
    rows = []
    for name in f.study.sets:
        count = len(answers_in(f.study.output / "base/answers", name))
        rows.append([name, role.get(name, "further set of a task"), str(count or "–"), tables.percent(f.base[name])])
    return Table(["set", "what", "records", "base"], rows, words=2)


def _missing(f: Found) -> Iterator[Block]:
    s, stages = f.study, {cell.name: len(st) for row in f.rows for cell, st in row.cells}
    wanted = cells(s)
    lacking = [c.name for c in wanted if stages.get(c.name, 0) < len(s.tasks)]
    if lacking:
        yield Heading("What is missing", 3)
        yield Text(
            f"{len(wanted) - len(lacking)} of {len(wanted)} cells are finished. Tables and pictures show finished "
            "cells only, except the Pareto picture of a stage: it shows every cell that has finished this stage. Run "
            "`sdft study` again to finish the others. Missing:"
        )
        ends = {cell.name: f"; {why}" for cell in wanted if (why := results.failure(s, cell))}
        yield Items([f"{name}: {stages.get(name, 0)} of {len(s.tasks)} stages{ends.get(name, '')}" for name in lacking])
