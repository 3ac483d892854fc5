"""Every command, snippet and config of the README is executed here."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(tool: str = "") -> list[str]:
    """The lines of the bash blocks, without their comments; those of one tool, if it is named."""
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and (not tool or shlex.split(line)[0] == tool)]


def mentioned(tool: str) -> list[str]:
    """The commands of a tool in the text, outside of blocks."""
    return re.findall(rf"`({tool} [^`]+)`", re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL))


def test_every_command_has_its_test() -> None:
    assert {shlex.split(command)[0] for command in commands()} == {"make", "pip", "sdft"}
    assert commands("make")[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", [*commands("make"), *mentioned("make")])
def test_make_knows_the_target(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for module in re.findall(r"python3? -m ([\w.]+)", done.stdout):
        if module.split(".")[0] == "bench":
            assert (ROOT / (module.replace(".", "/") + ".py")).exists() or (ROOT / module.replace(".", "/")).is_dir()
    for script in re.findall(r"python3? (\w[\w/]*\.py)", done.stdout):
        assert (ROOT / script).exists()


@pytest.mark.parametrize("command", [*commands("pip"), *mentioned("pip install")])
def test_pip_can_install_it(command: str) -> None:
    """What is installed already satisfies the command, without a network; an extra must be one of ours."""
    words = shlex.split(command)
    assert words[:2] == ["pip", "install"]
    if words[-1].startswith("."):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(re.findall(r"[\w-]+", words[-1])) <= set(project["optional-dependencies"])
    else:
        subprocess.run([*PIP, *words[1:], "--no-index"], check=True)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_snippet(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_names_of_the_python_api() -> None:
    [line] = re.findall(r"`(from sdft import [^`]+)`", README)
    exec(line, {})


def test_self_test() -> None:
    [command] = re.findall(r"`(python -m sdft_kernels)`", README)
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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


def test_ci_runs_the_readmes_test_command() -> None:
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert "make test" in lines


@pytest.fixture
def workplace(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout, in which the README's relative paths work."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.model
def test_sdft_commands_in_order(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's lines, one after the other, on the real model; the training is shortened to a step."""
    from sdft.cli import main

    short = {"train": ["--train.steps", "1", "--eval.every", "1"], "check": ["--count", "6"]}
    for command in commands("sdft"):
        _, *words = shlex.split(command)
        main([*words, *short.get(words[0], [])])
        assert capsys.readouterr().out.strip(), command
    assert (workplace / "runs/demo/sdft/model/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.model
def test_config_trains(workplace: Path) -> None:
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
