"""The methods besides SDFT: SFT and DFT, completions sampled before the first step, another model as teacher."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft import config
from sdft.errors import SdftError
from sdft.model import flops
from sdft.model.shape import ModelShape
from sdft.planning.advice import advice
from sdft.planning.machine import Machine
from sdft.planning.plan import predict
from sdft.planning.work import shape_of, uniform_work, work_of
from sdft.rollout.sampling import ModelEngine
from sdft.score.batch import lay_out
from sdft.training import loop
from sdft.training.checkpoint import latest
from sdft.training.completions import complete, sample_before_training
from sdft.training.gradients import accumulate_gradients
from sdft.training.metrics import read_metrics
from sdft.training.step import train_step

TIMES = ("seconds", "tokens_per_second", "peak_memory")
OFFLINE = {"rollout.source": "offline", "rollout.per_prompt": 2, "rollout.batch_size": 7}


def outcome(output: Path) -> dict[str, Any]:
    """Weights, teacher, and metrics except times."""
    from safetensors.torch import load_file

    files = [*(output / "model").glob("*.safetensors"), *latest(output).glob("*.safetensors")]
    found: dict[str, Any] = {f"{f.parent.name}/{f.name}/{k}": t for f in files for k, t in load_file(f).items()}
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(output)]
    return found | {"metrics": lines}


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value, name


def fails_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """The function's call of that number (from 1) raises instead."""
    own, calls = getattr(module, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise RuntimeError("power cut")
        return own(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)


METHODS = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()


@pytest.mark.parametrize("text", re.findall(r"^```toml\n(.*?)^```", METHODS, re.MULTILINE | re.DOTALL))
def test_the_configs_of_the_documentation(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    c = config.load_config(tmp_path / "c.toml")
    required = {"model.name": c.model.name or "m", "data.train": "d.jsonl", "train.output": "o"}
    config.validate(config.override(c, required))
    method = re.findall(r"^## (.*)\n(?:(?!^## ).*\n)*?```toml\n" + re.escape(text), METHODS, re.MULTILINE)[0]
    said = {
        "SDFT": "SDFT: forward KL, KL(teacher || student), on the student's own samples",
        "SFT": "SFT: cross-entropy of the student on the demonstrations.",
        "DFT": "DFT: cross-entropy",
        "Offline distillation": "SFT: cross-entropy of the student on completions that the model, shown",
        "Re-invocation after SFT": "SDFT: reverse KL, KL(student || teacher), on the student's own samples",
        "The guard: stop before too much is lost": "SDFT: reverse KL",
    }
    assert config.describe(c).startswith(said[method])


# DFT in a run.


def test_dft_learns_and_writes_its_own_metrics(make_config: Any, tmp_path: Path) -> None:
    loop.train(make_config(**{"loss.method": "dft", "optim.lr": 1e-2, "train.steps": 60, "train.batch_size": 12}))
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["student_logprob"] > lines[0]["student_logprob"] + 3
    assert "teacher_logprob" not in lines[0]
    assert lines[0]["loss"] == pytest.approx(lines[0]["token_loss"], rel=1e-5)
    assert not (latest(tmp_path / "run") / "teacher.safetensors").exists()


# Completions sampled before the first step.


def sampled(output: Path) -> list[Any]:
    return [json.loads(line) for line in (output / "offline.jsonl").read_text().split("\n")[:-1]]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss.method": "sft", "loss.mask_first": 1},
        {"loss.method": "dft"},
        {"lora.rank": 2, "teacher.kind": "base"},
    ],
    ids=str,
)
def test_steps_train_on_what_was_sampled_before_them(settings: dict[str, Any], make_run: Any, tmp_path: Path) -> None:
    run = make_run(**OFFLINE | settings)
    line = sample_before_training(run, tmp_path / "run")
    rows = sampled(tmp_path / "run")[1:]
    assert line["offline_answers"] == 24 == sum(len(row["ids"]) for row in rows)
    shape = ModelShape.from_config(run.model.inner.config)
    asked = [len(e.teacher_prompt) for e in run.data.examples for _ in e.samples]
    assert line["flops"] == flops.completion_flops(
        shape, asked, [len(ids) for e in run.data.examples for ids in e.samples]
    )
    assert [e.samples for e in run.data.examples] == [tuple(row["ids"]) for row in rows]
    examples, completed = complete(run, list(run.data.examples[:3]), 0)
    assert [c.ids for c in completed] == [ids for row in rows[:3] for ids in row["ids"]]
    assert [e.prompt for e in examples] == [e.prompt for e in run.data.examples[:3] for _ in range(2)]
    assert [c.truncated for c in completed] == [c.ids[-1] != 257 for c in completed]
    assert rows[0]["answers"][0] == run.tokenizer.decode(rows[0]["ids"][0], skip_special_tokens=True)
    step = train_step(run, 0, tmp_path)
    masked = run.config.loss.mask_first
    scored = accumulate_gradients(run, examples, completed)
    assert sum(map(len, scored.positions)) == sum(len(c.ids) - masked for c in completed)
    assert step["tokens"] > 0
    assert ("teacher_logprob" in step) == (run.teacher is not None)


