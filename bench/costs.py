"""What each design of the loss costs: its kernels, their FLOPs and bytes, and the bound that follows.

The time of a kernel is the larger of two: its FLOPs over the device's rate for products, and its bytes over the
device's bandwidth. Kernels do not overlap, launches cost nothing, and no operand stays in the cache. The bound of a
design is the time of the bare products (each at the product rate) over the sum of its kernels: no implementation of the
design can have a larger share of the bare products. `chunked` takes its chunk sizes from the code that runs (see
`plan_of`).

N tokens, V vocabulary, H hidden size, C tokens of a chunk.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from sdft_kernels.tuning import Limits, dual_tile, on_chip_tile
from sdft_kernels.workspace import Plan, plan_dual, plan_linear
from sdft_kernels.workspace import default_workspace as workspace_of

from .shapes import Shape

MIB = 2**20
HOPPER = 9  # compute capability; large Blackwell GPUs have the same tile


@dataclass(frozen=True)
class Device:
    """Rates that one kernel can reach, with their source."""

    name: str
    narrow: float  # FLOP/s of bf16 and fp16 products
    wide: float  # FLOP/s of fp32 products without TF32
    bandwidth: float  # bytes/s of the device's memory, read and written bytes together
    memory: int | None  # bytes; None for a CPU
    source: str
    cluster: int = 1  # the most thread blocks that exchange data on the chip, as sdft_kernels.tuning counts them


DEVICES = {  # with Triton 3.8 or later, before which there are no clusters
    "H100": Device(
        "H100", 798e12, 51e12, 3.0e12, 81_000 * MIB,
        "measured: an 8192^3 bf16 product of random matrices and a copy; fp32: 0.76 of the datasheet's 67", 16,
    ),
    "H200": Device(
        "H200", 798e12, 51e12, 4.3e12, 143_000 * MIB,
        "measured: an 8192^3 bf16 product (769 to 798) and a copy; fp32 as for the H100", 16,
    ),
    "B200": Device(
        "B200", 2250e12, 75e12, 8.0e12, 182_000 * MIB, "NVIDIA's datasheet of the HGX B200, dense; an upper limit", 16
    ),
    "A100": Device(
        "A100", 312e12, 19.5e12, 2.039e12, 81_000 * MIB, "NVIDIA's datasheet of the A100 80GB SXM; an upper limit"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One launch, or `times` equal ones."""

    phase: str
    flops: float
    bytes: float
    times: float = 1.0

    def seconds(self, shape: Shape, device: Device) -> float:
        rate = device.wide if shape.dtype == "float32" else device.narrow
        return self.times * max(self.flops / rate, self.bytes / device.bandwidth)


@dataclass(frozen=True)
class Phase:
    """The kernels of one name, summed."""

    name: str
    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Cost:
    """A design's kernels for one call on one device."""

    shape: Shape
    device: Device
    kernels: tuple[Kernel, ...]
    chunk: int  # tokens

    @property
    def seconds(self) -> float:
        return sum(kernel.seconds(self.shape, self.device) for kernel in self.kernels)

    @property
    def bare_seconds(self) -> float:
        return self.shape.bare / (self.device.wide if self.shape.dtype == "float32" else self.device.narrow)

    @property
    def bound(self) -> float:
        """The largest possible share of the bare products."""
        return self.bare_seconds / self.seconds

    def phases(self) -> list[Phase]:
        names = dict.fromkeys(kernel.phase for kernel in self.kernels)
        return [self._phase(name) for name in names]

    def _phase(self, name: str) -> Phase:
        mine = [kernel for kernel in self.kernels if kernel.phase == name]
        return Phase(
            name,
            sum(k.times * k.flops for k in mine),
            sum(k.times * k.bytes for k in mine),
            sum(k.seconds(self.shape, self.device) for k in mine),
        )


# The kernels that designs share. c: tokens of a chunk.


def product(phase: str, shape: Shape, rows: float, result_bytes: float, results: float, operands: float) -> Kernel:
    """A product over the whole head for `rows` tokens: `operands` and `results` entries are read and written."""
    flops = 2.0 * rows * shape.vocab * shape.hidden
    return Kernel(phase, flops, operands * shape.item + results * result_bytes)


def logits(shape: Shape, c: float, result_bytes: float = 4) -> Kernel:
    v, h = shape.vocab, shape.hidden
    return product("logits", shape, c, result_bytes, c * v, v * h + c * h)


def both_logits(shape: Shape, c: float, result_bytes: float = 4) -> list[Kernel]:
    """Both sides' logits: two products, or one of twice the rows if the head is shared."""
    if shape.shared:
        return [logits(shape, 2 * c, result_bytes)]
    return [logits(shape, c, result_bytes)] * 2


