"""The losses under the features of a trainer: the table "What works with what" of docs/integrations.md.

One small model, one batch with ignored tokens, and for every loss its dense form in float64 on one process. Each test
runs the model under one feature and compares the loss and the gradient of every parameter with that reference.
The distributed tests run this file as a script: two processes over gloo, all cells in one start.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sdft_kernels import divergence, linear_cross_entropy, linear_divergence, linear_topk_divergence, topk_divergence
from sdft_kernels import reference as dense
from sdft_kernels.compat.liger import LigerFusedLinearJSD, LigerFusedLinearJSDLoss, LigerJSD, LigerKLDIVLoss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

DOCS = Path(__file__).parents[2] / "docs" / "integrations.md"
N, V, H, K, RANKS = 16, 41, 8, 5, 2  # 41 tokens do not divide by two ranks
Outcome = tuple[float, dict[str, Tensor]]


class Batch(NamedTuple):
    ids: Tensor  # (N,)
    labels: Tensor  # (N,) -100 is ignored
    teacher_x: Tensor  # (N, H)
    teacher_w: Tensor  # (V, H)

    @property
    def live(self) -> Tensor:
        return (self.labels != -100).to(self.teacher_x.dtype)

    @property
    def teacher_logits(self) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.teacher_x @ self.teacher_w.T

    @property
    def topk(self) -> tuple[Tensor, Tensor]:
        logprobs, ids = self.teacher_logits.log_softmax(-1).topk(K)
        return ids, logprobs

    def rows(self, rank: int) -> "Batch":
        """The rows of a rank: 10, of which 3 are ignored, or 6, of which 1 is ignored."""
        here = slice(0, 10) if rank == 0 else slice(10, N)
        return Batch(self.ids[here], self.labels[here], self.teacher_x[here], self.teacher_w)

    def to(self, dtype: torch.dtype) -> "Batch":
        return Batch(self.ids, self.labels, self.teacher_x.to(dtype), self.teacher_w.to(dtype))


def make_batch() -> Batch:
    gen = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(V, (2, N), generator=gen)
    labels[[0, 4, 7, 12]] = -100
    teacher_x, teacher_w = torch.randn(N, H, generator=gen), torch.randn(V, H, generator=gen) * 0.5
    return Batch(ids, labels, teacher_x, teacher_w)


@dataclass(frozen=True)
class Column:
    """One loss, mean over the rows that are not ignored: ours of (x, w) or of logits, and dense of logits."""

    ours: Callable[..., Tensor]
    dense: Callable[[Tensor, Batch], Tensor]
    from_logits: bool = False


def dense_kl(s: Tensor, b: Batch, **options: Any) -> Tensor:
    return dense.divergence_reference(s, b.teacher_logits, token_weights=b.live, **options)  # type: ignore[return-value]


def dense_topk(s: Tensor, b: Batch) -> Tensor:
    return dense.topk_divergence_reference(s, *b.topk, token_weights=b.live)


def dense_cross_entropy(s: Tensor, b: Batch) -> Tensor:
    return F.cross_entropy(s, b.labels)


def liger_kl(s: Tensor, b: Batch) -> Tensor:
    """LigerKLDIVLoss has no ignored labels: the rows that count are picked from what reduction="none" gives."""
    rows = LigerKLDIVLoss(reduction="none")(s.log_softmax(-1), b.teacher_logits.softmax(-1)).sum(1)
    return (rows * b.live).sum() / b.live.sum()


COLUMNS = {
    "linear_divergence": Column(
        lambda x, w, b: linear_divergence(x, w, b.teacher_x, b.teacher_w, token_weights=b.live), dense_kl
    ),
    "linear_topk_divergence": Column(
        lambda x, w, b: linear_topk_divergence(x, w, *b.topk, tail_floor=0.0, token_weights=b.live), dense_topk
    ),
    "divergence": Column(lambda s, b: divergence(s, b.teacher_logits, token_weights=b.live), dense_kl, True),
    "linear_cross_entropy": Column(lambda x, w, b: linear_cross_entropy(x, w, b.labels), dense_cross_entropy),
    "compat.liger": Column(  # with its cross-entropy
        lambda x, w, b: LigerFusedLinearJSDLoss()(x, w, b.teacher_x, b.teacher_w, b.labels),
        lambda s, b: 0.5 * dense_kl(s, b, divergence="jsd") + 0.5 * dense_cross_entropy(s, b),
    ),
    "topk_divergence": Column(
        lambda s, b: topk_divergence(s, *b.topk, tail_floor=0.0, token_weights=b.live), dense_topk, True
    ),
    "LigerFusedLinearJSD": Column(
        lambda x, w, b: LigerFusedLinearJSD(0.3)(x, w, b.teacher_x, b.teacher_w, b.labels),
        lambda s, b: dense_kl(s, b, divergence="jsd", beta=0.3),
    ),
    "LigerJSD": Column(
        lambda s, b: LigerJSD()(s.log_softmax(-1), b.teacher_logits.log_softmax(-1), b.labels),
        lambda s, b: dense_kl(s, b, divergence="jsd"),
        True,
    ),
    "LigerKLDIVLoss": Column(liger_kl, lambda s, b: dense_kl(s, b, divergence="forward_kl"), True),
}
TABLE = tuple(COLUMNS)[:5]  # the columns of the docs; the others are as one of these
every_loss = pytest.mark.parametrize("loss", list(COLUMNS))


class Student(nn.Module):
    """Ids to hidden states, and a head; the loss is made in forward, or from what forward returned without one."""

    def __init__(self, tied: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, H)
        self.body = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, b: Batch, column: Column | None) -> Tensor:
        x = torch.tanh(self.body(self.embed(b.ids)))
        return x if column is None else self.loss(x, b, column)

    def loss(self, x: Tensor, b: Batch, column: Column) -> Tensor:
        return column.ours(self.head(x), b) if column.from_logits else column.ours(x, self.head.weight, b)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the parameters that have one, by name; sharded ones gathered."""
    found = {name.replace("module.", ""): p.grad for name, p in model.named_parameters()}
    return {k: g.full_tensor() if hasattr(g, "full_tensor") else g for k, g in found.items() if g is not None}


