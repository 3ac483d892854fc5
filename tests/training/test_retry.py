"""A step that runs out of memory is repeated with less at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sdft.errors import SdftError
from sdft.planning.advice import advice_after_running_out
from sdft.training import loop
from sdft.training.metrics import read_metrics
from sdft.training.retry import ran_out_of_memory, retry_with_less

CPU = torch.device("cpu")
CPU_ERROR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."
ERRORS = [RuntimeError(CPU_ERROR), MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_what_counts_as_out_of_memory(error: Exception) -> None:
    assert ran_out_of_memory(error)


def test_a_real_failure_to_allocate_counts() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out_of_memory(error.value)
    assert not ran_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not ran_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_once_more_with_the_same_random_numbers(error: Exception, capsys: Any) -> None:
    drawn = []

    def work() -> str:
        drawn.append(torch.rand(3))
        if len(drawn) == 1:
            raise error
        return "done"

    assert retry_with_less(CPU, "step 3", work, lambda: "half of it", str) == "done"
    assert torch.equal(*drawn)
    printed = capsys.readouterr().out
    assert "step 3: out of memory (" in printed
    assert "once more with half of it." in printed


def test_other_errors_pass() -> None:
    def work() -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        retry_with_less(CPU, "x", work, str, str)


def out_of_memory_over(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Makes every forward of the student over more than `tokens` tokens fail; returns the sizes that were tried."""
    from sdft.model.language_model import LanguageModel

    own, tried = LanguageModel.hidden, []

    def hidden(self: Any, input_ids: torch.Tensor, lengths: Any = None) -> torch.Tensor:
        if torch.is_grad_enabled():
            tried.append(input_ids.numel())
            if input_ids.numel() > tokens:
                raise RuntimeError(CPU_ERROR)
        return own(self, input_ids, lengths)

    monkeypatch.setattr(LanguageModel, "hidden", hidden)
    return tried


@pytest.mark.parametrize("settings", [{}, {"lora.rank": 2, "lora.dropout": 0.3}], ids=str)
def test_the_step_is_repeated_in_halves(
    settings: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    whole = make_config(**settings | {"train.output": str(tmp_path / "whole"), "train.batch_size": 6})
    loop.train(whole)
    want = read_metrics(tmp_path / "whole")
    capsys.readouterr()
    tried = out_of_memory_over(monkeypatch, 150)
    loop.train(make_config(**settings | {"train.batch_size": 6}))
    got, printed = read_metrics(tmp_path / "run"), capsys.readouterr().out
    assert printed.count("step 1, gradients: out of memory (") == 1
    assert "out of memory" not in printed.replace("step 1, gradients: out of memory", "")  # the smaller size stays
    assert tried[0] > 150
    assert max(tried[1:]) <= 150
    assert all(line["micro_batch_tokens"] < 600 for line in got)
    if not settings:  # dropout draws for other shapes
        for one, other in zip(got, want, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
            assert one["tokens"] == other["tokens"]


def test_twice_out_of_memory_is_a_clear_error(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = out_of_memory_over(monkeypatch, 0)
    with pytest.raises(SdftError) as error:
        loop.train(make_config(), advice_after_running_out)
    assert len(tried) == 2
    for words in (
        "step 1, gradients: out of memory also in halves",
        "By `sdft plan`: ",
        "model.gradient_checkpointing = true: ",
        " less",
        "--resume",
    ):
        assert words in str(error.value)


def test_without_a_prediction_the_advice_is_general(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_over(monkeypatch, 0)
    with pytest.raises(SdftError, match=r"also in halves .*Lower train.micro_batch_tokens and rollout.batch_size; "):
        loop.train(make_config())


@pytest.mark.parametrize("error", [SdftError("cannot be simulated"), MemoryError()])
def test_a_prediction_that_fails_does_not_hide_that_memory_ran_out(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def advise(config: Any) -> str:
        raise error

    out_of_memory_over(monkeypatch, 0)
    with pytest.raises(SdftError, match=r"out of memory also in halves .*Lower train.micro_batch_tokens"):
        loop.train(make_config(), advise)


def test_rollouts_too(make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    from sdft.rollout import sampling

    own, tried = sampling.generate_batch, []

    def generate(model: Any, start: Any, head: Any, prompts: Any, config: Any) -> Any:
        tried.append(len(prompts))
        if len(prompts) > 3:
            raise MemoryError
        return own(model, start, head, prompts, config)

    monkeypatch.setattr(sampling, "generate_batch", generate)
    loop.train(make_config(**{"train.batch_size": 6, "train.steps": 2}))
    assert tried == [6, 3, 3, 3, 3]
    assert (
        "step 1, rollout: out of memory (MemoryError); once more with rollout.batch_size = 3."
        in capsys.readouterr().out
    )
    assert len(read_metrics(tmp_path / "run")) == 2
