"""The generated tables of docs/. `python -m bench.docs` writes them; a test compares them with their commands.

A table stands between two comments, <!-- NAME --> and <!-- end of NAME -->.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import roofline
from .proof import report

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "**Not measured on a GPU.** `make gpu-proof` fills this in."
NOT_MEASURED_IN_README = """**Times and memory are not measured on a GPU yet**; `make gpu-proof` measures everything
on one GPU in under ten minutes."""


def between(text: str, name: str) -> str:
    """The text between the comments of a name. Raises ValueError if they are not there."""
    _, begin, rest = text.partition(f"<!-- {name} -->\n")
    found, end, _ = rest.partition(f"<!-- end of {name} -->")
    if not begin or not end:
        raise ValueError(f"no comments <!-- {name} --> and <!-- end of {name} -->, each on a separate line")
    return found.removesuffix("\n")


def replaced(text: str, name: str, block: str) -> str:
    """The text with another block between the comments of a name."""
    before, _, rest = text.partition(f"<!-- {name} -->\n")
    _, _, after = rest.partition(f"<!-- end of {name} -->")
    between(text, name)
    return f"{before}<!-- {name} -->\n{block}\n<!-- end of {name} -->{after}"


def put_into(path: Path, name: str, block: str) -> None:
    path.write_text(replaced(path.read_text(), name, block))


def proofs() -> list[tuple[Path, report.Found]]:
    """The results of `make gpu-proof` that are kept, not those of --tiny."""
    found = [(path, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    return [(path, data) for path, data in found if isinstance(data, dict) and is_proof(data)]


def is_proof(data: dict[str, Any]) -> bool:
    return "phases" in data and data["meta"].get("tiny") is False


def gpu() -> str:
    """The loss on every GPU that was measured: ours at the default workspace, then the peers."""
    lines: list[str] = []
    for path, data in proofs():
        lines += [f"{data['meta']['device']} ([all of it](../bench/results/{path.stem}.md)):", ""]
        lines += ["| | ms | of the bare products | bound | extra MB | dX error |", "|---|---:|---:|---:|---:|---:|"]
        lines += [loss_line(row) for row in report.rows_of(data, "ours") if "ms" in row and is_default(row)]
        lines += [loss_line(row) for row in report.rows_of(data, "peers") if "of the floor" in row]
        lines += [""]
    return "\n".join(lines).strip() or NOT_MEASURED


def is_default(row: report.Row) -> bool:
    return bool(row["impl"]) and row["workspace"] is None


def loss_line(row: report.Row) -> str:
    bound = f"{row['bound']:.0%}" if "bound" in row else ""
    who = f"{case_of(row)}, {row['dtype']}: {row['variant']}"
    extra, error = row.get("extra MB") or 0, row.get("dX error")
    note = f" ({row['note']})" if "note" in row else ""
    cells = [f"{row['ms']:.3g}", f"{row['of the floor']:.0%}", bound, f"{extra:.0f}", f"{error:.0e}" if error else ""]
    return f"| {who}{note} | {' | '.join(cells)} |"


def headline() -> str:
    """For the README: ours and the fastest exact loss of others on the peers' cases, by GPU."""
    lines = []
    for _, data in proofs():
        peers = [row for row in report.rows_of(data, "peers") if "of the floor" in row and "note" not in row]
        for key in dict.fromkeys(case_of(row) for row in peers):
            rows = [row for row in peers if case_of(row) == key]
            own = [row for row in rows if row["variant"].startswith("sdft_kernels")]
            others = [row for row in rows if not row["variant"].startswith("sdft_kernels")]
            for row in [min(part, key=lambda row: row["ms"]) for part in (own, others) if part]:
                who = f"{data['meta']['device']}: {key}: {row['variant']}"
                lines.append(f"| {who} | {row['ms']:.3g} | {row['of the floor']:.0%} | {row['extra MB']:.0f} |")
    if not lines:
        return NOT_MEASURED_IN_README
    return "\n".join(["| | ms | share of the bare GEMMs | extra MB |", "|---|---:|---:|---:|", *lines])


def case_of(row: report.Row) -> str:
    return f"{row['model']}, {row['head']}, N = {row['N']}, {row['divergence']}"


def steps() -> str:
    """Whole training steps and rollouts on every GPU that was measured."""
    lines: list[str] = []
    for path, data in proofs():
        lines += [f"{data['meta']['device']} ([all of it](../bench/results/{path.stem}.md)):", ""]
        lines += [*report.step_table(report.rows_of(data, "steps")), ""]
        lines += [*report.table([row for row in report.rows_of(data, "rollout") if "decoder" in row]), ""]
    return "\n".join(lines).strip() or NOT_MEASURED


BLOCKS: tuple[tuple[str, str, Callable[[], str]], ...] = (
    ("docs/kernels.md", "bounds", roofline.tables),
    ("docs/kernels.md", "gpu", gpu),
    ("docs/performance.md", "gpu steps", steps),
    ("README.md", "gpu", headline),
)


def stale() -> Iterator[tuple[str, str]]:
    """File and name of every block that differs from the present output of its command."""
    for file, name, make in BLOCKS:
        if between((ROOT / file).read_text(), name) != make():
            yield file, name


def main() -> None:
    for file, name, make in BLOCKS:
        put_into(ROOT / file, name, make())
        print(f"{file}: {name}")


if __name__ == "__main__":
    main()
