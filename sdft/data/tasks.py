"""Tasks in the box: the training records and the evaluation files of a task, ready to be written to a folder.

The made-up skills are in skills.py. The other tasks are made from files of the user; nothing is fetched. A seed draws
what is held out: the same file and the same seed give the same records, byte for byte.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdft import files
from sdft.data import formats, skills, sources
from sdft.data.records import Record
from sdft.data.sources import Converted
from sdft.errors import SdftError


@dataclass(frozen=True)
class Task:
    files: dict[str, list[Record]]  # name -> records; a file without records is not written
    left_out: tuple[str, ...] = ()  # `where: why` for every broken record
    notes: tuple[str, ...] = ()  # further remarks for a reader of the numbers


def made_up(name: str, seed: int = 0) -> Task:
    """One of skills.SKILLS."""
    return Task(skills.SKILLS[name](seed))


def demo(style: str = "terse") -> Task:
    """The data of `make demo`; see skills.demo."""
    return Task(skills.demo(style))


def toolalpaca(source: Path, held_out: float = 0.3, seed: int = 0) -> Task:
    """Tool calls from a ToolAlpaca file; see sources.read_toolalpaca.

    new: all requests of a share `held_out` of the APIs; these APIs are not trained. seen: a fifth of the requests of
    each other API (none if `held_out` is 0). train: the rest. placeholders: requests that no model can answer, since
    their calls are no JSON or need the result of an earlier call, as in {"id": ${id from search}}.
    """
    found = sources.read_toolalpaca(source)
    made: dict[str, list[Record]] = {"train": [], "seen": [], "new": [], "placeholders": []}
    new = _draw(found.groups, held_out, f"toolalpaca/{seed}")
    for api in dict.fromkeys(found.groups):
        records = [r for r, group in zip(found.records, found.groups, strict=True) if group == api]
        whole = [r for r in records if not sources.has_placeholder(r)]
        made["placeholders"] += [r for r in records if sources.has_placeholder(r)]
        requests = [r["prompt"] for r in whole]
        seen = _draw(requests, 0.2 if held_out else 0.0, f"toolalpaca/{seed}/{api}")
        for record in whole:
            made["new" if api in new else "seen" if record["prompt"] in seen else "train"].append(record)
    count = len(made["placeholders"])
    notes = (
        (f"{count} requests with placeholders in their calls are kept apart: no model can fill them",) if count else ()
    )
    return Task(made, tuple(found.left_out), notes)


def sciknoweval(source: Path, domain: str = "", level: str = "", held_out: float = 0.1, seed: int = 0) -> Task:
    """Multiple choice from a SciKnowEval file; see sources.read_sciknoweval.

    eval: a share `held_out` of the questions. train: the rest. A question that the file has twice is on one side only.
    """
    found = sources.read_sciknoweval(source, domain, level)
    return Task(_split(found, held_out, f"sciknoweval/{seed}"), tuple(found.left_out))


def knowledge(source: Path) -> Task:
    """Articles and questions about them; see sources.read_knowledge.

    train: the questions; article and full answer are the demonstration. strict, lenient: the same questions without the
    article; strict demands all facts, lenient the main fact. ood: the rephrased questions.
    """
    found = sources.read_knowledge(source)
    return Task({name: c.records for name, c in found.items()}, tuple(found["train"].left_out))


def _split(found: Converted, held_out: float, key: str) -> dict[str, list[Record]]:
    away = _draw(found.groups, held_out, key)
    made: dict[str, list[Record]] = {"train": [], "eval": []}
    for record, group in zip(found.records, found.groups, strict=True):
        made["eval" if group in away else "train"].append(record)
    return made


def _draw(groups: Sequence[str], share: float, key: str) -> set[str]:
    """A share of the different groups, at least one unless the share is 0, and never all unless it is 1."""
    if not 0 <= share <= 1:
        raise SdftError(f"held_out = {share} must be from 0 (all for training) to 1 (all for evaluation)")
    names = sorted(set(groups))
    count = round(share * len(names))
    if 0 < share < 1:
        count = min(max(1, count), len(names) - 1)
    return set(random.Random(key).sample(names, count))


def write(task: Task, folder: Path) -> list[str]:
    """Writes a file for each name; returns what was written and left out, in words.

    Raises SdftError if a file exists already with other content.
    """
    full = {folder / f"{name}.jsonl": records for name, records in task.files.items() if records}
    for path, records in full.items():
        if path.exists() and files.read_text(path) != formats.as_jsonl(records):
            raise SdftError(f"{path} exists with other content; give another folder, or remove it")
    if not full:
        raise SdftError(f"no valid record is left; the first was left out because of {task.left_out[0]}")
    lines = []
    for path, records in full.items():
        formats.write_jsonl(path, records)
        lines.append(f"{len(records):6} records in {path}")
    lines += task.notes
    if task.left_out:
        named = folder / "left-out.txt"
        named.write_text("".join(f"{line}\n" for line in task.left_out), encoding="utf-8")
        lines.append(f"{len(task.left_out)} broken records left out, all named in {named}:")
        lines += [f"  {line}" for line in task.left_out[:5]]
    return lines
