"""`python -m sdft_kernels`: the report, and the self-test, which can fail."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sdft_kernels
import torch
from sdft_kernels import __main__ as command

KERNELS = Path(__file__).parents[2] / "kernels"


def test_from_any_folder_with_torch_alone(tmp_path: Path) -> None:
    code = """
import runpy, sys
try:
    runpy.run_module("sdft_kernels", run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("status", end.code, sorted({"sdft", "transformers", "peft"} & set(sys.modules)))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(KERNELS)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert f"sdft_kernels {sdft_kernels.__version__}, torch {torch.__version__}" in done.stdout
    assert "cpu (" in done.stdout
    assert "impl=torch: Triton's kernels need a CUDA or ROCm GPU" in done.stdout
    assert "cpu, torch, bfloat16: 10 cases in" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["self-test passed", "status 0 []"]
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_triton_is_tested_where_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    assert "triton, float32: 6 cases" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["linear_divergence", "divergence", "linear_topk_divergence"])
def test_a_wrong_value_a_wrong_gradient_and_an_exception_fail(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(command, name)
    monkeypatch.setattr(command, "INTERPRETED", False)

    def wrong_value(*args: Any, **options: Any) -> Any:
        return right(*args, **options) * 1.01

    def wrong_gradient(*args: Any, **options: Any) -> Any:
        loss = right(*args, **options)
        return loss * 1.05 - 0.05 * loss.detach()

    def broken(*args: Any, **options: Any) -> Any:
        if options["divergence"] == "jsd":
            raise RuntimeError("no such device")
        return right(*args, **options) * float("nan")

    for wrong, message in (
        (wrong_value, "relative error of the value 1.0e-02"),
        (wrong_gradient, "of a gradient 5.0e-02"),
        (broken, "RuntimeError: no such device"),
        (broken, "relative error of the value nan"),
    ):
        monkeypatch.setattr(command, name, wrong)
        assert command.main([]) == 1
        out = capsys.readouterr().out
        assert f": {name} " in out
        assert message in out
        assert "self-test FAILED: " in out


def test_a_wrong_cross_entropy_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = command.linear_cross_entropy
    monkeypatch.setattr(command, "INTERPRETED", False)
    monkeypatch.setattr(command, "linear_cross_entropy", lambda *args, **options: right(*args, **options) * 1.01)
    assert command.main([]) == 1
    assert "linear_cross_entropy: relative error of the value 1.0e-02" in capsys.readouterr().out


def test_the_reason_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sdft_kernels.checks as checks

    assert command.reason(torch.device("cuda")).startswith("triton: a GPU")
    monkeypatch.setattr(checks, "HAVE_TRITON", False)
    assert "pip install triton" in command.reason(torch.device("cuda"))


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["--gpu"])
    assert end.value.code == 2
    assert "unrecognized arguments: --gpu" in capsys.readouterr().err
