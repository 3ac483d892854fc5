"""One run of whole training steps, of our trainer or TRL's SDFTTrainer; bench/step.py lists what is equal in both."""

import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch

from .measure import Row, proc_bytes, reason

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

LR, EMA_ALPHA, RANK = 1e-5, 0.02, 16
TEMPLATE = "{request}\n\n{demonstration}"  # SDFTConfig.teacher_prompt_template
TIMED = (
    "rollout",
    "score",
    "loss",
    "backward",
)  # training.metrics.PHASES without `update`, which is the rest of the step
NO_TOKEN = 2**31 - 1  # a stop token that no vocabulary has


@dataclass(frozen=True)
class Shape:
    """A step: `completions` prompts of `prompt_tokens` tokens or more, each completed with `new_tokens` tokens."""

    completions: int
    new_tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class Contender:
    """A trainer, with what differs from the common settings in run_ours and run_trl."""

    name: str
    trainer: str  # ours or trl
    lora: bool = False
    settings: dict[str, Any] = field(default_factory=dict)  # settings of our config, or fields of SDFTConfig
    beside: str = ""  # for ours: the contender of TRL that it is compared with


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    contender: Contender
    shape: Shape
    model: str  # as model.name
    device: str  # cpu or cuda
    steps: int  # measured, at most
    seconds: float  # afterwards no step begins, once one is measured
    predict: bool = False  # for ours: also the prediction of `sdft plan`


# The data and the model, the same for both sides.


def records(shape: Shape, tokenizer: Any) -> list[dict[str, str]]:
    """One record for each completion: commands of the demo, as many in a prompt as its length needs."""
    from sdft.data import skills
    from sdft.data.prompts import encode_chat
    from sdft.data.records import Message

    pool = cycle(skills.demo()["commands-train"])
    rows = []
    for _ in range(shape.completions):
        asked: list[str] = []
        shown: list[str] = []
        length = 0
        while not asked or length < shape.prompt_tokens:
            record = next(pool)
            asked.append(record["prompt"])
            shown.append(record["demonstration"])
            length = len(encode_chat(tokenizer, [Message(role="user", content="; ".join(asked))], "bench.step"))
        rows.append({"prompt": "; ".join(asked), "demonstration": "; ".join(shown)})
    return rows


def random_qwen(folder: Path, device: str = "cpu", **sizes: int) -> str:
    """Writes a Qwen2.5-0.5B with random weights and a byte tokenizer, for a machine without weights.

    device: the device that draws the weights. sizes: fields of the config that differ. Returns the folder.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|pad|>")])
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=template
    )
    shape: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(Qwen2Config(**shape | sizes))
    lm.save_pretrained(folder)
    del lm
    if device == "cuda":
        torch.cuda.empty_cache()  # for the processes that measure the model
    tokenizer.save_pretrained(folder)
    return str(folder)


# One contender, in this process.


class Clock:
    """The times at which steps end, their phases, and the peak so far; the same for both trainers."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.deadline = time.perf_counter() + job.seconds
        self.libraries = proc_bytes("self/status", "VmRSS")  # before any weight
        self.ends: list[float] = []
        self.phases: list[dict[str, float]] = []
        self.peak = 0

    def step_ended(self, phases: dict[str, float]) -> bool:
        """phases: seconds of the step in each of TIMED. Returns whether there is time for another step."""
        if self.job.device == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.peak = proc_bytes("self/status", "VmHWM")
        self.ends.append(time.perf_counter())
        self.phases.append(phases)
        return len(self.ends) < 2 or 2 * self.ends[-1] - self.ends[-2] < self.deadline

    def row(self, answer_tokens: int) -> Row:
        """Medians over the steps after the first, which is warm-up and began before the clock."""
        seconds = [end - start for start, end in pairwise(self.ends)]
        if not seconds:
            raise RuntimeError(f"no second step within {self.job.seconds:.0f} s")
        parts = {name: [phases[name] for phases in self.phases[1:]] for name in TIMED}
        parts["update"] = [whole - sum(some) for whole, *some in zip(seconds, *parts.values(), strict=True)]
        median = statistics.median(seconds)
        return {
            "seconds": median,
            "least": min(seconds),
            "most": max(seconds),
            **{name: statistics.median(values) for name, values in parts.items()},
            "steps": len(seconds),
            "tokens_per_second": answer_tokens / median,
            "peak": self.peak,
            "libraries": self.libraries,
        }


