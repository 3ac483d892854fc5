"""Atomic checkpoints and exact resume: weights, teacher, optimizer, step.

Sampling and data order are functions of (seed, step), so neither a generator's state nor a data position has to
be kept. Tensors are safetensors; the optimizer's state is loaded with weights_only, so no file can run code.

    OUTPUT/checkpoints/step-000040/
        weights.safetensors    every parameter that trains, by its name in the model
        teacher.safetensors    the tensors of the teacher; the file is missing for sft and dft
        optimizer.pt           moments and step counts
        state.json             step, and the facts of the run that `train.resume` compares or restores
        manifest.json          format, and size and sha256 of every other file
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sdft import __version__, files
from sdft.errors import SdftError
from sdft.model.language_model import LanguageModel
from sdft.score.teacher import Teacher

FORMAT = 1  # of the files above; a checkpoint of a later format is refused by name


def checkpoint_folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (output / "checkpoints").glob("step-*")
    return sorted((f for f in found if re.fullmatch(r"step-\d+", f.name)), key=step_of)


def latest(output: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(checkpoints(output)), None)


def save_checkpoint(
    output: Path,
    step: int,
    model: LanguageModel,
    teacher: Teacher | None,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
) -> Path:
    """Writes everything aside, then renames: a checkpoint folder is complete or not there.

    facts: what `read_state` returns besides the step. Raises SdftError if it cannot be written (a full disk, a
    folder of that name); older checkpoints are untouched then.
    """
    final = checkpoint_folder(output, step)
    partial = output / f"partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(_contiguous({k: p.detach() for k, p in model.trainable().items()}), partial / "weights.safetensors")
        if teacher is not None:
            save_file(_contiguous(teacher.state()), partial / "teacher.safetensors")
        # Opened here: torch reports a full disk only if Python writes the file.
        with (partial / "optimizer.pt").open("wb") as file:
            torch.save(optimizer.state_dict(), file)
        (partial / "state.json").write_text(json.dumps({"step": step, **facts}))
        content = {f.name: {"bytes": f.stat().st_size, "sha256": files.sha256(f)} for f in sorted(partial.iterdir())}
        manifest = {"format": FORMAT, "sdft": __version__, "files": content}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        final.parent.mkdir(exist_ok=True)
        files.publish(partial, final)
    except Exception as error:  # safetensors and torch.save each raise an error of another kind for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        before = latest(output)
        left = f"--resume continues from {before.name}, which is untouched" if before else "there is no earlier one"
        raise SdftError(f"checkpoint {final}: not written: {files.why(error)}; {left}") from error
    return final


def prune(output: Path, keep: int, best: int | None) -> None:
    """Deletes all checkpoints but the `keep` newest and the one of step `best`."""
    for old in checkpoints(output)[:-keep]:
        if step_of(old) != best:
            files.remove(old, output)


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, once every file of it is found to be what was written.

    Raises SdftError that names the file that is not, and the newest checkpoint that is whole.
    """
    if problem := damage(folder):
        others = [other for other in reversed(checkpoints(folder.parents[1])) if other != folder]
        whole = next((step_of(other) for other in others if not damage(other)), None)
        advice = (
            f"--resume --train.resume-step {whole} continues from the newest whole one"
            if whole is not None
            else "no other one is whole: start another run"
        )
        raise SdftError(f"checkpoint {folder}: {problem}; {advice}")
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return state


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files, in words; empty if they are as they were written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] > FORMAT:
            return (
                f"has format {manifest['format']} of sdft {manifest['sdft']}, and this sdft {__version__} reads "
                f"format {FORMAT}; install that version"
            )
        for name, written in manifest["files"].items():  # all sizes before the first hash, which takes longer
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (size := (folder / name).stat().st_size) != written["bytes"]:
                return f"{name} has {size} bytes, not the {written['bytes']} that were written"
        for name, written in manifest["files"].items():
            if files.sha256(folder / name) != written["sha256"]:
                return f"{name} is corrupt: its sha256 is not what was written"
        if json.loads((folder / "state.json").read_text())["step"] != step_of(folder):
            return "state.json is of another step; the folder was renamed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"cannot be read ({error})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is corrupt: not what was written"
    return ""


@torch.no_grad()
def load_checkpoint(
    folder: Path, model: LanguageModel, teacher: Teacher | None, optimizer: torch.optim.Optimizer
) -> None:
    """Puts the weights, teacher and optimizer state of a checkpoint in place; `read_state` has checked its files.

    Raises SdftError for a checkpoint of another model.
    """
    try:
        # Everything is read to the CPU: a GPU that holds a run just so has no room for a second copy of its parts.
        weights = load_file(folder / "weights.safetensors")
        parameters = model.trainable()
        if weights.keys() != parameters.keys():
            odd = sorted(weights.keys() ^ parameters.keys())[0]
            raise SdftError(f"checkpoint {folder}: belongs to another model or LoRA setting ({odd} is not in both)")
        for name, parameter in parameters.items():
            if (weights[name].shape, weights[name].dtype) != (parameter.shape, parameter.dtype):
                raise SdftError(
                    f"checkpoint {folder}: belongs to another model ({name} is {_kind(weights[name])} there and "
                    f"{_kind(parameter)} here)"
                )
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
        if teacher is not None:
            teacher.load_state(load_file(folder / "teacher.safetensors"))
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
    except SdftError:
        raise
    except Exception as error:  # the files are as written, so they were written for something else
        line = next(iter(str(error).splitlines()), "")
        raise SdftError(
            f"checkpoint {folder}: does not fit this model, teacher or optimizer ({type(error).__name__}: {line})"
        ) from error


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def frozen_digest(model: LanguageModel) -> str:
    """`weights_digest` of the parameters that a checkpoint does not hold but stands on."""
    return weights_digest((name, p) for name, p in model.lm.named_parameters() if not p.requires_grad)


@torch.no_grad()
def weights_digest(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 of names, shapes, dtypes, and a sample of the values."""
    digest = hashlib.sha256()
    for name, p in parameters:
        flat = p.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 256)].contiguous()
        digest.update(f"{name} {_kind(p)}".encode() + some.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def checkpoint_bytes(model: LanguageModel, with_ema: bool) -> int:
    """Size of one checkpoint: weights, two AdamW moments, and the teacher's fp32 masters."""
    size = 0
    for p in model.trainable().values():
        size += p.numel() * (p.element_size() * 3 + (4 if with_ema else 0))
    return size
