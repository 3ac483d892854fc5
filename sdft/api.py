"""What `from sdft import ...` offers: train, check, plan, evaluate and generate, each with a typed result.

The commands print these results. Every function raises SdftError for what the user can put right, before long work if
it can be known before: a sentence with the setting, its value and the fix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft.config import Config, ModelConfig, RolloutConfig, override, validate
from sdft.data.formats import load_records
from sdft.data.prompts import encode_chat, set_chat_template, teacher_messages
from sdft.data.records import Example, Message
from sdft.errors import SdftError
from sdft.evaluation import accuracy, harness
from sdft.evaluation.accuracy import EvalResult, Uplift
from sdft.evaluation.harness import Score
from sdft.evaluation.pass_at_k import Samples, sample_answers
from sdft.model import loading
from sdft.model.language_model import LanguageModel
from sdft.planning.advice import advice, advice_after_running_out
from sdft.planning.machine import parse_size, this_machine
from sdft.planning.picture import verdict
from sdft.planning.plan import Plan, predict
from sdft.planning.work import shape_of, uniform_work, work_of
from sdft.rollout.engine import Engine
from sdft.rollout.sampling import ModelEngine
from sdft.training import loop
from sdft.training.metrics import read_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CheckResult",
    "Evaluation",
    "Generated",
    "LoadedModel",
    "PlanResult",
    "TrainResult",
    "check",
    "evaluate",
    "evaluate_harness",
    "generate",
    "load_model",
    "plan",
    "train",
]


# Training.


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    output: Path
    """The folder of the run: config, metrics, checkpoints, evaluations, model."""
    model: Path
    """The folder of the trained model, or of the trained adapter."""

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: one for each step, and one for each evaluation."""
        return read_metrics(self.output)

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Accuracy (0 to 1) of each evaluation set, by step; step 0 is before the first step."""
        return {line["step"]: line["eval"] for line in self.metrics() if "eval" in line}


def train(config: Config) -> TrainResult:
    """Runs or resumes a training run, and prints its progress.

    Raises SdftError for a config that cannot work, FruitlessError if the run ends without a model (NaN, or a guard that
    no checkpoint respects), and KeyboardInterrupt after Ctrl-C, with a checkpoint written.
    """
    return TrainResult(Path(config.train.output), loop.train(config, advice_after_running_out))


# Before training.


@dataclass(frozen=True)
class CheckResult:
    """The same requests, answered without the demonstration (student) and with it (teacher)."""

    student: EvalResult
    teacher: EvalResult
    works: bool
    """Whether SDFT can work here."""
    verdict: str
    """Why, in words."""

    @property
    def uplift(self) -> float:
        """Accuracy of the teacher minus accuracy of the student, from -1 to 1."""
        return self.teacher.accuracy - self.student.accuracy


def check(config: Config, count: int = 32) -> CheckResult:
    """Greedy accuracy on `count` training records, taken evenly from the data, without and with the demonstration.

    Reads the settings of model, data and teacher, and eval.max_new_tokens and eval.batch_size. Raises SdftError if the
    records lack demonstrations, or teacher.context shows none.
    """
    _at_least(1, count=count)
    validate(override(config, {"train.output": config.train.output or "unused"}))
    if config.teacher.context == "none":
        raise SdftError("teacher.context = 'none' shows no demonstration; there is nothing to check")
    records = load_records(config.data.train, config.data.split)
    count = min(count, len(records))
    picked = [records[i * len(records) // count] for i in range(count)]
    for example in picked:
        if not example.demonstrations:
            raise SdftError(f"{example.source}: 'demonstration' is missing; the check compares with and without it")
    accuracy.check_evaluable(picked)
    loaded, system = load_model(config.model, config.data.chat_template), config.data.system
    shown = [teacher_messages(e, config.teacher, system) for e in picked]
    prompts = (
        accuracy.student_prompts(loaded.tokenizer, picked, system),
        [encode_chat(loaded.tokenizer, m, e.source) for m, e in zip(shown, picked, strict=True)],
    )
    student, teacher = (
        accuracy.evaluate(
            loaded.engine, loaded.tokenizer, picked, p, config.eval.max_new_tokens, config.eval.batch_size
        )
        for p in prompts
    )
    return CheckResult(student, teacher, *Uplift(student, teacher).verdict())


@dataclass(frozen=True)
class PlanResult:
    """The predicted memory of a run."""

    plan: Plan
    """Bytes of each phase of a step, by what takes them."""
    verdict: str
    """Whether the run fits, in words."""
    advice: tuple[str, ...]
    """What to change if the run does not fit, the cheapest change first."""

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the memory of the device."""
        return self.plan.fits

    @property
    def peak(self) -> int:
        """Bytes that the phase with most memory takes."""
        return self.plan.peak


