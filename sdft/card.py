"""The model card: what the weights in a folder are and how they came to be."""

import platform
from importlib.metadata import version

from sdft import __version__
from sdft.config import Config, describe, to_toml


def model_card(config: Config, digest: str, records: int, steps: int, result: dict[str, float]) -> str:
    """Markdown with the front matter Hugging Face reads; config, data hash, versions, metrics."""
    packages = ("torch", "transformers", *(("peft",) if config.lora.rank else ()))
    versions = f"sdft {__version__}, " + ", ".join(f"{name} {version(name)}" for name in packages)
    library = "peft" if config.lora.rank else "transformers"
    scores = "\n".join(f"| {name} | {value:.1%} |" for name, value in result.items())
    measured = f"| evaluation set | accuracy, greedy |\n|---|---|\n{scores}" if scores else "Not evaluated."
    return f"""---
library_name: {library}
base_model: {config.model.name}
tags: [sdft, self-distillation]
---
# {config.model.name}, fine-tuned with sdft

{describe(config)}

{steps} steps of {config.train.batch_size} prompts, {records} records (sha256 of the token ids: `{digest}`).

## Metrics

{measured}

## Made with

{versions}, Python {platform.python_version()}.

```toml
{to_toml(config)}```
"""
