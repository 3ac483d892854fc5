"""Before the first step: the run's folder, the data, the weights, the teacher, the optimizer."""

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sdft import parallel
from sdft.config import Config, get, load_config
from sdft.data.dataset import Dataset, tokenize
from sdft.data.formats import load_records
from sdft.data.records import Example
from sdft.device import return_freed_in_passes
from sdft.errors import SdftError
from sdft.evaluation import accuracy
from sdft.loss import check_impl
from sdft.methods import Method
from sdft.model import activations, loading, lora, packing, sources
from sdft.model.language_model import LanguageModel
from sdft.rollout.sampling import ModelEngine
from sdft.score.teacher import check_other, other_weights
from sdft.training import checkpoint
from sdft.training.guard import best_on
from sdft.training.metrics import Phases, check_trackers
from sdft.training.resume import check_same_run, dotted
from sdft.training.run import Run, general_advice
from sdft.update import optim
from sdft.update.ema import make_teacher


def prepare_output(config: Config, output: Path) -> None:
    """Makes the run's folder, or checks that a run may be resumed there. Raises SdftError if other files are in it."""
    saved = output / "config.toml"
    ours = {"partial-config.toml", "partial-probe"}  # a first start that was killed may have left these
    if saved.exists():
        if not config.train.resume:
            raise SdftError(
                f"train.output = {str(output)!r} holds another run; give another folder, or "
                "continue it with train.resume = true (--resume)"
            )
        check_same_run(dotted(asdict(load_config(saved))), config, output)
    elif output.is_dir() and any(path.name not in ours for path in output.iterdir()):
        raise SdftError(f"train.output = {str(output)!r} is not empty and not a run of sdft; give another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "partial-probe").touch()
        (output / "partial-probe").unlink()
    except OSError as error:
        raise SdftError(f"train.output = {str(output)!r} cannot be written ({error.strerror})") from None


def set_up(config: Config, output: Path, advise: Callable[[Config], str] = general_advice) -> Run:
    """A run before its first step. The data comes first: it is quick, and most mistakes are there.

    advise: what to change in a config that ran out of memory. Raises SdftError for anything that does not fit.
    """
    method = config.method
    device = check_before_loading(config, method)
    records = load_records(config.data.train, config.data.split)
    eval_records = {name: load_records(path) for name, path in config.eval.all_sets.items()}
    for examples in eval_records.values():
        accuracy.check_evaluable(examples)
    sources.check_earlier(config.model, config.lora)
    tokenizer, stop_ids = loading.load_tokenizer(config.model)
    if config.teacher.model:
        check_other(config, tokenizer)
    data = tokenize(records, tokenizer, stop_ids, config.data, config.teacher)
    if data.dropped:
        parallel.report(f"Data: {data.dropped} of {len(records)} records are over a length budget and dropped.")
    evals = prompts_of(eval_records, tokenizer, config.data.system)
    model = load_model(config, tokenizer, stop_ids, longest(data, method, config.rollout.max_new_tokens))
    other = other_weights(config, model) if config.teacher.model else None
    teacher = make_teacher(model, config.teacher, other) if method.needs_teacher else None
    parameters = model.trainable()
    trained = sum(p.numel() for p in parameters.values())
    parallel.report(
        f"Model: {config.model.name}, {trained / 1e6:.1f}M weights train; {device.type}, products in "
        f"{str(model.compute_dtype).removeprefix('torch.')}, attention {packing.attention_name(model)}. "
        f"Data: {len(data.examples)} records."
    )
    check_space(config, method, model, output)
    return Run(
        config=config,
        model=model,
        engine=ModelEngine(model),
        tokenizer=tokenizer,
        data=data,
        evals=evals,
        teacher=teacher,
        optimizer=optim.make_optimizer(parameters.values(), config.optim),
        steps=config.train.steps or math.ceil(config.train.epochs * len(data.examples) / config.train.batch_size),
        phases=Phases(model.device),
        micro_batch_tokens=config.train.micro_batch_tokens,
        rollout_batch=config.rollout.batch_size,
        frozen=checkpoint.frozen_digest(model),
        advise=advise,
    )


def check_before_loading(config: Config, method: Method) -> torch.device:
    """The device of the run. Raises SdftError if the device or the installation lacks what the config needs."""
    check_trackers(config.train.trackers)
    device = loading.pick_device(config.model.device)
    check_offload(config, device)
    optim.check_optimizer(config.optim, device)
    if method.needs_teacher:
        check_impl(config.loss, device)
    return device


def check_offload(config: Config, device: torch.device) -> None:
    """Raises SdftError for a setting that moves memory off a GPU if there is no GPU."""
    for key in ("teacher.offload", "optim.offload", "model.activation_offload"):
        if get(config, key) and device.type != "cuda":
            raise SdftError(
                f"{key} = true moves memory from a CUDA device to the CPU, and the model runs on {device}; drop it"
            )


def load_model(config: Config, tokenizer: Any, stop_ids: tuple[int, ...], lengths: tuple[int, int]) -> LanguageModel:
    """The model as it trains: packed, with its adapter, in training mode. lengths: of `longest`."""
    model = loading.load(config.model, tokenizer, stop_ids)
    packing.enable_packing(model, config.train.packing)
    loading.check_context(model, *lengths)
    lora.set_up_lora(model, config.lora, config.train.seed)
    if config.model.gradient_checkpointing:
        activations.enable_gradient_checkpointing(model)
    return_freed_in_passes(model.lm, model.device)
    model.lm.train()
    return model


def longest(data: Dataset, method: Method, max_new_tokens: int) -> tuple[int, int]:
    """The longest prompt that will be run, and the longest completion after it, in tokens."""
    if method.completions == "demonstrations":
        example = max(data.examples, key=lambda e: len(e.prompt) + len(e.target))
        return len(example.prompt), len(example.target)
    return max(max(len(e.prompt), len(e.teacher_prompt)) for e in data.examples), max_new_tokens


def prompts_of(
    sets: dict[str, list[Example]], tokenizer: Any, system: str
) -> dict[str, tuple[list[Example], list[list[int]]]]:
    """Evaluation sets with the token ids of their prompts."""
    return {name: (examples, accuracy.student_prompts(tokenizer, examples, system)) for name, examples in sets.items()}


def check_space(config: Config, method: Method, model: LanguageModel, output: Path) -> None:
    """Raises SdftError if the checkpoints and the model will not fit on the disk."""
    one = checkpoint.checkpoint_bytes(model, method.needs_teacher and config.teacher.kind != "live")
    kept = config.train.keep_checkpoints + bool(best_on(config))
    more = max(0, kept - len(checkpoint.checkpoints(output))) + 1  # a resumed run's checkpoints are there already
    saved = model.lm.parameters() if model.own_base else model.trainable().values()
    need = one * more + sum(p.numel() * p.element_size() for p in saved)
    free = shutil.disk_usage(output).free
    if free < need:
        raise SdftError(
            f"train.output = {str(output)!r}: {need / 2**30:.1f} GiB may be needed for checkpoints and model, "
            f"{free / 2**30:.1f} GiB are free; free some, or lower train.keep_checkpoints"
        )
