"""What only a GPU can show. One command there: make test-gpu"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sdft_kernels import divergence, linear_divergence, linear_topk_divergence
from sdft_kernels.reference import divergence_reference, topk_divergence_reference
from sdft_kernels.reference import linear_divergence_reference as reference
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT MEASURED ON A GPU: this machine has none"),
]


NAMES = ("reverse_kl", "forward_kl", "jsd")
BOUNDS = {torch.float32: 5e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}  # of gradients, relative


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """No TF32: its rounding is not the loss's."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype, *, noise: float = 0.15, shared: bool = False
) -> list[Tensor]:
    """x, w, teacher_x and teacher_w on the GPU; the teacher is near."""
    gen = torch.Generator("cuda").manual_seed(rows + vocab)

    def normal(n: int) -> Tensor:
        return torch.randn(n, hidden, generator=gen, device="cuda")

    x, w = normal(rows), normal(vocab) / hidden**0.5
    teacher_x = x + noise * normal(rows)
    teacher_w = w if shared else w + noise * normal(vocab) / hidden**0.5
    x, w, teacher_x = x.to(dtype), w.to(dtype), teacher_x.to(dtype)
    return [x, w, teacher_x, w if shared else teacher_w.to(dtype)]


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def compare(
    inputs: list[Tensor], bound: float, *, frozen: bool = False, impl: str | None = "triton", **options: Any
) -> None:
    """Loss, per-token outputs and gradients against float64."""
    wanted = 1 if frozen else 2
    ours = [t.detach().requires_grad_(i < wanted) for i, t in enumerate(inputs)]
    truth = [t.detach().double().requires_grad_(i < wanted) for i, t in enumerate(inputs)]
    labels = torch.arange(len(inputs[0]), device="cuda") * 37 % len(inputs[1])
    loss, tokens = linear_divergence(*ours, labels=labels, return_tokens=True, impl=impl, **options)
    want, exact = reference(*truth, labels=labels, return_tokens=True, **options)
    assert error(loss, want) < 1e-2
    for got, value in zip(tokens[:5], exact[:5], strict=True):
        assert error(got, value) < 1e-2
    scaler = 2.0**12  # fp16 gradients are subnormal without one
    grads = torch.autograd.grad(loss * scaler, ours[:wanted])
    for got, value in zip(grads, torch.autograd.grad(want * scaler, truth[:wanted]), strict=True):
        assert error(got, value) < bound


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_and_gradients_match_float64(name: str, dtype: torch.dtype, shared: bool, frozen: bool) -> None:
    inputs = make(253, 5001, 128, dtype, shared=shared)
    compare(inputs, BOUNDS[dtype], frozen=frozen, divergence=name, beta=0.3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [
    {"softcap": 3.0, "temperature": 0.7, "scale": 0.5},
    {"chunk_bytes": 2**21},
    {"vocab_size": 1},
    {"vocab_size": 4097},
], ids=str)  # fmt: skip
def test_options(name: str, options: dict[str, Any]) -> None:
    inputs = make(130, 5001, 64, torch.bfloat16)
    weights = (torch.arange(130, device="cuda") % 3).float()
    if options.get("vocab_size") == 1:  # one token has no loss; that the kernel runs is the point
        x = inputs[0].detach().requires_grad_()
        loss = linear_divergence(x, *inputs[1:], divergence=name, impl="triton", **options)
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, x)[0] == 0).all()
        return
    for compact in (True, False):
        x = [t.detach().requires_grad_(i < 2) for i, t in enumerate(inputs)]
        truth = [t.detach().double().requires_grad_(i < 2) for i, t in enumerate(inputs)]
        loss = linear_divergence(*x, divergence=name, token_weights=weights, compact=compact, impl="triton", **options)
        want = reference(
            *truth, divergence=name, token_weights=weights, **{k: v for k, v in options.items() if k != "chunk_bytes"}
        )
        assert error(loss, want) < 1e-2
        for got, value in zip(torch.autograd.grad(loss, x[:2]), torch.autograd.grad(want, truth[:2]), strict=True):
            assert error(got, value) < 5e-3


