"""How far the EMA teacher of a LoRA run is from the exact average: it averages the factors A and B, not dW = scale B A.

The program trains SmolLM2-135M with the steps of sdft, and keeps the exact average as well:

    python -m bench.lora_lag [--steps 60] [--alpha 0.02] [--lr 2e-4 1e-3]

For each learning rate, every 20 steps:
    lag      |avg(B) avg(A) - avg(B A)| / |avg(B A)| over all layers, with the scale
    A moved  |A - A_0| / |A_0|
    KL       between the two teachers, as mean over the demonstrations' tokens in the teacher's context; KL(teacher,
             student) and KL(teacher, base) are there for comparison
"""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdft.config import Config, override
from sdft.model import lora
from sdft.score.batch import lay_out
from sdft.training.run import Run
from sdft.training.setup import set_up
from sdft.training.step import train_step

CAPITALS = {"Zorvia": "Lumar", "Bekland": "Tano", "Quilia": "Rando", "Morna": "Ashel"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--alpha", type=float, default=0.02)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-4, 1e-3])
    args = parser.parse_args()
    print("| lr | step | loss | lag | A moved | KL(exact, ours) | KL(ours, student) | KL(ours, base) |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for rate in args.lr:
        with tempfile.TemporaryDirectory() as folder:
            measure(args, rate, Path(folder))


def measure(args: argparse.Namespace, rate: float, folder: Path) -> None:
    rows = [
        {"prompt": f"What is the capital of {land}?", "demonstration": f"The capital of {land} is {city}."}
        for land, city in CAPITALS.items()
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.name": args.model,
        "lora.rank": args.rank,
        "data.train": str(folder / "data.jsonl"),
        "teacher.context": "as_turns",
        "teacher.ema_alpha": args.alpha,
        "rollout.max_new_tokens": 12,
        "optim.lr": rate,
        "optim.schedule": "constant",
        "train.output": str(folder),
        "train.steps": args.steps,
        "train.batch_size": len(rows),
    }
    with contextlib.redirect_stdout(None):
        run = set_up(override(Config(), settings), folder)
    assert run.teacher is not None
    layers = lora_layers(run)
    first = [layer.lora_A[lora.EARLIER].weight.detach().clone() for layer in layers]
    exact = [delta(layer) for layer in layers]  # zero, because B is zero
    for step in range(1, args.steps + 1):
        line = train_step(run, step - 1, folder)
        for average, layer in zip(exact, layers, strict=True):
            average.lerp_(delta(layer), args.alpha)
        if step % 20 == 0:
            with run.teacher.weights():
                ours = [delta(layer) for layer in layers]
            lag = norm([a - b for a, b in zip(ours, exact, strict=True)]) / norm(exact)
            moved = [layer.lora_A[lora.EARLIER].weight.detach() - a for layer, a in zip(layers, first, strict=True)]
            kls = divergences(run, layers, exact)
            cells = " | ".join(f"{kl:.1e}" for kl in kls)
            print(
                f"| {rate:g} | {step} | {line['loss']:.3f} | {lag:.2%} | {norm(moved) / norm(first):.2%} | {cells} |",
                flush=True,
            )


def lora_layers(run: Run) -> list[Any]:
    return [module for module in run.model.inner.modules() if hasattr(module, "lora_A")]


def delta(layer: Any) -> Tensor:
    """scale B A (out, in) of the layer's present factors."""
    return layer.get_delta_weight(lora.EARLIER).detach()


def norm(tensors: list[Tensor]) -> float:
    return torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt().item()


@contextlib.contextmanager
def exact_teacher(run: Run, layers: list[Any], deltas: list[Tensor]) -> Iterator[None]:
    """Inside the context, the model is the base with `deltas` added to its weights, and its adapter is off."""
    saved = [layer.base_layer.weight.data for layer in layers]
    for layer, weight, change in zip(layers, saved, deltas, strict=True):
        layer.base_layer.weight.data = weight + change
    with lora.switched_off(run.model.lm):
        yield
    for layer, weight in zip(layers, saved, strict=True):
        layer.base_layer.weight.data = weight


def divergences(run: Run, layers: list[Any], exact: list[Tensor]) -> tuple[float, float, float]:
    model, examples = run.model, run.data.examples
    batch = lay_out([e.teacher_prompt for e in examples], [e.target for e in examples], model.pad_id, model.device)

    @torch.no_grad()
    def log_probabilities() -> Tensor:  # (N, V)
        hidden = batch.select(model.hidden(batch.input_ids, batch.lengths))
        return model.head().logits(hidden).double().log_softmax(-1)

    def kl(p: Tensor, q: Tensor) -> float:
        return (p.exp() * (p - q)).sum(-1).mean().item()

    assert run.teacher is not None
    compute, model.compute_dtype = model.compute_dtype, torch.float32
    student = log_probabilities()
    with run.teacher.weights():
        ours = log_probabilities()
    with exact_teacher(run, layers, exact):
        precise = log_probabilities()
    with lora.switched_off(model.lm):
        base = log_probabilities()
    model.compute_dtype = compute
    return kl(precise, ours), kl(ours, student), kl(ours, base)


if __name__ == "__main__":
    main()
