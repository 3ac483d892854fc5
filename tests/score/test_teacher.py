"""The teacher is a model with its weights; scoring leaves no trace in the student."""

import copy
import gc
from typing import Any

import pytest
import torch

from sdft.config import LoraConfig, TeacherConfig
from sdft.model.lora import add_lora
from sdft.score.batch import lay_out
from sdft.score.teacher import Teacher, exchanged
from sdft.update.ema import make_teacher

ALPHA = 0.05
BATCH = lay_out([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]], 258, torch.device("cpu"))


def move(model: Any, seed: int, size: float = 0.01) -> None:
    """A student's step: every trained weight changes."""
    draw = torch.Generator().manual_seed(seed)
    for p in model.trainable().values():
        p.data.add_((torch.randn(p.shape, generator=draw) * size).to(p.dtype))


def values(model: Any) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in model.trainable().items()}


def hidden_with(model: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rows of a separate copy of the model that holds `weights`."""
    other = copy.deepcopy(model)
    for k, p in other.trainable().items():
        p.data.copy_(weights[k])
    other.lm.eval()
    with torch.no_grad():
        return BATCH.select(other.hidden(BATCH.input_ids))


@pytest.mark.parametrize("kind", ["ema", "base", "live"])
def test_hidden_is_a_model_with_the_teachers_weights(model: Any, kind: Any) -> None:
    start = values(model)
    teacher = make_teacher(model, TeacherConfig(kind=kind, ema_alpha=ALPHA))
    for step in range(3):
        move(model, step, 0.1)
        teacher.update()
    expected = {"ema": teacher.tensors, "base": start, "live": values(model)}[kind]
    hidden, head = teacher.hidden(BATCH)
    assert torch.equal(hidden, hidden_with(model, expected))
    other = copy.deepcopy(model)
    for k, p in other.trainable().items():
        p.data.copy_(expected[k])
    assert torch.equal(head.weight, other.head().weight)
    if kind != "live":
        assert not torch.equal(hidden, hidden_with(model, values(model)))  # it is not the student


def test_base_never_moves(model: Any) -> None:
    start = values(model)
    teacher = make_teacher(model, TeacherConfig(kind="base"))
    want = hidden_with(model, start)
    for step in range(3):
        move(model, step, 0.1)
        teacher.update()
        assert torch.equal(teacher.hidden(BATCH)[0], want)
    if not teacher.adapter_off:
        assert all(torch.equal(teacher.tensors[k], start[k]) for k in start)


# LoRA: the base weights exist once, and a fresh adapter's start is the adapter switched off.

FRESH = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "head": {"modules_to_save": ("lm_head",)},
}


def with_adapter(load_tiny: Any, settings: dict[str, Any], **model_settings: Any) -> Any:
    model = load_tiny(**model_settings)[1]
    add_lora(model, LoraConfig(rank=3, **settings), 0)
    return model


@pytest.mark.parametrize("kind", FRESH)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_base_of_a_fresh_adapter_is_the_adapter_off(kind: str, dtypes: tuple[str, str], load_tiny: Any) -> None:
    """It equals, bit for bit, a teacher that holds a copy of the factors, and the model without any adapter."""
    precision = dict(zip(("weights_dtype", "compute_dtype"), dtypes, strict=True))
    model = with_adapter(load_tiny, FRESH[kind], **precision)
    copy_ = Teacher(copy.deepcopy(model), "base", values(model))
    teacher = make_teacher(model, TeacherConfig(kind="base"))
    assert teacher.adapter_off
    assert not teacher.state()
    for m in (model, copy_.model):
        move(m, 1, 0.1)
    hidden, head = teacher.hidden(BATCH)
    want, want_head = copy_.hidden(BATCH)
    assert torch.equal(hidden, want)
    assert torch.equal(head.weight, want_head.weight.to(head.weight.dtype))
    plain = load_tiny(**precision)[1]
    plain.lm.eval()
    with torch.no_grad():
        assert torch.equal(hidden, BATCH.select(plain.hidden(BATCH.input_ids)))
    student = BATCH.select(model.hidden(BATCH.input_ids))
    assert not torch.equal(hidden, student)


def test_an_adapter_that_has_moved_is_copied(load_tiny: Any) -> None:
    for settings in FRESH.values():
        model = with_adapter(load_tiny, settings)
        move(model, 0, 0.1)
        teacher = make_teacher(model, TeacherConfig(kind="base"))
        assert not teacher.adapter_off
        assert teacher.tensors.keys() == model.trainable().keys()
    model = with_adapter(load_tiny, FRESH["head"])
    model.head().weight.data.mul_(2)  # only the head has moved
    assert not make_teacher(model, TeacherConfig(kind="base")).adapter_off


@pytest.mark.parametrize("kind", FRESH)
def test_a_resumed_base_teacher_is_the_start_of_the_stage(kind: str, load_tiny: Any) -> None:
    """A resumed run makes the teacher, then loads adapters that are zero no more."""
    model = with_adapter(load_tiny, FRESH[kind])
    teacher = make_teacher(model, TeacherConfig(kind="base"))
    want = teacher.hidden(BATCH)[0]
    move(model, 0, 0.1)
    trained, state = values(model), teacher.state()
    again = with_adapter(load_tiny, FRESH[kind])
    resumed = make_teacher(again, TeacherConfig(kind="base"))
    for name, p in again.trainable().items():
        p.data.copy_(trained[name])
    resumed.load_state(state)
    assert torch.equal(resumed.hidden(BATCH)[0], want)


def storage_bytes() -> int:
    """Bytes of every live tensor's storage, each once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        # By type and layout: the fake and sparse tensors that other tests leave behind have no storage.
        plain = type(found) in (torch.Tensor, torch.nn.Parameter) and found.layout == torch.strided
        if plain and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(
    "kind", ["ema", pytest.param("base", marks=pytest.mark.slow), pytest.param("live", marks=pytest.mark.slow)]
)
def test_the_base_weights_exist_once(kind: Any, load_tiny: Any) -> None:
    model = load_tiny()[1]
    base = sum(p.numel() for p in model.lm.parameters()) * 4
    before = storage_bytes()
    add_lora(model, LoraConfig(rank=1, targets=("q_proj",)), 0)
    teacher = make_teacher(model, TeacherConfig(kind=kind))
    with torch.no_grad():
        hidden, head = teacher.hidden(BATCH)
    move(model, 0)
    teacher.update()
    factors = sum(p.numel() for p in model.trainable().values()) * 4
    copies = {"base": 1, "live": 1, "ema": 3}[kind]  # of the factors: the student's, the masters, the sample at start
    extra = storage_bytes() - before
    assert factors <= extra <= copies * factors + hidden.nbytes + 20_000
    assert extra < 0.2 * base
    assert head.weight.data_ptr() == model.head().weight.data_ptr()


def test_it_starts_from_the_student_in_memory(model: Any) -> None:
    move(model, 0, 0.3)
    for kind in ("ema", "base"):
        teacher = make_teacher(model, TeacherConfig(kind=kind))
        assert all(torch.equal(teacher.tensors[k], p.to(teacher.tensors[k].dtype)) for k, p in values(model).items())
        assert all(teacher.tensors[k].data_ptr() != p.data_ptr() for k, p in model.trainable().items())


def facts(model: Any) -> list[Any]:
    return [(k, p.data_ptr(), p.requires_grad, p.dtype, hash(p.detach().float().numpy().tobytes()))
            for k, p in model.lm.named_parameters(remove_duplicate=False)]  # fmt: skip


def test_the_swap_leaves_the_student_as_it_was(model: Any) -> None:
    teacher = make_teacher(model, TeacherConfig(kind="ema", ema_alpha=ALPHA))
    move(model, 0, 0.1)
    teacher.update()
    model.lm.train()
    before = facts(model)
    with teacher.weights():
        assert [f[4] for f in facts(model)] != [f[4] for f in before]
    assert facts(model) == before
    teacher.hidden(BATCH)
    assert facts(model) == before
    with pytest.raises(ZeroDivisionError), teacher.weights():
        raise ZeroDivisionError
    assert facts(model) == before
    assert model.lm.training


def test_a_failed_forward_leaves_the_student_as_it_was(model: Any) -> None:
    teacher = make_teacher(model, TeacherConfig(kind="ema"))
    move(model, 0, 0.1)
    model.lm.train()
    before = facts(model)
    with pytest.raises(IndexError):
        teacher.hidden(lay_out([[9999]], [[5, 6]], 258, torch.device("cpu")))  # no such token
    assert facts(model) == before
    assert model.lm.training


def test_the_teacher_has_no_dropout(load_tiny: Any) -> None:
    model = load_tiny("gpt2")[1]
    for module in model.lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5  # as a LoRA adapter's may be; the model's own is off from loading
    teacher = make_teacher(model, TeacherConfig(kind="base"))
    model.lm.train()
    assert not torch.equal(model.hidden(BATCH.input_ids), model.hidden(BATCH.input_ids))  # the student has
    assert torch.equal(teacher.hidden(BATCH)[0], hidden_with(model, values(model)))


def test_a_tied_weight_stays_tied(load_tiny: Any) -> None:
    model = load_tiny("llama-tied")[1]
    teacher = make_teacher(model, TeacherConfig(kind="ema"))
    move(model, 0, 0.1)
    lm = model.lm
    with teacher.weights():
        assert lm.lm_head.weight.data_ptr() == lm.model.embed_tokens.weight.data_ptr()
        assert torch.equal(lm.lm_head.weight, teacher.tensors["model.embed_tokens.weight"])
    assert lm.lm_head.weight is lm.model.embed_tokens.weight


def test_a_graph_of_the_student_outlives_the_exchange(model: Any) -> None:
    """Other Parameter objects stand in the module: what the student's backward pass needs stays where it was."""

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(loss, list(model.trainable().values()), allow_unused=True)
        return [g for g in found if g is not None]

    want = gradients(model.hidden(BATCH.input_ids).square().sum())
    loss = model.hidden(BATCH.input_ids).square().sum()
    with exchanged(model.lm, {k: torch.zeros_like(p) for k, p in values(model).items()}):
        assert not any(p.any() for k, p in model.lm.named_parameters() if k in values(model))
    got = gradients(loss)
    assert len(got) == len(want) > 1
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_weights_of_other_dtypes_are_cast(load_tiny: Any) -> None:
    model = load_tiny(weights_dtype="bfloat16")[1]
    weight = torch.full_like(model.lm.lm_head.weight, 1 / 3, dtype=torch.float32)
    with exchanged(model.lm, {"lm_head.weight": weight}):
        assert torch.equal(model.lm.lm_head.weight, weight.bfloat16())


@pytest.mark.parametrize("kind", ["ema", "base", "live"])
def test_no_gradient_reaches_the_teacher(model: Any, kind: Any) -> None:
    teacher = make_teacher(model, TeacherConfig(kind=kind))
    state = {k: t.clone() for k, t in teacher.state().items()}
    teacher_hidden, head = teacher.hidden(BATCH)
    assert not teacher_hidden.requires_grad
    assert not head.weight.requires_grad
    hidden = BATCH.select(model.hidden(BATCH.input_ids))
    (hidden - teacher_hidden).square().sum().add(hidden.sum() * head.weight.sum().to(hidden.dtype)).backward()
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.1)
    optimizer.step()
    assert all(t.grad is None and not t.requires_grad for t in teacher.state().values())
    assert all(torch.equal(t, state[k]) for k, t in teacher.state().items())


@pytest.mark.parametrize("kind", ["ema", "base", "live"])
def test_state_round_trip(model: Any, kind: Any) -> None:
    teacher = make_teacher(model, TeacherConfig(kind=kind))
    for step in range(2):
        move(model, step, 0.1)
        teacher.update()
    state = {k: t.clone() for k, t in teacher.state().items()}
    want = teacher.hidden(BATCH)[0], teacher.tracked()
    again = make_teacher(model, TeacherConfig(kind=kind))  # starts from the moved student ...
    again.load_state(state)  # ... and is put right
    assert torch.equal(again.hidden(BATCH)[0], want[0])
    assert torch.equal(again.tracked(), want[1])
