"""What the four trainers share: refusals at construction, and a call inside the wrapper's forward."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from trl.models.utils import _ForwardRedirection

from sdft.errors import SdftError
from sdft.integrations.trl.losses import inner
from sdft.model.language_model import LanguageModel, check_head


class Fused:
    """Refusals at construction, and a call inside the wrapper's forward."""

    accelerator: Any
    args: Any
    model: Any
    processing_class: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        self._refuse(given)
        super().__init__(*args, **kwargs)
        self._check_setting()
        for lm in self._models():
            self._check_model(lm)

    def _refuse(self, given: dict[str, Any]) -> None:
        """Raises SdftError for an argument of the constructor that the class does not support, before a model loads."""

    def _instead(self, what: str) -> str:
        return f"{type(self).__name__} of sdft.integrations.trl: {what}. Use TRL's {type(self).__name__} for that"

    def _check_setting(self) -> None:
        if hasattr(self.processing_class, "image_processor"):
            raise SdftError(self._instead("processing_class is an image processor, and images are not supported"))
        for name, found in (
            ("DeepSpeed", getattr(self, "is_deepspeed_enabled", False)),
            ("FSDP", getattr(self, "is_fsdp_enabled", False)),
            ("nn.DataParallel (several GPUs seen by one process)", self.args.n_gpu > 1),
        ):
            if found:
                raise SdftError(self._instead(f"{name} leaves no whole head in one place; DDP is tested"))

    def _models(self) -> list[nn.Module]:
        teacher = getattr(self, "teacher_model", None)
        teachers = [] if teacher is None or teacher is self.model else [self.accelerator.unwrap_model(teacher)]
        return [self.model, *teachers]

    def _check_model(self, lm: Any) -> None:
        """Raises SdftError if the model's logits depend on more than its hidden states and its head."""
        config = getattr(lm, "peft_config", {})
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in config.values()):
            raise SdftError(self._instead("peft_config adds virtual tokens, which the fused loss does not see"))
        if hasattr(inner(lm).get_output_embeddings(), "base_layer"):
            raise SdftError(
                f"peft_config puts an adapter on {type(inner(lm)).__name__}'s head, which the fused loss does not see: "
                f"take it out of target_modules, or use TRL's {type(self).__name__}"
            )
        device = next(lm.parameters()).device
        check_head(LanguageModel(lm, device, self._compute_dtype(lm), pad_id=0, stop_ids=()))

    def _compute_dtype(self, lm: Any) -> torch.dtype:
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return mixed.get(self.accelerator.mixed_precision, lm.dtype)

    def _in_forward(self, model: nn.Module, method: Callable[..., Any], *args: Any) -> Any:
        """method(lm, *args) inside the forward of the model's wrapper (DDP), as TRL's DistillationTrainer does.

        accelerate's autocast is entered here, since accelerate enters it only in the forward that is replaced.
        """
        lm = self.accelerator.unwrap_model(model)

        def run(lm: nn.Module, *args: Any) -> Any:
            with self.accelerator.autocast():
                return method(lm, *args)

        return _ForwardRedirection()(model, lm, run, lm, *args)
