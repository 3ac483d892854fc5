"""Runs a phase in separate processes, so that nothing in a phase can end the proof."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .phase import LOST, OUT_OF_TIME, Place, Stream
from .phases import Phase

ROOT = Path(__file__).parents[2]


def run_phase(phase: Phase, place: Place, stream: Stream, log: Path) -> None:
    """Runs all items of a phase before place.deadline; every item gets an event."""
    with ThreadPoolExecutor(phase.processes) as pool:
        list(pool.map(lambda part: run_part(phase, place, stream, log, part), range(phase.processes)))


def run_part(phase: Phase, place: Place, stream: Stream, log: Path, part: int) -> None:
    """Every phase.processes-th item from number `part` on, in as many processes as it takes."""
    first = part
    while True:
        code = in_process(phase, place, first, stream, log)
        events = [event for event in stream.read() if event.get("phase") == phase.name]
        names = next((event["items"] for event in events if event["event"] == "phase"), None)
        if names is None:  # the list could not be made
            if part == 0:
                stream.write("skipped", phase=phase.name, item="start", number=0, error=ending(code, log))
            return
        mine = range(part, len(names), phase.processes)
        done = {event["number"] for event in events if event["event"] in ("ends", "skipped")}
        begun = [event["number"] for event in events if event["event"] == "begins"]
        cut = next((number for number in mine if number in begun and number not in done), None)
        rest = [number for number in mine if number not in done and number != cut]
        if (
            cut is None and rest and code not in (0, LOST, None)
        ):  # it ended before its first item, and a new process would too
            cut, rest = rest[0], rest[1:]
        if cut is not None:
            stream.write("skipped", phase=phase.name, item=names[cut], number=cut, error=ending(code, log))
        if code is None or place.left() < 0:
            for number in rest:
                stream.write("skipped", phase=phase.name, item=names[number], number=number, error=OUT_OF_TIME)
            return
        if not rest:
            return
        first = rest[0]


def in_process(phase: Phase, place: Place, first: int, stream: Stream, log: Path) -> int | None:
    """The exit status of a process that runs the phase from item `first` on; None if its time was over."""
    told = {
        "name": phase.name,
        "module": phase.module,
        "first": first,
        "processes": phase.processes,
        "stream": str(stream.path),
    }
    told |= {"device": place.device, "tiny": place.tiny, "deadline": place.deadline, "scratch": str(place.scratch)}
    command = [sys.executable, "-m", "bench.proof.child", json.dumps(told)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if place.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"  # Triton reads the variable when a kernel is defined
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
        finally:  # also if this process is terminated; the group includes processes that the phase started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def ending(code: int | None, log: Path) -> str:
    """How a process ended, for the event of its last item."""
    if code is None:
        return "cut off: the phase's time was over"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"the process ended with status {code}\n" + "\n".join(lines[-12:])
