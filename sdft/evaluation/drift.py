"""How far a model is from its base along its own completions, how long these are, and how sure the model is.

Legend: N completion tokens, H hidden size, V vocabulary. The result depends on nothing but the arguments, the seed
among them; torch's random generators are left as they were.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sdft_kernels import linear_divergence
from torch import Tensor

from sdft.config import RolloutConfig
from sdft.errors import SdftError
from sdft.model.language_model import Head, LanguageModel
from sdft.rollout.engine import Engine
from sdft.rollout.sampling import ModelEngine
from sdft.score.batch import Batch, lay_out, micro_batches
from sdft.score.teacher import Teacher


@dataclass(frozen=True)
class Drift:
    """A model compared with its base, along the model's completions.

    Per-token values are (N,) fp32 on the CPU, in nats, completion after completion.
    """

    lengths: tuple[int, ...]  # tokens of each completion, with the token that ends it
    truncated: tuple[bool, ...]  # max_new_tokens cut it off
    kl: Tensor  # KL(model || base)
    kl_back: Tensor  # KL(base || model)
    entropy: Tensor  # of the model's next-token distribution
    base_entropy: Tensor

    def summary(self) -> dict[str, float]:
        """Means: divergences and entropies over tokens, lengths and truncation over completions."""
        return {
            "kl_to_base": float(self.kl.double().mean()),
            "kl_from_base": float(self.kl_back.double().mean()),
            "entropy": float(self.entropy.double().mean()),
            "base_entropy": float(self.base_entropy.double().mean()),
            "answer_tokens": sum(self.lengths) / len(self.lengths),
            "truncated": sum(self.truncated) / len(self.truncated),
        }


def drift(
    model: LanguageModel,
    base: LanguageModel | Teacher,
    prompts: Sequence[Sequence[int]],
    rollout: RolloutConfig,
    seed: int = 0,
    batch_tokens: int = 8192,
    engine: Engine | None = None,
) -> Drift:
    """Both divergences between the model and its base along the model's completions of `prompts` (token ids).

    The divergences are exact over the vocabulary and are computed a chunk of tokens at a time. If completions are
    sampled at temperature 1, the sum of `kl` over a completion is, on average, the divergence between the two models'
    whole completions (the chain rule). Along greedy completions it is the divergence along the one path that an
    evaluation sees.

    base: another model with the same tokenizer, or a Teacher of kind `base`. Such a teacher keeps the weights that it
    started from; with a fresh adapter, it is the model with the adapter switched off, so it is the base only as long as
    nothing is merged. rollout: sampling (temperature 0 is greedy), longest completion, prompts that are completed
    together. batch_tokens: tokens of a forward pass. engine: completes the prompts; default: the model itself.

    Raises SdftError if there are no prompts, or for a teacher of another kind.
    """
    if not prompts:
        raise SdftError("no prompts are given; the divergence from the base is measured along their completions")
    if isinstance(base, Teacher) and base.kind != "base":
        raise SdftError(f"the base is a teacher of kind {base.kind!r}, which moves; give one of kind 'base'")
    completions = (engine or ModelEngine(model)).generate(prompts, rollout, seed)
    sizes = [len(p) + len(c.ids) for p, c in zip(prompts, completions, strict=True)]
    parts: dict[int, tuple[Tensor, ...]] = {}  # completion -> its per-token values
    for group in micro_batches(sizes, batch_tokens, model.packed):
        answers = [completions[i].ids for i in group]
        values = _compare(model, base, [prompts[i] for i in group], answers)  # four of (N,)
        rows = [v.float().cpu().split([len(a) for a in answers]) for v in values]
        parts |= dict(zip(group, zip(*rows, strict=True), strict=True))
    kl, kl_back, entropy, base_entropy = (torch.cat([parts[i][j] for i in range(len(sizes))]) for j in range(4))
    lengths = tuple(len(c.ids) for c in completions)
    return Drift(lengths, tuple(c.truncated for c in completions), kl, kl_back, entropy, base_entropy)


@torch.no_grad()
def _compare(
    model: LanguageModel, base: LanguageModel | Teacher, prompts: list[Sequence[int]], answers: list[list[int]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL(model || base), KL(base || model), and both entropies at each completion token, (N,) each."""

    def laid_out(side: LanguageModel) -> Batch:
        return lay_out(prompts, answers, side.pad_id, side.device, packed=side.packed)

    with model.evaluating():
        hidden = _rows(model, laid_out(model))  # (N, H)
        if isinstance(base, Teacher):
            base_hidden, base_head = base.hidden(laid_out(model))
        else:
            with base.evaluating():
                base_hidden, base_head = _rows(base, laid_out(base)), base.head()
        there = _divergence("reverse_kl", hidden, model.head(), base_hidden, base_head)
        back = _divergence("forward_kl", hidden, model.head(), base_hidden, base_head)
    return there.divergence, back.divergence, there.student_entropy, there.teacher_entropy


def _rows(model: LanguageModel, batch: Batch) -> Tensor:
    return batch.select(model.hidden(batch.input_ids, batch.lengths))


def _divergence(name: Any, hidden: Tensor, head: Head, base_hidden: Tensor, base_head: Head) -> Any:
    _, tokens = linear_divergence(
        hidden, head.weight, base_hidden, base_head.weight, bias=head.bias, teacher_bias=base_head.bias,
        scale=head.scale, softcap=head.softcap, divergence=name, reduction="sum", return_tokens=True, compact=False,
    )  # fmt: skip
    return tokens
