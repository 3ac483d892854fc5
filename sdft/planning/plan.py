"""`sdft plan`: the peak memory of every phase of a step before any weight is loaded, and what to do about it."""

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdft import devices as memory
from sdft.config import Config, get, override
from sdft.data.dataset import TokenizedExample
from sdft.errors import SdftError, first_line
from sdft.planning.costs import (
    BF16,
    FP32,
    Costs,
    Machine,
    ModelShape,
    Pass,
    SimulatedCosts,
    Work,
    costs_of,
    passes_of,
    share_of,
)

GIB, MIB = 2**30, 2**20
COLOURS = {  # of the terms, in the order they are shown
    "weights": "blue", "teacher": "cyan", "moments": "magenta", "gradients": "red", "activations": "yellow",
    "cast weights": "green", "KV cache": "bright_blue", "loss": "bright_red", "transient": "white",
    "runtime": "bright_black",
}  # fmt: skip
TERMS = tuple(COLOURS)
MOST_STEPS = 10_000  # of a run, looked through for the one with most tokens
CUDA_CONTEXT = 500 * MIB  # what a process holds on the GPU before its first tensor: 300 to 550 MiB on recent drivers
CUBLAS_WORKSPACE = 32 * MIB  # PyTorch's default on Hopper; 8 MiB before it
FRAGMENTATION = 0.05  # of the tensors on a GPU, for what PyTorch's caching allocator rounds up or cannot reuse: assumed


@dataclass(frozen=True)
class Plan:
    """Predicted peaks: for each phase, bytes by term."""

    phases: dict[str, dict[str, int]]
    memory: int  # of the device
    budget: int | None  # the largest train.micro_batch_tokens that fits, 0: a whole step at once; None: nothing fits
    step_tokens: int  # tokens of a whole step, the longer side of each sequence
    notes: tuple[str, ...]  # what was assumed

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        return max(map(self.total, self.phases))

    @property
    def fits(self) -> bool:
        return self.peak <= self.memory


def predict(shape: ModelShape, config: Config, work: Work, machine: Machine) -> Plan:
    """The plan of a config whose step holds the sequences of `work`. Raises SdftError where nothing can be known."""
    costs = costs_of(shape, config, work, machine)
    phases = _phases_of_step(costs, work)
    return Plan(phases, machine.memory, largest_budget(costs, work), sum(work.sizes), tuple(_assumptions(costs, work)))


def peak(shape: ModelShape, config: Config, work: Work, machine: Machine) -> int:
    """The peak of `predict` alone, in bytes: much faster where activations are simulated."""
    return max(sum(terms.values()) for terms in _phases_of_step(costs_of(shape, config, work, machine), work).values())


def largest_budget(costs: Costs, work: Work) -> int | None:
    """The largest train.micro_batch_tokens whose peak is within the machine's memory; see Plan.budget."""
    longest, whole = max(work.sizes), sum(work.sizes)

    def fits(budget: int) -> bool:
        phases = _phases(costs, work, [share_of(work, budget)], budget < whole)
        return max(sum(terms.values()) for terms in phases.values()) <= costs.machine.memory

    if fits(whole):
        return 0
    if not fits(longest):
        return None
    low, high = longest, whole
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _phases_of_step(costs: Costs, work: Work) -> dict[str, dict[str, int]]:
    passes = passes_of(costs.config, work, costs.packed)
    return _phases(costs, work, passes, len(passes) > 1)


