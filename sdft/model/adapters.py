"""A LoRA adapter as model.name: its config, its base model, and what lora.earlier makes of it. Reads no weights."""

import contextlib
from pathlib import Path
from typing import Any

from sdft.config import LoraConfig
from sdft.errors import SdftError

MERGED_BASE = "base"  # folder inside an adapter's folder: base weights that are in no other place


def read_config(name: str) -> Any:
    """The peft.LoraConfig of an adapter folder or hub name; None where `name` is no adapter.

    Raises SdftError for an adapter of another kind than LoRA.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    found = None
    if not Path(name).expanduser().is_dir() and name.count("/") != 1:
        return None  # adapters on the hub have an owner: nothing is asked there about a file, or a name of our own
    with contextlib.suppress(OSError, ValueError):  # such a hub name is unheard of: loading it says so
        found = find_adapter_config_file(name)
    if found is None:
        return None
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(name)
    except Exception as error:  # peft raises many kinds here
        raise SdftError(f"model.name = {name!r}: its adapter_config.json cannot be read ({error})") from error
    if config.peft_type != peft.PeftType.LORA:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise SdftError(f"model.name = {name!r} is an adapter of kind {kind}; sdft knows LoRA adapters")
    return config


def base_of(name: str, config: Any) -> str:
    """Where an adapter's base model is: in the adapter's own folder, or what its config names."""
    own = Path(name) / MERGED_BASE
    if own.is_dir():
        return str(own)
    base = config.base_model_name_or_path
    if not base:
        raise SdftError(f"model.name = {name!r}: its adapter_config.json names no base_model_name_or_path; add it")
    if read_config(base) is not None:
        raise SdftError(f"model.name = {name!r}: its base {base!r} is an adapter too; merge that one: sdft merge")
    return str(base)


def find_file(name: str, file: str) -> str | None:
    """A file of a folder or hub name, or None."""
    from transformers.utils import cached_file

    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None


def check_earlier(name: str, earlier: Any, config: LoraConfig) -> None:
    """Raises SdftError where `lora.earlier` does not say what becomes of model.name.

    earlier: `read_config` of it.
    """
    if earlier is None:
        if config.earlier:
            raise SdftError(
                f"lora.earlier = {config.earlier!r} but model.name = {name!r} is no LoRA adapter; drop lora.earlier"
            )
        return
    if not config.earlier:
        raise SdftError(
            f"model.name = {name!r} is a LoRA adapter; say by lora.earlier what becomes of it: 'merge' folds it into "
            "the base weights, 'stack' trains a new adapter on top and saves both as one, 'continue' trains it further"
        )
    if earlier.bias != "none" and config.earlier != "merge":
        raise SdftError(f"model.name = {name!r} has trained biases beside its factors; set lora.earlier = 'merge'")
    if config.earlier == "stack" and (earlier.use_dora or earlier.modules_to_save):
        what = "is a DoRA adapter" if earlier.use_dora else f"holds whole modules ({earlier.modules_to_save})"
        raise SdftError(
            f"lora.earlier = 'stack' but model.name = {name!r} {what}, which does not add to another; "
            "set 'merge' or 'continue'"
        )
    if config.earlier == "continue":
        _check_continued(name, config, earlier)


def _check_continued(name: str, config: LoraConfig, earlier: Any) -> None:
    targets = earlier.target_modules
    has = {
        "rank": earlier.r,
        "alpha": earlier.lora_alpha,
        "dropout": earlier.lora_dropout,
        "targets": (targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        "rslora": earlier.use_rslora,
        "dora": earlier.use_dora,
        "modules_to_save": tuple(earlier.modules_to_save or ()),
    }
    for key, value in has.items():
        asked = getattr(config, key)
        same = sorted(asked) == sorted(value) if isinstance(value, tuple) else asked == value
        if asked != getattr(LoraConfig(), key) and not same:
            raise SdftError(
                f"lora.{key} = {asked!r} but the adapter {name!r} has {value!r}; lora.earlier = 'continue' trains it "
                f"as it is: leave lora.{key} out"
            )