def plan(
    config: Config, memory: int | str = 0, *, prompt_tokens: int = 0, teacher_prompt_tokens: int = 0
) -> PlanResult:
    """Predicts the peak memory of every phase of a step; loads no weights.

    memory: size of the device, in bytes or as text such as "12GB"; 0 takes the device of this machine.
    prompt_tokens: tokens of every student prompt; 0 reads the prompts of data.train.
    teacher_prompt_tokens: with prompt_tokens, tokens of every teacher prompt; 0 adds a completion to prompt_tokens.

    Raises SdftError for a config that cannot work, or for a GPU whose size is neither given nor here.
    """
    _at_least(0, prompt_tokens=prompt_tokens, teacher_prompt_tokens=teacher_prompt_tokens)
    unused = {"train.output": config.train.output or "unused"}
    if prompt_tokens:
        unused["data.train"] = config.data.train or "unused"
    validate(override(config, unused))
    size = parse_size(memory) if isinstance(memory, str) else memory
    shape = shape_of(config)
    if prompt_tokens:
        longest = config.rollout.max_new_tokens
        work = uniform_work(config, prompt_tokens, teacher_prompt_tokens or prompt_tokens + longest, longest)
    else:
        work = work_of(config)
    machine = this_machine(config, size)
    found = predict(shape, config, work, machine)
    changes = () if found.fits else tuple(advice(shape, config, work, machine))
    return PlanResult(found, verdict(found), changes)


