"""TRL's own trainers beside ours, on the CPU: losses, gradients, weights after steps, and what is refused."""

import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("trl") is None:
    pytest.skip("NOT COMPARED WITH TRL, which is missing here: pip install 'sdft[trl]'", allow_module_level=True)

import datasets
import transformers
import trl
from trl.experimental import gkd, sdft, sdpo

from sdft import SdftError
from sdft.integrations import trl as ours

WORDS = ["ab", "cde", "f", "ghij"]
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "optim": "sgd",  # weights after a step show the gradient itself; AdamW would show its sign
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def reward(completions: list[Any], **_: Any) -> list[float]:
    """1 for half of the answers, whatever they are."""
    return [float(i % 2) for i in range(len(completions))]


class Side:
    """Makes one of the four trainers, TRL's or ours, on the same models, data and settings."""

    def __init__(self, model_folder: Callable[[str], Path], output: Path) -> None:
        self.folder, self.output = model_folder, str(output)

    def make(self, name: str, side: Any = ours, kind: str = "llama", extra: dict[str, Any] | None = None, **args: Any) -> Any:
        folder = str(self.folder(kind))
        prompts = [[{"role": "user", "content": word}] for word in WORDS]
        common = COMMON | {"output_dir": self.output} | args
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        extra = {"model": folder, "processing_class": tokenizer} | (extra or {})
        load = transformers.AutoModelForCausalLM.from_pretrained
        if name in ("SDFT", "SDPO"):
            rows = {"prompt": prompts, "privileged_context": [word.upper() for word in WORDS]}
            common = {"max_completion_length": 6, "num_generations": 2} | common
        if name == "SDFT":
            theirs, config = sdft.SDFTTrainer, sdft.SDFTConfig
        elif name == "SDPO":
            theirs, config = sdpo.SDPOTrainer, sdpo.SDPOConfig
            extra["reward_funcs"] = reward
        elif name == "GKD":
            theirs, config = gkd.GKDTrainer, gkd.GKDConfig
            rows = {"messages": [[*p, {"role": "assistant", "content": "yes " * 3}] for p in prompts]}
            common = {"max_new_tokens": 6, "max_length": 48} | common
            extra["teacher_model"] = load(self.folder("qwen3"))
        else:
            theirs, config = trl.DistillationTrainer, trl.DistillationConfig
            rows = {"prompt": prompts}
            common = {"max_completion_length": 6} | common
            extra["teacher_model"] = load(self.folder("qwen3"))
        cls = theirs if side is trl else getattr(side, theirs.__name__)
        return cls(args=config(**common), train_dataset=datasets.Dataset.from_dict(rows), **extra)


@pytest.fixture
def side(model_folder: Callable[[str], Path], tmp_path: Path) -> Side:
    return Side(model_folder, tmp_path / "out")


def batch(trainer: Any) -> dict[str, Any]:
    """A micro-batch as the trainer itself makes it."""
    trainer.model.train()
    torch.manual_seed(0)
    made = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    if isinstance(trainer, gkd.GKDTrainer):
        made["prompts"]  # what its training_step generates from
    return made


def gradients(trainer: Any, loss: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def compare(trainer: Any, inputs: dict[str, Any], rtol: float = 2e-4) -> Tensor:
    """TRL's loss on our very trainer, model and batch; returns the loss, far from zero."""
    base = type(trainer).__mro__[2 if type(trainer) in (ours.GKDTrainer, ours.DistillationTrainer) else 3]
    assert base.__module__.startswith("trl.")
    theirs = base.compute_loss(trainer, trainer.model, dict(inputs))
    return theirs
