"""The whole benchmark in one command: `python -m bench.gpu` (`make bench-gpu`), under 8 minutes on one GPU.

Results are written after every case, so that a kill or a broken CUDA context loses none that is finished.
--sweep times our own loss over chunk_bytes and tiles instead. --device cpu runs tiny shapes, to test all this.
"""

import argparse
import re
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import torch
from sdft_kernels import tuning

from .cases import GPU_CASES, SWEEP_CASES, TINY_CASES, Case
from .measure import SKIPPED, Cpu, Cuda, DeviceLostError, Row, applies, reason, run_case
from .peers import VARIANTS, Loss, Variant, ours
from .report import RESULTS, describe, stem_of, summary, write

MIB = 2**20
SWEEP_MIB = (64, 128, 256, 512, 1024, 2048)
SWEEP_ROWS = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 16))  # tile and warps of row_kernel


def sweep_variants(device: Cpu | Cuda) -> list[Variant]:
    """Ours at every chunk size, in each implementation meant for the device, and at every tile of row_kernel."""
    impls = ("triton",) if device.name == "cuda" else ("torch",)
    tiles = SWEEP_ROWS if device.name == "cuda" else ()
    return [
        Variant(f"sdft_kernels triton, tile {block}, {warps} warps", partial(with_row_blocks, block, warps))
        for block, warps in tiles
    ] + [
        Variant(f"sdft_kernels {impl}, {mib} MiB", partial(ours, impl=impl, chunk_bytes=mib * MIB))
        for impl in impls
        for mib in SWEEP_MIB
    ]


def with_row_blocks(block: int, warps: int, name: str) -> Loss:
    """Ours with another tile and number of warps than tuning.py's."""
    loss = ours(name, impl="triton")

    def step(*tensors: torch.Tensor) -> torch.Tensor:
        kept = dict(tuning.ROW_BLOCKS)
        tuning.ROW_BLOCKS.update(dict.fromkeys(kept, tuning.RowBlocks(block, warps, warps)))
        try:
            return loss(*tensors)
        finally:
            tuning.ROW_BLOCKS.update(kept)

    return step


def measure(
    cases: list[Case], device: Cpu | Cuda, variants: list[Variant], path: Path, meta: dict, budget: float
) -> list[Row]:
    """Run the cases in order until `budget` seconds are over; the rest become rows that say so."""
    rows: list[Row] = []
    start = time.monotonic()
    stopped = ""
    for case in cases:
        began = time.monotonic()
        if not stopped and began - start > budget:
            stopped = SKIPPED
        if stopped:
            wanted = [v for v in variants if applies(v, case, device)]
            rows += [case.label() | {"variant": v.name, "note": stopped} for v in wanted]
            continue
        try:
            run_case(case, device, rows, start + budget, variants)
        except DeviceLostError as lost:
            stopped = f"skipped: the device failed in {lost}"
            explain(rows, stopped)
            print(f"The device failed in {lost}. Without it: --variants '^(?!{lost})'")
        except Exception as error:  # the problem or its truth did not fit, say
            explain(rows, reason(error))
        print(f"{time.monotonic() - began:6.1f} s  {case}", flush=True)
        write(path, meta, rows)
    return rows


def explain(rows: list[Row], note: str) -> None:
    """Give the note to the rows that have neither a time nor a note."""
    for row in rows:
        if "ms" not in row:
            row.setdefault("note", note)


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no variant is begun")
    parser.add_argument("--sweep", action="store_true", help="ours over chunk_bytes and tiles, into NAME-sweep.json")
    parser.add_argument("--cases", default="", metavar="REGEX", help='as printed: "SmolLM2.* 4096 bfloat16"')
    parser.add_argument("--variants", default="", metavar="REGEX", help='for example "sdft_kernels|Liger"')
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args(arguments)

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu runs tiny shapes")
    device = Cpu() if args.device == "cpu" else Cuda()
    cases = TINY_CASES if args.device == "cpu" else SWEEP_CASES if args.sweep else GPU_CASES
    cases = [case for case in cases if re.search(args.cases, str(case))]
    if not cases:
        parser.error(f"--cases {args.cases!r} matches none")
    variants = sweep_variants(device) if args.sweep else VARIANTS
    given = sys.argv[1:] if arguments is None else arguments
    meta = describe(shlex.join(["python", "-m", "bench.gpu", *given]))
    name = stem_of(meta) + "-tiny" * (args.device == "cpu") + "-sweep" * args.sweep
    variants = [variant for variant in variants if re.search(args.variants, variant.name)]
    rows = measure(cases, device, variants, args.results / name, meta, args.budget)
    write(args.results / name, meta, rows, pictures=not args.sweep)
    print(summary(rows))
    return rows


if __name__ == "__main__":
    main()
