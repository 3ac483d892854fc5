"""The plan's prediction beside the measured peak of a real run; or the table of docs/memory.md.

    python -m bench.memory            SmolLM2-135M on the CPU, eight configurations, a few steps of each
    python -m bench.memory --table    GPU predictions for larger models (nothing is measured)

Every configuration is predicted in one fresh process and run in another. The peak is the kernel's: VmHWM, set back to
what is resident at the beginning of each phase.
"""

import contextlib
import json
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
BAR = 0.10  # of the measured peak: how far the prediction may be off

# A step of the demo's size: as examples/demo-sdft.toml, with an EMA teacher where asked for.
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


# In a process of its own.


def predicted(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The plan's phases in bytes by term."""
    from sdft import plan

    config = config_of(settings, folder)
    shape, work = plan.shape_of(config), plan.work_of(config)
    return plan.predict(shape, config, work, plan.this_machine(config)).phases


def measured(settings: dict[str, Any], folder: Path) -> dict[str, int]:
    """Peak resident bytes of each phase, the most of all steps but the first, whose optimizer is still empty."""
    from sdft import metrics
    from sdft.train import train

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
            [sys.executable, str(ROOT / "examples/make_skills.py"), f"{folder}/data"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        command = [sys.executable, "-m", "bench.memory", "--worker", what, json.dumps(settings), folder]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        print(
            json.dumps(
                {"predicted": predicted, "measured": measured}[sys.argv[2]](json.loads(sys.argv[3]), Path(sys.argv[4]))
            )
        )
    else:
        for n, s in cases().items():
            if len(sys.argv) > 2 and sys.argv[2] not in n:
                continue
            p, m = apart("predicted", s), apart("measured", s)
            print(n)
            for ph in m:
                t = sum(p[ph].values())
                print(f"   {ph:9} predicted {t / MIB:7.0f} measured {m[ph] / MIB:7.0f} {t / m[ph] - 1:+.1%}")
