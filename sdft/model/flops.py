"""Floating-point operations of a step, of answers and of an evaluation, in closed form.

Legend: T tokens of a forward pass, N rows that reach the head, s tokens of a sequence, L layers, W entries of all
matrices in the blocks, Q channels of all query heads, H hidden size, V vocabulary.

    forward     2 W T  +  4 L Q sum s^2  +  2 V H N
    backward    twice that; a frozen matrix needs its input's gradient alone: once
    an answer   of n tokens after p: 2 W (p + n - 1)  +  4 L Q (p^2 + sum_{j=1..n-1} (p + j))  +  2 V H n

These are the model's operations (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B): what the mathematics needs,
a product of (m, k) and (k, n) being 2 m k n, and attention counted over the whole square, as there. What a machine does
beside is left out: padding, recomputation (gradient checkpointing, the cross-entropy's logits, the fused loss), and
everything that is no matrix product. So are attention windows, DoRA's norms, and adapters on layers that are not named
like Llama's.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sdft.config import Config
from sdft.errors import SdftError
from sdft.model.shape import FAMILIES, ModelShape, Work


@dataclass(frozen=True)
class Flops:
    """Of one optimizer step."""

    rollout: int
    teacher: int  # its forward, head included
    student: int  # its forward, head included
    backward: int

    @property
    def total(self) -> int:
        return self.rollout + self.teacher + self.student + self.backward


def logged(lm_config: Any, count: Callable[[ModelShape], int]) -> dict[str, int]:
    """{"flops": count(shape)} for the metrics; nothing for a model whose operations are not counted.

    lm_config: a Hugging Face config.
    """
    try:
        return {"flops": count(ModelShape.from_config(lm_config))}
    except SdftError:
        return {}


def step_flops(shape: ModelShape, config: Config, work: Work) -> Flops:
    """Operations of an optimizer step over the sequences in `work`.

    Answers that were there before the step (demonstrations, offline samples) cost no rollout here: count those with
    `answer_flops`. Raises SdftError for a mixture of experts.
    """
    # The last token of a sequence predicts nothing.
    lengths = [p + a - 1 for p, a in zip(work.prompts, work.completions, strict=True)]
    rows = sum(max(0, a - config.loss.mask_first) for a in work.completions)
    adapters = adapter_entries(shape, config)
    forward = forward_flops(shape, lengths, rows)
    student = forward + 2 * adapters * sum(lengths)
    head = 2 * shape.head * rows
    backward = 2 * forward + 4 * adapters * sum(lengths)
    if config.lora.rank:  # no gradients of the frozen matrices
        backward -= 2 * block_entries(shape) * sum(lengths)
        backward -= 0 if "lm_head" in config.lora.modules_to_save else head
    if not work.teacher_prompts:
        return Flops(0, 0, student, backward)
    seen = [s + a - 1 for s, a in zip(work.teacher_prompts, work.completions, strict=True)]
    teacher = forward_flops(shape, seen, rows)
    if config.teacher.kind != "base":
        teacher += 2 * adapters * sum(seen)
    both = {"student": work.prompts, "teacher": work.teacher_prompts}
    source = config.rollout.source
    sampled = list(both.values()) if source == "mixed" else [both[source]] if source in both else []
    sides = [answer_flops(shape, prompts, work.completions) for prompts in sampled]
    return Flops(sum(sides) // max(1, len(sides)), teacher, student, backward)  # mixed: the sides take turns


def forward_flops(shape: ModelShape, lengths: Iterable[int], rows: int) -> int:
    """Of a forward pass over sequences of these lengths, `rows` of whose tokens reach the head; no adapters."""
    lengths = list(lengths)
    attention = 4 * shape.layers * shape.queries * sum(s * s for s in lengths)
    return 2 * block_entries(shape) * sum(lengths) + attention + 2 * shape.head * rows


def answer_flops(shape: ModelShape, prompts: Sequence[int], answers: Sequence[int]) -> int:
    """To generate answers of these many tokens (1 or more each) after prompts of these many, with a cache of keys.

    Adapters are merged into their matrices while answers are sampled, so they cost nothing here.
    """
    total = 0
    for p, n in zip(prompts, answers, strict=True):
        keys = p * p + (n - 1) * p + n * (n - 1) // 2  # of all queries: the prompt's, then one at a time
        total += 2 * block_entries(shape) * (p + n - 1) + 4 * shape.layers * shape.queries * keys
        total += 2 * shape.head * n
    return total


def adapter_entries(shape: ModelShape, config: Config) -> int:
    """Entries of the LoRA factors."""
    asked = config.lora.targets
    adapted = [sizes for name, sizes in shape.linears.items() if name in asked or "all-linear" in asked]
    return shape.layers * config.lora.rank * sum(o + i for o, i in adapted)


@functools.cache
def block_entries(shape: ModelShape) -> int:
    """Entries of all matrices in the blocks: W.

    Raises SdftError for a mixture of experts, of whose matrices a token uses a few.
    """
    if shape.family in FAMILIES or shape.config is None:
        return shape.layers * shape.block
    text = shape.config.get_text_config()
    if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise SdftError(f"operations of model type {shape.family!r}, a mixture of experts, are not counted")
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # shapes, no memory
        lm = AutoModelForCausalLM.from_config(shape.config)
    head = lm.get_output_embeddings()
    layers = [m for m in lm.modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not head]
    return sum(m.weight.numel() for m in layers)
