"""Kills a training run with SIGKILL again and again, resumes it each time, and compares its end bit for bit.

    python tests/training/survival.py --kills 50    # 50 each: full fine-tuning, LoRA, offline completions

A run of a tiny model ends undisturbed. Then it runs again and is killed, half of the times at a moment drawn
from its whole length, else within a place that was drawn: a save, a removal, an evaluation, the end. It is resumed
until it ends, and must then have left the same files: weights, teacher, optimizer, answers, and metrics except times.
This is repeated until all kills have happened. After every kill, every checkpoint in the folder must be
whole, and the newest one no older than before.

Each attempt is a fork of this process, which has imported everything and computed nothing.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}

sys.path.insert(0, str(Path(__file__).parents[1]))  # conftest.py

import peft  # noqa: F401  # here, so that no attempt spends time on it
import torch
import transformers
from conftest import byte_tokenizer, tiny_config

from sdft.config import Config, override
from sdft.training import checkpoint, guard, loop

MODES: dict[str, dict[str, Any]] = {
    "full": {"teacher.kind": "ema", "teacher.ema_alpha": 0.1},
    "lora": {"lora.rank": 4, "lora.dropout": 0.1, "teacher.kind": "ema", "rollout.source": "mixed"},
    "offline": {"loss.method": "dft", "rollout.source": "offline", "rollout.per_prompt": 3, "rollout.batch_size": 4},
}
# Where a run can be killed, and what announces that it is there.
PLACES = {
    "set-up": (loop, "set_up"),
    "sampling": (loop, "sample_before_training"),
    "load": (loop, "resume"),
    "step": (loop, "train_step"),
    "evaluation": (guard, "evaluate"),
    "save": (checkpoint, "save_checkpoint"),
    "removal": (checkpoint, "prune"),
    "finish": (loop, "finish"),
}
AIMS = {  # drawn in this proportion
    "": 20, "save": 10, "sampling": 5, "evaluation": 4, "finish": 3, "removal": 2, "load": 1,
}  # fmt: skip
TIMES = ("seconds", "tokens_per_second", "peak_memory")


@dataclass(frozen=True)
class Aim:
    """Kill `seconds` after the `count`-th time (from 0) that `place` begins; "" is the start of the attempt."""

    place: str
    count: int
    seconds: float


@dataclass(frozen=True)
class Attempt:
    killed: bool
    events: list[tuple[float, str]]  # seconds since the start; "+save" where a save begins, "-save" where it ends

    @property
    def inside(self) -> str:
        """The place where it was killed; "between" outside of all."""
        open_ones: list[str] = []
        for _, event in self.events:
            open_ones = [*open_ones, event[1:]] if event[0] == "+" else open_ones[:-1]
        return open_ones[-1] if open_ones else "between"

    def seconds(self, place: str) -> float:
        """Median length of a place; of the whole attempt for ""."""
        if not place:
            return self.events[-1][0]
        begins, ends = ([when for when, event in self.events if event == sign + place] for sign in "+-")
        return statistics.median(b - a for a, b in zip(begins, ends, strict=True)) if ends else 0.05


def in_fork(work: Callable[[], Any], log: Path) -> int:
    """Starts work() in a child process with its output in `log`; returns its process id."""
    if pid := os.fork():
        return pid
    _child(work, log)


def _child(work: Callable[[], Any], log: Path) -> NoReturn:
    status = 1
    try:
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        torch.set_num_threads(1)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def attempt(config: Config, log: Path, aim: Aim | None) -> Attempt:
    """Trains in a child process, which is killed as aimed unless it ends before; exits if it fails by itself."""
    receive, send = os.pipe()

    def work() -> None:
        for name, (module, function) in PLACES.items():
            setattr(module, function, announced(name, getattr(module, function)))
        loop.train(config)

    def announced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            os.write(send, f"+{name} ".encode())
            result = function(*args)
            os.write(send, f"-{name} ".encode())
            return result

        return wrapped

    began = time.monotonic()
    pid = in_fork(work, log)
    os.close(send)
    events: list[tuple[float, str]] = []
    due = began + aim.seconds if aim and not aim.place else None
    with open(receive, "rb", buffering=0) as pipe:
        while True:
            if not select.select([pipe], [], [], None if due is None else max(0.0, due - time.monotonic()))[0]:
                os.kill(pid, signal.SIGKILL)
                aim = due = None
                continue
            if not (data := pipe.read(65536)):
                break
            now = time.monotonic()
            events += [(now - began, event) for event in data.decode().split()]
            if aim and due is None and [e for _, e in events].count(f"+{aim.place}") > aim.count:
                due = now + aim.seconds
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status) and status != 0:
        sys.exit(f"An attempt failed by itself:\n{log.read_text()[-4000:]}")
    return Attempt(os.WIFSIGNALED(status), events)


def draw(chance: random.Random, whole: Attempt) -> Aim:
    met = {event[1:] for _, event in whole.events} | {"", "load"}
    aims = {place: weight for place, weight in AIMS.items() if place in met}
    place = chance.choices(list(aims), list(aims.values()))[0]
    count = chance.randrange(4) if place in ("save", "evaluation", "removal") else 0
    return Aim(place, count, chance.uniform(0, whole.seconds(place)))


# What must be the same.


def content(output: Path) -> dict[str, Any]:
    """Every file of a run: its bytes, or what of its text must not differ."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in output.rglob("*") if p.is_file()):
        name = str(path.relative_to(output))
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
        elif path.name == "offline.jsonl":
            found[name] = re.sub(r'"seconds": [0-9.e-]+', "", path.read_text(), count=1)
        elif path.suffix in (".toml", ".md"):  # the config is in the model's card too
            found[name] = re.sub(r"^(output|resume) = .*\n", "", path.read_text(), flags=re.MULTILINE)
        else:
            found[name] = path.read_bytes()
    return found


