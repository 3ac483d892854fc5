"""QLoRA: the frozen weights in 4 bits. bitsandbytes runs it on the CPU too; without it these tests are skipped."""

import importlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft.cli import main
from sdft.errors import SdftError
from sdft.training import loop
from sdft.training.finish import finish

SETTINGS = {"model.quantize": "4bit", "lora.rank": 3, "teacher.kind": "base"}
QUANTIZED: list[dict[str, Any]] = [
    {},
    {"teacher.kind": "ema", "rollout.source": "mixed"},
    {"lora.dora": True},
    {"lora.modules_to_save": ("lm_head",)},
    {"model.gradient_checkpointing": True},
    {"model.weights_dtype": "bfloat16", "model.compute_dtype": "auto"},
]
IDS = torch.arange(3, 43).reshape(2, 20) * 5 % 256


@pytest.fixture
def bitsandbytes() -> Any:
    """In CI it must be there; elsewhere its tests are skipped with a reason."""
    if os.environ.get("CI"):
        return importlib.import_module("bitsandbytes")
    return pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")


@torch.no_grad()
def logits(lm: Any) -> torch.Tensor:
    lm.eval()
    return lm(input_ids=IDS).logits.float()


def test_without_bitsandbytes(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(SdftError, match=r"model.quantize = '4bit' needs bitsandbytes.*pip install bitsandbytes"):
        loop.train(make_config(**SETTINGS))


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("settings", QUANTIZED, ids=str)
def test_a_quantized_run(settings: dict[str, Any], make_config: Any, load_tiny: Any, tmp_path: Path) -> None:
    """It trains, resumes exactly, and its adapter loads on the plain base."""
    from safetensors.torch import load_file

    settings = SETTINGS | settings
    out = loop.train(make_config(**settings | {"train.save_every": 2}))
    want = load_file(out / "adapter_model.safetensors")
    assert any(t.abs().max() > 0 for name, t in want.items() if "lora_B" in name)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    loop.train(make_config(**settings | {"train.save_every": 2, "train.resume": True}))
    got = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(got[name], t) for name, t in want.items())
    plain = load_tiny(name=str(out))[1]
    main(["merge", str(out), str(tmp_path / "merged")])
    torch.testing.assert_close(
        logits(load_tiny(name=str(tmp_path / "merged"))[1].lm), logits(plain.lm), rtol=1e-4, atol=1e-4
    )


def test_the_frozen_weights_are_4_bits(bitsandbytes: Any, make_run: Any) -> None:
    run = make_run(**SETTINGS)
    layers = [m for m in run.model.inner.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    assert all(m.weight.dtype == torch.uint8 and not m.weight.requires_grad for m in layers)
    state = layers[0].weight.quant_state
    assert (state.quant_type, state.nested, layers[0].compute_dtype) == ("nf4", True, torch.float32)
    assert run.model.head().weight.dtype == torch.float32  # the head and the embedding stay as they are
    assert run.model.inner.get_input_embeddings().weight.dtype == torch.float32
    assert run.model.weights_dtype == torch.float32
    assert {p.dtype for p in run.model.trainable().values()} == {torch.float32}
    with run.teacher.weights():  # the teacher is the quantized model, not the one it came from
        want = logits(run.model.inner)
    assert torch.equal(logits(run.model.inner), want)
    with pytest.raises(SdftError, match="'up_proj' is quantized and cannot train"):
        make_run(**SETTINGS | {"lora.modules_to_save": ("up_proj",)})


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("earlier", ["stack", "continue"])
def test_stages_of_a_quantized_model(earlier: str, make_run: Any, nudge: Any, tmp_path: Path) -> None:
    first = make_run(**SETTINGS | {"train.output": str(tmp_path / "first")})
    nudge(first.model)
    folder = finish(first, tmp_path / "first")
    rank = 0 if earlier == "continue" else 2
    second = make_run(**SETTINGS | {"lora.earlier": earlier, "lora.rank": rank, "model.name": str(folder)})
    assert torch.equal(logits(second.model.lm), logits(first.model.lm))
    nudge(second.model, 1)
    with second.teacher.weights():
        assert torch.equal(logits(second.model.lm), logits(first.model.lm))


def test_the_gradient_is_that_of_the_dequantized_model(bitsandbytes: Any, make_run: Any, nudge: Any) -> None:
    """Through 4-bit layers, the factors get the gradient they get on plain layers of the same values."""
    runs = [make_run(**{"lora.rank": 3, "teacher.kind": "base", "model.quantize": q}) for q in ("4bit", "none")]
    layers = dict(runs[0].model.inner.named_modules())
    with torch.no_grad():
        for name, module in runs[1].model.inner.named_modules():
            if isinstance(layers[name], bitsandbytes.nn.Linear4bit):
                weight = layers[name].weight
                module.weight.copy_(bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state))
    for run in runs:
        nudge(run.model)
        logits(run.model.lm)  # a forward without gradients, as a rollout is, must not change what follows
        run.model.lm.train()
        run.model.hidden(IDS).square().mean().backward()
    for (name, a), b in zip(runs[0].model.trainable().items(), runs[1].model.trainable().values(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm(), name
