"""Reading and writing files. A file stays whole through a kill, a power cut or a full disk.

A file is written under another name, flushed to the disk, and renamed. The name of a file or folder that is being
written or removed starts with `partial-`; the next start deletes what bears such a name.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from sdft.errors import SdftError


def write_text(path: Path, text: str) -> None:
    """Writes the whole text; after a kill or an error, the file is as it was before. Makes the folder of the file.

    Raises SdftError if the file cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """`write_text` for bytes."""
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
    """Renames a finished file or folder once all of it is on the disk. A folder does not replace another folder."""
    for path in (partial, *partial.rglob("*")):
        _sync(path)
    os.replace(partial, final)
    _sync(final.parent)
    _sync(partial.parent)


def remove(folder: Path, aside: Path) -> None:
    """Deletes a folder. The folder first moves into `aside` as partial-*, so that half of a folder never counts."""
    gone = aside / f"partial-removed-{folder.name}"
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone)


def clear_partials(folder: Path) -> None:
    """Deletes what a killed run was writing or removing in the folder."""
    for path in folder.glob("partial-*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def why(error: BaseException) -> str:
    """Why a file was not written, in words."""
    cause: BaseException | None = error
    while cause is not None:  # torch.save wraps the error that stopped it
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause):
            return "no space left on the device; free some, or lower train.keep_checkpoints"
        cause = cause.__cause__ or cause.__context__
    return str(error)


@contextlib.contextmanager
def lock(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone uses the folder. The lock ends with the process, however the process ends.

    wait: waits until the process that has the lock is done.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            mine = lock_descriptor(descriptor, blocking=wait)
        except OSError:  # some network file systems have no locks
            mine = True
        yield mine
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a run's folder. Raises SdftError if another process uses it."""
    with lock(folder) as mine:
        if not mine:
            raise SdftError(
                f"train.output = {str(folder)!r} is in use by another process; wait for it, or give another folder"
            )
        yield


# Reading.


def read_text(path: Path, what: str = "file") -> str:
    """The text of a UTF-8 file. Raises SdftError, which calls the file `what`, if it cannot be read."""
    try:
        return _read_bytes(path, what).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SdftError(f"{what} {path}: not UTF-8 ({error}); save it as UTF-8") from None


@dataclass(frozen=True)
class JsonLine:
    """One line of a JSONL file."""

    where: str
    """File and line number, as in data.jsonl:3: the start of an error about the line."""
    row: dict[str, Any]
    """The JSON object."""


def read_json_lines(
    path: Path, what: str = "file", *, allow_half_line: bool = False, broken: list[str] | None = None
) -> list[JsonLine]:
    """The lines of a JSONL file; every line is one JSON object. An empty file has no lines.

    what: what an error calls the file, as in "data file".
    allow_half_line: leaves out a last line that a kill cut off: a line without a line end that is not JSON.
    broken: if given, the error of a bad line is appended here, the line is left out, and reading continues.

    Empty lines at the end do not count. Raises SdftError with file and line number if another line is empty, is not
    UTF-8, is not JSON, is not an object, or repeats a key. Raises SdftError if the file cannot be read.
    """
    # Bytes, so that a half line may end within a character; these line ends only: U+2028 may stand in a JSON string.
    *whole, last = re.split(rb"\r\n|\r|\n", _read_bytes(path, what))
    lines, good = [*whole, last] if last else whole, []
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()  # an editor may leave empty lines at the end
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            good.append(JsonLine(where, _json_object(line)))
        except ValueError as error:
            if allow_half_line and last.strip() and number == len(lines):
                continue
            message = f"{where}: {error}"
            if broken is None:
                raise SdftError(message) from None
            broken.append(message)
    return good


def _json_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError with the reason."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error}); save it as UTF-8") from None
    if not text.strip():
        raise ValueError("empty line; remove it")
    try:
        row = json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a JSON object on one line ({error.msg})") from None
    except RecursionError:
        raise ValueError("not a JSON object on one line (nested too deep)") from None
    if not isinstance(row, dict):
        raise ValueError(f"a line must be a JSON object, not {type(row).__name__}")
    return row


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):  # json.loads would keep the last value and drop the others without a word
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} is there twice; remove one")
    return row


def _read_bytes(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SdftError(f"{what} {path}: cannot be read ({error.strerror})") from None