def input_gradient(shape: Shape, c: float, g_bytes: float) -> Kernel:
    """dX = G W, (C, H) in fp32."""
    v, h = shape.vocab, shape.hidden
    return Kernel("dX", 2.0 * c * v * h, c * v * g_bytes + v * h * shape.item + 4 * c * h)


def weight_gradient(shape: Shape, c: float, g_bytes: float, first: bool, result_bytes: float = 4) -> Kernel:
    """dW += Gᵀ X: the accumulator is read unless this is its first term."""
    v, h = shape.vocab, shape.hidden
    accumulator = v * h * result_bytes * (1 if first else 2)
    return Kernel("dW", 2.0 * c * v * h, c * v * g_bytes + c * h * shape.item + accumulator)


def elementwise(phase: str, bytes_: float, times: float = 1.0) -> Kernel:
    return Kernel(phase, 0.0, bytes_, times)


def parts(total: int, size: int) -> list[int]:
    """total in parts of `size`; the last part may be smaller."""
    return [min(size, total - start) for start in range(0, total, size)]


# Designs. Each returns its kernels and the tokens of its chunk.

Made = tuple[list[Kernel], int]
Design = Callable[[Shape, Device, int | None], Made]


def plan_of(shape: Shape, device: Device, workspace: int | None) -> Plan:
    """The plan of the code that runs: tokens of a chunk, and bytes for the casts of heads."""
    budget = default_workspace(device) if workspace is None else workspace
    sides = 1 if shape.shared else 2
    casts = [shape.vocab * shape.hidden * shape.item] * sides if shape.cast else []
    return plan_linear(shape.tokens, shape.vocab, [shape.hidden] * 2, budget, casts)


def default_workspace(device: Device) -> int:
    """Bytes of the default workspace of the code that runs."""
    return workspace_of(device.memory)


def reads_of(shape: Shape, device: Device) -> int:
    """How often the row kernel that runs reads the logits: once if a row stays on the chip, else twice."""
    limits = Limits(warp_size=32, cluster=device.cluster)
    return 2 if on_chip_tile(limits, shape.vocab, "reverse_kl", shape.item) is None else 1


def chunked(shape: Shape, device: Device, workspace: int | None, reads: int | None = None) -> Made:
    """What runs: a chunk's fp32 logits, one kernel that puts a row's gradient in their place, dW added up in fp32.

    reads: how often the row kernel reads both logits, 8 bytes an entry; None is what the device has.
    """
    plan = plan_of(shape, device, workspace)
    wide = shape.dtype == "float32"
    entry = 8 * (reads or reads_of(shape, device)) + shape.item  # the gradient is as wide as the operands
    kernels: list[Kernel] = []
    head = shape.vocab * shape.hidden
    chunks = parts(shape.tokens, plan.chunk)
    for size, products in zip(plan.casts, (2, 1), strict=False):  # of the student's head: logits and dX
        once = size == head * shape.item
        kernels.append(elementwise("casts", head * (4 + shape.item), 1 if once else products * len(chunks)))
    direct = len(chunks) == 1 and not wide and not shape.cast  # dW is written in the head's dtype
    for number, c in enumerate(chunks):
        kernels += both_logits(shape, c)
        kernels.append(elementwise("rows", entry * c * shape.vocab))
        if shape.trained:
            result = shape.item if direct else 4
            kernels.append(weight_gradient(shape, c, shape.item, first=number == 0, result_bytes=result))
        kernels.append(input_gradient(shape, c, shape.item))
    if shape.trained and not wide and not shape.cast and not direct:
        kernels.append(elementwise("dW to its dtype", head * (4 + shape.item)))
    return kernels, plan.chunk


def two_reads(shape: Shape, device: Device, workspace: int | None) -> Made:
    """`chunked` on a device without clusters, and before Triton 3.8: the row kernel reads the logits twice."""
    return chunked(shape, device, workspace, reads=2)


