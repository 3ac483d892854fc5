"""The parts of a phase, and the stream of events: the rows of an item are on disk before the next item begins.

The stream is a file of JSON lines, one event a line:

    {"event": "phase", "phase": NAME, "items": [names]}
    {"event": "begins", "phase": NAME, "item": name, "number": n}
    {"event": "ends", "phase": NAME, "item": name, "number": n, "rows": [...], "seconds": s, "error": traceback or null}
    {"event": "skipped", "phase": NAME, "item": name, "number": n, "error": why}
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Event = dict[str, Any]

LOST = 3  # exit status of a phase's process whose CUDA context is broken
OUT_OF_TIME = "not run: the phase's time was over"


@dataclass(frozen=True)
class Place:
    """Where the items of a phase run."""

    device: str  # cuda, or cpu
    tiny: bool  # small shapes, so that the CPU and Triton's interpreter take seconds
    deadline: float = float("inf")  # in time.monotonic(), which all processes of a machine share
    scratch: Path = Path("/nonexistent")  # a folder that all phases share, for random models

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Item:
    """One thing to run. `run` appends each row as soon as it is measured. An exception becomes the item's error."""

    name: str
    run: Callable[[list[Row]], None]


class Stream:
    """The file of events. Each is flushed to the disk at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **fields: Any) -> None:
        line = (json.dumps({"event": event, **fields}) + "\n").encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)  # whole: processes of one phase write at the same time
            os.fsync(file)
        finally:
            os.close(file)

    def read(self) -> list[Event]:
        """All events, without a last line that was cut off."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found
