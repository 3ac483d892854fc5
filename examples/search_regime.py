"""Where does SDFT beat SFT? Runs over methods, learning rates, teachers, rollouts and seeds, on one small skill.

    python examples/search_regime.py --seeds 0 1 2 --cells sdft-demo sft
    python examples/search_regime.py --list

Every cell is a config of the demo with a few settings changed, run through `sdft.train` in a folder of its own
under runs/search. Finished cells are not run again, so the search can be stopped at any time and added to. Ends
with a table of means over the seeds, also in runs/search/table.md: each SDFT cell at its last step, and SFT where it
first knows as much of the new skill.
"""

import argparse
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

from demo import CONFIGS, SETS, equal_skill, evaluations

FOLDER = Path("runs/search")
Evaluations = dict[int, dict[str, float]]  # step -> set -> accuracy

# name: (method, changed settings)
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdft-demo": ("SDFT", {}),
    "sft-lr1e-5": ("SFT", {}),
    "sft-lr5e-6": ("SFT", {"optim.lr": 5e-6, "train.steps": 100}),
    "sft-lr2e-5": ("SFT", {"optim.lr": 2e-5}),
    "sft-sentences": ("SFT", {"style": "sentence"}),  # the control: demonstrations in the model's own style
    "sdft-student-rollouts": ("SDFT", {"rollout.source": "student"}),
    "sdft-teacher-rollouts": ("SDFT", {"rollout.source": "teacher"}),
    "sdft-ema": ("SDFT", {"teacher.kind": "ema"}),
    "sdft-lr1e-5": ("SDFT", {"optim.lr": 1e-5}),
    "sdft-jsd": ("SDFT", {"loss.divergence": "jsd"}),
    "sdft-reverse-kl": ("SDFT", {"loss.divergence": "reverse_kl"}),
    "sdft-temperature-1": ("SDFT", {"loss.temperature": 1.0, "rollout.temperature": 1.0}),
    "sdft-lora": ("SDFT", {"lora.rank": 16, "optim.lr": 2e-4}),
    "sft-commands": ("SFT", {"skill": "commands"}),
    "sdft-commands": ("SDFT", {"skill": "commands", "teacher.context": "as_turns", "teacher.template": ""}),
}


def cell_config(name: str, seed: int) -> Any:
    """The config of a cell, its data written."""
    from sdft import load_config, override
    from sdft.data import tasks

    method, changes = CELLS[name]
    changes = dict(changes)
    skill, style = changes.pop("skill", "facts"), changes.pop("style", "terse")
    data = FOLDER / f"data-{style}"
    tasks.write(tasks.demo(style), data)
    files = {"new": f"{skill}-test", "prior": "capitals", "general": "general"}
    settings = {
        "data.train": str(data / f"{skill}-train.jsonl"),
        "eval.sets": {key: str(data / f"{file}.jsonl") for key, file in files.items()},
        "train.output": str(FOLDER / f"{name}-seed{seed}"),
        "train.seed": seed,
    }
    return override(load_config(CONFIGS[method]), settings | changes)


def run(config: Any) -> None:
    """Runs a cell unless it is finished; weights are not kept."""
    from sdft import train

    output = Path(config.train.output)
    if (output / "done").exists():
        return
    shutil.rmtree(output, ignore_errors=True)
    train(config)
    for folder in ("model", "checkpoints"):
        shutil.rmtree(output / folder)
    (output / "done").touch()


def row(name: str, results: list[dict[str, float]], steps: list[int]) -> str:
    means = [f"{mean(r[key] for r in results):.0%}" for key in SETS]
    spread = f"{min(r['prior'] for r in results):.0%} to {max(r['prior'] for r in results):.0%}"
    return f"| {name} | {len(results)} | {mean(steps):.0f} | " + " | ".join(means) + f" | {spread} |"


def table(results: dict[str, dict[int, Evaluations]]) -> str:
    """Markdown: a row for each cell, means over seeds."""
    lines = [f"| | seeds | step | {' | '.join(SETS.values())} | prior, by seed |", "|---" * (len(SETS) + 4) + "|"]
    everything = [evals for by_seed in results.values() for evals in by_seed.values()]
    lines.append(row("base", [everything[0][0]], [0]))
    for name, by_seed in results.items():
        seeds = [s for s in by_seed if s in results.get("sdft-demo", {})]
        if CELLS[name][0] == "SFT" and seeds:
            ours = {s: results["sdft-demo"][s] for s in seeds}
            at = [equal_skill(by_seed[s], ours[s][max(ours[s])]["new"]) for s in seeds]
            equal = [by_seed[s][step] for s, step in zip(seeds, at, strict=True)]
            lines.append(row(f"{name}, where it knows as much as sdft-demo (or its best)", equal, at))
        last = [evals[max(evals)] for evals in by_seed.values()]
        lines.append(row(f"{name}, last step", last, [max(evals) for evals in by_seed.values()]))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the cells asked for, and prints the table of all that are finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["sdft-demo", "sft-lr"], help="run cells that start with these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--list", action="store_true", help="name the cells, run none")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name}: {method} {changes}" for name, (method, changes) in CELLS.items()))
        return
    from sdft.training.metrics import read_metrics

    wanted = [name for name in CELLS if name.startswith(tuple(options.cells))]
    for seed in options.seeds:
        for name in wanted:
            print(f"== {name}, seed {seed}", flush=True)
            run(cell_config(name, seed))
    results: dict[str, dict[int, Evaluations]] = {}
    for name in CELLS:
        for done in sorted(FOLDER.glob(f"{name}-seed*/done")):
            seed = int(done.parent.name.rsplit("seed", 1)[1])
            results.setdefault(name, {})[seed] = evaluations(read_metrics(done.parent))
    text = table(results)
    (FOLDER / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
