"""The examples of the loss in other trainers' loops, run unchanged; their first steps against dense float64.

    python tests/integrations/test_examples.py EXAMPLE FILE

is one process of a distributed run, with its rank in the environment. It runs the example and saves the record to FILE.
"""

import contextlib
import copy
import functools
import importlib
import importlib.util
import io
import itertools
import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from sdft_kernels.reference import topk_divergence_reference
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).parents[2]
SELF = ("train_plain", "train_hf", "train_accelerate", "train_lightning")
EXAMPLES = (*SELF, "distill_external", "distill_topk")
EMA = {"train_plain": 0.01}
CHECKED_STEPS = 3

Weights = dict[str, Tensor]


@dataclass
class Step:
    """One optimizer step of one process."""

    weights: Weights  # the student's, when it sampled
    texts: list[tuple[list[int], list[int]]]  # prompt and completion
    grads: Weights = field(default_factory=dict)


@dataclass
class Run:
    models: list[tuple[Any, Any]]  # tokenizer, model as it was loaded; the student first
    steps: list[Step]
    losses: list[float]  # as printed


def test_a_name_that_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    with pytest.raises(
        SystemExit, match=r"no model loads \(.*\); give a hub name .* not an adapter, .* or smollm2-135m"
    ):
        importlib.import_module("common").load(str(tmp_path))


def installed(example: str) -> None:
    """Skips, or fails in CI, if Lightning is missing: the dev extra leaves it out (36 MB with its dependencies)."""
    if example == "train_lightning" and importlib.util.find_spec("lightning") is None:
        message = "pip install --no-deps lightning lightning-utilities torchmetrics"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"Lightning is not installed: {message}")


