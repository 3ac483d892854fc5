"""A study's file: which runs it asks for, and which mistakes are reported before any of them."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from sdft.cli import main
from sdft.errors import SdftError
from sdft.study.spec import cells, load_study, stage_configs


def test_settings_stack(make_study: Any, tmp_path: Path) -> None:
    """The study's, then the task's, then the method's."""
    files = {"train": str(tmp_path / "colours.jsonl"), "eval": {"test": str(tmp_path / "colours.jsonl")}}
    task = {"rollout": {"max_new_tokens": 7}, "teacher": {"turns": 3}, "optim": {"betas": [0.8, 0.9]}}
    found = load_study(
        make_study(
            tasks=[{"name": "colours", **files, "config": task}],
            methods={"m": {"rollout": {"max_new_tokens": 9}, "model": {"attention": "sdpa"}}},
        )
    )
    config = stage_configs(found, cells(found)[0], 0, "start")[0]
    assert (config.rollout.max_new_tokens, config.teacher.turns, config.train.batch_size) == (9, 3, 2)
    assert config.optim.betas == (0.8, 0.9)
    assert (config.model.name, config.model.attention) == ("start", "sdpa")
    assert config.eval.sets == {"colours-test": files["train"], "known": str(tmp_path / "known.jsonl")}


def test_a_preset_is_below_every_setting(make_study: Any) -> None:
    found = load_study(
        make_study(
            methods={
                "run": {"preset": "paper_as_run", "loss": {"mask_first": 1}},
                "plain": {"loss": {"divergence": "jsd"}},
            },
            config=tomllib.loads(make_study().read_text())["config"] | {"teacher": {"ema_alpha": 0.05}},
        )
    )
    run, plain = (stage_configs(found, cell, 0, "start")[0] for cell in cells(found)[::2][:2])
    assert (run.loss.divergence, run.loss.average, run.loss.mask_first) == ("forward_kl", "sequence", 1)
    assert (run.teacher.ema_alpha, run.train.batch_size) == (0.05, 2)
    assert (plain.loss.divergence, plain.loss.average, plain.teacher.ema_alpha) == ("jsd", "token", 0.05)
    with pytest.raises(SdftError, match=r"methods.run: preset = 'paper' is not one of 'paper_as_written'"):
        load_study(make_study(methods={"run": {"preset": "paper"}}))


def test_phases_follow_each_other(make_study: Any) -> None:
    phases = [{"loss": {"method": "sft"}}, {"loss": {"method": "sdft"}, "teacher": {"kind": "base", "model": "{base}"}}]
    found = load_study(make_study(seeds=[3], methods={"two": {"phases": phases, "learning_rates": [5e-4]}}))
    (cell,) = cells(found)
    first, second = stage_configs(found, cell, 1, "start")
    assert [c.loss.method for c in (first, second)] == ["sft", "sdft"]
    assert {(c.optim.lr, c.train.seed) for c in (first, second)} == {(5e-4, 3)}
    assert first.model.name == "start"
    assert second.model.name == str(Path(first.train.output) / "model")
    assert second.teacher.model == found.config.model.name


