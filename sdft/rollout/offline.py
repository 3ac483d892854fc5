"""Answers sampled once, before the first step (rollout.source = offline).

    OUTPUT/offline.jsonl               what the answers depend on, and the seconds they took; then a line for each
                                       training record, in the data's order: its answers as text, and as token ids
    OUTPUT/offline-unfinished.jsonl    while they are sampled: the same first line, then a line for each batch

The first file is complete or not there. A run that is killed before goes on after the second one's last whole line:
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

from sdft import files
from sdft.errors import SdftError


@dataclass(frozen=True)
class Offline:
    answers: tuple[tuple[list[int], ...], ...]  # token ids; of each record, each of its answers
    seconds: float  # that sampling took, over all its attempts

    @property
    def digest(self) -> str:
        """sha256 of every token id."""
        return hashlib.sha256(json.dumps(self.answers).encode()).hexdigest()


def collect(
    output: Path,
    origin: dict[str, Any],
    prompts: Sequence[list[int]],
    per_prompt: int,
    batch_size: int,
    seed: int,
    sample: Callable[[list[list[int]]], list[list[int]]],
    decode: Callable[[list[int]], str],
) -> Offline:
    """Reads OUTPUT/offline.jsonl, or samples `per_prompt` answers to every prompt and writes it; prints progress.

    origin: all that the answers depend on, by name. sample: token ids of prompts -> of one answer each, drawn from
    torch's global generator. Raises SdftError where a file is there that has another origin, or is damaged.
    """
    finished, unfinished = output / "offline.jsonl", output / "offline-unfinished.jsonl"
    if finished.exists():
        written, *lines = _read(finished, origin)
        if len(lines) != len(prompts) or any(len(line.get("ids", ())) != per_prompt for line in lines):
            raise SdftError(f"{finished}: not the {len(prompts)} lines that were written; delete it to sample anew")
        unfinished.unlink(missing_ok=True)
        return Offline(tuple(tuple(line["ids"]) for line in lines), written["seconds"])
    # Like lengths together: less padding.
    order = sorted((i for i in range(len(prompts)) for _ in range(per_prompt)), key=lambda i: len(prompts[i]))
    done = _read(unfinished, origin)[1:] if unfinished.exists() else []
    ids: list[list[int]] = [answer for line in done for answer in line["ids"]]
    seconds = sum((line["seconds"] for line in done), 0.0)
    here = len(ids)
    print(f"{len(order)} answers are sampled before the first step; an interrupted run goes on with --resume.")
    if here:
        print(f"{here} of them are there.")
    files.write_text(
        unfinished, "".join(json.dumps(line) + "\n" for line in ({"origin": origin}, *done))
    )  # without half a line
    with unfinished.open("a") as file:
        while len(ids) < len(order):
            torch.manual_seed(random.Random(f"{seed}/offline/{len(ids)}").getrandbits(63))
            began = time.perf_counter()
            new = sample([prompts[i] for i in order[len(ids) : len(ids) + batch_size]])
            took = time.perf_counter() - began
            try:
                file.write(json.dumps({"ids": new, "seconds": took}) + "\n")
                file.flush()
            except OSError as error:
                raise SdftError(f"{unfinished}: not written: {files.why(error)}") from error
            ids, seconds = ids + new, seconds + took
            left = seconds / len(ids) * (len(order) - len(ids))
            print(
                f"answers {len(ids)}/{len(order)}  {sum(map(len, new)) / took:.0f} tok/s  ETA {left:.0f}s", flush=True
            )
    answers: list[list[list[int]]] = [[] for _ in prompts]
    for i, answer in zip(order, ids, strict=True):
        answers[i].append(answer)
    rows = [{"origin": origin, "seconds": seconds}, *({"answers": [*map(decode, a)], "ids": a} for a in answers)]
    files.write_text(finished, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))  # to be read
    unfinished.unlink()
    return Offline(tuple(map(tuple, answers)), seconds)


def _read(path: Path, origin: dict[str, Any]) -> list[dict[str, Any]]:
    """The whole lines of a file of that origin; a half-written last one is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").split("\n"):  # U+2028 and its kind may stand in an answer
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    there = lines[0].get("origin", {}) if lines else {}
    for name, now in origin.items():
        if there.get(name) != now:
            raise SdftError(
                f"{path} holds answers of another run: its {name} is {there.get(name)!r}, and here it is {now!r}; "
                "put that back, or delete the file to sample anew"
            )
    return lines
