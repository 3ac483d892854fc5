"""The prediction of `sdft plan` and the measured peak of a real run; or the table of docs/memory.md.

    python -m bench.memory            SmolLM2-135M on the CPU, eight configurations, a few steps of each
    python -m bench.memory --table    GPU predictions for larger models (nothing is measured)

Every configuration is predicted in one fresh process and run in another. The kernel measures the peak (VmHWM), which
is reset to the resident bytes at the beginning of each phase.
"""

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
MIB, GIB = 2**20, 2**30
BAR = 0.10  # the largest error of the prediction, as a share of the measured peak

# A step of the size of examples/demo-sdft.toml; some cases have an EMA teacher.
BASE = {
    "model.name": "smollm2-135m",
    "teacher.context": "template",
    "teacher.template": '{demonstration}\n\n{request} Answer in a full sentence that begins with "The capital".',
    "rollout.source": "student",
    "rollout.max_new_tokens": 16,
    "rollout.temperature": 0.5,
    "loss.divergence": "forward_kl",
    "loss.temperature": 0.5,
    "train.batch_size": 8,
    "train.steps": 6,
}


def cases() -> dict[str, dict[str, Any]]:
    """The settings of each configuration, by name."""
    return {
        f"{'LoRA' if rank else 'full'}, {teacher}{', checkpointing' if again else ''}": {
            "lora.rank": rank,
            "teacher.kind": teacher,
            "model.gradient_checkpointing": again,
        }
        for rank, again, teacher in product((0, 16), (False, True), ("base", "ema"))
    }


def config_of(settings: dict[str, Any], folder: Path) -> Any:
    from sdft.config import Config, override

    paths = {"data.train": str(folder / "data/facts-train.jsonl"), "train.output": str(folder / "run")}
    return override(Config(), BASE | paths | settings)


# Each in a fresh process.


def predicted(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The phases of the plan: bytes of each term."""
    from sdft.planning.machine import this_machine
    from sdft.planning.plan import predict
    from sdft.planning.work import shape_of, work_of

    config = config_of(settings, folder)
    shape, work, machine = shape_of(config), work_of(config), this_machine(config)
    return predict(shape, config, work, machine).phases


def measured(settings: dict[str, Any], folder: Path) -> dict[str, int]:
    """Peak resident bytes of each phase, over all steps after the first (before it the optimizer is empty)."""
    from sdft.training import metrics
    from sdft.training.loop import train

    peaks: dict[str, int] = {}
    plain = metrics.Phases.__call__

    @contextlib.contextmanager
    def watched(self: Any, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")
        with plain(self, name):
            yield
        peaks[name] = max(peaks.get(name, 0), status("VmHWM"))

    metrics.Phases.__call__ = watched  # type: ignore[method-assign]
    train(config_of(settings, folder))
    return peaks


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def apart(what: str, settings: dict[str, Any]) -> Any:
    """`predicted` or `measured` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "sdft", "data", "demo", f"{folder}/data"],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        command = [sys.executable, "-m", "bench.memory", "--worker", what, json.dumps(settings), folder]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])


# Predictions for GPUs.

GPUS = (8, 12, 16, 24, 80)  # GiB
LEAN = {
    "model.weights_dtype": "bfloat16", "model.gradient_checkpointing": True, "optim.name": "adamw_8bit",
    "teacher.offload": True,
}  # fmt: skip
LORA = {"model.weights_dtype": "bfloat16", "model.gradient_checkpointing": True, "lora.rank": 16}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, bf16 weights, 8-bit Adam, offloaded EMA, checkpointing": LEAN,
    "LoRA 16, bf16 weights, checkpointing": LORA,
    "QLoRA 16, checkpointing": LORA | {"model.quantize": "4bit"},
}
# Sizes from the models' public config.json: model type, layers, hidden, MLP, heads, heads of keys, vocabulary, tied.
MODELS: dict[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "Qwen2.5-0.5B": ("qwen2", 24, 896, 4864, 14, 2, 151936, True),
    "Qwen2.5-1.5B": ("qwen2", 28, 1536, 8960, 12, 2, 151936, True),
    "Qwen2.5-7B": ("qwen2", 28, 3584, 18944, 28, 4, 152064, False),
    "Llama-3.1-8B": ("llama", 32, 4096, 14336, 32, 8, 128256, False),
}
STEP = {"prompt": 512, "teacher_prompt": 1024, "completion": 256}  # tokens of each of a step's 32 sequences


def shape_of(model: str) -> Any:
    """The ModelShape of one of MODELS."""
    from transformers import AutoConfig

    from sdft.model.shape import ModelShape

    kind, layers, hidden, inner, heads, kv_heads, vocab, tied = MODELS[model]
    return ModelShape.from_config(
        AutoConfig.for_model(
            kind,
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocab,
            tie_word_embeddings=tied,
        )
    )


