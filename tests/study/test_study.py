"""`sdft study` on a tiny model: what runs, in which order, from which weights, and what is never run twice."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from sdft import files
from sdft.cli import main
from sdft.config import override
from sdft.errors import SdftError
from sdft.evaluation import accuracy, harness, pass_at_k
from sdft.model import flops
from sdft.planning import plan
from sdft.study import report, study
from sdft.training import loop


@pytest.fixture
def make_study(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """make_study(**changes) is the path of a study of two tasks, two methods, two learning rates and two seeds."""

    def make(**changes: Any) -> Path:
        for name, answer in (("colours", "red"), ("sizes", "big"), ("known", "yes")):
            rows = [{"prompt": f"{name} {i}?", "demonstration": answer} for i in range(6)]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        table = {
            "output": str(tmp_path / "study"),
            "seeds": [0, 1],
            "learning_rates": [1e-3, 2e-3],
            "config": {
                "model": {"name": str(model_folder("llama")), "compute_dtype": "float32"},
                "rollout": {"max_new_tokens": 4},
                "eval": {"max_new_tokens": 4},
                "train": {"steps": 2, "batch_size": 2},
            },
            "tasks": [
                {"name": n, "train": str(tmp_path / f"{n}.jsonl"), "eval": {"test": str(tmp_path / f"{n}.jsonl")}}
                for n in ("colours", "sizes")
            ],
            "prior": {"known": str(tmp_path / "known.jsonl")},
            "methods": {"sdft": {"loss": {"method": "sdft"}}, "sft": {"loss": {"method": "sft"}}},
        } | changes
        path = tmp_path / "study.toml"
        path.write_text(tomli_w.dumps(table))
        return path

    return make


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configs that were trained, in order."""
    own, configs = loop.train, []

    def watched(config: Any, *args: Any) -> Path:
        configs.append(config)
        return own(config, *args)

    monkeypatch.setattr(loop, "train", watched)
    return configs


def test_every_stage_is_evaluated_on_everything(
    make_study: Any, trained: list[Any], capsys: Any, tmp_path: Path
) -> None:
    path = str(make_study(seeds=[0], learning_rates=[1e-3]))
    main(["study", path])
    out = capsys.readouterr().out
    found = study.load_study(path)
    got = study.results(found)
    assert [cell.name for cell, _ in got] == ["sdft/lr-0.001/seed-0", "sft/lr-0.001/seed-0"]
    for _, stages in got:
        assert [s["task"] for s in stages] == ["colours", "sizes"]
        assert all(set(s["accuracy"]) == {"colours-test", "sizes-test", "known"} for s in stages)
        assert all(s["tokens"] > 0 and s["flops"] > 0 and s["seconds"]["train"] > 0 for s in stages)
    assert [c.loss.method for c in trained] == ["sdft", "sdft", "sft", "sft"]
    assert "stage 4 of 4, about 0 min left" in out
    assert "| before | | |" in out
    assert (tmp_path / "study/table.md").read_text() in out
    answers = (tmp_path / "study/sdft/lr-0.001/seed-0/2-sizes/answers/known.jsonl").read_text().splitlines()
    assert len(answers) == 6
    assert set(json.loads(answers[0])) >= {"prompt", "expected", "given", "correct"}


def test_the_distance_from_the_base_is_measured(make_study: Any, tmp_path: Path) -> None:
    """Along the stage's own answers; a model that was hardly moved is nearer than one that was."""
    drifts = {}
    for rate in (1e-6, 3e-2):
        output = str(tmp_path / f"study-{rate}")
        found = study.load_study(make_study(seeds=[0], learning_rates=[rate], output=output, drift=4))
        study.run_study(found, ["sft"])
        drifts[rate] = [stage["drift"] for _, stages in study.results(found) for stage in stages]
    for near, far in zip(drifts[1e-6], drifts[3e-2], strict=True):
        assert set(near) == set(far) == {"new", "prior"}
        for kind in near:
            assert -1e-6 <= near[kind]["kl_to_base"] < 0.1 * far[kind]["kl_to_base"]
            assert near[kind]["answer_tokens"] <= 4
    none = study.load_study(make_study(seeds=[0], learning_rates=[1e-3], drift=0))
    study.run_study(none, ["sft"])
    assert [stage["drift"] for _, stages in study.results(none) for stage in stages] == [{}, {}]


