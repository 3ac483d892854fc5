"""What a micro-batch holds at its peaks, by running it on fake tensors: shapes and lifetimes, no memory, no arithmetic.

Knows any family that loads. It is the truth that the closed forms of plan.py are tested against, and what they fall
back on. Legend: T tokens of a forward pass, N completion tokens, H hidden size, V vocabulary.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdft.config import Config
from sdft.model import lean
from sdft.model.attention import attend
from sdft.model.loading import DTYPES, LanguageModel, add_lora, disable_dropout, enable_gradient_checkpointing

ATTENTION = "sdft_simulated"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, each once, until nothing refers to them any more.

    Gradients, saved tensors and temporaries all count; what existed before is left out.
    """

    def __init__(self, existing: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, Any] = {t.untyped_storage()._cdata: None for t in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen:
                size = storage.nbytes()
                self.seen[storage._cdata] = weakref.finalize(storage, self._drop, storage._cdata, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _drop(self, key: int, size: int) -> None:
        del self.seen[key]
        self.now -= size

    def take_peak(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.now
        return peak


@dataclass(frozen=True)
class Peaks:
    """Bytes beyond the weights and what a run always holds, in the first micro-batch of a step or in a later one."""

    teacher: int  # most during the teacher's forward
    saved: int  # left by the student's forward
    student: int  # most during it
    loss: int  # most during the loss, work space apart
    backward: int  # most during the backward pass, the gradients included
    gradients: int  # left by it


class _FusedLoss(torch.autograd.Function):
    """The lifetimes of the fused loss: both gradients made in the forward, none of its work space."""

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


def simulate(
    lm_config: Any, config: Config, compute: torch.dtype, student: Sequence[int], teacher: Sequence[int], rows: int,
    packed: bool, kind: str = "cuda", micro_batches: int = 1,
) -> Peaks:  # fmt: skip
    """Peaks of the last of `micro_batches` equal ones.

    lm_config: a Hugging Face config. student, teacher: tokens of each sequence's forward pass on that side (teacher
    may be empty). rows: completion tokens N. packed: end to end, or padded to the longest. kind: of device,
    whose attention is used.
    """
    model = _model(lm_config, config, compute, kind)
    with FakeTensorMode(allow_non_fake_inputs=False):
        _fill(model.lm)
        existing = [*model.lm.parameters(), *model.lm.buffers()]
        sums = _accumulate_in_place(model.trainable().values())
        with LiveBytes(existing) as live:
            for _ in range(micro_batches):
                for parameter in sums:
                    parameter.grad = None
                peaks = _micro_batch(model, live, student, teacher, rows, packed)
    return peaks


def count(lm_config: Any, config: Config) -> tuple[int, int]:
    """Entries of all weights, adapters included, and of those that train."""
    parameters = list(_model(lm_config, config, torch.float32).lm.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _micro_batch(
    model: LanguageModel, live: LiveBytes, student: Sequence[int], teacher: Sequence[int], rows: int, packed: bool
) -> Peaks:
    def hidden(lengths: Sequence[int]) -> Tensor:  # (N, H)
        shape = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
        ids = torch.zeros(shape, dtype=torch.int64)
        where = torch.zeros(rows, dtype=torch.int64)
        with model.autocast():
            out = (
                model.inner.base_model
                if model.lm is model.inner
                else getattr(model.inner, model.inner.base_model_prefix)
            )
            extra = {"lengths": tuple(lengths)} if packed else {}
            full = out(input_ids=ids, use_cache=False, **extra).last_hidden_state
        return full.flatten(0, 1).index_select(0, where)

    live.take_peak()
    teacher_hidden = None
    if teacher:
        model.lm.eval()
        with torch.no_grad():
            teacher_hidden = hidden(teacher)
        model.lm.train()
    infer = live.take_peak()
    before = live.now
    x = hidden(student)
    saved, most = live.now - before, live.take_peak()
    head = model.inner.get_output_embeddings().weight
    # Autograd keeps a tied head's gradient until the embedding's comes, and adds it in place. Under a dispatch mode it
    # would add out of place: the gradient is kept here instead.
    embedding = model.inner.get_input_embeddings()
    tied = head is embedding.weight and not lean.scatters(embedding)
    loss, dw = _FusedLoss.apply(x, head, tied)
    in_loss = live.take_peak()
    if tied:
        dw = dw.to(head.dtype)
    else:
        del dw
    del x
    loss.backward()
    del loss, teacher_hidden
    dw = None
    return Peaks(infer, saved, most, in_loss, live.take_peak(), live.now)


def _accumulate_in_place(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Gradients that autograd stores, the sums of all micro-batches; those of a later one are dropped when they come.

    That is as if added in place, what autograd does with plain tensors; fake ones it would add out of place, so no
    parameter may hold a sum when a micro-batch begins.
    """
    sums: dict[nn.Parameter, Tensor] = {}

    def keep(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        parameter.grad = sums.setdefault(parameter, parameter.grad)

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(keep)
    return sums


def _model(lm_config: Any, config: Config, compute: torch.dtype, kind: str = "cuda") -> LanguageModel:
    """The model as train.py sets it up, on the meta device."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, _attend_on_cpu if kind == "cpu" else _attend)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(
            lm_config, dtype=DTYPES[config.model.weights_dtype], attn_implementation=ATTENTION
        )
        disable_dropout(lm)
        lean.install(lm)
        model = LanguageModel(lm, torch.device("cpu"), compute, 0, (0,))
        if config.lora.rank:
            add_lora(model, config.lora, 0)
        lean.scatter_gradient(lm.get_input_embeddings())
    if config.model.gradient_checkpointing:
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
    """Attention without a mask, a sequence at a time where `lengths` are given: (B, heads, T, D) -> (B, T, heads, D).

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
    """The trainer's own, which has a rule of its own for the CPU."""
    return attend(module, query, key, value, None, **options)
