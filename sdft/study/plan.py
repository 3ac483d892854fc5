"""What a study will take: peak memory and operations of every run, before any weight is loaded."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sdft.config import Config, override
from sdft.data.dataset import TokenizedExample
from sdft.model import flops
from sdft.planning import work as planning
from sdft.planning.machine import Machine
from sdft.planning.picture import size
from sdft.planning.plan import peak
from sdft.study.spec import BASE, Study, cells, stage_configs

# Settings in which two runs may differ and still take the same memory and operations.
SAME = {"model.name": BASE, "optim.lr": 1.0, "train.seed": 0, "train.output": "", "teacher.ema_alpha": 1.0}


@dataclass(frozen=True)
class Planned:
    """What one run takes, and how many runs of the study take the same."""

    name: str  # method, task, and the settings that matter here
    runs: int
    steps: int
    peak: int  # bytes
    flops: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of the data. If `prompt` is 0, all sizes are read from the data."""

    prompt: int = 0  # tokens of every student prompt
    teacher_prompt: int = 0  # tokens of every teacher prompt; 0: the sum of student prompt and completion
    records: int = 0  # records of every training file


@dataclass
class _Run:
    name: str
    config: Config
    count: int = 0


def plan_study(study: Study, machine: Machine, sizes: Sizes = Sizes()) -> list[Planned]:
    """Peak memory and operations of every distinct run. Evaluations are not counted.

    Sampled completions are taken to be as long as rollout.max_new_tokens.
    """
    shape = planning.shape_of(study.config)
    read: dict[str, Sequence[TokenizedExample]] = {}  # the same data, model and context are read once
    peaks: dict[str, int] = {}
    planned = []
    for run in _distinct_runs(study):
        config = run.config
        if sizes.prompt:
            steps, works, asked = _stated_work(config, sizes)
        else:
            same = json.dumps([asdict(c) for c in (config.model, config.data, config.teacher)])
            read[same] = read.get(same) or planning.tokenized(config)
            steps, works = planning.steps_of(config, len(read[same])), list(planning.works_of(config, read[same]))
            asked = list(works[0].offline)
        heaviest = max(works, key=lambda work: sum(work.sizes))
        alike = json.dumps([asdict(override(config, SAME | {"train.epochs": 1.0, "train.steps": 0})), heaviest.sizes])
        peaks[alike] = peaks.get(alike) or peak(shape, config, heaviest, machine)
        total = sum(flops.step_flops(shape, config, work).total for work in works) * steps // len(works)
        if config.method.completions == "offline":
            total += flops.completion_flops(shape, asked, [config.rollout.max_new_tokens] * len(asked))
        planned.append(Planned(run.name, run.count, steps, peaks[alike], total))
    return planned


def _distinct_runs(study: Study) -> list[_Run]:
    """The runs that differ in more than SAME, and how often each occurs."""
    found: dict[str, _Run] = {}
    for name, config in _runs(study):
        key = json.dumps(asdict(override(config, SAME)))
        run = found.setdefault(key, _Run(name, override(config, {"model.name": study.config.model.name})))
        run.count += 1
    return list(found.values())


def _runs(study: Study) -> Iterator[tuple[str, Config]]:
    for cell in cells(study):
        point = [f"{k} {v}" for k, v in cell.method.point.items() if k not in SAME]
        for number, task in enumerate(study.tasks):
            for i, config in enumerate(stage_configs(study, cell, number, BASE)):
                part = [f"run {i + 1}"] * (len(cell.method.phases) > 1)
                yield ", ".join([cell.method.family, task.name, *part, *point]), config


def _stated_work(config: Config, sizes: Sizes) -> tuple[int, list[Any], list[int]]:
    """Steps, the work of a step, and the prompts of offline completions, for data of these sizes."""
    answer = config.rollout.max_new_tokens
    shown = sizes.prompt if config.teacher.context == "none" else sizes.teacher_prompt or sizes.prompt + answer
    work = planning.uniform_work(config, sizes.prompt, shown, answer)
    return planning.steps_of(config, sizes.records), [work], [shown] * (sizes.records * config.rollout.per_prompt)


def plan_table(planned: Sequence[Planned], memory: int, tflops: float) -> str:
    """Markdown of what `plan_study` found. memory: bytes of the device; tflops: 1e12 operations a second."""

    def hours(flops: int) -> str:
        return f"{flops / tflops / 3.6e15:.2g}"

    lines = ["| run | runs | steps | peak memory | fits | PFLOP | hours |", "|---|---:|---:|---:|---|---:|---:|"]
    for one in planned:
        fits = "yes" if one.peak <= memory else "no"
        row = [one.name, one.runs, one.steps, size(one.peak), fits, f"{one.flops / 1e15:.3g}", hours(one.flops)]
        lines.append(f"| {' | '.join(map(str, row))} |")
    runs, total = sum(one.runs for one in planned), sum(one.runs * one.flops for one in planned)
    lines.append(f"| all | {runs} | | | | {total / 1e15:.3g} | {hours(total)} |")
    return (
        "\n".join(lines)
        + f"\n\nThe device has {size(memory)}. Hours are the hours of one run if the device does {tflops:g} "
        "TFLOP/s on average: that is an\nassumption, and sampling is slower than training. Sampled completions are "
        "taken to be as long as they may\nget; evaluations are not counted.\n"
    )
