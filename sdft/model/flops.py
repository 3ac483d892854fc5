"""Floating-point operations of a training step and of generated completions, in closed form.

Legend: T tokens of a forward pass, N rows that reach the head, s tokens of a sequence, L layers, W entries of all
matrices in the blocks, Q channels of all query heads, H hidden size, V vocabulary.

    forward     2 W T  +  4 L Q sum s^2  +  2 V H N
    backward    twice that; once for a frozen matrix, which needs the gradient of its input only
    completion  of n tokens after p: 2 W (p + n - 1)  +  4 L Q (p^2 + sum_{j=1..n-1} (p + j))  +  2 V H n

These are the operations of the model (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B), which the mathematics
needs. A product of (m, k) and (k, n) is 2 m k n, and attention is counted over the whole square, as there. Not counted:
padding, recomputation (gradient checkpointing, the fused loss), everything that is not a matrix product, attention
windows, DoRA's norms, and adapters on layers that are not named like Llama's.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sdft.config import Config, LoraConfig
from sdft.errors import SdftError
from sdft.model.shape import FAMILIES, ModelShape, Work


@dataclass(frozen=True)
class Flops:
    """Operations of one optimizer step."""

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

    Completions that existed before the step (demonstrations, offline samples) cost no rollout here: count those with
    `completion_flops`. Raises SdftError for a mixture of experts.
    """
    # The last token of a sequence predicts nothing.
    lengths = [p + a - 1 for p, a in zip(work.prompts, work.completions, strict=True)]
    masked = config.method.masked_tokens(config.loss.mask_first)
    rows = sum(max(0, n - masked) for n in work.completions)
    adapters = adapter_entries(shape, config.lora)
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
    sides = [completion_flops(shape, prompts, work.completions) for prompts in sampled]
    return Flops(sum(sides) // max(1, len(sides)), teacher, student, backward)  # mixed: the sides take turns


def forward_flops(shape: ModelShape, lengths: Iterable[int], rows: int) -> int:
    """Operations of a forward pass without adapters. lengths: of its sequences. rows: tokens that reach the head."""
    lengths = list(lengths)
    attention = 4 * shape.layers * shape.queries * sum(s * s for s in lengths)
    return 2 * block_entries(shape) * sum(lengths) + attention + 2 * shape.head * rows


def completion_flops(shape: ModelShape, prompts: Sequence[int], completions: Sequence[int]) -> int:
    """Operations to generate completions after prompts with a cache of keys and values.

    prompts, completions: tokens of each, 1 or more. Adapters are merged into their matrices while completions are
    sampled, so they cost nothing here.
    """
    total = 0
    for p, n in zip(prompts, completions, strict=True):
        keys = p * p + (n - 1) * p + n * (n - 1) // 2  # of all queries: the prompt's, then one at a time
        total += 2 * block_entries(shape) * (p + n - 1) + 4 * shape.layers * shape.queries * keys
        total += 2 * shape.head * n
    return total


def adapter_entries(shape: ModelShape, lora: LoraConfig) -> int:
    """Entries of the LoRA factors."""
    asked = lora.targets
    adapted = [sizes for name, sizes in shape.linears.items() if name in asked or "all-linear" in asked]
    return shape.layers * lora.rank * sum(o + i for o, i in adapted)


@functools.cache
def block_entries(shape: ModelShape) -> int:
    """Entries of all matrices in the blocks: W.

    Raises SdftError for a mixture of experts: each token uses few of its matrices.
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
