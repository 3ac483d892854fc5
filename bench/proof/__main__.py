"""The proof on one GPU: `make gpu-proof`. It takes at most 590 seconds, no network and no options.

    python -m bench.proof                          everything, into bench/results/<device>.json, .md and pictures
    python -m bench.proof --only values,ours       some phases (see bench/proof/phases.py)
    python -m bench.proof --tiny                   the same program on the CPU, small, with Triton's interpreter

Each phase runs in a separate process and has a time budget; time that a phase does not use goes to the next phases. If
an item raises, its traceback is recorded. If an item kills its process or the CUDA context, this is recorded too, and
the rest of the phase runs in a new process. <device>.jsonl is written after every item, the other files after every
phase, so a run that is cut off keeps all results. The exit status is 1 if a value is wrong or an item failed.
`python -m bench.proof.report FILE.json` writes the tables and pictures of a file again.
"""

import argparse
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import report
from .phase import Place, Stream
from .phases import PHASES, WHOLE, WRITING, Phase
from .run import ROOT, run_phase


def deadlines(phases: list[Phase], begin: float, seconds: float) -> list[float]:
    """The end of each phase, in time.monotonic(): `seconds` in all, divided in the shares of PHASES."""
    share = (seconds - WRITING * min(1.0, seconds / WHOLE)) / sum(phase.seconds for phase in phases)
    ends, at = [], begin
    for phase in phases:
        at += phase.seconds * share
        ends.append(at)
    return ends


def chosen(names: str) -> list[Phase]:
    """The phases with these names, in the order of PHASES; all for an empty string."""
    wanted = [name for name in names.split(",") if name]
    known = [phase.name for phase in PHASES]
    for name in wanted:
        if name not in known:
            raise SystemExit(f"--only {name!r}: no such phase; there are {', '.join(known)}")
    return [phase for phase in PHASES if not wanted or phase.name in wanted]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.proof", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the folder of the results; bench/results, or runs/proof with --tiny")
    parser.add_argument("--only", default="", metavar="PHASES", help=", ".join(phase.name for phase in PHASES))
    parser.add_argument("--seconds", type=float, default=WHOLE, help="time of the whole program")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with small sizes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    begin, phases = time.monotonic(), chosen(args.only)
    device, stem = report.device_of(args.tiny)
    out = args.out or ROOT / ("runs/proof" if args.tiny else "bench/results")
    out.mkdir(parents=True, exist_ok=True)
    stream, log = Stream(out / f"{stem}.jsonl"), out / f"{stem}.log"
    for old in (stream.path, log):
        old.unlink(missing_ok=True)
    command = shlex.join(["python", "-m", "bench.proof", *(sys.argv[1:] if arguments is None else arguments)])
    stream.write("run", command=command, tiny=args.tiny)
    with tempfile.TemporaryDirectory(prefix="sdft-proof-") as scratch:
        for phase, end in zip(phases, deadlines(phases, begin, args.seconds), strict=True):
            started = time.monotonic()
            run_phase(phase, Place(device, args.tiny, end, Path(scratch)), stream, log)
            found = report.write(out / stem, stream.read())
            print(report.line(found, phase.name, time.monotonic() - started), flush=True)
    found = report.write(out / stem, stream.read(), pictures=True)
    print(report.summary(found), f"\n{time.monotonic() - begin:.0f} s; {out / stem}.md", flush=True)
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the phase's process too
    sys.exit(1 if report.faults(main()) else 0)