def _phases(costs: Costs, work: Work, passes: Sequence[Pass], again: bool) -> dict[str, dict[str, int]]:
    """Bytes by phase and term; of each phase, those of the moment and the micro-batch that take most.

    again: gradients of an earlier micro-batch are there already.
    """
    held = {
        "weights": costs.weights,
        "teacher": costs.teacher,
        "moments": costs.moments,
        "runtime": costs.machine.runtime + costs.kernels,
    }
    config = costs.config
    phases: dict[str, dict[str, int]] = {}

    def add(phase: str, *parts: dict[str, int]) -> None:
        terms = dict.fromkeys(TERMS, 0)
        for part in (held, *parts):
            for term, size in part.items():
                terms[term] += size
        terms["transient"] += math.ceil(costs.machine.slack * (sum(terms.values()) - terms["runtime"]))
        if phase not in phases or sum(terms.values()) > sum(phases[phase].values()):
            phases[phase] = terms

    if work.offline:
        together, longest = min(config.rollout.batch_size, len(work.offline)), max(work.offline)
        early = {"moments": -costs.moments}  # AdamW makes them in the first step
        add("rollout", early, costs.rollout(together, longest, config.rollout.max_new_tokens))
    elif work.teacher_prompts:
        sampled = work.prompts if config.rollout.source == "student" else (*work.prompts, *work.teacher_prompts)
        by_teacher = {"cast weights": costs.swapped * (config.rollout.source != "student")}
        together = min(config.rollout.batch_size, len(work.prompts))
        add("rollout", by_teacher, costs.rollout(together, max(sampled), config.rollout.max_new_tokens))
    before = {"gradients": costs.gradients} if again else {}
    for one in passes:
        for part in costs.scoring(one):
            add("score", before, part)
        add("loss", before, costs.losing(one))
        for part in costs.descending(one, again):
            add("backward", part)
    add("update", {"gradients": costs.gradients}, *(costs.unreturned(one) for one in passes[-1:]))
    return phases


# What to do about it.

# Settings that make a run smaller, the cheapest in time and quality first, and what each costs.
REMEDIES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"model.gradient_checkpointing": True}, "recomputes the blocks: about a third more time in the gradient"),
    ({"optim.name": "adamw_8bit"}, "moments in 8 bits, by bitsandbytes"),
    ({"teacher.offload": True}, "EMA masters in CPU memory; with bfloat16 weights it halves the teacher"),
    ({"optim.offload": True}, "moments in CPU memory: a slower update"),
    ({"lora.rank": 16}, "trains adapters instead of all weights"),
    ({"lora.rank": 16, "model.quantize": "4bit"}, "adapters beside weights in 4 bits, by bitsandbytes (QLoRA)"),
)


