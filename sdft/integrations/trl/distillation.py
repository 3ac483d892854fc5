"""GKDTrainer and DistillationTrainer: the teacher is another model.

Legend: B sequences, S tokens of a sequence, T completion tokens, N rows.
"""

from typing import Any

import torch
import trl
from torch import Tensor, nn
from trl.experimental.gkd import GKDTrainer as TrlGKD

from sdft.integrations.trl.fused import Fused
from sdft.integrations.trl.losses import fused, hidden_states, inner
from sdft.model.language_model import read_head


class GKDTrainer(Fused, TrlGKD):
    """`trl.experimental.gkd.GKDTrainer` on the fused loss.

    As in TRL, `temperature` is the temperature of sampling, and the divergence is computed at 1.

    The arguments are TRL's. Raises SdftError for an argument that it does not support.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of one micro-batch, (). If outputs are asked for, which hold logits, TRL's code runs."""
        if return_outputs:
            return super().compute_loss(model, inputs, True, num_items_in_batch)
        labels = inputs["labels"][:, 1:]  # (B, S − 1)
        taught = labels != -100
        weights = taught.flatten().float()  # (B·(S − 1),)
        loss = self._in_forward(model, self._divergence, inputs, weights)
        return loss / (taught.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    def _divergence(self, lm: nn.Module, inputs: dict[str, Any], weights: Tensor) -> Tensor:
        ids, seen = inputs["input_ids"], inputs["attention_mask"]  # (B, S)
        x = hidden_states(lm, ids, seen, ids.shape[1] - 1)
        teacher = self.accelerator.unwrap_model(self.teacher_model).eval()
        with torch.no_grad():
            teacher_x = hidden_states(teacher, ids, seen, ids.shape[1] - 1)
        return fused(x, read_head(inner(lm)), teacher_x, read_head(inner(teacher)), self.beta, 1.0, weights)[0]

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """(loss, None, None) without logits if only the loss is asked for; else TRL's code runs."""
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


class DistillationTrainer(Fused, trl.DistillationTrainer):
    """`trl.DistillationTrainer` on the fused loss, instead of TRL's chunked loss.

    The arguments are TRL's. Raises SdftError for an argument that it does not support.
    """

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        """Loss (), the student's entropy summed over tokens (), the number of tokens ().

        TRL calls it in the wrapper's forward. TRL 1.15 and 1.16 do not autocast there, even with `bf16=True`.
        """
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)  # (B, T)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        teacher = self.accelerator.unwrap_model(self.teacher_model).eval()
        x = hidden_states(unwrapped_student, ids, seen, mask.shape[1])
        with torch.no_grad():
            teacher_x = hidden_states(teacher, ids, seen, mask.shape[1])
        head, teacher_head = read_head(inner(unwrapped_student)), read_head(inner(teacher))
        weights = mask.flatten().float()  # (N,)
        loss, tokens = fused(x, head, teacher_x, teacher_head, self.beta, self.temperature, weights)
        count = mask.sum()
        loss = loss / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return loss, tokens.student_entropy.sum(), count
