"""The compiled Triton kernels, on any machine: registers, spills, shared memory, widths of their accesses.

    python bench/resources.py            print the table of the installed Triton
    python bench/resources.py --write    also write it, with the oldest Triton's table, to bench/results/resources.*

Every kernel is compiled ahead of time with the block sizes that ship, for GPUs of several generations; the numbers
are read from the machine code by the disassembler inside the triton wheel. The oldest Triton that pyproject.toml
admits is installed into a separate folder and runs in a separate process. tests/fused_loss/test_resources.py compares a
fresh compilation with the written table.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # it would replace the kernels by functions of the interpreter
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "kernels"))  # a checkout works without an install

import triton  # noqa: E402
from sdft_kernels import dual_kernels, row_kernels, row_math, row_on_chip, tuning  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402


@dataclass(frozen=True)
class Device:
    """A GPU to compile for, and its limits."""

    target: GPUTarget
    shared_bytes: int  # most of one block
    warps: int  # most of one multiprocessor
    registers: int = 65536  # of one multiprocessor

    cluster: int = 1  # the most thread blocks of one

    @property
    def limits(self) -> tuning.Limits:
        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        return tuning.Limits(self.target.warp_size, self.cluster if version >= tuning.CLUSTERS_SINCE else 1)


KIB = 1024
DEVICES = {  # CUDA C++ programming guide, table of compute capabilities; CDNA 3 instruction set, section 3
    "sm_80": Device(GPUTarget("cuda", 80, 32), 163 * KIB, 64),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 227 * KIB, 64, cluster=16),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 227 * KIB, 64, cluster=16),
    "sm_120": Device(GPUTarget("cuda", 120, 32), 99 * KIB, 48),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 64 * KIB, 32, 4 * 512 * 64),
}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TABLE = HERE / "results" / "resources"


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: types of its arguments ("!" for 16-byte aligned), and its constants."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


def row_variant(
    target: str, kind: str, logits: str, grad: str | None, vocab: int = 2**20, aligned: bool = True, **on: bool
) -> Variant:
    """The kernel of rows of `vocab` logits, by default too long to stay on chip; `on` switches its flags."""
    limits, heavy = DEVICES[target].limits, any(on.get(name) for name in ("S_BIAS", "T_BIAS", "S_CAP", "T_CAP"))
    narrowest = 4 if {logits, grad} <= {"fp32", None} and not on.get("S_BIAS") else 2
    each = tuning.VECTOR_BYTES // narrowest if aligned else 1
    on_chip = None if heavy else tuning.on_chip_tile(limits, vocab, kind, each)
    tile = on_chip or tuning.row_tile(limits, vocab, heavy, each)
    flags = ("TOKENS", "LABELS", "WEIGHTS", "INDEX", "GATHER", "S_BIAS", "T_BIAS", "S_CAP", "T_CAP")
    constants = {name: on.get(name, False) for name in flags} | tile.constants()
    constants |= {"KIND": row_math.KINDS[kind], "GRAD": grad is not None, "ROUND": False}
    if on_chip is None:
        constants["NARROW"] = grad not in (None, logits)
    types = dict.fromkeys(("s_ptr", "t_ptr"), f"*{logits}!") | {"d_ptr": "*fp32!"}
    types |= dict.fromkeys(("s_stride", "t_stride", "g_stride"), "i32!" if aligned else "i32")
    types |= {"V": "i32!", "lo": "i32"}
    types |= dict.fromkeys(("s_inner", "s_outer", "t_inner", "t_outer", "beta", "factor", "g_max"), "fp32")
    optional = {
        "g_ptr": (grad is not None, f"*{grad}!"),
        "s_bias_ptr": (constants["S_BIAS"], "*bf16!"),
        "t_bias_ptr": (constants["T_BIAS"], "*bf16!"),
        "weight_ptr": (constants["WEIGHTS"], "*fp32!"),
        "index_ptr": (constants["INDEX"], "*i64!"),
        "label_ptr": (constants["LABELS"], "*i64!"),
        "s_entropy_ptr": (constants["TOKENS"], "*fp32!"),
        "t_entropy_ptr": (constants["TOKENS"], "*fp32!"),
        "agree_ptr": (constants["TOKENS"], "*i8!"),
        "s_logprob_ptr": (constants["LABELS"], "*fp32!"),
        "t_logprob_ptr": (constants["LABELS"], "*fp32!"),
    }
    types |= {name: kind for name, (there, kind) in optional.items() if there}
    constants |= {name: None for name, (there, _) in optional.items() if not there}
    kernel = row_kernels.row_kernel if on_chip is None else row_on_chip.on_chip_kernel
    return Variant(kernel, types, constants, tile.options)


def dual_variants(target: str) -> dict[str, Variant]:
    """The two kernels of impl="triton_dual" with what a large vocabulary takes, and every flag."""
    device = DEVICES[target]
    if device.target.backend != "cuda":  # AMD GPUs are refused
        return {}
    tile = tuning.dual_tile(device.target.arch // 10)
    steps = dict.fromkeys(("x_step", "w_step", "tx_step", "tw_step"), 1)
    kinds = {"reverse_kl": row_math.KINDS["reverse_kl"], "forward_kl": row_math.KINDS["forward_kl"]}
    pointers = dict.fromkeys(("x_ptr", "w_ptr", "teacher_x_ptr", "teacher_w_ptr", "e_ptr", "g_ptr"), "*bf16!")
    pointers |= {"d_ptr": "*fp16!", "weight_ptr": "*fp32!", "label_ptr": "*i64!", "index_ptr": "*i64!"}
    outputs = ("out_ptr", "s_entropy_ptr", "t_entropy_ptr", "s_logprob_ptr", "t_logprob_ptr", "statistics_ptr")
    types = pointers | dict.fromkeys(outputs, "*fp32!") | {"agree_ptr": "*i8!"}
    types |= dict.fromkeys(("x_stride", "w_stride", "tx_stride", "tw_stride", "stride", "V", "H", "TH"), "i32!")
    types |= dict.fromkeys(("room", "apart", "C", "lo"), "i32")
    types |= dict.fromkeys(("s_inner", "t_inner", "factor", "g_max"), "fp32")
    flags = dict.fromkeys(("GRAD", "TOKENS", "LABELS", "WEIGHTS", "INDEX"), True) | {"ROUND": False}
    row = {"TILES": tuning.DUAL_MERGED, "BN": tile.cols, "BLOCK": tuning.DUAL_ROW_BLOCK}
    made = {}
    for name, kind in kinds.items():
        for tokens in (True, False):
            constants = {"KIND": kind, "TOKENS": tokens, "WIDE": False, **steps, **tile.constants()}
            made[f"dual tiles {name}{', token outputs' if tokens else ''}"] = Variant(
                dual_kernels.tile_kernel, types, constants, tile.options
            )
        options = {"num_warps": 8, "enable_fp_fusion": True}
        made[f"dual rows {name}"] = Variant(
            dual_kernels.tiles_row_kernel, types, {"KIND": kind, **flags, **steps, **row}, options
        )
    return made


def variants(target: str) -> dict[str, Variant]:
    """The kernels that ship, by name: each divergence as the trainer calls it, and the cases with most registers."""
    trainer = {"TOKENS": True, "LABELS": True, "WEIGHTS": True}
    everything = {**trainer, "INDEX": True, "S_BIAS": True, "T_BIAS": True, "S_CAP": True, "T_CAP": True}
    scale = {"x_ptr": "*fp32!", "factor_ptr": "*fp32!", "count": "i64!"}
    on_chip = {
        f"on chip {kind} {grad or 'values only'}, V = {vocab}": row_variant(target, kind, "fp32", grad, vocab, **on)
        for kind, grad, vocab, on in (
            ("reverse_kl", "bf16", 49152, trainer),
            ("reverse_kl", "bf16", 128256, trainer),
            ("reverse_kl", "bf16", 151936, trainer),
            ("reverse_kl", "fp32", 151936, {}),
            ("forward_kl", "bf16", 151936, trainer),
            ("jsd", "bf16", 49152, trainer),
            ("jsd", "bf16", 128256, trainer),
        )
        if DEVICES[target].limits.cluster > 1
    }
    return (
        on_chip
        | dual_variants(target)
        | {
            "rows reverse_kl bf16": row_variant(target, "reverse_kl", "fp32", "bf16", **trainer),
            "rows forward_kl bf16": row_variant(target, "forward_kl", "fp32", "bf16", **trainer),
            "rows jsd bf16": row_variant(target, "jsd", "fp32", "bf16", **trainer),
            "rows reverse_kl fp32": row_variant(target, "reverse_kl", "fp32", "fp32"),
            "rows jsd fp32, everything on": row_variant(target, "jsd", "fp32", "fp32", **everything),
            "rows reverse_kl fp16, everything on": row_variant(target, "reverse_kl", "fp32", "fp16", **everything),
            "rows reverse_kl, values only": row_variant(target, "reverse_kl", "fp32", None, **trainer),
            "ready logits reverse_kl bf16": row_variant(target, "reverse_kl", "bf16", "bf16", GATHER=True, **trainer),
            "ready logits reverse_kl, values only, not aligned": row_variant(
                target, "reverse_kl", "bf16", None, aligned=False, GATHER=True, **trainer
            ),
            "scale": Variant(
                row_kernels.scale_kernel, scale, {"BLOCK": 4096}, {"num_warps": 8, "enable_fp_fusion": True}
            ),
        }
    )


def compiled(variant: Variant, target: GPUTarget) -> Any:
    """The kernel's machine code for a target; the machine needs no such GPU."""
    signature, constants, attrs = {}, {}, {}
    for i, parameter in enumerate(variant.kernel.params):
        name = parameter.name
        if name in variant.constants:
            signature[name], constants[(i,)] = "constexpr", variant.constants[name]
            continue
        signature[name] = variant.types[name].rstrip("!")
        if variant.types[name].endswith("!"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=target, options=variant.options)


