"""TRL's self-distillation and distillation trainers on the fused loss: their names, their arguments, no logits.

    from sdft.integrations.trl import SDFTTrainer  # or SDPOTrainer, GKDTrainer, DistillationTrainer

Each class is TRL's own with the loss computed from hidden states and heads; rollouts, data, teacher, logging and
checkpoints stay TRL's. Nothing of TRL is patched. What a class cannot do is refused at construction, by the name of the
argument; docs/integrations.md has the table.

Legend: B sequences, T completion tokens, N = B·T rows, H hidden size, V vocabulary, k named tokens.
"""

import inspect
import warnings
from importlib.metadata import version
from typing import Any

import torch
from sdft_kernels import linear_cross_entropy, linear_divergence, linear_topk_divergence
from torch import Tensor, nn

from sdft.errors import SdftError

TESTED = ("1.15", "1.16")  # minor versions of TRL; docs/integrations.md says how

try:
    import trl
    from trl.experimental.gkd import GKDTrainer as TrlGKD
    from trl.experimental.sdft import SDFTTrainer as TrlSDFT
    from trl.experimental.sdpo import SDPOTrainer as TrlSDPO
    from trl.models.utils import _ForwardRedirection

    from sdft.model.loading import (  # it needs what the extra brings
        Head,
        LanguageModel,
        backbone,
        check_head,
        read_head,
    )
except ImportError as error:
    raise ImportError(
        f"sdft.integrations.trl needs TRL {TESTED[0]} or later: pip install '.[trl]' in a checkout ({error})",
        name=error.name,
    ) from error

__all__ = ["DistillationTrainer", "GKDTrainer", "SDFTTrainer", "SDPOTrainer"]

TOPK_BYTES = 2**28  # workspace for the logits of both sides while the student's top k are looked up


def check_version(found: str) -> None:
    """ImportError for a TRL older than those tested; a warning for a newer one, whose internals may have moved."""
    minor = tuple(int(part) for part in found.split(".")[:2])
    oldest, newest = (tuple(int(part) for part in tested.split(".")) for tested in (TESTED[0], TESTED[-1]))
    if minor < oldest:
        raise ImportError(f"sdft.integrations.trl needs TRL {TESTED[0]} or later, not {found}: pip install -U trl")
    if minor > newest:
        warnings.warn(
            f"sdft.integrations.trl was tested with TRL {' and '.join(TESTED)}, not with {found}: "
            f"compare the first losses with TRL's own, or pip install 'trl=={TESTED[-1]}.*'",
            stacklevel=3,
        )


check_version(version("trl"))


# Hidden states and heads to per-token losses.


def inner(lm: Any) -> Any:
    """The causal LM without a peft wrapper around it; adapters inside stay."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def hidden_states(lm: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    """What predicts the last `keep` tokens: (B, S) ids and mask -> (B·keep, H)."""
    states = backbone(inner(lm))(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return states[:, -keep - 1 : -1].flatten(0, 1)


def options(head: Head, temperature: float) -> dict[str, Any]:
    """The student's head as the arguments of both losses."""
    return {"bias": head.bias, "scale": head.scale, "softcap": head.softcap, "temperature": temperature}


def fused(
    x: Tensor,  # (N, H_s)
    head: Head,
    teacher_x: Tensor,  # (N, H_t)
    teacher_head: Head,
    beta: float,
    temperature: float,
    weights: Tensor,  # (N,)
) -> tuple[Tensor, Any]:
    """sum_n w_n D_n and TokenStats. β is TRL's, which is ours: 0 forward KL, 1 reverse KL, else generalised JSD."""
    return linear_divergence(
        x,
        head.weight,
        teacher_x.detach(),
        teacher_head.weight.detach(),
        divergence="jsd",
        beta=beta,
        teacher_bias=None if teacher_head.bias is None else teacher_head.bias.detach(),
        teacher_scale=teacher_head.scale,
        teacher_softcap=teacher_head.softcap,
        token_weights=weights,
        reduction="sum",
        return_tokens=True,
        **options(head, temperature),
    )


def label_logprobs(x: Tensor, head: Head, labels: Tensor, temperature: float) -> Tensor:
    """log p(label_n) of rows (N, H): (N,) fp32, with its gradient."""
    return -linear_cross_entropy(
        x, head.weight, labels, ignore_index=None, reduction="none", **options(head, temperature)
    )