def truth(column: Column, tied: bool = False, b: Batch | None = None) -> Outcome:
    """The dense loss in float64 of the whole batch on one process, and its gradients."""
    student = Student(tied).double()
    b = (b or make_batch()).to(torch.float64)
    loss = column.dense(student.head(student(b, None)), b)
    loss.backward()
    return loss.item(), gradients(student)


def same(got: Outcome, want: Outcome, tolerance: float = 1e-5) -> None:
    """The loss and each gradient, by norm."""
    assert got[0] == pytest.approx(want[0], rel=tolerance)
    assert got[1].keys() == want[1].keys()
    for name, exact in want[1].items():
        error = (got[1][name].double() - exact).norm() / exact.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


def finish(loss: Tensor, model: nn.Module) -> Outcome:
    loss.backward()
    return loss.item(), gradients(model)


# One process


@every_loss
@pytest.mark.parametrize("tied", [False, True])
def test_plain_and_tied(loss: str, tied: bool) -> None:
    student, column = Student(tied), COLUMNS[loss]
    got = finish(student(make_batch(), column), student)
    same(got, truth(column, tied))
    if tied:  # both parts count: the embedding's alone and the head's alone are something else
        assert set(got[1]) == {"embed.weight", "body.weight", "body.bias"}
        apart = truth(column)[1]
        assert all(not torch.allclose(got[1]["embed.weight"].double(), apart[f"{n}.weight"]) for n in ("embed", "head"))


@every_loss
def test_torch_compile_of_the_whole_forward(loss: str) -> None:
    torch._dynamo.reset()
    student, column = Student(), COLUMNS[loss]
    fast = torch.compile(student, backend="aot_eager", fullgraph=True)
    same(finish(fast(make_batch(), column), student), truth(column))


@every_loss
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gradient_checkpointing_around_body_head_and_loss(loss: str, reentrant: bool, tied: bool) -> None:
    student, column, b = Student(tied), COLUMNS[loss], make_batch()

    def rest(e: Tensor) -> Tensor:
        return student.loss(torch.tanh(student.body(e)), b, column)

    same(finish(checkpoint(rest, student.embed(b.ids), use_reentrant=reentrant), student), truth(column, tied))


