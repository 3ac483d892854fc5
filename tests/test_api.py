"""`from sdft import ...`: each function on the tiny model, its result, and its errors."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import sdft
from sdft import SdftError, api
from sdft.config import free_on_resume

ROOT = Path(__file__).parents[1]


def test_train(make_config: Callable[..., Any], skill: Path) -> None:
    result = sdft.train(make_config(**{"train.steps": 2, "eval.sets": {"new": str(skill)}, "eval.every": 1}))
    assert (result.model / "config.json").exists()
    assert result.model.parent == result.output
    assert [line["step"] for line in result.metrics() if "loss" in line] == [1, 2]
    assert {step: set(found) for step, found in result.evaluations().items()} == {n: {"new"} for n in (0, 1, 2)}
    assert sdft.generate(result.model, "say ab", max_new_tokens=2)[0].prompt == "say ab"


def test_check(make_config: Callable[..., Any], tmp_path: Path) -> None:
    found = sdft.check(make_config(**{"eval.max_new_tokens": 2}), count=5)
    asked = [answer.prompt for answer in found.student.answers]
    assert asked == [answer.prompt for answer in found.teacher.answers]
    assert len(set(asked)) == 5
    assert asked[-1] in ("say qr", "say st", "say uv", "say wx")  # from all of the data, not its start
    assert found.uplift == found.teacher.accuracy - found.student.accuracy == 0
    assert not found.works
    assert found.verdict.startswith("No: the teacher hardly uses the demonstration")
    assert not (tmp_path / "run").exists()


def test_plan(make_config: Callable[..., Any]) -> None:
    small, large = (sdft.plan(make_config(), memory, prompt_tokens=8) for memory in (1, "64GB"))
    assert large.fits
    assert not small.fits
    assert large.advice == ()
    assert small.advice
    assert large.peak == max(map(large.plan.total, large.plan.phases)) > 0
    assert "it fits" in large.verdict


def test_evaluate(make_config: Callable[..., Any], model_folder: Any, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": "say", "answer": answer, "check": "regex"} for answer in ("(?s)^.{0,3}$", "(?s).*", "(?!)")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = sdft.evaluate(model_folder("llama"), data, max_new_tokens=4)
    assert [answer.correct for answer in found.greedy.answers][1:] == [True, False]
    assert found.accuracy in (1 / 3, 2 / 3)
    assert found.samples is None
    model = sdft.load_model(model_folder("llama"))
    one, other = (sdft.evaluate(model, data, max_new_tokens=4, samples=4, seed=seed) for seed in (0, 0))
    assert one == other
    assert one.greedy == found.greedy
    assert one.samples is not None
    assert one.samples.correct[1:] == (4, 0)


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_loading_prints_nothing(model_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    for shown in (not before, before):
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        sdft.load_model(model_folder("llama"))
        assert logging.is_progress_bar_enabled() == shown  # as it was
    assert capsys.readouterr() == ("", "")


def test_generate(model_folder: Any) -> None:
    model = sdft.load_model(model_folder("llama"))
    state = torch.get_rng_state()

    def texts(**options: Any) -> list[str]:
        return [g.text for g in sdft.generate(model, ["say ab", "say cd"], max_new_tokens=6, **options)]

    assert texts() == texts(seed=1) != texts(system="be brief")  # greedy
    assert texts(temperature=1.0) == texts(temperature=1.0) != texts(temperature=1.0, seed=1)
    one, two = texts()
    assert texts(count=2) == [one, one, two, two]
    assert torch.equal(torch.get_rng_state(), state)
    assert [g.truncated for g in sdft.generate(model, "say ab", max_new_tokens=1)] == [True]


def test_errors_are_sdft_errors(make_config: Callable[..., Any], model_folder: Any, skill: Path) -> None:
    config, model = make_config(), model_folder("llama")
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: sdft.train(make_config(**{"data.train": ""})), "data.train = '' is missing"),
        (lambda: sdft.train(make_config(**{"model.name": "/no/model"})), "no such folder"),
        (lambda: sdft.check(config, count=0), "count = 0 must be a whole number of at least 1"),
        (lambda: sdft.check(make_config(**{"data.train": "none.jsonl"})), "cannot be read"),
        (lambda: sdft.plan(config, "many"), "memory = 'many' (--memory) is not a size"),
        (lambda: sdft.plan(config, prompt_tokens=-1), "prompt_tokens = -1 must be"),
        (lambda: sdft.evaluate("/no/model", skill), "no such folder"),
        (lambda: sdft.evaluate(model, "none.jsonl"), "cannot be read"),
        (lambda: sdft.evaluate(model, [{"prompt": "p"}]), "data must be the path of a .jsonl file"),  # type: ignore[arg-type]
        (lambda: sdft.evaluate(api.TrainResult(skill, model), skill), "is result.model"),  # type: ignore[arg-type]
        (lambda: sdft.generate(model, []), "prompts = [] holds no prompt"),
        (lambda: sdft.evaluate(model, skill, samples=2, temperature=0.0), "it must be above 0 to sample"),
        (lambda: sdft.evaluate(model, skill, max_new_tokens=0), "max_new_tokens = 0 must be at least 1"),
        (lambda: sdft.evaluate_harness(model, []), "no harness tasks are named"),
        (lambda: sdft.generate(model, "hi", top_p=2.0), "top_p = 2.0 must be above 0 and at most 1"),
        (lambda: sdft.generate(model, "hi", count=0), "count = 0 must be"),
        (lambda: sdft.load_config("none.toml"), "cannot be read"),
        (lambda: sdft.override(config, {"optim.lr": -1.0}), "optim.lr = -1.0 must be above 0"),
    ]
    for call, words in calls:
        with pytest.raises(SdftError, match=re.escape(words)):
            call()


def test_an_import_is_light_and_complete() -> None:
    code = (
        "import sys, sdft; light = 'torch' not in sys.modules and 'pydantic' not in sys.modules\n"
        "from sdft import *; print(light, sorted(sdft.__all__) == dir(sdft), train.__module__, Config.__module__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "True", "sdft.api", "sdft.config.sections"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sdft.nothing


def public() -> dict[str, Any]:
    return {name: getattr(sdft, name) for name in sdft.__all__} | {name: getattr(api, name) for name in api.__all__}


def test_results_are_typed() -> None:
    """Every function has a result type, and no public type is Any; results are frozen."""
    for name, thing in public().items():
        if isinstance(thing, type) and not issubclass(thing, Exception):
            assert dataclasses.is_dataclass(thing), name
            with pytest.raises(dataclasses.FrozenInstanceError):
                object.__new__(thing).x = 1  # type: ignore[attr-defined]
        elif callable(thing) and not isinstance(thing, type):
            hints = get_type_hints(thing)
            assert "return" in hints, name
            assert Any not in hints.values(), name


def test_the_page_describes_everything_public() -> None:
    page = (ROOT / "docs/api.md").read_text()
    for name in public():
        assert f"`{name}" in page or f"`sdft.{name}" in page, name


def test_the_page_lists_the_settings_that_may_change_at_a_resume() -> None:
    section = (ROOT / "docs/api.md").read_text().partition("may change at a resume")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+\.\w+)`", section)) == free_on_resume()


def test_the_examples_of_the_page_are_valid() -> None:
    page = (ROOT / "docs/api.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "sdft":
                assert {alias.name for alias in node.names} <= set(sdft.__all__)
