"""SDFTTrainer and SDPOTrainer: the teacher is the student with another prompt.

Legend: B sequences, T completion tokens, N = B·T rows, H hidden size.
"""

from typing import Any

import torch
from sdft_kernels import linear_topk_divergence
from torch import Tensor, nn
from trl.experimental.sdft import SDFTTrainer as TrlSDFT
from trl.experimental.sdpo import SDPOTrainer as TrlSDPO

from sdft.errors import SdftError
from sdft.integrations.trl.fused import Fused
from sdft.integrations.trl.losses import fused, hidden_states, inner, label_logprobs, options, students_topk
from sdft.model.language_model import Head, read_head


class _SelfDistillation(Fused):
    """SDFT and SDPO: the teacher sees another prompt before the same completion."""

    teacher_model: Any
    temperature: float
    num_iterations: int
    current_gradient_accumulation_steps: int

    def _refuse(self, given: dict[str, Any]) -> None:
        super()._refuse(given)
        args = given["args"]
        if args.use_teacher_server:
            raise SdftError(
                self._instead("use_teacher_server=True scores the teacher in vLLM, so there is no head here")
            )
        if args.distillation_mode == "topk_logits" and args.distillation_topk is None:
            raise SdftError("distillation_mode='topk_logits' needs distillation_topk: give the number of tokens")

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's loss of one micro-batch, (). Raises ValueError if outputs are asked for, as TRL does."""
        if return_outputs:
            raise ValueError(f"{type(self).__name__} returns no outputs: leave return_outputs False")
        mask = self._loss_mask(inputs)  # (B, T)
        share = getattr(self.args, "distillation_weight", 1.0)  # of SDPO; the rest is a policy gradient
        loss, mean, logprobs = self._in_forward(model, self._losses, inputs, mask, share)
        # Collectives and .item() stay outside the wrapper's forward.
        if share > 0:
            mode = "train" if self.model.training else "eval"
            self._log_self_distillation_metric(mode, self.accelerator.gather(mean).mean().item())  # type: ignore[attr-defined]
        if share < 1:
            loss = share * loss + (1 - share) * self._policy_loss(inputs, logprobs)
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1.0)

    def _losses(
        self, lm: nn.Module, inputs: dict[str, Any], mask: Tensor, share: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The distillation loss (), its mean over tokens () for the log, and log-probabilities (N,) for a policy."""
        labels = inputs["completion_ids"].flatten()  # (N,)
        x, head = self._student(lm, inputs), read_head(inner(lm))  # (N, H)
        logprobs = None
        if share < 1 or self.args.distillation_mode == "sampled_token":
            logprobs = label_logprobs(x, head, labels, self.temperature)
        if share == 0:
            return x.new_zeros(()), x.new_zeros(()), logprobs
        ratio = self._ratio(x, head, inputs)  # (N,)
        weights = mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)  # (B, T): means of sequences, then batch
        loss, values = self._distillation(x, head, logprobs, inputs, weights.flatten().float() * ratio)
        mean = (values * ratio * mask.flatten()).sum() / mask.sum().clamp(min=1)
        return loss, mean, logprobs

    def _distillation(
        self, x: Tensor, head: Head, logprobs: Tensor | None, inputs: dict[str, Any], weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """sum_n w_n l_n (), and the l_n (N,) detached, by distillation_mode."""
        args, labels = self.args, inputs["completion_ids"].flatten()
        with torch.no_grad(), self._get_teacher_context_for_self_distillation():  # type: ignore[attr-defined]
            teacher = self.accelerator.unwrap_model(self.teacher_model)
            teacher_x = hidden_states(
                teacher,
                inputs["teacher_input_ids"],
                inputs["teacher_attention_mask"],
                inputs["completion_ids"].shape[1],
            )
            teacher_head = read_head(inner(teacher))
            if logprobs is not None and args.distillation_mode == "sampled_token":
                gap = logprobs.detach() - label_logprobs(teacher_x, teacher_head, labels, self.temperature)
                values = gap * logprobs.detach()
        if args.distillation_mode == "full_logits":
            loss, tokens = fused(x, head, teacher_x, teacher_head, args.distillation_alpha, self.temperature, weights)
            return loss, tokens.divergence
        if args.distillation_mode == "sampled_token":
            assert logprobs is not None
            return (weights * gap * logprobs).sum(), values
        ids, named = students_topk(x, head, teacher_x, teacher_head, args.distillation_topk, self.temperature)
        loss, tokens = linear_topk_divergence(
            x,
            head.weight,
            ids,
            named,
            divergence="jsd",
            beta=args.distillation_alpha,
            tail="bucket" if args.distillation_add_tail else "renormalise",
            token_weights=weights,
            reduction="sum",
            return_tokens=True,
            **options(head, self.temperature),
        )
        return loss, tokens.divergence

    def _student(self, lm: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """(N, H)"""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        return hidden_states(lm, ids, seen, inputs["completion_ids"].shape[1])

    @torch.no_grad()
    def _ratio(self, x: Tensor, head: Head, inputs: dict[str, Any]) -> Tensor:
        """exp(log p_now − log p_rollout) of the sampled tokens, at most distillation_is_clip: (N,).

        Ones if the rollout has no log-probabilities, or if distillation_is_clip is None.
        """
        old, clip = inputs.get("old_per_token_logps"), self.args.distillation_is_clip
        if old is None or clip is None:
            return x.new_ones(len(x), dtype=torch.float32)
        now = label_logprobs(x, head, inputs["completion_ids"].flatten(), self.temperature)
        return (now - old.flatten()).clamp(-20, 20).exp().clamp(max=clip)

    @torch.no_grad()
    def _compute_rollout_logps(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor | None:
        """As in TRL, without logits: (B, T); None if a rollout is used up before the weights change."""
        if self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0:
            return None
        inputs = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
        }

        def logprobs(lm: nn.Module) -> Tensor:
            return label_logprobs(
                self._student(lm, inputs), read_head(inner(lm)), completion_ids.flatten(), self.temperature
            )

        return self._in_forward(self.model, logprobs).view_as(completion_ids)

    def _policy_loss(self, inputs: dict[str, Any], logprobs: Tensor) -> Tensor:
        """TRL's policy loss, from log-probabilities (N,) instead of logits.

        The policy loss reads only the log-softmax at the sampled token. Logits of two events, the token and any other
        token, have the same log-softmax and the same gradient.
        """
        chosen = logprobs.view_as(inputs["completion_ids"])  # (B, T)
        other = torch.log(-torch.expm1(chosen.clamp(max=-1e-7)))  # log(1 − p)
        first = torch.zeros_like(inputs["completion_ids"])
        return self._compute_policy_loss(inputs | {"completion_ids": first}, torch.stack([chosen, other], -1))  # type: ignore[attr-defined]


class SDFTTrainer(_SelfDistillation, TrlSDFT):
    """`trl.experimental.sdft.SDFTTrainer` on the fused loss: all three distillation modes, clip and skip included.

    The arguments are TRL's. Raises SdftError for an argument that it does not support.
    """

    num_loss_tokens_to_skip: int

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]  # (B, T)
        return mask * (torch.arange(mask.shape[1], device=mask.device) >= self.num_loss_tokens_to_skip)


class SDPOTrainer(_SelfDistillation, TrlSDPO):
    """`trl.experimental.sdpo.SDPOTrainer` on the fused loss: all three distillation modes, with or without a policy
    loss.

    The arguments are TRL's. Raises SdftError for an argument that it does not support.
    """

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        mask, taught = inputs["completion_mask"], inputs.get("self_distillation_mask")  # (B, T), (B,)
        return mask if taught is None else mask * taught[:, None]
