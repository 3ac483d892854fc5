"""The trainer for Self-Distillation Fine-Tuning (Shenfeld et al. 2026, arXiv 2601.19897).

The fused loss lives in its own package, `sdft_kernels`, which needs torch and triton alone.
"""

__version__ = "0.1.0"

from sdft.errors import FruitlessError, SdftError

__all__ = ["FruitlessError", "SdftError", "__version__"]