@every_loss
def test_autocast_to_bf16(loss: str) -> None:
    """Against the truth of the hidden states and head rounded to bf16: what is left is our own rounding."""
    column, student = COLUMNS[loss], Student()
    b = make_batch().to(torch.bfloat16).to(torch.float32)  # a teacher that autocast leaves as it is
    shift = 0.0 if column.from_logits else 9.0  # far from 0 rounding is coarse, and leaving it out shows
    x = (student(b, None) + shift).detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = student.loss(x, b, column)
    assert got.dtype == torch.float32
    got.backward()
    exact_x, exact_w = (t.detach().bfloat16().double().requires_grad_() for t in (x, student.head.weight))
    want = column.dense(exact_x @ exact_w.T, b.to(torch.float64))
    want.backward()
    # Ready logits arrive rounded to bf16 by the head's own product.
    tolerance = 2e-2 if column.from_logits else 5e-3
    if not column.from_logits:  # where the loss itself rounds
        plain = column.dense(x.detach().double() @ student.head.weight.detach().double().T, b.to(torch.float64))
        assert abs(plain - want) > 3e-4 * want, "as little as no rounding at all: the next line would not see it"
        assert got.item() == pytest.approx(want.item(), rel=1e-4)
    grads, exact = ({"x": p.grad, "w": q.grad} for p, q in ((x, student.head.weight), (exact_x, exact_w)))
    same((got.item(), grads), (want.item(), exact), tolerance)


def adapted(**options: Any) -> Any:
    """A student with a real peft adapter on its head, away from the zero it starts with; and peft's wrapper."""
    peft = pytest.importorskip("peft")
    student = Student()
    model = peft.get_peft_model(student, peft.LoraConfig(r=3, lora_alpha=6, **options))
    torch.manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.3)
    return student, model


def section() -> str:
    return DOCS.read_text().split("## What works with what")[1].split("\n## ")[0]


def snippets() -> dict[str, Any]:
    """The functions that the section shows, as it shows them."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", section(), re.S):
        exec(block, names)
    return names


@every_loss
@pytest.mark.parametrize("form", ["merged", "beside"])
def test_lora_on_the_head(loss: str, form: str) -> None:
    """Both forms of the docs, against peft's own forward of the head with the dense loss."""
    column, b = COLUMNS[loss], make_batch()
    (student, model), (exact_student, exact_model) = adapted(target_modules=["head"]), adapted(target_modules=["head"])
    head, x = student.head, student(b, None)
    if column.from_logits:
        got = column.ours(head(x), b)
    elif form == "merged":
        got = column.ours(x, snippets()["merged_weight"](head), b)
    else:
        got = column.ours(*snippets()["with_lora"](x, head), b)
    exact_model.double()
    want = column.dense(exact_student.head(exact_student(b, None)), b.to(torch.float64))
    outcome = finish(got, model)
    assert [n.split(".")[-3] for n in outcome[1]] == ["lora_A", "lora_B"]
    same(outcome, finish(want, exact_model))


def test_lora_beside_the_head_keeps_its_dropout_and_merged_has_none() -> None:
    student, _ = adapted(target_modules=["head"], lora_dropout=0.5)
    x = student(make_batch(), None)
    torch.manual_seed(3)
    want = student.head(x)
    torch.manual_seed(3)
    wide_x, wide_w = snippets()["with_lora"](x, student.head)
    torch.testing.assert_close(wide_x @ wide_w.T, want)
    assert not torch.allclose(x @ snippets()["merged_weight"](student.head).T, want)


def test_lora_beside_the_head_keeps_what_bf16_weights_would_round_away() -> None:
    student, _ = adapted(target_modules=["head"])
    for factor in (student.head.lora_A, student.head.lora_B):
        factor["default"].weight.data.mul_(0.05)
    x, head = torch.randn(N, H).bfloat16(), student.head.bfloat16()
    wide_x, wide_w = snippets()["with_lora"](x, head)
    merged = snippets()["merged_weight"](head).double() - head.weight.double()
    a, b = (factor["default"].weight.double() for factor in (head.lora_A, head.lora_B))
    exact = x.double() @ (b @ a * head.scaling["default"]).T
    beside = wide_x[:, H:].double() @ wide_w[:, H:].double().T
    assert (beside - exact).norm() < 0.01 * exact.norm()
    assert (x.double() @ merged.T - exact).norm() > 0.1 * exact.norm()


def test_dora_is_neither_form() -> None:
    student, _ = adapted(target_modules=["head"], use_dora=True)
    x = student(make_batch(), None)
    wide_x, wide_w = snippets()["with_lora"](x, student.head)
    for logits in (x @ snippets()["merged_weight"](student.head).T, wide_x @ wide_w.T):
        assert (logits - student.head(x)).norm() > 0.1 * logits.norm()