@torch.no_grad()
def students_topk(
    x: Tensor,  # (N, H_s)
    head: Head,
    teacher_x: Tensor,  # (N, H_t)
    teacher_head: Head,
    k: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The student's k likeliest tokens (N, k) int64, and what the teacher gives them (N, k) fp32, by blocks of rows.

    Logits have the dtype of the hidden states, as TRL's have.
    """
    rows = max(1, TOPK_BYTES // (4 * 4 * head.weight.shape[0]))  # two sides, each also in fp32
    ids, logprobs = [], []
    for some, teachers in zip(x.split(rows), teacher_x.split(rows), strict=True):
        ids.append(head.logits(some).topk(k, dim=-1).indices)
        logits = teacher_head.logits(teachers).float() / temperature  # (rows, V)
        logprobs.append(logits.gather(1, ids[-1]) - logits.logsumexp(-1, keepdim=True))
    return torch.cat(ids), torch.cat(logprobs)


# What the four classes share.


class _Fused:
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
        """Raises SdftError for arguments of the constructor that the class cannot serve, before a model loads."""

    def _instead(self, what: str) -> str:
        return f"{type(self).__name__} of sdft.integrations.trl: {what}. For that, use TRL's own {type(self).__name__}"

    def _check_setting(self) -> None:
        if hasattr(self.processing_class, "image_processor"):
            raise SdftError(
                self._instead("processing_class is a processor of images, whose inputs it does not pass on")
            )
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
        """Raises SdftError where hidden states and head are not all that the model's logits are made of."""
        config = getattr(lm, "peft_config", {})
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in config.values()):
            raise SdftError(self._instead("peft_config adds virtual tokens, which the backbone alone does not see"))
        if hasattr(inner(lm).get_output_embeddings(), "base_layer"):
            raise SdftError(
                f"peft_config puts an adapter on {type(inner(lm)).__name__}'s head, which the fused loss does not see: "
                f"take it out of target_modules, or use TRL's own {type(self).__name__}"
            )
        device = next(lm.parameters()).device
        check_head(LanguageModel(lm, device, self._compute_dtype(lm), pad_id=0, stop_ids=()))

    def _compute_dtype(self, lm: Any) -> torch.dtype:
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return mixed.get(self.accelerator.mixed_precision, lm.dtype)

    def _in_forward(self, model: nn.Module, method: Any, *args: Any) -> Any:
        """method(lm, *args) inside the forward of what wraps the model (DDP), as TRL's DistillationTrainer does it.

        Precision as accelerate sets it up for the model's own forward, which is not what runs here.
        """
        lm = self.accelerator.unwrap_model(model)

        def run(lm: nn.Module, *args: Any) -> Any:
            with self.accelerator.autocast():
                return method(lm, *args)

        return _ForwardRedirection()(model, lm, run, lm, *args)


class _SelfDistillation(_Fused):
    """SDFT and SDPO: the teacher reads its own prompt before the same completion."""

    teacher_model: Any
    temperature: float
    num_iterations: int
    current_gradient_accumulation_steps: int

    def _refuse(self, given: dict[str, Any]) -> None:
        super()._refuse(given)
        args = given["args"]
        if args.use_teacher_server:
            raise SdftError(self._instead("use_teacher_server=True scores the teacher in vLLM, which has no head here"))
        if args.distillation_mode == "topk_logits" and args.distillation_topk is None:
            raise SdftError("distillation_mode='topk_logits' needs distillation_topk: give the number of tokens")

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's loss of one micro-batch, (). It has no outputs to return, as TRL's has none (ValueError)."""
        if return_outputs:
            raise ValueError(f"{type(self).__name__} returns no outputs: leave return_outputs False")
        mask = self._loss_mask(inputs)  # (B, T)
        share = getattr(self.args, "distillation_weight", 1.0)  # SDPO's; the rest is a policy gradient
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
        """exp(log p_now − log p_rollout) of the sampled tokens, at most distillation_is_clip: (N,); ones without."""
        old, clip = inputs.get("old_per_token_logps"), self.args.distillation_is_clip
        if old is None or clip is None:
            return x.new_ones(len(x), dtype=torch.float32)
        now = label_logprobs(x, head, inputs["completion_ids"].flatten(), self.temperature)
        return (now - old.flatten()).clamp(-20, 20).exp().clamp(max=clip)

    @torch.no_grad()
    def _compute_rollout_logps(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor | None:
        """TRL's, without logits: (B, T), or None where a rollout is spent before the weights change."""
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
        """TRL's own policy loss, from log-probabilities (N,) in place of logits.

        It reads nothing of the logits but log-softmax at the sampled token. Logits of two events, the token and
        any other, have the same, and the same gradient.
        """
        chosen = logprobs.view_as(inputs["completion_ids"])  # (B, T)
        other = torch.log(-torch.expm1(chosen.clamp(max=-1e-7)))  # log(1 − p)
        first = torch.zeros_like(inputs["completion_ids"])
        return self._compute_policy_loss(inputs | {"completion_ids": first}, torch.stack([chosen, other], -1))  # type: ignore[attr-defined]


# The four trainers.


class SDFTTrainer(_SelfDistillation, TrlSDFT):
    """`trl.experimental.sdft.SDFTTrainer` on the fused loss: all three distillation modes, clip and skip included.

    Arguments as TRL's; SdftError for those that it cannot serve.
    """

    num_loss_tokens_to_skip: int

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]  # (B, T)
        return mask * (torch.arange(mask.shape[1], device=mask.device) >= self.num_loss_tokens_to_skip)


class SDPOTrainer(_SelfDistillation, TrlSDPO):
    """`trl.experimental.sdpo.SDPOTrainer` on the fused loss: all three distillation modes, with or without a policy
    loss beside them.

    Arguments as TRL's; SdftError for those that it cannot serve.
    """

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        mask, taught = inputs["completion_mask"], inputs.get("self_distillation_mask")  # (B, T), (B,)
        return mask if taught is None else mask * taught[:, None]


class GKDTrainer(_Fused, TrlGKD):
    """`trl.experimental.gkd.GKDTrainer` on the fused loss.

    As TRL's, `temperature` is that of sampling; the divergence is taken at 1. Arguments as TRL's; SdftError for those
    that it cannot serve.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of one micro-batch, (). Where the outputs are asked for, which hold logits, it is TRL's code."""
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
        """(loss, None, None) without logits where the loss is all that is asked for; else TRL's code."""
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


class DistillationTrainer(_Fused, trl.DistillationTrainer):
    """`trl.DistillationTrainer` on the fused loss, in place of TRL's chunked one.

    Arguments as TRL's; SdftError for those that it cannot serve.
    """

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        """Loss (), the student's entropy summed over tokens (), their number (). TRL calls it in the wrapper's forward.

        In the precision that TRL gives it: 1.15 and 1.16 do not autocast here, whatever `bf16` says.
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
