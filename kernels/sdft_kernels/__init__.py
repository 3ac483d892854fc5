"""The fused divergence loss of self-distillation: no logits kept; Triton on a GPU, torch elsewhere.

`linear_divergence` takes hidden states and heads; `divergence` takes ready logits; `reference` holds
the dense truth that both are tested against.
"""

from .checks import TokenStats
from .divergence import Divergence, divergence
from .linear_divergence import LinearDivergence, linear_divergence

__version__ = "0.1.0"

__all__ = [
    "Divergence",
    "LinearDivergence",
    "TokenStats",
    "__version__",
    "divergence",
    "linear_divergence",
]