def dual(shape: Shape, device: Device, workspace: int | None) -> Made:
    """impl="triton_dual": one product for both sides, whose epilogue writes E and D, two bytes an entry each.

    It also writes five sums for each tile of a row. The gradient takes E's place; D's memory serves the next chunk. The
    gradients of some chunks are kept, so that dW is accumulated less often (see plan_dual).
    """
    v, h = shape.vocab, shape.hidden
    budget = default_workspace(device) if workspace is None else workspace
    statistics = 4 * 5 * -(-v // dual_tile(HOPPER).cols)  # bytes of a token
    c, kept = plan_dual(shape.tokens, v, [h, h], budget, statistics, shape.trained)
    kernels: list[Kernel] = []
    for rows in parts(shape.tokens, c):
        operands = 2 * (v * h + rows * h) * shape.item
        kernels.append(Kernel("logits", 4.0 * rows * v * h, operands + rows * (4.0 * v + statistics)))
        kernels.append(elementwise("rows", rows * (6.0 * v + statistics)))
        kernels.append(input_gradient(shape, rows, 2))
    if shape.trained:
        groups = parts(shape.tokens, c * kept)
        result = shape.item if len(groups) == 1 else 4  # dW is written in the head's dtype
        kernels += [weight_gradient(shape, rows, 2, i == 0, result) for i, rows in enumerate(groups)]
        if len(groups) > 1:
            kernels.append(elementwise("dW to its dtype", v * h * 6))
    return kernels, c


def trl(shape: Shape, device: Device, workspace: int | None) -> Made:
    """TRL 1.16's ChunkedDivergenceFunction: tiles of 4096 tokens by 32768 entries, made in the forward and again in
    the backward pass (12 N V H FLOPs), fp32 gradients cast to the operands' dtype."""
    v, h, tokens, tile = shape.vocab, shape.hidden, 4096, 32768
    kernels: list[Kernel] = []
    for number, c in enumerate(parts(shape.tokens, tokens)):
        for width in parts(v, tile):
            narrow = replace(shape, vocab=width)
            kernels += [logits(narrow, c)] * 4
            kernels += [elementwise("rows", 8.0 * c * width), elementwise("rows", 12.0 * c * width)]
            kernels.append(elementwise("casts", (4 + shape.item) * c * width))
            d_x = input_gradient(narrow, c, shape.item)
            kernels.append(replace(d_x, bytes=d_x.bytes + 4 * c * h))  # fp32, added to
            if shape.trained:
                kernels.append(weight_gradient(narrow, c, shape.item, first=False))
            if shape.cast:
                kernels.append(elementwise("casts", width * h * 6, 5))
        if number == 0 and shape.trained:
            kernels.append(elementwise("dW to its dtype", v * h * (4 + (0 if shape.cast else 4 + shape.item))))
    return kernels, min(tokens, shape.tokens)


def dense(shape: Shape, device: Device, workspace: int | None) -> Made:
    """Both logits whole in the operands' dtype, and autograd: 13 passes over (N, V) forward and 13 backward."""
    n, v, item = shape.tokens, shape.vocab, shape.item
    kernels = [*([logits(shape, n, item)] * 2), elementwise("rows", 26.0 * n * v * item)]
    if shape.trained:
        kernels.append(weight_gradient(shape, n, item, first=True, result_bytes=item))
    kernels.append(input_gradient(shape, n, item))
    if shape.cast:
        kernels.append(elementwise("casts", v * shape.hidden * 6, 2))
    return kernels, n


def recompute(shape: Shape, device: Device, workspace: int | None) -> Made:
    """No logits in memory: statistics from tiles on the chip, then every tile again for its gradient (12 N V H)."""
    n, v, h = shape.tokens, shape.vocab, shape.hidden
    reads = (v * h + n * h) * shape.item
    kernels = [Kernel("logits", 2.0 * n * v * h, reads, 2), Kernel("logits, again", 2.0 * n * v * h, reads, 2)]
    kernels.append(Kernel("dX", 2.0 * n * v * h, reads + 4 * n * h))
    if shape.trained:
        kernels.append(Kernel("dW", 2.0 * n * v * h, reads + 4 * v * h))
        kernels.append(elementwise("dW to its dtype", v * h * (4 + shape.item)))
    return kernels, n


DESIGNS: dict[str, Design] = {
    "chunked": chunked,
    "two reads": two_reads,
    "dual": dual,
    "TRL": trl,
    "dense": dense,
    "recompute": recompute,
}


def total(kernels: Iterable[Kernel], shape: Shape, device: Device) -> float:
    return sum(kernel.seconds(shape, device) for kernel in kernels)


def cost(shape: Shape, device: Device, design: str = "chunked", workspace: int | None = None) -> Cost:
    """The kernels of a design. workspace: bytes; None is the default of the code that runs."""
    kernels, chunk = DESIGNS[design](shape, device, workspace)
    return Cost(shape, device, tuple(kernels), chunk)


def bound_of(kernels: Iterable[Kernel], shape: Shape, device: Device) -> float:
    """The largest possible share of the bare products."""
    return Cost(shape, device, tuple(kernels), 0).bound


def wire_bytes(shape: Shape, ranks: int) -> dict[str, float]:
    """Bytes that a rank sends in one call if each of `ranks` holds V / ranks rows of both heads; all have all tokens.

    Statistics (five fp32 numbers a token) are gathered from all ranks; dX, fp32, is reduced around a ring.
    """
    others = ranks - 1
    return {
        "statistics": 5 * 4.0 * shape.tokens * others,
        "dX": 2.0 * others / ranks * 4 * shape.tokens * shape.hidden,
    }
