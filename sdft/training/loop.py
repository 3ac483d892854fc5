"""The loop: batch -> rollout -> score -> loss -> update -> metrics -> checkpoint. Read it top to bottom."""

import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdft import devices, files
from sdft.config import Config, describe, get, load_config, to_toml, validate
from sdft.data.dataset import Dataset, TokenizedExample, batch_indices, tokenize
from sdft.data.formats import load_records
from sdft.data.records import Example
from sdft.errors import FruitlessError, SdftError
from sdft.evaluation import accuracy as evaluate
from sdft.loss import TokenLoss, check_impl, cross_entropy_loss, divergence_loss
from sdft.model import card, flops, lean, loading
from sdft.model.loading import LanguageModel
from sdft.model.shape import Work
from sdft.planning import plan
from sdft.rollout import offline
from sdft.rollout.sampling import Completion, generate
from sdft.score.batch import lay_out, micro_batches, sequence_weights
from sdft.score.teacher import Teacher, check_other, other_weights
from sdft.training import checkpoint
from sdft.training.metrics import (
    MetricsLog,
    Phases,
    ProgressBar,
    check_trackers,
    peak_memory,
    read_metrics,
    token_metrics,
)
from sdft.training.retry import retry_with_less
from sdft.update import optim

# Settings that may differ between a run and its resumption: they change nothing that was computed. The last ones do
# change how what follows is rounded or drawn, yet a run that memory has stopped must be able to go on with less.
FREE_ON_RESUME = (
    "train.resume",
    "train.resume_step",
    "train.trackers",
    "train.save_every",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.on_nonfinite",
    "train.output",
    "train.micro_batch_tokens",
    "rollout.batch_size",
    "teacher.offload",
    "optim.offload",
    "eval.batch_size",
    "loss.chunk_bytes",
    "model.gradient_checkpointing",
    "model.activation_offload",
)


@dataclass
class Run:
    """Everything a step needs."""

    config: Config
    model: LanguageModel
    tokenizer: Any
    data: Dataset
    evals: dict[str, tuple[list[Example], list[list[int]]]]
    teacher: Teacher | None  # None for sft and dft
    optimizer: torch.optim.Optimizer
    steps: int
    phases: Phases
    micro_batch_tokens: int  # of the config; halved where memory ran out
    rollout_batch: int  # likewise
    frozen: str  # digest of the weights that no checkpoint holds
    result: dict[str, Any] = field(default_factory=dict)  # the newest evaluation
    best: dict[str, Any] = field(default_factory=dict)  # where train.keep_best was highest: on, step, accuracy
    guard: dict[str, Any] = field(default_factory=dict)  # eval.guard: baseline; once it has stopped the run, stopped
    offline: str = ""  # digest of the answers sampled before the first step


class NonFiniteError(FruitlessError):
    """NaN or inf in a loss or gradient; weights untouched, batch saved."""


def train(config: Config) -> Path:
    """Runs or resumes a training run; returns the folder of the finished model.

    Raises SdftError for anything the user can put right, before long work starts where that can be known;
    KeyboardInterrupt after Ctrl-C, with a checkpoint written.
    """
    validate(config)
    print(describe(config))
    devices.settle()
    output = Path(config.train.output)
    prepare_output(config, output)
    with files.locked(output):
        return train_in(output, config)


