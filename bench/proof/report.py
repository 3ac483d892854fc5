"""The stream of events as one JSON file, Markdown tables and pictures.

`python -m bench.proof.report bench/results/DEVICE.json` writes the tables and pictures of a file again.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .. import report as tables
from ..costs import DEVICES, Device, cost
from ..shapes import Shape
from ..step import COLUMNS as STEP_COLUMNS
from ..step import compare
from . import pictures as drawings
from .phase import OUT_OF_TIME, Event, Row
from .phases import PHASES

Found = dict[str, Any]  # the JSON file
FORMATS = {"ms": ".3g", "TFLOP/s": ".3g", "TB/s": ".3g", "error": ".1e", "bound": ".1e", "tokens/s": ".0f"}


def device_of(tiny: bool) -> tuple[str, str]:
    """The device (cuda or cpu) and the name of its files. The GPU's memory stays untouched: a phase needs all of it."""
    import torch

    if tiny:
        return "cpu", tables.stem_of(tables.describe("", ())) + "-tiny"
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --tiny runs the same program on the CPU, in miniature")
    name = tables.output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "gpu"
    return "cuda", re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def collect(events: Iterable[Event]) -> Found:
    """Events -> {"meta", "phases": {name: [{"item", "rows", "seconds", "error"}]}}, in the order of the run."""
    found: Found = {"meta": {}, "phases": {}}
    for event in events:
        if event["event"] == "run":
            found["meta"] |= {key: event[key] for key in ("command", "tiny")}
        if event["event"] == "phase":
            found["phases"].setdefault(event["phase"], [])
        if event["event"] in ("ends", "skipped"):
            entry = {key: event.get(key) for key in ("item", "number", "error")}
            entry |= {"rows": event.get("rows", []), "seconds": event.get("seconds", 0.0)}
            found["phases"].setdefault(event["phase"], []).append(entry)
    for entries in found["phases"].values():
        entries.sort(key=lambda entry: entry["number"])  # the processes of a phase end in any order
    for row in rows_of(found, "machine", "versions"):
        found["meta"] = row | found["meta"]
    predict(found)
    compare(rows_of(found, "steps"))
    return found


def rows_of(found: Found, phase: str, item: str = "") -> list[Row]:
    return [row for entry in found["phases"].get(phase, []) if item in ("", entry["item"]) for row in entry["rows"]]


def measured_device(found: Found) -> Device | None:
    """The machine's rates for the model of the costs; None if they were not measured."""
    rates = {row["what"].partition(" ")[0]: row for row in rows_of(found, "machine", "rates")}
    if not {"bfloat16", "float32", "copy"} <= rates.keys():
        return None
    like = DEVICES["H200"] if "H200" in found["meta"].get("device", "") else DEVICES["H100"]
    return Device(
        found["meta"].get("device", "this machine"), rates["bfloat16"]["TFLOP/s"] * 1e12,
        rates["float32"]["TFLOP/s"] * 1e12, rates["copy"]["TB/s"] * 1e12,
        int(found["meta"].get("memory", like.memory)), "measured by the proof", int(found["meta"].get("cluster", 1)),
    )  # fmt: skip


def shape_of(row: Row) -> Shape:
    """The shape of a row that bench.cases labelled."""
    cast = bool(row.get("trainer"))
    dtype = "bfloat16" if cast else row["dtype"]
    return Shape(row["N"], row["V"], row["H"], dtype, row["head"] == "trained", cast=cast)


def predict(found: Found) -> None:
    """Adds the bound of the costs to the rows of `ours`, and predicted times and rates to the phases of `kernels`."""
    device = measured_device(found)
    if device is None:
        return
    for row in rows_of(found, "ours"):
        design = {"triton": "chunked", "triton_dual": "dual"}.get(row.get("impl", ""))
        if design:
            row["bound"] = cost(shape_of(row), device, design, row["workspace"]).bound
    for row in rows_of(found, "kernels"):
        if row.get("phase") and row["impl"] == "triton":
            made = cost(shape_of(row), device)
            phases = {phase.name: phase for phase in made.phases()}
            phases["copies"] = phases.get("dW to its dtype", phases["rows"])
            if row["phase"] == "whole call":
                row["predicted ms"] = made.seconds * 1e3
            elif row["phase"] != "copies" or "dW to its dtype" in phases:
                phase = phases[row["phase"]]
                row["predicted ms"] = phase.seconds * 1e3
                if row["ms"] > 0:
                    row["TFLOP/s"] = phase.flops / row["ms"] * 1e-9
                    row["TB/s"] = phase.bytes / row["ms"] * 1e-9


def write(path: Path, events: Iterable[Event], pictures: bool = False) -> Found:
    """path.json and path.md; with pictures path-*.png."""
    found = collect(events)
    path.with_name(path.name + ".json").write_text(json.dumps(found, indent=1) + "\n")
    render(path, found, pictures)
    return found


def render(path: Path, found: Found, pictures: bool) -> None:
    drawn = drawings.draw(path, found) if pictures else []
    path.with_name(path.name + ".md").write_text(markdown(found, drawn))


def markdown(found: Found, drawn: Iterable[Path] = ()) -> str:
    meta = found["meta"]
    lines = [f"# {meta.get('device', 'gpu-proof')}", "", "; ".join(f"{k} {v}" for k, v in meta.items()) + "."]
    lines += [line for picture in drawn for line in ("", f"![{picture.stem}]({picture.name})")]
    for phase in PHASES:
        if phase.name in found["phases"]:
            lines += ["", f"## {phase.about}", "", *section(phase.name, found)]
    return "\n".join(lines) + "\n"


