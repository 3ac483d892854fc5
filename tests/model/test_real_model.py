"""SmolLM2-135M: a pretrained model, its tokenizer and its chat template."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.model]


@pytest.fixture(scope="module")
def config(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from sdft.config import load_config
    from sdft.data import tasks

    folder = tmp_path_factory.mktemp("data")
    tasks.write(tasks.demo(), folder)
    c = load_config(ROOT / "examples/demo-sdft.toml")
    return replace(
        c,
        data=replace(c.data, train=str(folder / "facts-train.jsonl")),
        optim=replace(c.optim, warmup_steps=2),
        eval=replace(c.eval, every=0, sets={}),
        train=replace(c.train, output=str(folder / "run"), steps=8, batch_size=6),
    )


def held_out_divergence(model: Any, config: Any, tokenizer: Any, stop_ids: tuple[int, ...]) -> float:
    """Mean divergence between student and the *initial* teacher on the demonstrations of unseen phrasings."""
    from sdft.data.dataset import tokenize
    from sdft.data.formats import load_records
    from sdft.loss import divergence_loss
    from sdft.score.batch import lay_out
    from sdft.update.ema import make_teacher

    examples = tokenize(load_records(config.data.train), tokenizer, stop_ids, config.data, config.teacher).examples[-6:]
    answers = [tokenizer("The capital is", add_special_tokens=False)["input_ids"] for _ in examples]
    batch = lay_out([e.prompt for e in examples], answers, model.pad_id, model.device)
    shown = lay_out([e.teacher_prompt for e in examples], answers, model.pad_id, model.device)
    teacher, head = make_teacher(model, replace(config.teacher, kind="live")).hidden(shown)
    with torch.no_grad(), model.autocast():
        hidden = batch.select(model.hidden(batch.input_ids))
        weights = torch.full((len(batch.labels),), 1 / len(batch.labels))
        loss, _ = divergence_loss(hidden, model.head(), (teacher, head), batch.labels, weights, config.loss)
    return loss.item()


def test_a_few_steps_lower_the_divergence_on_held_out_prompts(config: Any) -> None:
    from sdft.data.formats import load_records
    from sdft.model import loading
    from sdft.training.loop import train

    records = load_records(config.data.train)
    lines = Path(config.data.train).read_text().splitlines(keepends=True)
    assert len(records) == len(lines) == 24
    train_file = Path(config.data.train).with_name("first-18.jsonl")
    train_file.write_text("".join(lines[:18]))  # the last six are the held-out prompts: two other countries
    tokenizer, stop_ids = loading.load_tokenizer(config.model)
    before = held_out_divergence(loading.load(config.model, tokenizer, stop_ids), config, tokenizer, stop_ids)
    folder = train(replace(config, data=replace(config.data, train=str(train_file))))
    trained = loading.load(replace(config.model, name=str(folder)), tokenizer, stop_ids)
    after = held_out_divergence(trained, config, tokenizer, stop_ids)
    assert after < 0.8 * before


def test_gguf_converts_once_and_says_so(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdft.model import sources

    monkeypatch.setenv("SDFT_CACHE", str(tmp_path))
    folder = sources.prepare_smollm2()
    assert "safetensors" in capsys.readouterr().out
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert sources.prepare_smollm2() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert capsys.readouterr().out == ""


def test_gguf_file_loads_as_it_is(smollm2: Path) -> None:
    from sdft.config import ModelConfig, RolloutConfig
    from sdft.model import loading
    from sdft.rollout.sampling import ModelEngine

    config = ModelConfig(name=str(smollm2), compute_dtype="float32")
    tokenizer, stop_ids = loading.load_tokenizer(config)
    model = loading.load(config, tokenizer, stop_ids)
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = ModelEngine(model).generate([ids], RolloutConfig(temperature=0.0, max_new_tokens=12))[0]
    assert "Paris" in tokenizer.decode(answer.ids)
