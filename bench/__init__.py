"""Benchmarks. Run every program from the root of the repository.

    make bench                    test_linear_divergence.py: the loss and other losses on a CPU
    make bench-step               step.py: whole training steps, ours and TRL's
    make gpu-proof                proof/: everything on one GPU in ten minutes
    python -m bench.roofline      what a loss costs by arithmetic, and its bound
    python -m bench.docs          writes the generated tables of docs/
    python -m bench.integrations  numbers of docs/integrations.md
    python -m bench.memory        the plan's prediction and the measured peak
    python -m bench.lora_lag      a number of docs/lora.md
    python -m bench.resources     registers and shared memory of the compiled kernels

The first three share cases.py, peers.py, measure.py and report.py. They write to results/.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("sdft_kernels") is None:  # a checkout works without an install
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