def test_the_start_answers_with_the_demonstration_in_context(make_run: Any, tmp_path: Path) -> None:
    run = make_run(**OFFLINE | {"rollout.temperature": 0.0})
    want = ModelEngine(run.model).generate([e.teacher_prompt for e in run.data.examples], run.config.rollout)
    without = ModelEngine(run.model).generate([e.prompt for e in run.data.examples], run.config.rollout)
    sample_before_training(run, tmp_path / "run")
    assert [e.samples for e in run.data.examples] == [(c.ids, c.ids) for c in want]
    assert [c.ids for c in want] != [c.ids for c in without]


def test_samples_differ_within_a_record_and_by_seed(make_run: Any, tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        run = make_run(**OFFLINE | {"train.seed": seed, "train.output": str(tmp_path / f"{seed}")})
        sample_before_training(run, tmp_path / f"{seed}")
        found.append([e.samples for e in run.data.examples])
    assert found[0] != found[1]
    assert any(a != b for a, b in found[0])


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_an_offline_run_resumes_bit_for_bit(
    method: str, make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Killed within the sampling and within the steps; the batches that were sampled are not sampled again."""
    settings = OFFLINE | {"loss.method": method, "train.save_every": 1}
    loop.train(make_config(**settings))
    assert "completions 24/24" in capsys.readouterr().out
    run, split = tmp_path / "run", tmp_path / "split"
    again = settings | {"train.output": str(split)}
    for module, name, call in ((ModelEngine, "generate", 3), (loop, "train_step", 3)):
        with monkeypatch.context() as patch:
            fails_at(patch, module, name, call)
            with pytest.raises(RuntimeError, match="power cut"):
                loop.train(make_config(**again | {"train.resume": split.exists()}))
        if name == "generate":
            unfinished = split / "offline-unfinished.jsonl"
            assert len(unfinished.read_text().splitlines()) == 3
            unfinished.write_text(unfinished.read_text() + '{"ids": [[1, 2')  # and in the middle of a line
    out = capsys.readouterr().out
    assert "14 of them are there.\ncompletions 21/24" in out
    with monkeypatch.context() as patch:
        patch.setattr(ModelEngine, "generate", lambda *a: pytest.fail("sampled again"))
        loop.train(make_config(**again | {"train.resume": True}))
    assert not (split / "offline-unfinished.jsonl").exists()
    assert sampled(split)[1:] == sampled(run)[1:]
    assert_same(outcome(split), outcome(run))
    line = read_metrics(split)[0]
    assert (line["step"], line["offline_answers"]) == (0, 24)
    assert line["seconds"]["rollout"] > 0


def test_an_offline_file_of_another_run_is_refused(make_config: Any, tmp_path: Path, skill: Path) -> None:
    loop.train(make_config(**OFFLINE))
    file = tmp_path / "run" / "offline.jsonl"
    text = file.read_text()
    again = make_config(**OFFLINE | {"train.resume": True})
    head, *rows = [line + "\n" for line in text.split("\n")[:-1]]

    def refused(changed: str, words: str) -> None:
        file.write_text(changed)
        with pytest.raises(SdftError, match=words):
            loop.train(again)

    origin = json.loads(head)
    for name, value in (("data", "x"), ("weights", "x"), ("rollout.temperature", 0.5)):
        other = origin | {"origin": origin["origin"] | {name: value}}
        refused(
            json.dumps(other) + "\n" + "".join(rows), f"completions of another run: its {name} is '?{value}'?, and here"
        )
    refused(head + "".join(rows[:-1]), "not the 12 lines that were written; delete it to sample again")
    first = json.loads(rows[0])
    first["ids"][0] = [5, 6, 257]
    refused(head + json.dumps(first) + "\n" + "".join(rows[1:]), "are not those that .* was trained on; put them back")
    file.write_text(text)
    loop.train(again)


def test_memory_that_runs_out_while_sampling(make_run: Any, tmp_path: Path, capsys: Any) -> None:
    run = make_run(**OFFLINE | {"rollout.temperature": 0.0})
    sizes: list[int] = []

    class Short(ModelEngine):
        def generate(self, prompts: Any, sampling: Any, seed: Any = None) -> Any:
            sizes.append(sampling.batch_size)
            if sampling.batch_size > 3:
                raise MemoryError
            return super().generate(prompts, sampling, seed)

    run.engine = Short(run.model)
    sample_before_training(run, tmp_path / "run")
    assert sizes == [7, 3, 3, 3, 3]
    assert "completions before the first step: out of memory" in capsys.readouterr().out


def test_the_plan_of_an_offline_run(make_config: Any) -> None:
    """Sampling is planned by the teacher's prompts of all records; a cross-entropy has no teacher's forward."""
    base = make_config(**{"train.steps": 1, "train.batch_size": 1, "rollout.batch_size": 64})
    works = {
        name: work_of(config.override(base, {"rollout.source": source, "loss.method": method}))
        for name, source, method in (
            ("sdft", "offline", "sdft"),
            ("sft", "offline", "sft"),
            ("live", "student", "sdft"),
        )
    }
    assert works["live"].offline == ()
    assert len(works["sdft"].offline) == len(works["sft"].offline) == 12
    assert works["sft"].teacher_prompts == ()
    assert works["sdft"].teacher_prompts == works["live"].teacher_prompts
    assert works["sft"].completions == (base.rollout.max_new_tokens,)  # not the demonstration's length
    uniform = uniform_work(config.override(base, {"rollout.source": "offline", "loss.method": "sft"}), 10, 20, 6)
    assert (uniform.prompts, uniform.teacher_prompts, uniform.completions) == ((10,), (), (6,))
    assert set(uniform.offline) == {20}
    machine = Machine("cpu", 2**34, 0)
    for method in ("sdft", "sft"):
        c = config.override(base, {"rollout.source": "offline", "loss.method": method})
        found = predict(shape_of(c), c, works[method], machine)
        assert found.phases["rollout"]["KV cache"] > 0
        assert found.phases["rollout"]["moments"] == 0 < found.phases["update"]["moments"]
        assert (found.phases["rollout"]["teacher"] > 0) == (method == "sdft")


# Another model as teacher: on-policy re-invocation after SFT.


@pytest.fixture
def stages(make_config: Any, tmp_path: Path) -> dict[str, Any]:
    """Settings of a second stage: the student was trained by SFT, the teacher is what it was before."""
    base = make_config().model.name
    sft = make_config(**{"loss.method": "sft", "optim.lr": 1e-2, "train.output": str(tmp_path / "sft")})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"tell me of {w}"}) + "\n" for w in ("cats", "dogs", "rain")))
    return {
        "model.name": str(loop.train(sft)), "data.train": str(prompts), "teacher.kind": "base", "teacher.model": base,
        "teacher.context": "none", "train.save_every": 1,
    }  # fmt: skip


def test_the_teacher_is_the_base_and_not_the_sft_model(stages: dict[str, Any], make_run: Any, load_tiny: Any) -> None:
    run, base = make_run(**stages), load_tiny()[1]
    assert all(e.prompt == e.teacher_prompt and e.target == [] for e in run.data.examples)
    batch = lay_out([e.prompt for e in run.data.examples], [[5, 6]] * 3, 258, run.model.device, packed=run.model.packed)
    hidden, head = run.teacher.hidden(batch)
    plain = lay_out([e.prompt for e in run.data.examples], [[5, 6]] * 3, 258, run.model.device)
    with torch.no_grad():
        want = base.head().logits(plain.select(base.hidden(plain.input_ids)))
        own = run.model.head().logits(batch.select(run.model.hidden(batch.input_ids, batch.lengths)))
    torch.testing.assert_close(head.logits(hidden), want, rtol=1e-4, atol=1e-4)
    assert (own - want).abs().max() > 0.1
    before = head.logits(hidden)
    train_step(run, 0, Path(run.config.train.output))
    torch.testing.assert_close(head.logits(run.teacher.hidden(batch)[0]), before, rtol=0, atol=0)


def test_reinvocation_brings_the_student_back(
    stages: dict[str, Any], make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = stages | {"train.steps": 30, "optim.lr": 3e-3, "train.batch_size": 6, "rollout.max_new_tokens": 12}
    loop.train(make_config(**settings))
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    split = settings | {"train.output": str(tmp_path / "split")}
    with monkeypatch.context() as patch:
        fails_at(patch, loop, "train_step", 3)
        with pytest.raises(RuntimeError, match="power cut"):
            loop.train(make_config(**split))
    loop.train(make_config(**split | {"train.resume": True}))
    assert_same(outcome(tmp_path / "split"), outcome(tmp_path / "run"))


def test_offline_answers_of_another_model(stages: dict[str, Any], make_run: Any, load_tiny: Any) -> None:
    run = make_run(**stages | {"rollout.source": "offline", "rollout.temperature": 0.0})
    sample_before_training(run, Path(run.config.train.output))
    want = ModelEngine(load_tiny()[1]).generate([e.prompt for e in run.data.examples], run.config.rollout)
    assert [e.samples for e in run.data.examples] == [(c.ids,) for c in want]


def test_an_adapter_as_teacher_is_merged(make_config: Any, make_run: Any, tmp_path: Path) -> None:
    adapter = loop.train(make_config(**{"lora.rank": 2, "optim.lr": 1e-1, "train.output": str(tmp_path / "adapter")}))
    run = make_run(**{"teacher.kind": "base", "teacher.model": str(adapter)})
    changed = [name for name, p in run.model.trainable().items() if not torch.equal(p, run.teacher.tensors[name])]
    assert changed
    assert all("proj" in name for name in changed)


def other_model(folder: Path, base: str, **changes: Any) -> str:
    """A copy of a model folder, its config.json changed and its weights made anew."""
    import transformers

    lm_config = transformers.AutoConfig.from_pretrained(base)
    for key, value in changes.items():
        setattr(lm_config, key, value)
    transformers.AutoModelForCausalLM.from_config(lm_config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 40}, r"does not fit model.name = .*mlp.* is \(40, 32\) there and \(48, 32\) here"),
        ({"num_hidden_layers": 1}, r"only one of them has model\.layers\.1\.input_layernorm"),
        ({"tie_word_embeddings": True}, r"only one of them has lm_head\.weight"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters is {.*500000.* there and"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, "num_attention_heads is 2 there and 4"),
    ],
    ids=str,
)
def test_a_teacher_that_does_not_fit(changes: dict[str, Any], words: str, make_run: Any, tmp_path: Path) -> None:
    base = make_run().config.model.name
    name = other_model(tmp_path / "other", base, **changes)
    with pytest.raises(SdftError, match=words) as error:
        make_run(**{"teacher.kind": "base", "teacher.model": name})
    assert str(error.value).startswith(f"teacher.model = {name!r}")


def test_another_tokenizer_or_none(make_run: Any, tmp_path: Path, model_folder: Any, without_weights: str) -> None:
    from transformers import AutoTokenizer

    base = str(model_folder("llama"))
    name = other_model(tmp_path / "other", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(name)
    for given, words in (
        (name, "has another tokenizer than model.name"),
        ("./none", "teacher.model = './none': no such"),
    ):
        with pytest.raises(SdftError, match=words):
            make_run(**{"teacher.kind": "base", "teacher.model": given, "model.name": without_weights})


def test_demonstrations_are_still_needed_elsewhere(stages: dict[str, Any], make_run: Any) -> None:
    with pytest.raises(SdftError, match="'demonstration' is missing; training needs one in every record"):
        make_run(**stages | {"teacher.context": "as_turns"})


def test_the_check_needs_a_context(stages: dict[str, Any], make_config: Any) -> None:
    from sdft import check

    with pytest.raises(SdftError, match="shows no demonstration; there is nothing to check"):
        check(make_config(**stages))


def test_another_models_weights_count_as_a_base_teachers(make_config: Any) -> None:
    c = make_config(**{"teacher.kind": "base"})
    shape, work = shape_of(c), work_of(c)
    machine = Machine("cpu", 2**34, 0)
    other = replace(c, teacher=replace(c.teacher, model=c.model.name))
    assert predict(shape, other, work, machine) == predict(shape, c, work, machine)
    small = Machine("cpu", 2**10, 0)
    assert "lora.rank" in " ".join(advice(shape, c, work, small))
    assert "lora.rank" not in " ".join(advice(shape, other, work, small))  # which would be refused