def train_in(output: Path, config: Config) -> Path:
    """The run, in a folder that is its own."""
    start_from = starting_point(config, output)
    run = set_up(config, output)
    if start_from is None:
        files.write_text(output / "config.toml", to_toml(config))  # only now: a config refused above is not a run
    sampled = answer_offline(run, output) if config.answers == "offline" else {}
    step = 0
    if start_from is not None:
        step = resume(run, *start_from)
        if config.train.resume_step:
            set_aside(output, step)
        recall_best(run, output)
        files.write_text(output / "config.toml", to_toml(config))
    log = MetricsLog(output, step, config.train.trackers, asdict(config))
    bar = ProgressBar(step, run.steps)
    try:
        with interrupt_after_step() as interrupted:
            if step == 0:
                if sampled:
                    log.write({"step": 0, **sampled})
                evaluate_now(run, 0, log, bar)
            while step < run.steps and not run.guard.get("stopped"):
                try:
                    line = train_step(run, step, output)
                except NonFiniteError:
                    if step:
                        save_checkpoint(run, step, log, output)  # the weights are those of the step before
                    raise
                step += 1
                log.write({"step": step, **line})
                bar.update(step, line)
                better = False
                if config.eval.every and (step % config.eval.every == 0 or step == run.steps):
                    evaluate_now(run, step, log, bar)
                    better = is_best(run, step)
                if interrupted() or better or (config.train.save_every and step % config.train.save_every == 0):
                    save_checkpoint(run, step, log, output)
                if interrupted() and step < run.steps:
                    bar.say(f"Stopped after step {step}; saved. Go on with --resume.")
                    raise KeyboardInterrupt
        save_checkpoint(run, step, log, output)
        if run.guard.get("stopped"):
            back_to_best(run, output, bar)
        folder = finish(run, output)
    finally:
        bar.close()
        log.close()
    print(f"Model: {folder}")
    if run.best and config.train.keep_best:
        print(f"Best {told(run.best)}: {checkpoint.checkpoint_folder(output, run.best['step'])}")
    return folder


# One step.


def train_step(run: Run, step: int, output: Path) -> dict[str, Any]:
    """One optimizer step; returns its metrics. Raises NonFiniteError with the weights untouched."""
    config, began = run.config, time.perf_counter()
    seed_step(config.train.seed, step)
    batch = [
        run.data.examples[i]
        for i in batch_indices(len(run.data.examples), config.train.batch_size, step, config.train.seed)
    ]
    run.phases.spans.clear()
    with run.phases("rollout"):
        examples, completions = retry_with_less(
            run.model.device,
            f"step {step + 1}, rollout",
            lambda: answers(run, batch, step),
            lambda: halve_rollout(run),
            lambda: memory_advice(config),
        )
    scored = retry_with_less(
        run.model.device,
        f"step {step + 1}, gradients",
        lambda: accumulate_gradients(run, examples, completions),
        lambda: halve_tokens(run, sum(sequence_sizes(run, examples, completions))),
        lambda: memory_advice(config),
    )
    loss = scored.loss
    with run.phases("update"):
        rate = optim.learning_rate(step, run.steps, config.optim)
        parameters = list(run.model.trainable().values())
        norm = optim.clip(parameters, config.optim)
        # The step's one wait for the device: an update with NaN in it could not be taken back.
        finite = bool(torch.isfinite(norm + loss))
        if finite:
            if run.teacher is not None:
                run.teacher.wait()  # it may still be reading the weights
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        if finite and run.teacher is not None:
            run.teacher.update()
        devices.return_freed(run.model.device)
    if not finite:
        on_nonfinite(run, step, examples, completions, loss.item(), norm.item(), output)

    work = Work(
        tuple(len(e.prompt) for e in examples),
        tuple(len(e.teacher_prompt) for e in examples) if run.teacher else (),
        tuple(len(c.ids) for c in completions),
    )
    tokens = sum(work.completions)
    seconds = run.phases.seconds()
    return {
        "loss": loss.item(),
        "grad_norm": norm.item(),
        "lr": rate,
        **({} if finite else {"skipped": True}),
        **({"teacher_tracked": run.teacher.tracked().item()} if run.teacher else {}),
        **token_metrics(scored.parts, scored.positions),
        "answer_tokens": tokens / len(completions),
        "truncated": sum(c.truncated for c in completions) / len(completions),
        **({"micro_batch_tokens": run.micro_batch_tokens} if run.micro_batch_tokens else {}),
        "real_tokens": scored.real / max(1, scored.computed),
        "tokens": tokens,
        "tokens_per_second": tokens / (time.perf_counter() - began),
        **flops.logged(run.model.inner.config, lambda shape: flops.step_flops(shape, config, work).total),
        "seconds": seconds,
        "peak_memory": peak_memory(run.model.device),
    }


