"""The state of a training run: what a step reads and changes. Nothing outside sdft.training uses it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sdft.config import Config
from sdft.data.dataset import Dataset
from sdft.data.records import Example
from sdft.model.language_model import LanguageModel
from sdft.rollout.engine import Engine
from sdft.score.teacher import Teacher
from sdft.training.metrics import Phases


def general_advice(config: Config) -> str:
    """What to change in a config that ran out of memory, if nothing has predicted its memory."""
    return "Lower train.micro_batch_tokens and rollout.batch_size; `sdft plan` finds what fits."


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    on: str  # evaluation set, or mean
    step: int  # finished steps
    accuracy: float


@dataclass(frozen=True)
class Stop:
    """The evaluation that broke eval.guard's limit."""

    step: int  # finished steps
    drop: float  # of accuracy since the start, in percentage points


@dataclass(frozen=True)
class GuardState:
    """What eval.guard found so far."""

    baseline: float  # accuracy before the first step
    stopped: Stop | None = None


@dataclass
class Run:
    config: Config
    model: LanguageModel
    engine: Engine
    tokenizer: Any
    data: Dataset
    evals: dict[str, tuple[list[Example], list[list[int]]]]  # by set: examples and the token ids of their prompts
    teacher: Teacher | None  # None if the method needs none
    optimizer: torch.optim.Optimizer
    steps: int
    phases: Phases
    micro_batch_tokens: int  # the config's, halved if memory ran out
    rollout_batch: int  # the config's, halved if memory ran out
    frozen: str  # digest of the weights that no checkpoint holds
    result: dict[str, float] = field(default_factory=dict)  # the newest evaluation: accuracy by set
    best: Best | None = None
    guard: GuardState | None = None
    offline: str = ""  # digest of the completions sampled before the first step
    advise: Callable[[Config], str] = general_advice

    @property
    def stopped(self) -> Stop | None:
        """Set once eval.guard has stopped the run."""
        return self.guard.stopped if self.guard else None

    def advice(self) -> str:
        """What to change after memory has run out; general advice if a prediction fails, which must not hide that."""
        try:
            return self.advise(self.config)
        except Exception:  # a model that cannot be simulated, or too little memory to simulate it in
            return general_advice(self.config)
