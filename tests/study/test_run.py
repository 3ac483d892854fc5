"""`sdft study`: which runs it starts, in which order, from which weights; no stage runs twice."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sdft import files
from sdft.cli import main
from sdft.errors import FruitlessError, SdftError
from sdft.evaluation import harness
from sdft.study import evaluate, report, results, run
from sdft.study.spec import Harness, cells, load_study, stage_folder
from sdft.training import loop

SFT = {"sft": {"loss": {"method": "sft"}}}
ONE: dict[str, Any] = {"seeds": [0], "learning_rates": [1e-3]}


# On a tiny model.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, write_study: Any) -> Path:
    """The file of a study that the command has run: two methods, two tasks, one learning rate and seed."""
    path = write_study(tmp_path_factory.mktemp("study"), **ONE, samples=3, drift=2)
    main(["study", str(path)])
    return path


def test_every_stage_is_evaluated_on_everything(finished: Path) -> None:
    found = load_study(finished)
    got = results.results(found)
    assert [cell.name for cell, _ in got] == ["sdft/lr-0.001/seed-0", "sft/lr-0.001/seed-0"]
    for _, stages in got:
        assert [s["task"] for s in stages] == ["colours", "sizes"]
        for stage in stages:
            assert set(stage["accuracy"]) == {"colours-test", "sizes-test", "known"}
            assert min(stage["tokens"], stage["flops"], stage["seconds"]["train"]) > 0
            assert set(stage["drift"]) == {"new", "prior"}
            assert stage["drift"]["new"]["answer_tokens"] <= 4
            assert set(stage["pass_at"]) == {"colours-test", "sizes-test"}
            assert set(stage["pass_at"]["sizes-test"]) == {"1", "2", "3"}
    assert set(results.base_result(found)["pass_at"]) == {"colours-test", "sizes-test"}
    answers = (found.output / "sdft/lr-0.001/seed-0/2-sizes/answers/known.jsonl").read_text().splitlines()
    assert len(answers) == 6
    assert set(json.loads(answers[0])) >= {"prompt", "expected", "given", "correct"}


def test_the_command_leaves_a_table_and_a_report(finished: Path) -> None:
    found = load_study(finished)
    table = (found.output / "table.md").read_text()
    assert table == results.table(found)
    assert table.splitlines()[2].startswith("| before | | | ")
    text = (found.output / "report.md").read_text()
    assert "| method | learning rate | seeds | pass@1 | pass@2 | pass@3 |" in text
    assert "prompts of prior skills" in text


def test_weights_are_deleted_when_no_stage_needs_them(finished: Path) -> None:
    output = load_study(finished).output
    assert not list(output.rglob("*.safetensors"))
    assert len(list(output.rglob("metrics.jsonl"))) == 4


def test_results_of_other_settings_are_refused(finished: Path) -> None:
    text = finished.read_text()
    changed = finished.with_name("changed.toml")
    changed.write_text(text.replace('method = "sdft"', 'method = "sdft"\ndivergence = "jsd"'))
    words = (
        r"1-colours/result.json is of other settings: settings\[1\].loss.divergence was 'reverse_kl' and is 'jsd'; give"
    )
    with pytest.raises(SdftError, match=words):
        run.run_study(load_study(changed))
    changed.write_text(_without_prior(text))
    with pytest.raises(SdftError, match=r"base/result.json is of other settings: sets.known was .* and is None"):
        run.run_study(load_study(changed))


def _without_prior(text: str) -> str:
    lines = text.splitlines(keepends=True)
    start = lines.index("[prior]\n")
    return "".join(lines[:start] + lines[start + 2 :])


def test_a_stage_starts_from_the_weights_of_the_one_before(make_study: Any) -> None:
    found = load_study(make_study(**ONE, methods=SFT, keep_weights=True, drift=0, prior={}))
    run.run_study(found)
    first, second = (folder / "run/model" for folder in _stages(found))
    base, before, after = (load_file(Path(f) / "model.safetensors") for f in (found.config.model.name, first, second))
    moved = sum((after[k] - before[k]).norm() ** 2 for k in before)
    assert sum((before[k] - base[k]).norm() ** 2 for k in before) > 0
    assert 0 < moved < sum((after[k] - base[k]).norm() ** 2 for k in before)


def _stages(found: Any) -> list[Path]:
    return [stage_folder(found, cells(found)[0], number) for number in range(len(found.tasks))]


def test_an_interrupted_run_resumes_from_its_checkpoint(make_study: Any, monkeypatch: Any) -> None:
    """The steps before the checkpoint are not trained again."""
    saving = {"sft": {"loss": {"method": "sft"}, "train": {"steps": 4, "save_every": 1}}}
    found = load_study(make_study(**ONE, methods=saving, drift=0, tasks=_one_task(make_study())))
    own, steps = loop.train_step, []

    def step(run: Any, number: int, *rest: Any) -> Any:
        steps.append(number)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return own(run, number, *rest)

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        run.run_study(found)
    run.run_study(found)
    assert steps == [0, 1, 2, 2, 3]


def _one_task(path: Path) -> list[dict[str, Any]]:
    return tomllib.loads(path.read_text())["tasks"][:1]


@pytest.mark.slow
def test_a_model_that_hardly_moved_is_nearer_to_the_base(make_study: Any) -> None:
    rates = [1e-6, 3e-2]
    found = load_study(make_study(seeds=[0], learning_rates=rates, methods=SFT, tasks=_one_task(make_study()), drift=4))
    run.run_study(found)
    near, far = (stages[0]["drift"] for _, stages in results.results(found))
    for kind in ("new", "prior"):
        assert -1e-6 <= near[kind]["kl_to_base"] < 0.1 * far[kind]["kl_to_base"]


@pytest.mark.slow
def test_two_processes_at_once_train_every_stage_once(make_study: Any) -> None:
    path = make_study()
    command = [sys.executable, "-m", "sdft", "study", str(path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = "".join(process.communicate(timeout=300)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    found = load_study(path)
    for cell in cells(found):
        for task in found.tasks:
            assert printed.count(f"== {cell.name}, task {task.name}:") == 1
    assert printed.count("== the model before any training") == 1
    assert len(run.run_study(found)) == 8


# What is measured of a model.


@pytest.fixture
def loaded(make_study: Any) -> tuple[Any, Any]:
    found = load_study(make_study(**ONE, samples=3, drift=4))
    return found, evaluate.load(found.config, found.config.model.name)


def test_the_distance_is_measured_on_the_prompts_asked_for(loaded: Any, make_study: Any, tmp_path: Path) -> None:
    """drift_on replaces the prior skills' prompts, also if the study has no prior skills."""
    found, model = loaded
    base = evaluate.load(found.config, found.config.model.name).model
    of_prior = evaluate.distance_from_base(model, base, found, found.tasks[0])
    other = load_study(make_study(**ONE, prior={}, drift=4, drift_on=str(tmp_path / "known.jsonl")))
    assert evaluate.distance_from_base(model, base, other, other.tasks[0]) == of_prior
    none = load_study(make_study(**ONE, prior={}, drift=4))
    assert set(evaluate.distance_from_base(model, base, none, none.tasks[0])) == {"new"}
    assert abs(of_prior["new"]["kl_to_base"]) < 1e-6


