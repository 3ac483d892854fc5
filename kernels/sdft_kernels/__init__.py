"""The fused divergence loss of self-distillation: no logits kept; Triton on a GPU, torch elsewhere.

`linear_divergence` takes hidden states and heads; `divergence` takes ready logits; `linear_topk_divergence` and
`topk_divergence` take a teacher's top-k log-probabilities; `linear_cross_entropy` takes labels; `reference` holds
the dense losses that all are compared with. `python -m sdft_kernels` prints what runs on this machine, and tests it.
"""

from .checks import TokenStats
from .cross_entropy import LabelStats, LinearCrossEntropy, linear_cross_entropy
from .divergence import Divergence, divergence
from .linear_divergence import LinearDivergence, linear_divergence
from .topk import TopkStats, linear_topk_divergence, topk_divergence

__version__ = "0.1.0"

__all__ = [
    "Divergence",
    "LabelStats",
    "LinearCrossEntropy",
    "LinearDivergence",
    "TokenStats",
    "TopkStats",
    "__version__",
    "divergence",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_topk_divergence",
    "topk_divergence",
]
