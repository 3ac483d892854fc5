"""Prior skills by lm-evaluation-harness (Gao et al. 2024, the package lm_eval), on the model that is in memory.

Nothing is loaded again: lm_eval asks for likelihoods of texts and for continuations, and gets them from the same
backbone, head, adapters and rollout that train. It is imported only by `run`.
"""

import contextlib
import difflib
import functools
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from sdft_kernels import linear_cross_entropy
from torch import Tensor

from sdft.config import RolloutConfig
from sdft.errors import SdftError, first_line
from sdft.model.loading import LanguageModel
from sdft.rollout.sampling import generate
from sdft.score.batch import lay_out, micro_batches

INSTALL = "pip install '.[train,lm-eval]' in a checkout"
DEFAULT_WINDOW = 2048  # of a model whose config states no longest sequence; lm_eval's own default
DEFAULT_NEW_TOKENS = 256  # where a task states none; lm_eval's own default


@dataclass(frozen=True)
class Score:
    value: float
    stderr: float | None  # over the task's items; None where lm_eval gives none


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
    """{task: {metric: Score}} of lm_eval's tasks; a group (mmlu) gives its own line and its subtasks'.

    A metric is named as lm_eval names it, with the filter where it is not `none`: acc, acc_norm,
    "exact_match,strict-match". Deterministic; the generators of random, numpy and torch are left as they were.

    tasks: names of tasks, groups or tags, or paths of task .yaml files. limit: items of each task, the first ones.
    include_path: a folder with further task .yaml files; their data may be local (dataset_path: json). num_fewshot:
    instead of the tasks' own. chat: every prompt as a user's turn of the chat template. allow_code: run code that the
    model wrote (humaneval). batch_tokens: of a forward pass. batch_size: prompts that generate together.

    Raises SdftError where lm_eval is missing, a task is unknown, its data are not to be had, or it needs another
    package or leave to run code.
    """
    manager = check(tasks, limit, include_path)
    from lm_eval import simple_evaluate

    names, code = ", ".join(tasks), {"HF_ALLOW_CODE_EVAL": "1"} if allow_code else {}
    with _random_state_kept(model.device), _environment(code):
        try:
            found = simple_evaluate(
                _adapter(model, tokenizer, batch_tokens, batch_size),
                tasks=list(tasks),
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=chat,
                confirm_run_unsafe_code=allow_code,
                task_manager=manager,
                log_samples=False,
            )
        except ModuleNotFoundError as error:
            raise SdftError(f"harness {names}: needs the package {error.name}; install it and run again") from error
        except OSError as error:  # what datasets and the hub raise without network, or for a file that is not there
            raise SdftError(
                f"harness {names}: the data cannot be loaded ({type(error).__name__}: {first_line(error)}); fetch them "
                "once with network, or describe local files in a task .yaml and name its folder with include_path"
            ) from error
        except ValueError as error:
            if "confirm_run_unsafe_code" not in str(error):
                raise
            raise SdftError(
                f"harness {names}: a task runs code that the model wrote; only with --allow-code (allow_code=True), "
                "and better in a container"
            ) from None
    return {task: scores(values) for task, values in found["results"].items()}


def check(tasks: Sequence[str], limit: int | None = None, include_path: str = "") -> Any:
    """lm_eval's task manager, once everything that `run` needs of the names and the package is there.

    Raises SdftError otherwise; loads no data and no model, so call it before long work.
    """
    if not tasks:
        raise SdftError("no harness tasks are named; give some, such as hellaswag,winogrande")
    if limit is not None and limit < 1:
        raise SdftError(f"limit = {limit}: it is a number of items and must be 1 or more")
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


