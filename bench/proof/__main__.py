"""The proof on one GPU: `make gpu-proof`, at most 590 seconds, no network, nothing to choose.

    python -m bench.proof                          everything, into bench/results/<device>.json, .md and pictures
    python -m bench.proof --only values,ours       some phases (see bench/proof/phases.py)
    python -m bench.proof --tiny                   the same program on the CPU, small, with Triton's interpreter

Each phase runs in a process of its own and has a time budget; time that a phase leaves over belongs to the next ones.
An item that raises is recorded with its traceback, an item that kills its process or the CUDA context is recorded too,
and the rest of the phase runs in a new process. <device>.jsonl is written item by item, the other files after every
phase: a run that is cut off leaves all that it measured. `python -m bench.proof.report FILE.json` writes the tables and
pictures of a file again.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import report
from .phase import LOST, OUT_OF_TIME, Place, Stream, work
from .phases import PHASES, WHOLE, WRITING, Phase

ROOT = Path(__file__).parents[2]


def run_phase(phase: Phase, place: Place, stream: Stream, log: Path) -> None:
    """Runs all items of a phase before place.deadline, in as many processes as it takes; every item gets an event."""
    first = 0
    while True:
        code = in_process(phase, place, first, stream, log)
        events = [event for event in stream.read() if event.get("phase") == phase.name]
        names = next((event["items"] for event in events if event["event"] == "phase"), None)
        if names is None:
            stream.write("phase", phase=phase.name, items=["start"], seconds=phase.seconds)
            stream.write("skipped", phase=phase.name, item="start", number=0, error=ending(code, log))
            return
        done = {event["number"] for event in events if event["event"] in ("ends", "skipped")}
        begun = max((event["number"] for event in events if event["event"] == "begins"), default=-1)
        if begun not in done and begun >= 0:
            stream.write("skipped", phase=phase.name, item=names[begun], number=begun, error=ending(code, log))
            done.add(begun)
        rest = [number for number in range(len(names)) if number not in done]
        if code is None or not rest or place.left() < 0:
            for number in rest:
                stream.write("skipped", phase=phase.name, item=names[number], number=number, error=OUT_OF_TIME)
            return
        if code not in (0, LOST) and rest[0] == first:  # no item was reached: the next process would end alike
            stream.write("skipped", phase=phase.name, item=names[first], number=first, error=ending(code, log))
            rest = rest[1:]
            if not rest:
                return
        first = rest[0]


def in_process(phase: Phase, place: Place, first: int, stream: Stream, log: Path) -> int | None:
    """The exit status of a process that runs the phase from item `first` on; None if its time was over."""
    command = [sys.executable, "-m", "bench.proof", "--phase", phase.name, str(first), str(place.deadline)]
    command += ["--out", str(stream.path), *(["--tiny"] if place.tiny else []), "--device", place.device]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if place.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined
    with log.open("a") as file:
        file.write(f"\n== {phase.name} from item {first}\n")
        file.flush()
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            return child.wait(max(1.0, place.left() + 1))
        except subprocess.TimeoutExpired:
            return None
        finally:  # also if this process is told to end; the group holds what the phase started itself
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()


def ending(code: int | None, log: Path) -> str:
    """How a process ended, for the event of its last item."""
    if code is None:
        return "cut off: the phase's time was over"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"the process ended with status {code}\n" + "\n".join(lines[-12:])


def deadlines(phases: list[Phase], begin: float, seconds: float) -> list[float]:
    """The end of each phase, in time.monotonic(): in the shares of PHASES, `seconds` in all."""
    share = (seconds - WRITING * min(1.0, seconds / WHOLE)) / sum(phase.seconds for phase in phases)
    ends, at = [], begin
    for phase in phases:
        at += phase.seconds * share
        ends.append(at)
    return ends


def chosen(names: str) -> list[Phase]:
    """The phases named, in their own order; all for an empty string."""
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
    parser.add_argument("--seconds", type=float, default=WHOLE, help="of the whole program")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, in miniature")
    parser.add_argument("--phase", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    if args.phase:
        name, first, deadline = args.phase
        (phase,) = chosen(name)
        stream, place = Stream(args.out), Place(args.device, args.tiny, float(deadline))
        items = phase.items(place)
        if not any(e["event"] == "phase" and e["phase"] == name for e in stream.read()):
            stream.write("phase", phase=name, items=[item.name for item in items], seconds=phase.seconds)
        work(name, items, place, int(first), stream)
        return {}
    begin = time.monotonic()
    phases = chosen(args.only)
    device, stem = report.device_of(args.tiny)
    out = args.out or ROOT / ("runs/proof" if args.tiny else "bench/results")
    out.mkdir(parents=True, exist_ok=True)
    stream, log = Stream(out / f"{stem}.jsonl"), out / f"{stem}.log"
    for old in (stream.path, log):
        old.unlink(missing_ok=True)
    command = shlex.join(["python", "-m", "bench.proof", *(sys.argv[1:] if arguments is None else arguments)])
    stream.write("run", command=command, commit=report.commit(), tiny=args.tiny)
    for phase, end in zip(phases, deadlines(phases, begin, args.seconds), strict=True):
        started = time.monotonic()
        run_phase(phase, Place(device, args.tiny, end), stream, log)
        found = report.write(out / stem, stream.read())
        print(report.line(found, phase.name, time.monotonic() - started), flush=True)
    found = report.write(out / stem, stream.read(), pictures=True)
    print(report.summary(found), f"\n{time.monotonic() - begin:.0f} s; {out / stem}.md", flush=True)
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the phase's process too
    main()
