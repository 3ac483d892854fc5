"""Files -> records, and records -> JSONL."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sdft import files
from sdft.data.records import Example, Record, parse_record
from sdft.errors import SdftError


def load_records(path: str, split: str = "train") -> list[Example]:
    """Reads examples from a .jsonl file, from a folder saved by `datasets`, or from a hub data set, by name.

    Raises SdftError with file and line for a line that is empty, is not JSON, or lacks a field.
    """
    if path.endswith((".jsonl", ".json")):
        lines = files.read_json_lines(Path(path), "data file")
        rows: Iterable[tuple[str, Any]] = ((line.where, line.row) for line in lines)
    else:
        rows = ((f"{path}[{i}]", row) for i, row in enumerate(_read_datasets(path, split)))
    examples = [parse_record(row, where) for where, row in rows]
    if not examples:
        raise SdftError(f"{path}: no records in it")
    return examples


def _read_datasets(path: str, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    local = Path(path)
    if not local.exists() and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        raise SdftError(f"data {path}: no such file or folder")
    try:
        if local.is_dir() and any((local / f).exists() for f in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path)
    except Exception as error:  # datasets raises many kinds; all mean the same to the user
        raise SdftError(f"data {path}: datasets cannot load it ({type(error).__name__}: {error})") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise SdftError(f"data {path}: no split {split!r}; set data.split to one of {', '.join(loaded)}")
        loaded = loaded[split]
    return loaded


def as_jsonl(records: Sequence[Record]) -> str:
    """Records, one on each line."""
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def write_jsonl(path: Path, records: Sequence[Record]) -> None:
    """Writes records, one on each line. Raises SdftError if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_jsonl(records), encoding="utf-8")
    except OSError as error:
        raise SdftError(f"{path}: cannot be written ({error.strerror})") from None
