"""A LoRA adapter as model.name: its config, its base model, and whether lora.earlier fits it. Reads no weights."""

import contextlib
from pathlib import Path
from typing import Any

from sdft.config import LoraConfig
from sdft.errors import SdftError

MERGED_BASE = "base"  # folder inside an adapter's folder, for base weights that no other folder has


def read_config(name: str) -> Any:
    """The peft.LoraConfig of an adapter folder or hub name; None if `name` is no adapter.

    Raises SdftError for an adapter of another kind than LoRA.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    found = None
    if not Path(name).expanduser().is_dir() and name.count("/") != 1:
        return None  # adapters on the hub have an owner; the hub is not asked about files or smollm2-135m
    with contextlib.suppress(OSError, ValueError):  # the hub has no such name; loading raises the error
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
        raise SdftError(f"model.name = {name!r} is an adapter of kind {kind}; sdft takes LoRA adapters")
    return config


def base_of(name: str, config: Any) -> str:
    """The base model of an adapter: in the adapter's folder, or named by its config."""
    inside = Path(name) / MERGED_BASE
    if inside.is_dir():
        return str(inside)
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
    """Raises SdftError if `lora.earlier` does not fit model.name.

    earlier: `read_config` of model.name.
    """
    if earlier is None:
        if config.earlier:
            raise SdftError(
                f"lora.earlier = {config.earlier!r} but model.name = {name!r} is no LoRA adapter; drop lora.earlier"
            )
        return
    if not config.earlier:
        raise SdftError(
            f"model.name = {name!r} is a LoRA adapter; set lora.earlier: 'merge' folds it into "
            "the base weights, 'stack' trains a new adapter on top and saves both as one, 'continue' trains it further"
        )
    if earlier.bias != "none" and config.earlier != "merge":
        raise SdftError(f"model.name = {name!r} has trained biases as well as factors; set lora.earlier = 'merge'")
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
                f"with its settings: leave lora.{key} out"
            )
