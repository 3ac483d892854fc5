"""The teacher: the student's own weights, an average of them, or a copy from the start of the stage.

One mechanism for full fine-tuning and LoRA: the teacher holds its own tensor for every parameter that trains and
shares the rest. To score, its tensors are put in place of the student's for the length of a forward pass, so a
second module never exists. With LoRA, `ema` therefore averages the factors A and B, not their product, and `base`
holds nothing at all where the adapter is fresh: to switch it off is to go back to the start.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from sdft.batch import Batch
from sdft.config import TeacherConfig
from sdft.models import Head, LanguageModel


class Teacher:
    """`base`, `ema` or `live` behind two methods: hidden(batch) and update()."""

    def __init__(self, model: LanguageModel, config: TeacherConfig) -> None:
        """Starts from the student as it is in memory, also after an earlier stage."""
        self.model = model
        self.kind = config.kind
        self.alpha = config.ema_alpha
        self.masters: dict[str, Tensor] = {}
        self.origin: dict[str, Tensor] = {}
        self.adapter_off = self.kind == "base" and model.adapter_is_fresh()
        if self.kind != "live" and not self.adapter_off:
            # fp32 also where the weights are bf16: at alpha = 0.01 a bf16 average never moves (design section 4).
            dtype = torch.float32 if self.kind == "ema" else None
            self.masters = {k: p.detach().to(dtype, copy=True) for k, p in model.trainable().items()}
            self.origin = {k: _sample(p.detach()).float().clone() for k, p in model.trainable().items()}

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """Within it, the model holds the teacher's weights. No student graph may be alive."""
        if self.adapter_off:
            with self.model.without_adapter():
                yield
            return
        parameters = self.model.trainable() if self.masters else {}
        own = {name: parameters[name].data for name in parameters}
        try:
            for name, parameter in parameters.items():
                # The pointer is exchanged, not the values: nothing is copied, and views keep their storage.
                parameter.data = self.masters[name].to(own[name].dtype)
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = own[name]

    @torch.no_grad()
    def hidden(self, batch: Batch) -> tuple[Tensor, Head]:
        """The teacher's hidden states (N, H) for the batch's completion rows, and its head; no gradient."""
        with self.weights():
            training = self.model.lm.training
            self.model.lm.eval()
            try:
                hidden = batch.select(self.model.hidden(batch.input_ids, batch.lengths))
            finally:
                self.model.lm.train(training)
            head = self.model.head()
            # detach() keeps hold of the teacher's storage after the student's is back in the parameter.
            bias = None if head.bias is None else head.bias.detach()
            return hidden, Head(head.weight.detach(), bias, head.scale, head.softcap)

    @torch.no_grad()
    def update(self) -> None:
        """phi += alpha (theta - phi), in fp32 (`ema`); nothing otherwise."""
        if self.kind != "ema":
            return
        parameters = self.model.trainable()
        masters = [self.masters[name] for name in parameters]
        torch._foreach_lerp_(masters, [p.detach().float() for p in parameters.values()], self.alpha)

    @torch.no_grad()
    def tracked(self) -> Tensor:
        """Fraction of the student's way since the start that the teacher has gone too; 0-dim, on the device.

        <phi - theta_0, theta - theta_0> / |theta - theta_0|^2 over a fixed sample of the weights, so that no whole
        copy of theta_0 is kept. 0 for `base`, 1 for `live`; an EMA that stays near 0 teaches like `base`.
        """
        device = self.model.device
        if self.kind != "ema":
            return torch.full((), float(self.kind == "live"), device=device)
        pairs = [
            (_sample(p.detach()).float() - self.origin[name], _sample(self.masters[name]) - self.origin[name])
            for name, p in self.model.trainable().items()
        ]
        along = torch.stack([(student * teacher).sum() for student, teacher in pairs]).sum()
        whole = torch.stack([(student * student).sum() for student, _ in pairs]).sum()
        return along / whole.clamp(min=1e-30)

    def state(self) -> dict[str, Tensor]:
        """Every tensor a resumed teacher needs, for safetensors."""
        return {f"masters.{k}": t for k, t in self.masters.items()} | {f"origin.{k}": t for k, t in self.origin.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` of a teacher of the same kind and model returned."""
        if self.kind == "base" and not state:
            self.adapter_off, self.masters, self.origin = True, {}, {}
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _sample(tensor: Tensor, size: int = 1024) -> Tensor:
    """About `size` entries, evenly spread; always the same ones."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // size)]
