"""Prior skills by lm-evaluation-harness (Gao et al. 2024, the package lm_eval), on the model that is in memory.

lm_eval is imported only when a function here is called.
"""

import contextlib
import difflib
import functools
import logging
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sdft_kernels import linear_cross_entropy
from torch import Tensor

from sdft.errors import SdftError, first_line
from sdft.model.language_model import LanguageModel
from sdft.score.batch import lay_out, micro_batches

INSTALL = "pip install '.[train,lm-eval]' in a checkout"


@dataclass(frozen=True)
class Score:
    value: float
    stderr: float | None  # over the task's items; None if lm_eval reports none


def run(
    model: LanguageModel,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    include_path: str = "",
    num_fewshot: int | None = None,
    chat: bool = False,
    allow_code: bool = False,
    batch_tokens: int = 8192,
    batch_size: int = 64,
) -> dict[str, dict[str, Score]]:
    """{task: {metric: Score}} of lm_eval's tasks; a group (mmlu) has an entry, and each of its subtasks has one.

    A metric has lm_eval's name, with the filter if the filter is not `none`: acc, acc_norm, "exact_match,strict-match".
    The same arguments give the same scores; the generators of random, numpy and torch are left as they were.

    tasks: names of tasks, groups or tags, or paths of task .yaml files. limit: takes the first items of each task only.
    include_path: a folder with further task .yaml files; their data may be local (dataset_path: json). num_fewshot:
    replaces the tasks' own number of examples. chat: puts every prompt into a user turn of the chat template.
    allow_code: runs code that the model wrote (humaneval). batch_tokens: tokens of a forward pass. batch_size: prompts
    that are completed together.

    Raises SdftError if lm_eval is missing, if a task is unknown, if its data cannot be loaded, if it needs another
    package, if it runs code and allow_code is False, or if it asks for longer completions than the model can give.
    """
    manager = check(tasks, limit, include_path)
    from lm_eval import simple_evaluate

    code = {"HF_ALLOW_CODE_EVAL": "1"} if allow_code else {}
    with _random_state_kept(model.device), _environment(code), model.evaluating(), _explained(", ".join(tasks)):
        found = simple_evaluate(
            make_lm(model, tokenizer, batch_tokens, batch_size),
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=chat,
            confirm_run_unsafe_code=allow_code,
            task_manager=manager,
            log_samples=False,
        )
    return {task: scores(values) for task, values in found["results"].items()}


@contextlib.contextmanager
def _explained(names: str) -> Iterator[None]:
    """Raises SdftError instead of lm_eval's errors about these tasks."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SdftError(f"harness {names}: needs the package {error.name}; install it and run again") from error
    except OSError as error:  # datasets and the hub raise it without network, and for a file that is not there
        raise SdftError(
            f"harness {names}: the data cannot be loaded ({type(error).__name__}: {first_line(error)}); fetch them "
            "once with network, or describe local files in a task .yaml and name its folder with include_path"
        ) from error
    except ValueError as error:
        if "confirm_run_unsafe_code" not in str(error):
            raise
        raise SdftError(
            f"harness {names}: a task runs code that the model wrote; allow it with --allow-code (allow_code=True), "
            "best in a container"
        ) from None
    except AssertionError as error:
        if "requested max tokens to generate" not in str(error):
            raise
        raise SdftError(f"harness {names}: {first_line(error)}") from None


def check(tasks: Sequence[str], limit: int | None = None, include_path: str = "") -> Any:
    """lm_eval's task manager. Raises SdftError if lm_eval is missing or a task is unknown.

    Loads no data and no model, so call it before long work.
    """
    if not tasks:
        raise SdftError("no harness tasks are named; give some, such as hellaswag,winogrande")
    if limit is not None and limit < 1:
        raise SdftError(f"limit = {limit} must be a number of items, 1 or more")
    if include_path and not os.path.isdir(include_path):
        raise SdftError(f"include_path = {include_path!r}: no such folder")
    try:
        manager = _manager(include_path)
    except ModuleNotFoundError as error:
        raise SdftError(f"lm-evaluation-harness is not installed ({error.name} is missing); run: {INSTALL}") from None
    for name in tasks:
        if name not in manager.task_index and not (name.endswith(".yaml") and os.path.isfile(name)):
            near = difflib.get_close_matches(name, manager.all_tasks, n=5)
            hint = f"near it: {', '.join(near)}" if near else "`lm-eval ls tasks` lists them all"
            raise SdftError(f"harness task {name!r} is unknown; {hint}")
    return manager


def scores(values: dict[str, Any]) -> dict[str, Score]:
    """lm_eval's {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...} -> {"acc": Score(0.5, 0.1)}."""
    out = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            stderr = values.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else key
            out[name] = Score(float(value), float(stderr) if isinstance(stderr, int | float) else None)
    return out


