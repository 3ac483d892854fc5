"""The teacher that follows the student: phi += alpha (theta - phi) after every update, in fp32 for every dtype.

In bfloat16 an average would never move: at alpha = 0.01 a step is below the rounding. With LoRA, the factors A and B
are averaged, not their product.

With `offload` the averages live in CPU memory and the device holds a copy of them in the dtype of the weights: 2 bytes
a weight instead of 4 if they are bfloat16. A thread brings every new student to the host, averages, and sends the
result back, while the device samples the next completions.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from sdft.config import TeacherConfig
from sdft.model.language_model import LanguageModel
from sdft.score.teacher import Teacher, base_teacher
from sdft.update.offload import HostWorker, cut_into_parts, views_of_part


def make_teacher(model: LanguageModel, config: TeacherConfig, other: Mapping[str, Tensor] | None = None) -> Teacher:
    """The teacher of a stage, which starts from the student in memory, also after an earlier stage.

    other: weights of another model (`other_weights`), which a teacher of kind `base` then holds instead.
    """
    if config.kind == "ema":
        return AveragedTeacher(model, config.ema_alpha, config.offload)
    return base_teacher(model, other) if config.kind == "base" else Teacher(model)


class AveragedTeacher(Teacher):
    """The moving average of the student's weights."""

    def __init__(self, model: LanguageModel, alpha: float, offload: bool = False) -> None:
        self.alpha = alpha
        self.offloaded = offload
        own = {name: p.detach() for name, p in model.trainable().items()}
        host = torch.device("cpu") if offload else None
        self.masters = {name: p.to(host, torch.float32, copy=True).contiguous() for name, p in own.items()}
        self.origin = {name: _sample(p).float().clone() for name, p in own.items()}
        # With offload: the sample of the masters, averaged on the device, so that `tracked` waits for nothing.
        self.sampled = {name: t.clone() for name, t in self.origin.items()} if offload else {}
        self.pending: Future[None] | None = None
        # What the model holds while the teacher scores; with offload, the device's copies.
        super().__init__(
            model, "ema", {name: p.clone().contiguous() for name, p in own.items()} if offload else self.masters
        )
        if offload:
            self.host = HostWorker(model.device)
            self.worker = ThreadPoolExecutor(1, "teacher")

    @torch.no_grad()
    def update(self) -> None:
        """phi += alpha (theta - phi), in fp32.

        With offload it returns at once: whatever reads the teacher waits for the average, and the student's weights
        must not change before `wait`.
        """
        self.wait()
        parameters = self.model.trainable()
        masters = [self.masters[name] for name in parameters]
        student = [p.detach().contiguous() for p in parameters.values()]
        if not self.offloaded:
            for part in cut_into_parts([m.numel() for m in masters]):
                _average(views_of_part(masters, part), views_of_part(student, part), self.alpha)
            return
        _average([self.sampled[name] for name in parameters], [_sample(p) for p in student], self.alpha)
        self.host.wait_for_device()
        copies = [self.tensors[name] for name in parameters]
        self.pending = self.worker.submit(self._average_on_host, masters, student, copies)

    @torch.no_grad()
    def _average_on_host(self, masters: list[Tensor], student: list[Tensor], copies: list[Tensor]) -> None:
        parts = list(cut_into_parts([m.numel() for m in masters]))

        def work(number: int, host: list[Tensor]) -> list[Tensor]:
            own = views_of_part(masters, parts[number])
            _average(own, host, self.alpha)
            for buffer, master in zip(host, own, strict=True):
                buffer.copy_(master)  # back through the pinned memory that the student came in
            return host

        self.host.run([(views_of_part(student, part), views_of_part(copies, part)) for part in parts], work)

    def wait(self) -> None:
        """Until the last update's average is there (offload). Raises what went wrong in it, each time."""
        if self.pending is not None:
            self.pending.result()
            self.host.make_device_wait()
            self.pending = None

    @torch.no_grad()
    def tracked(self) -> Tensor:
        """The part of the student's way since the start that the teacher has gone too; 0-dim, on the device.

        <phi - theta_0, theta - theta_0> / |theta - theta_0|^2 over a fixed sample of the weights, so that no whole copy
        of theta_0 is kept. An average that stays near 0 teaches like `base`. Waits for nothing, also with offload.
        """
        sampled = self.sampled or {name: _sample(master) for name, master in self.masters.items()}
        pairs = [
            (_sample(p.detach()).float() - self.origin[name], sampled[name] - self.origin[name])
            for name, p in self.model.trainable().items()
        ]
        along = torch.stack([(student * teacher).sum() for student, teacher in pairs]).sum()
        whole = torch.stack([(student * student).sum() for student, _ in pairs]).sum()
        return along / whole.clamp(min=1e-30)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a resumed teacher needs; the same with and without offload."""
        self.wait()
        masters = {f"masters.{name}": tensor for name, tensor in self.masters.items()}
        return masters | {f"origin.{name}": tensor for name, tensor in self.origin.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` of another average of the same model returned."""
        super().load_state(state)
        if self.offloaded:
            for name, master in self.masters.items():
                self.tensors[name].copy_(master)
                self.sampled[name].copy_(_sample(master))


def _average(masters: list[Tensor], student: list[Tensor], alpha: float) -> None:
    """masters (fp32) += alpha (student - masters), in place; a temporary only if the student is not fp32."""
    for master, tensor in zip(masters, student, strict=True):
        master.lerp_(tensor.float(), alpha)


def _sample(tensor: Tensor, size: int = 1024) -> Tensor:
    """About `size` entries, evenly spread; always the same ones."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // size)]
