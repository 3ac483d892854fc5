"""The types of the public functions: mypy on calls, and the keyword arguments that are declared again for it."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import sdft_kernels as K
from sdft_kernels import arguments

PAIRS = {
    "linear_divergence": arguments.LinearOptions,
    "divergence": arguments.LogitsOptions,
    "linear_topk_divergence": arguments.LinearTopkOptions,
    "topk_divergence": arguments.TopkOptions,
    "linear_cross_entropy": arguments.LabelOptions,
}
CALLS = """
import torch
from sdft_kernels import linear_cross_entropy, linear_divergence, linear_topk_divergence
x = torch.zeros(2, 3)
reveal_type(linear_divergence(x, x, x, x))
reveal_type(linear_divergence(x, x, x, x, return_tokens=True, beta=0.5))
reveal_type(linear_topk_divergence(x, x, x, x, return_tokens=True)[1])
reveal_type(linear_cross_entropy(x, x, x, return_tokens=bool(x.numel())))
linear_divergence(x, x, x, x, temprature=2.0)
"""


@pytest.mark.parametrize("name", list(PAIRS))
def test_every_keyword_is_typed_as_it_is_declared(name: str) -> None:
    function: Any = getattr(K, name)
    declared = {
        p.name: get_type_hints(function)[p.name]
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }
    assert declared.pop("return_tokens") is bool
    assert declared == get_type_hints(PAIRS[name])
    assert get_type_hints(function)["return"] is not Any


@pytest.mark.slow
def test_mypy_knows_what_a_call_returns(tmp_path: Path) -> None:
    (tmp_path / "calls.py").write_text(CALLS)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(tmp_path / "calls.py")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    types = [line.split('"')[1] for line in done.stdout.splitlines() if "Revealed type" in line]
    types = [kind.replace("torch._tensor.", "") for kind in types]
    # mypy writes a named tuple as a tuple of its fields' types and its name.
    found = [re.findall(r"(?<=fallback=sdft_kernels\.)\w+\.\w+", kind) for kind in types]
    assert found == [[], ["checks.TokenStats"], ["topk.TopkStats"], ["cross_entropy.LabelStats"]]
    assert [kind.split("[")[0] for kind in types] == ["Tensor", "tuple", "tuple", "Tensor | tuple"]
    assert "temprature" in done.stdout