@pytest.mark.parametrize("vocab", [151_936, 262_144])
@pytest.mark.parametrize("name", NAMES)
def test_long_vocabularies(name: str, vocab: int) -> None:
    compare(make(48, vocab, 64, torch.bfloat16, shared=True), 5e-3, divergence=name)


def test_auto_chooses_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    import sdft_kernels.triton_impl as loop

    calls = []
    monkeypatch.setattr(loop, "run_linear", lambda *a, run=loop.run_linear: calls.append(1) or run(*a))
    linear_divergence(*make(8, 100, 64, torch.bfloat16))
    assert calls == [1]


def test_products_of_narrow_operands_are_fp32_without_widening() -> None:
    """mm(out_dtype=): no fp32 copy of a bf16 head is made, nor of the logits' gradient."""
    from sdft_kernels.operands import mm32

    for dtype in (torch.bfloat16, torch.float16):
        a, b = torch.randn(64, 256, device="cuda").to(dtype), torch.randn(256, 512, device="cuda").to(dtype)
        out = torch.full((64, 576), 7.0, device="cuda")
        view = out[:, :512]
        exact = a.double() @ b.double()
        mm32(a, b, view)
        assert error(view, exact) < 1e-6, "the result was rounded"
        mm32(a, b, view, beta=1.0)
        assert error(view, 2 * exact) < 1e-6
        assert (out[:, 512:] == 7.0).all()
        mm32(b.t(), a.t(), torch.empty(512, 64, device="cuda"))  # as dW asks for it
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        mm32(a, b, view)
        assert torch.cuda.max_memory_allocated() - before < 2 * b.nbytes  # cuBLAS may take a workspace once, before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inplace", [False, True])
def test_ready_logits(dtype: torch.dtype, inplace: bool) -> None:
    student, teacher = (torch.randn(33, 10_007, device="cuda").to(dtype) for _ in range(2))
    for name in NAMES:
        exact = student.double().requires_grad_()
        want = divergence_reference(exact, teacher.double(), divergence=name, reduction="sum")
        leaf = student.clone().requires_grad_()
        loss = divergence(leaf, teacher, divergence=name, reduction="sum", inplace=inplace, impl="triton")
        assert error(loss, want) < 1e-5
        assert error(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(want, exact)[0]) < BOUNDS[dtype]


