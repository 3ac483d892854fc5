"""The model card: what the weights in a folder are, and how they were made."""

import platform
from importlib.metadata import version

from sdft import __version__
from sdft.config import Config, describe, to_toml


def model_card(config: Config, digest: str, records: int, steps: int, result: dict[str, float]) -> str:
    """Markdown with the front matter that Hugging Face reads; config, data hash, versions, metrics."""
    adapter = config.lora.rank or config.lora.earlier == "continue"
    packages = ("torch", "transformers", *(("peft",) if adapter else ()))
    versions = f"sdft {__version__}, " + ", ".join(f"{name} {version(name)}" for name in packages)
    library = "peft" if adapter else "transformers"
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


def merged_card(adapter: str, base: str, dtype: str) -> str:
    """Markdown for a LoRA adapter merged into its base."""
    return f"""---
library_name: transformers
base_model: {base}
tags: [sdft, self-distillation]
---
# {adapter}, merged

The LoRA adapter {adapter} merged into its base {base} by sdft {__version__}, in float32, saved in {dtype}.
"""
