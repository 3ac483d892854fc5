"""The process of a phase: `python -m bench.proof.child JSON`; `run.in_process` writes the JSON."""

import gc
import importlib
import json
import sys
import time
import traceback
from pathlib import Path

from .phase import LOST, OUT_OF_TIME, Item, Place, Row, Stream


def work(phase: str, items: list[Item], place: Place, mine: range, stream: Stream) -> None:
    """Runs the items with these numbers in this process. Exits with LOST if the GPU no longer works."""
    for number, item in enumerate(items):
        if number not in mine:
            continue
        who = {"phase": phase, "item": item.name, "number": number}
        if place.left() < 0:
            stream.write("skipped", **who, error=OUT_OF_TIME)
            continue
        stream.write("begins", **who)
        start, error = time.monotonic(), None
        rows: list[Row] = []
        try:
            item.run(rows)
        except Exception:
            error = traceback.format_exc(limit=-8)
        stream.write("ends", **who, rows=rows, seconds=round(time.monotonic() - start, 3), error=error)
        if error is not None and place.device == "cuda" and not device_answers():
            sys.exit(LOST)
        gc.collect()


def device_answers() -> bool:
    """False after an illegal memory access: then every CUDA call of the process fails."""
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main(text: str) -> None:
    told = json.loads(text)
    place = Place(told["device"], told["tiny"], told["deadline"], Path(told["scratch"]))
    stream, name = Stream(Path(told["stream"])), told["name"]
    items = importlib.import_module(told["module"]).items(place)
    if not any(event["event"] == "phase" and event["phase"] == name for event in stream.read()):
        stream.write("phase", phase=name, items=[item.name for item in items])
    work(name, items, place, range(told["first"], len(items), told["processes"]), stream)


if __name__ == "__main__":
    main(sys.argv[1])
