"""`make demo`: teach SmolLM2-135M made-up facts by SFT and by SDFT, and see what each forgets.

    python examples/demo.py [--steps N] [--folder runs/demo]

Everything runs on the CPU and lands in runs/demo: the data, both runs, report.md and report.png. Runs that are
already there are not repeated; delete the folder to start over.
"""

import argparse
import os
from pathlib import Path
from typing import Any

CONFIGS = {"SFT": Path("examples/demo-sft.toml"), "SDFT": Path("examples/demo-sdft.toml")}
SETS = {"new": "made-up capitals (new)", "prior": "real capitals (prior)", "general": "other questions (prior)"}


def main() -> None:
    """Data, check, two runs, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where everything lands")
    parser.add_argument("--steps", type=int, default=0, help="steps of each run; 0: as the configs say")
    options = parser.parse_args()
    folder: Path = options.folder

    from sdft import check
    from sdft.cli import quiet_libraries, show
    from sdft.data import tasks
    from sdft.training.loop import train
    from sdft.training.metrics import read_metrics

    quiet_libraries()
    tasks.write(tasks.demo(), folder / "data")
    configs = {name: settle(path, folder, options.steps) for name, path in CONFIGS.items()}
    print("== Can the teacher use the demonstrations? (sdft check)")
    show.check(check(configs["SDFT"], count=24), configs["SDFT"].teacher.context, rows=3)
    curves = {}
    for name, config in configs.items():
        print(f"\n== {name} (sdft train {CONFIGS[name]})")
        output = Path(config.train.output)
        if not (output / "model").exists():
            if (output / "config.toml").exists():
                os.rename(output, output.with_name(f"{output.name}-unfinished-{os.getpid()}"))
            train(config)
        curves[name] = read_metrics(output)
    report = table(curves)
    (folder / "report.md").write_text(report)
    picture(curves, folder / "report.png")
    print(f"\n{report}\nPicture: {folder / 'report.png'}")


def settle(path: Path, folder: Path, steps: int) -> Any:
    """The config at `path`, its files under `folder`."""
    from sdft.config import load_config, override

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


def evaluations(lines: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """step -> accuracy by set."""
    return {line["step"]: line["eval"] for line in lines if "eval" in line}


def equal_skill(sft: dict[int, dict[str, float]], new: float) -> int:
    """The first evaluated step at which SFT knows at least as much of the new skill, else its best."""
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
