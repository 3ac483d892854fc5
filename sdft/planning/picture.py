"""A plan in words, and as a picture on a terminal."""

import json
from typing import Any

from sdft.planning.machine import GIB, MIB
from sdft.planning.plan import TERMS, Plan

COLOURS = dict(
    zip(
        TERMS,
        (
            "blue", "cyan", "magenta", "red", "yellow", "green", "bright_blue", "bright_red", "white", "bright_black",
        ),
        strict=True,
    )
)  # fmt: skip


def setting(key: str, value: Any) -> str:
    """`key = value` as TOML writes it."""
    return f"{key} = {json.dumps(value)}"


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def picture(plan: Plan, width: int = 60) -> list[Any]:
    """For rich to print: a bar for each phase, cut by terms, `|` at the device's memory; and the table of numbers."""
    from rich.table import Table
    from rich.text import Text

    # A device far larger than the run would leave nothing of the bars.
    full = max(plan.peak, min(plan.memory, 2 * plan.peak))
    bars = Table.grid(padding=(0, 1))
    for phase, terms in plan.phases.items():
        bar, drawn, at = Text(), 0, 0
        for term in TERMS:
            at += terms[term]
            cells = round(at / full * width) - drawn
            bar.append("█" * cells, COLOURS[term])
            drawn += cells
        mark = round(plan.memory / full * width)
        if drawn <= mark <= width:
            bar.append(" " * (mark - drawn) + "|")
        over = plan.total(phase) > plan.memory
        bars.add_row(phase, bar, Text(size(plan.total(phase)), "bold red" if over else ""))
    numbers = Table("MiB", *plan.phases, title="who takes what")
    for term in TERMS:
        row = [terms[term] for terms in plan.phases.values()]
        if any(row):
            numbers.add_row(Text(f"█ {term}", COLOURS[term]), *(f"{n / MIB:,.0f}" if n else "" for n in row))
    numbers.add_row("total", *(f"{plan.total(phase) / MIB:,.0f}" for phase in plan.phases))
    for column in numbers.columns[1:]:
        column.justify = "right"
    return [bars, numbers]


def verdict(plan: Plan) -> str:
    """Whether it fits, and the largest token budget that does."""
    fits = f"The peak is {size(plan.peak)} of {size(plan.memory)}: it {'fits' if plan.fits else 'does not fit'}."
    if plan.budget is None:
        return f"{fits} Not even the longest sequence alone fits."
    if plan.budget == 0:
        return f"{fits} A whole step fits at once (train.micro_batch_tokens = 0, {plan.step_tokens} tokens)."
    return f"{fits} The largest train.micro_batch_tokens that fits is {plan.budget}, of {plan.step_tokens} in a step."