@contextlib.contextmanager
def recording(run: Run) -> Iterator[None]:
    """Records what the examples load and sample, and their gradients at each optimizer step.

    Meanwhile no gradient is clipped, because clipping hides its size. Completions are cut to different lengths: the
    tiny model hardly ever ends one, and completions of one length would hide a wrong mean.
    """
    common: Any = importlib.import_module("common")
    load, sample = common.load, common.sample
    student: list[Any] = []
    open_step: list[Step] = []
    lengths = itertools.cycle([4, 16, 7, 13] if os.environ.get("RANK") == "1" else [9, 3, 16, 11])

    def noted_load(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        tokenizer, lm = load(*args, **kwargs)
        run.models.append((tokenizer, copy.deepcopy(lm)))
        student[1:] = []
        student.append(lm)
        return tokenizer, lm

    def noted_sample(lm: Any, tokenizer: Any, prompts: list[Tensor], *args: Any) -> list[Tensor]:
        completions = [c[: next(lengths)] for c in sample(lm, tokenizer, prompts, *args)]
        if not open_step:
            open_step.append(Step({k: v.clone() for k, v in lm.state_dict().items()}, []))
        open_step[0].texts += [(p.tolist(), c.tolist()) for p, c in zip(prompts, completions, strict=True)]
        return completions

    def stepped(*_: Any) -> None:
        step = open_step.pop()  # fails if an example steps without having sampled since its last step
        step.grads = {name: p.grad.clone() for name, p in student[0].named_parameters()}
        run.steps.append(step)

    hook = register_optimizer_step_post_hook(stepped)
    unclipped = mock.Mock(side_effect=lambda parameters, *_, **__: torch.ones(()))
    with (
        mock.patch.object(common, "load", noted_load),
        mock.patch.object(common, "sample", noted_sample),
        mock.patch("torch.nn.utils.clip_grad_norm_", unclipped),
    ):
        try:
            yield
        finally:
            hook.remove()


def execute(example: str, *options: str) -> Run:
    """Runs examples/EXAMPLE.py as `python` would."""
    run, out = Run([], [], []), io.StringIO()
    path = ROOT / "examples" / f"{example}.py"
    with (
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        mock.patch.object(sys, "argv", [str(path), *options]),
        mock.patch.dict(os.environ),
        recording(run),
        contextlib.redirect_stdout(out),
    ):
        runpy.run_path(str(path), run_name="__main__")
    run.losses = [float(v) for v in re.findall(r"(?<!train_)loss'?:? '?([\d.]+|nan)", out.getvalue())]
    return run


@pytest.fixture(scope="module")
def runs() -> Iterator[Callable[[str], Run]]:
    """runs(example): the run of an example with its defaults."""

    @functools.cache
    def run(example: str) -> Run:
        installed(example)
        return execute(example)

    with without_traces():
        yield run


@contextlib.contextmanager
def without_traces() -> Iterator[None]:
    """Resets Accelerate's state, which each process has once."""
    from accelerate.state import AcceleratorState, GradientState

    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        sys.modules.pop("common", None)


def double(lm: Any, weights: Weights) -> Any:
    lm = copy.deepcopy(lm).double()
    lm.load_state_dict({k: v.double() for k, v in weights.items()})
    return lm


def logits(lm: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """(len(completion), V): the logits that predict the completion, without padding."""
    return lm(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]


def reverse_kl(s: Tensor, t: Tensor) -> Tensor:
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def context_of(tokenizer: Any) -> Callable[[list[int]], list[int]]:
    """A function from a student's prompt to the teacher's prompt, which includes the demonstration."""
    common: Any = importlib.import_module("common")

    def ids(*messages: tuple[str, str]) -> list[int]:
        chat = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]

    known = {}
    for r in common.RECORDS:
        asked = ("user", r["prompt"])
        known[tuple(ids(asked))] = ids(asked, ("assistant", r["demonstration"]), asked)
    return lambda prompt: known[tuple(prompt)]


def truth(example: str, models: list[tuple[Any, Any]], steps: list[Step], teacher: Any) -> tuple[float, Weights]:
    """The mean over all tokens of these steps (one a process) and its gradient, in float64 with every logit."""
    tokenizer, tiny = models[0]
    student = double(tiny, steps[0].weights)
    context = context_of(tokenizer) if example in SELF else lambda prompt: prompt
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for prompt, completion in (text for step in steps for text in step.texts):
        s = logits(student, prompt, completion)
        with torch.no_grad():
            t = logits(teacher, context(prompt), completion)
        if example == "distill_external":  # there are 384 tokens; both heads are longer
            total = total + reverse_kl(s[:, :384] / 0.9, t[:, :384] / 0.9)
        elif example == "distill_topk":
            top = t.log_softmax(-1).topk(16)
            total = total + topk_divergence_reference(s, top.indices, top.values, reduction="sum")
        else:
            total = total + reverse_kl(s, t)
        tokens += len(completion)
    loss = total / tokens
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters()}