def loops(sass: str) -> list[str]:
    """The text of every loop of a listing: from a label to a branch back to it."""
    lines = sass.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"\s*(\.L_\w+):", line))}
    branches = ((i, re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) for i, line in enumerate(lines))
    spans = ((labels.get(found[1], i), i) for i, found in branches if found)
    return ["\n".join(lines[start : end + 1]) for start, end in spans if start < end]


def nvidia_resources(binary: bytes) -> dict[str, int]:
    """Registers, spills and accesses of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run([BINARIES / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        sass = subprocess.run([BINARIES / "nvdisasm", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    if found is None or not sass:
        raise RuntimeError(f"cuobjdump said nothing of registers: {usage.stdout} {usage.stderr}")
    count = lambda pattern, text=sass: len(re.findall(pattern, text))  # noqa: E731
    longest = max(loops(sass), key=len, default="")
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": count(r"\b(?:STL|LDL)\b"),
        "loads": count(r"\b(?:LDG|LDGSTS|UTMALDG|UBLKCP)"),
        "wide loads": count(r"\b(?:LDG|LDGSTS)\.\S*128") + count(r"\b(?:UTMALDG|UBLKCP)"),
        "wide stores": count(r"\bSTG\.\S*128") + count(r"\bUTMASTG"),
        "longest loop": count(r"/\*[0-9a-f]{4,}\*/ +\S", longest),
        "its barriers": count(r"\bBAR\.", longest),
        "its shuffles": count(r"\bSHFL\.", longest),
        "cluster barriers": count(r"\bUCGABAR_ARV"),
        "HGMMA": count(r"\bHGMMA\."),
    }


def amd_resources(assembly: str) -> dict[str, int]:
    """The same for AMD assembly, without loops. Registers are vector registers, including those for accumulation."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    count = lambda pattern: len(re.findall(pattern, assembly))  # noqa: E731
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        # Scalar registers spill into lanes of a vector register; a spill to memory would show as stack.
        "spills": number("vgpr_spill_count"),
        "loads": count(r"(?:global|buffer)_load"),
        "wide loads": count(r"(?:global|buffer)_load_dwordx4"),
        "wide stores": count(r"(?:global|buffer)_store_dwordx4"),
        "longest loop": 0,
        "its barriers": 0,
        "its shuffles": 0,
        "cluster barriers": 0,
        "HGMMA": 0,
    }


