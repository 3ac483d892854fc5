"""Checks that a user wrote: `python:FILE.py:FUNCTION` or `python:MODULE:FUNCTION`."""

import functools
import importlib
import importlib.util
import inspect
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdft.errors import SdftError

UserCheck = Callable[[str, dict[str, Any]], Any]


def load_function(check: str, where: str) -> UserCheck:
    """The function of a check `python:FILE.py:FUNCTION` or `python:MODULE:FUNCTION`; `where` names the record.

    The function's parameters must be named `given` and `record`, so that a record cannot call any other function. A
    record that was fetched, and not read from a local file, may not name code. Raises SdftError if there is no such
    function; if its file fails, the error has the file and the line.
    """
    place, _, name = check.partition(":")[2].rpartition(":")
    if not place or not name:
        raise SdftError(f"{where}: check {check!r} must read python:FILE.py:FUNCTION or python:MODULE:FUNCTION")
    if not Path(re.sub(r"(:\d+|\[\d+\])$", "", where)).exists():
        raise SdftError(f"{where}: check {check!r} names code to run, in data that is not a local file; save it first")
    try:
        module = _load_file(Path(place).resolve()) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise SdftError(f"{where}: check {check!r} cannot be loaded: {_in_words(error)}") from error
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        raise SdftError(f"{where}: check {check!r}: no function {name!r} in {place}")
    if list(inspect.signature(function).parameters) != ["given", "record"]:
        raise SdftError(f"{where}: {_place(function)}: {name!r} must take two parameters, given and record")
    return function


@functools.cache  # once for all records that name it
def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"sdft_check_{path.stem}", path)
    assert spec is not None, path  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call_function(function: UserCheck, given: str, record: dict[str, Any], where: str) -> bool:
    """Calls a user's function. Raises SdftError with file and line if the function fails or returns no bool."""
    try:
        right = function(given, record)
    except Exception as error:
        raise SdftError(f"{where}: the check failed on the answer {given!r}: {_in_words(error)}") from error
    if not isinstance(right, bool):
        raise SdftError(f"{where}: {_place(function)}: the check must return True or False, not {right!r}")
    return right


def _place(function: Any) -> str:
    return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"


def _in_words(error: BaseException) -> str:
    """The error; if it happened in the user's code, with file and line."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    theirs = [f for f in frames if f.filename != __file__]
    return f"{theirs[-1].filename}:{theirs[-1].lineno}: {_kind(error)}" if theirs else _kind(error)


def _kind(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
