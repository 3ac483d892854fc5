"""Whole training steps of ours and of TRL's SDFTTrainer: seconds by phase and peak memory. `make bench-step`.

    python -m bench.step                                        # SmolLM2-135M on the CPU
    python -m bench.step --device cuda --model random-0.5b      # a random Qwen2.5-0.5B
    python -m bench.step --six                                  # ours: full/LoRA x checkpointing x ema/base

Every contender trains on the same records in a separate process. On a CPU, peak memory is the VmHWM of the process,
libraries included (Linux only); on CUDA it is the peak of the allocator. Results are written after every contender.
--six measures only our configurations, and compares each peak with the prediction of `sdft plan`.

The same for both sides: weights and chat template, prompts, the teacher's context (TRL's template, which is a
`teacher.template` of ours), completions a step, tokens a completion (none stops early), sampling at temperature 1 from
the whole vocabulary, full-vocabulary forward KL averaged over the completions, AdamW with fp32 states, a constant
learning rate, clipping at 1, an EMA teacher at the same rate, fp32 weights, bf16 autocast as each trainer has it by
default. If a name contains 8-bit or bf16, both sides have this instead.

What differs between the trainers:
- In full fine-tuning, TRL keeps a second model for the teacher; ours keeps a second set of weights for the same model.
- For scoring, TRL pads on the left and computes the logits of all completion tokens; ours lays sequences end to end or
  pads on the right (train.packing) and never has all logits.
- TRL's head (hidden states to logits) counts as `score` and its gradient as `backward`; ours counts as `loss` with its
  gradient. `update` is the rest of the step: clipping, AdamW, the teacher's update, logging.
- TRL forbids the stop tokens (min_new_tokens); ours may sample them and continues. That changes no shape.
- TRL's LoRA teacher starts at A = B = 0, ours at the student's A and B: the same model, and the same work.
- The defaults of TRL are a `base` teacher, checkpointing on, and the top 100 logits with beta 0.5; "TRL defaults" keeps
  the last two. It has no fused loss: its Liger mode (use_liger_kernel) patches the model's layers.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .measure import Row
from .report import RESULTS, describe, stem_of
from .trainers import Contender, Job, Shape, random_qwen, run_one

ROOT = Path(__file__).parents[1]
RANDOM = "random-0.5b"
PACKAGES = ("transformers", "trl", "accelerate", "peft", "liger-kernel", "bitsandbytes")

SHAPES = {"8x24": Shape(8, 24, 0), "16x128": Shape(16, 128, 200)}
GPU_SHAPES = {"32x512": Shape(32, 512, 500)}

CHECKPOINTING: dict[str, Any] = {"model.gradient_checkpointing": True}
NO_CHECKPOINTING = {"gradient_checkpointing": False}
MICRO = {"train.micro_batch_tokens": 1024}
EIGHT_BIT = CHECKPOINTING | {"optim.name": "adamw_8bit"}
OFFLOAD = CHECKPOINTING | {"teacher.offload": True, "optim.offload": True}  # CUDA only
BF16, TRL_BF16 = {"model.weights_dtype": "bfloat16"}, {"model_init_kwargs": {"dtype": "bfloat16"}}
FP32, TRL_FP32 = {"model.compute_dtype": "float32"}, {"bf16": False}
TOP_K = {"distillation_mode": "topk_logits", "distillation_alpha": 0.5}
CONTENDERS = (
    Contender("ours", "ours", beside="TRL"),
    Contender("TRL", "trl", settings=NO_CHECKPOINTING),
    Contender("ours, 2048 tokens", "ours", settings={"train.micro_batch_tokens": 2048}, beside="TRL"),
    Contender("ours, checkpointing", "ours", settings=CHECKPOINTING, beside="TRL, checkpointing"),
    Contender("ours, checkpointing, 1024 tokens", "ours", settings=CHECKPOINTING | MICRO, beside="TRL, checkpointing"),
    Contender("TRL, checkpointing", "trl"),
    Contender("ours, 8-bit AdamW", "ours", settings=EIGHT_BIT, beside="TRL, 8-bit AdamW"),
    Contender("TRL, 8-bit AdamW", "trl", settings={"optim": "adamw_8bit"}),
    Contender("ours, offload", "ours", settings=OFFLOAD, beside="TRL, checkpointing"),
    Contender("TRL defaults", "trl", settings=TOP_K),
    Contender("TRL, Liger", "trl", settings=NO_CHECKPOINTING | {"use_liger_kernel": True}),
    Contender("ours, fp32", "ours", settings=FP32, beside="TRL, fp32"),
    Contender("TRL, fp32", "trl", settings=NO_CHECKPOINTING | TRL_FP32),
    Contender("ours, LoRA", "ours", lora=True, beside="TRL, LoRA"),
    Contender("TRL, LoRA", "trl", lora=True, settings=NO_CHECKPOINTING),
    Contender("ours, LoRA, bf16 weights", "ours", lora=True, settings=BF16, beside="TRL, LoRA, bf16 weights"),
    Contender("TRL, LoRA, bf16 weights", "trl", lora=True, settings=NO_CHECKPOINTING | TRL_BF16),
    Contender(
        "ours, LoRA, checkpointing", "ours", lora=True, settings=CHECKPOINTING, beside="TRL, LoRA, checkpointing"
    ),
    Contender("TRL, LoRA, checkpointing", "trl", lora=True),
)
SIX = tuple(  # of --six; there are eight by now
    Contender(
        f"{'LoRA' if lora else 'full'}, checkpointing {'on' if checkpointing else 'off'}, {kind}",
        "ours",
        lora,
        {"model.gradient_checkpointing": checkpointing, "teacher.kind": kind},
    )
    for lora in (False, True)
    for checkpointing in (False, True)
    for kind in ("ema", "base")
)


# Each contender in a separate process.


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Holds the lock of a file, so that two programs do not measure at the same time."""
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def in_subprocess(job: Job, limit_s: float) -> Row:
    """run_one in a fresh process, so that its peak memory is not another run's; killed after limit_s."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "row.json"), Path(folder, "log")
        command = [sys.executable, "-m", "bench.step", "--one", json.dumps(asdict(job)), "--results", str(result)]
        with log.open("w") as file:
            try:
                done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit_s)
            except subprocess.TimeoutExpired:
                return {"note": f"over {limit_s:.0f} s"}
        if result.exists():
            return json.loads(result.read_text())
        last = " ".join(log.read_text().strip().splitlines()[-1:])
        return {"note": f"died with exit status {done.returncode}: {last[:160]}"}


def compare(rows: list[Row]) -> None:
    """Write into our rows their time and memory as a share of TRL's row."""
    found = {(row["shape"], row["contender"]): row for row in rows}
    for row in rows:
        other = found.get((row["shape"], row["beside"]), {})
        if "seconds" in row and "seconds" in other:
            row["of TRL's time"] = row["seconds"] / other["seconds"]
            row["of TRL's memory"] = row["peak"] / other["peak"]
        if "predicted" in row and "peak" in row:
            row["predicted / peak"] = row["predicted"] / row["peak"]


