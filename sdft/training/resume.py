"""A run and its checkpoints: the starting point, what a checkpoint holds of a run, and how it restores a run."""

import itertools
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdft import files, parallel
from sdft.config import Config, free_on_resume
from sdft.errors import SdftError
from sdft.training import checkpoint
from sdft.training.metrics import MetricsLog, read_metrics
from sdft.training.run import Best, GuardState, Run, Stop


def starting_point(config: Config, output: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from and its state, or None for a first step. Deletes what a kill left half done.

    Raises SdftError if that checkpoint is damaged, is another run's, or is not there.
    """
    files.clear_partials(output)
    files.clear_partials(output / "eval")
    if not config.train.resume:
        return None
    folder = checkpoint.latest(output)
    if step := config.train.resume_step:
        folder = checkpoint.checkpoint_folder(output, step)
        if not folder.is_dir():
            steps = ", ".join(str(checkpoint.step_of(f)) for f in checkpoint.checkpoints(output))
            raise SdftError(
                f"train.resume_step = {step}: {output} has no checkpoint of that step; it has {steps or 'none at all'}"
            )
    if folder is None:
        return None
    state = checkpoint.read_state(folder)
    check_same_run(state["config"], config, folder)
    return folder, state


def check_same_run(before: dict[str, Any], config: Config, source: Path) -> None:
    """Raises SdftError for the first setting that would make the resumed run another one.

    before: the settings in the file or folder `source`, by dotted name.
    """
    free, default, now = free_on_resume(), dotted(asdict(Config())), dotted(asdict(config))
    for key in now:
        was = before.get(key, default.get(key))  # a setting that an earlier version did not have
        if key not in free and json.dumps(was) != json.dumps(now[key]):  # a tuple is a list in a file
            raise SdftError(
                f"--resume: {key} was {was!r} in {source} and is now {now[key]!r}; put it back, or start another run"
            )


def dotted(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, by names such as optim.lr."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def save(run: Run, step: int, log: MetricsLog, output: Path) -> None:
    """Writes the checkpoint after `step` steps, if it is not there yet; deletes older ones, except the best.

    The main process writes; the others wait for it.
    """
    log.sync()
    if parallel.is_main():
        if not checkpoint.checkpoint_folder(output, step).exists():
            checkpoint.save_checkpoint(output, step, run.model, run.teacher, run.optimizer, facts(run))
        checkpoint.prune(output, run.config.train.keep_checkpoints, run.best.step if run.best else None)
    parallel.barrier()


def facts(run: Run) -> dict[str, Any]:
    """What a checkpoint holds of a run besides its tensors."""
    return {
        "data": run.data.digest,
        "frozen": run.frozen,
        "config": {k: v for k, v in dotted(asdict(run.config)).items() if k not in free_on_resume()},
        "result": run.result,
        "best": asdict(run.best) if run.best else {},
        "guard": {k: v for k, v in asdict(run.guard).items() if v is not None} if run.guard else {},
        "offline": run.offline,
        "micro_batch_tokens": [run.config.train.micro_batch_tokens, run.micro_batch_tokens],
        "rollout_batch": [run.config.rollout.batch_size, run.rollout_batch],
    }


def resume(run: Run, folder: Path, state: dict[str, Any]) -> int:
    """Loads a checkpoint into a run; returns the number of finished steps. state: what `starting_point` returned."""
    if state["data"] != run.data.digest:
        raise SdftError(
            f"--resume: the data in {run.config.data.train} is not what {folder} was trained on; put it back"
        )
    if state["frozen"] != run.frozen:
        raise SdftError(
            f"--resume: the frozen weights of model.name = {run.config.model.name!r} are not those that {folder} was "
            "trained on; put them back"
        )
    if state.get("offline", "") != run.offline:
        raise SdftError(
            f"--resume: the completions in {folder.parents[1] / 'offline.jsonl'} are not those that {folder} was "
            "trained on; put them back"
        )
    checkpoint.load_checkpoint(folder, run.model, run.teacher, run.optimizer)
    run.result = state["result"]
    run.best = Best(**state["best"]) if state["best"] else None
    run.guard = read_guard(state.get("guard", {}))
    if state["micro_batch_tokens"][0] == run.micro_batch_tokens:  # the same setting: keep what fitted
        run.micro_batch_tokens = state["micro_batch_tokens"][1]
    if state["rollout_batch"][0] == run.rollout_batch:
        run.rollout_batch = state["rollout_batch"][1]
    parallel.report(f"Resumed after step {state['step']} from {folder}.")
    return int(state["step"])


def read_guard(state: dict[str, Any]) -> GuardState | None:
    """eval.guard's part of a checkpoint's state; None if the run has no guard."""
    if not state:
        return None
    return GuardState(state["baseline"], Stop(**state["stopped"]) if "stopped" in state else None)


def set_aside(output: Path, step: int) -> None:
    """Moves what the run wrote after `step` into OUTPUT/set-aside-after-step-N (-2, -3 if that exists).

    Checkpoints, answers, saved batches, the finished model, and a copy of metrics.jsonl: a resume from an earlier step
    deletes nothing, and no later start reads that folder.
    """
    found = (
        *(output / "checkpoints").glob("step-*"), *(output / "eval").glob("step-*"),
        *output.glob("nonfinite-step-*"),
    )  # fmt: skip
    numbers = {path: re.search(r"step-(\d+)", path.name) for path in found}
    later = [path for path, number in numbers.items() if number and int(number[1]) > step]
    later += [path for path in (output / "model",) if path.exists()]
    lines = read_metrics(output)
    if not later and all(line["step"] <= step for line in lines):
        return
    name = f"set-aside-after-step-{step:06d}"
    folder = next(f for i in itertools.count(1) if not (f := output / (name + f"-{i}" * (i > 1))).exists())
    files.write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    try:
        for path in later:
            target = folder / path.relative_to(output)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
    except OSError as error:
        raise SdftError(f"{folder}: not written: {files.why(error)}") from error
    parallel.report(f"What came after step {step} is in {folder}; delete it once it is of no use.")