# With a model.


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, to evaluate or to generate more than once."""

    tokenizer: "PreTrainedTokenizerBase"
    """The tokenizer, as transformers loads it."""
    model: LanguageModel

    @property
    def engine(self) -> Engine:
        """The engine that samples from the model."""
        return ModelEngine(self.model)


ModelSource = str | Path | ModelConfig | LoadedModel
"""A hub name, a folder, an adapter folder, a .gguf file, smollm2-135m; a ModelConfig; or a model that is loaded."""


def load_model(model: ModelSource, chat_template: str = "", *, needs_chat: bool = True) -> LoadedModel:
    """Loads a model and its tokenizer; a loaded model is returned unchanged.

    chat_template: a Jinja file that becomes the chat template. needs_chat: refuse a model without a chat template.
    Raises SdftError if the model does not load.
    """
    if isinstance(model, LoadedModel):
        return model
    if not isinstance(model, (str, Path, ModelConfig)):
        raise SdftError(
            f"model must be a hub name, a path, a ModelConfig or a LoadedModel, not {type(model).__name__}; the model "
            "of a TrainResult is result.model"
        )
    config = model if isinstance(model, ModelConfig) else ModelConfig(name=str(model))
    tokenizer, stop_ids = loading.load_tokenizer(config)
    if chat_template or needs_chat:
        set_chat_template(tokenizer, chat_template)
    return LoadedModel(tokenizer, loading.load(config, tokenizer, stop_ids))


def read_evaluation(data: str | Path) -> list[Example]:
    """The records of an evaluation file. Raises SdftError if one has no answer, or a check that does not work."""
    if not isinstance(data, (str, Path)):
        raise SdftError(
            f"data must be the path of a .jsonl file or the name of a data set, not {type(data).__name__}; write the "
            "records to a file first"
        )
    examples = load_records(str(data))
    accuracy.check_evaluable(examples)
    return examples


@dataclass(frozen=True)
class Evaluation:
    """The answers of a model to the records of a file, each compared by the check of its record."""

    greedy: EvalResult
    """The greedy answers."""
    samples: Samples | None = None
    """How many of the sampled answers are right, if samples were asked for: `samples.pass_at(k)`."""

    @property
    def accuracy(self) -> float:
        """Fraction of the greedy answers that are right."""
        return self.greedy.accuracy


def evaluate(
    model: ModelSource,
    data: str | Path,
    *,
    system: str = "",
    max_new_tokens: int = 64,
    batch_size: int = 64,
    samples: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Evaluation:
    """Accuracy by greedy generation on the records of `data` (.jsonl with prompt and answer).

    system: system message of records that have none. max_new_tokens: longest answer. batch_size: prompts that are
    completed together. samples: sampled answers to each record, in addition; temperature, top_p and seed are theirs.

    Raises SdftError for records without an answer, for a model that does not load, and for a value out of range.
    """
    _at_least(0, samples=samples)
    if samples and temperature <= 0:
        raise SdftError(f"temperature = {temperature:g} with samples = {samples}: it must be above 0 to sample")
    sampling = RolloutConfig(max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature, top_p=top_p)
    examples = read_evaluation(data)
    loaded = load_model(model)
    engine, tokenizer = loaded.engine, loaded.tokenizer
    prompts = accuracy.student_prompts(tokenizer, examples, system)
    greedy = accuracy.evaluate(engine, tokenizer, examples, prompts, max_new_tokens, batch_size)
    drawn = sample_answers(engine, tokenizer, examples, prompts, samples, sampling, seed) if samples else None
    return Evaluation(greedy, drawn)


def evaluate_harness(
    model: ModelSource,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str = "",
    fewshot: int | None = None,
    chat: bool = False,
    allow_code: bool = False,
    batch_size: int = 64,
) -> dict[str, dict[str, Score]]:
    """Scores of tasks of lm-evaluation-harness: {task: {metric: Score}}; `harness.run` explains the options.

    Raises SdftError before the model is loaded if lm_eval is missing or a task is unknown.
    """
    harness.check(tasks, limit, include_path)
    loaded = load_model(model, needs_chat=chat)
    return harness.run(
        loaded.model, loaded.tokenizer, tasks, limit, include_path, fewshot, chat, allow_code, batch_size=batch_size
    )


@dataclass(frozen=True)
class Generated:
    """One completion."""

    prompt: str
    text: str
    """The completion, without special tokens."""
    truncated: bool
    """Whether max_new_tokens cut it off."""


def generate(
    model: ModelSource,
    prompts: str | Sequence[str],
    *,
    count: int = 1,
    system: str = "",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> tuple[Generated, ...]:
    """`count` completions of each prompt, which is one turn of the user; the completions of a prompt follow each other.

    temperature: 0 is greedy. The completions depend on the arguments alone: torch's random generator is left as it was.
    Raises SdftError for a model that does not load, and for a value out of range.
    """
    _at_least(1, count=count)
    if not prompts:
        raise SdftError(f"prompts = {prompts!r} holds no prompt; give one or more")
    sampling = RolloutConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    first = [Message(role="system", content=system)] if system else []
    asked = [p for p in ([prompts] if isinstance(prompts, str) else prompts) for _ in range(count)]
    loaded = load_model(model)
    ids = [encode_chat(loaded.tokenizer, [*first, Message(role="user", content=p)], "prompt") for p in asked]
    completions = loaded.engine.generate(ids, sampling, seed)
    texts = loaded.tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
    return tuple(Generated(p, text, c.truncated) for p, text, c in zip(asked, texts, completions, strict=True))


def _at_least(low: int, **given: int) -> None:
    for name, value in given.items():
        if type(value) is not int or value < low:
            raise SdftError(f"{name} = {value!r} must be a whole number of at least {low}")