COLUMNS = {  # key of a row: (heading, factor, format)
    "seconds": ("s a step", 1, ".2f"),
    "least": ("least", 1, ".2f"),
    "most": ("most", 1, ".2f"),
    "steps": ("steps", 1, "d"),
    "rollout": ("rollout", 1, ".2f"),
    "score": ("score", 1, ".2f"),
    "loss": ("loss", 1, ".2f"),
    "backward": ("backward", 1, ".2f"),
    "update": ("update", 1, ".2f"),
    "tokens_per_second": ("tokens/s", 1, ".0f"),
    "peak": ("peak GB", 1e-9, ".2f"),
    "libraries": ("libraries GB", 1e-9, ".2f"),
    "of TRL's time": ("of TRL's time", 1, ".0%"),
    "of TRL's memory": ("of TRL's memory", 1, ".0%"),
    "predicted": ("predicted GB", 1e-9, ".2f"),
    "predicted / peak": ("predicted / peak", 1, ".0%"),
}


def markdown(meta: dict[str, Any], rows: list[Row]) -> str:
    """A paragraph on the run, then a table for each shape; columns that no row has are left out."""
    lines = ["; ".join(f"{k} {v}" for k, v in meta.items()) + ".", ""]
    lines += [
        "Medians over the steps after the first, in seconds; tokens/s: completion tokens. Our head is in `loss`, TRL's",
        "in `score` and `backward`; `update` is the rest of the step. Peak GB: see bench/step.py, which also lists",
        "what is equal for all and what is not; libraries GB: the process before any weight.",
    ]
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        group = [row for row in rows if row["shape"] == shape]
        lines += ["", f"**{shape}{tokens(group)}**", ""]
        headings = ["contender", *(heading for heading, _, _ in columns.values()), "products", "note"]
        lines += ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * len(columns) + "---|---|"]
        for row in group:
            cells = [format(row[k] * factor, form) if k in row else "" for k, (_, factor, form) in columns.items()]
            cells = [row["contender"], *cells, row.get("dtype", ""), row.get("note", "")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def tokens(group: list[Row]) -> str:
    """The tokens of a step. There is more than one entry if contenders do not agree."""
    names = ("prompt_tokens", "teacher_prompt_tokens", "answer_tokens")
    counts = {tuple(row[name] for name in names) for row in group if "seconds" in row}
    texts = [
        "{} tokens of prompts, {} of the teacher's prompts, {} of completions".format(*count)
        for count in sorted(counts)
    ]
    return "".join(f", {text}" for text in texts)


def write(path: Path, meta: dict[str, Any], rows: list[Row]) -> None:
    """path.json and path.md; copies in $OUT if that is set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(".json"), path.with_suffix(".md")]
    files[0].write_text(json.dumps(meta | {"rows": rows}, indent=1) + "\n")
    files[1].write_text(markdown(meta, rows))
    if out := os.environ.get("OUT"):
        for file in files:
            shutil.copy(file, out)


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="smollm2-135m", help=f"as model.name, or {RANDOM}, made on the spot")
    parser.add_argument("--six", action="store_true", help="only ours, each peak compared with `sdft plan`")
    parser.add_argument("--shapes", default="", metavar="REGEX", help=f"of {', '.join(SHAPES | GPU_SHAPES)}")
    parser.add_argument("--contenders", default="", metavar="REGEX", help='for example "^(ours|TRL)$"')
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after one for warm-up")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="for each contender; afterwards no further step begins"
    )
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which a contender is killed")
    parser.add_argument("--lock", type=Path, help="a file to lock while a contender runs")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        given = json.loads(args.one)
        job = Job(**given | {"contender": Contender(**given["contender"]), "shape": Shape(**given["shape"])})
        args.results.write_text(json.dumps(run_one(job)))
        return []
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu is the default")
    contenders = [c for c in (SIX if args.six else CONTENDERS) if re.search(args.contenders, c.name)]
    shapes = SHAPES | (GPU_SHAPES if args.device == "cuda" else {})
    shapes = {name: shape for name, shape in shapes.items() if re.search(args.shapes, name)}
    if not contenders or not shapes:
        parser.error(f"nothing matches --contenders {args.contenders!r} and --shapes {args.shapes!r}")
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "bench.step", *given])
    meta = describe(command, PACKAGES) | {"model": args.model}
    path = args.results / ("step-" + stem_of(meta) + "-six" * args.six)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_qwen(Path(folder)) if args.model == RANDOM else args.model
        for name, shape in shapes.items():
            for contender in contenders:
                row: Row = {"shape": name, "contender": contender.name, "beside": contender.beside}
                with locked(args.lock):
                    job = Job(contender, shape, model, args.device, args.steps, args.seconds, args.six)
                    row |= in_subprocess(job, args.limit)
                rows.append(row)
                compare(rows)
                write(path, meta, rows)
                result = f"{row['seconds']:.2f} s, {row['peak'] / 1e9:.2f} GB" if "seconds" in row else row["note"]
                print(f"{name} {contender.name}: {result}", flush=True)
    print(path.with_suffix(".md").read_text())
    return rows


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the contender too
    main()
