"""What to change in a config that does not fit, and what each change saves."""

from dataclasses import replace
from typing import Any

from sdft.config import Config, get, override
from sdft.model.shape import ModelShape, Work
from sdft.planning.machine import Machine, this_machine
from sdft.planning.picture import setting, size
from sdft.planning.plan import peak, predict
from sdft.planning.work import shape_of, work_of

# Settings that make a run smaller, the cheapest in time and quality first, and what each costs.
REMEDIES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"model.gradient_checkpointing": True}, "recomputes the blocks: about a third more time in the gradient"),
    ({"optim.name": "adamw_8bit"}, "moments in 8 bits, by bitsandbytes"),
    ({"teacher.offload": True}, "EMA masters in CPU memory; with bfloat16 weights it halves the teacher"),
    ({"optim.offload": True}, "moments in CPU memory: a slower update"),
    ({"lora.rank": 16}, "trains adapters instead of all weights"),
    ({"lora.rank": 16, "model.quantize": "4bit"}, "adapters on weights in 4 bits, by bitsandbytes (QLoRA)"),
)


def advice(shape: ModelShape, config: Config, work: Work, machine: Machine) -> list[str]:
    """What to change, in sentences, with the memory that each change saves; empty if the config fits as it is.

    First the token budget, if it alone is enough; then every remedy that applies, and the first of them, in their
    order, that together are enough.
    """
    plan = predict(shape, config, work, machine)
    if plan.fits:
        return []
    lines = []
    if plan.budget:
        lines.append(f"{setting('train.micro_batch_tokens', plan.budget)} fits: the gradients of a step then add up")
    fewer = max(1, min(config.rollout.batch_size, len(work.prompts)) // 4)
    sampling = ({"rollout.batch_size": fewer}, "fewer prompts generate together: a slower rollout")
    applying = [(changes, price) for changes, price in (sampling, *REMEDIES) if _applies(changes, config, machine)]
    for changes, price in applying:
        changed = peak(shape, override(config, changes), work, machine)
        if changed < plan.peak:
            enough = ", enough" if changed <= machine.memory else ""
            lines.append(f"{_named(changes)}: {size(plan.peak - changed)} less{enough} ({price})")
    if plan.budget is None:
        lines.append(_together(shape, config, work, machine, [changes for changes, _ in applying]))
    return lines


def _together(shape: ModelShape, config: Config, work: Work, machine: Machine, remedies: list[dict[str, Any]]) -> str:
    """The first remedies, in their order, that together are enough."""
    alone = {"train.micro_batch_tokens": 1}  # every sequence by itself: the least that other settings can need
    used: list[str] = []

    def least(tried: Config) -> int:
        return peak(shape, override(tried, alone), work, machine)

    for changes in remedies:
        now = least(config)
        if now > machine.memory and _applies(changes, config, machine):
            changed = override(config, changes)
            if least(changed) < now:
                config, used = changed, [*used, _named(changes)]
    budget = predict(shape, config, work, machine).budget
    if budget is None:
        return "even together that does not fit: shorter prompts or completions, or a smaller model"
    tokens = [setting("train.micro_batch_tokens", budget)] if budget else []
    return f"together these fit: {', '.join(used + tokens)}"


def advice_after_running_out(config: Config) -> str:
    """What to change in a config whose run has run out of memory, whatever was predicted; reads its data."""
    shape, work, machine = shape_of(config), work_of(config), this_machine(config)
    smaller = int(0.9 * peak(shape, config, work, machine))
    lines = advice(shape, config, work, replace(machine, memory=min(smaller, machine.memory)))
    return "By `sdft plan`: " + "; ".join(lines) + "."


def _named(changes: dict[str, Any]) -> str:
    return ", ".join(setting(key, value) for key, value in changes.items())


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