def full_logits() -> tuple[float, float]:
    """Bytes that TRL's full-vocabulary loss holds for each of N V logits: after its forward, most in its backward.

    Counted on TRL's own functions, with fake tensors: both models' logits in bf16, made fp32 by accelerate, divided
    by the temperature, their log-softmaxes, the elementwise divergence.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

    from sdft.planning.live_bytes import LiveBytes

    rows, vocab = 64, 4096
    with FakeTensorMode():
        source = torch.empty(rows, vocab, dtype=torch.bfloat16, requires_grad=True)
        with LiveBytes([source]) as live:

            def logits(of: torch.Tensor) -> torch.Tensor:  # (N, V): the head's output, in trl's _forward_logits
                return (of * 1).float() / 1.0

            with torch.no_grad():
                teacher = logits(source)
            student = logits(source)
            loss = compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=0.0)  # (N,)
            held = live.now
            live.take_peak()
            loss.sum().backward()
            return held / (rows * vocab), live.peak / (rows * vocab)


def table() -> str:
    """The largest token budget of every method on every GPU: Markdown."""
    from sdft.config import Config, override
    from sdft.planning.machine import CUBLAS_WORKSPACE, CUDA_CONTEXT, FRAGMENTATION, Machine
    from sdft.planning.plan import Costs, Terms
    from sdft.planning.work import Pass, uniform_work

    forward, backward = full_logits()

    class FullLogits(Costs):
        """The same plan, but the loss keeps every logit of both sides, and makes gradients in the backward pass."""

        def in_loss(self, uses: Terms, one: Pass) -> Terms:
            return self._with_logits(uses, forward * one.rows)

        def in_backward(self, uses: Terms, one: Pass, place: str) -> Terms:
            return self._with_logits(uses, backward * one.rows) if place == "before" else uses

        def _with_logits(self, uses: Terms, entries: float) -> Terms:
            gradients = max(0, uses.get("gradients", 0) - self.held.head_gradient)
            return uses | {"gradients": gradients, "loss": round(entries * self.shape.vocab)}

    lines = [
        f"| model | what trains | {' | '.join(f'{gpu} GB' for gpu in GPUS)} |",
        f"|---|---|{'---|' * len(GPUS)}",
    ]
    for model, (method, settings) in product(MODELS, METHODS.items()):
        new = {"rollout.max_new_tokens": STEP["completion"], "model.device": "cuda", "teacher.kind": "ema"}
        config = override(Config(), new | settings)
        work = uniform_work(config, **STEP)
        cells = []
        for gpu in GPUS:
            machine = Machine("cuda", gpu * GIB, CUDA_CONTEXT + CUBLAS_WORKSPACE, FRAGMENTATION)
            found = [largest(kind, shape_of(model), config, machine, work) for kind in (Costs, FullLogits)]
            cells.append(" / ".join(found) if found != ["–", "–"] else "–")
        lines.append(f"| {model} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def largest(kind: Any, shape: Any, config: Any, machine: Any, work: Any) -> str:
    """The largest token budget that fits, with as many prompts generating together as there is room for."""
    from sdft.config import override
    from sdft.planning.plan import largest_budget

    for prompts in (32, 8, 1):
        costs = kind(shape, override(config, {"rollout.batch_size": prompts}), machine)
        budget = largest_budget(costs, work)
        if budget is not None:
            few = f" ({prompts})" if prompts < 32 else ""
            return f"{'a whole step' if budget == 0 else f'{budget:,}'}{few}"
    return "–"


# What is written down.


def compare(names: list[str]) -> list[dict[str, Any]]:
    """Predicted and measured bytes of each configuration, by phase; the phases that have a prediction."""
    rows = []
    for name, settings in cases().items():
        if names and name not in names:
            continue
        plan, run = apart("predicted", settings), apart("measured", settings)
        phases = {phase: {"predicted": sum(plan[phase].values()), "measured": run[phase]} for phase in plan}
        peak = {kind: max(one[kind] for one in phases.values()) for kind in ("predicted", "measured")}
        rows.append({"configuration": name, "peak": peak, "phases": phases, "terms": plan})
        print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table: for each configuration and phase predicted / measured MiB, and how far the peak is off."""
    phases = list(rows[0]["phases"])
    lines = [
        f"| configuration | peak, predicted | measured | off by | {' | '.join(phases)} |",
        f"|---|---:|---:|---:|{'---:|' * len(phases)}",
    ]
    for row in rows:
        peak = row["peak"]
        cells = [f"{both['predicted'] / MIB:.0f} / {both['measured'] / MIB:.0f}" for both in row["phases"].values()]
        off = f"{peak['predicted'] / peak['measured'] - 1:+.1%}"
        peaks = f"{peak['predicted'] / MIB:.0f} | {peak['measured'] / MIB:.0f} | {off}"
        lines.append(f"| {row['configuration']} | {peaks} | {' | '.join(cells)} |")
    return "\n".join(lines)


def describe() -> str:
    """Where and with what this was measured."""
    import torch
    import transformers

    from .report import device_name, output_of

    commit = output_of("git", "rev-parse", "--short", "HEAD")
    threads = torch.get_num_threads()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{device_name()}, {threads} threads, {versions}, commit {commit}"


def main() -> None:
    from .docs import put_into

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="predictions for GPUs, into docs/memory.md")
    parser.add_argument("--only", nargs="*", default=[], choices=list(cases()), help="these configurations, not kept")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        what, settings, folder = a.worker
        print(json.dumps({"predicted": predicted, "measured": measured}[what](json.loads(settings), Path(folder))))
        return
    if a.table:
        text = table()
        put_into(ROOT / "docs/memory.md", "table", text)
        print(text)
        return
    rows = compare(a.only)
    if a.only:
        return
    about = describe()
    (RESULTS / "memory-cpu.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    text = f"MiB, predicted / measured; {about}.\n\n{markdown(rows)}"
    (RESULTS / "memory-cpu.md").write_text(
        f"# Peak memory, predicted and measured\n\n`python -m bench.memory`\n\n{text}\n"
    )
    put_into(ROOT / "docs/memory.md", "measured", text)
    worst = max(abs(row["peak"]["predicted"] / row["peak"]["measured"] - 1) for row in rows)
    print(f"The worst peak is off by {worst:.1%}; the bar is {BAR:.0%}.")
    if worst > BAR:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
