"""A config from a TOML file and back. Precedence, lowest first: defaults, preset, file, command line."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tomli_w

from sdft import files
from sdft.config.sections import Config
from sdft.config.settings import FREE_ON_RESUME, Settings, keys, located
from sdft.errors import SdftError

_PAPER: dict[str, dict[str, Any]] = {
    "teacher": {"kind": "ema", "ema_alpha": 0.01, "context": "in_prompt"},
    "rollout": {"source": "student", "per_prompt": 1, "temperature": 1.0},
    "optim": {"weight_decay": 0.0, "clip_norm": 1.0, "schedule": "cosine", "warmup_steps": 10},
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper_as_written": _PAPER | {"loss": {"divergence": "reverse_kl", "average": "token", "mask_first": 0}},
    "paper_as_run": _PAPER | {"loss": {"divergence": "forward_kl", "average": "sequence", "mask_first": 3}},
}


def load_config(path: str | Path) -> Config:
    """Reads a TOML file over its preset over the defaults.

    Raises SdftError if the file is missing or is not TOML, for an unknown key (with the nearest valid one), and for a
    value of the wrong type or out of its range. `validate` checks the settings against each other, after the overrides.
    """
    return from_table(read_toml(path, "config"), f"config {path}")


def read_toml(path: str | Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file. Raises SdftError, which calls the file `what`, if it is missing or not TOML."""
    try:
        return tomllib.loads(files.read_text(Path(path), what))
    except tomllib.TOMLDecodeError as error:
        raise SdftError(f"{what} {path}: not valid TOML: {error}") from None


def from_table(table: Mapping[str, Any], where: str) -> Config:
    """A config from nested tables over the preset they name; raises SdftError as `load_config`.

    where: what the error names, such as a file.
    """
    preset = table.get("preset", "")
    values: dict[str, Any] = dict(PRESETS.get(preset, {})) if isinstance(preset, str) else {}
    for name, value in table.items():
        under = values.get(name, {})
        values[name] = under | value if isinstance(value, dict) else value
    with located(where):
        for name, section in Settings.sections.items():
            if isinstance(values.get(name), dict):
                values[name] = section(**values[name])
        return Config(**values)


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with settings changed by dotted name, such as {"optim.lr": 2e-5}; raises SdftError for a bad value."""
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if section in Settings.sections and section:
            value = replace(getattr(config, section), **{name: value})
        config = replace(config, **{section or name: value})
    return config


def config_keys() -> list[str]:
    """All dotted names of a config, such as optim.lr."""
    return list(keys())


def free_on_resume() -> frozenset[str]:
    """The settings that may differ between a run and its resumption, by dotted name.

    They change nothing that was computed. Some change how the next steps are rounded or sampled: a run that memory has
    stopped must be able to resume with less.
    """
    return frozenset(key for key, field in keys().items() if FREE_ON_RESUME in field.metadata)


def to_toml(config: Config) -> str:
    """The config as a TOML file that `load_config` reads back to an equal config."""
    return tomli_w.dumps(asdict(config))
