"""The commands, each on a tiny model: output, refusals, exit status."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft import __version__
from sdft.api import CheckResult
from sdft.cli import arguments, main, quiet_libraries
from sdft.config import Config, load_config, to_toml
from sdft.config.settings import keys
from sdft.evaluation.accuracy import Answer, EvalResult
from sdft.training.metrics import read_metrics


@pytest.fixture
def config_file(make_config: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """config_file(**overrides) is the path of a config file of a short run."""

    def write(**overrides: Any) -> str:
        path = tmp_path / "config.toml"
        path.write_text(to_toml(make_config(**overrides)))
        return str(path)

    return write


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(*arguments) runs the command, which must exit with 2, and is its one line on stderr."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(list(arguments))
        printed = capsys.readouterr().err
        assert exit_.value.code == 2
        assert "Traceback" not in printed
        lines = printed.strip().splitlines()
        assert len(lines) == 1, printed
        assert lines[0].startswith("sdft: ")
        return lines[0]

    return run


def test_notes_of_transformers_on_its_own_names_are_hidden() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_libraries()
        for module in ("transformers.modeling_utils", "mine"):
            warnings.warn_explicit(module, FutureWarning, "file.py", 1, module=module)
    assert [str(warning.message) for warning in shown] == ["mine"]


def test_the_note_of_bitsandbytes_on_a_kernel_is_hidden() -> None:
    """In a separate process, since bitsandbytes prints the note when it is first imported."""
    code = (
        "from sdft.cli import quiet_libraries; quiet_libraries(); import logging; "
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('a kernel is missing')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stderr == ""


# train.


def test_train_with_overrides(config_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(**{"train.seed": 5})
    main(["train", path, "--optim.lr", "2e-3", "--train.steps", "2", "--loss.divergence", "jsd",
          "--lora.targets", "q_proj", "v_proj", "--lora.rank", "2", "--optim.betas", "0.8", "0.9"])  # fmt: skip
    config = load_config(tmp_path / "run" / "config.toml")
    assert (config.optim.lr, config.train.steps, config.loss.divergence) == (2e-3, 2, "jsd")  # the command line
    assert (config.lora.targets, config.optim.betas) == (("q_proj", "v_proj"), (0.8, 0.9))
    assert (config.train.seed, config.rollout.max_new_tokens) == (5, 6)  # the file
    assert len(read_metrics(tmp_path / "run")) == 2
    assert "generalized JSD with beta = 0.5" in capsys.readouterr().out


def test_command_line_over_file_over_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Config] = []
    monkeypatch.setattr("sdft.api.train", trained.append)
    (tmp_path / "c.toml").write_text('preset = "paper_as_run"\n[loss]\nmask_first = 5\n[teacher]\nema_alpha = 0.5\n')
    main(["train", str(tmp_path / "c.toml"), "--loss.mask-first", "7", "--eval.sets", "new", "n.jsonl"])
    (config,) = trained
    assert (config.loss.mask_first, config.teacher.ema_alpha) == (7, 0.5)
    assert (config.loss.divergence, config.optim.lr) == ("forward_kl", Config().optim.lr)
    assert config.eval.sets == {"new": "n.jsonl"}


@pytest.mark.parametrize(
    "given",
    [
        "--eval.sets new=n.jsonl old=a=b.jsonl",
        "--eval.sets=new=n.jsonl old=a=b.jsonl",
        "--eval.sets new n.jsonl old a=b.jsonl",
    ],
)
def test_the_forms_of_evaluation_sets(
    given: str, config_file: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Config] = []
    monkeypatch.setattr("sdft.api.train", trained.append)
    for sets in ({}, {"new": "x.jsonl"}):
        main(["train", config_file(**{"eval.sets": sets}), *given.split(), "--optim.lr", "2e-3"])
        assert trained[-1].eval.sets == {"new": "n.jsonl", "old": "a=b.jsonl"}
        assert trained[-1].optim.lr == 2e-3


def test_a_bad_evaluation_set(config_file: Callable[..., str], refused: Any) -> None:
    for given in ("--eval.sets", "--eval.sets new", "--eval.sets=", "--eval.sets new= --optim.lr 1"):
        assert "--eval.sets takes NAME=FILE, such as" in refused("train", config_file(), *given.split())


@pytest.mark.parametrize("in_file", [False, True])
def test_resume(in_file: bool, config_file: Any, tmp_path: Path, capsys: Any, refused: Any) -> None:
    main(["train", config_file()])
    assert "holds another run" in refused("train", config_file())
    main(["train", config_file(**{"train.resume": in_file}), "--resume"])
    assert "Resumed after step 4 from" in capsys.readouterr().out
    assert "optim.lr was 0.001" in refused("train", config_file(), "--resume", "--optim.lr", "1")


def test_ctrl_c_exits_with_130(config_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sdft.api.train", stop)
    with pytest.raises(SystemExit) as exit_:
        main(["train", config_file()])
    assert exit_.value.code == 130


# check.


@pytest.mark.parametrize("works", [True, False])
def test_check_prints_answers_side_by_side_and_a_verdict(
    works: bool, config_file: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def side(name: str) -> EvalResult:
        return EvalResult(tuple(Answer(f"say {i}", (f"X{i}",), f"{name} {i}", True) for i in range(8)))

    found = CheckResult(side("student"), side("teacher"), works, "The reason.")
    monkeypatch.setattr("sdft.api.check", lambda config, count: found)
    if works:
        main(["check", config_file(), "--show", "2"])
    else:  # for scripts
        with pytest.raises(SystemExit, match="1"):
            main(["check", config_file(), "--show", "2"])
    printed = capsys.readouterr().out
    assert "Can SDFT work here? The reason." in printed
    for row in (0, 1):
        assert re.search(rf"say {row}\W+X{row}\W+student {row}\W+teacher {row}", printed)
    assert "say 2" not in printed


def test_check_runs_the_model(config_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["check", config_file(), "--count", "3", "--eval.max-new-tokens", "4", "--teacher.turns", "1"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Can SDFT work here? No: the teacher hardly uses the demonstration (0% without" in printed


def test_check_needs_demonstrations(config_file: Any, skill: Path, refused: Any) -> None:
    skill.write_text('{"prompt": "p", "answer": "a"}\n')
    assert f"{skill}:1: 'demonstration' is missing" in refused("check", config_file())


# eval and generate.


def test_eval(model_folder: Any, skill: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skill.write_text(skill.read_text() + '{"prompt": "say ab", "answer": "no such thing"}\n')
    arguments = [str(model_folder("llama")), str(skill), "--max-new-tokens", "4", "--compute-dtype", "float32"]
    main(["eval", *arguments, "--show", "2", "--output", str(tmp_path / "out.jsonl")])
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in rows] == [json.loads(x)["prompt"] for x in skill.read_text().splitlines()]
    assert rows[0]["expected"] == ["AB"]
    assert printed.count("[--] say ") == 2
    assert "accuracy 0.0% (0 of 13)" in printed


def test_eval_of_samples(model_folder: Any, skill: Path, capsys: pytest.CaptureFixture[str], refused: Any) -> None:
    """With the greedy accuracy; every sample that counts is right half of the time here."""
    rows = [{"prompt": "say", "answer": "(?s)^.{0,3}$", "check": "regex"}]  # true of short answers
    skill.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(model_folder("llama")), str(skill), "--max-new-tokens", "4", "--compute-dtype", "float32"]

    def printed(*options: str) -> str:
        main(["eval", *arguments, "--samples", "6", *options])
        return capsys.readouterr().out

    first = printed()
    assert re.search(r"of 6 samples at temperature 1: pass@1 \S+  pass@2 \S+  pass@4 \S+  pass@6 \S+\n", first)
    values = [float(v) for v in re.findall(r"pass@\d (\S+)%", first)]
    assert values == sorted(values)
    assert printed() == first
    assert "--samples = -2 must be at least 0" in refused("eval", *arguments, "--samples", "-2")
    assert "--limit = 0 must be at least 1" in refused("eval", *arguments, "--limit", "0")
    assert "--temperature = 0.0 must be above 0" in refused("eval", *arguments, "--samples", "2", "--temperature", "0")


def test_eval_of_a_configs_model(
    config_file: Any, model_folder: Any, skill: Path, tmp_path: Path, refused: Any
) -> None:
    """The model is loaded, and the prompts are written, with the settings of the config."""
    short = [str(skill), "--max-new-tokens", "4", "--output", str(tmp_path / "out.jsonl")]
    plain, system = str(model_folder("llama")), ["--system", "be brief"]

    def answers(model: str, *options: str) -> str:
        main(["eval", model, *short, *options])
        return (tmp_path / "out.jsonl").read_text()

    found = [answers(config_file(**{"data.system": "be brief"})), answers(config_file(), *system)]
    found += [answers(plain, "--compute-dtype", "float32", *system), answers(config_file())]
    assert found[0] == found[1] == found[2] != found[3]
    empty = tmp_path / "empty.toml"
    empty.write_text("[train]\nsteps = 2\n")
    assert "model.name is missing" in refused("eval", str(empty), str(skill))


def test_eval_of_what_was_trained(config_file: Any, skill: Path, tmp_path: Path, capsys: Any) -> None:
    """SFT until the skill is there; the written model and the written adapter both answer right."""
    for rank in (0, 8):
        output = tmp_path / f"rank{rank}"
        path = config_file(**{"loss.method": "sft", "optim.lr": 1e-2, "train.steps": 60, "train.batch_size": 12,
                              "lora.rank": rank, "train.output": str(output)})  # fmt: skip
        main(["train", path])
        capsys.readouterr()
        main(["eval", str(output / "model"), str(skill), "--compute-dtype", "float32"])
        printed = capsys.readouterr().out
        assert float(re.search(r"accuracy ([\d.]+)%", printed)[1]) > 75


def test_generate(model_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*options: str) -> str:
        main(["generate", str(model_folder("llama")), "say ab", "--max-new-tokens", "6", *options])
        return capsys.readouterr().out

    assert answer() == answer("--seed", "1")  # greedy
    assert answer("--temperature", "1") == answer("--temperature", "1")
    assert answer("--temperature", "1") != answer("--temperature", "1", "--seed", "1")
    assert answer("--system", "be brief") != answer()
    assert answer("--count", "2") == answer() * 2


def test_generate_is_the_naive_loop(load_tiny: Any, model_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    tokenizer, model = load_tiny(compute_dtype="auto")
    text = "<|im_start|>user\nsay ab<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    start = len(ids)
    for _ in range(5):
        with torch.no_grad(), model.autocast():
            ids.append(int(model.lm(torch.tensor([ids])).logits[0, -1].argmax()))
    main(["generate", str(model_folder("llama")), "say ab", "--max-new-tokens", "5"])
    assert capsys.readouterr().out == tokenizer.decode(ids[start:], skip_special_tokens=True) + "\n"


def test_the_folder_of_a_run_is_no_model(skill: Path, tmp_path: Path, refused: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").touch()
    assert "is the folder of a run; it has no model yet" in refused("eval", str(run), str(skill))
    (run / "model").mkdir()
    assert f"is the folder of a run; its model is {run / 'model'}" in refused("eval", str(run), str(skill))


# convert.


def test_convert_gguf_refuses(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not one")
    assert "no model loads from it" in refused("convert", "gguf", str(tmp_path / "x.gguf"), str(tmp_path / "out"))
    assert "exists; give a new folder" in refused("convert", "gguf", str(tmp_path / "x.gguf"), str(tmp_path))
    assert "no such file" in refused("convert", "gguf", str(tmp_path / "none.gguf"), str(tmp_path / "out"))


# Mistakes.


def test_one_line_and_status_2(
    config_file: Any, tmp_path: Path, refused: Any, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdft_kernels.checks.INTERPRETED", False)
    lm = str(model_folder("llama"))
    assert refused("trian") == "sdft: unknown command 'trian'; did you mean 'train'?"
    assert "unknown command 'x'; valid: train, plan, check, study, eval, generate, data, merge, convert" in refused("x")
    assert "unknown task 'comands'; did you mean 'commands'?" in refused("data", "comands")
    assert "the config file is missing; it comes first" in refused("train")
    assert "the config file is missing; it comes first" in refused("check", "--optim.lr", "1")
    assert "none.toml: cannot be read (No such file or directory)" in refused("train", str(tmp_path / "none.toml"))
    assert "data file none.jsonl: cannot be read" in refused("train", config_file(), "--data.train", "none.jsonl")
    assert "none.jsonl: cannot be read" in refused("eval", lm, "none.jsonl")
    assert "/no/model': no such folder" in refused("generate", "/no/model", "hi")
    assert "command line: optim.lr = -1.0 must be above 0" in refused("train", config_file(), "--optim.lr", "-1")
    assert "command line: --count = 0 must be at least 1" in refused("check", config_file(), "--count", "0")
    assert "command line: --top-p = 1.5 must be above 0" in refused("generate", lm, "hi", "--top-p", "1.5")
    assert "loss.impl = 'triton' cannot run" in refused("train", config_file(), "--loss.impl", "triton")
    assert "--preset paper_as_run has no effect" in refused("train", config_file(), "--preset", "paper_as_run")
    assert "--preset paper_as_run has no effect" in refused("check", config_file(), "--preset", "paper_as_run")
    assert "cannot be written" in refused("eval", lm, config_skill(tmp_path), "--max-new-tokens", "1", "--output",
                                          config_file() + "/below.jsonl")  # fmt: skip


def config_skill(tmp_path: Path) -> str:
    return str(tmp_path / "skill.jsonl")


@pytest.mark.parametrize(
    "given", [["--optim.lr", "much"], ["--teacher.kind", "emma"], ["--train.steps", "1.5"]], ids=" ".join
)
def test_bad_overrides_exit_with_2_and_no_traceback(given: list[str], config_file: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", config_file(), *given])
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert given[0] in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--optim.lrr 1", "unknown option '--optim.lrr'; did you mean '--optim.lr'?"),
        ("--optim.learning-rate 1", "unknown option '--optim.learning-rate'; did you mean '--optim.lr'?"),
        ("--train.lr=1", "did you mean '--optim.lr'?"),
        ("--lr 1", "did you mean '--optim.lr'?"),
        ("--counts 1", "did you mean '--count'?"),
        ("extra", "unknown option 'extra'; `sdft check --help` lists the options"),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest(given: str, words: str, config_file: Any, refused: Any) -> None:
    assert words in refused("check", config_file(), *given.split())


def test_an_unknown_option_of_other_commands(refused: Any) -> None:
    assert "did you mean '--max-new-tokens'?" in refused("generate", "m", "hi", "--max_tokens", "3")
    assert "did you mean '--held-out'?" in refused("data", "toolalpaca", "a", "b", "--hold-out", "3")


def test_the_installed_entry_point() -> None:
    """In a separate process: no traceback there either, and no heavy import for a quick reply."""

    def run(*arguments: str) -> Any:
        command = [sys.executable, "-X", "importtime", "-m", "sdft", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, check=False)

    out = run("--version")
    assert out.stdout == f"sdft {__version__}\n"
    assert "transformers" not in out.stderr
    out = run("train", "none.toml")
    assert out.returncode == 2
    assert [line for line in out.stderr.splitlines() if not line.startswith("import time:")] == [
        "sdft: config none.toml: cannot be read (No such file or directory)"
    ]
    assert "torch" not in out.stderr


def test_a_reader_that_ends_early_is_no_error() -> None:
    """`sdft train --help | head -1`: no traceback."""
    command = [sys.executable, "-m", "sdft", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 141


# Help.


def help_text(*command: str) -> str:
    """The text of --help, without frames and line breaks."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    return " ".join(re.sub(r"[│─╭╮╰╯]", " ", out.getvalue()).split())