def test_ready_logits_past_two_to_the_31() -> None:
    n, v = 16_384, 151_936
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free GPU memory")
    student = torch.zeros(n, v, device="cuda", dtype=torch.bfloat16)
    teacher = torch.zeros(1, v, device="cuda", dtype=torch.bfloat16).expand(n, v)
    rows = torch.tensor([0, 1, n // 2, n - 1], device="cuda")
    student[rows] = torch.randn(4, v, device="cuda").bfloat16()
    exact = student[rows].double().requires_grad_()
    want = divergence_reference(exact, teacher[rows].double(), reduction="sum")
    _, tokens = divergence(student, teacher, reduction="sum", return_tokens=True, impl="triton")
    assert error(tokens.divergence[rows].sum(), want) < 1e-5
    loss = divergence(student.requires_grad_(), teacher, reduction="sum", inplace=True, impl="triton")
    (grad,) = torch.autograd.grad(loss, student)
    assert error(grad[rows], torch.autograd.grad(want, exact)[0]) < 5e-3
    assert grad[2].abs().max() < 1e-6  # a row that agrees with the teacher


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_host_never_waits(dtype: torch.dtype, reduction: str) -> None:
    inputs = make(200, 3000, 64, dtype)
    weights = (torch.arange(200, device="cuda") % 3).float()
    upstream = torch.ones((200,) if reduction == "none" else (), device="cuda")

    def step() -> None:
        leaves = [t.detach().requires_grad_(i < 2) for i, t in enumerate(inputs)]
        loss = linear_divergence(
            *leaves, token_weights=weights, compact=False, impl="triton", reduction=reduction, chunk_bytes=2**21
        )
        torch.autograd.grad(loss, leaves[:2], upstream)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_topk_matches_float64_and_the_host_never_waits(name: str, tail: str, dtype: torch.dtype) -> None:
    x, w, teacher_x, teacher_w = make(200, 3000, 64, dtype)
    logprobs, ids = (teacher_x.double() @ teacher_w.double().T).log_softmax(1).topk(20)
    ids[::3, 15:] = -1
    ids[::5, 4] = ids[::5, 2]
    low = logprobs.float()
    leaves = [x.requires_grad_(), w.requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    scaler = torch.tensor(2.0**12, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = linear_topk_divergence(x, w, ids, low, divergence=name, tail=tail, chunk_bytes=2**21)
        grads = torch.autograd.grad(loss, leaves, scaler)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = topk_divergence_reference(exact[0] @ exact[1].T, ids, logprobs, divergence=name, tail=tail)
    assert error(loss, want) < 1e-3
    for got, value in zip(grads, torch.autograd.grad(want * scaler, exact), strict=True):
        assert error(got, value) < BOUNDS[dtype]


def test_the_self_test_passes() -> None:
    from sdft_kernels.__main__ import main

    assert main([]) == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_by_inductor(reduction: str) -> None:
    def f(x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor) -> Tensor:
        return linear_divergence(x * 2, w, teacher_x, teacher_w, impl="triton", reduction=reduction).sum()

    fast = torch.compile(f, fullgraph=True)
    for rows in (64, 70, 90):
        leaves = [t.requires_grad_(i < 2) for i, t in enumerate(make(rows, 1000, 64, torch.bfloat16))]
        want, got = f(*leaves), fast(*leaves)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, leaves[:2]), torch.autograd.grad(want, leaves[:2]), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [False, True])
def test_memory_stays_within_the_chunk_budget(frozen: bool) -> None:
    n, v, h, budget = 8192, 50_000, 64, 2**26
    x, w, teacher_x, teacher_w = make(n, v, h, torch.bfloat16, shared=True)
    x.requires_grad_()
    w = w.detach().requires_grad_(not frozen)
    linear_divergence(x, w, teacher_x, teacher_w, chunk_bytes=budget).backward()  # cuBLAS takes its workspace
    x.grad = w.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_divergence(x, w, teacher_x, teacher_w, chunk_bytes=budget).backward()
    extra = torch.cuda.max_memory_allocated() - before
    results = x.nbytes + 4 * n + (0 if frozen else 6 * v * h)  # dX, divergences; dW in fp32 and, at the end, in bf16
    assert extra <= budget + results + 2**22  # two (N, V) fp32 logits would take 3.3 GB


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_trains_and_resumes(make_config: Callable[..., Any], rank: int) -> None:
    from dataclasses import replace

    for needed in ("tomli_w", "peft"):
        pytest.importorskip(needed)  # a lent machine may have neither: make wheels brings them
    from sdft.training.loop import train
    from sdft.training.metrics import read_metrics

    config = make_config(**{"model.device": "cuda", "model.compute_dtype": "bfloat16", "lora.rank": rank})
    train(config)
    lines = read_metrics(Path(config.train.output))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["seconds"]["rollout"] > 0 for line in lines)
    train(replace(config, train=replace(config.train, resume=True)))


# Memory that moves to the CPU.


@pytest.fixture
def big() -> Callable[..., Any]:
    """big(dtype) is a random Llama of 27M weights on the GPU."""
    transformers = pytest.importorskip("transformers")
    from sdft.model.loading import LanguageModel

    def make(dtype: torch.dtype = torch.bfloat16) -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=16000, hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=4, tie_word_embeddings=True,
        )  # fmt: skip
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).cuda()
        return LanguageModel(lm, torch.device("cuda", 0), torch.bfloat16, 0, (1,))

    return make


