"""The loop: step -> metrics -> evaluation -> checkpoint, from the first step or a checkpoint to the finished model."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from sdft import files, parallel
from sdft.config import Config, describe, to_toml, validate
from sdft.device import limit_caches
from sdft.training import checkpoint, guard
from sdft.training.completions import sample_before_training
from sdft.training.finish import finish
from sdft.training.metrics import MetricsLog, ProgressBar
from sdft.training.resume import resume, save, set_aside, starting_point
from sdft.training.run import Run, general_advice
from sdft.training.setup import prepare_output, set_up
from sdft.training.step import NonFiniteError, train_step


def train(config: Config, advise: Callable[[Config], str] = general_advice) -> Path:
    """Runs or resumes a training run; returns the folder of the finished model.

    advise: what to change in a config that ran out of memory, in words. Raises SdftError for anything the user can
    put right, before long work starts if that can be known then; KeyboardInterrupt after Ctrl-C, with a checkpoint
    written.
    """
    validate(config)
    parallel.report(describe(config))
    limit_caches()
    output = Path(config.train.output)
    prepare_output(config, output)
    with files.locked(output):
        return train_in(output, config, advise)


def train_in(output: Path, config: Config, advise: Callable[[Config], str] = general_advice) -> Path:
    """`train` in a folder that no other process uses."""
    start_from = starting_point(config, output)
    run = set_up(config, output, advise)
    if start_from is None:
        files.write_text(output / "config.toml", to_toml(config))  # only now: a config refused above is not a run
    sampled = sample_before_training(run, output) if run.config.method.completions == "offline" else {}
    step = 0
    if start_from is not None:
        step = resume(run, *start_from)
        if config.train.resume_step:
            set_aside(output, step)
        guard.forget_best(run, output)
        files.write_text(output / "config.toml", to_toml(config))
    log = MetricsLog(output, step, config.train.trackers, asdict(config))
    bar = ProgressBar(step, run.steps)
    try:
        if sampled and step == 0:
            log.write({"step": 0, **sampled})
        train_steps(run, step, output, log, bar)
        if run.stopped:
            guard.back_to_best(run, output, bar.say)
        folder = finish(run, output)
    finally:
        bar.close()
        log.close()
    parallel.report(f"Model: {folder}")
    if run.best and config.train.keep_best:
        best = checkpoint.checkpoint_folder(output, run.best.step)
        parallel.report(f"Best {guard.describe_best(run.best)}: {best}")
    return folder


def train_steps(run: Run, step: int, output: Path, log: MetricsLog, bar: ProgressBar) -> None:
    """All steps after the first `step`, or until eval.guard stops the run; the last one's checkpoint is written.

    Raises KeyboardInterrupt after Ctrl-C, with a checkpoint written.
    """
    config, warned = run.config, False

    def evaluate(step: int) -> None:
        log.write(guard.evaluate(run, step, output))
        bar.say(f"step {step}: " + "  ".join(f"{name} {value:.1%}" for name, value in run.result.items()))

    with interrupt_after_step() as interrupted:
        if step == 0 and config.eval.every:
            evaluate(0)
        while step < run.steps and not run.stopped:
            try:
                line = train_step(run, step, output)
            except NonFiniteError:
                if step:
                    save(run, step, log, output)  # the weights are those of the step before
                raise
            step += 1
            log.write({"step": step, **line})
            bar.update(step, line)
            if not warned and (warning := warn_of_cut_off(step, line, config)):
                bar.say(warning)
                warned = True
            better = False
            if config.eval.every and (step % config.eval.every == 0 or step == run.steps):
                evaluate(step)
                better = guard.is_best(run, step)
            stop = parallel.any_rank(interrupted(), run.model.device)
            if stop or better or (config.train.save_every and step % config.train.save_every == 0):
                save(run, step, log, output)
            if stop and step < run.steps:
                bar.say(f"Stopped after step {step}; saved. Continue with train.resume = true (--resume).")
                raise KeyboardInterrupt
    save(run, step, log, output)


def warn_of_cut_off(step: int, line: dict[str, Any], config: Config) -> str:
    """A warning if more than half of the completions of a step were cut off, else nothing. line: its metrics."""
    if line["truncated"] <= 0.5:
        return ""
    return (
        f"Warning: in step {step}, {line['truncated']:.0%} of the completions are cut off at rollout.max_new_tokens = "
        f"{config.rollout.max_new_tokens}; what comes after that is not trained. Raise rollout.max_new_tokens."
    )


@contextlib.contextmanager
def interrupt_after_step() -> Iterator[Callable[[], bool]]:
    """Lets a step finish after Ctrl-C or SIGTERM; a second one stops at once. Yields: whether one has come."""
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        parallel.report("\nStopping after this step (once more to stop at once) ...")

    try:
        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are someone else's
        yield lambda: False
        return
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
