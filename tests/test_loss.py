"""A training step's loss and gradient against dense autograd in float64 on the plain Hugging Face model."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdft.rollout.engine import Completion
from sdft.training.gradients import accumulate_gradients
from sdft.training.run import Run
from sdft.training.step import train_step

ANSWERS = [[5, 6, 257], [7, 8, 9, 10, 11, 12, 257], [13], [14, 15]]


def completions() -> list[Completion]:
    return [Completion(ids, truncated=False) for ids in ANSWERS]


def gradients(run: Run, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the step by the trainer."""
    for name, value in settings.items():
        setattr(run, name, value)
    for p in run.model.trainable().values():
        p.grad = None
    loss = accumulate_gradients(run, run.data.examples[: len(ANSWERS)], completions()).loss
    return loss, {k: p.grad for k, p in run.model.trainable().items()}


def dense_divergence(s: Tensor, t: Tensor, kind: str, beta: float) -> Tensor:
    """(N,) by the formula, from probabilities."""
    p, q = s.softmax(-1), t.softmax(-1)
    if kind == "reverse_kl":
        return (p * (p / q).log()).sum(-1)
    if kind == "forward_kl":
        return (q * (q / p).log()).sum(-1)
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)


def rows(lm: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Full logits of each unpadded sequence, at the rows that predict its completion."""
    return [lm(torch.tensor([[*p, *a]])).logits[0, len(p) - 1 : -1] for p, a in zip(prompts, ANSWERS, strict=True)]


def dense(run: Run, start: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same in float64 and with every logit; `start` is the teacher."""
    config = run.config.loss
    student, examples = copy.deepcopy(run.model.lm).double(), run.data.examples[: len(ANSWERS)]
    student.zero_grad()
    with torch.no_grad():
        shown = rows(start.lm.double(), [e.teacher_prompt for e in examples])
    own = rows(student, [e.prompt for e in examples])
    means = []
    for s, t in zip(own, shown, strict=True):
        values = dense_divergence(s / config.temperature, t / config.temperature, config.divergence, config.beta)
        means.append(values[config.mask_first :])
    means = [m for m in means if len(m)]
    loss = torch.cat(means).mean() if config.average == "token" else torch.stack([m.mean() for m in means]).mean()
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in student.named_parameters() if p.requires_grad}


def check(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], bound: float = 1e-4) -> None:
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=bound, atol=1e-7)
    assert got[1].keys() == want[1].keys()
    largest = max(g.norm() for g in want[1].values() if g is not None)
    for name, exact in want[1].items():
        if exact is None:
            assert got[1][name] is None
            continue
        error = (got[1][name].double() - exact).norm()
        assert error <= bound * exact.norm() + 1e-7 * largest, f"{name}: off by {error / exact.norm():.2e}"


def nudged_run(make_run: Callable[..., Run], nudge: Any, *args: Any, **settings: Any) -> tuple[Run, Any]:
    """A run whose student has moved away from its frozen teacher, and a copy of that teacher's model."""
    run = make_run(*args, **{"teacher.kind": "base"} | settings)
    start = copy.deepcopy(run.model)
    start.lm.eval()
    nudge(run.model)
    run.model.lm.eval()  # no dropout: the two sides draw differently
    return run, start


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_step_gradient_is_dense_autograd(family: str, divergence: str, make_run: Any, nudge: Any) -> None:
    run, start = nudged_run(make_run, nudge, family, **{"loss.divergence": divergence, "loss.beta": 0.3})
    check(gradients(run), dense(run, start))


@pytest.mark.parametrize(
    "settings",
    [
        {"loss.average": "sequence"},
        {"loss.mask_first": 2},
        {"loss.mask_first": 2, "loss.average": "sequence", "loss.divergence": "forward_kl"},
        {"loss.temperature": 2.0},
        {"loss.chunk_bytes": 2**16},
        {"lora.rank": 4},
        {"lora.rank": 4, "loss.divergence": "forward_kl", "train.micro_batch_tokens": 100},
        {"lora.rank": 4, "lora.rslora": True, "lora.targets": ("q_proj", "down_proj")},
        {"lora.rank": 4, "lora.dora": True},
        {"lora.rank": 4, "lora.modules_to_save": ("norm",), "model.gradient_checkpointing": True},
        {"model.gradient_checkpointing": True},
        {"train.packing": "off"},
        {"train.packing": "on", "model.gradient_checkpointing": True, "lora.rank": 2},
        {"train.micro_batch_tokens": 200, "loss.average": "sequence"},
    ],
    ids=str,
)
def test_step_gradient_with_settings(settings: dict[str, Any], make_run: Any, nudge: Any) -> None:
    run, start = nudged_run(make_run, nudge, "llama-tied", **settings)
    check(gradients(run), dense(run, start))


