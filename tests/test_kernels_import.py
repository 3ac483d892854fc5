"""sdft_kernels stands alone: importing it loads neither the trainer nor what the trainer needs."""

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