def pick(found: dict[str, dict[str, Score]], task: str, metric: str) -> float:
    """One metric of a task in the result of `run`. Raises SdftError if lm_eval reports no such metric."""
    if metric not in found.get(task, {}):
        there = ", ".join(found.get(task, {})) or "none"
        raise SdftError(f"harness.tasks.{task} = {metric!r}: lm_eval reports no such metric; it has: {there}")
    return found[task][metric].value


@functools.cache
def _manager(include_path: str) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path or None)  # reads some ten thousand files: once


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    import numpy

    kept = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(kept[0])
        numpy.random.set_state(kept[1])


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for key in values:
            os.environ.pop(key)
            os.environ.update({key: before[key]} if key in before else {})


# The model for lm_eval.


def make_lm(model: LanguageModel, tokenizer: Any, batch_tokens: int, batch_size: int) -> Any:
    """lm_eval's HFLM on the model in memory, with likelihoods by `log_likelihoods`.

    The likelihoods of HFLM need the logits of every token of a batch, (texts, tokens, vocabulary), in the dtype of the
    matrix products. `log_likelihoods` needs the logits of the scored tokens only, a few rows at a time, and has them in
    fp32: logits that are rounded to bf16 move a likelihood by as much as two choices differ. Tokenization, the chat
    template, generation and its stop texts are HFLM's.
    """
    from lm_eval.models.huggingface import HFLM  # the class is made here because lm_eval is optional

    class InMemory(HFLM):
        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return log_likelihoods(model, pairs, self.max_length, batch_tokens)

    with _quiet_about_the_model():
        return InMemory(
            pretrained=model.lm,
            tokenizer=tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype=None if model.compute_dtype == torch.float32 else model.compute_dtype,
        )


@contextlib.contextmanager
def _quiet_about_the_model() -> Iterator[None]:
    """A context in which HFLM does not warn that it got a model instead of a name."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel, pairs: Sequence[Pair], longest: int, batch_tokens: int = 8192
) -> list[tuple[float, bool]]:
    """For each pair: log p(continuation | context) in nats, and whether greedy decoding gives the continuation.

    A context has at least one token. longest: tokens that the model takes; a context that is too long loses its
    beginning. batch_tokens: tokens of a forward pass. Pairs that differ in their last token only (the letters of a
    multiple choice) share a forward pass. Raises SdftError for a continuation that is itself too long.
    """
    from tqdm import tqdm

    shared: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}  # input of a forward pass -> its pairs
    for i, (context, continuation) in enumerate(pairs):
        if len(continuation) > longest:
            raise SdftError(f"a text of {len(continuation)} tokens is to be scored; the model takes {longest}")
        cut = max(0, len(context) + len(continuation) - longest - 1)
        shared.setdefault((tuple(context[cut:]), tuple(continuation[:-1])), []).append(i)
    inputs = list(shared)
    sizes = [len(context) + len(rest) for context, rest in inputs]
    total = torch.zeros(len(pairs), dtype=torch.float64)
    greedy = torch.ones(len(pairs), dtype=torch.bool)
    with model.evaluating():
        for part in tqdm(micro_batches(sizes, batch_tokens, model.packed), "scoring", disable=None):
            group = [inputs[i] for i in part]
            hidden = _hidden(model, group)  # (N, H)
            rows: list[int] = []  # the row of hidden that predicts each scored token
            owners: list[int] = []  # the pair of each scored token
            start = 0
            for one in group:
                for i in shared[one]:
                    rows += range(start, start + len(pairs[i][1]))
                    owners += [i] * len(pairs[i][1])
                start += len(one[1]) + 1
            labels = [token for one in group for i in shared[one] for token in pairs[i][1]]
            logprob, top = _score(model, hidden[torch.tensor(rows, device=hidden.device)], labels)  # (P,) each
            total.index_add_(0, torch.tensor(owners), logprob)
            for i, same in zip(owners, top.tolist(), strict=True):
                greedy[i] &= same
    return list(zip(total.tolist(), greedy.tolist(), strict=True))


def _hidden(model: LanguageModel, group: Sequence[Pair]) -> Tensor:
    """(N, H): for each text, the hidden states of its last context token and of its continuation."""
    # lay_out does not run a text's last token, so one is added here.
    added = [model.pad_id]
    batch = lay_out(
        [context for context, _ in group],
        [[*rest, *added] for _, rest in group],
        model.pad_id,
        model.device,
        packed=model.packed,
    )
    return batch.select(model.hidden(batch.input_ids, batch.lengths))


def _score(model: LanguageModel, hidden: Tensor, labels: list[int]) -> tuple[Tensor, Tensor]:
    """log p of the label of each row of hidden (P, H), in float64, and whether it is the likeliest; (P,) on the CPU."""
    head = model.head()
    _, tokens = linear_cross_entropy(
        hidden.to(head.weight.dtype),
        head.weight,
        torch.tensor(labels, device=hidden.device),
        bias=head.bias,
        scale=head.scale,
        softcap=head.softcap,
        ignore_index=None,
        return_tokens=True,
    )
    return tokens.logprob.double().cpu(), tokens.top1.cpu()
