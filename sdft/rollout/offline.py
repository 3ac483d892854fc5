"""Completions sampled once, before the first step (rollout.source = offline).

    OUTPUT/offline.jsonl               what the completions depend on, and the seconds they took; then a line for each
                                       training record, in the data's order: its completions as text and as token ids
    OUTPUT/offline-unfinished.jsonl    while they are sampled: the same first line, then a line for each batch

The first file is complete or not there. A run that is killed before continues after the last whole line of the second:
every batch is seeded by its place alone.
"""

import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdft import files, parallel
from sdft.errors import SdftError

Ids = list[int]


@dataclass(frozen=True)
class Offline:
    completions: tuple[tuple[Ids, ...], ...]  # token ids: for each record, each of its completions
    seconds: float  # that sampling took, over all its attempts

    @property
    def digest(self) -> str:
        """sha256 of every token id."""
        return hashlib.sha256(json.dumps(self.completions).encode()).hexdigest()


def collect(
    output: Path,
    origin: dict[str, Any],
    prompts: Sequence[Ids],
    per_prompt: int,
    batch_size: int,
    seed: int,
    sample: Callable[[list[Ids]], list[Ids]],
    decode: Callable[[Ids], str],
) -> Offline:
    """Reads OUTPUT/offline.jsonl, or samples `per_prompt` completions of every prompt and writes it; prints progress.

    origin: all that the completions depend on, by name. sample: token ids of prompts -> of one completion each, drawn
    from torch's global generator. Raises SdftError if a file is there that has another origin, or is damaged.
    """
    finished, unfinished = output / "offline.jsonl", output / "offline-unfinished.jsonl"
    if finished.exists():
        found = read_finished(finished, origin, len(prompts), per_prompt)
        unfinished.unlink(missing_ok=True)
        return found
    # Prompts of like lengths together: less padding.
    order = sorted((i for i in range(len(prompts)) for _ in range(per_prompt)), key=lambda i: len(prompts[i]))
    in_order, seconds = sample_all(unfinished, origin, [prompts[i] for i in order], batch_size, seed, sample)
    completions: list[list[Ids]] = [[] for _ in prompts]
    for i, ids in zip(order, in_order, strict=True):
        completions[i].append(ids)
    rows = [{"origin": origin, "seconds": seconds}, *({"answers": [*map(decode, c)], "ids": c} for c in completions)]
    files.write_text(
        finished, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )  # for people to read
    unfinished.unlink()
    return Offline(tuple(map(tuple, completions)), seconds)


def read_finished(path: Path, origin: dict[str, Any], records: int, per_prompt: int) -> Offline:
    """The completions in a whole file. Raises SdftError if it has another origin, or is damaged."""
    first, *lines = read_lines(path, origin)
    if len(lines) != records or any(len(line.get("ids", ())) != per_prompt for line in lines):
        raise SdftError(f"{path}: not the {records} lines that were written; delete it to sample again")
    return Offline(tuple(tuple(line["ids"]) for line in lines), first["seconds"])


def sample_all(
    unfinished: Path,
    origin: dict[str, Any],
    prompts: Sequence[Ids],
    batch_size: int,
    seed: int,
    sample: Callable[[list[Ids]], list[Ids]],
) -> tuple[list[Ids], float]:
    """One completion of each prompt, in order, and the seconds that took; continues the file `unfinished`."""
    done = read_lines(unfinished, origin)[1:] if unfinished.exists() else []
    completions: list[Ids] = [ids for line in done for ids in line["ids"]]
    seconds = sum((line["seconds"] for line in done), 0.0)
    parallel.report(
        f"{len(prompts)} completions are sampled before the first step; --resume continues an interrupted run."
    )
    if completions:
        parallel.report(f"{len(completions)} of them are there.")
    whole_lines = ({"origin": origin}, *done)
    files.write_text(unfinished, "".join(json.dumps(line) + "\n" for line in whole_lines))
    with unfinished.open("a") as file:
        while len(completions) < len(prompts):
            at = len(completions)
            torch.manual_seed(random.Random(f"{seed}/offline/{at}").getrandbits(63))
            began = time.perf_counter()
            new = sample(list(prompts[at : at + batch_size]))
            took = time.perf_counter() - began
            try:
                file.write(json.dumps({"ids": new, "seconds": took}) + "\n")
                file.flush()
            except OSError as error:
                raise SdftError(f"{unfinished}: not written: {files.why(error)}") from error
            completions, seconds = completions + new, seconds + took
            left = seconds / len(completions) * (len(prompts) - len(completions))
            rate = sum(map(len, new)) / took
            parallel.report(f"completions {len(completions)}/{len(prompts)}  {rate:.0f} tok/s  ETA {left:.0f}s")
    return completions, seconds


def read_lines(path: Path, origin: dict[str, Any]) -> list[dict[str, Any]]:
    """The whole lines of a file, without a half-written last one. Raises SdftError if it has another origin."""
    lines = [line.row for line in files.read_json_lines(path, "completions", allow_half_line=True)]
    there = lines[0].get("origin", {}) if lines else {}
    for name, now in origin.items():
        if there.get(name) != now:
            raise SdftError(
                f"{path} holds completions of another run: its {name} is {there.get(name)!r}, and here it is {now!r}; "
                "put that back, or delete the file to sample again"
            )
    return lines
