"""Where does SDFT beat SFT? A grid of runs over learning rates, teachers and seeds, on one small skill.

    python examples/search_regime.py --skill facts --seeds 0 1 2

Runs every cell through `sdft.train`, each in its own folder under runs/search; finished cells are not run again,
so the search can be stopped at any time. Ends with a table: for every SDFT cell, its mean new and prior accuracy
over the seeds, and those of SFT at the first evaluation where it knows as much of the new skill.
"""

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import make_skills
from demo import equal_skill, evaluations

FOLDER = Path("runs/search")
SFT_RATES = (5e-6, 1e-5, 2e-5)
SDFT_CELLS: dict[str, dict[str, Any]] = {
    f"{divergence}-{kind}-{source}-lr{lr:g}": {
        "loss.divergence": divergence,
        "teacher.kind": kind,
        "rollout.source": source,
        "optim.lr": lr,
    }
    for divergence in ("forward_kl", "jsd", "reverse_kl")
    for kind in ("ema", "base")
    for source in ("student", "mixed", "teacher")
    for lr in (1e-5, 2e-5, 5e-5)
}


def cells(skill: str, style: str, only: str, seeds: list[int], steps: int) -> Iterator[tuple[str, int, Any]]:
    """(name, seed, config) of every run: SFT at each rate first, then the SDFT cells."""
    from sdft.config import load_config

    data = FOLDER / f"data-{style}"
    sets = {"new": f"{skill}-test", "prior": "capitals", "general": "general"}
    for seed in seeds:
        for name, changes in {
            **{f"sft-lr{lr:g}": {"optim.lr": lr, "loss.method": "sft"} for lr in SFT_RATES},
            **{name: cell for name, cell in SDFT_CELLS.items() if only in name},
        }.items():
            config = load_config("examples/demo-sdft.toml")
            for key, value in {
                **changes,
                "data.train": str(data / f"{skill}-train.jsonl"),
                "eval.sets": {key: str(data / f"{file}.jsonl") for key, file in sets.items()},
                "train.output": str(FOLDER / f"{skill}-{style}-{name}-seed{seed}"),
                "train.seed": seed,
                "train.steps": steps,
            }.items():
                section, field = key.split(".")
                config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
            yield name, seed, config


def run(config: Any) -> dict[int, dict[str, float]]:
    """Evaluations of a cell, run now if they are not there yet; weights are not kept."""
    from sdft.metrics import read_metrics
    from sdft.train import train

    output = Path(config.train.output)
    if not (output / "done").exists():
        shutil.rmtree(output, ignore_errors=True)
        train(config)
        for folder in ("model", "checkpoints"):
            shutil.rmtree(output / folder)
        (output / "done").touch()
    return evaluations(read_metrics(output))


def summary(results: dict[str, dict[int, dict[int, dict[str, float]]]]) -> str:
    """Markdown: each SDFT cell's last evaluation beside the best SFT cell at equal new skill, means over seeds."""
    sft = {name: by_seed for name, by_seed in results.items() if name.startswith("sft")}
    lines = [
        "| SDFT cell | seeds | new | prior | general | SFT at equal new: new | prior | general |",
        "|---" * 8 + "|",
    ]
    for name, by_seed in results.items():
        if name.startswith("sft"):
            continue
        ours = {seed: evals[max(evals)] for seed, evals in by_seed.items()}
        best: list[dict[str, float]] = []
        for rivals in sft.values():
            seeds = [s for s in ours if s in rivals]
            at = [rivals[s][equal_skill(rivals[s], ours[s]["new"])] for s in seeds]
            score = [mean(r[k] for r in at) for k in ("new", "prior")] if at else [0.0, 0.0]
            if at and (not best or score > [mean(r[k] for r in best) for k in ("new", "prior")]):
                best = at
        cells_ = [f"{mean(r[k] for r in ours.values()):.0%}" for k in ("new", "prior", "general")]
        rival = [f"{mean(r[k] for r in best):.0%}" if best else "-" for k in ("new", "prior", "general")]
        lines.append(f"| {name} | {len(ours)} | " + " | ".join(cells_ + rival) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the grid and prints the table, which also lands in runs/search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skill", choices=("facts", "commands"), default="facts")
    parser.add_argument("--style", choices=tuple(make_skills.FACT_STYLES), default="database")
    parser.add_argument("--only", default="forward_kl-ema-student", help="run the SDFT cells with this in their name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    make_skills.main(FOLDER / f"data-{options.style}", options.style)
    results: dict[str, dict[int, dict[int, dict[str, float]]]] = {}
    for name, seed, config in cells(options.skill, options.style, options.only, options.seeds, options.steps):
        print(f"== {name}, seed {seed}", flush=True)
        results.setdefault(name, {})[seed] = run(config)
        text = summary(results)
        (FOLDER / f"{options.skill}-{options.style}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
