"""Writes a model as a folder that from_pretrained or peft loads: whole, as an adapter, or merged."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdft import files
from sdft.config import ModelConfig
from sdft.errors import SdftError
from sdft.model import card
from sdft.model.adapters import MERGED_BASE
from sdft.model.language_model import LanguageModel
from sdft.model.loading import DTYPES, load_tokenizer, load_unchecked
from sdft.model.lora import EARLIER, NEW, WEIGHTS, is_stack, merge_adapter
from sdft.model.sources import find_base


def save(model: LanguageModel, tokenizer: Any, folder: Path, final: Path | None = None) -> None:
    """A folder that from_pretrained loads: the whole model, or the peft adapter, and the tokenizer.

    If the base weights are in no other folder (lora.earlier = merge), folder/base holds the base model of the adapter.
    final: the later place of the folder, if it is written aside first.
    """
    if not hasattr(model.lm, "peft_config"):
        model.lm.save_pretrained(folder)
    elif model.own_base:
        model.inner.save_pretrained(folder / MERGED_BASE, state_dict=base_weights(model.inner))
        save_adapter(model.lm, folder, str((final or folder).absolute() / MERGED_BASE))
    else:
        save_adapter(model.lm, folder)
    tokenizer.save_pretrained(folder)


def save_adapter(lm: Any, folder: Path, base: str | None = None) -> None:
    """The adapter as a folder that plain peft loads; a stack as one adapter. base: names another base model."""
    if is_stack(lm):
        _save_stack(lm, folder)
        return
    config = lm.peft_config[EARLIER]
    config.base_model_name_or_path = base or config.base_model_name_or_path
    lm.save_pretrained(folder, save_embedding_layers=False)  # nothing here resizes them; peft would ask the hub


def _save_stack(lm: Any, folder: Path) -> None:
    """[B1 B2] [A1; A2] = B1 A1 + B2 A2: concatenated factors, the scales folded into B.

    A module that has one of the two adapters only, or a smaller rank, is padded with zeros to the largest rank, so
    that no per-module pattern is needed to read it.
    """
    import peft
    from safetensors.torch import save_file

    factors: dict[str, tuple[Tensor, Tensor]] = {}
    layers: list[tuple[str, Any]] = list(lm.get_base_model().named_modules())
    for name, module in layers:
        if hasattr(module, "lora_A"):
            own = [adapter for adapter in (EARLIER, NEW) if adapter in module.lora_A]
            down = [module.lora_A[adapter].weight.detach() for adapter in own]  # (r_i, in)
            up = [module.lora_B[adapter].weight.detach() * module.scaling[adapter] for adapter in own]  # (out, r_i)
            factors[name] = torch.cat(down), torch.cat(up, 1)  # (r, in), (out, r)
    rank = max(len(a) for a, _ in factors.values())
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, rank - len(a)))
        tensors[f"base_model.model.{name}.lora_B.weight"] = nn.functional.pad(b, (0, rank - b.shape[1]))
    earlier = lm.peft_config[EARLIER]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(factors),
        fan_in_fan_out=earlier.fan_in_fan_out,
        task_type="CAUSAL_LM",
        base_model_name_or_path=earlier.base_model_name_or_path,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config.save_pretrained(str(folder))


def base_weights(lm: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without its adapters, by the names of the plain model; the tensors are not copies."""
    weights = {}
    for name, tensor in lm.state_dict().items():
        if ".lora_" not in name and ".modules_to_save." not in name:
            weights[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return weights


def merge_folder(name: str, folder: Path, dtype: str) -> None:
    """Writes the LoRA adapter `name`, merged into its base in fp32, as a plain Hugging Face model in `dtype`.

    Raises SdftError if `folder` exists or `name` is no adapter. The folder is complete or not there.
    """
    if folder.exists():
        raise SdftError(f"{folder} exists; give a new folder")
    base, _, adapter = find_base(name)
    if adapter is None:
        raise SdftError(f"{name} is no LoRA adapter (it has no adapter_config.json); there is nothing to merge")
    config = ModelConfig(name=name, compute_dtype="float32", device="cpu")
    tokenizer, stop_ids = load_tokenizer(config)
    model = load_unchecked(config, tokenizer, stop_ids)
    merge_adapter(model)
    model.lm.to(DTYPES[dtype])
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        model.lm.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card.merged_card(name, base, dtype))
        files.publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