def check_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    if got.keys() != want.keys():
        sys.exit(f"FAILED: other files are left: {sorted(got.keys() ^ want.keys())}")
    if different := [name for name in want if got[name] != want[name]]:
        sys.exit(f"FAILED: not bit-identical: {different}")


# The runs.


def make_data(folder: Path) -> None:
    """A tiny random Llama with a byte tokenizer, 12 records, and 8 questions whose score moves as it trains."""
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(tiny_config("llama"))
    for parameter in lm.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3 if parameter.ndim > 1 else 0.1)
    lm.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    words = [chr(i) + chr(i + 1) for i in range(ord("a"), ord("y"), 2)]  # ab, cd, ... wx
    records = [{"prompt": f"say {w}", "demonstration": w.upper()} for w in words]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    questions = [{"prompt": f"say {w}", "answer": letters, "check": "contains"} for w in words[:8]]
    (folder / "eval.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))


def make_config(folder: Path, mode: str) -> Config:
    settings = MODES[mode] | {
        "model.name": str(folder / "base"), "model.compute_dtype": "float32", "data.train": str(folder / "train.jsonl"),
        "teacher.context": "as_turns", "rollout.max_new_tokens": 8, "optim.lr": 1e-2, "optim.warmup_steps": 2,
        "train.steps": 16, "train.batch_size": 4, "train.save_every": 2, "train.keep_checkpoints": 2,
        "eval.sets": {"new": str(folder / "eval.jsonl")}, "eval.every": 3, "eval.max_new_tokens": 12,
        "train.keep_best": "new",
    }  # fmt: skip
    return override(Config(), settings)


def survive(mode: str, kills: int, seed: int, folder: Path) -> None:
    """The comparison for one mode; exits with a message if anything differs."""
    config, chance, log = make_config(folder, mode), random.Random(seed), folder / f"{mode}.log"
    whole = attempt(override(config, {"train.output": str(folder / mode)}), log, None)
    want = content(folder / mode)
    best = json.loads(want[max(n for n in want if n.endswith("state.json"))])["best"]
    print(f"{mode}: undisturbed in {whole.seconds(''):.1f} s, {len(want)} files, best step {best['step']}", flush=True)

    landed: collections.Counter[str] = collections.Counter()
    lives = resumed_half_done = 0
    while landed.total() < kills:
        lives += 1
        output = folder / f"{mode}-{lives}"
        run = override(config, {"train.output": str(output)})
        newest = -1
        while True:
            this = attempt(run, log, draw(chance, whole) if landed.total() < kills else None)
            if not this.killed:
                break
            landed[this.inside] += 1
            half_done = [p.name for p in output.rglob("partial-*")] if output.exists() else []
            resumed_half_done += bool(half_done)
            found = checkpoint.checkpoints(output)
            if damaged := [f"{f.name}: {why}" for f in found if (why := checkpoint.damage(f))]:
                sys.exit(f"FAILED: a kill in {this.inside} left damaged checkpoints: {damaged}")
            step = checkpoint.step_of(found[-1]) if found else -1
            if step < newest:
                sys.exit(f"FAILED: a kill in {this.inside} took step {newest} away; the newest is {step}")
            newest = step
            print(f"  kill {landed.total()}: in {this.inside}; newest step {newest}; {half_done or ''}", flush=True)
            run = override(run, {"train.resume": True})
        check_same(content(output), want)
        shutil.rmtree(output)
    places = ", ".join(f"{count} in {place}" for place, count in landed.most_common())
    print(
        f"{mode}: {landed.total()} kills ({places}), {resumed_half_done} with files half done, in {lives} runs: "
        "each ended bit-identical to the undisturbed one",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in each mode")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the machine's speed moves them too")
    parser.add_argument("--mode", choices=[*MODES, "all"], default="all")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sdft-survival-")))
        if os.waitpid(in_fork(lambda: make_data(folder), folder / "data.log"), 0)[1]:
            sys.exit((folder / "data.log").read_text())
        for mode in MODES if args.mode == "all" else (args.mode,):
            began = time.monotonic()
            survive(mode, args.kills, args.seed, folder)
            print(f"{mode}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