def test_the_grid(make_study: Any) -> None:
    """Every combination is a method; the values of a method replace the study's; the names show which."""
    methods = {
        "sdft": {"grid": {"teacher.ema_alpha": [0.01, 0.5]}},
        "sft": {"loss": {"method": "sft"}, "grid": {"train": {"batch_size": [4]}}},
    }
    found = load_study(
        make_study(seeds=[0], learning_rates=[1e-3], grid={"train": {"batch_size": [2, 3]}}, methods=methods)
    )
    assert [cell.name for cell in cells(found)] == [
        "sdft/train.batch_size-2/teacher.ema_alpha-0.01/lr-0.001/seed-0",
        "sdft/train.batch_size-2/teacher.ema_alpha-0.5/lr-0.001/seed-0",
        "sdft/train.batch_size-3/teacher.ema_alpha-0.01/lr-0.001/seed-0",
        "sdft/train.batch_size-3/teacher.ema_alpha-0.5/lr-0.001/seed-0",
        "sft/train.batch_size-4/lr-0.001/seed-0",
    ]
    configs = [stage_configs(found, cell, 0, "start")[0] for cell in cells(found)]
    values = [(c.train.batch_size, c.teacher.ema_alpha) for c in configs[:4]]
    assert values == [(2, 0.01), (2, 0.5), (3, 0.01), (3, 0.5)]
    assert configs[4].train.batch_size == 4
    assert {cell.method.family for cell in cells(found)} == {"sdft", "sft"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [0]}, r"unknown key 'seed'; valid: .*seeds"),
        ({"drift": -1}, "drift = -1 must be a number of prompts"),
        ({"seeds": [0, 0]}, r"seeds = \[0, 0\] must be a list of different whole numbers"),
        ({"seeds": [0.5]}, "must be a list of different whole numbers"),
        ({"learning_rates": []}, r"methods.sdft: learning_rates is missing"),
        ({"learning_rates": [-1e-5]}, "learning_rates must be above 0"),
        ({"tasks": []}, "tasks is missing"),
        ({"tasks": [{"name": "x", "train": "nowhere.jsonl", "eval": {"test": "nowhere.jsonl"}}]}, "nowhere.jsonl"),
        ({"tasks": [{"name": "x", "train": "y"}]}, r"tasks\[0\]: eval is missing"),
        ({"tasks": [{"name": "x", "train": "y", "eval": "z"}]}, r"eval = 'z' must name its files"),
        ({"methods": {"m": {"loss": {"metod": "sft"}}}}, r"methods.m: unknown key 'loss.metod'; did you mean"),
        ({"methods": {"m": {"phases": [{}], "loss": {}}}}, "either phases or settings, not both"),
        ({"grid": {"train": {"batch": [1, 2]}}}, r"grid: unknown key 'train.batch'"),
        ({"grid": {"train.batch_size": [2, 2]}}, r"train.batch_size = \[2, 2\] must be a list of different values"),
        ({"grid": {"train.batch_size": ["big"]}}, r"grid: train.batch_size = 'big' must be"),
        ({"grid": {"teacher.template": ["a/b"]}}, "that can name a folder"),
        ({"grid": {"optim.lr": [1e-5]}}, r"grid: the study sets optim.lr itself; give learning_rates"),
        ({"grid": {"train.batch_size": [0]}}, r"train.batch_size"),
        ({"samples": -1}, r"samples = -1 must be a number of completions of each prompt, or 0"),
        ({"drift": True}, r"drift = True must be a number of prompts, or 0"),
        ({"drift_on": 3}, r"drift_on = 3 must be a file"),
        ({"drift_on": "gone.jsonl"}, r"gone.jsonl: cannot be read"),
        ({"harness": ["mmlu"]}, r"harness = \['mmlu'\] must be a table, \[harness\]"),
        ({"harness": {"task": {"mmlu": "acc"}}}, r"harness: unknown key 'task'"),
        ({"harness": {"tasks": {"known": "acc"}}}, "'known' is an evaluation file and a task of lm_eval"),
        ({"methods": {"m": {"rollout": {"temperature": -1.0}}}}, r"rollout.temp"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_mistakes_are_reported_before_anything_runs(
    changes: Any, message: str, make_study: Any, tmp_path: Path, capsys: Any
) -> None:
    path = make_study(**changes)
    with pytest.raises(SdftError, match=message):
        load_study(path)
    with pytest.raises(SystemExit):
        main(["study", str(path)])
    assert not (tmp_path / "study").exists()


def test_unknown_methods_and_the_list(make_study: Any, capsys: Any, ran: list[str]) -> None:
    path = str(make_study())
    with pytest.raises(SystemExit):
        main(["study", path, "--only", "grpo"])
    assert "has no such method; methods: sdft, sft" in capsys.readouterr().err
    main(["study", path, "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sdft/lr-0.001/seed-0: 0 of 2 stages"
    assert len(lines) == 2 * 2 * 2
    assert ran == []
