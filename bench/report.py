"""Results as JSON, as a Markdown table, and as a summary for a terminal.

`python -m bench.report bench/results/NAME.json` writes the table of a JSON file again.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from .measure import Row

RESULTS = Path(__file__).parent / "results"
LABELS = ("model", "V", "H", "N", "dtype", "divergence", "head")
COLUMNS = {  # key of a row: (heading, format)
    "ms": ("ms", ".3g"),
    "spread": ("p10 to p90", ""),
    "rounds": ("rounds", "d"),
    "of the floor": ("of the bare GEMMs", ".0%"),
    "of the strict floor": ("without allocation", ".0%"),
    "bound": ("bound", ".0%"),
    "extra MB": ("extra MB", ".0f"),
    "D error": ("D error", ".0e"),
    "dX error": ("dX error", ".0e"),
    "dW error": ("dW error", ".0e"),
}
PACKAGES = ("triton", "transformers", "liger-kernel", "trl", "fla-core")
SUMMARY_CHARACTERS = 11_000


def device_name() -> str:
    """The name of the GPU, or of the processor without one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def output_of(*command: str) -> str:
    """The first line that a program prints, or "" if it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def describe(command: str, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Device, versions and commit of the rows. The variable COMMIT gives the commit if the checkout has no git."""
    meta: dict[str, Any] = {
        "device": device_name(),
        "commit": os.environ.get("COMMIT") or output_of("git", "rev-parse", "--short", "HEAD") or "unknown",
        "date": date.today().isoformat(),
        "command": command,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in packages:
        try:
            meta[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            meta[name] = "missing"
    if torch.cuda.is_available():
        meta["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        meta["threads"] = torch.get_num_threads()
        meta["load average"] = f"{os.getloadavg()[0]:.1f}"
    return meta


def stem_of(meta: dict[str, Any]) -> str:
    """The name of a device's result files."""
    if "threads" in meta:
        return f"cpu-{platform.machine()}-{meta['threads']}threads"
    return re.sub(r"[^a-z0-9]+", "-", meta["device"].lower()).strip("-")


def write(path: Path, meta: dict[str, Any], rows: list[Row]) -> None:
    """path.json and path.md; copies in $OUT if that is set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(".json"), path.with_suffix(".md")]
    files[0].write_text(json.dumps(meta | {"rows": rows}, indent=1) + "\n")
    files[1].write_text(markdown(meta, rows))
    if out := os.environ.get("OUT"):
        for file in files:
            shutil.copy(file, out)


def markdown(meta: dict[str, Any], rows: list[Row]) -> str:
    """A paragraph on the run, then a table for each case."""
    lines = ["; ".join(f"{k} {v}" for k, v in meta.items()) + ".", ""]
    lines += [
        "Forward and backward of one call; median of the rounds, all variants of a case interleaved. Extra MB: the",
        "peak during the call less what was there before, dX, and dW in fp32. Errors: relative, against float64, on",
        "peaked logits with the teacher near the student, on the first rows if the case is large.",
    ]
    return "\n".join([*lines, *case_tables(rows)]) + "\n"


def case_tables(rows: list[Row]) -> Iterator[str]:
    """A table for each case; columns that no row has are left out."""
    columns = {key: column for key, column in COLUMNS.items() if key == "spread" or any(key in row for row in rows)}
    for label, group in by_case(rows):
        yield from ("", f"**{label}**", "", "| variant | " + " | ".join(h for h, _ in columns.values()) + " | note |")
        yield "|---|" + "---:|" * len(columns) + "---|"
        for row in group:
            numbers = [cell(row, key, form) for key, (_, form) in columns.items()]
            yield "| " + " | ".join([row["variant"], *numbers, row.get("note", "")]) + " |"


def by_case(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Groups of rows by case. Rows of one case must follow each other."""
    groups = groupby(rows, key=lambda row: [row[k] for k in LABELS])
    return [("{} ({} × {}), N = {}, {}, {}, head {}".format(*label), list(group)) for label, group in groups]


def cell(row: Row, key: str, form: str) -> str:
    if key == "spread":
        return f"{plain(row['p10'], '.3g')} to {plain(row['p90'], '.3g')}" if "p10" in row else ""
    return "" if row.get(key) is None else plain(row[key], form)


def plain(value: float, form: str) -> str:
    """Three digits, but 1230 rather than 1.23e+03."""
    return f"{value:.0f}" if form == ".3g" and value >= 1000 else format(value, form)


def summary(rows: list[Row]) -> str:
    """A line for each case, a column for each variant: milliseconds, share of the floor. Cut at SUMMARY_CHARACTERS."""
    names = [n for n in dict.fromkeys(row["variant"] for row in rows) if n != "bare GEMMs, no allocation"]
    lines = [
        "ms and bare GEMMs' time / its time; ~ inexact, OOM out of memory, x raises, - missing, skipped, not run",
        *(f"[{i}] {name}" for i, name in enumerate(names)),
        " | ".join(["case", *(f"[{i}]" for i in range(len(names)))]),
    ]
    for _, group in by_case(rows):
        found = {row["variant"]: brief(row) for row in group}
        label = " ".join(str(group[0][k]) for k in LABELS if k not in "VH")
        lines.append(" | ".join([label, *(found.get(name, "-") for name in names)]))
    text = "\n".join(lines)
    return text if len(text) <= SUMMARY_CHARACTERS else text[:SUMMARY_CHARACTERS] + "\n(cut off)"


def brief(row: Row) -> str:
    note = row.get("note", "")
    if "ms" in row:
        share = f" {row['of the floor']:.0%}" if "of the floor" in row else ""
        return plain(row["ms"], ".3g") + share + "~" * note.startswith("inexact")
    return "OOM" if note.startswith("out of memory") else "x" if note.startswith("raises") else "-"


if __name__ == "__main__":
    source = Path(sys.argv[1])
    saved = json.loads(source.read_text())
    write(source.with_suffix(""), {k: v for k, v in saved.items() if k != "rows"}, saved["rows"])
