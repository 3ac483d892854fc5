"""Closed forms against PyTorch's count of the products that run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdft.config import Config, LoraConfig, RolloutConfig, TeacherConfig, override
from sdft.errors import SdftError
from sdft.model import flops
from sdft.model.language_model import backbone
from sdft.model.lora import add_lora
from sdft.model.shape import ModelShape, Work
from sdft.training import gradients
from sdft.training.step import train_step


def loaded(load_tiny: Any, kind: str) -> tuple[Any, ModelShape]:
    model = load_tiny(kind, attention="eager")[1]  # its products are all plain ones, which the counter knows
    return model, ModelShape.from_config(model.inner.config)


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    # The angles of the rotary embedding are a product too, of an outer kind; they are no part of the formulas.
    found = counter.get_flop_counts()
    angles = {name.split(".")[-1]: sum(v.values()) for name, v in found.items() if name.endswith("rotary_emb")}
    return counter.get_total_flops() - sum(angles.values())


def forward(model: Any, lengths: list[int], rows: list[int]) -> torch.Tensor:
    """The sum of the logits of the last rows of each sequence, one sequence at a time."""
    total = torch.zeros(())
    for s, n in zip(lengths, rows, strict=True):
        hidden = model.hidden(torch.arange(s)[None] % 200)[0, s - n :]  # (n, H)
        total = total + model.head().logits(hidden).sum()
    return total


LENGTHS, ROWS = [9, 17, 4], [3, 5, 4]


def test_forward(family: str, load_tiny: Any) -> None:
    model, shape = loaded(load_tiny, family)
    assert counted(lambda: forward(model, LENGTHS, ROWS)) == flops.forward_flops(shape, LENGTHS, sum(ROWS))


def step_of(model: Any, shape: ModelShape, config: Config) -> flops.Flops:
    work = Work(tuple(s - n + 1 for s, n in zip(LENGTHS, ROWS, strict=True)), (), tuple(ROWS))
    return flops.step_flops(shape, config, work)


def test_forward_and_backward(family: str, load_tiny: Any) -> None:
    model, shape = loaded(load_tiny, family)
    got = step_of(model, shape, Config())
    assert counted(lambda: forward(model, LENGTHS, ROWS).backward()) == got.student + got.backward
    assert got.backward == 2 * got.student
    assert got.rollout == got.teacher == 0


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_with_adapters(kind: str, targets: tuple[str, ...], load_tiny: Any) -> None:
    model, shape = loaded(load_tiny, kind)
    lora = LoraConfig(rank=3, targets=targets)
    add_lora(model, lora, 0)
    model.lm.enable_input_require_grads()  # else the first layer need not pass a gradient on
    config = override(Config(), {"lora.rank": 3, "lora.targets": targets})
    got = step_of(model, shape, config)
    assert counted(lambda: forward(model, LENGTHS, ROWS)) == got.student
    assert counted(lambda: forward(model, LENGTHS, ROWS).backward()) == got.student + got.backward


@torch.no_grad()
def cached_answer(model: Any, prompt: int, new: int) -> None:
    """Token by token with a cache of keys."""
    ids, past = torch.arange(prompt)[None], None
    for _ in range(new):
        out = backbone(model.inner)(input_ids=ids, past_key_values=past, use_cache=True)
        past = out.past_key_values
        ids = model.head().logits(out.last_hidden_state[:, -1]).argmax(-1)[None]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_answers(kind: str, load_tiny: Any) -> None:
    model, shape = loaded(load_tiny, kind)
    want = counted(lambda: (cached_answer(model, 11, 6), cached_answer(model, 3, 1)))
    assert want == flops.completion_flops(shape, [11, 3], [6, 1])


def test_a_step_is_the_sum_of_its_parts(load_tiny: Any) -> None:
    shape = loaded(load_tiny, "llama")[1]
    work = Work((10, 12), (30, 31), (5, 7))
    config = Config()
    got = flops.step_flops(shape, config, work)
    assert got.rollout == flops.completion_flops(shape, [10, 12], [5, 7])
    assert got.teacher == flops.forward_flops(shape, [34, 37], 12)
    assert got.student == flops.forward_flops(shape, [14, 18], 12)
    assert got.backward == 2 * got.student
    assert got.total == got.rollout + got.teacher + got.student + got.backward

    def other(**settings: Any) -> flops.Flops:
        return flops.step_flops(shape, override(config, {k.replace("__", "."): v for k, v in settings.items()}), work)

    by_teacher = flops.completion_flops(shape, [30, 31], [5, 7])
    assert other(rollout__source="teacher").rollout == by_teacher
    assert other(rollout__source="mixed").rollout == (got.rollout + by_teacher) // 2
    assert got.student - other(loss__mask_first=2).student == 2 * shape.head * 4
    demonstrated = other(loss__method="sft", loss__mask_first=2)  # the mask is for a teacher's preamble only
    assert demonstrated.student == got.student
    assert other(loss__mask_first=9).student == flops.forward_flops(shape, [14, 18], 0)
    adapters = 2 * flops.adapter_entries(shape, LoraConfig(rank=4)) * (34 + 37)
    assert other(lora__rank=4).teacher == got.teacher + adapters
    assert other(lora__rank=4, teacher__kind="base").teacher == got.teacher  # switched off
    assert other(lora__rank=4).rollout == got.rollout  # merged


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_a_step_says_what_it_took(method: str, make_run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    run = make_run(**{"loss.method": method})
    seen: list[Any] = []
    own = gradients.lay_out
    monkeypatch.setattr(gradients, "lay_out", lambda *a: seen.append(a) or own(*a))
    line = train_step(run, 0, tmp_path)
    sides = [(tuple(map(len, prompts)), tuple(map(len, answers))) for prompts, answers, *_ in seen]
    (prompts, answers), shown = sides[0], [p for p, _ in sides[1:]]
    work = Work(prompts, shown[0] if shown else (), answers)
    assert bool(shown) == (method == "sdft")
    shape = ModelShape.from_config(run.model.inner.config)
    assert line["flops"] == flops.step_flops(shape, run.config, work).total


def test_six_times_the_weights(load_tiny: Any) -> None:
    """The rule of thumb, for short texts and the head on every token."""
    shape = loaded(load_tiny, "llama")[1]
    got = step_of(None, shape, Config(rollout=RolloutConfig(), teacher=TeacherConfig()))
    matrices = flops.block_entries(shape)
    attention = 12 * shape.layers * shape.queries * sum(s * s for s in LENGTHS)
    assert got.total - attention == 6 * (matrices * sum(LENGTHS) + shape.head * sum(ROWS))


def test_experts_are_refused() -> None:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(SdftError, match="'mixtral', a mixture of experts, are not counted"):
        flops.block_entries(ModelShape.from_config(config))
