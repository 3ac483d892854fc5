"""Whole training steps of ours and of TRL's SDFTTrainer on random models; ours also with the prediction of `sdft plan`.

bench/step.py lists what is equal on both sides. Each contender runs in a separate process.
"""

import contextlib
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from ..step import CONTENDERS, in_subprocess
from ..trainers import Job, Shape, random_qwen
from .phase import Item, Place, Row

SIZES: dict[str, dict[str, Any]] = {
    "0.5B": {},  # Qwen2.5-0.5B
    "1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.3,  # losses well above rounding
    },
}  # fmt: skip
PAIRS = (("ours", "TRL"), ("ours, LoRA", "TRL, LoRA"))
ORDER = (("0.5B", PAIRS[0]), ("1.5B", PAIRS[1]), ("1.5B", PAIRS[0]), ("0.5B", PAIRS[1]))
STEP = Shape(completions=16, new_tokens=128, prompt_tokens=200)  # as on the CPU; 1.5B fits 80 GB without checkpointing
TINY_STEP = Shape(completions=2, new_tokens=4, prompt_tokens=20)
LIMIT = 60.0  # seconds after which a contender is killed


def items(place: Place) -> list[Item]:
    order = [("tiny", pair) for pair in PAIRS] if place.tiny else ORDER
    return [Item(f"{size} {name}", partial(measured, size, name, place)) for size, pair in order for name in pair]


def random_model(size: str, place: Place) -> str:
    """The folder of a Qwen2 with random weights, written once a run of the proof."""
    folder = place.scratch / size
    if not folder.exists():
        made = Path(tempfile.mkdtemp(dir=place.scratch))
        random_qwen(made, device=place.device, **SIZES[size])
        with contextlib.suppress(OSError):  # another process of the phase was first
            made.rename(folder)
    return str(folder)


def measured(size: str, name: str, place: Place, rows: list[Row]) -> None:
    contender = next(c for c in CONTENDERS if c.name == name)
    shape = TINY_STEP if place.tiny else STEP
    job = Job(
        contender, shape, random_model(size, place), place.device, steps=1 if place.tiny else 3, seconds=10.0,
        predict=contender.trainer == "ours",
    )  # fmt: skip
    row = in_subprocess(job, min(LIMIT, max(1.0, place.left())))
    label = f"{size}, {shape.completions} x {shape.new_tokens}"
    rows.append({"shape": label, "contender": name, "beside": contender.beside, **row})
