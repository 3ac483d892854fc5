"""One run's settings: frozen dataclasses, one TOML file, command-line overrides, each value checked where it is made.

`sections` declares the settings and their rules, `settings` checks them, `load` reads and writes them, `describe` puts
them in words. Nothing here imports torch or transformers: a mistake in a config is reported in well under a second.
"""

from sdft.config.describe import describe
from sdft.config.load import (
    PRESETS,
    config_keys,
    free_on_resume,
    from_table,
    load_config,
    override,
    read_toml,
    to_toml,
)
from sdft.config.sections import (
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    TeacherConfig,
    TrainConfig,
    get,
    validate,
)
from sdft.config.settings import LIST, STRICT, Settings, located

__all__ = [
    "LIST",
    "PRESETS",
    "STRICT",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "RolloutConfig",
    "Settings",
    "TeacherConfig",
    "TrainConfig",
    "config_keys",
    "describe",
    "free_on_resume",
    "from_table",
    "get",
    "load_config",
    "located",
    "override",
    "read_toml",
    "to_toml",
    "validate",
]
