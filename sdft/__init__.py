"""The trainer for Self-Distillation Fine-Tuning (Shenfeld et al. 2026, arXiv 2601.19897).

    from sdft import load_config, check, train, evaluate

    config = load_config("config.toml")
    if check(config).works:
        result = train(config)
        print(evaluate(result.model, "test.jsonl").accuracy)

The functions and their results are described in docs/api.md. The fused loss is the package `sdft_kernels`, which needs
torch and triton alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from sdft.errors import FruitlessError, SdftError

if TYPE_CHECKING:
    from sdft.api import check, evaluate, evaluate_harness, generate, load_model, plan, train
    from sdft.config import Config, load_config, override

__version__ = "0.1.0"

__all__ = [
    "Config",
    "FruitlessError",
    "SdftError",
    "__version__",
    "check",
    "evaluate",
    "evaluate_harness",
    "generate",
    "load_config",
    "load_model",
    "override",
    "plan",
    "train",
]

_CONFIG = ("Config", "load_config", "override")


def __getattr__(name: str) -> object:
    """Imports what is asked for: `import sdft` alone loads neither torch nor transformers."""
    if name not in __all__:
        raise AttributeError(f"module 'sdft' has no attribute {name!r}")
    return getattr(import_module("sdft.config" if name in _CONFIG else "sdft.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
