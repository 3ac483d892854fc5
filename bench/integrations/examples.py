"""The number of docs/integrations.md, section Examples: a step of examples/train_plain.py with and without logits.

    python -m bench.integrations examples

The unchanged example runs SmolLM2-135M in fp32 on the CPU, with four completions of 256 random tokens: first with the
fused loss, then with `sdft_kernels.reference`, the dense loss in plain PyTorch, each in a fresh process. The program
prints the peak of the resident set over loss and backward of the second step, when the optimizer has its state, and how
much of the peak came after the forward passes.
"""

import importlib
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sdft_kernels
import torch
from sdft_kernels.reference import linear_divergence_reference
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sdft.model.sources import prepare_smollm2

from ..measure import proc_bytes

EXAMPLES = Path(__file__).parents[2] / "examples"
COMPLETION = 256  # tokens
LOSSES: dict[str, Callable[..., Any]] = {
    "fused": sdft_kernels.linear_divergence,
    "dense": linear_divergence_reference,
}


def random_completions(lm: Any, tokenizer: Any, prompts: list[Tensor], max_new_tokens: int) -> list[Tensor]:
    return [torch.randint(1000, 40000, (max_new_tokens,)) for _ in prompts]


def child(name: str) -> None:
    """Runs the example with this loss and prints bytes: the peak, and its growth after the forward passes."""
    resident = [0]
    loss = LOSSES[name]

    def noted(*args: Any, **kwargs: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        resident[0] = proc_bytes("self/status", "VmRSS")
        return loss(*args, **kwargs)

    def stepping(*_: Any) -> None:
        peak = proc_bytes("self/status", "VmHWM")
        print("bytes", peak, peak - resident[0])

    sys.path.insert(0, str(EXAMPLES))
    common: Any = importlib.import_module("common")
    common.sample = random_completions
    sdft_kernels.linear_divergence = noted
    register_optimizer_step_pre_hook(stepping)
    options = ["--model", str(prepare_smollm2()), "--steps", "2", "--max-new-tokens", str(COMPLETION)]
    sys.argv = ["train_plain.py", *options]
    runpy.run_path(str(EXAMPLES / "train_plain.py"), run_name="__main__")


def main(arguments: list[str]) -> None:
    """Prints the numbers. With arguments: the numbers of one process."""
    if arguments:
        child(arguments[0])
        return
    for name in LOSSES:
        command = [sys.executable, "-m", "bench.integrations", "examples", name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peak, grown = (int(v) / 1e6 for v in [line.split() for line in out.splitlines() if "bytes" in line][-1][1:])
        print(f"{name}: peak {peak:.0f} MB, of which {grown:.0f} MB in loss and backward")