def test_an_adapted_heads_weight_is_the_base_weight_alone() -> None:
    """The trap that the docs name: a loss of head.weight ignores the adapter."""
    student, model = adapted(target_modules=["head"])
    b = make_batch()
    with pytest.raises(RuntimeError, match="does not require grad"):
        student(b, COLUMNS["linear_divergence"]).backward()
    with model.disable_adapter():
        base = COLUMNS["divergence"].ours(student.head(student(b, None)), b)
    torch.testing.assert_close(student(b, COLUMNS["linear_divergence"]), base)


@every_loss
def test_a_head_in_modules_to_save(loss: str) -> None:
    """The .weight of the wrapper is the trained copy."""
    column, b = COLUMNS[loss], make_batch()
    options = {"target_modules": ["body"], "modules_to_save": ["head"]}
    (student, model), (exact_student, exact_model) = adapted(**options), adapted(**options)
    got = finish(student(b, column), model)
    exact_model.double()
    want = column.dense(exact_student.head(exact_student(b, None)), b.to(torch.float64))
    assert sum("modules_to_save" in name for name in got[1]) == 1
    same(got, finish(want, exact_model))


# Two processes over gloo


class Setup(NamedTuple):
    wrap: str
    tied: bool = False
    outside: bool = False  # the loss is made of what the wrapped forward returned
    sharded: bool = False  # head.weight is a DTensor there
    compiled: bool = False


SETUPS = {  # those that the table has are named as there
    "DDP": Setup("ddp"),
    "DDP, tied": Setup("ddp", tied=True),
    "DDP, loss outside": Setup("ddp", outside=True),
    "FSDP2": Setup("fsdp"),
    "FSDP2, tied": Setup("fsdp", tied=True),
    "FSDP2, loss outside, head whole": Setup("fsdp", outside=True),
    "FSDP2, loss outside, head sharded": Setup("fsdp-reshard", outside=True, sharded=True),
    "FSDP2, loss outside, head sharded, tied": Setup("fsdp-reshard", tied=True, outside=True, sharded=True),
    "FSDP2, head wrapped separately": Setup("fsdp-parts", outside=True, sharded=True),
    "FSDP2, the same, hybrid sharding": Setup("hsdp-parts", outside=True, sharded=True),
    "FSDP2, the same, loss compiled": Setup("fsdp-parts", outside=True, sharded=True, compiled=True),
}


