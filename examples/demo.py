"""`make demo`: teaches SmolLM2-135M made-up facts by SFT and by SDFT, and shows what each run forgets.

    python examples/demo.py [--steps N] [--folder runs/demo]

Everything runs on the CPU. The folder runs/demo receives the data, both runs, report.md and report.png. A finished run
is not repeated; delete the folder to start again.
"""

import argparse
import os
from pathlib import Path
from typing import Any

CONFIGS = {"SFT": Path("examples/demo-sft.toml"), "SDFT": Path("examples/demo-sdft.toml")}
SETS = {"new": "made-up capitals (new)", "prior": "real capitals (prior)", "general": "other questions (prior)"}


def main() -> None:
    """Writes the data, checks the teacher, trains twice, writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="folder of the data and the results")
    parser.add_argument("--steps", type=int, default=0, help="steps of each run; 0: as in the configs")
    options = parser.parse_args()
    folder: Path = options.folder

    from sdft import check
    from sdft.cli import quiet_libraries, show
    from sdft.data import tasks

    quiet_libraries()
    tasks.write(tasks.demo(), folder / "data")
    configs = {name: config_in(folder, path, options.steps) for name, path in CONFIGS.items()}
    print("== Can the teacher use the demonstrations? (sdft check)", flush=True)
    show.check(check(configs["SDFT"], count=12), configs["SDFT"].teacher.context, rows=3)
    lines = {name: run(name, config) for name, config in configs.items()}
    report = table(lines)
    (folder / "report.md").write_text(report)
    picture(lines, folder / "report.png")
    print(f"\n{report}\nPicture: {folder / 'report.png'}")


def config_in(folder: Path, path: Path, steps: int) -> Any:
    """The config at `path`, with its data and its output under `folder`."""
    from sdft import load_config, override

    c = load_config(path)
    return override(
        c,
        {
            "data.train": str(folder / "data" / Path(c.data.train).name),
            "eval.sets": {name: str(folder / "data" / Path(file).name) for name, file in c.eval.sets.items()},
            "train.output": str(folder / Path(c.train.output).name),
            "train.steps": steps or c.train.steps,
        },
    )


def run(name: str, config: Any) -> list[dict[str, Any]]:
    """The metrics of a run: one dict per step and per evaluation. Trains unless the run has finished before."""
    from sdft import train
    from sdft.training.metrics import read_metrics

    output = Path(config.train.output)
    print(f"\n== {name} (sdft train {CONFIGS[name]})", flush=True)
    if not (output / "model").exists():
        if (output / "config.toml").exists():
            os.rename(output, output.with_name(f"{output.name}-unfinished-{os.getpid()}"))
        train(config)
    return read_metrics(output)


def evaluations(lines: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """step -> accuracy by set."""
    return {line["step"]: line["eval"] for line in lines if "eval" in line}


def equal_skill(sft: dict[int, dict[str, float]], new: float) -> int:
    """The first evaluated step at which SFT has at least the accuracy `new` on the new skill, or else its best step."""
    reached = [step for step, result in sft.items() if result["new"] >= new]
    return reached[0] if reached else max(sft, key=lambda step: sft[step]["new"])


def table(curves: dict[str, list[dict[str, Any]]]) -> str:
    """base / SFT / SDFT x new / prior as Markdown."""
    sft, sdft = evaluations(curves["SFT"]), evaluations(curves["SDFT"])
    last = max(sdft)
    equal = equal_skill(sft, sdft[last]["new"])
    rows = [("base", 0, sft[0]), (f"SFT, {equal} steps (new skill as SDFT)", equal, sft[equal])]
    if max(sft) != equal:
        rows.append((f"SFT, {max(sft)} steps", max(sft), sft[max(sft)]))
    rows.append((f"SDFT, {last} steps", last, sdft[last]))
    lines = ["| | " + " | ".join(SETS.values()) + " |", "|---" * (len(SETS) + 1) + "|"]
    for name, _, result in rows:
        lines.append(f"| {name} | " + " | ".join(f"{result[key]:.0%}" for key in SETS) + " |")
    return "\n".join(lines) + "\n"


def picture(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracies over steps for both methods, and SDFT's divergence over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    styles = {"new": ("#0072B2", "-", "o"), "prior": ("#D55E00", "--", "s"), "general": ("#009E73", ":", "^")}
    for axis, (name, lines) in zip(axes, curves.items(), strict=False):
        results = evaluations(lines)
        for key, (color, line, marker) in styles.items():
            values = [100 * result[key] for result in results.values()]
            axis.plot(list(results), values, line, color=color, marker=marker, label=SETS[key])
        axis.set(title=f"{name}: accuracy (%)", xlabel="step", ylim=(-3, 103))
        axis.grid(alpha=0.3)
    axes[1].legend(loc="lower right", fontsize=8)
    steps = [line for line in curves["SDFT"] if "loss" in line]
    axes[2].plot([line["step"] for line in steps], [line["loss"] for line in steps], color="#0072B2")
    axes[2].set(title="SDFT: divergence to the teacher (nats a token)", xlabel="step")
    axes[2].grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
