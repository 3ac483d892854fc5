"""Whole runs on a tiny model: what is written, what is refused, what is learned."""

import errno
import itertools
import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft.config import RolloutConfig, load_config
from sdft.errors import SdftError
from sdft.loss import LOSSES
from sdft.model import saving
from sdft.rollout.sampling import ModelEngine
from sdft.training import loop
from sdft.training.checkpoint import latest
from sdft.training.completions import complete
from sdft.training.gradients import accumulate_gradients
from sdft.training.metrics import read_metrics
from sdft.training.step import NonFiniteError, train_step

FIELDS = {
    "step", "loss", "grad_norm", "lr", "teacher_tracked", "token_loss", "student_entropy", "teacher_entropy",
    "student_logprob", "teacher_logprob", "top1_agree", "loss_by_position", "answer_tokens", "truncated", "real_tokens",
    "tokens", "tokens_per_second", "flops", "seconds", "peak_memory",
}  # fmt: skip
SDFT_ONLY = {
    "teacher_tracked",
    "student_entropy",
    "teacher_entropy",
    "student_logprob",
    "teacher_logprob",
    "top1_agree",
}


@pytest.fixture
def eval_set(tmp_path: Path) -> str:
    path = tmp_path / "eval.jsonl"
    path.write_text('{"prompt": "say ab", "answer": "AB"}\n{"prompt": "say zz", "answer": "ZZ"}\n')
    return str(path)


# What a run writes.


