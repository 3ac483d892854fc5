"""The fused loss beside its peers. Run from the repository's root: `make bench` (CPU), `make bench-gpu` (one GPU)."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("sdft_kernels") is None:  # a checkout works without an install
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