def seed_step(seed: int, step: int) -> None:
    """Every draw of a step follows from (seed, step): a resumed run samples what the undisturbed one would have."""
    torch.manual_seed(random.Random(f"{seed}/{step}").getrandbits(63))


def answers(run: Run, examples: list[TokenizedExample], step: int) -> tuple[list[TokenizedExample], list[Completion]]:
    """The step's answers, as Config.answers says; examples repeated to match."""
    config = run.config
    if config.answers == "demonstrations":
        return examples, [Completion(e.target, truncated=False) for e in examples]
    if config.answers == "offline":
        pairs = [(e, Completion(ids, ids[-1] not in run.model.stop_ids)) for e in examples for ids in e.samples]
        return [example for example, _ in pairs], [completion for _, completion in pairs]
    examples = [e for e in examples for _ in range(config.rollout.per_prompt)]
    # In turns by step, not by prompt: two half batches would take nearly twice the time of a whole one.
    by_teacher = config.rollout.source == "teacher" or (config.rollout.source == "mixed" and step % 2 == 1)
    prompts = [e.teacher_prompt if by_teacher else e.prompt for e in examples]
    weights = run.teacher.weights if run.teacher and by_teacher else contextlib.nullcontext
    return examples, generate(run.model, prompts, replace(config.rollout, batch_size=run.rollout_batch), weights)


@dataclass
class Scored:
    """What scoring a step gives; the gradients themselves are in the parameters."""

    loss: torch.Tensor  # of the whole step, 0-dim
    parts: list[TokenLoss] = field(default_factory=list)  # per micro-batch
    positions: list[list[int]] = field(default_factory=list)  # of each trained token in its answer, per micro-batch
    real: int = 0  # tokens that were run and are no padding, both sides
    computed: int = 0  # tokens that were run


def sequence_sizes(run: Run, examples: Sequence[TokenizedExample], completions: Sequence[Completion]) -> list[int]:
    """Tokens of each sequence, those of the longer side: what micro-batches are cut by."""
    return [
        max(len(e.prompt), len(e.teacher_prompt) if run.teacher else 0) + len(c.ids)
        for e, c in zip(examples, completions, strict=True)
    ]


def accumulate_gradients(run: Run, examples: Sequence[TokenizedExample], completions: Sequence[Completion]) -> Scored:
    """Scores and backpropagates the step in micro-batches; gradients add up in the parameters."""
    config, model = run.config, run.model
    # The mask is for the teacher's preamble; a demonstration has none.
    skip = 0 if config.answers == "demonstrations" else config.loss.mask_first
    lengths = [len(c.ids) for c in completions]
    weights = sequence_weights(lengths, replace(config.loss, mask_first=skip))
    scored = Scored(torch.zeros((), device=model.device))
    sizes = sequence_sizes(run, examples, completions)
    for group in micro_batches(sizes, run.micro_batch_tokens, model.packed):
        where = [j for i in group for j in range(skip, lengths[i])]
        if not where:
            continue
        ids = [completions[i].ids for i in group]
        layout = (ids, model.pad_id, model.device, skip, model.packed)
        row_weights = torch.tensor(
            [weights[i] for i in group for _ in range(skip, lengths[i])], device=model.device
        )  # (N,)
        batches = [lay_out([examples[i].prompt for i in group], *layout)]
        with run.phases("score"):
            teacher_side = None
            if run.teacher is not None:
                batches.append(lay_out([examples[i].teacher_prompt for i in group], *layout))
                teacher_side = run.teacher.hidden(batches[1])  # (N, H), head
            with loading.saved_activations() if config.model.activation_offload else contextlib.nullcontext():
                hidden = batches[0].select(model.hidden(batches[0].input_ids, batches[0].lengths))  # (N, H)
        labels = batches[0].labels  # (N,)
        with run.phases("loss"), model.autocast():
            if teacher_side is None:
                loss, part = cross_entropy_loss(hidden, model.head(), labels, row_weights, config.loss)
            else:
                loss, part = divergence_loss(hidden, model.head(), *teacher_side, labels, row_weights, config.loss)
        with run.phases("backward"):
            loss.backward()
        scored.loss += loss.detach()
        scored.parts.append(part)
        scored.positions.append(where)
        scored.real += sum(b.real for b in batches)
        scored.computed += sum(b.input_ids.numel() for b in batches)
    return scored


