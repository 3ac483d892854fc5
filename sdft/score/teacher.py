"""The teacher's hidden states: the student's module with other weights in it, for the length of a forward pass.

One mechanism for full fine-tuning and LoRA: a teacher has its own tensor for every parameter that trains and shares the
rest, so a second module never exists. `base` holds a copy of the weights at the start of the stage, or another model's
(teacher.model); if the adapter is fresh, `base` holds nothing, since the start is the adapter switched off. `live` is
the student. `ema`, whose tensors move, is in sdft.update.ema.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sdft.config import Config, ModelConfig
from sdft.errors import SdftError
from sdft.model import loading, lora
from sdft.model.language_model import Head, LanguageModel
from sdft.score.batch import Batch

# What a forward pass depends on in a model's config without a trace in the names and shapes of the weights.
CONFIG_KEYS = (
    "model_type", "num_attention_heads", "num_key_value_heads", "hidden_act", "rope_parameters", "sliding_window",
    "final_logit_softcapping", "logit_scale", "logits_scaling",
)  # fmt: skip


class Teacher:
    """A teacher whose weights stand still: `base`, or the student itself (`live`)."""

    def __init__(
        self,
        model: LanguageModel,
        kind: str = "live",
        tensors: Mapping[str, Tensor] | None = None,
        adapter_off: bool = False,
    ) -> None:
        """tensors: in the place of the model's parameters of these names. adapter_off: the adapter is off instead."""
        self.model = model
        self.kind = kind
        self.tensors = dict(tensors or {})
        self.adapter_off = adapter_off

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """A context in which the model has the teacher's weights. No backward pass of the student may run in it."""
        if self.adapter_off:
            with lora.switched_off(self.model.lm):
                yield
            return
        self.wait()
        with exchanged(self.model.lm, self.tensors):
            yield

    @torch.no_grad()
    def hidden(self, batch: Batch) -> tuple[Tensor, Head]:
        """The teacher's hidden states (N, H) for the batch's completion rows, and its head; no gradient."""
        with self.weights():
            with self.model.evaluating():
                hidden = batch.select(self.model.hidden(batch.input_ids, batch.lengths))
            head = self.model.head()
            # detach() keeps the teacher's tensor after the student's is back in the module.
            bias = None if head.bias is None else head.bias.detach()
            return hidden, Head(head.weight.detach(), bias, head.scale, head.softcap)

    def update(self) -> None:
        """Follows the student after its update; this teacher does not move."""

    def wait(self) -> None:
        """Until the weights may be read; these always may."""

    def tracked(self) -> Tensor:
        """The part of the student's way since the start that the teacher has gone too; 0-dim, on the device."""
        return torch.full((), float(self.kind == "live"), device=self.model.device)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a resumed teacher needs, for safetensors."""
        return {f"masters.{name}": tensor for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` of a teacher of the same kind and model returned."""
        if self.kind == "base" and not state:
            self.adapter_off, self.tensors = True, {}
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def base_teacher(model: LanguageModel, other: Mapping[str, Tensor] | None = None) -> Teacher:
    """A teacher with the student's present weights, or with `other_weights`."""
    if other is not None:
        return Teacher(model, "base", {k: t.to(model.device).contiguous() for k, t in other.items()})
    if lora.is_fresh(model.lm):
        return Teacher(model, "base", adapter_off=True)
    own = model.trainable().items()
    return Teacher(model, "base", {k: p.detach().to(copy=True).contiguous() for k, p in own})


@contextlib.contextmanager
def exchanged(lm: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which the module's parameters of these names have these values, in the dtype of the parameters.

    Other Parameter objects stand in the module, also in every place that shares one (a tied head); nothing is copied
    unless a dtype differs. The module's objects come back unchanged: their data, their gradients, and what an
    optimizer or a graph holds of them are never touched. This is the one place where weights change places.

    Raises SdftError for sharded parameters: FSDP gathers its shards, whatever the module holds, so the module
    would compute with its original weights.
    """
    names = {id(p): name for name, p in lm.named_parameters() if name in tensors}
    places: list[tuple[nn.Module, str, nn.Parameter]] = [
        (module, attribute, parameter)
        for module in lm.modules()
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in names
    ]
    others: dict[str, nn.Parameter] = {}
    for _, _, parameter in places:
        if hasattr(parameter, "full_tensor"):
            raise SdftError("a teacher's weights cannot be exchanged with sharded parameters (DTensor)")
        name = names[id(parameter)]
        if name not in others:
            others[name] = nn.Parameter(tensors[name].to(parameter.dtype), requires_grad=False)
    try:
        for module, attribute, parameter in places:
            setattr(module, attribute, others[names[id(parameter)]])
        yield
    finally:
        for module, attribute, parameter in places:
            setattr(module, attribute, parameter)


# Another model's weights (teacher.model).


def check_other(config: Config, tokenizer: Any) -> None:
    """Raises SdftError, before any weight is loaded, if teacher.model has another tokenizer than the model."""
    theirs = _load_other(config, loading.load_tokenizer)[0]
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise SdftError(
            f"teacher.model = {config.teacher.model!r} has another tokenizer than model.name = {config.model.name!r}; "
            "the teacher scores the student's tokens, so both must have the same"
        )


def other_weights(config: Config, model: LanguageModel) -> dict[str, Tensor]:
    """The weights of teacher.model, on the CPU in the dtype of the model's weights, by the model's names.

    An adapter is merged into its base. Raises SdftError if they do not fit the model.
    """
    other = _load_other(config, lambda settings: loading.load_unchecked(settings, *loading.load_tokenizer(settings)))
    if hasattr(other.lm, "peft_config"):
        lora.merge_adapter(other)
    problem = f"teacher.model = {config.teacher.model!r} does not fit model.name = {config.model.name!r}"
    mine, theirs = (m.inner.config.get_text_config() for m in (model, other))
    for key in CONFIG_KEYS:
        if getattr(theirs, key, None) != getattr(mine, key, None):
            raise SdftError(
                f"{problem}: {key} is {getattr(theirs, key, None)!r} there and {getattr(mine, key, None)!r} here"
            )
    weights, own = {name: p.detach() for name, p in other.lm.named_parameters()}, model.trainable()
    if odd := sorted(weights.keys() ^ own.keys()):
        raise SdftError(f"{problem}: only one of them has {odd[0]}")
    for name, parameter in own.items():
        if weights[name].shape != parameter.shape:
            raise SdftError(
                f"{problem}: {name} is {tuple(weights[name].shape)} there and {tuple(parameter.shape)} here"
            )
    return weights


def _load_other(config: Config, load: Callable[[ModelConfig], Any]) -> Any:
    """load() by the model's settings with the teacher's name; errors name the right setting."""
    # On the CPU, because the device has no room for a second model and the teacher's tensors.
    try:
        return load(replace(config.model, name=config.teacher.model, device="cpu", attention="auto"))
    except SdftError as error:
        raise SdftError(str(error).replace("model.name", "teacher.model")) from error
