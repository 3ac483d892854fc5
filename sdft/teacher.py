"""The teacher: the student's own weights, an average of them, or a copy from the start of the stage.

One mechanism for full fine-tuning and LoRA: the teacher holds its own tensor for every parameter that trains and
shares the rest. To score, its tensors are put in place of the student's for the length of a forward pass, so a
second module never exists. With LoRA, `ema` therefore averages the factors A and B, not their product.
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
        # fp32 also where the weights are bf16: at alpha = 0.01 a bf16 average never moves (design section 4).
        # They stay contiguous copies on the student's device.
        self.masters: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}
        if self.kind != "live":
            dtype = torch.float32 if self.kind == "ema" else None
            self.masters = {k: p.detach().to(dtype, copy=True) for k, p in model.trainable().items()}

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """Within it, the model holds the teacher's weights. No student graph may be alive."""
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
            hidden = batch.select(self.model.hidden(batch.input_ids))
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
    def lag(self) -> Tensor:
        """|theta - phi| / |theta|: how far the student has left the teacher; 0-dim, on the device."""
        parameters = self.model.trainable()
        if not self.masters:
            return torch.zeros((), device=self.model.device)
        difference = [p.detach().float() - self.masters[name] for name, p in parameters.items()]
        apart = torch.stack(torch._foreach_norm(difference)).norm()
        whole = torch.stack(torch._foreach_norm([p.detach().float() for p in parameters.values()])).norm()
        return apart / whole.clamp(min=1e-30)
