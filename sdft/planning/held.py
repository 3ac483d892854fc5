"""What a run holds besides the tensors of a micro-batch: weights, teacher, moments, gradients, workspace, KV cache.

Everything is in bytes. docs/memory.md explains every term. Legend: N completion tokens, H hidden size, V vocabulary.
"""

import math

import torch
from sdft_kernels.projection import TILE_BYTES
from sdft_kernels.workspace import default_workspace, plan_workspace

from sdft.config import Config
from sdft.model.loading import DTYPES
from sdft.model.shape import ModelShape
from sdft.planning.machine import Machine, compute_dtype
from sdft.planning.simulate import Counts

FP32 = 4
# bitsandbytes: 4 bits a weight, a scale of 8 bits for every 64 weights, and a scale of 32 bits for every 256 scales.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
ADAM_8BIT = 2 * (1 + 4 / 256)  # two moments of 8 bits, each with an fp32 scale for every 256 entries


class Held:
    """Bytes that a run of this config holds, by closed forms from the entries of its weights."""

    def __init__(self, shape: ModelShape, config: Config, machine: Machine, counts: Counts) -> None:
        self.shape, self.config, self.machine, self.counts = shape, config, machine, counts
        self.weights_dtype, self.compute = DTYPES[config.model.weights_dtype], compute_dtype(config.model, machine)
        self.weight, self.operand = self.weights_dtype.itemsize, self.compute.itemsize  # bytes of one entry
        self.entry = FP32 if config.lora.rank else self.weight  # bytes of a trained entry: adapters are always fp32

    @property
    def weights(self) -> int:
        lora, matrices = self.config.lora.rank > 0, self.counts.matrices
        if self.config.model.quantize != "4bit":
            matrices = 0
        frozen = matrices * NF4 + (self.counts.frozen - matrices) * self.weight
        return math.ceil(frozen + self.counts.trained * (FP32 if lora else self.weight))

    @property
    def teacher(self) -> int:
        """The EMA's masters, or a copy of the start. A `base` teacher of an adapter is the adapter switched off."""
        teacher = self.config.teacher
        if not self.config.method.needs_teacher or teacher.kind == "live":
            return 0
        if teacher.kind == "base" and self.config.lora.rank:
            return 0
        return self.counts.trained * (self.entry if teacher.kind == "base" or teacher.offload else FP32)

    @property
    def swapped(self) -> int:
        """The copy of fp32 EMA masters in the dtype of the weights, during the teacher's forward pass."""
        teacher = self.config.teacher
        copied = self.entry < FP32 and teacher.kind == "ema" and not teacher.offload
        return self.weight * self.counts.trained * (copied and self.config.method.needs_teacher)

    @property
    def moments(self) -> int:
        if self.config.optim.offload:
            return 0
        return math.ceil(self.counts.trained * (2 * self.entry if self.config.optim.name == "adamw" else ADAM_8BIT))

    @property
    def gradients(self) -> int:
        return self.entry * self.counts.trained

    @property
    def runtime(self) -> int:
        return self.machine.runtime + (self.machine.kernels_bf16 if self.compute == torch.bfloat16 else 0)

    @property
    def head_trains(self) -> bool:
        return not self.config.lora.rank or "lm_head" in self.config.lora.modules_to_save

    @property
    def head_gradient(self) -> int:
        """The fp32 gradient of the head, which the fused loss makes in its forward."""
        return FP32 * self.shape.head * self.head_trains

    def loss(self, rows: int) -> int:
        """Workspace of the fused loss for N rows: the divergence of two sides, or the cross-entropy of one."""
        s, config = self.shape, self.config
        on_gpu = self.machine.kind == "cuda" and config.loss.impl != "torch"
        budget = config.loss.chunk_bytes or default_workspace(self.machine.memory if on_gpu else None)
        sides = 2 if config.method.needs_teacher else 1
        heads = 1 if config.teacher.kind == "live" or not self.head_trains else sides
        row = (sides * s.vocab + (sides + 1) * s.hidden) * FP32
        if on_gpu:
            cast = self.operand < self.weight
            plan = plan_workspace(rows, row, budget, [s.head * self.operand] * heads * cast)
            return min(budget, plan.chunk * row + sum(plan.casts))
        # Heads are made fp32, or rounded to bf16 first, a tile at a time.
        tile = min(TILE_BYTES, budget // 8, s.head * FP32) * (self.operand < FP32)
        return min(budget, rows * row + heads * tile + tile // 2)

    def rollout(self, prompts: int, prompt: int, prompt_pass: int) -> dict[str, int]:
        """Prompts of at most `prompt` tokens that generate together, by use.

        prompt_pass: most bytes of the forward pass over the prompts.
        """
        s, c, rollout = self.shape, self.operand, self.config.rollout
        cache = prompts * (prompt + rollout.max_new_tokens) * s.layers * 2 * s.keys * c
        # The weights are cast once for all tokens, adapters added to them. On the CPU they are copied in any case:
        # oneDNN lays weights out anew for a few rows.
        copied = self.weight != c or self.machine.kind == "cpu"
        quantized = self.config.model.quantize == "4bit"
        casts = c * (s.layers * s.block * (not quantized) + s.head) if copied else 0
        # Prompts of different lengths are padded, and padding is masked: keys and values are then repeated for every
        # query head, and the mask is made a float one.
        masked = prompts * prompt * (2 * s.queries * c + prompt * (1 + c)) if prompts > 1 else 0
        sorting = rollout.top_p < 1 or rollout.top_k > 0
        sampling = prompts * s.vocab * (2 * c + 3 * FP32 + sorting * (2 * FP32 + 8))
        return {"KV cache": cache, "cast weights": casts, "transient": max(sampling, prompt_pass + masked)}