def advice(shape: ModelShape, config: Config, work: Work, machine: Machine) -> list[str]:
    """What to change, in sentences, with the memory each change saves; empty where the config fits as it is.

    First the token budget, if that alone is enough; then every remedy that applies, and the first of them, in their
    order, that together are enough.
    """
    plan = predict(shape, config, work, machine)
    if plan.fits:
        return []
    said = []
    if plan.budget:
        said.append(f"{setting('train.micro_batch_tokens', plan.budget)} fits: the gradients of a step then add up")
    alone = {"train.micro_batch_tokens": 1}  # every sequence by itself: the least that other settings can need

    def least(tried: Config) -> int:
        return predict(shape, override(tried, alone), work, machine).peak

    together = config
    used: list[str] = []
    fewer = max(1, min(config.rollout.batch_size, len(work.prompts)) // 4)
    sampling = ({"rollout.batch_size": fewer}, "fewer prompts generate together: a slower rollout")
    for changes, price in (sampling, *REMEDIES):
        if not _applies(changes, config, machine):
            continue
        named = ", ".join(setting(*change) for change in changes.items())
        changed = predict(shape, override(config, changes), work, machine)
        if changed.peak < plan.peak:
            enough = ", enough" if changed.fits else ""
            said.append(f"{named}: {size(plan.peak - changed.peak)} less{enough} ({price})")
        if least(together) > machine.memory and _applies(changes, together, machine):
            with_it = override(together, changes)
            if least(with_it) < least(together):
                together, used = with_it, [*used, named]
    if plan.budget is None:
        budget = predict(shape, together, work, machine).budget
        if budget is None:
            said.append("even together that does not fit: shorter prompts or answers, or a smaller model")
        elif used:
            tokens = [setting("train.micro_batch_tokens", budget)] if budget else []
            said.append(f"together these fit: {', '.join(used + tokens)}")
    return said


def advice_after_running_out(config: Config) -> str:
    """What to change in a config that ran out of memory, in a sentence."""
    shape, work, machine = shape_of(config), work_of(config), this_machine(config)
    # It did run out, whatever was predicted: so the advice must make the prediction smaller.
    less = int(0.9 * predict(shape, config, work, machine).peak)
    changes = advice(shape, config, work, replace(machine, memory=min(less, machine.memory)))
    return "By `sdft plan`: " + "; ".join(changes) + "."


def _applies(changes: dict[str, Any], config: Config, machine: Machine) -> bool:
    """Whether a remedy changes anything that can be changed here."""
    for key, value in changes.items():
        now = get(config, key)
        if len(changes) == 1 and (now == value or (key == "lora.rank" and now)):
            return False
        if machine.kind != "cuda" and (key.endswith("offload") or key == "model.quantize"):
            return False
    if "lora.rank" in changes and config.teacher.model:  # whose weights need full fine-tuning
        return False
    if "teacher.offload" in changes:
        averaged = config.teacher.kind == "ema" and config.method.needs_teacher
        return averaged and not config.lora.rank and config.model.weights_dtype == "bfloat16"
    if "optim.offload" in changes:
        return config.optim.name == "adamw"
    if changes.get("optim.name") == "adamw_8bit":
        return config.optim.name == "adamw" and not config.optim.offload
    return "model.quantize" not in changes or config.model.quantize == "none"


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


def verdict(plan: Plan, config: Config) -> str:
    """Whether it fits, and the largest token budget that does."""
    fits = f"The peak is {size(plan.peak)} of {size(plan.memory)}: it {'fits' if plan.fits else 'does not fit'}."
    if plan.budget is None:
        return f"{fits} Not even the longest sequence alone fits."
    if plan.budget == 0:
        return f"{fits} A whole step fits at once (train.micro_batch_tokens = 0, {plan.step_tokens} tokens)."
    return f"{fits} The largest train.micro_batch_tokens that fits is {plan.budget}, of {plan.step_tokens} in a step."


def _assumptions(costs: Costs, work: Work) -> list[str]:
    """What the prediction rests on, in words."""
    machine = costs.machine
    how = "by simulation on fake tensors" if isinstance(costs, SimulatedCosts) else "in closed form"
    layout = "end to end" if costs.packed else "padded"
    words = {BF16: "bfloat16", FP32: "float32"}
    said = [
        f"{costs.shape.family}: {costs.trained / 1e6:.1f}M weights train; weights are held in {words[costs.w]}, "
        f"multiplied in {words[costs.c]}; activations {how}",
        f"a step of {len(work.prompts)} sequences laid {layout}, the longest {max(work.sizes)} tokens, "
        f"answers of {max(work.completions)}",
    ]
    if machine.kind == "cuda":
        said.append(
            f"on the GPU {machine.runtime / MIB:.0f} MiB before the first tensor, and {machine.slack:.0%} of all "
            "tensors for what the allocator cannot reuse: not measured"
        )
    elif machine.kind == "cpu":
        said.append(f"the interpreter and libraries, before any weight: {machine.runtime / MIB:.0f} MiB, measured")
    return said


# Where a run takes place.


def this_machine(config: Config, memory: int = 0) -> Machine:
    """The machine that a config would run on; memory: bytes of its device, 0 for those of the one that is here.

    Raises SdftError for a GPU whose size is neither given nor to be seen.
    """
    import torch

    kind = config.model.device.split(":")[0]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        bf16 = True
        if torch.cuda.is_available():
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            index = torch.device(config.model.device if config.model.device != "auto" else "cuda").index
            memory = memory or torch.cuda.get_device_properties(index or 0).total_memory
        if not memory:
            raise SdftError("model.device = 'cuda', and there is none here; give its size: --memory 24GB")
        return Machine(kind, memory, CUDA_CONTEXT + CUBLAS_WORKSPACE, FRAGMENTATION, 1, bf16)
    memory = memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bf16 = kind == "cpu" and bool(torch.cpu._is_amx_tile_supported())
    return Machine(kind, memory, resident(config), 0.0, torch.get_num_threads(), bf16)


def resident(config: Config) -> int:
    """Bytes of this process that are in memory once it holds what a run does before any weight."""
    import torch
    import transformers.modeling_utils  # noqa: F401

    import sdft.evaluation.accuracy
    import sdft.score.teacher
    import sdft.update.optim  # noqa: F401

    if config.lora.rank:
        import peft  # noqa: F401
    dtype = torch.float32 if config.model.compute_dtype == "float32" else torch.bfloat16
    x = torch.ones(64, 64, dtype=dtype, requires_grad=True)
    (x @ x).float().sum().backward()  # loads the libraries that multiply
    memory.return_freed(x.device)
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return memory.peak_memory(x.device)  # of a process that has not yet freed anything large


def parse_size(text: str) -> int:
    """ "12GB", "12 GiB", "900MB" -> bytes; GB is taken as GiB, as the makers of GPUs mean it."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)i?b?\s*", text.lower())
    try:
        size = float(found[1]) if found else 0.0
    except ValueError:
        size = 0.0
    if not found or size <= 0:
        raise SdftError(f"--memory {text!r} is not a size; write it like 12GB or 900MB")
    return int(size * 1024 ** (" kmgt".index(found[2] or " ")))


# From a config alone.


def shape_of(config: Config) -> ModelShape:
    """The shape of model.name, from its config.json; no weight is read."""
    from transformers import AutoConfig

    from sdft.model import lora
    from sdft.model.loading import resolve

    adapter = lora.read_config(config.model.name) if config.model.name else None
    name, extra = resolve(lora.base_of(config.model.name, adapter) if adapter else config.model.name)
    try:
        found = AutoConfig.from_pretrained(name, trust_remote_code=config.model.trust_remote_code, **extra)
    except Exception as error:  # transformers raises many kinds here
        raise SdftError(f"model.name = {config.model.name!r}: no config loads ({first_line(error)})") from None
    return ModelShape.from_config(found)


def work_of(config: Config) -> Work:
    """The step of the run that has most tokens, its answers as long as they may get; reads the data and tokenizer."""
    return max(works_of(config, tokenized(config)), key=lambda work: sum(work.sizes))


def works_of(config: Config, examples: Sequence[TokenizedExample]) -> Iterator[Work]:
    """Every step of the run (the first MOST_STEPS), as `work_of`; examples: its `tokenized` data."""
    from sdft.data.dataset import batch_indices

    demonstrated = config.method.completions == "demonstrations"
    repeats = 1 if demonstrated else config.rollout.per_prompt
    every = tuple(len(e.teacher_prompt) for e in examples for _ in range(repeats))
    for step in range(min(steps_of(config, len(examples)), MOST_STEPS)):
        chosen = [examples[i] for i in batch_indices(len(examples), config.train.batch_size, step, config.train.seed)]
        chosen = [e for e in chosen for _ in range(repeats)]
        yield Work(
            tuple(len(e.prompt) for e in chosen),
            tuple(len(e.teacher_prompt) for e in chosen) if config.method.needs_teacher else (),
            tuple(len(e.target) if demonstrated else config.rollout.max_new_tokens for e in chosen),
            every if config.method.completions == "offline" else (),
        )


def steps_of(config: Config, records: int) -> int:
    """Optimizer steps of a run on these many records."""
    return config.train.steps or math.ceil(config.train.epochs * records / config.train.batch_size)


def tokenized(config: Config) -> Sequence[TokenizedExample]:
    """The training data as token ids; what is over a length budget is left out."""
    from sdft.data.dataset import tokenize
    from sdft.data.formats import load_records
    from sdft.model.loading import load_tokenizer

    tokenizer, stop_ids = load_tokenizer(config.model)
    records = load_records(config.data.train, config.data.split)
    return tokenize(records, tokenizer, stop_ids, config.data, config.teacher).examples