def test_pass_at_k_is_that_of_the_samples(loaded: Any, capsys: Any) -> None:
    from sdft.data.formats import load_records
    from sdft.evaluation.pass_at_k import sample_answers

    found, model = loaded
    got = evaluate.pass_at(model, found)
    records = load_records(found.sets["sizes-test"])
    drawn = sample_answers(model.engine, model.tokenizer, records, model.prompts(records), 3, model.sampling(1.0))
    assert got["sizes-test"] == {"1": drawn.pass_at(1), "2": drawn.pass_at(2), "3": drawn.pass_at(3)}
    assert "sizes-test pass@3" in capsys.readouterr().out


def test_prior_skills_by_lm_eval(loaded: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The metric that the study names counts; all metrics are kept; another metric is reported before long work."""
    asked = []

    def fake(model: Any, tokenizer: Any, tasks: list[str], **options: Any) -> Any:
        asked.append((tasks, options))
        return {task: {"acc": harness.Score(0.25, 0.1), "acc_norm": harness.Score(0.0, None)} for task in tasks}

    monkeypatch.setattr(harness, "run", fake)
    _, model = loaded
    wanted = Harness(tasks={"hellaswag": "acc"}, limit=8, chat=True)
    assert evaluate.on_all_sets(model, {}, wanted, tmp_path / "answers") == {"hellaswag": 0.25}
    assert asked == [
        (["hellaswag"], {"limit": 8, "include_path": "", "chat": True, "allow_code": False, "num_fewshot": None,
                         "batch_size": 64})
    ]  # fmt: skip
    kept = json.loads((tmp_path / "answers/harness.json").read_text())
    assert kept == {"hellaswag": {"acc": {"value": 0.25, "stderr": 0.1}, "acc_norm": {"value": 0.0, "stderr": None}}}
    with pytest.raises(SdftError, match=r"harness.tasks.mmlu = 'f1': .* it has: acc, acc_norm"):
        evaluate.on_harness(model, Harness(tasks={"mmlu": "f1"}), tmp_path / "harness.json")


def test_one_item_of_each_task_of_lm_eval_comes_first(make_study: Any, monkeypatch: Any) -> None:
    limits = []

    def fake(model: Any, tokenizer: Any, tasks: list[str], limit: int | None, **options: Any) -> Any:
        limits.append(limit)
        return {task: {"f1": harness.Score(0.0, None)} for task in tasks}

    monkeypatch.setattr(harness, "run", fake)
    monkeypatch.setattr(harness, "check", lambda *args: None)  # the extra lm-eval need not be installed here
    path = make_study(harness={"tasks": {"mmlu": "acc"}, "limit": 8}, **ONE)
    with pytest.raises(SdftError, match="lm_eval reports no such metric"):
        run.run_study(load_study(path))
    assert limits == [1]


# Which stages are run, without a model.


def test_every_method_is_run_before_the_next_seed(make_study: Any, ran: list[str], capsys: Any) -> None:
    run.run_study(load_study(make_study(learning_rates=[1e-3])))
    assert ran == [
        f"{method}/lr-0.001/seed-{seed}/{task}"
        for seed in (0, 1)
        for method in ("sdft", "sft")
        for task in ("colours", "sizes")
    ]
    out = capsys.readouterr().out
    assert "stage 1 of 8\n" in out
    assert "stage 8 of 8, about 0 min left\n" in out


def test_finished_stages_are_never_run_again(make_study: Any, ran: list[str]) -> None:
    found = load_study(make_study(**ONE))
    run.run_study(found, ["sft"])
    assert ran == ["sft/lr-0.001/seed-0/colours", "sft/lr-0.001/seed-0/sizes"]
    assert len(run.run_study(found)) == 2
    assert len(ran) == 4
    (stage_folder(found, cells(found)[0], 1) / "result.json").unlink()
    run.run_study(found)
    assert ran[4:] == ["sdft/lr-0.001/seed-0/sizes"]


def test_the_name_of_a_method_stands_for_all_points_of_its_grid(make_study: Any, ran: list[str]) -> None:
    found = load_study(make_study(**ONE, grid={"train.batch_size": [2, 3]}, keep_weights=True))
    assert len(run.run_study(found, ["sdft"])) == 2
    assert len(ran) == 4
    result = json.loads((stage_folder(found, cells(found)[1], 0) / "result.json").read_text())
    assert result["grid"] == {"train.batch_size": 3}
    rows = results.table(found).splitlines()[3:]
    assert [row.split(" | ")[0] for row in rows] == ["| sdft/train.batch_size-2", "| sdft/train.batch_size-3"]


def test_a_cell_that_fails_does_not_end_the_study(
    make_study: Any, ran: list[str], monkeypatch: Any, capsys: Any
) -> None:
    """Its error is kept, listed and reported; it is not run again until failed.json is deleted."""
    path = make_study(seeds=[0], methods=SFT)
    found, train = load_study(path), run.train_stage
    low, high = cells(found)

    def broken(study: Any, cell: Any, number: int) -> Any:
        if (cell, number) == (low, 1):
            raise FruitlessError("step 1: loss nan")
        return train(study, cell, number)

    monkeypatch.setattr(run, "train_stage", broken)
    assert run.run_study(found) == [high]
    assert f"{low.name} ends here, the study continues: step 1: loss nan" in capsys.readouterr().out
    kept = stage_folder(found, low, 1) / "failed.json"
    main(["study", str(path), "--list"])
    assert capsys.readouterr().out.splitlines() == [
        f"{low.name}: 1 of 2 stages; step 1: loss nan (delete {kept} to run it again)",
        f"{high.name}: 2 of 2 stages",
    ]
    text = report.write_report(found).read_text()
    assert "1 of 2 cells are finished" in text
    assert "1 of 2 stages; step 1: loss nan" in text
    monkeypatch.setattr(run, "train_stage", train)
    assert run.run_study(found) == [high]
    assert len(ran) == 3
    kept.unlink()
    assert run.run_study(found) == [low, high]
    assert ran[3:] == [f"{low.name}/sizes"]


def test_two_processes_share_the_cells(make_study: Any, ran: list[str], capsys: Any) -> None:
    found = load_study(make_study(learning_rates=[1e-3]))
    first = cells(found)[0]
    (found.output / first.name).mkdir(parents=True)
    with files.lock(found.output / first.name) as mine:  # as another process would have it
        assert mine
        assert run.run_study(found) == cells(found)[1:]
        assert len(ran) == 6
        assert f"== {first.name}: another process runs it" in capsys.readouterr().out
    assert run.run_study(found) == cells(found)
    assert len(ran) == 8


def test_the_estimate_counts_what_an_earlier_start_finished(make_study: Any, ran: list[str], capsys: Any) -> None:
    found = load_study(make_study(**ONE, methods=SFT, keep_weights=True))
    run.run_study(found)
    assert "stage 1 of 2\n" in capsys.readouterr().out
    first, second = _stages(found)
    result = json.loads((first / "result.json").read_text())
    (first / "result.json").write_text(json.dumps(result | {"seconds": {"train": 300.0, "evaluate": 60.0}}))
    (second / "result.json").unlink()
    run.run_study(found)
    assert "stage 1 of 1, about 6 min left\n" in capsys.readouterr().out


def test_the_estimate_is_by_method() -> None:
    assert run.remaining({}, ["a"]) == ""
    assert run.remaining({"a": [60.0, 120.0], "b": [600.0]}, ["a", "b", "b"]) == ", about 22 min left"
    assert run.remaining({"a": [3600.0]}, ["a", "c"]) == ", about 2.0 h left"


def test_a_missing_model_is_reported(make_study: Any) -> None:
    found = load_study(make_study(**ONE))
    with pytest.raises(SdftError, match=r"1-colours/run/model is missing; delete .*1-colours/result.json"):
        run.train_stage(found, cells(found)[0], 1)