def _adapter(model: LanguageModel, tokenizer: Any, batch_tokens: int, batch_size: int) -> Any:
    """An lm_eval model on ours; the class is made here because its base is imported here."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class InMemory(TemplateLM):
        """Texts to token ids, and lm_eval's requests to the two functions below."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self.max_length = window(model)
            self._device = model.device

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.name_or_path).replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            if add_special_tokens is None:  # as the tokenizer does by itself, but no second BOS
                bos = tokenizer.bos_token
                add_special_tokens = not (bos and string.startswith(bos))
            return list(tokenizer.encode(string, add_special_tokens=add_special_tokens))

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return str(
                tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            return log_likelihoods(model, [(context, text) for _, context, text in requests], batch_tokens)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            pairs, owners = [], []
            for i, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                for part in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                    pairs.append(make_disjoint_window(part))
                    owners.append(i)
            out = [0.0] * len(requests)
            for owner, (value, _) in zip(owners, log_likelihoods(model, pairs, batch_tokens), strict=True):
                out[owner] += value
            return out

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            out = [""] * len(requests)
            same: dict[str, list[int]] = {}  # requests with the same settings generate together
            for i, request in enumerate(requests):
                same.setdefault(repr(sorted(request.args[1].items())), []).append(i)
            for group in same.values():
                settings = dict(normalize_gen_kwargs(requests[group[0]].args[1], DEFAULT_NEW_TOKENS))
                until = [u for u in settings.pop("until") if u]
                config = sampling(settings, batch_size)
                prompts = [self.tok_encode(requests[i].args[0]) for i in group]
                for i, text in zip(group, continue_until(model, tokenizer, prompts, until, config), strict=True):
                    out[i] = text
            return out

    return InMemory()


def sampling(settings: dict[str, Any], batch_size: int) -> RolloutConfig:
    """A task's generation settings, as lm_eval normalises them, as a RolloutConfig.

    Raises SdftError for one that sdft's rollout does not have, rather than to answer another question.
    """
    rest = dict(settings)
    new, sample = rest.pop("max_gen_toks"), rest.pop("do_sample")
    temperature = rest.pop("temperature", 1.0)
    top_p, top_k = rest.pop("top_p", 1.0), rest.pop("top_k", 0)
    rest = {k: v for k, v in rest.items() if v is not None and (k, v) not in (("num_beams", 1), ("use_cache", True))}
    if rest:
        raise SdftError(f"the task's generation_kwargs ask for {rest}, which sdft's rollout does not have")
    if not sample:
        return RolloutConfig(temperature=0.0, max_new_tokens=new, batch_size=batch_size)
    return RolloutConfig(
        temperature=temperature, top_p=top_p or 1.0, top_k=top_k or 0, max_new_tokens=new, batch_size=batch_size
    )


def window(model: LanguageModel) -> int:
    """The longest sequence that the model's config allows, in tokens."""
    config = model.inner.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((int(limit) for limit in limits if limit), DEFAULT_WINDOW)


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int = 8192
) -> list[tuple[float, bool]]:
    """For each (context, continuation): log p(continuation | context) in nats, and whether greedy decoding gives it.

    Token ids; a context has one at least. Contexts that are too long for the model lose their beginning. Pairs that
    differ in their last token only (the letters of a multiple choice) share a forward pass. Logits are fp32, and those
    of a few rows exist at a time. Raises SdftError for a continuation that is itself too long.
    """
    from tqdm import tqdm

    longest = window(model)
    shared: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}  # what is run -> the pairs it serves
    for i, (context, continuation) in enumerate(pairs):
        if len(continuation) > longest:
            raise SdftError(f"a text of {len(continuation)} tokens is to be scored; the model takes {longest}")
        cut = max(0, len(context) + len(continuation) - longest - 1)
        shared.setdefault((tuple(context[cut:]), tuple(continuation[:-1])), []).append(i)
    inputs = list(shared)
    total = torch.zeros(len(pairs), dtype=torch.float64)
    greedy = torch.ones(len(pairs), dtype=torch.bool)
    with model.evaluating():
        sizes = [len(context) + len(rest) for context, rest in inputs]
        for part in tqdm(micro_batches(sizes, batch_tokens, model.packed), "scoring", disable=None):
            group = [inputs[i] for i in part]
            last = [model.pad_id]  # lay_out runs all but the last token; it stands for the ones to score
            batch = lay_out(
                [context for context, _ in group],
                [[*rest, *last] for _, rest in group],
                model.pad_id,
                model.device,
                packed=model.packed,
            )
            hidden = batch.select(model.hidden(batch.input_ids, batch.lengths))  # (N, H)
            rows: list[int] = []  # of hidden, one for each token to score
            owners: list[int] = []  # the pair that the token belongs to
            start = 0
            for one in group:
                for i in shared[one]:
                    rows += range(start, start + len(pairs[i][1]))
                    owners += [i] * len(pairs[i][1])
                start += len(one[1]) + 1
            labels = [token for one in group for i in shared[one] for token in pairs[i][1]]
            logprob, top = _score(model, hidden, rows, labels)  # (P,) each
            total.index_add_(0, torch.tensor(owners), logprob)
            for i, same in zip(owners, top.tolist(), strict=True):
                greedy[i] &= same
    return list(zip(total.tolist(), greedy.tolist(), strict=True))


def _score(model: LanguageModel, hidden: Tensor, rows: list[int], labels: list[int]) -> tuple[Tensor, Tensor]:
    """log p of each label at its row of hidden (N, H), fp64, and whether it is the most likely; (P,) on the CPU."""
    head, at = model.head(), torch.tensor(rows, device=hidden.device)
    # Products of bf16 weights have fp32 results: rounded logits would move a likelihood by as much as choices differ.
    _, tokens = linear_cross_entropy(
        hidden[at].to(head.weight.dtype),  # (P, H)
        head.weight,
        torch.tensor(labels, device=hidden.device),
        bias=head.bias,
        scale=head.scale,
        softcap=head.softcap,
        ignore_index=None,
        return_tokens=True,
    )
    return tokens.logprob.double().cpu(), tokens.top1.cpu()


def continue_until(
    model: LanguageModel, tokenizer: Any, prompts: Sequence[Sequence[int]], until: Sequence[str], config: RolloutConfig
) -> list[str]:
    """The model's continuation of each prompt, up to the first of the texts `until` and without it.

    Prompts that leave no room for config.max_new_tokens lose their beginning. Raises SdftError where there is no room
    at all.
    """
    room = window(model) - config.max_new_tokens
    if room < 1:
        raise SdftError(f"{config.max_new_tokens} new tokens are asked for; the model takes {window(model)} in all")
    # A token that holds one of the texts ends an answer by itself; texts of several tokens are cut afterwards.
    ending = [i for i, text in enumerate(_token_texts(tokenizer)) if any(u in text for u in until)]
    stopping = replace(model, stop_ids=(*model.stop_ids, *ending))
    out = []
    for completion in generate(stopping, [prompt[-room:] for prompt in prompts], config):
        ids = completion.ids[:-1] if completion.ids[-1] in model.stop_ids else completion.ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        for term in until:
            text = text.split(term)[0]
        out.append(text)
    return out


@functools.lru_cache(maxsize=1)
def _token_texts(tokenizer: Any) -> list[str]:
    return list(tokenizer.batch_decode([[i] for i in range(len(tokenizer))]))