def test_the_distance_along_unrelated_prompts(make_study: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """drift_on takes the place of the prior skills' records, also where there are none."""
    one: dict[str, Any] = {"seeds": [0], "learning_rates": [1e-2], "methods": {"sft": {"loss": {"method": "sft"}}}}
    asked, own = [], accuracy.student_prompts

    def watched(tokenizer: Any, examples: Any, system: str) -> Any:
        asked.append(examples[0].messages[-1]["content"])
        return own(tokenizer, examples, system)

    monkeypatch.setattr(accuracy, "student_prompts", watched)
    path = make_study(prior={}, drift_on=str(tmp_path / "known.jsonl"), drift=4, **one)
    found = study.load_study(path)
    study.run_study(found)
    drifts = [stage["drift"] for _, stages in study.results(found) for stage in stages]
    assert [set(drift) for drift in drifts] == [{"new", "prior"}] * 2
    assert asked.count("known 0?") == 2  # it is not evaluated on, no prior skill
    assert "prompts of nothing learned" in report.write_report(found).read_text()
    with pytest.raises(SdftError, match=r"gone.jsonl: cannot be read"):
        study.load_study(make_study(drift_on=str(tmp_path / "gone.jsonl")))


def test_pass_at_k_of_every_stage(make_study: Any, monkeypatch: Any, capsys: Any) -> None:
    """Of the tasks' accuracy sets, the base's too, by pass_at_k.sample_answers of the stage's own weights."""
    one: dict[str, Any] = {"seeds": [0], "learning_rates": [1e-2], "methods": {"sft": {"loss": {"method": "sft"}}}}
    drawn = []

    def sample(model: Any, tokenizer: Any, examples: Any, prompts: Any, n: int, sampling: Any) -> Any:
        drawn.append((examples[0].messages[-1]["content"], len(prompts), n, sampling.temperature))
        return pass_at_k.Samples(n, (len(drawn) % 4, 0, 0, 0, 0, 0))

    monkeypatch.setattr(pass_at_k, "sample_answers", sample)
    found = study.load_study(make_study(samples=3, **one))
    study.run_study(found)
    assert drawn == [("colours 0?", 6, 3, 1.0), ("sizes 0?", 6, 3, 1.0)] * 3
    (_, (first, last)), base = study.results(found)[0], study.base_result(found)
    assert base["pass_at"]["colours-test"] == pytest.approx({"1": 1 / 18, "2": 2 / 18, "3": 1 / 6})
    assert first["pass_at"]["colours-test"] == pytest.approx({"1": 1 / 6, "2": 1 / 6, "3": 1 / 6})  # 3 of 3 right
    assert last["pass_at"]["sizes-test"] == pytest.approx({"1": 2 / 18, "2": 1 / 6, "3": 1 / 6})
    told = report.write_report(found).read_text()
    assert "| method | learning rate | seeds | pass@1 | pass@2 | pass@3 |" in told
    assert "| base |  |  | 5.6 | 11.1 | 16.7 |" in told
    assert "| sft | 0.01 | 1 | 11.1 | 16.7 | 16.7 |" in told
    assert "pass@3 16.7%" in capsys.readouterr().out


def test_a_stage_starts_from_the_weights_of_the_one_before(make_study: Any, trained: list[Any], tmp_path: Path) -> None:
    found = study.load_study(make_study(seeds=[0], learning_rates=[1e-3], keep_weights=True))
    study.run_study(found)
    assert [Path(c.model.name).parts[-3:] for c in trained[1::2]] == [("1-colours", "run", "model")] * 2
    for config in trained[1::2]:
        before = load_file(Path(config.model.name) / "model.safetensors")
        after = load_file(Path(config.train.output) / "model/model.safetensors")
        start = load_file(Path(found.config.model.name) / "model.safetensors")
        assert any((before[k] != start[k]).any() for k in before)
        moved = sum((after[k] - before[k]).norm() ** 2 for k in before)
        assert 0 < moved < sum((after[k] - start[k]).norm() ** 2 for k in before)


def test_phases_follow_each_other(make_study: Any, trained: list[Any], model_folder: Any) -> None:
    phases = [{"loss": {"method": "sft"}}, {"loss": {"method": "sdft"}, "teacher": {"kind": "base"}}]
    found = study.load_study(
        make_study(seeds=[3], learning_rates=[1e-3], methods={"two": {"phases": phases, "learning_rates": [5e-4]}})
    )
    study.run_study(found)
    assert [c.loss.method for c in trained] == ["sft", "sdft"] * 2
    assert {c.optim.lr for c in trained} == {5e-4}
    assert {c.train.seed for c in trained} == {3}
    starts = [c.model.name for c in trained]
    assert starts[0] == str(model_folder("llama"))
    assert starts[1:] == [str(Path(c.train.output) / "model") for c in trained[:-1]]


def test_settings_stack(make_study: Any, tmp_path: Path) -> None:
    """The study's, then the task's, then the method's."""
    files = {"train": str(tmp_path / "colours.jsonl"), "eval": {"test": str(tmp_path / "colours.jsonl")}}
    task = {"rollout": {"max_new_tokens": 7}, "teacher": {"turns": 3}, "optim": {"betas": [0.8, 0.9]}}
    found = study.load_study(
        make_study(
            tasks=[{"name": "colours", **files, "config": task}],
            methods={"m": {"rollout": {"max_new_tokens": 9}, "model": {"attention": "sdpa"}}},
        )
    )
    config = study.stage_configs(found, study.cells(found)[0], 0, "start")[0]
    assert (config.rollout.max_new_tokens, config.teacher.turns, config.train.batch_size) == (9, 3, 2)
    assert config.optim.betas == (0.8, 0.9)
    assert (config.model.name, config.model.attention) == ("start", "sdpa")
    assert config.eval.sets == {"colours-test": files["train"], "known": str(tmp_path / "known.jsonl")}


def test_a_preset_is_below_everything_that_is_said(make_study: Any) -> None:
    found = study.load_study(
        make_study(
            methods={
                "run": {"preset": "paper_as_run", "loss": {"mask_first": 1}},
                "plain": {"loss": {"divergence": "jsd"}},
            },
            config=tomllib.loads(make_study().read_text())["config"] | {"teacher": {"ema_alpha": 0.05}},
        )
    )
    run, plain = (study.stage_configs(found, cell, 0, "start")[0] for cell in study.cells(found)[::2][:2])
    assert (run.loss.divergence, run.loss.average, run.loss.mask_first) == ("forward_kl", "sequence", 1)
    assert (run.teacher.ema_alpha, run.train.batch_size) == (0.05, 2)
    assert (plain.loss.divergence, plain.loss.average, plain.teacher.ema_alpha) == ("jsd", "token", 0.05)
    with pytest.raises(SdftError, match=r"methods.run: preset = 'paper' is not one of 'paper_as_written'"):
        study.load_study(make_study(methods={"run": {"preset": "paper"}}))


def test_the_grid(make_study: Any, tmp_path: Path) -> None:
    """Its product is run, a method's own values take the place of the study's, and the names say which."""
    methods = {
        "sdft": {"grid": {"teacher.ema_alpha": [0.01, 0.5]}},
        "sft": {"loss": {"method": "sft"}, "grid": {"train": {"batch_size": [4]}}},
    }
    found = study.load_study(
        make_study(
            seeds=[0], learning_rates=[1e-3], keep_weights=True, grid={"train": {"batch_size": [2, 3]}}, methods=methods
        )
    )
    assert [cell.name for cell in study.cells(found)] == [
        "sdft/train.batch_size-2/teacher.ema_alpha-0.01/lr-0.001/seed-0",
        "sdft/train.batch_size-2/teacher.ema_alpha-0.5/lr-0.001/seed-0",
        "sdft/train.batch_size-3/teacher.ema_alpha-0.01/lr-0.001/seed-0",
        "sdft/train.batch_size-3/teacher.ema_alpha-0.5/lr-0.001/seed-0",
        "sft/train.batch_size-4/lr-0.001/seed-0",
    ]
    configs = [study.stage_configs(found, cell, 0, "start")[0] for cell in study.cells(found)]
    assert [(c.train.batch_size, c.teacher.ema_alpha) for c in configs[:4]] == [
        (2, 0.01),
        (2, 0.5),
        (3, 0.01),
        (3, 0.5),
    ]
    assert configs[4].train.batch_size == 4
    study.run_study(found)
    result = json.loads((tmp_path / "study" / study.cells(found)[1].name / "1-colours/result.json").read_text())
    assert result["grid"] == {"train.batch_size": 2, "teacher.ema_alpha": 0.5}
    lines = study.table(found).splitlines()
    assert [line.split(" | ")[0] for line in lines[3:]] == [f"| {method.name}" for method in found.methods]
    assert len({line.count("|") for line in lines}) == 1
    assert len(study.run_study(found, ["sdft"])) == 5  # a method's name in the file stands for all of its points
    assert "sdft/train.batch_size-3/teacher.ema_alpha-0.5" in report.write_report(found).read_text().replace("\\", "")


def test_prior_skills_by_lm_eval(make_study: Any, tmp_path: Path, monkeypatch: Any) -> None:
    asked = []

    def run(model: Any, tokenizer: Any, tasks: list[str], **options: Any) -> Any:
        asked.append((tasks, options))
        score = abs(float(sum(p.detach().double().sum() for p in model.lm.parameters()))) % 1  # of these weights
        return {task: {"acc": harness.Score(score, 0.1), "acc_norm": harness.Score(0.0, None)} for task in tasks}

    monkeypatch.setattr(harness, "run", run)
    monkeypatch.setattr(harness, "check", lambda *args: None)  # the extra lm-eval need not be installed here
    given = {"tasks": {"hellaswag": "acc"}, "limit": 8, "chat": True}
    changes: dict[str, Any] = {"seeds": [0], "learning_rates": [1e-3], "methods": {"sft": {"loss": {"method": "sft"}}}}
    path = make_study(harness=given, **changes)
    found = study.load_study(path)
    study.run_study(found)
    assert [tasks for tasks, _ in asked] == [["hellaswag"]] * 4
    assert [options["limit"] for _, options in asked] == [1, 8, 8, 8]  # first one item of each, to see that they run
    assert asked[1][1] == {
        "limit": 8, "include_path": "", "chat": True, "allow_code": False, "num_fewshot": None, "batch_size": 64
    }  # fmt: skip
    base = json.loads((tmp_path / "study/base/result.json").read_text())["accuracy"]
    after = [stage["accuracy"]["hellaswag"] for stage in study.results(found)[0][1]]
    assert len({base["hellaswag"], *after}) == 3
    scores = json.loads((tmp_path / "study/base/answers/harness.json").read_text())
    assert scores["hellaswag"]["acc"] == {"value": base["hellaswag"], "stderr": 0.1}
    assert "| hellaswag |" in study.table(found)
    assert "hellaswag" in report.write_report(found).read_text()
    with pytest.raises(SdftError, match=r"base/result.json is of another harness"):
        study.run_study(study.load_study(make_study(harness=given | {"limit": 9}, **changes)))
    other = make_study(harness={"tasks": {"mmlu": "f1"}}, output=str(tmp_path / "other"), **changes)
    asked.clear()
    monkeypatch.setattr(accuracy, "evaluate", None)  # nothing is generated before that is told
    with pytest.raises(SdftError, match=r"harness.tasks.mmlu = 'f1': .* it has: acc, acc_norm"):
        study.run_study(study.load_study(other))
    assert [options["limit"] for _, options in asked] == [1]


def test_finished_stages_are_never_run_again(make_study: Any, trained: list[Any], monkeypatch: Any) -> None:
    found = study.load_study(make_study(seeds=[0], learning_rates=[1e-3]))
    own, calls = study.evaluate_on_all, []

    def broken(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:  # the base, the first stage, and now the second
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(study, "evaluate_on_all", broken)
    with pytest.raises(KeyboardInterrupt):
        study.run_study(found)
    assert len(trained) == 2
    study.run_study(found)
    assert len(trained) == 4  # the second stage's run was finished, its evaluation was not
    study.run_study(found)
    assert len(trained) == 4
    assert len(study.run_study(found, ["sft"])) == 2


def test_a_cell_that_fails_does_not_end_the_study(
    make_study: Any, trained: list[Any], monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    """Its error is kept, listed and reported; it is not run again until failed.json is deleted."""
    path = make_study(seeds=[0], learning_rates=[1e-3, 2e-3], methods={"sft": {"loss": {"method": "sft"}}})
    found, step = study.load_study(path), loop.train_step

    def broken(run: Any, *args: Any, **kwargs: Any) -> Any:
        if run.config.optim.lr == 1e-3 and "2-sizes" in run.config.train.output:
            with torch.no_grad():
                next(run.model.lm.parameters()).fill_(float("nan"))
        return step(run, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", broken)
    low, high = study.cells(found)
    assert study.run_study(found) == [high]
    assert len(trained) == 4
    assert f"{low.name} ends here, the study goes on: step 1: loss nan" in capsys.readouterr().out
    kept = found.output / low.name / "2-sizes/failed.json"
    assert "loss nan" in json.loads(kept.read_text())["error"]
    main(["study", str(path), "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].startswith(f"{low.name}: 1 of 2 stages; step 1: loss nan")
    assert listed[0].endswith(f"(delete {kept} to run it again)")
    assert listed[1] == f"{high.name}: 2 of 2 stages"
    told = report.write_report(found).read_text()
    assert "1 of 2 cells are finished" in told
    assert "1 of 2 stages; step 1: loss nan" in told
    assert study.run_study(found) == [high]
    assert len(trained) == 4
    monkeypatch.setattr(loop, "train_step", step)
    kept.unlink()
    assert study.run_study(found) == [low, high]
    assert len(trained) == 5


def test_two_processes_share_the_cells(make_study: Any, trained: list[Any], capsys: Any) -> None:
    found = study.load_study(make_study(learning_rates=[1e-3]))
    first = study.cells(found)[0]
    (found.output / first.name).mkdir(parents=True)
    with files.lock(found.output / first.name) as mine:  # as the other process would have it
        assert mine
        done = study.run_study(found)
        assert done == study.cells(found)[1:]
        assert len(trained) == 6
        assert f"== {first.name}: another process is at it" in capsys.readouterr().out
    assert study.run_study(found) == study.cells(found)
    assert len(trained) == 8


@pytest.mark.slow
def test_two_processes_at_once_train_every_stage_once(make_study: Any) -> None:
    path = make_study()
    command = [sys.executable, "-m", "sdft", "study", str(path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = "".join(process.communicate(timeout=300)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    found = study.load_study(path)
    for cell in study.cells(found):
        for task in found.tasks:
            assert told.count(f"== {cell.name}, task {task.name}:") == 1
    assert told.count("== the model before any training") == 1
    assert len(study.run_study(found)) == 8


def test_an_interrupted_run_goes_on(make_study: Any, monkeypatch: Any, tmp_path: Path) -> None:
    config = {"train": {"steps": 4, "batch_size": 2, "save_every": 1}}
    base = make_study()
    table = {"config": tomllib.loads(base.read_text())["config"] | config}
    found = study.load_study(make_study(seeds=[0], learning_rates=[1e-3], **table))
    own, steps = loop.train_step, []

    def step(run: Any, number: int, output: Path) -> Any:
        steps.append(number)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return own(run, number, output)

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        study.run_study(found)
    study.run_study(found, ["sdft"])
    assert steps == [0, 1, 2, 2, 3, 0, 1, 2, 3]


def test_weights_are_dropped_when_nothing_needs_them(make_study: Any, tmp_path: Path) -> None:
    found = study.load_study(make_study(seeds=[0], learning_rates=[1e-3]))
    study.run_study(found)
    assert not list((tmp_path / "study").rglob("*.safetensors"))
    assert len(list((tmp_path / "study").rglob("metrics.jsonl"))) == 4


def test_results_of_other_settings_are_refused(make_study: Any) -> None:
    study.run_study(study.load_study(make_study(seeds=[0], learning_rates=[1e-3])))
    methods = {"sdft": {"loss": {"method": "sdft", "divergence": "jsd"}}}
    with pytest.raises(SdftError, match=r"1-colours/result.json is of another settings; give another output"):
        study.run_study(study.load_study(make_study(seeds=[0], learning_rates=[1e-3], methods=methods)))
    other = make_study(seeds=[0], learning_rates=[1e-3], prior={})
    with pytest.raises(SdftError, match=r"base/result.json is of another sets"):
        study.run_study(study.load_study(other))


@pytest.mark.parametrize(
    ("changes", "told"),
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
        ({"grid": {"train.batch_size": ["big"]}}, r"grid: train.batch_size = 'big' must be a whole number"),
        ({"grid": {"teacher.template": ["a/b"]}}, "that can name a folder"),
        ({"grid": {"optim.lr": [1e-5]}}, r"optim.lr is the study's own; learning_rates"),
        ({"grid": {"train.batch_size": [0]}}, r"grid: train.batch_size = 0 must be at least 1"),
        ({"learning_rates": [2.0]}, r"sdft/lr-2/seed-0, task colours: optim.lr = 2.0 must be above 0 and at most 1"),
        ({"samples": -1}, r"samples = -1 must be a number of answers to each prompt, or 0"),
        ({"drift": True}, r"drift = True must be a number of prompts, or 0"),
        ({"drift_on": 3}, r"drift_on = 3 must be a file"),
        ({"harness": ["mmlu"]}, r"harness = \['mmlu'\] must be a table, \[harness\]"),
        ({"harness": {"task": {"mmlu": "acc"}}}, r"harness: unknown key 'task'"),
        ({"harness": {"tasks": {"known": "acc"}}}, "'known' is an evaluation file and a task of lm_eval"),
        ({"methods": {"m": {"rollout": {"temperature": -1.0}}}}, r"methods.m: rollout.temperature = -1.0 must"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_mistakes_are_told_before_anything_runs(
    changes: Any, told: str, make_study: Any, tmp_path: Path, trained: list[Any]
) -> None:
    with pytest.raises(SdftError, match=told):
        study.load_study(make_study(**changes))
    assert not (tmp_path / "study").exists()


def test_unknown_methods_and_the_list(make_study: Any, capsys: Any) -> None:
    path = str(make_study())
    with pytest.raises(SystemExit):
        main(["study", path, "--only", "grpo"])
    assert "has no such method; methods: sdft, sft" in capsys.readouterr().err
    main(["study", path, "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sdft/lr-0.001/seed-0: 0 of 2 stages"
    assert len(lines) == 2 * 2 * 2


def test_the_plan_reads_the_data(make_study: Any) -> None:
    """Runs that differ in learning rate and seed alone are one line; operations are those of their very steps."""
    methods = {
        "sdft": {"teacher": {"kind": "base"}},
        "off": {"rollout": {"source": "offline"}, "loss": {"method": "sft"}},
    }
    found = study.load_study(make_study(methods=methods))
    machine = plan.this_machine(found.config, plan.GIB)
    planned = study.plan_study(found, machine)
    assert [one.name for one in planned] == ["sdft, colours", "sdft, sizes", "off, colours", "off, sizes"]
    assert [(one.runs, one.steps) for one in planned] == [(4, 2)] * 4
    for one, cell in zip(planned[::2], study.cells(found)[::2], strict=False):
        config = override(study.stage_configs(found, cell, 0, "")[0], {"model.name": found.config.model.name})
        shape, works = plan.shape_of(config), list(plan.works_of(config, plan.tokenized(config)))
        steps = sum(flops.step_flops(shape, config, work).total for work in works)
        asked = works[0].offline  # of six records
        drawn = flops.answer_flops(shape, asked, [4] * 6) if asked else 0
        assert one.flops == steps + drawn
        assert (len(works), len(asked)) == (2, 0 if cell.method.name == "sdft" else 6)
        assert one.peak == max(plan.predict(shape, config, work, machine).peak for work in works)


def test_the_estimate_counts_what_an_earlier_start_finished(make_study: Any, monkeypatch: Any, capsys: Any) -> None:
    changes: dict[str, Any] = {"seeds": [0], "learning_rates": [1e-3], "methods": {"sft": {"loss": {"method": "sft"}}}}
    found = study.load_study(make_study(keep_weights=True, **changes))
    study.run_study(found)
    assert "stage 1 of 2\n" in capsys.readouterr().out
    first, second = (study.stage_folder(found, study.cells(found)[0], n) for n in range(2))
    result = json.loads((first / "result.json").read_text())
    (first / "result.json").write_text(json.dumps(result | {"seconds": {"train": 300.0, "evaluate": 60.0}}))
    (second / "result.json").unlink()
    study.run_study(found)
    assert "stage 1 of 1, about 6 min left\n" in capsys.readouterr().out


def test_the_estimate_is_by_method() -> None:
    assert study.remaining({}, ["a"]) == ""
    assert study.remaining({"a": [60.0, 120.0], "b": [600.0]}, ["a", "b", "b"]) == ", about 22 min left"
    assert study.remaining({"a": [3600.0]}, ["a", "c"]) == ", about 2.0 h left"