def section(phase: str, found: Found) -> Iterator[str]:
    """The tables of a phase, then what did not run."""
    entries = found["phases"][phase]
    rows = rows_of(found, phase)
    if phase in ("values", "offload", "rollout"):
        yield from check_lines(entries)
        rows = [row for row in rows if "error" not in row and "note" not in row]
    if phase in ("ours", "peers"):
        yield from tables.case_tables(rows)
    elif phase == "steps":
        yield from step_table(rows)
    elif phase == "machine":
        yield from table([row for row in rows if "what" in row])
    elif phase == "kernels":
        yield from table([row for row in rows if "phase" in row])
        yield ""
        yield from table([row for row in rows if "kernel" in row])
        yield ""
        yield from table([row for row in rows if "tile" in row])
    elif phase == "rollout":
        yield from table(rows)
    for entry in entries:
        if entry["error"]:
            yield from ("", f"**{entry['item']}**", "", "```", *entry["error"].strip().splitlines()[-12:], "```")


def check_lines(entries: list[dict[str, Any]]) -> Iterator[str]:
    """One line for each check: how many numbers, the largest share of a bound, the wrong numbers."""
    yield from ("| check | numbers | largest share of a bound | wrong | s |", "|---|---:|---:|---|---:|")
    for entry in entries:
        rows = [row for row in entry["rows"] if "bound" in row and "right" in row]
        notes = [row["note"] for row in entry["rows"] if "note" in row]
        if not rows and not notes and not entry["error"]:
            continue
        shares = [row["error"] / row["bound"] for row in rows if row["bound"]]
        wrong = [f"{row['what']} {row['error']:.1e} > {row['bound']:.1e}" for row in rows if not row["right"]]
        remarks = "; ".join([*wrong, *notes, *(["see below"] if entry["error"] else [])])
        most = f"{max(shares):.0%}" if shares else ""
        yield f"| {entry['item']} | {len(rows)} | {most} | {remarks} | {entry['seconds']:.1f} |"
    yield ""


def table(rows: list[Row]) -> Iterator[str]:
    """A column for every key that a row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if not rows:
        return
    yield "| " + " | ".join(keys) + " |"
    yield "|" + "---|" * len(keys)
    for row in rows:
        yield "| " + " | ".join(cell(row.get(key), key) for key in keys) + " |"


def cell(value: Any, key: str) -> str:
    if isinstance(value, float):
        return tables.plain(value, FORMATS.get(key, ".3g"))
    return "" if value is None else str(value).replace("|", "/")


def step_table(rows: list[Row]) -> Iterator[str]:
    columns = {key: column for key, column in STEP_COLUMNS.items() if any(key in row for row in rows)}
    heads = ["step", "contender", *(heading for heading, _, _ in columns.values()), "note"]
    yield "| " + " | ".join(heads) + " |"
    yield "|---|---|" + "---:|" * len(columns) + "---|"
    for row in rows:
        cells = [format(row[k] * factor, form) if k in row else "" for k, (_, factor, form) in columns.items()]
        yield "| " + " | ".join([row["shape"], row["contender"], *cells, row.get("note", "")]) + " |"


def line(found: Found, phase: str, seconds: float) -> str:
    """One line for the terminal: the outcome of a phase."""
    entries = found["phases"].get(phase, [])
    rows = rows_of(found, phase)
    wrong = sum(row.get("right") is False for row in rows)
    failed = sum(entry["error"] not in (None, OUT_OF_TIME) for entry in entries)
    late = sum(entry["error"] == OUT_OF_TIME for entry in entries)
    outcome = f"{len(entries)} items, {len(rows)} rows"
    for count, word in ((wrong, "WRONG"), (failed, "FAILED"), (late, "not run")):
        outcome += f", {count} {word}" if count else ""
    return f"{seconds:6.1f} s  {phase}: {outcome}"


def faults(found: Found) -> list[str]:
    """A line for each wrong value and failed item. Items without time, and rows with a note, are neither."""
    lines = []
    for phase, entries in found["phases"].items():
        for row in rows_of(found, phase):
            if row.get("right") is False:
                lines.append(f"WRONG {phase}: {row['what']} {row['error']:.1e} > {row['bound']:.1e}")
        for entry in entries:
            if entry["error"] and entry["error"] != OUT_OF_TIME:
                lines.append(f"FAILED {phase}, {entry['item']}: {entry['error'].strip().splitlines()[-1][:160]}")
    return lines


def summary(found: Found) -> str:
    """The most important results, short enough for the end of a terminal."""
    lines = faults(found)
    loss = [row for row in rows_of(found, "ours") + rows_of(found, "peers") if "of the floor" in row]
    for row in loss:
        bound = f", bound {row['bound']:.0%}" if "bound" in row else ""
        share = f"{row['of the floor']:.0%} of the bare products{bound}, {row['extra MB'] or 0:.0f} MB"
        lines.append(f"{row['model']} {row['N']} {row['head']} {row['variant']}: {row['ms']:.3g} ms, {share}")
    for row in rows_of(found, "steps"):
        result = f"{row['seconds']:.2f} s, {row['peak'] / 1e9:.2f} GB" if "seconds" in row else row.get("note", "")
        lines.append(f"step {row['shape']} {row['contender']}: {result}")
    for row in rows_of(found, "rollout"):
        if "tokens/s" in row:
            lines.append(
                f"rollout {row['model']} {row['weights']} {row['prompts']} {row['decoder']}: {row['tokens/s']:.0f}/s"
            )
    return "\n".join(lines)[:10_000]


if __name__ == "__main__":
    source = Path(sys.argv[1])
    render(source.with_suffix(""), json.loads(source.read_text()), pictures=True)