def test_a_run_writes_what_it_promises(make_config: Any, eval_set: str, capsys: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = make_config(**{"train.save_every": 1, "eval.sets": {"new": eval_set}, "eval.every": 3, "train.steps": 5})
    folder = loop.train(config)
    output = tmp_path / "run"
    assert folder == output / "model"
    assert {p.name for p in output.iterdir()} == {"config.toml", "metrics.jsonl", "checkpoints", "eval", "model"}
    assert load_config(output / "config.toml") == config
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["step-000004", "step-000005"]

    lines = read_metrics(output)
    steps = [line for line in lines if "eval" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert all(set(line) == FIELDS for line in steps)
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text().partition("metrics.jsonl\n")[2]
    assert {field for field in FIELDS if f"`{field}`" not in page} == set()
    assert [line["step"] for line in lines if "eval" in line] == [0, 3, 5]
    assert {p.name for p in (output / "eval").iterdir()} == {f"step-{s:06d}-new.jsonl" for s in (0, 3, 5)}
    rows = [json.loads(x) for x in (output / "eval" / "step-000005-new.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in rows] == ["say ab", "say zz"]

    printed = capsys.readouterr().out
    assert printed.startswith("SDFT: reverse KL, KL(student || teacher), on the student's own samples")
    assert (
        "0.0M weights train; cpu, products in float32, attention sdpa, sequences end to end. Data: 12 records."
        in printed
    )
    assert "5/5  loss" in printed

    from safetensors.torch import load_file

    saved = load_file(latest(output) / "weights.safetensors")
    lm = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(p, saved[k]) for k, p in lm.named_parameters())
    start = AutoModelForCausalLM.from_pretrained(config.model.name)
    assert not torch.equal(lm.lm_head.weight, start.lm_head.weight)


def test_step_metrics_are_consistent(make_config: Any, tmp_path: Path) -> None:
    loop.train(make_config(**{"optim.warmup_steps": 2, "optim.schedule": "constant", "train.micro_batch_tokens": 100}))
    for line in read_metrics(tmp_path / "run"):
        assert line["loss"] == pytest.approx(line["token_loss"], rel=1e-5)  # average = token
        assert line["lr"] == (5e-4 if line["step"] == 1 else 1e-3)
        assert line["answer_tokens"] == pytest.approx(line["tokens"] / 3)
        assert 0 < line["grad_norm"] < 1e3
        assert 0 <= line["truncated"] <= 1
        assert 0 <= line["teacher_tracked"] < 1
        assert set(line["seconds"]) == {"rollout", "score", "loss", "backward", "update"}
        assert all(s > 0 for s in line["seconds"].values())


def test_sft_writes_its_own_metrics(make_config: Any, tmp_path: Path) -> None:
    loop.train(make_config(**{"loss.method": "sft"}))
    lines = read_metrics(tmp_path / "run")
    assert all(set(line) == FIELDS - SDFT_ONLY for line in lines)
    assert lines[0]["answer_tokens"] == 3  # two letters and the stop token
    assert not (latest(tmp_path / "run") / "teacher.safetensors").exists()


@pytest.mark.parametrize("rank", [0, 2])
def test_the_model_card(rank: int, make_config: Any, eval_set: str, make_run: Any) -> None:
    config = make_config(**{"lora.rank": rank, "eval.sets": {"new": eval_set}, "eval.every": 9, "train.steps": 1})
    text = (loop.train(config) / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert front.splitlines()[0] == f"library_name: {'peft' if rank else 'transformers'}"
    assert f"base_model: {config.model.name}" in front
    digest = make_run(**{"train.output": config.train.output + "2"}).data.digest
    assert f"1 steps of 3 prompts, 12 records (sha256 of the token ids: `{digest}`)" in body
    for words in ("SDFT: reverse KL", "| new | 0.0% |", f"torch {torch.__version__}", "[optim]", "\nlr = 0.001\n"):
        assert words in body


def test_epochs(make_run: Any) -> None:
    assert make_run(**{"train.steps": 0, "train.epochs": 1.0, "train.batch_size": 5}).steps == 3
    assert make_run(**{"train.steps": 0, "train.epochs": 2.5, "train.batch_size": 5}).steps == 6
    assert make_run(**{"train.steps": 7, "train.epochs": 2.5}).steps == 7


def test_cut_off_completions_are_told_once(make_config: Any, capsys: Any, tmp_path: Path) -> None:
    warning = (
        "of the completions are cut off at rollout.max_new_tokens = 2; what comes after that is not trained. Raise"
    )
    loop.train(make_config(**{"rollout.max_new_tokens": 2, "train.steps": 3}))
    printed = capsys.readouterr().out
    assert printed.count(warning) == 1
    assert printed.index("1/3  loss") < printed.index("Warning: in step 1") < printed.index("2/3  loss")
    loop.train(
        make_config(**{"rollout.max_new_tokens": 2, "loss.method": "sft", "train.output": str(tmp_path / "sft")})
    )
    assert "Warning" not in capsys.readouterr().out  # demonstrations are whole


def test_dropped_records_are_told(make_config: Any, skill: Path, capsys: Any) -> None:
    skill.write_text(skill.read_text() + json.dumps({"prompt": "x" * 500, "demonstration": "d"}) + "\n")
    loop.train(make_config(**{"train.steps": 1, "data.max_prompt_tokens": 400}))
    assert "Data: 1 of 13 records are over a length budget and dropped." in capsys.readouterr().out


# A step.


def greedy(**settings: Any) -> dict[str, Any]:
    return {"rollout.temperature": 0.0} | settings


def test_who_answers(make_run: Any, nudge: Any) -> None:
    run = make_run(**greedy(**{"teacher.kind": "base"}))
    nudge(run.model)
    examples = list(run.data.examples)
    config = run.config.rollout
    by_student = ModelEngine(run.model).generate([e.prompt for e in examples], config)
    with run.teacher.weights():
        by_teacher = ModelEngine(run.model).generate([e.teacher_prompt for e in examples], config)
    assert all(s != t for s, t in zip(by_student, by_teacher, strict=True))

    def who(source: str, step: int = 0) -> list[str]:
        run.config = replace(run.config, rollout=replace(config, source=source))
        got_examples, got = complete(run, examples, step)
        assert got_examples == examples
        kinds = ["student" if c == s else "teacher" for c, s in zip(got, by_student, strict=True)]
        assert all(c == (s if k == "student" else t)
                   for c, k, s, t in zip(got, kinds, by_student, by_teacher, strict=True))  # fmt: skip
        return kinds

    assert set(who("student")) == {"student"}
    assert set(who("teacher")) == {"teacher"}
    assert set(who("mixed", 0)) == set(who("mixed", 2)) == {"student"}
    assert set(who("mixed", 1)) == set(who("mixed", 3)) == {"teacher"}


def test_several_answers_to_a_prompt(make_run: Any, tmp_path: Path) -> None:
    run = make_run(**{"rollout.per_prompt": 3})
    examples, got = complete(run, list(run.data.examples[:2]), 0)
    assert examples == [run.data.examples[0]] * 3 + [run.data.examples[1]] * 3
    assert len({tuple(c.ids) for c in got}) == 6
    line = train_step(run, 0, tmp_path)
    assert line["answer_tokens"] == line["tokens"] / 9


def test_a_step_depends_on_seed_and_step_alone(make_run: Any, tmp_path: Path) -> None:
    def loss(seed: int, step: int, disturb: bool = False) -> float:
        run = make_run(**{"train.seed": seed})
        if disturb:
            torch.rand(100)
        return train_step(run, step, tmp_path)["loss"]

    first = loss(0, 0)
    assert loss(0, 0, disturb=True) == first
    assert len({first, loss(1, 0), loss(0, 1)}) == 3


def test_steps_draw_anew(make_run: Any, tmp_path: Path) -> None:
    run = make_run(**{"optim.lr": 1e-12, "train.batch_size": 1})
    run.data = replace(run.data, examples=run.data.examples[:1])  # the same prompt and, in effect, weights
    losses = [train_step(run, step, tmp_path)["loss"] for step in range(3)]
    assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-3


@pytest.mark.parametrize("divergence", ["reverse_kl", pytest.param("forward_kl", marks=pytest.mark.slow)])
def test_sdft_lowers_the_divergence_on_held_out_prompts(divergence: str, make_run: Any, tmp_path: Path) -> None:
    run = make_run(**{"loss.divergence": divergence, "teacher.kind": "base", "train.steps": 60, "optim.lr": 3e-3,
                      "train.batch_size": 8})  # fmt: skip
    held, run.data = run.data.examples[9:] * 8, replace(run.data, examples=run.data.examples[:9])
    torch.manual_seed(0)
    sampled = run.engine.generate([e.prompt for e in held], RolloutConfig(max_new_tokens=6))

    def measure() -> float:
        loss = accumulate_gradients(run, held, sampled).loss.item()
        run.optimizer.zero_grad()
        return loss

    before = measure()
    lines = [train_step(run, step, tmp_path) for step in range(60)]
    assert measure() < 0.75 * before  # 0.50 to 0.58 with three seeds
    assert sum(line["loss"] for line in lines[-10:]) < 0.75 * 10 * lines[0]["loss"]


def test_sft_learns_the_skill(make_run: Any, tmp_path: Path) -> None:
    run = make_run(**{"loss.method": "sft", "optim.lr": 1e-2, "train.steps": 60, "train.batch_size": 12})

    def right() -> int:
        got = ModelEngine(run.model).generate(
            [e.prompt for e in run.data.examples], RolloutConfig(temperature=0.0, max_new_tokens=6)
        )
        return sum(c.ids == e.target for c, e in zip(got, run.data.examples, strict=True))

    assert right() == 0
    for step in range(60):
        train_step(run, step, tmp_path)
    assert right() >= 11


# NaN and inf.


def poison(monkeypatch: pytest.MonkeyPatch, how: str, call: int) -> None:
    """The `call`-th loss (from 1) is NaN or inf, or finite with a gradient that is not."""
    calls, own = [0], LOSSES["divergence"]

    def bad(hidden: torch.Tensor, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] != call:
            return own(hidden, *args)
        if how == "gradient":
            hidden.register_hook(lambda g: g * torch.inf)
            return own(hidden, *args)
        loss, part = own(hidden, *args)
        return loss * float(how), part

    monkeypatch.setitem(LOSSES, "divergence", bad)


def tensors(run: Any) -> list[torch.Tensor]:
    moments = [t for s in run.optimizer.state_dict()["state"].values() for t in s.values()]
    return [t.detach().clone() for t in (*run.model.trainable().values(), *run.teacher.state().values(), *moments)]


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_a_bad_step_leaves_everything_untouched(
    how: str, make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    train_step(run, 0, tmp_path)
    before = tensors(run)
    poison(monkeypatch, how, 1)
    with pytest.raises(
        NonFiniteError, match=r"step 2: loss .*; the weights are untouched and the batch is in .*Lower optim\.lr"
    ):
        train_step(run, 1, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(tensors(run), before, strict=True))
    assert all(p.grad is None for p in run.model.trainable().values())
    saved = json.loads((tmp_path / "nonfinite-step-000002.json").read_text())
    assert saved["step"] == 2
    known = {tuple(e.prompt): e for e in run.data.examples}
    assert len(saved["batch"]) == 3
    assert all(row["teacher_prompt"] == known[tuple(row["prompt"])].teacher_prompt for row in saved["batch"])
    assert all(0 < len(row["completion"]) <= 6 for row in saved["batch"])


def test_stop_ends_the_run_and_skip_goes_on(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        poison(patch, "nan", 2)
        with pytest.raises(NonFiniteError, match="step 2"):
            loop.train(make_config())
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / "model").exists()
    poison(monkeypatch, "nan", 2)
    loop.train(make_config(**{"train.on_nonfinite": "skip", "train.output": str(tmp_path / "skip")}))
    lines = read_metrics(tmp_path / "skip")
    assert [line.get("skipped", False) for line in lines] == [False, True, False, False]
    assert lines[1]["loss"] is None
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in (lines[0], *lines[2:]))
    assert (tmp_path / "skip" / "nonfinite-step-000002.json").exists()


# Refused before long work.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data.train": "/none.jsonl"}, "cannot be read"),
        ({"eval.sets": {"new": "/none.jsonl"}, "eval.every": 1}, "cannot be read"),
        ({"model.name": "/no/such/model"}, "no such folder"),
        ({"train.trackers": ("wandb",)}, "pip install wandb"),
        ({"loss.impl": "triton"}, "loss.impl = 'triton' cannot run: "),
        ({"model.device": "cuda:77"}, "model.device = 'cuda:77' cannot be used"),
        ({"data.max_prompt_tokens": 3}, "all 12 records are over the length budget"),
        ({"train.resume_step": 3}, "train.resume_step = 3 has no effect alone"),
    ],
)
def test_a_refused_run_leaves_no_trace(
    settings: Any,
    words: str,
    make_config: Any,
    without_weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.util

    monkeypatch.setattr("sdft_kernels.checks.INTERPRETED", False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    with pytest.raises(SdftError) as error:
        loop.train(make_config(**{"model.name": without_weights} | settings))
    assert words in str(error.value)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_corrected_config_runs_in_the_same_folder(make_config: Any) -> None:
    with pytest.raises(SdftError):
        loop.train(make_config(**{"data.train": "/none.jsonl"}))
    assert loop.train(make_config(**{"train.steps": 1})).is_dir()


def test_an_output_folder_in_use(make_config: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(SdftError, match="is not empty and not a run of sdft; give another folder"):
        loop.train(make_config())
    with pytest.raises(SdftError, match="is not empty and not a run"):
        loop.train(make_config(**{"train.resume": True}))
    assert [p.name for p in output.iterdir()] == ["thesis.txt"]


def test_an_output_that_cannot_be_written(make_config: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SdftError, match=r"train\.output = '.*' cannot be written \("):
            loop.train(make_config(**{"train.output": str(output)}))


def test_no_space_left_is_told_before_the_first_step(
    make_config: Any, make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    weights = sum(p.numel() for p in make_run().model.trainable().values()) * 4
    need = 4 * (4 * weights) + weights  # keep 3 and write one: weights, two moments, teacher; then the model
    keep = {"train.keep_checkpoints": 3}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need))
    make_run(**keep)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need - 1))
    monkeypatch.setattr(loop, "train_step", lambda *a: pytest.fail("a step ran"))
    with pytest.raises(SdftError, match=r"GiB may be needed for checkpoints and model, 0\.0 GiB are free; free some"):
        loop.train(make_config(**keep))
    assert not list((tmp_path / "run").iterdir())


def test_a_disk_that_fills_up_at_the_end(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: Any, tokenizer: Any, folder: Path, final: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save", full)
        with pytest.raises(SdftError, match=r"model: not written: no space left.*--resume writes it"):
            loop.train(make_config())
    assert not list((tmp_path / "run").glob("*model*"))
    assert loop.train(make_config(**{"train.resume": True})).is_dir()


def test_answers_of_one_token_and_answers_all_masked(make_run: Any, tmp_path: Path) -> None:
    run = make_run(**{"rollout.max_new_tokens": 1})
    assert train_step(run, 0, tmp_path)["answer_tokens"] == 1
    run = make_run(**{"loss.mask_first": 5})
    run.config = replace(run.config, rollout=replace(run.config.rollout, max_new_tokens=2))
    line = train_step(run, 0, tmp_path)
    assert (line["loss"], line["grad_norm"]) == (0, 0)


def test_prompts_over_the_models_positions_are_refused(make_config: Any) -> None:
    with pytest.raises(SdftError, match=r"rollout.max_new_tokens = 500 exceed the model's 512 positions"):
        loop.train(make_config(**{"rollout.max_new_tokens": 500}))
