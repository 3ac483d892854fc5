"""Files that a kill, a power cut or a full disk leaves whole: written aside, flushed to the disk, renamed.

What is being written, or being removed, bears a name that starts with `partial-`; the next start clears it away.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sdft.errors import SdftError


def write_text(path: Path, text: str) -> None:
    """The whole text or, after a kill or an error, what was there before; makes the folder.

    Raises SdftError where it cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    partial = path.with_name(f"partial-{path.name}")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_bytes(content)
        publish(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise SdftError(f"{path}: not written: {why(error)}") from error


def publish(partial: Path, final: Path) -> None:
    """Gives a finished file or folder its name, once all of it is on the disk. A folder replaces none."""
    for path in (partial, *partial.rglob("*")):
        _sync(path)
    os.replace(partial, final)
    _sync(final.parent)
    _sync(partial.parent)


def remove(folder: Path, aside: Path) -> None:
    """Deletes a folder; it first moves into the folder `aside` as partial-*, so that half of it never counts."""
    gone = aside / f"partial-removed-{folder.name}"
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone)


def clear_partials(folder: Path) -> None:
    """Deletes what a killed run was writing or removing."""
    for path in folder.glob("partial-*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def why(error: BaseException) -> str:
    """Why something was not written, in words."""
    cause: BaseException | None = error
    while cause is not None:  # torch.save raises an error of its own about the one that stopped it
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause):
            return "no space left on the device; free some, or lower train.keep_checkpoints"
        cause = cause.__cause__ or cause.__context__
    return str(error)


@contextlib.contextmanager
def lock(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone is in the folder; the lock goes with the process, however it ends.

    wait: until the process that has it is through.
    """
    descriptor, mine = os.open(folder, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            mine = False
        except OSError:  # some network file systems know no locks
            pass
        yield mine
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a run's folder. Raises SdftError where another one is in it."""
    with lock(folder) as mine:
        if not mine:
            raise SdftError(
                f"train.output = {str(folder)!r} is in use by another process; wait for it, or give another folder"
            )
        yield
