"""Checkpoints are whole or not there, and come back bit-exactly."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft import SdftError, checkpoint
from sdft.checkpoint import checkpoint_bytes, checkpoint_folder, latest, load_checkpoint, save_checkpoint
from sdft.config import LoraConfig, OptimConfig, TeacherConfig
from sdft.models import add_lora
from sdft.optim import make_optimizer
from sdft.teacher import Teacher


@pytest.fixture(params=["full", "lora", "bf16"])
def parts(request: pytest.FixtureRequest, load_tiny: Any, nudge: Any) -> Any:
    """parts() is a model, its teacher and its optimizer after two steps."""

    def make(seed: int = 0) -> tuple[Any, Teacher, torch.optim.Optimizer]:
        model = load_tiny(weights_dtype="bfloat16" if request.param == "bf16" else "float32")[1]
        if request.param == "lora":
            add_lora(model, LoraConfig(rank=2), 0)
        teacher = Teacher(model, TeacherConfig(ema_alpha=0.1))
        optimizer = make_optimizer(model.trainable().values(), OptimConfig(lr=0.01))
        for step in range(2):
            torch.manual_seed(seed + step)
            for p in model.trainable().values():
                p.grad = torch.randn_like(p)
            optimizer.step()
            teacher.update()
        return model, teacher, optimizer

    return make


def tensors(model: Any, teacher: Teacher, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [t for s in optimizer.state_dict()["state"].values() for t in s.values()]
    return [*model.trainable().values(), *teacher.state().values(), *moments]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_round_trip_is_bit_exact(parts: Any, tmp_path: Path) -> None:
    saved, other = parts(0), parts(7)
    assert not same(tensors(*saved), tensors(*other))
    pointers = [p.data_ptr() for p in other[0].trainable().values()]
    folder = save_checkpoint(tmp_path, 3, *saved, {"data": "abc", "result": {"new": 0.5}}, 2)
    assert folder == checkpoint_folder(tmp_path, 3) == latest(tmp_path)
    assert load_checkpoint(folder, *other) == {"step": 3, "data": "abc", "result": {"new": 0.5}}
    assert same(tensors(*saved), tensors(*other))
    assert [p.data_ptr() for p in other[0].trainable().values()] == pointers  # the optimizer still points at them
    assert not list(tmp_path.glob("partial*"))


@pytest.fixture
def trio(load_tiny: Any) -> Any:
    model = load_tiny()[1]
    optimizer = make_optimizer(model.trainable().values(), OptimConfig())
    return model, Teacher(model, TeacherConfig()), optimizer


def test_the_newest_are_kept(trio: Any, tmp_path: Path) -> None:
    for step in (2, 4, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, *trio, {}, 2)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-999999", "step-1000000"}
    assert latest(tmp_path) == checkpoint_folder(tmp_path, 1_000_000)
    assert latest(tmp_path / "none") is None


@pytest.mark.parametrize("fails_at", ["save_file", "torch.save", "replace"])
def test_no_space_left_keeps_the_older_one(
    trio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    model, teacher, optimizer = trio
    old = save_checkpoint(tmp_path, 1, *trio, {}, 1)
    before = [p.detach().clone() for p in model.trainable().values()]
    for p in model.trainable().values():
        p.data.add_(1)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        owner = {
            "save_file": (checkpoint, "save_file"),
            "torch.save": (torch, "save"),
            "replace": (checkpoint.os, "replace"),
        }
        patch.setattr(*owner[fails_at], full)
        with pytest.raises(SdftError, match=r"step-000002: not written: no space left on the device; free some"):
            save_checkpoint(tmp_path, 2, *trio, {}, 1)
    assert sorted(p.name for p in tmp_path.rglob("*") if "step" in p.name) == ["step-000001"]
    load_checkpoint(old, model, teacher, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.trainable().values(), before, strict=True))


def test_a_full_disk_as_torch_wraps_it(trio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/1: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SdftError, match="no space left on the device"):
        save_checkpoint(tmp_path, 1, *trio, {}, 1)


def test_a_kill_within_a_save_leaves_no_checkpoint(trio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*args: Any) -> None:
        raise KeyboardInterrupt  # no handler cleans up after it, as after a power cut

    old = save_checkpoint(tmp_path, 1, *trio, {}, 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", kill)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, *trio, {}, 1)
    assert latest(tmp_path) == old
    assert save_checkpoint(tmp_path, 2, *trio, {}, 1) == latest(tmp_path)  # what was left is no obstacle
    assert not list(tmp_path.glob("partial*"))


@pytest.mark.parametrize("file", ["weights.safetensors", "teacher.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("how", ["truncated", "missing", "garbage"])
def test_a_corrupt_file_is_named(trio: Any, tmp_path: Path, file: str, how: str) -> None:
    folder = save_checkpoint(tmp_path, 1, *trio, {"data": ""}, 1)
    path = folder / file
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "garbage":
        path.write_bytes(b"\x00garbage" * 100)
    else:
        path.unlink()
    with pytest.raises(
        SdftError, match=r"step-000001: cannot be read .*; delete the folder to go on from the one before"
    ):
        load_checkpoint(folder, *trio)


def test_another_models_checkpoint(trio: Any, tmp_path: Path, load_tiny: Any) -> None:
    folder = save_checkpoint(tmp_path, 1, *trio, {}, 1)
    model = load_tiny()[1]
    add_lora(model, LoraConfig(rank=2), 0)
    optimizer = make_optimizer(model.trainable().values(), OptimConfig())
    with pytest.raises(SdftError, match="belongs to another model or LoRA setting"):
        load_checkpoint(folder, model, Teacher(model, TeacherConfig()), optimizer)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_an_optimizer_file_cannot_run_code(trio: Any, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, *trio, {}, 1)
    torch.save({"state": Evil(tmp_path / "ran")}, folder / "optimizer.pt")
    with pytest.raises(SdftError, match="cannot be read"):
        load_checkpoint(folder, *trio)
    assert not (tmp_path / "ran").exists()


def test_the_size_told_is_the_size_written(parts: Any, tmp_path: Path) -> None:
    model, teacher, optimizer = parts()
    teacher.origin = {}  # small for a real model, not for this one
    folder = save_checkpoint(tmp_path, 1, model, teacher, optimizer, {}, 1)
    written = sum(f.stat().st_size for f in folder.iterdir())
    headers = 40_000
    assert checkpoint_bytes(model, with_ema=True) <= written <= checkpoint_bytes(model, with_ema=True) + headers


def test_facts_are_plain_json(trio: Any, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 5, *trio, {"data": "d", "result": {"new": 1.0}}, 1)
    assert json.loads((folder / "state.json").read_text()) == {"step": 5, "data": "d", "result": {"new": 1.0}}
    assert {f.name for f in folder.iterdir()} == {
        "weights.safetensors", "teacher.safetensors", "optimizer.pt", "state.json"
    }  # fmt: skip