@pytest.mark.parametrize("kind", ["llama", "phi"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_a_head_trained_beside_adapters(kind: str, divergence: str, make_run: Any, nudge: Any) -> None:
    """The fused loss reads the trained copy on the student's side and the untouched head on the teacher's."""
    settings = {"lora.rank": 4, "lora.modules_to_save": ("lm_head",), "loss.divergence": divergence}
    run, start = nudged_run(make_run, nudge, kind, **settings)
    got = gradients(run)
    assert any("lm_head" in name for name in got[1])
    check(got, dense(run, start))


def test_a_student_at_its_teacher_has_no_gradient_but_for_the_context(make_run: Any) -> None:
    """Reverse KL of equal distributions: zero loss, zero gradient."""
    run = make_run(**{"teacher.kind": "live"})
    run.model.lm.eval()
    same = [replace(e, teacher_prompt=e.prompt) for e in run.data.examples[: len(ANSWERS)]]
    loss = accumulate_gradients(run, same, completions()).loss
    assert loss.abs() < 1e-6
    assert max(p.grad.abs().max() for p in run.model.trainable().values()) < 1e-6


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("method", ["sdft", "sft", "dft"])
@pytest.mark.parametrize("size", [1, 200, 300])
def test_micro_batches_add_up(size: int, method: str, average: str, make_run: Any, nudge: Any) -> None:
    settings = {"loss.method": method, "loss.average": average, "loss.mask_first": 1}
    run = nudged_run(make_run, nudge, **settings)[0]
    whole = gradients(run)
    assert whole[0] > (1e-3 if method == "dft" else 0.1)  # p (-log p) of a model that has learned nothing
    check(gradients(run, micro_batch_tokens=size), whole, 1e-5)


def test_an_answer_that_is_masked_whole_counts_for_nothing(make_run: Any, nudge: Any) -> None:
    run = nudged_run(make_run, nudge, **{"loss.mask_first": 3, "loss.average": "sequence"})[0]
    got = gradients(run)
    run2 = nudged_run(make_run, nudge, **{"loss.mask_first": 3, "loss.average": "sequence"})[0]
    long = accumulate_gradients(run2, run2.data.examples[1:2], completions()[1:2]).loss  # the one longer than 3
    check(got, (long, {k: p.grad for k, p in run2.model.trainable().items()}), 1e-5)


def test_all_masked_is_no_loss(make_run: Any) -> None:
    run = make_run(**{"loss.mask_first": 5})
    short = [Completion([1, 2], truncated=False)] * 2
    scored = accumulate_gradients(run, run.data.examples[:2], short)
    assert (scored.parts, scored.positions, scored.loss.item()) == ([], [], 0.0)
    assert all(p.grad is None for p in run.model.trainable().values())


def test_per_token_values_are_the_dense_ones(make_run: Any, nudge: Any) -> None:
    run, start = nudged_run(make_run, nudge, **{"train.micro_batch_tokens": 100, "loss.mask_first": 1})
    examples = run.data.examples[: len(ANSWERS)]
    scored = accumulate_gradients(run, examples, completions())
    parts, positions = scored.parts, scored.positions
    with torch.no_grad():
        own = rows(run.model.lm.double(), [e.prompt for e in examples])
        shown = rows(start.lm.double(), [e.teacher_prompt for e in examples])
    order = [2, 3, 0, 1]  # by the length of prompt and completion
    s, t = (torch.cat([side[i][1:] for i in order]) for side in (own, shown))
    labels = torch.tensor([token for i in order for token in ANSWERS[i][1:]])
    p, q = s.log_softmax(-1), t.log_softmax(-1)
    want = {
        "loss": dense_divergence(s, t, "reverse_kl", 0),
        "student_entropy": -(p.exp() * p).sum(-1),
        "teacher_entropy": -(q.exp() * q).sum(-1),
        "student_logprob": p.gather(1, labels[:, None])[:, 0],
        "teacher_logprob": q.gather(1, labels[:, None])[:, 0],
        "top1_agree": (s.argmax(-1) == t.argmax(-1)).double(),
    }
    for name, values in want.items():
        got = torch.cat([getattr(part, name) for part in parts]).double()
        torch.testing.assert_close(got, values, rtol=1e-4, atol=1e-5)
    assert [j for part in positions for j in part] == [j for i in order for j in range(1, len(ANSWERS[i]))]


# Cross-entropy.


@pytest.mark.parametrize("chunk_bytes", [2**12, 0])
def test_sft_is_hugging_faces_loss(family: str, chunk_bytes: int, make_run: Any) -> None:
    settings = {
        "loss.method": "sft",
        "loss.chunk_bytes": chunk_bytes,
        "loss.mask_first": 2,
    }  # the mask is for SDFT alone
    run = make_run(family, **settings)
    run.model.lm.eval()
    got = gradients(run)
    lm = copy.deepcopy(run.model.lm).double()
    lm.zero_grad()
    total = 0.0
    for e, a in zip(run.data.examples, ANSWERS, strict=False):
        out = lm(torch.tensor([[*e.prompt, *a]]), labels=torch.tensor([[-100] * len(e.prompt) + a]))
        total = total + out.loss * len(a)
    total = total / sum(map(len, ANSWERS))
    total.backward()
    check(got, (total.detach(), {k: p.grad for k, p in lm.named_parameters()}))


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss.average": "sequence"}, {"train.micro_batch_tokens": 100}, {"lora.rank": 4}, {"loss.mask_first": 2}],
    ids=str,
)
def test_dft_is_written_out(settings: dict[str, Any], make_run: Any, nudge: Any) -> None:
    """Value: the mean of p (-log p). Gradient: the gradient of the mean of -p, without any stop_gradient."""
    run = nudged_run(make_run, nudge, **{"loss.method": "dft", "loss.chunk_bytes": 2**12} | settings)[0]
    lm = copy.deepcopy(run.model.lm).double()
    got = gradients(run, micro_batch_tokens=run.config.train.micro_batch_tokens)
    lm.zero_grad()
    logits = rows(lm, [e.prompt for e in run.data.examples[: len(ANSWERS)]])
    logp = [s.log_softmax(-1).gather(1, torch.tensor(a)[:, None])[:, 0] for s, a in zip(logits, ANSWERS, strict=True)]

    def mean(parts: list[Tensor]) -> Tensor:
        tokens = run.config.loss.average == "token"
        return torch.cat(parts).mean() if tokens else torch.stack([part.mean() for part in parts]).mean()

    mean([-part.exp() for part in logp]).backward()
    value = mean([-part.exp() * part for part in logp]).detach()
    check(got, (value, {k: p.grad for k, p in lm.named_parameters() if p.requires_grad}))
    assert not torch.allclose(value, mean([-part for part in logp]).detach(), rtol=0.1)  # and no plain SFT


@pytest.mark.parametrize("family", ["gemma3", "phi", "granite"])  # a soft cap, a bias, a scale
def test_dft_takes_the_probability_after_the_head(family: str, make_run: Any) -> None:
    run = make_run(family, **{"loss.method": "dft"})
    run.model.lm.eval()
    examples = run.data.examples[: len(ANSWERS)]
    part = accumulate_gradients(run, examples, completions()).parts[0]
    with torch.no_grad():
        logits = rows(run.model.lm.double(), [e.prompt for e in examples])
    order = [2, 3, 0, 1]  # by the length of prompt and completion
    logp = torch.cat([logits[i].log_softmax(-1)[range(len(ANSWERS[i])), ANSWERS[i]] for i in order])
    torch.testing.assert_close(part.student_logprob.double(), logp, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.loss.double(), -logp.exp() * logp, rtol=1e-3, atol=1e-7)


# Memory.


class LargestVocabularyTensor(TorchDispatchMode):
    """Rows of the largest tensor that any operation made with the vocabulary among its dimensions."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and self.vocabulary in tensor.shape:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize("method", ["sdft", "sft", "dft"])
def test_the_logits_of_a_step_never_exist(method: str, make_run: Any, tmp_path: Any) -> None:
    run = make_run(**{"loss.method": method, "train.batch_size": 12, "loss.chunk_bytes": 2**18,
                      "rollout.max_new_tokens": 60})  # fmt: skip
    run.data = replace(run.data, examples=tuple(replace(e, target=[*range(60), 257]) for e in run.data.examples))
    with LargestVocabularyTensor(264) as seen:
        line = train_step(run, 0, tmp_path)
    assert line["tokens"] > 400
    assert 32 <= seen.rows <= 2**18 // (4 * 264)  # the head and its gradient have 32 rows, the budget 248


def test_the_counter_of_logits_can_tell(load_tiny: Any) -> None:
    lm = load_tiny()[1].lm
    with LargestVocabularyTensor(264) as seen:
        lm(torch.ones(3, 50, dtype=torch.long))
    assert seen.rows == 150
