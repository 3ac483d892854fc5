"""The teacher: the student's own weights, an average of them, or a copy from the start of the stage.

One mechanism for full fine-tuning and LoRA: the teacher holds its own tensor for every parameter that trains and
shares the rest. To score, its tensors are put in place of the student's for the length of a forward pass, so a
second module never exists. With LoRA, `ema` therefore averages the factors A and B, not their product, and `base`
holds nothing at all where the adapter is fresh: to switch it off is to go back to the start.

With `offload` the averages live in CPU memory and the device holds a copy of them in the dtype of the weights:
2 bytes a weight instead of 4 where they are bfloat16. A thread brings every new student to the host, averages, and
sends the result back, while the device samples the next answers.

With `teacher.model` the teacher's tensors are not the student's at the start but another model's of the same
architecture, an earlier stage's say; the module is the student's all the same.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdft.config import Config, ModelConfig, TeacherConfig
from sdft.errors import SdftError
from sdft.model import loading, lora
from sdft.model.loading import Head, LanguageModel
from sdft.offload import HostLane, buckets, pieces
from sdft.score.batch import Batch

# Of a model's config: what a forward pass depends on, and no name or shape of a weight tells.
UNSEEN = (
    "model_type", "num_attention_heads", "num_key_value_heads", "hidden_act", "rope_parameters", "sliding_window",
    "final_logit_softcapping", "logit_scale", "logits_scaling",
)  # fmt: skip


class Teacher:
    """`base`, `ema` or `live` behind two methods: hidden(batch) and update()."""

    def __init__(self, model: LanguageModel, config: TeacherConfig, other: dict[str, Tensor] | None = None) -> None:
        """Starts from the student as it is in memory, also after an earlier stage; or from `other_weights`."""
        self.model = model
        self.kind = config.kind
        self.alpha = config.ema_alpha
        self.masters: dict[str, Tensor] = {}
        self.origin: dict[str, Tensor] = {}
        self.copies: dict[str, Tensor] = {}  # offload: what the device holds of the masters, in the weights' dtype
        self.sampled: dict[str, Tensor] = {}  # offload: _sample of the masters, averaged on the device
        self.pending: Future[None] | None = None
        self.adapter_off = self.kind == "base" and lora.is_fresh(model.lm)
        if self.kind != "live" and not self.adapter_off:
            # fp32 also where the weights are bf16: at alpha = 0.01 a bf16 average never moves (design section 4).
            dtype = torch.float32 if self.kind == "ema" else None
            host = torch.device("cpu") if config.offload and self.kind == "ema" else None
            own = {k: p.detach() for k, p in model.trainable().items()}
            self.masters = {k: p.to(host, dtype, copy=True).contiguous() for k, p in own.items() if other is None}
            self.masters |= {k: t.to(model.device).contiguous() for k, t in (other or {}).items()}
            self.origin = {k: _sample(p).float().clone() for k, p in own.items()}
        if config.offload and self.kind == "ema":
            self.copies = {k: p.detach().clone().contiguous() for k, p in model.trainable().items()}
            self.sampled = {k: t.clone() for k, t in self.origin.items()}
            self.lane = HostLane(model.device)
            self.worker = ThreadPoolExecutor(1, "teacher")

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """Within it, the model holds the teacher's weights. No student graph may be alive."""
        if self.adapter_off:
            with lora.switched_off(self.model.lm):
                yield
            return
        parameters = self.model.trainable() if self.masters else {}
        self.wait()
        shown = self.copies or self.masters
        own = {name: parameters[name].data for name in parameters}
        try:
            for name, parameter in parameters.items():
                # The pointer is exchanged, not the values: nothing is copied, and views keep their storage.
                parameter.data = shown[name].to(own[name].dtype)
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = own[name]

    @torch.no_grad()
    def hidden(self, batch: Batch) -> tuple[Tensor, Head]:
        """The teacher's hidden states (N, H) for the batch's completion rows, and its head; no gradient."""
        with self.weights():
            with self.model.evaluating():
                hidden = batch.select(self.model.hidden(batch.input_ids, batch.lengths))
            head = self.model.head()
            # detach() keeps hold of the teacher's storage after the student's is back in the parameter.
            bias = None if head.bias is None else head.bias.detach()
            return hidden, Head(head.weight.detach(), bias, head.scale, head.softcap)

    @torch.no_grad()
    def update(self) -> None:
        """phi += alpha (theta - phi), in fp32 (`ema`); nothing otherwise.

        With `offload` it returns at once: whatever reads the teacher waits for the average, and the student's
        weights must not change before `wait`.
        """
        if self.kind != "ema":
            return
        self.wait()
        parameters = self.model.trainable()
        masters = [self.masters[name] for name in parameters]
        student = [p.detach().contiguous() for p in parameters.values()]
        if not self.copies:
            for part in buckets([m.numel() for m in masters]):
                _average(pieces(masters, part), pieces(student, part), self.alpha)
            return
        _average([self.sampled[name] for name in parameters], [_sample(p) for p in student], self.alpha)
        self.lane.follow_device()
        copies = [self.copies[name] for name in parameters]
        self.pending = self.worker.submit(self._average_on_host, masters, student, copies)

    @torch.no_grad()
    def _average_on_host(self, masters: list[Tensor], student: list[Tensor], copies: list[Tensor]) -> None:
        parts = list(buckets([m.numel() for m in masters]))

        def work(number: int, host: list[Tensor]) -> list[Tensor]:
            own = pieces(masters, parts[number])
            _average(own, host, self.alpha)
            for buffer, master in zip(host, own, strict=True):
                buffer.copy_(master)  # back through the pinned memory the student came in
            return host

        self.lane.each([(pieces(student, part), pieces(copies, part)) for part in parts], work)

    def wait(self) -> None:
        """Until the last update's average is there (`offload`); raises what went wrong in it, each time."""
        if self.pending is not None:
            self.pending.result()
            self.lane.lead_device()
            self.pending = None

    @torch.no_grad()
    def tracked(self) -> Tensor:
        """Fraction of the student's way since the start that the teacher has gone too; 0-dim, on the device.

        <phi - theta_0, theta - theta_0> / |theta - theta_0|^2 over a fixed sample of the weights, so that no whole
        copy of theta_0 is kept. 0 for `base`, 1 for `live`; an EMA that stays near 0 teaches like `base`. Waits for
        nothing: with `offload` the sample is averaged on the device too.
        """
        device = self.model.device
        if self.kind != "ema":
            return torch.full((), float(self.kind == "live"), device=device)
        sampled = self.sampled or {name: _sample(master) for name, master in self.masters.items()}
        pairs = [
            (_sample(p.detach()).float() - self.origin[name], sampled[name] - self.origin[name])
            for name, p in self.model.trainable().items()
        ]
        along = torch.stack([(student * teacher).sum() for student, teacher in pairs]).sum()
        whole = torch.stack([(student * student).sum() for student, _ in pairs]).sum()
        return along / whole.clamp(min=1e-30)

    def state(self) -> dict[str, Tensor]:
        """Every tensor a resumed teacher needs, for safetensors; the same with and without `offload`."""
        self.wait()
        return {f"masters.{k}": t for k, t in self.masters.items()} | {f"origin.{k}": t for k, t in self.origin.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` of a teacher of the same kind and model returned."""
        if self.kind == "base" and not state:
            self.adapter_off, self.masters, self.origin = True, {}, {}
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        for name, copy in self.copies.items():
            copy.copy_(self.masters[name])
            self.sampled[name].copy_(_sample(self.masters[name]))


def _average(masters: list[Tensor], student: list[Tensor], alpha: float) -> None:
    """masters (fp32) += alpha (student - masters), in place; a temporary only where the student is not fp32."""
    torch._foreach_lerp_(masters, [t.float() for t in student], alpha)


def _sample(tensor: Tensor, size: int = 1024) -> Tensor:
    """About `size` entries, evenly spread; always the same ones."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // size)]


# Another model's weights (teacher.model).


def check_other(config: Config, tokenizer: Any) -> None:
    """Raises SdftError, before any weight is loaded, where teacher.model has another tokenizer than the model."""
    theirs = _load_other(config, loading.load_tokenizer)[0]
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise SdftError(
            f"teacher.model = {config.teacher.model!r} has another tokenizer than model.name = {config.model.name!r}; "
            "the teacher scores the student's tokens, so both must have the same"
        )


def other_weights(config: Config, model: LanguageModel) -> dict[str, Tensor]:
    """The weights of teacher.model, on the CPU in the dtype of the model's, by the names of the model's; an adapter is
    merged into its base. Raises SdftError where they do not fit the model."""
    other = _load_other(config, lambda settings: loading.load_unchecked(settings, *loading.load_tokenizer(settings)))
    if hasattr(other.lm, "peft_config"):
        loading.merge_adapter(other)
    where = f"teacher.model = {config.teacher.model!r} does not fit model.name = {config.model.name!r}"
    mine, theirs = (m.inner.config.get_text_config() for m in (model, other))
    for key in UNSEEN:
        if getattr(theirs, key, None) != getattr(mine, key, None):
            raise SdftError(
                f"{where}: {key} is {getattr(theirs, key, None)!r} there and {getattr(mine, key, None)!r} here"
            )
    weights, own = {name: p.detach() for name, p in other.lm.named_parameters()}, model.trainable()
    if odd := sorted(weights.keys() ^ own.keys()):
        raise SdftError(f"{where}: only one of them has {odd[0]}")
    for name, parameter in own.items():
        if weights[name].shape != parameter.shape:
            raise SdftError(f"{where}: {name} is {tuple(weights[name].shape)} there and {tuple(parameter.shape)} here")
    return weights


def _load_other(config: Config, load: Callable[[ModelConfig], Any]) -> Any:
    """load() by the model's settings with the teacher's name; errors name the right setting."""
    # On the CPU: the device has no room for a second model beside the teacher's tensors.
    try:
        return load(replace(config.model, name=config.teacher.model, device="cpu", attention="auto"))
    except SdftError as error:
        raise SdftError(str(error).replace("model.name", "teacher.model")) from error