def ids(rows: int = 8, width: int = 512) -> Tensor:
    return torch.randint(0, 16000, (rows, width), generator=torch.Generator().manual_seed(0)).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_teacher_is_the_teacher(big: Callable[..., Any], dtype: torch.dtype) -> None:
    from sdft.config import TeacherConfig
    from sdft.score.teacher import Teacher

    model, rounding = big(dtype), 1e-2 if dtype == torch.bfloat16 else 1e-6
    parameters = list(model.trainable().values())
    plain, away = (Teacher(model, TeacherConfig(ema_alpha=0.1, offload=o)) for o in (False, True))
    for step in range(5):
        draw = torch.Generator("cuda").manual_seed(step)
        for p in parameters:
            p.data.add_((torch.randn(p.shape, generator=draw, device="cuda") * 0.01).to(dtype))
        plain.update()
        away.update()
        away.wait()
        for name, master in plain.masters.items():
            assert away.masters[name].device.type == "cpu"
            torch.testing.assert_close(away.masters[name].cuda(), master, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(away.copies[name], master.to(dtype), rtol=rounding, atol=1e-8)
        assert away.tracked().item() == pytest.approx(plain.tracked().item(), rel=1e-4)
    state = {name: t.clone() for name, t in away.state().items()}
    again = Teacher(model, TeacherConfig(offload=True))
    again.load_state(state)
    assert all(torch.equal(again.copies[name], away.copies[name]) for name in away.copies)


def test_an_offloaded_teacher_takes_two_bytes_a_weight(big: Callable[..., Any]) -> None:
    from sdft.config import TeacherConfig
    from sdft.score.teacher import Teacher

    model = big()
    weights = sum(p.numel() for p in model.trainable().values())
    taken = {}
    for offload in (False, True):
        before = torch.cuda.memory_allocated()
        teacher = Teacher(model, TeacherConfig(offload=offload))
        teacher.update()
        teacher.wait()
        torch.cuda.synchronize()
        taken[offload] = (torch.cuda.memory_allocated() - before) / weights
        del teacher
    assert 4.0 <= taken[False] < 4.3  # and the sample of the start
    assert 2.0 <= taken[True] < 2.4


def test_the_average_runs_beside_the_next_forward(big: Callable[..., Any]) -> None:
    """Nothing waits between the update and the next forward, though the device is busy all along."""
    from sdft.config import TeacherConfig
    from sdft.score.teacher import Teacher

    model = big()
    teacher = Teacher(model, TeacherConfig(ema_alpha=0.5, offload=True))
    tokens = ids()
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.01)
        teacher.update()  # pinned memory is made in the first
        teacher.wait()
        want = model.hidden(tokens)
    torch.cuda.synchronize()
    before = {name: t.clone() for name, t in teacher.masters.items()}
    torch.cuda._sleep(2_000_000_000)  # about a second
    busy = torch.cuda.Event()
    busy.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        teacher.update()
        tracked = teacher.tracked()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        got = model.hidden(tokens)
    assert not busy.query()  # the host is ahead of the device
    assert not teacher.pending.done()
    assert torch.equal(got, want)  # the student's own
    teacher.wait()
    assert 0.5 < tracked.item() < 1
    assert all(not torch.equal(teacher.masters[name], before[name]) for name in before)
    with teacher.weights():
        for name, p in model.trainable().items():
            assert torch.equal(p.cpu(), teacher.masters[name].to(p.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_optimizer_is_the_optimizer(big: Callable[..., Any], dtype: torch.dtype) -> None:
    from dataclasses import replace

    from sdft.config import OptimConfig
    from sdft.update.optim import clip, make_optimizer

    config = OptimConfig(lr=1e-3, weight_decay=0.1)
    weights, taken = {}, {}
    for offload in (False, True):
        model = big(dtype)
        parameters = list(model.trainable().values())
        optimizer = make_optimizer(parameters, replace(config, offload=offload))
        before = torch.cuda.memory_allocated()
        for step in range(6):
            if step == 3:  # through a file, as at a resume
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = make_optimizer(parameters, replace(config, offload=offload))
                optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            draw = torch.Generator("cuda").manual_seed(step)
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=draw, device="cuda").to(dtype)
            clip(parameters, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        taken[offload] = (torch.cuda.memory_allocated() - before) / sum(p.nbytes for p in parameters)
        weights[offload] = [p.detach().clone() for p in parameters]
        assert all(t.device.type == ("cpu" if offload else "cuda") for t in optimizer.state[parameters[0]].values())
        del optimizer, model, parameters
    assert taken[True] < 0.05
    assert 1.9 < taken[False] < 2.1
    bound = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(weights[True], weights[False], **bound)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_offload(big: Callable[..., Any], checkpointing: bool) -> None:
    from contextlib import nullcontext

    from sdft.model.loading import enable_gradient_checkpointing, saved_activations

    model = big(torch.float32)
    model.compute_dtype = torch.float32
    model.lm.train()
    if checkpointing:
        enable_gradient_checkpointing(model)
    gradients, held = {}, {}
    for offload in (False, True):
        for _ in range(2):  # the first warms up
            model.lm.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            with saved_activations() if offload else nullcontext():
                hidden = model.hidden(ids())
            held[offload] = torch.cuda.memory_allocated() - before - hidden.nbytes
            hidden.square().mean().backward()
        gradients[offload] = [p.grad.clone() for p in model.trainable().values()]
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-4, atol=1e-7)
    assert held[True] < 0.3 * held[False]


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bits(big: Callable[..., Any], name: Any) -> None:
    pytest.importorskip("bitsandbytes")
    from sdft.config import OptimConfig
    from sdft.update.optim import make_optimizer

    config = OptimConfig(name=name, lr=1e-3)
    outcomes = []
    for resumed in (False, True):
        model = big()
        parameters = list(model.trainable().values())
        optimizer = make_optimizer(parameters, config)
        for step in range(4):
            if resumed and step == 2:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = make_optimizer(parameters, config)
                optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            draw = torch.Generator("cuda").manual_seed(step)
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=draw, device="cuda").to(p.dtype)
            optimizer.step()
        large = optimizer.state[max(parameters, key=lambda p: p.numel())]["state1"]
        assert large.dtype == torch.uint8
        assert getattr(large, "is_paged", False) == (name == "paged_adamw_8bit")
        outcomes.append([p.detach().clone() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_with_everything_offloaded(make_config: Callable[..., Any], rank: int) -> None:
    from dataclasses import replace

    for needed in ("tomli_w", "peft"):
        pytest.importorskip(needed)
    from sdft.training.loop import train
    from sdft.training.metrics import read_metrics

    settings = {
        "model.device": "cuda",
        "model.weights_dtype": "bfloat16",
        "model.compute_dtype": "bfloat16",
        "lora.rank": rank,
        "rollout.temperature": 0.0,
        "optim.lr": 1e-2,
    }
    config = make_config(**settings)
    train(config)
    offload = {"teacher.offload": True, "optim.offload": True, "model.activation_offload": True}
    away = make_config(**settings | offload | {"train.output": config.train.output + "-away"})
    train(away)
    plain, moved = (read_metrics(Path(c.train.output)) for c in (config, away))
    assert moved[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-3)
    assert moved[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-2)
    # One step's rounding apart; later ones sample other answers.
    assert moved[0]["teacher_tracked"] == pytest.approx(plain[0]["teacher_tracked"], rel=1e-2)
    assert len(moved) == len(plain) == 4
    train(replace(away, train=replace(away.train, resume=True)))


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_decoding_by_fused_blocks(
    kind: str, rank: int, load_tiny: Callable[..., Any], nudge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 weights under bf16 products: the fused blocks give the hidden states of transformers' own."""
    from sdft.config import LoraConfig
    from sdft.model.loading import add_lora
    from sdft.rollout import decode

    model = load_tiny(kind, device="cuda", compute_dtype="bfloat16")[1]
    if rank:
        add_lora(model, LoraConfig(rank=rank), 0)
        nudge(model, size=0.3)
    model.lm.eval()
    ids = torch.arange(3, 39, device="cuda").view(3, 12)
    first = torch.tensor([[4], [0], [7]], device="cuda")
    at = torch.arange(12, device="cuda")
    mask, position = (at >= first).long(), (at - first).clamp(min=0)
    states = []
    for fused in (decode.FUSED, ()):
        monkeypatch.setattr(decode, "FUSED", fused)
        with torch.no_grad(), model.autocast(), decode.decoder(model, 12) as start:
            passage = start(3, 12)
            new = [slice(0, 10), slice(10, 11), slice(11, 12)]
            states.append(torch.stack([passage(ids[:, n], position[:, n], mask[:, : n.stop]).float() for n in new]))
    assert type(passage) is decode.Own
    assert (states[0] - states[1]).norm() <= 0.05 * states[1].norm()