def close(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        error = (found[name] - grad).norm() / grad.norm()
        assert error < 1e-4, f"the gradient of {name} is off by {error:.2%}"


@pytest.mark.parametrize("example", EXAMPLES)
def test_loss_falls(example: str, runs: Callable[[str], Run]) -> None:
    losses = runs(example).losses
    assert len(losses) >= 7
    assert sum(losses[-2:]) < 0.85 * sum(losses[:2])


@pytest.mark.parametrize("example", EXAMPLES)
def test_first_steps_are_those_of_dense_float64(example: str, runs: Callable[[str], Run]) -> None:
    run = runs(example)
    external = example not in SELF
    teacher = copy.deepcopy(run.models[1 if external else 0][1]).double()
    for number, step in enumerate(run.steps[:CHECKED_STEPS]):
        for old, new in zip(teacher.state_dict().values(), step.weights.values() if not external else (), strict=False):
            old.lerp_(new.double(), EMA.get(example, 0.0))
        loss, grads = truth(example, run.models, [step], teacher)
        if number == 0:
            assert run.losses[0] == pytest.approx(loss, rel=1e-3)  # Trainer prints four digits
        close(step.grads, grads)


@pytest.mark.slow
@pytest.mark.parametrize("example", ["train_hf", "train_accelerate", "train_lightning"])
def test_two_processes_step_as_one(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process has the gradient of the mean over the tokens of both, which have different numbers of tokens."""
    installed(example)
    monkeypatch.syspath_prepend(ROOT / "examples")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    world |= {"ACCELERATE_USE_CPU": "true"}  # without a GPU and this, Accelerate forms no group
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, example, str(tmp_path / str(rank))],
            env=os.environ | world | {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [p.wait(timeout=300) for p in processes] == [0, 0]
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    assert [len(rank["steps"]) for rank in ranks] == [2, 2]
    models = [importlib.import_module("common").load(None)]  # as each process made it
    teacher = copy.deepcopy(models[0][1]).double()
    for number in range(2):
        steps = [Step(**rank["steps"][number]) for rank in ranks]
        tokens = [sum(len(completion) for _, completion in step.texts) for step in steps]
        loss, grads = truth(example, models, steps, teacher)
        if number == 0:
            assert tokens[0] != tokens[1]
            assert ranks[0]["losses"][0] == pytest.approx(loss, rel=1e-3)
        for step in steps:
            close(step.grads, grads)
    assert ranks[1]["losses"] == []


@pytest.mark.parametrize(
    ("example", "models"), [("train_plain", ["llama-tied"]), ("distill_external", ["gpt2", "qwen3"])]
)
def test_takes_models_from_folders(example: str, models: list[str], model_folder: Callable[[str], Path]) -> None:
    named = [f"--{role}={model_folder(kind)}" for role, kind in zip(("model", "teacher"), models, strict=False)]
    with without_traces():
        run = execute(example, *named, "--steps", "1", "--max-new-tokens", "4")
    assert run.losses[0] > 0


def test_refuses_a_head_that_is_more_than_a_matrix(model_folder: Callable[[str], Path]) -> None:
    with without_traces(), pytest.raises(SystemExit, match="softcap="):
        execute("train_plain", "--model", str(model_folder("gemma3")))


def test_a_completion_ends_with_its_end_token() -> None:
    """Two texts, one of which ends early. Rows mark the position before each completion token, and no padding."""
    with mock.patch.object(sys, "path", [str(ROOT / "examples"), *sys.path]), without_traces():
        common: Any = importlib.import_module("common")
        tokenizer, lm = common.load(None)
        end = tokenizer.eos_token_id
        made = torch.tensor([[0, 5, 6, 7, end, end], [5, 6, 8, end, 9, end]])  # a prompt of 1 and of 2 tokens
        prompts = [torch.tensor([5]), torch.tensor([5, 6])]
        with mock.patch.object(type(lm), "generate", return_value=made) as generate:
            completions = common.sample(lm, tokenizer, prompts, 4)
        assert generate.call_args.args[0].tolist() == [[0, 5], [5, 6]]
        assert generate.call_args.kwargs["attention_mask"].tolist() == [[0, 1], [1, 1]]
        assert [c.tolist() for c in completions] == [[6, 7, end], [8, end]]
        ids, rows = common.join(prompts, completions)
        assert ids.tolist() == [[5, 6, 7, end], [5, 6, 8, end]]
        assert rows.tolist() == [[True, True, True, False], [False, True, True, False]]


@pytest.mark.parametrize("example", EXAMPLES)
def test_is_short(example: str) -> None:
    assert len((ROOT / "examples" / f"{example}.py").read_text().splitlines()) < 60


def main(example: str, file: str) -> None:
    sys.path.append(str(ROOT / "tests"))
    from ranks import check_threads

    if example == "train_lightning":  # two CPU processes in place of `devices="auto"`
        import lightning

        lightning.Trainer = functools.partial(lightning.Trainer, accelerator="cpu", devices=2)
    run = execute(example, "--steps", "2")
    assert not torch.distributed.is_initialized(), "the example leaves its process group to the end of Python"
    check_threads()
    torch.save({"steps": [vars(step) for step in run.steps], "losses": run.losses}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
