"""What a loss costs by arithmetic: FLOPs, bytes and time of every kernel of a call, and its bound.

    python -m bench.roofline                                        Qwen2.5-7B, trained, on an H100, as shipped
    python -m bench.roofline --model Gemma-3-1B --head frozen --device H200 --workspace 512
    python -m bench.roofline --compare                              every design on that shape
    python -m bench.roofline --tables                               the bounds of docs/kernels.md
    python -m bench.roofline --measured bench/results/DEVICE.json   predicted and measured time, phase by phase

bench/costs.py holds the model.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from .costs import DESIGNS, DEVICES, MIB, Cost, Device, cost, default_workspace, wire_bytes
from .shapes import HEADS, Shape

TB, TFLOP = 1e12, 1e12
MODELS = ("Qwen2.5-7B", "Llama-3.1-8B", "Gemma-3-1B", "SmolLM2-135M")
WORKSPACES = (None, 256, 512, 1024, 2048)  # MiB; None is the default
TOKENS = 16_384


def head_shape(model: str, head: str = "trained", tokens: int = TOKENS, **changes: bool | str) -> Shape:
    vocab, hidden = HEADS[model]
    return replace(Shape(tokens, vocab, hidden, trained=head == "trained"), **changes)  # type: ignore[arg-type]


def phase_table(made: Cost) -> Iterator[str]:
    """A line for each phase of a call, then the bound."""
    yield "| phase | TFLOP | GB | ms | of the call |"
    yield "|---|---:|---:|---:|---:|"
    for phase in made.phases():
        ms, share = phase.seconds * 1e3, phase.seconds / made.seconds
        yield f"| {phase.name} | {phase.flops / TFLOP:.1f} | {phase.bytes / 1e9:.1f} | {ms:.1f} | {share:.0%} |"
    yield (
        f"| sum | {sum(p.flops for p in made.phases()) / TFLOP:.1f} | {sum(p.bytes for p in made.phases()) / 1e9:.1f} "
        f"| {made.seconds * 1e3:.1f} | bare products {made.bare_seconds * 1e3:.1f} ms: {made.bound:.0%} |"
    )


def workspace_table(devices: tuple[str, ...] = ("H100", "H200")) -> Iterator[str]:
    """The bound of the shipped loop by workspace."""
    names = [f"default ({' / '.join(f'{default_workspace(DEVICES[d]) / MIB:.0f}' for d in devices)} MiB)"]
    names += [f"{size} MiB" for size in WORKSPACES if size is not None]
    yield f"| {' / '.join(devices)} | {' | '.join(names)} |"
    yield "|---|" + "---:|" * len(names)
    for model, head, cast in (
        *((model, head, False) for model in MODELS for head in ("trained", "frozen")),
        *((model, "trained", True) for model in (MODELS[0], MODELS[-1])),
    ):
        shape = head_shape(model, head, cast=cast)
        cells = [
            " / ".join(f"{cost(shape, DEVICES[d], workspace=size and size * MIB).bound:.0%}" for d in devices)
            for size in WORKSPACES
        ]
        yield f"| {model}, {head}{', fp32 under autocast' if cast else ''} | {' | '.join(cells)} |"


def design_table(devices: tuple[str, ...] = ("H100", "H200")) -> Iterator[str]:
    """The bound of every design at the default workspace."""
    yield f"| {' / '.join(devices)} | {' | '.join(DESIGNS)} |"
    yield "|---|" + "---:|" * len(DESIGNS)
    for model in MODELS:
        for head in ("trained", "frozen"):
            shape = head_shape(model, head)
            cells = [" / ".join(f"{cost(shape, DEVICES[d], name).bound:.0%}" for d in devices) for name in DESIGNS]
            yield f"| {model}, {head} | {' | '.join(cells)} |"


def tables() -> str:
    """The block of docs/kernels.md."""
    call = cost(head_shape(MODELS[0]), DEVICES["H100"])
    rates = "; ".join(
        f"{d.name} {d.narrow / TFLOP:.0f} TFLOP/s, {d.bandwidth / TB:.1f} TB/s" for d in list(DEVICES.values())[:2]
    )
    return "\n".join([
        f"Largest possible share of the bare products by workspace, bf16, {TOKENS} tokens ({rates}):", "",
        *workspace_table(), "",
        "The same at the default workspace, by design (`python -m bench.roofline --help` names them):", "",
        *design_table(), "",
        f"One call of {MODELS[0]}, trained, on an H100, in chunks of {call.chunk} tokens:", "",
        *phase_table(call),
    ])  # fmt: skip


def measured_table(path: Path) -> Iterator[str]:
    """Predicted and measured milliseconds, phase by phase, of the JSON file of a proof."""
    import json

    from .proof.report import rows_of

    rows = [row for row in rows_of(json.loads(path.read_text()), "kernels") if "phase" in row]
    yield "| call | phase | predicted ms | measured ms | measured / predicted |"
    yield "|---|---|---:|---:|---:|"
    for row in rows:
        who = f"{row['model']}, {row['head']}, N = {row['N']}, {row['impl']}"
        predicted = row.get("predicted ms")
        more = (
            f"{predicted:.3g} | {row['ms']:.3g} | {row['ms'] / predicted:.2f}"
            if predicted
            else f" | {row['ms']:.3g} | "
        )
        yield f"| {who} | {row['phase']} | {more} |"


def measured_cpu() -> Device:
    """This machine: its rate of a 1024^3 fp32 product and of a copy."""
    import statistics
    import time

    import torch

    def seconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    a = torch.randn(1024, 1024)
    source = torch.randn(2**26)
    rate = 2.0 * 1024**3 / seconds(lambda: a @ a)
    bandwidth = 2.0 * source.nbytes / seconds(source.clone)
    return Device("CPU", rate, rate, bandwidth, None, "measured now, fp32")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    designs = "\n".join(f"    {name:10s} {(made.__doc__ or '').strip()}" for name, made in DESIGNS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{__doc__}\nDesigns:\n{designs}",
    )  # fmt: skip
    parser.add_argument("--model", default=MODELS[0], choices=list(HEADS))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--head", default="trained", choices=["trained", "frozen"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shared", action="store_true", help="teacher and student have one head")
    parser.add_argument("--cast", action="store_true", help="fp32 heads that autocast rounds to --dtype")
    parser.add_argument("--device", default="H100", choices=[*DEVICES, "CPU"], help="CPU: this machine, measured now")
    parser.add_argument("--design", default="chunked", choices=list(DESIGNS))
    parser.add_argument("--workspace", type=int, metavar="MIB", help="the device's default if not given")
    parser.add_argument("--ranks", type=int, default=1, help="of a head split by vocabulary: the bytes that each sends")
    parser.add_argument("--compare", action="store_true", help="every design on this shape")
    parser.add_argument("--tables", action="store_true", help="the tables of docs/kernels.md")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="the JSON file of `make gpu-proof`")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.tables:
        print(tables())
        return
    if args.measured:
        print("\n".join(measured_table(args.measured)))
        return
    device = measured_cpu() if args.device == "CPU" else DEVICES[args.device]
    shape = head_shape(args.model, args.head, args.tokens, dtype=args.dtype, shared=args.shared, cast=args.cast)
    workspace = None if args.workspace is None else args.workspace * MIB
    print(f"{args.model}, {shape}\n{device.name}: {device.source}\n")
    for name in DESIGNS if args.compare else [args.design]:
        made = cost(shape, device, name, workspace)
        print(f"{name}, chunks of {made.chunk} tokens\n")
        print("\n".join(phase_table(made)), end="\n\n")
    if args.ranks > 1:
        sent = ", ".join(f"{what} {count / MIB:.1f} MiB" for what, count in wire_bytes(shape, args.ranks).items())
        print(f"{args.ranks} ranks, each with a part of the vocabulary, send in one call: {sent}")


if __name__ == "__main__":
    main()
