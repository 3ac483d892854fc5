"""Stages: a run starts from the output of an earlier run, adapter or not; the written model is the trained model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft.cli import main
from sdft.config import ModelConfig, TeacherConfig
from sdft.errors import SdftError
from sdft.model import adapters, loading, lora, saving
from sdft.training import loop
from sdft.training.finish import finish
from sdft.update.ema import make_teacher

IDS = torch.arange(3, 43).reshape(2, 20) * 5 % 256
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"lora.rslora": True, "lora.targets": ("q_proj", "down_proj")},
    "dora": {"lora.dora": True},
    "head": {"lora.modules_to_save": ("lm_head", "norm")},
}


@torch.no_grad()
def logits(lm: Any) -> torch.Tensor:
    lm.eval()
    return lm(input_ids=IDS).logits


def close(got: torch.Tensor, want: torch.Tensor, bound: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, rtol=bound, atol=bound * want.abs().max().item())


@pytest.fixture
def stage(make_run: Callable[..., Any], nudge: Any, tmp_path: Path) -> Callable[..., Any]:
    """stage(name, **settings) is a run whose student has moved, and the folder of its written model."""

    def make(name: str, kind: str = "llama", seed: int = 0, **settings: Any) -> tuple[Any, Path]:
        run = make_run(kind, **{"train.output": str(tmp_path / name), "teacher.kind": "base"} | settings)
        nudge(run.model, seed)
        return run, finish(run, tmp_path / name)

    return make


@pytest.fixture
def load(load_tiny: Any) -> Callable[..., Any]:
    return lambda folder, **settings: load_tiny(name=str(folder), **settings)[1]


# What is written.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("earlier", ["merge", "continue", "stack", "all"])
def test_a_second_stage_is_written_as_it_was_trained(
    kind: str, earlier: str, stage: Any, load: Any, tmp_path: Path
) -> None:
    """Its base teacher is the model of the first stage; sdft, plain peft and `sdft merge` read the same."""
    import peft
    import transformers

    first, folder = stage("first", **{"lora.rank": 3} | KINDS[kind])
    begin = logits(first.model.lm)
    settings: dict[str, Any] = {"lora.earlier": earlier, "lora.rank": 2, "model.name": str(folder)}
    if earlier == "continue":
        settings["lora.rank"] = 0
    if earlier == "all":  # merged, and every weight trains
        settings |= {"lora.rank": 0, "lora.earlier": "merge"}
    if earlier == "stack" and kind in ("dora", "head"):
        with pytest.raises(SdftError, match=r"lora.earlier = 'stack' but model.name = .*set 'merge' or 'continue'"):
            stage("second", **settings)
        return
    second, out = stage("second", seed=1, **settings)
    with second.teacher.weights():
        close(logits(second.model.lm), begin)
    want = logits(second.model.lm)
    assert (want - begin).abs().max() > 0.1
    shutil.rmtree(tmp_path / "first")  # a merged base is in the second's folder; the others need the first base only
    assert torch.equal(logits(load(out).lm), want) or earlier == "stack"
    close(logits(load(out).lm), want)
    if earlier == "all":
        close(logits(transformers.AutoModelForCausalLM.from_pretrained(out)), want)
        return
    close(logits(peft.AutoPeftModelForCausalLM.from_pretrained(out)), want)
    main(["merge", str(out), str(tmp_path / "merged")])
    close(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), want)


def test_a_merged_stage_may_move(stage: Any, load: Any, tmp_path: Path) -> None:
    folder = stage("first", **{"lora.rank": 3})[1]
    run, out = stage("second", seed=1, **{"lora.earlier": "merge", "lora.rank": 2, "model.name": str(folder)})
    want = logits(run.model.lm)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(out / "base")
    shutil.move(out, tmp_path / "elsewhere")
    assert torch.equal(logits(load(tmp_path / "elsewhere").lm), want)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "phi"])
def test_a_stack_is_one_plain_adapter(kind: str, stage: Any, load: Any) -> None:
    """Ranks, scales and targets of the two differ; a third stage stacks on it."""
    from safetensors.torch import load_file

    names = {"gpt2": (("c_attn",), ("c_attn", "c_proj")), "phi": (("q_proj",), ("q_proj", "fc1"))}
    targets, more = names.get(kind, (("q_proj", "up_proj"), ("up_proj", "k_proj", "down_proj")))
    folder = stage("1", kind, **{"lora.rank": 3, "lora.targets": targets, "lora.rslora": True, "lora.alpha": 8.0})[1]
    for number, settings in (("2", {"lora.rank": 2, "lora.targets": more}), ("3", {"lora.rank": 1})):
        settings |= {"lora.earlier": "stack", "model.name": str(folder)}
        run, folder = stage(number, kind, seed=int(number), **settings)
        assert all(f".{lora.NEW}." in name for name in run.model.trainable())
        close(logits(load(folder).lm), logits(run.model.lm))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 6, {})
    shapes = {t.shape[0] for name, t in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in name}
    assert shapes == {6}


@pytest.mark.parametrize("earlier", ["merge", "stack", "continue"])
def test_stages_in_bf16(earlier: str, stage: Any, load: Any) -> None:
    """The adapter stays fp32, a whole module too; merged weights are rounded to bf16 once, and written so."""
    bf16 = {"model.weights_dtype": "bfloat16", "model.compute_dtype": "auto"}
    kind = {} if earlier == "stack" else KINDS["head"]

    def outputs(model: Any) -> torch.Tensor:
        with model.autocast():
            return logits(model.lm).float()

    first, folder = stage("first", **{"lora.rank": 3} | kind | bf16)
    begin = outputs(first.model)
    settings = {"lora.earlier": earlier, "lora.rank": 0 if earlier == "continue" else 2, "model.name": str(folder)}
    second, out = stage("second", seed=1, **settings | bf16)
    assert {p.dtype for p in second.model.trainable().values()} == {torch.float32}
    assert second.model.weights_dtype == torch.bfloat16
    with second.teacher.weights():
        close(outputs(second.model), begin, 0.05 if earlier == "merge" else 1e-6)
    again = outputs(load(out, weights_dtype="bfloat16", compute_dtype="auto"))
    # A stack's two products become one, which rounds elsewhere; the rest is the same, bit for bit.
    close(again, outputs(second.model), 0.06 if earlier == "stack" else 0)


# What trains.


@pytest.mark.parametrize("kind", KINDS)
def test_a_continued_adapter_is_the_same_one(kind: str, stage: Any, make_run: Any) -> None:
    first, folder = stage("first", **{"lora.rank": 3, "lora.alpha": 7.0} | KINDS[kind])
    second = make_run(**{"lora.earlier": "continue", "model.name": str(folder)})
    old, new = first.model.trainable(), second.model.trainable()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k], p) for k, p in new.items())
    assert second.teacher.tensors.keys() == new.keys()  # the start is not the bare base: it is copied
    assert torch.equal(logits(first.model.lm), logits(second.model.lm))


def test_a_stack_trains_the_new_adapter_alone(stage: Any, make_run: Any, nudge: Any) -> None:
    """Off for the teacher, on again for the student, and only it learns."""
    first, folder = stage("first", **{"lora.rank": 3})
    run = make_run(**{"lora.earlier": "stack", "lora.rank": 2, "model.name": str(folder), "teacher.kind": "base"})
    assert run.teacher.adapter_off
    assert torch.equal(logits(run.model.lm), logits(first.model.lm))
    nudge(run.model)
    names = list(run.model.trainable())
    student = logits(run.model.lm)
    for _ in range(2):
        with run.teacher.weights():
            assert torch.equal(logits(run.model.lm), logits(first.model.lm))
        assert list(run.model.trainable()) == names
        assert torch.equal(logits(run.model.lm), student)
    with pytest.raises(ZeroDivisionError), run.teacher.weights():
        raise ZeroDivisionError
    assert torch.equal(logits(run.model.lm), student)
    run.model.hidden(IDS).sum().backward()
    got = {name for name, p in run.model.lm.named_parameters() if p.grad is not None}
    assert got == set(names)


STAGES = {
    "merge": {"lora.earlier": "merge", "lora.rank": 2},
    "stack": {"lora.earlier": "stack", "lora.rank": 2, "rollout.source": "mixed"},
    "continue": {"lora.earlier": "continue", "model.gradient_checkpointing": True},
    "dora": {"lora.earlier": "merge", "lora.rank": 2, "lora.dora": True, "teacher.kind": "ema"},
    "head": {"lora.earlier": "merge", "lora.rank": 2, "lora.modules_to_save": ("lm_head",)},
}


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_resumes_exactly(kind: str, stage: Any, make_config: Any, tmp_path: Path) -> None:
    """A whole run and one cut in two end with the same adapter; both teach from the start of the stage."""
    from safetensors.torch import load_file

    folder = stage("first", **{"lora.rank": 3})[1]
    settings = {"teacher.kind": "base", "model.name": str(folder), "train.save_every": 2} | STAGES[kind]
    out = loop.train(make_config(**settings | {"train.output": str(tmp_path / "whole")}))
    want = load_file(out / "adapter_model.safetensors")
    run = tmp_path / "whole"
    shutil.rmtree(run / "checkpoints" / "step-000004")
    shutil.rmtree(run / "model")
    out = loop.train(make_config(**settings | {"train.output": str(run), "train.resume": True}))
    got = load_file(out / "adapter_model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], t) for k, t in want.items())


def test_the_merged_base_counts_where_disk_is_short(
    stage: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = stage("first", **{"lora.rank": 3})[1]
    settings = {"lora.rank": 2, "model.name": str(folder)}
    base = sum(p.numel() for p in make_run().model.lm.parameters()) * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": base}))
    make_run(**settings | {"lora.earlier": "stack"})
    with pytest.raises(SdftError, match="may be needed for checkpoints and model"):
        make_run(**settings | {"lora.earlier": "merge"})


# What is refused.


def test_an_adapter_needs_lora_earlier(stage: Any, make_run: Any, model_folder: Any) -> None:
    folder = stage("first", **{"lora.rank": 3, "lora.alpha": 8.0})[1]

    def refused(**settings: Any) -> str:
        with pytest.raises(SdftError) as error:
            make_run(**{"model.name": str(folder)} | settings)
        return str(error.value)

    for rank in (0, 4):
        printed = refused(**{"lora.rank": rank})
        assert all(word in printed for word in ("is a LoRA adapter", "'merge'", "'stack'", "'continue'"))
    for key, value, has in (("rank", 4, "3"), ("alpha", 9.0, "8.0"), ("rslora", True, "False"),
                            ("targets", ("q_proj",), "q_proj"), ("modules_to_save", ("lm_head",), "()")):  # fmt: skip
        printed = refused(**{"lora.earlier": "continue", f"lora.{key}": value})
        assert f"lora.{key} = {value!r} but the adapter" in printed
        assert has in printed
    for earlier in ("merge", "stack", "continue"):
        printed = refused(**{"lora.earlier": earlier, "model.name": str(model_folder("llama"))})
        assert f"lora.earlier = '{earlier}' but model.name" in printed
        assert "is no LoRA adapter; drop lora.earlier" in printed
    make_run(**{"model.name": str(folder), "lora.earlier": "continue", "lora.rank": 3, "lora.alpha": 8.0})


def test_adapters_that_cannot_be_read(stage: Any, load: Any, tmp_path: Path) -> None:
    folder = stage("first", **{"lora.rank": 3, "lora.modules_to_save": ("lm_head",)})[1]
    config = json.loads((folder / "adapter_config.json").read_text())

    def refused(file: str, change: Callable[[Path], Any]) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy / file)
        with pytest.raises(SdftError) as error:
            load(copy)
        return str(error.value)

    def write(**changes: Any) -> Callable[[Path], Any]:
        return lambda path: path.write_text(json.dumps(config | changes))

    def halve(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(path)
        save_file({k: t for k, t in weights.items() if "q_proj" not in k}, path)

    name = "adapter_config.json"
    assert "is an adapter of '/no/where', which is not there" in refused(
        name, write(base_model_name_or_path="/no/where")
    )
    assert "names no base_model_name_or_path" in refused(name, write(base_model_name_or_path=None))
    assert "is an adapter too; merge that one" in refused(name, write(base_model_name_or_path=str(folder)))
    assert "is an adapter of kind IA3" in refused(name, write(peft_type="IA3"))
    assert "adapter_config.json cannot be read" in refused(name, lambda path: path.write_text("{"))
    assert "adapters are read from safetensors only" in refused("adapter_model.safetensors", Path.unlink)
    assert "lacks some of the adapter's weights" in refused("adapter_model.safetensors", halve)


def test_the_tokenizer_is_the_adapters_or_its_bases(stage: Any, model_folder: Any) -> None:
    folder = stage("first", **{"lora.rank": 3})[1]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = folder / "chat_template.jinja"
    template.write_text("own {{ messages[0]['content'] }}")
    config = ModelConfig(name=str(folder))
    assert loading.load_tokenizer(config)[0].chat_template.startswith("own"), settings
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink()
    want = loading.load_tokenizer(ModelConfig(name=str(model_folder("llama"))))
    tokenizer, stops = loading.load_tokenizer(config)
    assert (tokenizer.chat_template, stops) == (want[0].chat_template, want[1])


# sdft merge.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "gemma3"])
def test_merge_writes_a_plain_model(kind: str, dtype: Any, stage: Any, load: Any, tmp_path: Path) -> None:
    import transformers

    run, folder = stage("first", kind, **{"lora.rank": 3})
    out = tmp_path / "merged"
    main(["merge", str(folder), str(out), "--dtype", dtype])
    lm = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, dtype))
    assert {p.dtype for p in lm.parameters()} == {getattr(torch, dtype)}
    close(logits(lm.float()), logits(run.model.lm), 2e-5 if dtype == "float32" else 0.1)
    assert not list(out.glob("adapter*"))
    assert (out / "model.safetensors").is_file()
    tied = lm.lm_head.weight is lm.get_input_embeddings().weight
    assert tied == (run.model.inner.get_output_embeddings().weight is run.model.inner.get_input_embeddings().weight)
    text = (out / "README.md").read_text()
    assert str(folder) in text
    assert run.config.model.name in text
    load(out)  # with its tokenizer


def test_merge_refuses(stage: Any, model_folder: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    folder = stage("first", "llama-tied", **{"lora.rank": 3})[1]

    def refused(*arguments: Any) -> str:
        with pytest.raises(SystemExit, match="2"):
            main(["merge", *map(str, arguments)])
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert refused(folder, tmp_path).endswith("exists; give a new folder")
    out = tmp_path / "out"
    assert "is no LoRA adapter" in refused(model_folder("llama"), out)
    assert "no such folder" in refused(tmp_path / "none", out)
    with monkeypatch.context() as patch:
        patch.setattr(lora, "merge", lambda lm: lm.unload())
        assert "the merged model computes something else" in refused(folder, out)
    with monkeypatch.context() as patch:
        patch.setattr(saving.card, "merged_card", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["merge", str(folder), str(out)])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert sorted(p.name for p in tmp_path.glob("out*")) == []
    main(["merge", str(folder), str(out)])


def test_an_adapter_on_a_tied_head_cannot_be_merged(model_folder: Any, load_tiny: Any, tmp_path: Path) -> None:
    """On an untied head it can, though training refuses it."""
    import peft
    import transformers

    for kind in ("llama", "llama-tied"):
        tokenizer = load_tiny(kind)[0]
        lm = transformers.AutoModelForCausalLM.from_pretrained(model_folder(kind))
        lm = peft.get_peft_model(lm, peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
        for name, p in lm.named_parameters():
            p.data += 0.1 * ("lora_B" in name)
        lm.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        want = logits(lm)
        with pytest.raises(SdftError, match=r"has a LoRA adapter on its head.*sdft merge"):
            load_tiny(name=str(tmp_path / kind))
        if kind == "llama-tied":
            with pytest.raises(SdftError, match="embedding and head, which are tied"):
                saving.merge_folder(str(tmp_path / kind), tmp_path / "out", "float32")
        else:
            saving.merge_folder(str(tmp_path / kind), tmp_path / "out", "float32")
            close(logits(load_tiny(name=str(tmp_path / "out"))[1].lm), want)
            shutil.rmtree(tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_eval_and_generate_take_a_stages_model(stage: Any, capsys: Any, tmp_path: Path) -> None:
    folder = stage("first", **{"lora.rank": 3})[1]
    printed = []
    for settings in ({"lora.earlier": "merge", "lora.rank": 2}, {"lora.earlier": "stack", "lora.rank": 2}):
        out = stage(settings["lora.earlier"], **settings | {"model.name": str(folder)})[1]
        (tmp_path / "data.jsonl").write_text('{"prompt": "say ab", "answer": "AB"}\n')
        main(["eval", str(out), str(tmp_path / "data.jsonl"), "--max-new-tokens", "2"])
        main(["generate", str(out), "say ab", "--max-new-tokens", "3"])
        printed.append(capsys.readouterr().out)
    assert all("accuracy" in text for text in printed)


def test_a_teacher_made_late_holds_what_is_in_memory(stage: Any, make_run: Any, nudge: Any) -> None:
    folder = stage("first", **{"lora.rank": 3})[1]
    run = make_run(**{"lora.earlier": "stack", "lora.rank": 2, "model.name": str(folder)})
    nudge(run.model)
    want = logits(run.model.lm)
    teacher = make_teacher(run.model, TeacherConfig(kind="base"))
    nudge(run.model, 1)
    with teacher.weights():
        assert torch.equal(logits(run.model.lm), want)


@pytest.mark.parametrize("name", ["smollm2-135m", "gpt2", "folder/model.gguf.gguf/x"])
def test_the_hub_is_not_asked_about_names_that_are_not_its_adapters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import peft_utils

    def asked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(peft_utils, "find_adapter_config_file", asked)
    assert adapters.read_config(name) is None