def wrapped(student: Student, how: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if how.startswith("ddp"):
        return DistributedDataParallel(student, find_unused_parameters=how == "ddp-unused")
    if how.endswith("parts"):
        names = ("replicas", "shards") if how == "hsdp-parts" else ("shards",)
        mesh = init_device_mesh("cpu", (RANKS, 1)[: len(names)], mesh_dim_names=names)
        for part in (student.embed, student.body, student.head):
            fully_shard(part, mesh=mesh)
        return student
    # A root stays whole after its forward by default.
    return fully_shard(student, reshard_after_forward=True if how == "fsdp-reshard" else None)


def run_cell(setup: Setup, column: Column, b: Batch) -> Outcome:
    """The part of one rank, with its rows b. The returned loss is the loss of the whole batch."""
    import torch.distributed as dist

    student = Student(setup.tied)
    model = wrapped(student, setup.wrap)
    if setup.outside:
        x = model(b, None)
        assert hasattr(student.head.weight, "full_tensor") == setup.sharded
        ours = torch.compile(column.ours, backend="aot_eager", fullgraph=True) if setup.compiled else column.ours
        mean = ours(student.head(x), b) if column.from_logits else ours(x, student.head.weight, b)
    else:
        mean = model(b, column)
    part = snippets()["share"](mean, b.live.sum())
    part.backward()
    total = part.detach()
    dist.all_reduce(total)
    return total.item() / RANKS, gradients(model)


def without_second_rank(b: Batch) -> Batch:
    return b._replace(labels=torch.where(torch.arange(N) < 10, b.labels, -100))


def a_rank_without_tokens(rank: int) -> Outcome:
    b = without_second_rank(make_batch()).rows(rank)
    return run_cell(SETUPS["FSDP2, head wrapped separately"], COLUMNS["linear_divergence"], b)


def biases(rank: int) -> Outcome:
    """DTensors for both heads and both biases; a frozen teacher."""
    from torch.distributed.fsdp import fully_shard

    b = make_batch().rows(rank)
    torch.manual_seed(0)
    student, teacher = nn.Linear(H, V), nn.Linear(H, V).requires_grad_(False)
    fully_shard(student)
    fully_shard(teacher)
    mean = linear_divergence(
        b.teacher_x.tanh(), student.weight, b.teacher_x, teacher.weight, bias=student.bias, teacher_bias=teacher.bias,
        token_weights=b.live,
    )  # fmt: skip
    return finish(snippets()["share"](mean, b.live.sum()), student)


def full_tensor_alone(rank: int) -> dict[str, Tensor]:
    """The call that the docs warn of."""
    student, b = Student(), make_batch().rows(rank)
    model = wrapped(student, "fsdp-parts")
    w = student.head.weight.full_tensor()  # type: ignore[operator]
    mean = COLUMNS["linear_divergence"].ours(model(b, None), w, b)
    return finish(snippets()["share"](mean, b.live.sum()), model)[1]


def ddp_that_looks_for_unused_parameters(rank: int) -> Outcome:
    return run_cell(Setup("ddp-unused", outside=True), COLUMNS["linear_divergence"], make_batch().rows(rank))


def refusals(rank: int) -> dict[str, str]:
    """The error for each DTensor that is not a head or a bias."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    b, mesh = make_batch().rows(0), init_device_mesh("cpu", (RANKS,))
    w = torch.randn(V, H)
    x, logits, ids = (distribute_tensor(t, mesh, [Shard(0)]) for t in (b.teacher_x, b.teacher_logits, b.topk[0]))
    teacher_w = distribute_tensor(b.teacher_w, mesh, [Shard(0)]).requires_grad_()
    live = distribute_tensor(b.live, mesh, [Shard(0)])
    calls: dict[str, Callable[[], Any]] = {
        "x": lambda: linear_divergence(x, w, b.teacher_x, b.teacher_w),
        "token_weights": lambda: linear_divergence(b.teacher_x, w, b.teacher_x, b.teacher_w, token_weights=live),
        "student_logits": lambda: divergence(logits, b.teacher_logits),
        "teacher_ids": lambda: linear_topk_divergence(b.teacher_x, w, ids, b.topk[1]),
        "student_input": lambda: LigerFusedLinearJSD()(x, w, b.teacher_x, b.teacher_w),
        "teacher_w": lambda: linear_divergence(b.teacher_x, w, b.teacher_x, teacher_w),
    }
    said = {}
    for field, call in calls.items():
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the test reads the message)
            call()
        said[field] = str(error.value)
    return said


def tensor_parallel(rank: int) -> Outcome:
    """A head sharded by vocabulary, the same rows on both ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    student, b = Student(), make_batch()
    w = distribute_tensor(student.head.weight.detach(), init_device_mesh("cpu", (RANKS,)), [Shard(0)]).requires_grad_()
    loss = COLUMNS["linear_divergence"].ours(student(b, None), w, b)
    loss.backward()
    return loss.item(), gradients(student) | {"head.weight": w.grad.full_tensor()}


OTHERS = (
    a_rank_without_tokens,
    biases,
    tensor_parallel,
    full_tensor_alone,
    refusals,
    ddp_that_looks_for_unused_parameters,
)


def run_rank(rank: int, folder: Path) -> None:
    """All cells, in the same order on both ranks. Rank 0 saves the results, or the errors, by name."""
    import torch.distributed as dist

    sys.path.append(str(DOCS.parents[1] / "tests"))
    from ranks import leave_group

    where = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=RANKS, timeout=timedelta(seconds=120))
    calls: dict[Any, Callable[[], Any]] = {
        (name, loss): lambda s=setup, c=column: run_cell(s, c, make_batch().rows(rank))  # type: ignore[misc]
        for name, setup in SETUPS.items()
        for loss, column in COLUMNS.items()
        if not setup.compiled or loss in TABLE
    }
    calls |= {f.__name__: lambda f=f: f(rank) for f in OTHERS}  # type: ignore[misc]
    found: dict[Any, Any] = {}
    for name, call in calls.items():
        try:
            found[name] = call()
        except Exception as error:  # the other rank has it, too
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    if rank == 0:
        torch.save(found, folder / "found.pt")
    leave_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The results of two processes, by name. Both processes have ended by then."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(folder)]
    logs = [folder / f"{rank}.txt" for rank in range(RANKS)]
    ranks = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                ranks.append(subprocess.Popen([*command, str(rank)], stdout=out, stderr=out, env=environment))
        codes = [process.wait(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert codes == [0] * RANKS, "\n".join(log.read_text() for log in logs)
    return torch.load(folder / "found.pt", weights_only=True)


def table() -> dict[str, dict[str, str]]:
    """The docs' cells by row and column."""
    lines = [[c.strip(" `") for c in line.split("|")[1:-1]] for line in section().splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}


def cell(row: str, loss: str) -> str:
    """The text of that cell in the docs' table."""
    column = loss if loss in TABLE else "divergence" if COLUMNS[loss].from_logits else "compat.liger"
    return table()[row.removesuffix(", tied")][column]


ONE_PROCESS = {  # the table's other rows, whose tests pass where the cell says yes
    "torch.compile(fullgraph=True)": test_torch_compile_of_the_whole_forward,
    "gradient checkpointing, `use_reentrant` or not": test_gradient_checkpointing_around_body_head_and_loss,
    "autocast to bf16": test_autocast_to_bf16,
    "tied embeddings": test_plain_and_tied,
    "peft, LoRA on the head": test_lora_on_the_head,
    "peft, head in `modules_to_save": test_a_head_in_modules_to_save,
}


def test_every_cell_of_the_docs_has_a_test() -> None:
    assert list(table()) == [*ONE_PROCESS, *(name for name in SETUPS if not name.endswith("tied"))]
    for row, cells in table().items():
        assert tuple(cells) == TABLE
        if row in ONE_PROCESS:
            assert set(cells.values()) == {"yes"}
            assert every_loss.mark in ONE_PROCESS[row].pytestmark  # type: ignore[attr-defined]


@every_loss
@pytest.mark.parametrize("setup", list(SETUPS))
def test_two_ranks_have_the_loss_and_gradients_of_the_whole_batch(setup: str, loss: str, found: dict[Any, Any]) -> None:
    if SETUPS[setup].compiled and loss not in TABLE:
        assert (setup, loss) not in found
        return
    got = found[setup, loss]
    if cell(setup, loss) == "no":
        assert "mixed torch.Tensor and DTensor" in got
        return
    assert cell(setup, loss) == "yes"
    assert not isinstance(got, str), got
    same(got, truth(COLUMNS[loss], SETUPS[setup].tied))


def test_a_head_sharded_by_vocabulary_over_ranks_that_compute_the_same(found: dict[Any, Any]) -> None:
    assert not isinstance(found["tensor_parallel"], str), found["tensor_parallel"]
    same(found["tensor_parallel"], truth(COLUMNS["linear_divergence"]))


def test_a_rank_without_tokens(found: dict[Any, Any]) -> None:
    got = found["a_rank_without_tokens"]
    assert not isinstance(got, str), got
    same(got, truth(COLUMNS["linear_divergence"], b=without_second_rank(make_batch())))


def test_sharded_biases_and_a_sharded_teacher(found: dict[Any, Any]) -> None:
    b = make_batch().to(torch.float64)
    torch.manual_seed(0)
    student, teacher = nn.Linear(H, V).double(), nn.Linear(H, V).double()
    t = teacher(b.teacher_x)
    finish(dense.divergence_reference(student(b.teacher_x.tanh()), t, token_weights=b.live), student)  # type: ignore[arg-type]
    assert not isinstance(found["biases"], str), found["biases"]
    same((0.0, found["biases"][1]), (0.0, gradients(student)))


def test_full_tensor_alone_gives_the_head_a_wrong_gradient(found: dict[Any, Any]) -> None:
    exact = truth(COLUMNS["linear_divergence"])[1]
    got = found["full_tensor_alone"]
    assert torch.allclose(got["body.weight"].double(), exact["body.weight"], rtol=1e-4)
    assert (got["head.weight"].double() - exact["head.weight"]).norm() > 0.1 * exact["head.weight"].norm()


def test_ddp_that_looks_for_unused_parameters_wants_the_loss_inside(found: dict[Any, Any]) -> None:
    assert "mark a variable ready only once" in found["ddp_that_looks_for_unused_parameters"]


def test_other_dtensors_are_refused_by_name(found: dict[Any, Any]) -> None:
    said = found["refusals"]
    assert not isinstance(said, str), said
    assert said.pop("teacher_w").startswith("teacher_w requires grad, but no gradient flows to the teacher")
    assert len(said) == 5
    for field, message in said.items():
        assert message.startswith(f"{field} is a DTensor")
        assert f"{field}.to_local()" in message


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_rank(int(sys.argv[2]), Path(sys.argv[1]))
