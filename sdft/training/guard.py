"""Evaluations during training: the best checkpoint (train.keep_best), and the stop if a skill is lost (eval.guard)."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sdft import files, parallel
from sdft.config import Config
from sdft.errors import FruitlessError
from sdft.evaluation import accuracy
from sdft.training import checkpoint
from sdft.training.run import Best, GuardState, Run, Stop


def evaluate(run: Run, step: int, output: Path) -> dict[str, Any]:
    """Greedy accuracy on every evaluation set after `step` steps; returns its line in metrics.jsonl.

    The answers are written to OUTPUT/eval.
    """
    config = run.config.eval
    run.engine.sync()  # the student's weights
    for name, (examples, prompts) in run.evals.items():
        found = accuracy.evaluate(
            run.engine, run.tokenizer, examples, prompts, config.max_new_tokens, config.batch_size
        )
        run.result[name] = found.accuracy
        if parallel.is_main():
            rows = "".join(json.dumps(asdict(a)) + "\n" for a in found.answers)
            files.write_text(output / "eval" / f"step-{step:06d}-{name}.jsonl", rows)
    return {"step": step, "eval": dict(run.result), **judge(run, step)}


# The best.


def best_on(config: Config) -> str:
    """The evaluation set that decides which checkpoint is kept as the best: train.keep_best, or else the guard."""
    return config.train.keep_best or config.eval.guard_set


def accuracy_on(config: Config, result: dict[str, float]) -> float:
    """The accuracy that decides, from an evaluation's accuracy by set."""
    on = best_on(config)
    return statistics.fmean(result[name] for name in config.eval.sets) if on == "mean" else result[on]


def is_best(run: Run, step: int) -> bool:
    """Whether the newest evaluation, after `step` steps, is the best so far; if so, notes it in the run.

    It is the best if its accuracy is above every earlier one since the first step. With eval.guard, only evaluations
    within the guard's limit count; without train.keep_best, the newest of these is the best.
    """
    if not best_on(run.config) or run.stopped:
        return False
    value = accuracy_on(run.config, run.result)
    if run.best and value <= run.best.accuracy and run.config.train.keep_best:
        return False
    run.best = Best(best_on(run.config), step, value)
    return True


def describe_best(best: Best) -> str:
    return f"on {best.on}: {best.accuracy:.1%} after step {best.step}"


def forget_best(run: Run, output: Path) -> None:
    """After a resume: drops a best that train.keep_best no longer names, or whose checkpoint is gone."""
    if not run.best:
        return
    folder, on = checkpoint.checkpoint_folder(output, run.best.step), best_on(run.config)
    if run.best.on != on and not run.guard:
        run.best = None
    elif not folder.is_dir():
        parallel.report(f"The best checkpoint ({describe_best(run.best)}) is gone; the best is sought again.")
        run.best = None
    elif run.best.on != on:  # the guard still falls back on it, until there is a better one
        run.best = Best(on, run.best.step, accuracy_on(run.config, checkpoint.read_state(folder)["result"]))


# The guard.


def judge(run: Run, step: int) -> dict[str, Any]:
    """Compares the newest evaluation with eval.guard's limit; returns what metrics.jsonl holds about it.

    Notes the baseline (step 0) and, if the limit is broken, the stop in the run.
    """
    config = run.config.eval
    if not config.guard:
        return {}
    value = run.result[config.guard_set]
    if run.guard is None or step == 0:
        run.guard = GuardState(value)
    drop = 100 * (run.guard.baseline - value)  # percentage points
    respected = drop <= config.max_drop + 1e-9  # a drop of exactly max_drop is allowed, however it is rounded
    if not respected:
        run.guard = replace(run.guard, stopped=Stop(step, drop))
    return {"guard": {"baseline": run.guard.baseline, "drop": drop, "respected": respected}}


def back_to_best(run: Run, output: Path, say: Callable[[str], None]) -> None:
    """After eval.guard has stopped the run: loads the best checkpoint within its limit. say: prints.

    Raises FruitlessError if there is none, since the start is a model that was never trained.
    """
    config = run.config.eval
    assert run.guard is not None
    assert run.stopped is not None
    reason = (
        f"Stopped after step {run.stopped.step} by eval.guard: accuracy on {config.guard_set} is "
        f"{run.stopped.drop:.1f} points below the {run.guard.baseline:.1%} of the start, and eval.max_drop = "
        f"{config.max_drop:g}."
    )
    if not run.best:
        raise FruitlessError(
            f"{reason} No checkpoint after the start respects that, so {output / 'model'} is not written. Lower "
            "optim.lr or eval.every in another run"
        )
    folder = checkpoint.checkpoint_folder(output, run.best.step)
    state = checkpoint.read_state(folder)
    checkpoint.load_checkpoint(folder, run.model, run.teacher, run.optimizer)
    run.result, run.steps = state["result"], state["step"]  # for the model card
    say(f"{reason} The model is that of step {run.steps}, the best that respects it.")
