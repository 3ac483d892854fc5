"""sdft_kernels stands alone: importing it loads neither the trainer nor its dependencies."""

import subprocess
import sys


def test_import_is_slim() -> None:
    code = (
        "import sys, sdft_kernels; "
        "heavy = {'transformers', 'sdft', 'peft', 'datasets', 'triton'} & set(sys.modules); "
        "assert not heavy, heavy; print(sdft_kernels.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_an_eager_call_stays_light() -> None:
    """No compiler is loaded, and on the CPU no Triton either: seconds and memory of a first call."""
    code = """
import sys, torch
from sdft_kernels import linear_divergence
x, w = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
linear_divergence(x, w, x.detach(), w.detach() + 0.1).backward()
print(sorted({"torch._dynamo", "torch._inductor", "triton"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
