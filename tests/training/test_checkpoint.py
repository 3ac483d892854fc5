"""Checkpoints are whole or not there, and come back bit-exactly."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from sdft import files
from sdft.config import LoraConfig, OptimConfig, TeacherConfig
from sdft.errors import SdftError
from sdft.model.lora import add_lora
from sdft.score.teacher import Teacher
from sdft.training import checkpoint
from sdft.training.checkpoint import (
    checkpoint_bytes,
    checkpoint_folder,
    checkpoints,
    frozen_digest,
    latest,
    load_checkpoint,
    prune,
    read_state,
    save_checkpoint,
)  # fmt: skip
from sdft.update.ema import make_teacher
from sdft.update.optim import make_optimizer


@pytest.fixture(params=["full", "lora", "bf16"])
def parts(request: pytest.FixtureRequest, load_tiny: Any, nudge: Any) -> Any:
    """parts() is a model, its teacher and its optimizer after two steps."""

    def make(seed: int = 0) -> tuple[Any, Teacher, torch.optim.Optimizer]:
        model = load_tiny(weights_dtype="bfloat16" if request.param == "bf16" else "float32")[1]
        if request.param == "lora":
            add_lora(model, LoraConfig(rank=2), 0)
        teacher = make_teacher(model, TeacherConfig(ema_alpha=0.1))
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
    folder = save_checkpoint(tmp_path, 3, *saved, {"data": "abc", "result": {"new": 0.5}})
    assert folder == checkpoint_folder(tmp_path, 3) == latest(tmp_path)
    assert read_state(folder) == {"step": 3, "data": "abc", "result": {"new": 0.5}}
    load_checkpoint(folder, *other)
    assert same(tensors(*saved), tensors(*other))
    assert [p.data_ptr() for p in other[0].trainable().values()] == pointers  # the optimizer still points at them
    assert not list(tmp_path.glob("partial*"))


@pytest.fixture
def trio(load_tiny: Any) -> Any:
    model = load_tiny()[1]
    optimizer = make_optimizer(model.trainable().values(), OptimConfig())
    return model, make_teacher(model, TeacherConfig()), optimizer


def test_the_newest_and_the_best_are_kept(trio: Any, tmp_path: Path) -> None:
    for step in (2, 4, 6, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, *trio, {})
    prune(tmp_path, 2, best=4)
    assert [f.name for f in checkpoints(tmp_path)] == ["step-000004", "step-999999", "step-1000000"]
    assert not any(checkpoint.damage(f) for f in checkpoints(tmp_path))
    prune(tmp_path, 2, best=999_999)
    assert [f.name for f in checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    shutil.copytree(checkpoint_folder(tmp_path, 999_999), tmp_path / "checkpoints" / "step-1000001-mine")
    prune(tmp_path, 1, best=None)
    assert latest(tmp_path) == checkpoint_folder(tmp_path, 1_000_000)
    assert {p.name for p in tmp_path.rglob("*step*")} == {"step-1000000", "step-1000001-mine"}
    assert latest(tmp_path / "none") is None


def refused(error: Exception) -> Callable[..., None]:
    def refuse(*args: Any, **named: Any) -> None:
        raise error

    return refuse


def torch_on_a_full_disk(*args: Any) -> None:
    """torch.save on a full disk: its error hides the error of the file."""
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # noqa: B904


FULL = {
    "save_file": (checkpoint, refused(SafetensorError("I/O error: No space left on device (os error 28)"))),
    "save": (torch, torch_on_a_full_disk),
    "replace": (files.os, refused(OSError(errno.EDQUOT, "Disk quota exceeded"))),
    "fsync": (files.os, refused(OSError(errno.ENOSPC, "No space left on device"))),
}


@pytest.mark.parametrize("name", FULL)
def test_no_space_left_keeps_the_older_one(
    trio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, teacher, optimizer = trio
    old = save_checkpoint(tmp_path, 1, *trio, {})
    before = [p.detach().clone() for p in model.trainable().values()]
    for p in model.trainable().values():
        p.data.add_(1)
    with monkeypatch.context() as patch:
        owner, full = FULL[name]
        patch.setattr(owner, name, full)
        with pytest.raises(
            SdftError, match=r"step-000002: not written: no space left on the device; free some.*from step-000001"
        ):
            save_checkpoint(tmp_path, 2, *trio, {})
    assert sorted(p.name for p in tmp_path.rglob("*") if "step" in p.name) == ["step-000001"]
    assert read_state(old) == {"step": 1}
    load_checkpoint(old, model, teacher, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.trainable().values(), before, strict=True))


SMALL_DISK = """
import sys, torch
from pathlib import Path
from types import SimpleNamespace
from sdft import files
from sdft.errors import SdftError
from sdft.training import checkpoint
output = Path("/mnt")
big, small = torch.nn.Parameter(torch.zeros(300_000)), torch.nn.Parameter(torch.zeros(10))
for which in ("weights", "optimizer"):  # 1.2 MB on a disk of 1 MiB, in a safetensors file and in torch's own
    model = SimpleNamespace(trainable=lambda: {"p": big if which == "weights" else small})
    optimizer = SimpleNamespace(state_dict=lambda: {"state": big if which == "optimizer" else small})
    for write in (
        lambda: checkpoint.save_checkpoint(output, 1, model, None, optimizer, {}),
        lambda: files.write_text(output / "eval" / "a.jsonl", "x" * 2_000_000),
    ):
        try:
            write()
            sys.exit(f"{which}: written")
        except SdftError as error:
            assert "not written: no space left on the device" in str(error), error
    assert [p.name for p in output.rglob("*")] == ["eval"], list(output.rglob("*"))
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1M none /mnt && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this machine mounts no small disk for us")
    done = subprocess.run([*mount, sys.executable, "-c", SMALL_DISK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_is_never_overwritten(trio: Any, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, *trio, {"data": "first"})
    with pytest.raises(SdftError, match=r"step-000001: not written: .*not empty"):
        save_checkpoint(tmp_path, 1, *trio, {"data": "second"})
    assert read_state(folder)["data"] == "first"
    assert not list(tmp_path.glob("partial*"))


def kill(*args: Any, **named: Any) -> None:
    raise KeyboardInterrupt  # no handler cleans up after it, as after a power cut


def test_a_kill_within_a_save_leaves_no_checkpoint(trio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save_checkpoint(tmp_path, 1, *trio, {})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", kill)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, *trio, {})
    assert latest(tmp_path) == old
    assert (tmp_path / "partial-step-000002").is_dir()
    assert save_checkpoint(tmp_path, 2, *trio, {}) == latest(tmp_path)  # what was left is no obstacle
    assert not list(tmp_path.glob("partial*"))


def test_a_kill_within_a_removal_leaves_no_half_checkpoint(
    trio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, *trio, {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", kill)  # what rmtree deletes files with
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, 1, None)
    assert [f.name for f in checkpoints(tmp_path)] == ["step-000002"]
    assert any((tmp_path / "partial-removed-step-000001").iterdir())
    files.clear_partials(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


# Checked before it is used.

FILES = ["weights.safetensors", "teacher.safetensors", "optimizer.pt", "state.json", "manifest.json"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARM: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), r"has \d+ bytes, not the \d+ that were"),
    "missing": (lambda path: path.unlink(), "is missing"),
    "garbage": (lambda path: path.write_bytes(b"\x00garbage" * 100), r"has 800 bytes, not the \d+ that were written"),
    "flipped": (flip, "is corrupt: its sha256 is not what was written"),
}


# Without a flipped bit in the manifest, which makes another file the corrupt one: see the next test.
@pytest.mark.parametrize(("how", "file"), [(h, f) for h in HARM for f in FILES][:-1])
def test_a_damaged_file_is_named_and_so_is_the_way_out(trio: Any, tmp_path: Path, file: str, how: str) -> None:
    for step in (1, 2, 3, 4):
        folder = save_checkpoint(tmp_path, step, *trio, {"data": ""})
    harm, words = HARM[how]
    if file == "manifest.json" and how != "missing":
        words = "is corrupt: not what was written"
    harm(folder / file)
    harm(checkpoint_folder(tmp_path, 3) / file)
    with pytest.raises(SdftError, match=rf"step-000004: {file} {words}.*; --resume --train.resume-step 2 continues"):
        read_state(folder)
    for step in (1, 2):
        shutil.rmtree(checkpoint_folder(tmp_path, step))
    with pytest.raises(SdftError, match=rf"step-000004: {file} {words}.*; no other one is whole: start another run"):
        read_state(folder)


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_no_flipped_bit_of_the_manifest_passes(trio: Any, tmp_path: Path, where: float, bit: int) -> None:
    folder = save_checkpoint(tmp_path, 1, *trio, {})
    content = bytearray((folder / "manifest.json").read_bytes())
    content[int(len(content) * where)] ^= 1 << bit
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(SdftError, match="step-000001: "):
        read_state(folder)


def test_a_format_of_the_future(trio: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, *trio, {})
    folder = save_checkpoint(tmp_path, 2, *trio, {})
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": 2, "sdft": "7.0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SdftError, match=r"has format 2 of sdft 7\.0.*reads format 1; .*resume-step 1 continues"):
        read_state(folder)


def test_a_renamed_checkpoint(trio: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, *trio, {}).rename(checkpoint_folder(tmp_path, 9))
    with pytest.raises(SdftError, match=r"step-000009: state\.json is of another step; the folder was renamed"):
        read_state(checkpoint_folder(tmp_path, 9))


def test_another_models_checkpoint(trio: Any, tmp_path: Path, load_tiny: Any) -> None:
    folder = save_checkpoint(tmp_path, 1, *trio, {})
    model = load_tiny()[1]
    add_lora(model, LoraConfig(rank=2), 0)
    optimizer = make_optimizer(model.trainable().values(), OptimConfig())
    with pytest.raises(SdftError, match="belongs to another model or LoRA setting"):
        load_checkpoint(folder, model, make_teacher(model, TeacherConfig()), optimizer)


def test_weights_of_another_shape_or_dtype(trio: Any, tmp_path: Path) -> None:
    model, teacher, optimizer = trio
    folder = save_checkpoint(tmp_path, 1, *trio, {})
    before = [p.detach().clone() for p in model.trainable().values()]
    last = list(model.trainable().values())[-1]
    for other in (last.data[1:], last.data.half()):
        last.data = other
        with pytest.raises(SdftError, match=r"another model \(.* is float32 \(.*\) there and .* here\)"):
            load_checkpoint(folder, model, teacher, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(list(model.trainable().values())[:-1], before[:-1], strict=True))


def test_the_frozen_weights_are_told_apart(load_tiny: Any) -> None:
    def digest(dtype: str = "float32", kind: str = "llama", **change: float) -> str:
        model = load_tiny(kind, weights_dtype=dtype)[1]
        add_lora(model, LoraConfig(rank=2), 0)
        for name, p in model.lm.named_parameters():
            for part, size in change.items():
                if part in name:
                    p.data.mul_(size)
        return frozen_digest(model)

    want = digest()
    assert digest() == digest(lora_A=2.0) == want  # the adapters train: the checkpoint holds them
    others = {digest(down_proj=1.01), digest(embed_tokens=1.01), digest("bfloat16"), digest(kind="qwen3")}
    assert len(others | {want}) == 5


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_an_optimizer_file_cannot_run_code(trio: Any, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, *trio, {})
    torch.save({"state": Evil(tmp_path / "ran")}, folder / "optimizer.pt")
    with pytest.raises(SdftError, match=r"optimizer\.pt has"):
        read_state(folder)
    with pytest.raises(
        SdftError, match="does not fit this model, teacher or optimizer"
    ):  # had the manifest been forged
        load_checkpoint(folder, *trio)
    assert not (tmp_path / "ran").exists()


def test_the_size_told_is_the_size_written(parts: Any, tmp_path: Path) -> None:
    model, teacher, optimizer = parts()
    teacher.origin = {}  # small for a real model, not for this one
    folder = save_checkpoint(tmp_path, 1, model, teacher, optimizer, {})
    written = sum(f.stat().st_size for f in folder.iterdir())
    headers = 40_000
    assert checkpoint_bytes(model, with_ema=True) <= written <= checkpoint_bytes(model, with_ema=True) + headers


def test_facts_are_plain_json(trio: Any, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 5, *trio, {"data": "d", "result": {"new": 1.0}})
    assert json.loads((folder / "state.json").read_text()) == {"step": 5, "data": "d", "result": {"new": 1.0}}
    assert {f.name for f in folder.iterdir()} == set(FILES)
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == set(FILES) - {"manifest.json"}


def test_a_folder_in_use(tmp_path: Path) -> None:
    words = "is in use by another process; wait for it"
    with files.locked(tmp_path), pytest.raises(SdftError, match=words), files.locked(tmp_path):
        pass
    with files.locked(tmp_path):
        pass


def test_a_text_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.jsonl"
    files.write_text(path, "one")
    monkeypatch.setattr(files.os, "replace", refused(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(SdftError, match=r"a\.jsonl: not written: .*Read-only file system"):
        files.write_text(path, "two")
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("a.jsonl", "one")]