def halve_rollout(run: Run) -> str:
    """Half as many prompts generate together, from now on."""
    run.rollout_batch = max(1, min(run.rollout_batch, run.config.train.batch_size * run.config.rollout.per_prompt) // 2)
    return f"rollout.batch_size = {run.rollout_batch}"


def halve_tokens(run: Run, whole: int) -> str:
    """Half as many tokens in a forward pass, from now on; drops the gradients of the attempt that failed."""
    run.optimizer.zero_grad(set_to_none=True)
    run.micro_batch_tokens = max(1, min(run.micro_batch_tokens or whole, whole) // 2)
    return f"train.micro_batch_tokens = {run.micro_batch_tokens}"


def memory_advice(config: Config) -> str:
    """What to change in a config that ran out of memory, by what `sdft plan` predicts of it."""
    shape, work, machine = plan.shape_of(config), plan.work_of(config), plan.this_machine(config)
    # It did run out, whatever was predicted: so ask for what makes the prediction smaller.
    less = int(0.9 * plan.predict(shape, config, work, machine).peak)
    said = plan.advice(shape, config, work, replace(machine, memory=min(less, machine.memory)))
    return "By `sdft plan`: " + "; ".join(said) + "."


def on_nonfinite(
    run: Run,
    step: int,
    examples: Sequence[TokenizedExample],
    completions: Sequence[Completion],
    loss: float,
    norm: float,
    output: Path,
) -> None:
    """Saves the offending batch; raises NonFiniteError unless the step is to be skipped."""
    path = output / f"nonfinite-step-{step + 1:06d}.json"
    rows = [
        {"prompt": e.prompt, "teacher_prompt": e.teacher_prompt, "completion": c.ids}
        for e, c in zip(examples, completions, strict=True)
    ]
    files.write_text(path, json.dumps({"step": step + 1, "loss": str(loss), "grad_norm": str(norm), "batch": rows}))
    if run.config.train.on_nonfinite == "stop":
        raise NonFiniteError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; the weights are untouched and the batch is in "
            f"{path}. Lower optim.lr in another run, or go on with --resume --train.on-nonfinite skip"
        )


# Before and after.


def prepare_output(config: Config, output: Path) -> None:
    """Makes the run's folder, or checks that it may go on. Raises SdftError where it holds anything else."""
    saved = output / "config.toml"
    ours = {"partial-config.toml", "partial-probe"}  # a first start that was killed may have left these
    if saved.exists():
        if not config.train.resume:
            raise SdftError(
                f"train.output = {str(output)!r} holds another run; give another folder, or --resume to go on with it"
            )
        same_run(_dotted(asdict(load_config(saved))), config, output)
    elif output.is_dir() and any(path.name not in ours for path in output.iterdir()):
        raise SdftError(f"train.output = {str(output)!r} is not empty and not a run of sdft; give another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "partial-probe").touch()
        (output / "partial-probe").unlink()
    except OSError as error:
        raise SdftError(f"train.output = {str(output)!r} cannot be written ({error.strerror})") from None


def starting_point(config: Config, output: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from and its state, or None for a first step; clears away what a kill left half done.

    Raises SdftError where that checkpoint is damaged, is another run's, or is not there.
    """
    files.clear_partials(output)
    files.clear_partials(output / "eval")
    if not config.train.resume:
        return None
    folder = checkpoint.latest(output)
    if step := config.train.resume_step:
        folder = checkpoint.checkpoint_folder(output, step)
        if not folder.is_dir():
            steps = ", ".join(str(checkpoint.step_of(f)) for f in checkpoint.checkpoints(output))
            raise SdftError(
                f"train.resume_step = {step}: {output} has no checkpoint of that step; it has {steps or 'none at all'}"
            )
    if folder is None:
        return None
    state = checkpoint.read_state(folder)
    same_run(state["config"], config, folder)
    return folder, state


def same_run(before: dict[str, Any], config: Config, where: Path) -> None:
    """Raises SdftError for the first setting that would make the resumed run another one.

    before: the settings in `where`, by dotted name.
    """
    default, now = _dotted(asdict(Config())), _dotted(asdict(config))
    for key in now:
        was = before.get(key, default.get(key))  # a setting that an earlier version did not have
        if key not in FREE_ON_RESUME and json.dumps(was) != json.dumps(now[key]):  # a tuple is a list in a file
            raise SdftError(
                f"--resume: {key} was {was!r} in {where} and is now {now[key]!r}; put it back, or start another run"
            )


def _dotted(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def set_up(config: Config, output: Path) -> Run:
    """Data first (cheap, and most mistakes are there), then the weights."""
    check_trackers(config.train.trackers)
    device = loading.pick_device(config.model.device)
    check_offload(config, device)
    optim.check_optimizer(config.optim, device)
    if config.loss.has_teacher:
        check_impl(config.loss, device)
    records = load_records(config.data.train, config.data.split)
    eval_records = {name: load_records(path) for name, path in config.eval.all_sets.items()}
    for name, examples in eval_records.items():
        evaluate.check_evaluable(examples, name)
    loading.check_earlier(config.model, config.lora)
    tokenizer, stop_ids = loading.load_tokenizer(config.model)
    if config.teacher.model:
        check_other(config, tokenizer)
    data = tokenize(records, tokenizer, stop_ids, config.data, config.teacher)
    if data.dropped:
        print(f"Data: {data.dropped} of {len(records)} records are over a length budget and dropped.")
    evals = {
        name: (examples, evaluate.student_prompts(tokenizer, examples, config.data.system))
        for name, examples in eval_records.items()
    }
    model = loading.load(config.model, tokenizer, stop_ids)
    loading.enable_packing(model, config.train.packing)
    loading.check_context(model, *longest(data, config))
    loading.set_up_lora(model, config.lora, config.train.seed)
    if config.model.gradient_checkpointing:
        loading.enable_gradient_checkpointing(model)
    lean.scatter_gradient(model.inner.get_input_embeddings())
    devices.return_freed_within(model.lm, model.device)
    model.lm.train()
    other = other_weights(config, model) if config.teacher.model else None
    teacher = Teacher(model, config.teacher, other) if config.loss.has_teacher else None
    parameters = model.trainable()
    trained = sum(p.numel() for p in parameters.values())
    print(
        f"Model: {config.model.name}, {trained / 1e6:.1f}M weights train; {model.device.type}, products in "
        f"{str(model.compute_dtype).removeprefix('torch.')}, attention {loading.attention_name(model)}. "
        f"Data: {len(data.examples)} records."
    )
    check_space(config, model, output)
    steps = config.train.steps or math.ceil(config.train.epochs * len(data.examples) / config.train.batch_size)
    optimizer = optim.make_optimizer(parameters.values(), config.optim)
    return Run(
        config,
        model,
        tokenizer,
        data,
        evals,
        teacher,
        optimizer,
        steps,
        Phases(model.device),
        config.train.micro_batch_tokens,
        config.rollout.batch_size,
        checkpoint.frozen_digest(model),
    )


def answer_offline(run: Run, output: Path) -> dict[str, Any]:
    """rollout.source = offline: the training prompts' answers, by the teacher as it is at the start; for metrics.jsonl.

    The model must still be as it was loaded: that is the teacher at the start, unless teacher.model is.
    """
    config, rollout, device = run.config, run.config.rollout, run.model.device
    weights = run.teacher.weights if run.teacher and config.teacher.model else contextlib.nullcontext
    names = ("per_prompt", "max_new_tokens", "temperature", "top_p", "top_k")
    with weights():
        start = checkpoint.weights_digest(run.model.lm.named_parameters())
    origin = {
        "data": run.data.digest,
        **{f"rollout.{name}": getattr(rollout, name) for name in names},
        **{key: get(config, key) for key in ("train.seed", "model.name", "teacher.model", "model.compute_dtype")},
        "weights": start,
    }

    def sample(prompts: list[list[int]]) -> list[list[int]]:
        found = retry_with_less(
            device,
            "answers before the first step",
            lambda: generate(run.model, prompts, replace(rollout, batch_size=run.rollout_batch), weights),
            lambda: halve_rollout(run),
            lambda: memory_advice(config),
        )
        devices.return_freed(device)
        return [completion.ids for completion in found]

    prompts = [e.teacher_prompt for e in run.data.examples]
    found = offline.collect(
        output, origin, prompts, rollout.per_prompt, rollout.batch_size, config.train.seed, sample,
        lambda ids: run.tokenizer.decode(ids, skip_special_tokens=True),
    )  # fmt: skip
    pairs = zip(run.data.examples, found.answers, strict=True)
    run.data = replace(run.data, examples=tuple(replace(e, samples=samples) for e, samples in pairs))
    run.offline = found.digest
    answers = [ids for samples in found.answers for ids in samples]
    tokens = sum(map(len, answers))
    asked = [len(e.teacher_prompt) for e in run.data.examples for _ in e.samples]
    count = partial(flops.answer_flops, prompts=asked, answers=list(map(len, answers)))
    return {
        "offline_answers": len(answers),
        "answer_tokens": tokens / len(answers),
        "truncated": sum(ids[-1] not in run.model.stop_ids for ids in answers) / len(answers),
        "tokens": tokens,
        **flops.logged(run.model.inner.config, count),
        "seconds": {"rollout": found.seconds},
    }


def check_offload(config: Config, device: torch.device) -> None:
    """Raises SdftError where there is no GPU to take memory from."""
    for key in ("teacher.offload", "optim.offload", "model.activation_offload"):
        if get(config, key) and device.type != "cuda":
            raise SdftError(
                f"{key} = true moves memory from a CUDA device to the CPU, and the model runs on {device}; drop it"
            )


def longest(data: Dataset, config: Config) -> tuple[int, int]:
    """The longest prompt that will be run, and the longest answer after it."""
    if config.answers == "demonstrations":
        example = max(data.examples, key=lambda e: len(e.prompt) + len(e.target))
        return len(example.prompt), len(example.target)
    return max(max(len(e.prompt), len(e.teacher_prompt)) for e in data.examples), config.rollout.max_new_tokens


def check_space(config: Config, model: LanguageModel, output: Path) -> None:
    """Raises SdftError where checkpoints and the model will not fit on the disk."""
    ema = config.loss.has_teacher and config.teacher.kind != "live"
    one = checkpoint.checkpoint_bytes(model, ema)
    kept = config.train.keep_checkpoints + bool(best_on(config))
    more = max(0, kept - len(checkpoint.checkpoints(output))) + 1  # those of a resumed run are there already
    saved = model.lm.parameters() if model.own_base else model.trainable().values()
    need = one * more + sum(p.numel() * p.element_size() for p in saved)
    free = shutil.disk_usage(output).free
    if free < need:
        raise SdftError(
            f"train.output = {str(output)!r}: {need / 2**30:.1f} GiB may be needed for checkpoints and model, "
            f"{free / 2**30:.1f} GiB are free; free some, or lower train.keep_checkpoints"
        )


def save_checkpoint(run: Run, step: int, log: MetricsLog, output: Path) -> None:
    """Checkpoint of `step` finished steps, unless it is there already; older ones go, but for the best."""
    log.sync()
    if not checkpoint.checkpoint_folder(output, step).exists():
        facts = {
            "data": run.data.digest,
            "frozen": run.frozen,
            "config": {k: v for k, v in _dotted(asdict(run.config)).items() if k not in FREE_ON_RESUME},
            "result": run.result,
            "best": run.best,
            "guard": run.guard,
            "offline": run.offline,
            "micro_batch_tokens": [run.config.train.micro_batch_tokens, run.micro_batch_tokens],
            "rollout_batch": [run.config.rollout.batch_size, run.rollout_batch],
        }
        checkpoint.save_checkpoint(output, step, run.model, run.teacher, run.optimizer, facts)
    checkpoint.prune(output, run.config.train.keep_checkpoints, run.best.get("step"))


def resume(run: Run, folder: Path, state: dict[str, Any]) -> int:
    """Puts a checkpoint in place; returns the number of finished steps."""
    if state["data"] != run.data.digest:
        raise SdftError(
            f"--resume: the data in {run.config.data.train} is not what {folder} was trained on; put it back"
        )
    if state["frozen"] != run.frozen:
        raise SdftError(
            f"--resume: the frozen weights of model.name = {run.config.model.name!r} are not those that {folder} was "
            "trained on; put them back"
        )
    if state.get("offline", "") != run.offline:
        raise SdftError(
            f"--resume: the answers in {folder.parents[1] / 'offline.jsonl'} are not those that {folder} was trained "
            "on; put them back"
        )
    checkpoint.load_checkpoint(folder, run.model, run.teacher, run.optimizer)
    run.result, run.best, run.guard = state["result"], state["best"], state.get("guard", {})
    if state["micro_batch_tokens"][0] == run.micro_batch_tokens:  # asked for again: go on with what fitted
        run.micro_batch_tokens = state["micro_batch_tokens"][1]
    if state["rollout_batch"][0] == run.rollout_batch:
        run.rollout_batch = state["rollout_batch"][1]
    print(f"Resumed after step {state['step']} from {folder}.")
    return int(state["step"])


def set_aside(output: Path, step: int) -> None:
    """Moves what the run wrote after `step` into OUTPUT/set-aside-after-step-N (-2, -3 where that is taken).

    Checkpoints, answers, saved batches, the finished model, and a copy of metrics.jsonl: going on from an earlier
    step deletes nothing, and no later start looks there.
    """
    found = (
        *(output / "checkpoints").glob("step-*"), *(output / "eval").glob("step-*"),
        *output.glob("nonfinite-step-*"),
    )  # fmt: skip
    numbers = {path: re.search(r"step-(\d+)", path.name) for path in found}
    later = [path for path, number in numbers.items() if number and int(number[1]) > step]
    later += [path for path in (output / "model",) if path.exists()]
    lines = read_metrics(output)
    if not later and all(line["step"] <= step for line in lines):
        return
    name = f"set-aside-after-step-{step:06d}"
    folder = next(f for i in itertools.count(1) if not (f := output / (name + f"-{i}" * (i > 1))).exists())
    files.write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    try:
        for path in later:
            target = folder / path.relative_to(output)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
    except OSError as error:
        raise SdftError(f"{folder}: not written: {files.why(error)}") from error
    print(f"What came after step {step} is in {folder}; delete it once it is of no use.")


def best_on(config: Config) -> str:
    """The set whose best checkpoint is kept; the guard, of which the newest is, where train.keep_best names none."""
    return config.train.keep_best or config.eval.guard_set


def accuracy_on(config: Config, result: dict[str, float]) -> float:
    on = best_on(config)
    return statistics.fmean(result[name] for name in config.eval.sets) if on == "mean" else result[on]


def is_best(run: Run, step: int) -> bool:
    """Notes whether the newest evaluation is better, on train.keep_best, than every one since the first step.

    With eval.guard only what respects its limit counts; without keep_best, the newest that does is the best.
    """
    if not best_on(run.config) or run.guard.get("stopped"):
        return False
    accuracy = accuracy_on(run.config, run.result)
    if run.best and accuracy <= run.best["accuracy"] and run.config.train.keep_best:
        return False
    run.best = {"on": best_on(run.config), "step": step, "accuracy": accuracy}
    return True


def recall_best(run: Run, output: Path) -> None:
    """Forgets a best that train.keep_best no longer asks for, or whose checkpoint has gone."""
    if not run.best:
        return
    folder, on = checkpoint.checkpoint_folder(output, run.best["step"]), best_on(run.config)
    if run.best["on"] != on and not run.guard:
        run.best = {}
    elif not folder.is_dir():
        print(f"The checkpoint that was best {told(run.best)} is not there any more; the best is sought anew.")
        run.best = {}
    elif run.best["on"] != on:  # the guard still goes back to it, until a better one comes
        run.best |= {"on": on, "accuracy": accuracy_on(run.config, checkpoint.read_state(folder)["result"])}


def judge(run: Run, step: int) -> dict[str, Any]:
    """What eval.guard says of the newest evaluation, for its line in metrics.jsonl; notes the baseline and a stop."""
    config = run.config.eval
    if not config.guard:
        return {}
    accuracy = run.result[config.guard_set]
    if step == 0:
        run.guard = {"baseline": accuracy}
    drop = 100 * (run.guard["baseline"] - accuracy)  # percentage points
    respected = drop <= config.max_drop + 1e-9  # a drop of just max_drop is allowed, however it is rounded
    if not respected:
        run.guard["stopped"] = {"step": step, "drop": drop}
    return {"guard": {"baseline": run.guard["baseline"], "drop": drop, "respected": respected}}


def back_to_best(run: Run, output: Path, bar: ProgressBar) -> None:
    """After eval.guard has stopped the run: takes the best checkpoint that respects its limit.

    Raises FruitlessError where there is none: the start would be a model that was never trained.
    """
    config, stopped = run.config.eval, run.guard["stopped"]
    said = (
        f"Stopped after step {stopped['step']} by eval.guard: accuracy on {config.guard_set} is {stopped['drop']:.1f} "
        f"points below the {run.guard['baseline']:.1%} of the start, and eval.max_drop = {config.max_drop:g}."
    )
    if not run.best:
        raise FruitlessError(
            f"{said} No checkpoint after the start respects that, so {output / 'model'} is not written. Lower "
            "optim.lr or eval.every in another run"
        )
    folder = checkpoint.checkpoint_folder(output, run.best["step"])
    state = checkpoint.read_state(folder)
    checkpoint.load_checkpoint(folder, run.model, run.teacher, run.optimizer)
    run.result, run.steps = state["result"], state["step"]  # what the model's card tells
    bar.say(f"{said} The model is that of step {run.steps}, the best that respects it.")


def told(best: dict[str, Any]) -> str:
    return f"on {best['on']}: {best['accuracy']:.1%} after step {best['step']}"


@contextlib.contextmanager
def interrupt_after_step() -> Iterator[Any]:
    """Ctrl-C (or SIGTERM) lets the step finish; a second one does not wait. Yields a function that tells."""
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        print("\nStopping after this step (once more to stop at once) ...", flush=True)

    try:
        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are someone else's
        yield lambda: False
        return
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def evaluate_now(run: Run, step: int, log: MetricsLog, bar: ProgressBar) -> None:
    """Greedy accuracy on every evaluation set; a line in metrics.jsonl and the answers under eval/."""
    if not run.config.eval.every:
        return
    for name, (examples, prompts) in run.evals.items():
        c = run.config.eval
        result = evaluate.evaluate(run.model, run.tokenizer, examples, prompts, c.max_new_tokens, c.batch_size)
        run.result[name] = result.accuracy
        rows = "".join(json.dumps(asdict(a)) + "\n" for a in result.answers)
        files.write_text(Path(run.config.train.output) / "eval" / f"step-{step:06d}-{name}.jsonl", rows)
    log.write({"step": step, "eval": dict(run.result), **judge(run, step)})
    bar.say(f"step {step}: " + "  ".join(f"{name} {value:.1%}" for name, value in run.result.items()))


def finish(run: Run, output: Path) -> Path:
    """Writes the model (or adapter), its tokenizer and its card, aside first."""
    final, partial = output / "model", output / "partial-model"
    shutil.rmtree(partial, ignore_errors=True)
    text = card.model_card(run.config, run.data.digest, len(run.data.examples), run.steps, run.result)
    try:
        loading.save(run.model, run.tokenizer, partial, final)
        (partial / "README.md").write_text(text)
        if final.exists():  # of an earlier end of this run, the same weights
            files.remove(final, output)
        files.publish(partial, final)
    except Exception as error:  # safetensors wraps a full disk in a kind of its own
        shutil.rmtree(partial, ignore_errors=True)
        raise SdftError(
            f"{final}: not written: {files.why(error)}; the newest checkpoint is whole: --resume writes it"
        ) from error
    return final
