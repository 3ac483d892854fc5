"""What a run holds in memory, term by term: closed forms, and a simulation where they do not hold.

Legend: T tokens of a forward pass, N completion tokens of it, B prompts that generate together, L layers, H hidden
size, I size of the MLP, V vocabulary. Everything is in bytes.

What the closed forms know is which tensors autograd keeps for the backward pass of one transformer block. They were
read off the Llama, Mistral, Qwen2 and Qwen3 of transformers 5; other families are simulated (simulate.py, which the
closed forms are tested against). docs/memory.md explains every term.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdft_kernels.chunks import CACHE_BYTES, power_of_two_below
from sdft_kernels.projection import TILE_BYTES
from sdft_kernels.workspace import CPU_BYTES, default_workspace

from sdft.config import Config
from sdft.devices import KERNELS, RETURNS
from sdft.errors import SdftError
from sdft.model.shape import FAMILIES, ModelShape, Work
from sdft.score.batch import micro_batches

FP32, BF16 = 4, 2
# Of bitsandbytes: 4 bits a weight, and for every 64 weights a scale of 8 bits, itself scaled once for 256 scales.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# Of the code that oneDNN makes for one shape of a bf16 product on a CPU with AMX: measured 0.57 to 0.96 MiB by shape.
# In fp32 it is a twentieth.
KERNEL = 7 * 2**20 // 10
# Two moments of 8 bits, and for each an fp32 scale for every 256 entries.
ADAM_8BIT = 2 * (1 + 4 / 256)


@dataclass(frozen=True)
class Pass:
    """Tokens of one micro-batch."""

    student: int  # T of the student's forward, padding included
    teacher: int  # T of the teacher's; 0 without one
    rows: int  # N


@dataclass(frozen=True)
class Machine:
    """Where a run takes place."""

    kind: str  # cuda, cpu, ...
    memory: int  # bytes it has
    runtime: int  # of them, what is gone before the first tensor
    slack: float = 0.0  # of the tensors, what the allocator adds
    threads: int = 1
    bf16: bool = True  # whether it multiplies bf16 fast


class Costs:
    """The closed forms: bytes of one model under one config.

    w, c: bytes of a weight and of an operand of the matrix products; where c
    is less, autocast casts the weights.
    """

    def __init__(self, shape: ModelShape, config: Config, machine: Machine, packed: bool) -> None:
        self.shape, self.config, self.machine, self.packed = shape, config, machine, packed
        self.w = BF16 if config.model.weights_dtype == "bfloat16" else FP32
        wanted = config.model.compute_dtype
        bf16 = wanted == "bfloat16" or self.w == BF16 or (wanted == "auto" and machine.bf16)
        self.c = BF16 if bf16 else FP32
        self.autocast = self.c < self.w  # of the weights; fp32 factors beside bf16 weights are cast as well
        self.rank = config.lora.rank
        self.checkpointing = config.model.gradient_checkpointing
        names = shape.linears
        asked = names if config.lora.targets == ("all-linear",) else config.lora.targets
        self.adapted = [n for n in names if n in asked] if self.rank else []

    # Held through the whole run.

    @property
    def adapters(self) -> int:
        """Entries of the LoRA factors, and of DoRA's norms."""
        one = sum(self.rank * sum(self.shape.linears[n]) for n in self.adapted)
        one += sum(self.shape.linears[n][0] for n in self.adapted) * self.config.lora.dora
        return self.shape.layers * one + self.whole

    @property
    def whole(self) -> int:
        """Entries of the modules that train whole beside the adapters."""
        saved = self.config.lora.modules_to_save if self.rank else ()
        return self.shape.head * sum(name in ("lm_head", "embed_tokens") for name in saved)

    @property
    def trained(self) -> int:
        """Entries that train."""
        return self.adapters if self.rank else self.shape.parameters

    @property
    def head_trains(self) -> bool:
        return not self.rank or "lm_head" in self.config.lora.modules_to_save

    @property
    def weights(self) -> int:
        matrices = self.shape.layers * self.shape.block
        rest = self.shape.parameters - matrices
        quantized = self.config.model.quantize == "4bit"
        base = matrices * (NF4 if quantized else self.w) + rest * self.w
        return math.ceil(base + FP32 * (self.adapters if self.rank else 0))

    @property
    def item(self) -> int:
        """Bytes of a trained entry: adapters are fp32 whatever the weights."""
        return FP32 if self.rank else self.w

    @property
    def teacher(self) -> int:
        """EMA masters, or the copy of the start; a `base` teacher beside an adapter is the adapter switched off."""
        kind = self.config.teacher.kind
        if not self.config.method.needs_teacher or kind == "live" or (kind == "base" and self.rank):
            return 0
        if kind == "base" or self.config.teacher.offload:
            return self.item * self.trained
        return FP32 * self.trained

    @property
    def swapped(self) -> int:
        """The copy of fp32 EMA masters in the weights' dtype, for the length of a teacher's forward."""
        narrow = self.w < FP32 and not self.rank
        return (
            self.w * self.trained * (narrow and self.config.teacher.kind == "ema" and not self.config.teacher.offload)
        )

    @property
    def moments(self) -> int:
        """AdamW's two; 8-bit ones by bitsandbytes."""
        if self.config.optim.offload:
            return 0
        return math.ceil(self.trained * (2 * self.item if self.config.optim.name == "adamw" else ADAM_8BIT))

    @property
    def gradients(self) -> int:
        return self.item * self.trained

    @property
    def kernels(self) -> int:
        """oneDNN's kernels on the CPU; a few steps of different lengths fill its cache."""
        return KERNELS * KERNEL if self.machine.kind == "cpu" and self.c < FP32 else 0

    # One forward and its backward.

    def _input(self, width: int, *names: str) -> int:
        """Bytes a token that the layers `names` keep of the input they share, and what each adapter's A makes of it.

        width: channels of the input.
        """
        adapted = sum(name in self.adapted for name in names)
        return self.c * (self.rank * adapted + width * (not self.rank or adapted > 0))

    def _norm(self, width: int, rows: int, item: int) -> int:
        """A block's norm keeps its input and a statistic for each of `rows`."""
        return item * width + FP32 * rows

    @property
    def final_norm(self) -> int:
        """transformers' own keeps its input in fp32, a statistic and, to train its weight, the normalised values."""
        return FP32 * (self.shape.hidden + 1) + (0 if self.rank else self.w * self.shape.hidden)

    @property
    def block_tokens(self) -> int:
        """Bytes a token that one block keeps for the backward pass."""
        s, w, c = self.shape, self.w, self.c
        kept = 2 * self._norm(s.hidden, 1, w)
        kept += self._input(s.hidden, "q_proj", "k_proj", "v_proj") + self._input(s.hidden, "gate_proj", "up_proj")
        if s.qk_norm:
            kept += self._norm(s.queries, s.heads, c) + self._norm(s.keys, s.kv_heads, c)
        # Attention keeps q, k, v, its output and the log-sum-exps; packed, it runs a sequence at a time and the
        # outputs are then laid end to end, once more.
        kept += c * (2 * s.queries + 2 * s.keys) + FP32 * s.heads
        kept += self._input(s.queries * self.packed, "o_proj")
        # The MLP keeps the gate, what it is multiplied with and their product.
        return kept + 2 * s.inner * c + self._input(s.inner, "down_proj")

    @property
    def block_casts(self) -> int:
        """Cast copies that autocast keeps of one block's adapters; of matrices, lean.linear keeps none."""
        return self.c * sum(self.rank * sum(self.shape.linears[n]) for n in self.adapted) if self.c < FP32 else 0

    @property
    def cached_casts(self) -> int:
        """Of all blocks, the copies that autocast keeps to its end."""
        return self.c * (self.adapters - self.whole) if self.rank and self.c < FP32 else 0

    @property
    def one_cast(self) -> int:
        """The largest copy of a matrix, made for one product and dropped."""
        cast = self.autocast or self.config.model.quantize == "4bit"
        return self.c * max(o * i for o, i in self.shape.linears.values()) if cast else 0

    @property
    def stem_tokens(self) -> int:
        """Bytes a token outside the blocks: cosines and sines, ids and positions, the final norm."""
        return 2 * self.shape.head_dim * self.w + 16 + self.final_norm

    def saved(self, tokens: int) -> tuple[int, int]:
        """(activations, cast copies) that a student's forward leaves for the backward pass."""
        s = self.shape
        if self.config.model.activation_offload:
            return 0, 0
        if self.checkpointing:
            return tokens * (self.stem_tokens + s.layers * s.hidden * self.w), 0
        unused, casts = 0, s.layers * self.block_casts
        if self.rank:  # nothing before the first adapters trains: their inputs get no gradient, so need no weights
            unused = tokens * self._norm(s.hidden, 1, self.w)
            first = ("q_proj", "k_proj", "v_proj")
            if self.c < FP32:
                casts -= self.c * self.rank * s.hidden * sum(name in self.adapted for name in first)
        return tokens * (self.stem_tokens + s.layers * self.block_tokens) - unused, casts

    def infer(self, tokens: int, kept: int = 0) -> int:
        """Most that a forward without gradients holds at once, cast copies apart.

        kept: bytes a token beside what the MLP would hold.
        """
        s, w, c = self.shape, self.w, self.c
        # The embedding, the block's input, the sum after attention and its normalised values; then the gate, or both
        # factors and their product. An adapter's product stands beside its layer's, before and after scaling.
        mlp = 3 * s.hidden * w + s.hidden * c + 3 * s.inner * c + kept
        if self.adapted:
            mlp += s.inner * c
        # Queries while they are turned by their positions: times the cosine, turned, times the sine.
        attention = 2 * s.hidden * w + s.hidden * c + (s.queries + 2 * s.keys) * c + 3 * s.queries * max(w, c)
        return tokens * (max(mlp, attention) + 2 * s.head_dim * w + 16) + self.one_cast

    def forward(self, tokens: int) -> int:
        """Most that the student's forward holds beyond what it leaves."""
        s = self.shape
        if self.checkpointing:  # its blocks leave nothing but their input; the final norm comes after them
            left = 2 * s.hidden * self.w + self.final_norm
            gate = 0 if self.adapted else s.inner * self.c  # is there beside what it becomes
            return self.infer(tokens, gate) - tokens * left + self.cached_casts
        if self.adapted:  # the final norm's values on their way, or the gate's in the last block
            return tokens * max(3 * s.hidden * FP32, s.inner * self.c)
        return tokens * s.hidden * self.w

    def backward(self, tokens: int) -> int:
        """Most that the backward pass holds beyond what the forward left, gradients of weights apart."""
        s = self.shape
        # Gradients of the MLP's product and of both factors; or, of few tokens, of the product and of down_proj's
        # weight before it is cast back, beside its copy. Then those of the block's output and of its sum. The final
        # norm's tensors are gone by then.
        inner = tokens * s.inner * (self.c + FP32 if self.adapted else 3 * self.c)
        if self.autocast and not self.rank:
            inner = max(inner, tokens * s.inner * self.c + 2 * self.one_cast)
        extra = inner + tokens * (2 * s.hidden * self.w - self.final_norm)
        if self.rank:  # matrices in the compute dtype, or unpacked, one at a time
            extra += self.one_cast
        if self.checkpointing or self.config.model.activation_offload:
            # Made again, but for its input; an adapted down_proj has let go of its own by then.
            gone = s.hidden * self.w + s.inner * self.c * bool(self.adapted)
            return extra + tokens * (self.block_tokens - gone) + self.block_casts
        return extra

    # The loss.

    def loss(self, rows: int) -> int:
        """Work space of the fused loss, or of the cross-entropy, at N rows."""
        s, config = self.shape, self.config
        if not config.method.needs_teacher:
            budget = config.loss.chunk_bytes or CPU_BYTES
            tiles = min(TILE_BYTES, budget // 8, s.head * FP32) * (min(self.c, self.w) < FP32)
            chunk_row = (s.vocab + 2 * s.hidden) * FP32
            return min(rows, power_of_two_below((budget - tiles) // chunk_row)) * chunk_row + tiles
        if self.machine.kind == "cuda" and config.loss.impl != "torch":
            budget = config.loss.chunk_bytes or default_workspace(self.machine.memory)
            casts = budget // 8 if self.autocast else 0
            row = 8 * s.vocab + 16 * s.hidden
            return casts + min(rows, max(1, (budget - casts) // row)) * row
        budget = config.loss.chunk_bytes or CPU_BYTES
        # Weights are made fp32, or rounded to bf16 as autocast would, a tile at a time: both sides' unless they share.
        shared = config.teacher.kind == "live" or not self.head_trains
        heads = (2 - shared) * (min(self.c, self.w) < FP32)
        tiles = min(TILE_BYTES, budget // 8) * heads
        planes, row = 2, s.vocab * FP32  # two planes of scratch: the per-token values ask for them
        block = min(power_of_two_below(budget // (4 * planes * row)), rows)
        if self.machine.kind == "cpu":
            block = min(block, self.machine.threads * max(1, CACHE_BYTES // ((2 + planes) * row)))
        chunk_row = (2 * s.vocab + 3 * s.hidden) * FP32
        chunk = min(rows, power_of_two_below((budget - tiles - planes * block * row) // chunk_row))
        held = min(tiles, heads * s.head * FP32)
        rounded = held // (2 * heads) if self.autocast else 0  # one tile in bf16, on its way
        return chunk * chunk_row + planes * block * row + held + rounded

    def unreturned(self, one: Pass) -> dict[str, int]:
        """What glibc's heap holds, in the update, of what the backward pass has freed since memory.return_freed."""
        if self.machine.kind != "cpu":
            return {}
        return {"transient": sum(self.saved(one.student)) // RETURNS[1]}

    # Sampling.

    def rollout(self, prompts: int, prompt: int, new: int) -> dict[str, int]:
        """B prompts of at most `prompt` tokens generating together, with weights cast once for all tokens."""
        s, c = self.shape, self.c
        cache = prompts * (prompt + new) * s.layers * 2 * s.keys * c
        # Adapters are added to the copy. On the CPU it is made in any case: oneDNN lays weights out anew for few rows.
        copied = self.w != c or self.machine.kind == "cpu"
        quantized = self.config.model.quantize == "4bit"
        casts = c * (s.layers * s.block * (not quantized) + s.head) if copied else 0
        if self.rank and c < FP32 and (quantized or not copied):
            casts += self.cached_casts
        # Prompts of different lengths are padded, and padding is masked: keys and values are then repeated for every
        # query head, and the mask is made a float one.
        masked = prompts * prompt * (2 * s.queries * c + prompt * (1 + c)) if prompts > 1 else 0
        sorting = self.config.rollout.top_p < 1 or self.config.rollout.top_k > 0
        sampling = prompts * s.vocab * (2 * c + 3 * FP32 + sorting * (2 * FP32 + 8))
        activations = self.infer(prompts * prompt) + masked
        return {"KV cache": cache, "cast weights": casts, "transient": max(sampling, activations)}

    # Phases.

    def scoring(self, one: Pass) -> list[dict[str, int]]:
        """What the teacher's forward and then the student's hold at most."""
        activations, casts = self.saved(one.student)
        parts = [
            {
                "activations": activations,
                "cast weights": casts,
                "transient": self.forward(one.student) + self.rows(one) * bool(one.teacher),
            }
        ]
        if one.teacher:
            parts.append({"cast weights": self.cached_casts + self.swapped, "transient": self.infer(one.teacher)})
        return parts

    def rows(self, one: Pass) -> int:
        """Hidden states of N rows."""
        return one.rows * self.shape.hidden * self.w

    def losing(self, one: Pass) -> dict[str, int]:
        """The loss: both sides' rows, the gradients of the student's and of the head, and work space."""
        activations, casts = self.saved(one.student)
        return {
            "activations": activations,
            "cast weights": casts,
            "gradients": self.head_gradient,
            "transient": 3 * self.rows(one),
            "loss": self.loss(one.rows),
        }

    @property
    def head_gradient(self) -> int:
        return self.head_trains * self.shape.head * FP32

    def descending(self, one: Pass, again: bool) -> list[dict[str, int]]:
        """What the backward pass holds at its beginning and at its end.

        It begins with all activations and ends with all gradients. Between, one is traded for the other in equal
        steps, so that the most is at an end. again: an earlier micro-batch has left gradients.
        """
        activations, casts = self.saved(one.student)
        before, head = self.gradients * again, self.shape.head * self.item * self.head_trains
        saved = {"activations": activations, "cast weights": casts}
        # First the head's gradient, cast to its dtype. One that is not tied is added to what is there, and gone.
        cast = head if self.item < FP32 else 0
        handed = saved | {"gradients": before + self.head_gradient + cast, "transient": self.rows(one)}
        # An fp32 embedding adds its rows to what its parameter holds (lean.scatter_gradient). One of less makes V x H
        # at the last, for which a tied head's gradient has waited, as autograd adds up before it stores.
        scatters = self.item == FP32
        waits = head * (not again or (self.shape.tied and not scatters))
        start = saved | {"gradients": before + waits, "transient": self.backward(one.student) + self.rows(one)}
        if self.rank:
            return [handed, start]
        embedding = self.w * self.shape.head
        late = 0 if scatters else embedding * (again + self.shape.tied)
        there = scatters and (self.shape.tied or again)  # before the last
        end = {"gradients": self.gradients + late, "transient": one.student * self.shape.hidden * self.w}
        block = {  # the first block's backward: all gradients but its own and the embedding's
            "gradients": self.gradients + late - embedding * (not there) - self.w * self.shape.block,
            "activations": (activations + casts) // self.shape.layers,
            "transient": self.backward(one.student),
        }
        return [handed, start, block, end]


class SimulatedCosts(Costs):
    """What the closed forms do not know, by simulation on fake tensors.

    The passes are run at the fewest and at the most tokens a micro-batch can have. Between the two the peaks are
    taken to lie on a line; the true ones, the larger of several lines at each point, lie on it or below.
    """

    def __init__(self, shape: ModelShape, config: Config, machine: Machine, packed: bool, work: Work) -> None:
        super().__init__(shape, config, machine, packed)
        if shape.config is None:
            raise SdftError(f"model of type {shape.family!r}: the plan needs its Hugging Face config to simulate it")
        import torch

        from sdft.planning.simulate import count, simulate

        total, trains = count(shape.config, config)
        self._parameters, self._trained = total, trains
        compute = torch.bfloat16 if self.c == BF16 else torch.float32
        self.ends = []
        for budget in (max(work.sizes), max(sum(work.sizes), max(work.sizes) + 1)):
            one = share_of(work, budget)
            teacher = (one.teacher,) if one.teacher else ()
            args = (shape.config, config, compute, (one.student,), teacher, one.rows, packed, machine.kind)
            self.ends.append((one.student, [simulate(*args, micro_batches=n) for n in (1, 2)]))

    @property
    def trained(self) -> int:
        return self._trained

    @property
    def weights(self) -> int:
        base = self._parameters - (self._trained if self.rank else 0)
        return math.ceil(
            base * (NF4 if self.config.model.quantize == "4bit" else self.w)
        ) + FP32 * self._trained * bool(self.rank)

    def peak(self, name: str, tokens: int, again: bool = False) -> int:
        """A peak of simulate.Peaks at T tokens of the student, between the two that were run."""
        (low, at_low), (high, at_high) = ((tokens, getattr(peaks[again], name)) for tokens, peaks in self.ends)
        return math.ceil(at_low + (at_high - at_low) * (tokens - low) / (high - low))

    def scoring(self, one: Pass) -> list[dict[str, int]]:
        parts = [{"activations": self.peak("student", one.student)}]
        if one.teacher:
            parts.append({"transient": self.peak("teacher", one.student), "cast weights": self.swapped})
        return parts

    def losing(self, one: Pass) -> dict[str, int]:
        return {"activations": self.peak("loss", one.student), "loss": self.loss(one.rows)}

    def descending(self, one: Pass, again: bool) -> list[dict[str, int]]:
        most = self.peak("backward", one.student, again)
        return [{"gradients": self.gradients, "activations": max(0, most - self.gradients)}]

    def unreturned(self, one: Pass) -> dict[str, int]:
        return {"transient": self.peak("student", one.student) // RETURNS[1]} if self.machine.kind == "cpu" else {}

    def rollout(self, prompts: int, prompt: int, new: int) -> dict[str, int]:
        parts = super().rollout(prompts, prompt, new)
        # The teacher's forward, by tokens: a prompt's costs the same.
        forward = self.peak("teacher" if any(p.teacher for _, (p, _) in self.ends) else "student", prompts * prompt)
        return parts | {"transient": max(parts["transient"], forward)}


def costs_of(shape: ModelShape, config: Config, work: Work, machine: Machine) -> Costs:
    """Closed forms where they hold, the simulation where not."""
    known = shape.family in FAMILIES and config.model.attention != "eager"
    packed = known and config.train.packing != "off"
    names = (*shape.linears, "all-linear", "lm_head", "embed_tokens")
    plain = not config.lora.rank or (
        not config.lora.dora
        and not config.lora.dropout
        and {*config.lora.targets, *config.lora.modules_to_save} <= {*names}
    )
    if known and plain:
        return Costs(shape, config, machine, packed)
    return SimulatedCosts(shape, config, machine, packed, work)


def passes_of(config: Config, work: Work, packed: bool) -> list[Pass]:
    """The micro-batches of a step."""

    def tokens(prompts: Sequence[int], group: list[int]) -> int:
        lengths = [prompts[i] + work.completions[i] - 1 for i in group]  # the last token predicts nothing
        return sum(lengths) if packed else len(lengths) * max(lengths)

    return [
        Pass(
            tokens(work.prompts, group),
            tokens(work.teacher_prompts, group) if work.teacher_prompts else 0,
            sum(work.completions[i] for i in group),
        )
        for group in micro_batches(work.sizes, config.train.micro_batch_tokens, packed)
    ]


def share_of(work: Work, budget: int) -> Pass:
    """A micro-batch of `budget` tokens that holds the step's prompts and answers in their proportion."""
    whole = sum(work.sizes)
    parts = (work.prompts, work.teacher_prompts, work.completions)
    prompt, shown, answer = (budget * sum(part) / whole for part in parts)
    return Pass(math.ceil(prompt + answer), math.ceil(shown + answer) if work.teacher_prompts else 0, math.ceil(answer))