def measure(target: str, name: str) -> dict[str, Any]:
    """One row of the table."""
    device = DEVICES[target]
    kernel = compiled(variants(target)[name], device.target)
    amd = target.startswith("gfx")
    row = amd_resources(kernel.asm["amdgcn"]) if amd else nvidia_resources(kernel.asm["cubin"])
    warps = kernel.metadata.num_warps
    granule = 8 * device.target.warp_size
    per_block = warps * -(-row["registers"] * device.target.warp_size // granule) * granule
    resident = min(device.warps, device.registers // max(1, per_block) * warps)
    return {
        "triton": triton.__version__, "target": target, "kernel": name, **row,
        "shared bytes": kernel.metadata.shared, "shared limit": device.shared_bytes,
        "warps": warps, "warps resident": resident,
    }  # fmt: skip


def table(targets: Iterable[str] = DEVICES, kernels: str = "", workers: int = 2) -> list[dict[str, Any]]:
    """The kernels whose names match the expression `kernels`, on all targets."""
    jobs = [(target, name) for target in targets for name in variants(target) if re.search(kernels, name)]
    if len(jobs) <= workers:  # too few for more processes
        return [measure(*job) for job in jobs]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(measure, *zip(*jobs, strict=True)))


def oldest_triton() -> Path:
    """The folder of the oldest Triton that pyproject.toml admits. Installs it if it is not there yet."""
    admitted = re.search(r"triton>=([\d.]+)", (HERE.parent / "pyproject.toml").read_text())
    assert admitted, "pyproject.toml has no lower bound of triton"
    version = admitted[1] + ".0" * (2 - admitted[1].count("."))
    folder = Path(tempfile.gettempdir()) / f"sdft-triton-{version}"
    if not (folder / "triton" / "__init__.py").exists():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, f"triton=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"triton {version} cannot be installed: {done.stderr.strip()}")
    return folder


def oldest_table(targets: Iterable[str], kernels: str) -> list[dict[str, Any]]:
    """The table of the oldest Triton, made in a separate process."""
    path = os.pathsep.join([str(oldest_triton()), str(HERE.parent / "kernels")])
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.json"
        command = [sys.executable, __file__, "--json", file, "--targets", *targets, "--kernels", kernels]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())["rows"]


def markdown(rows: list[dict[str, Any]]) -> str:
    versions = " and ".join(dict.fromkeys(row["triton"] for row in rows))
    columns = list(rows[0])
    lines = [
        f"Compiled by triton {versions} with the shipped block sizes; `python bench/resources.py --write`.",
        "No GPU was involved. Warps resident: as many as the registers of one multiprocessor hold. Longest loop: its",
        "instructions.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---|---|---|" + "---:|" * (len(columns) - 3),
    ]
    lines += ["| " + " | ".join(str(row[k]) for k in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the table under bench/results, both Tritons in it")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--targets", nargs="+", default=list(DEVICES), choices=list(DEVICES), help="all by default")
    parser.add_argument("--kernels", default="", help="only kernels whose names match this regular expression")
    parser.add_argument("--oldest", action="store_true", help="the oldest Triton that pyproject.toml admits instead")
    args = parser.parse_args()
    wanted = args.targets, args.kernels
    rows = oldest_table(*wanted) if args.oldest or args.write else []
    rows += [] if args.oldest else table(*wanted)
    if args.write:
        TABLE.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))
    for path in filter(None, (args.json, TABLE.with_suffix(".json") if args.write else None)):
        path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
