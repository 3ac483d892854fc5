"""The loss alone: every implementation by workspace, on the heads of four models, compared with the bare products.

Also as the trainer calls it: fp32 heads under bf16 autocast, with labels, token outputs and weights.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cases import BIG, Case
from ..measure import Row as Measured
from ..measure import run_case
from ..peers import Loss, Variant, ours
from .check import CANDIDATES
from .machine import device_for
from .phase import Item, Place, Row

MIB = 2**20
WORKSPACES: tuple[int | None, ...] = (None, 256 * MIB, 512 * MIB, 1024 * MIB, 2048 * MIB)  # None: the default
TINY_WORKSPACES: tuple[int | None, ...] = (None, 2**14)
OF_CANDIDATES = (None, 256 * MIB)  # the workspaces of implementations that are not the default
TOKENS = 16_384
ROUNDS = 5


def items(place: Place) -> list[Item]:
    if place.tiny:
        cases = [Case("tiny", 6, frozen=frozen) for frozen in (False, True)]
        trainer = [Case("tiny", 6, "float32", trainer=True)]
    else:
        cases = [Case(model, TOKENS, frozen=frozen) for model in BIG for frozen in (False, True)]
        trainer = [Case(model, TOKENS, "float32", "forward_kl", trainer=True) for model in (BIG[0], BIG[-1])]
    known = [Item(str(case), partial(measured, case, place)) for case in cases]
    return [*known[:2], *(Item(f"{case}, the trainer's call", partial(measured, case, place)) for case in trainer),
            *known[2:]]  # fmt: skip


def measured(case: Case, place: Place, rows: list[Row]) -> None:
    make = as_the_trainer if case.trainer else ours
    sizes = {"triton": TINY_WORKSPACES if place.tiny else WORKSPACES}
    if not case.trainer:
        sizes |= dict.fromkeys(CANDIDATES, TINY_WORKSPACES if place.tiny else OF_CANDIDATES)
    made = {
        f"{impl}, {label(size)}": (impl, size, partial(make, impl=impl, chunk_bytes=size))
        for impl, workspaces in sizes.items()
        for size in workspaces
    }
    variants = [Variant(name, loss, devices=("cuda", "cpu")) for name, (_, _, loss) in made.items()]
    found: list[Measured] = []
    try:
        run_case(
            case, device_for(place), found, place.deadline, variants,
            rounds=2 if place.tiny else ROUNDS, checked_rows=6 if place.tiny else 1024,
        )  # fmt: skip
    finally:
        for row in found:
            impl, size, _ = made.get(row["variant"], (None, None, None))
            rows.append(row | {"impl": impl, "workspace": size, "trainer": case.trainer})


def label(size: int | None) -> str:
    return "default" if size is None else f"{size // MIB} MiB" if size >= MIB else f"{size // 1024} KiB"


def as_the_trainer(divergence: str, impl: str | None, chunk_bytes: int | None) -> Loss:
    """sdft.loss.divergence_loss, whose weights sum to one."""
    from sdft.config import LossConfig
    from sdft.loss import divergence_loss
    from sdft.model.language_model import Head

    settings: dict[str, Any] = {"divergence": divergence, "chunk_bytes": chunk_bytes or 0, "impl": impl or "auto"}
    config = LossConfig(**settings)

    def loss(x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor) -> Tensor:
        labels = torch.arange(len(x), device=x.device) * 37 % len(w)
        weights = torch.full((len(x),), 1 / len(x), device=x.device)
        head, teacher_head = (Head(weight, None, 1.0, None) for weight in (w, teacher_w))
        return divergence_loss(x, head, (teacher_x, teacher_head), labels, weights, config)[0]

    return loss
