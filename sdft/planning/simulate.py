"""What a micro-batch holds at its peaks, by running it on fake tensors: shapes and lifetimes, no memory, no arithmetic.

Any family that loads can be simulated. A few of the model's layers are enough: what each further layer adds is the same
(depth.py). Legend: T tokens of a forward pass, N completion tokens, H hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from sdft.config import LoraConfig, ModelConfig
from sdft.model import lean
from sdft.model.activations import enable_gradient_checkpointing, is_weight
from sdft.model.attention import attend
from sdft.model.language_model import LanguageModel, backbone
from sdft.model.loading import DTYPES, disable_dropout
from sdft.model.lora import add_lora
from sdft.planning.live_bytes import LiveBytes
from sdft.planning.work import Pass

ATTENTION = "sdft_simulated"
UNPLANNABLE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)

Peaks = dict[tuple[str, str], dict[str, int]]  # (phase, place in it) -> bytes at the peak, by use


@dataclass(frozen=True)
class Counts:
    """Entries of a model's weights."""

    frozen: int  # those that do not train
    trained: int
    matrices: int  # of the frozen ones, in linear layers other than the head: what quantization makes smaller

    def at_depth(self, more: "Counts", layers: int, more_layers: int, depth: int) -> "Counts":
        """These are of `layers` layers, `more` of `more_layers`; the counts of `depth` layers."""
        mine, theirs = (self.frozen, self.trained, self.matrices), (more.frozen, more.trained, more.matrices)
        steps, gap = depth - layers, more_layers - layers
        return Counts(*(a + (b - a) * steps // gap for a, b in zip(mine, theirs, strict=True)))


class Simulation:
    """A model on fake tensors that runs micro-batches."""

    def __init__(
        self,
        lm_config: Any,
        model: ModelConfig,
        lora: LoraConfig,
        compute: torch.dtype,
        packed: bool,
        kind: str,  # of device, whose attention is used
    ) -> None:
        self.packed, self.offload = packed, model.activation_offload
        self.model = _model(lm_config, model, lora, compute, kind)
        self.mode = FakeTensorMode(allow_non_fake_inputs=False)
        self.live: LiveBytes | None = None
        self.phase = ""
        with self.mode:
            _fill(self.model.lm)
        for parameter in self.model.trainable().values():
            parameter.register_post_accumulate_grad_hook(self._gradient_is_complete)
        self._watch_blocks()

    @property
    def counts(self) -> Counts:
        parameters = list(self.model.lm.parameters())
        head = self.model.inner.get_output_embeddings()
        linears = [m.weight for m in self.model.lm.modules() if isinstance(m, nn.Linear) and m is not head]
        return Counts(
            sum(p.numel() for p in parameters if not p.requires_grad),
            sum(p.numel() for p in parameters if p.requires_grad),
            sum(w.numel() for w in linears if not w.requires_grad),
        )

    def micro_batch(self, one: Pass) -> tuple[Peaks, Peaks]:
        """The peaks of a micro-batch, beyond the weights and what a run always holds.

        First the peaks of a step's first micro-batch, then of a later one, which adds its gradients to earlier ones.
        Phases: teacher, student, loss, backward.
        """
        with self.mode, LiveBytes([*self.model.lm.parameters(), *self.model.lm.buffers()]) as live:
            self.live = live
            self._run(live, one)
            self.live = None
            for parameter in self.model.trainable().values():
                parameter.grad = None
        return _by_phase(live.peaks()), _by_phase(live.peaks(again=True))

    def prompt_pass(self, tokens: int) -> int:
        """Most bytes at once during a forward pass without gradients."""
        with self.mode, LiveBytes([*self.model.lm.parameters(), *self.model.lm.buffers()]) as live, torch.no_grad():
            self.model.lm.eval()
            self._hidden(tokens, 1, 1)
            self.model.lm.train()
        return live.take_peak()

    def _gradient_is_complete(self, parameter: nn.Parameter) -> None:
        if self.live is not None and parameter.grad is not None:
            self.live.add_to_sum(parameter.grad)

    def _run(self, live: LiveBytes, one: Pass) -> None:
        teacher_hidden = None
        if one.teacher:
            self._begin("teacher")
            self.model.lm.eval()
            with torch.no_grad():
                teacher_hidden = self._hidden(one.teacher, one.sequences, one.rows)
            self.model.lm.train()
        self._begin("student")
        with (
            torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host) if self.offload else contextlib.nullcontext()
        ):
            x = self._hidden(one.student, one.sequences, one.rows)
        live.name_rest("activations")
        for kept in (x, teacher_hidden):
            if kept is not None:
                live.name(kept, "transient")
        self._begin("loss")
        head = self.model.inner.get_output_embeddings().weight
        # Autograd keeps a tied head's gradient until the embedding's comes, and adds it in place. Under a dispatch mode
        # it would add out of place: the gradient is kept here instead.
        tied = head is self.model.inner.get_input_embeddings().weight
        loss, dw = _FusedLoss.apply(x, head, tied)
        live.name(dw, "gradients")
        if tied:
            dw = dw.to(head.dtype)
            live.name(dw, "gradients")
        else:
            del dw
        self._begin("backward")
        del x
        loss.backward()
        del loss, teacher_hidden
        dw = None

    def _hidden(self, tokens: int, sequences: int, rows: int) -> Tensor:  # (N, H)
        ids = torch.zeros((sequences, tokens // sequences), dtype=torch.int64)
        with self.model.autocast():
            extra = {"lengths": (tokens,)} if self.packed else {}
            full = backbone(self.model.inner)(input_ids=ids, use_cache=False, **extra).last_hidden_state
        return full.flatten(0, 1).index_select(0, torch.zeros(rows, dtype=torch.int64))

    # Where in a pass a peak is: before the first layer, in one of the layers, or after the last.

    def _begin(self, phase: str, place: str = "before") -> None:
        self.phase = phase
        if self.live is not None:
            self.live.begin(f"{phase}/{place}")

    def _watch_blocks(self) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        blocks = [m for m in self.model.lm.modules() if isinstance(m, GradientCheckpointingLayer)]
        half = len(blocks) // 2
        for i, block in enumerate(blocks):
            # Layers are counted from the nearer end: depth.py compares models of different depths by these names.
            place = f"layer {i}" if i < half else f"layer {i - len(blocks)}"
            block.register_forward_pre_hook(self._at_block_input(place, first=i == 0), with_kwargs=True)
            block.register_forward_hook(self._at_block_output(place, last=i == len(blocks) - 1))

    def _at_block_input(self, place: str, first: bool) -> Any:
        def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
            if self.phase == "backward":  # gradient checkpointing computes the layer again
                return
            self._begin(self.phase, place)
            hidden = args[0] if args else kwargs["hidden_states"]
            if first and hidden.requires_grad:
                hidden.register_hook(lambda _: self._begin("backward", "after"))

        return enter

    def _at_block_output(self, place: str, last: bool) -> Any:
        def leave(block: nn.Module, args: Any, output: Any) -> None:
            if self.phase == "backward":
                return
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self._begin("backward", place))
            if last:
                self._begin(self.phase, "after")

        return leave


def _by_phase(peaks: dict[str, dict[str, int]]) -> Peaks:
    return {(span.partition("/")[0], span.partition("/")[2]): uses for span, uses in peaks.items() if span}


class _FusedLoss(torch.autograd.Function):
    """The lifetimes of the fused loss: both gradients made in the forward, without its workspace."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tied: bool) -> tuple[Tensor, Tensor]:
        ctx.dx = torch.empty_like(hidden)  # (N, H)
        dw = torch.empty(weight.shape if weight.requires_grad else 0, dtype=torch.float32)  # (V, H)
        ctx.dw, ctx.dtype = None if tied or not weight.requires_grad else dw, weight.dtype
        ctx.mark_non_differentiable(dw)
        ctx.set_materialize_grads(False)
        return hidden.new_zeros((), dtype=torch.float32), dw

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        dx, dw = ctx.dx, ctx.dw
        del ctx.dx, ctx.dw
        return dx, None if dw is None else dw.to(ctx.dtype), None


def _to_host(tensor: Tensor) -> Any:
    """model.activation_offload: what a forward saves leaves the device, weights excepted."""
    return tensor if is_weight(tensor) else (tensor.shape, tensor.dtype)


def _from_host(kept: Any) -> Tensor:
    return kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1])


class _Unpacked(torch.autograd.Function):
    """x W^T by a 4-bit W, which is unpacked for every product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.to(x.dtype, copy=True).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.to(grads[0].dtype, copy=True), None


class _Linear4bit(nn.Linear):
    """The lifetimes of bitsandbytes' 4-bit layer, with weights whose own bytes do not count here."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = lean.autocast_dtype(input)
        out = _Unpacked.apply(input.to(dtype), self.weight)
        return out if self.bias is None else out + self.bias.to(dtype)


def _model(lm_config: Any, config: ModelConfig, lora: LoraConfig, compute: torch.dtype, kind: str) -> LanguageModel:
    """The model as the trainer sets it up, on the meta device."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, _attend_on_cpu if kind == "cpu" else _attend)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(
            lm_config,
            dtype=DTYPES[config.weights_dtype],
            attn_implementation="eager" if config.attention == "eager" else ATTENTION,
        )
        disable_dropout(lm)
        if config.quantize == "4bit":
            head = lm.get_output_embeddings()
            for module in lm.modules():
                if type(module) is nn.Linear and module is not head:
                    module.__class__ = _Linear4bit
        lean.install(lm)
        model = LanguageModel(lm, torch.device("cpu"), compute, 0, (0,))
        if lora.rank:
            add_lora(model, lora, 0)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    model.lm.train()
    return model


def _fill(lm: nn.Module) -> None:
    """Puts a fake CPU tensor in the place of every meta tensor; tied ones stay one."""
    made: dict[Tensor, Tensor] = {}
    for module in lm.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                if old not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                table[name] = made[old]  # type: ignore[assignment]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    lengths: Sequence[int] | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention without a mask, a sequence at a time if `lengths` are given: (B, heads, T, D) -> (B, T, heads, D).

    transformers makes masks of T x T wherever it cannot look at values, as in fake tensors.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, None, **options)
    parts = zip(*(x.split(list(lengths), dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in parts], dim=1), None


def _attend_on_cpu(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The trainer's attention, which differs on the CPU."""
    return attend(module, query, key, value, None, **options)