def run_ours(job: Job, rows: list[dict[str, str]]) -> Row:
    """Steps of our trainer. No checkpoint and no model is written."""
    from sdft.config import Config, override, validate
    from sdft.device import limit_caches
    from sdft.training.metrics import MetricsLog
    from sdft.training.setup import set_up
    from sdft.training.step import train_step

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "train.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        output = Path(folder, "run")
        output.mkdir()
        common: dict[str, Any] = {
            "model.name": job.model,
            "model.device": job.device,
            "lora.rank": RANK if job.contender.lora else 0,
            "data.train": str(data),
            "teacher.kind": "ema",
            "teacher.ema_alpha": EMA_ALPHA,
            "teacher.context": "template",
            "teacher.template": TEMPLATE,
            "rollout.max_new_tokens": job.shape.new_tokens,
            "loss.divergence": "forward_kl",
            "optim.lr": LR,
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
            "train.output": str(output),
            "train.steps": job.steps + 1,
            "train.batch_size": job.shape.completions,
        }
        config = override(Config(), common | job.contender.settings)
        validate(config)
        limit_caches()  # as sdft.train does
        predicted = prediction(config) if job.predict else {}
        clock = Clock(job)
        run = set_up(config, output)
        whole = run.rollout_batch, run.micro_batch_tokens
        run.model.stop_ids = (NO_TOKEN,)
        log, losses = MetricsLog(output, 0, (), asdict(config)), []
        for step in range(job.steps + 1):
            line = train_step(run, step, output)
            log.write({"step": step + 1, **line})
            losses.append(line["loss"])
            if not clock.step_ended(line["seconds"]):
                break
        log.close()
        if (run.rollout_batch, run.micro_batch_tokens) != whole:
            raise torch.OutOfMemoryError  # the step ran again in halves, so this is another setting
    return clock.row(line["tokens"]) | {
        **predicted,
        "dtype": str(run.model.compute_dtype).removeprefix("torch."),
        "prompt_tokens": sum(len(e.prompt) for e in run.data.examples),
        "teacher_prompt_tokens": sum(len(e.teacher_prompt) for e in run.data.examples),
        "answer_tokens": line["tokens"],
        "real_tokens": line["real_tokens"],
        "losses": losses,
    }


def prediction(config: Any) -> Row:
    """The peak that `sdft plan` predicts, as this benchmark measures it; empty if sdft has no plan."""
    try:
        from sdft.planning.machine import this_machine
        from sdft.planning.plan import peak as predicted_peak
        from sdft.planning.work import shape_of, work_of
    except ImportError:
        return {}
    shape, work = shape_of(config), work_of(config)
    machine = this_machine(config)  # last, because on a CPU it counts the libraries that are loaded
    peak = predicted_peak(shape, config, work, machine)
    # The peak of the allocator leaves out the CUDA context; the resident memory of a process includes everything.
    return {"predicted": peak - (machine.runtime if machine.kind == "cuda" else 0)}


def run_trl(job: Job, rows: list[dict[str, str]]) -> Row:
    """Steps of TRL's SDFTTrainer, with timers around its methods."""
    import datasets
    import peft
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    from sdft.model.sources import resolve
    from sdft.training.metrics import Phases

    folder, _ = resolve(job.model)
    phases, clock = Phases(torch.device(job.device)), Clock(job)
    seen: dict[str, int] = {}

    class Timed(SDFTTrainer):
        def _prepare_training_batch(self, inputs: Any) -> Any:
            with phases("rollout"):
                batch = super()._prepare_training_batch(inputs)
            seen["prompt_tokens"] = int(batch["prompt_mask"].sum())
            seen["answer_tokens"] = int(batch["completion_mask"].sum())
            seen["teacher_prompt_tokens"] = int(batch["teacher_attention_mask"].sum()) - seen["answer_tokens"]
            return batch

        def _compute_teacher_student_logits(self, *args: Any) -> Any:
            with phases("score"):
                return super()._compute_teacher_student_logits(*args)

        def _compute_self_distillation_loss(self, *args: Any) -> Any:
            with phases("loss"):
                return super()._compute_self_distillation_loss(*args)

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            control.should_training_stop = not clock.step_ended(phases.seconds()) or state.global_step > job.steps
            phases.spans.clear()

    with tempfile.TemporaryDirectory() as output:
        common: dict[str, Any] = {
            "output_dir": output,
            "use_cpu": job.device == "cpu",
            "max_steps": job.steps + 1,
            "per_device_train_batch_size": job.shape.completions,
            "num_generations": 1,
            "max_completion_length": job.shape.new_tokens,
            "max_prompt_length": None,
            "generation_kwargs": {"min_new_tokens": job.shape.new_tokens},
            "distillation_mode": "full_logits",
            "distillation_alpha": 0.0,  # forward KL
            "teacher_model_kind": "ema",
            "teacher_update_rate": EMA_ALPHA,
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        args = SDFTConfig(**common | job.contender.settings)
        prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        shown = [row["demonstration"] for row in rows]
        lora = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = Timed(
            model=folder,
            args=args,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts, "privileged_context": shown}),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[Ends()],
            peft_config=lora if job.contender.lora else None,
        )
        backward = trainer.accelerator.backward

        def timed_backward(*args: Any, **others: Any) -> None:
            with phases("backward"):
                backward(*args, **others)

        trainer.accelerator.backward = timed_backward
        trainer.train()
        assert trainer.model is not None
        weights = next(trainer.model.parameters()).dtype
    return clock.row(seen["answer_tokens"]) | {
        "dtype": "bfloat16" if args.bf16 else str(weights).removeprefix("torch."),
        **seen,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def run_one(job: Job) -> Row:
    """The row of a job, run in this process. If it fails, the row holds a note."""
    from sdft.config import ModelConfig
    from sdft.model.loading import load_tokenizer

    tokenizer, _ = load_tokenizer(ModelConfig(name=job.model))
    try:
        return {"ours": run_ours, "trl": run_trl}[job.contender.trainer](job, records(job.shape, tokenizer))
    except Exception as error:
        return {"note": f"not possible: {reason(error)}"}