@pytest.mark.parametrize("command", ["train", "check"])
def test_help_documents_every_setting(command: str) -> None:
    printed = help_text(command)
    for key, setting in keys().items():
        assert f"--{key.replace('_', '-')}" in printed, key
        assert " ".join((setting.description or "missing").split()) in printed, key


@pytest.mark.parametrize(
    ("command", "owner"),
    [
        ("plan", arguments.PlanArgs),
        ("check", arguments.CheckArgs),
        ("study", arguments.StudyArgs),
        ("eval", arguments.EvalArgs),
        ("generate", arguments.GenerateArgs),
        ("data facts", arguments.SkillArgs),
        ("merge", arguments.MergeArgs),
        ("convert", arguments.ConvertArgs),
    ],
)
def test_help_documents_every_argument(command: str, owner: type[arguments.Arguments]) -> None:
    printed = help_text(*command.split())
    for name, setting in owner.declared().items():
        if name != "config":
            assert " ".join((setting.description or "missing").split()) in printed, name


def test_usage_names_the_positional_arguments() -> None:
    assert "MODEL [DATA]" in help_text("eval").partition("positional")[0]
    assert "MODEL PROMPT" in help_text("generate").partition("positional")[0]
    assert "SOURCE FOLDER" in help_text("data", "knowledge").partition("positional")[0]


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for given in ([], ["--help"], ["-h"]):
        main(given)
        printed = capsys.readouterr().out
        assert all(f"sdft {c} " in printed for c in ("train", "check", "eval", "generate", "data", "convert"))
