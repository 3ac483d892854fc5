"""The checks of `make gpu-proof` and test_gpu.py: values of every kernel, and forbidden waits and copies."""

from functools import partial
from itertools import product

import torch

from . import behaviour, loss_values
from .check import BOUNDS, CANDIDATES, KINDS, OF_CANDIDATES, Check, recorded, short
from .phase import Item, Place


def items(place: Place) -> list[Item]:
    return [Item(check.name, partial(recorded, check, place)) for check in CHECKS]


CHECKS = (
    *(Check(f"{kind}, {short(dtype)}", partial(loss_values.matches, kind=kind, dtype=dtype, impl="triton"))
      for kind, dtype in product(KINDS, BOUNDS)),
    Check("a teacher very near the student", partial(loss_values.near, impl="triton")),
    Check("vectors and matrices that are not contiguous", partial(loss_values.strides, impl="triton")),
    *(Check(f"fp32 heads under autocast, hidden states in {short(dtype)}", partial(loss_values.autocast, hidden=dtype))
      for dtype in (torch.bfloat16, torch.float32)),
    Check("bf16 products of fp32 heads", loss_values.narrow_operands),
    *(Check(f"options of {kind}", partial(loss_values.options, kind=kind)) for kind in KINDS),
    *(Check(f"{vocab} tokens", partial(loss_values.long_vocabulary, vocab=vocab)) for vocab in (151_936, 262_144)),
    Check("models far apart", loss_values.far_apart),
    Check("a teacher of another width", loss_values.other_teacher),
    Check("Triton is chosen", behaviour.chosen, needs_gpu=True),
    Check("the host never waits", behaviour.host_never_waits, needs_gpu=True),
    Check("memory stays within the budget", behaviour.memory_budget, needs_gpu=True),
    Check("products of narrow operands", behaviour.narrow_products, needs_gpu=True),
    *(Check(f"ready logits, {short(dtype)}", partial(loss_values.ready_logits, dtype=dtype)) for dtype in BOUNDS),
    Check("ready logits that are not contiguous", loss_values.strides_of_logits),
    *(Check(f"cross-entropy, {short(dtype)}", partial(loss_values.cross_entropy, dtype=dtype)) for dtype in BOUNDS),
    *(Check(f"top-k, {short(dtype)}", partial(loss_values.top_k, dtype=dtype)) for dtype in BOUNDS),
    *(Check(f"{impl}: {kind}, {short(dtype)}", partial(loss_values.matches, kind=kind, dtype=dtype, impl=impl))
      for impl, kind, dtype in product(CANDIDATES, *OF_CANDIDATES)),
    *(Check(f"{impl}: a teacher very near the student", partial(loss_values.near, impl=impl, kinds=OF_CANDIDATES[0]))
      for impl in CANDIDATES),
    *(Check(f"{impl}: not contiguous", partial(loss_values.strides, impl=impl, dtype=torch.bfloat16, biases=False))
      for impl in CANDIDATES),
    Check("ready logits, N V beyond 2^31", loss_values.ready_logits_past_two_to_the_31, gigabytes=14),
    Check("one chunk of N V beyond 2^31", loss_values.past_two_to_the_31, gigabytes=32),
    Check("captured in a CUDA graph", behaviour.graph_capture, needs_gpu=True),
    Check("compiled by Inductor", behaviour.compiled, needs_gpu=True),
    Check("python -m sdft_kernels", behaviour.self_test, needs_gpu=True),
)  # fmt: skip
