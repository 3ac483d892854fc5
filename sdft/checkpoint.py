"""Atomic checkpoints and exact resume: weights, teacher, optimizer, step.

Sampling and data order are functions of (seed, step), so neither a generator's state nor a data position has to
be kept. Tensors are safetensors; the optimizer's state is loaded with weights_only, so no file can run code.
"""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sdft import SdftError
from sdft.models import LanguageModel
from sdft.teacher import Teacher


def checkpoint_folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:06d}"


def latest(output: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return max((output / "checkpoints").glob("step-*"), default=None, key=_step)


def save_checkpoint(
    output: Path,
    step: int,
    model: LanguageModel,
    teacher: Teacher | None,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
    keep: int,
) -> Path:
    """Writes everything aside, then renames: a checkpoint folder is complete or not there.

    facts: what `load_checkpoint` compares or returns (data digest, versions). Raises SdftError where the disk is
    full; older checkpoints are untouched then.
    """
    final = checkpoint_folder(output, step)
    partial = output / f"partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(_contiguous({k: p.detach() for k, p in model.trainable().items()}), partial / "weights.safetensors")
        if teacher is not None:
            save_file(_contiguous(teacher.state()), partial / "teacher.safetensors")
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps({"step": step, **facts}))
        for file in partial.iterdir():
            _fsync(file)
        final.parent.mkdir(exist_ok=True)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _fsync(final.parent)
    except (OSError, RuntimeError) as error:  # safetensors and torch.save wrap a full disk in a RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        raise SdftError(f"checkpoint {final}: not written: {why(error)}") from error
    for old in sorted(final.parent.glob("step-*"), key=_step)[:-keep]:
        shutil.rmtree(old)
    return final


def _step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def why(error: Exception) -> str:
    """Why a file was not written, in words."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    return "no space left on the device; free some, or lower train.keep_checkpoints" if full else str(error)


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@torch.no_grad()
def load_checkpoint(
    folder: Path, model: LanguageModel, teacher: Teacher | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Puts a checkpoint's weights, teacher and optimizer state in place; returns its state.json.

    Raises SdftError for a checkpoint that cannot be read or belongs to another model.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        weights = load_file(folder / "weights.safetensors", device=str(model.device))
        parameters = model.trainable()
        if weights.keys() != parameters.keys():
            odd = sorted(weights.keys() ^ parameters.keys())[0]
            raise SdftError(f"checkpoint {folder}: belongs to another model or LoRA setting ({odd} is not in both)")
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
        if teacher is not None:
            teacher.load_state(load_file(folder / "teacher.safetensors", device=str(model.device)))
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=model.device, weights_only=True))
    except SdftError:
        raise
    except Exception as error:  # truncated files raise many kinds
        raise SdftError(
            f"checkpoint {folder}: cannot be read ({type(error).__name__}: {next(iter(str(error).splitlines()), '')}); "
            "delete the folder to go on from the one before"
        ) from error
    return state


def checkpoint_bytes(model: LanguageModel, with_ema: bool) -> int:
    """Size of one checkpoint: weights, two AdamW moments, and the teacher's fp32 masters."""
    size = 0
    for p in model.trainable().values():
        size += p.numel() * (p.element_size() * 3 + (4 if with_ema else 0))
    return size
