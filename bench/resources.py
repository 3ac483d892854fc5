"""What the Triton kernels compile to, on any machine: registers, spills, shared memory, widths of their accesses.

    python bench/resources.py            print the table
    python bench/resources.py --write    and keep it as bench/results/resources.json and .md

Every kernel is compiled ahead of time with the block sizes that ship, for NVIDIA sm_80, sm_90 and sm_100 and
for AMD gfx942; the numbers are read from the machine code by the disassembler inside the triton wheel.
tests/fused_loss/test_resources.py holds a fresh compilation to the kept table.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # it would replace the kernels by functions of the interpreter
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "kernels"))  # a checkout works without an install

import triton  # noqa: E402
from sdft_kernels import row_kernels, tuning  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
REGISTERS = {"sm_80": 65536, "sm_90": 65536, "sm_100": 65536, "gfx942": 4 * 512 * 64}  # of one multiprocessor
FULL = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "gfx942": 32}  # warps that one multiprocessor holds
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TABLE = HERE / "results" / "resources"


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: types of its arguments ("!" for 16-byte aligned), and its constants."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    gemm: bool = False  # a kernel with matrix products, which must use the tensor cores


def row_variant(target: str, kind: str, logits: str, grad: str | None, **on: bool) -> Variant:
    """row_kernel on a vocabulary of many tiles; `on` switches its flags."""
    heavy = any(on.get(name, False) for name in ("S_BIAS", "T_BIAS", "S_CAP", "T_CAP"))
    block, warps = tuning.row_blocks(target, 2**20, heavy)
    flags = ("TOKENS", "LABELS", "WEIGHTS", "INDEX", "GATHER", "S_BIAS", "T_BIAS", "S_CAP", "T_CAP")
    constants = {name: on.get(name, False) for name in flags}
    constants |= {"KIND": row_kernels.KINDS[kind], "GRAD": grad is not None, "BLOCK": block, "ROUND": False}
    constants["NARROW"] = grad not in (None, logits)
    types = dict.fromkeys(("s_ptr", "t_ptr"), f"*{logits}!") | {"d_ptr": "*fp32!"}
    types |= dict.fromkeys(("s_stride", "t_stride", "g_stride", "V"), "i32!") | {"lo": "i32"}
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
    return Variant(row_kernels.row_kernel, types, constants, {"num_warps": warps, "enable_fp_fusion": True})


def variants(target: str) -> dict[str, Variant]:
    """What ships, by name: each divergence as the trainer calls it, and the corners that need most registers."""
    trainer = {"TOKENS": True, "LABELS": True, "WEIGHTS": True}
    everything = {**trainer, "INDEX": True, "S_BIAS": True, "T_BIAS": True, "S_CAP": True, "T_CAP": True}
    scale = {"x_ptr": "*fp32!", "factor_ptr": "*fp32!", "count": "i64!"}
    return {
        "rows reverse_kl bf16": row_variant(target, "reverse_kl", "fp32", "bf16", **trainer),
        "rows forward_kl bf16": row_variant(target, "forward_kl", "fp32", "bf16", **trainer),
        "rows jsd bf16": row_variant(target, "jsd", "fp32", "bf16", **trainer),
        "rows reverse_kl fp32": row_variant(target, "reverse_kl", "fp32", "fp32"),
        "rows jsd fp32, everything on": row_variant(target, "jsd", "fp32", "fp32", **everything),
        "rows reverse_kl fp16, everything on": row_variant(target, "reverse_kl", "fp32", "fp16", **everything),
        "rows reverse_kl, values only": row_variant(target, "reverse_kl", "fp32", None, **trainer),
        "ready logits reverse_kl bf16": row_variant(target, "reverse_kl", "bf16", "bf16", GATHER=True, **trainer),
        "scale": Variant(row_kernels.scale_kernel, scale, {"BLOCK": 4096}, {"num_warps": 8, "enable_fp_fusion": True}),
    }


def compiled(variant: Variant, target: GPUTarget) -> Any:
    """The kernel's machine code for a target that need not be here."""
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
    count = lambda pattern: len(re.findall(pattern, sass))  # noqa: E731
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": count(r"\b(?:STL|LDL)\b"),
        "loads": count(r"\b(?:LDG|LDGSTS|UTMALDG|UBLKCP)"),
        "wide loads": count(r"\b(?:LDG|LDGSTS)\.\S*128") + count(r"\b(?:UTMALDG|UBLKCP)"),
        "wide stores": count(r"\bSTG\.\S*128") + count(r"\bUTMASTG"),
        "HGMMA": count(r"\bHGMMA"),
        "matrix": count(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA)"),
    }


def amd_resources(assembly: str) -> dict[str, int]:
    """The same of AMD assembly; vector registers, the accumulation ones among them."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    count = lambda pattern: len(re.findall(pattern, assembly))  # noqa: E731
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        # Scalar registers that spill go into lanes of a vector register; memory would show as stack.
        "spills": number("vgpr_spill_count"),
        "loads": count(r"(?:global|buffer)_load"),
        "wide loads": count(r"(?:global|buffer)_load_dwordx4"),
        "wide stores": count(r"(?:global|buffer)_store_dwordx4"),
        "HGMMA": 0,
        "matrix": count(r"v_mfma"),
    }


def measure(target: str, name: str) -> dict[str, Any]:
    """One row of the table."""
    variant = variants(target)[name]
    kernel = compiled(variant, TARGETS[target])
    amd = target.startswith("gfx")
    row = amd_resources(kernel.asm["amdgcn"]) if amd else nvidia_resources(kernel.asm["cubin"])
    warps = kernel.metadata.num_warps
    granule = 8 * TARGETS[target].warp_size
    per_block = warps * -(-row["registers"] * TARGETS[target].warp_size // granule) * granule
    resident = min(FULL[target], REGISTERS[target] // max(1, per_block) * warps)
    return {
        "target": target, "kernel": name, **row, "shared bytes": kernel.metadata.shared, "warps": warps,
        "warps resident": resident, "gemm": variant.gemm,
    }  # fmt: skip


def table(workers: int = 2) -> list[dict[str, Any]]:
    """All kernels on all targets."""
    jobs = [(target, name) for target in TARGETS for name in variants(target)]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(measure, *zip(*jobs, strict=True)))


def markdown(rows: list[dict[str, Any]]) -> str:
    columns = [k for k in rows[0] if k not in ("gemm", "matrix")]
    lines = [
        f"Compiled by triton {triton.__version__} with the shipped block sizes; `python bench/resources.py --write`.",
        "No GPU was involved. Warps resident: as many as the registers of one multiprocessor hold.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---|---|" + "---:|" * (len(columns) - 2),
    ]
    lines += ["| " + " | ".join(str(row[k]) for k in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the table under bench/results")
    parser.add_argument("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    rows = table()
    print(markdown(rows))
    if args.write:
        TABLE.with_suffix(".md").write_text(markdown(rows))
    for path in filter(None, (args.json, TABLE.with_suffix(".json") if args.write else None)):
        path.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
