"""Offloading on the CPU, where the same code runs without streams: nothing that is computed may change."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdft.errors import SdftError
from sdft.model.activations import saved_activations
from sdft.training import loop, setup
from sdft.training.checkpoint import latest
from sdft.update import offload
from sdft.update.offload import HostWorker, cut_into_parts, views_of_part

CPU = torch.device("cpu")
EVERYTHING = {"teacher.offload": True, "optim.offload": True, "model.activation_offload": True}


@pytest.mark.parametrize("sizes", [[], [0], [5], [7, 7], [3, 20, 1, 0, 6], [14, 14]])
def test_parts_hold_every_entry_once(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PART", 7)
    tensors = [torch.arange(n) + 100 * i for i, n in enumerate(sizes)]
    parts = [torch.cat(views_of_part(tensors, part)) for part in cut_into_parts(sizes)]
    assert torch.equal(torch.cat([torch.empty(0), *parts]), torch.cat([torch.empty(0), *tensors]))
    assert [len(p) for p in parts[:-1]] == [7] * (len(parts) - 1)
    assert all(0 < len(p) <= 7 for p in parts)


def test_a_lane_works_on_copies_and_brings_results_to_their_targets() -> None:
    sources = [torch.full((n,), float(n)) for n in (1, 2, 3)]
    targets = [torch.zeros(n) for n in (1, 2, 3)]
    seen = []

    def work(number: int, host: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.append(number)
        host[0].mul_(10)
        return host

    worker = HostWorker(CPU)
    worker.run([], work)
    worker.run([([s], [t]) for s, t in zip(sources, targets, strict=True)], work)
    assert seen == [0, 1, 2]
    assert [t.tolist() for t in targets] == [[10.0], [20.0, 20.0], [30.0] * 3]
    assert [s.tolist() for s in sources] == [[1.0], [2.0, 2.0], [3.0] * 3]


def outcome(output: Path) -> dict[str, torch.Tensor]:
    """Model, teacher and moments at the end of a run."""
    from safetensors.torch import load_file

    files = [*(output / "model").glob("*.safetensors"), *latest(output).glob("*.safetensors")]
    found = {f"{f.name}/{k}": t for f in files for k, t in load_file(f).items()}
    moments = torch.load(latest(output) / "optimizer.pt", weights_only=True)["state"]
    return found | {f"moments/{i}/{k}": t for i, state in moments.items() for k, t in state.items()}


SETTINGS = {
    "full": {"optim.weight_decay": 0.1},
    "lora": {"lora.rank": 2, "train.micro_batch_tokens": 100},
    "bf16": {"model.weights_dtype": "bfloat16", "model.compute_dtype": "bfloat16", "optim.lr": 1e-2},
    "teacher samples": {"rollout.source": "mixed", "model.gradient_checkpointing": True},
}


@pytest.mark.parametrize(
    ("kind", "first", "then"),
    [*((kind, EVERYTHING, EVERYTHING) for kind in SETTINGS), ("full", EVERYTHING, {}), ("full", {}, EVERYTHING)],
)
def test_an_offloaded_run_is_the_same_run(
    kind: str,
    first: dict[str, Any],
    then: dict[str, Any],
    make_config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Bit for bit, interrupted and resumed, also if only one of the two parts is offloaded."""
    monkeypatch.setattr(setup, "check_offload", lambda *a: None)
    monkeypatch.setattr(offload, "PART", 1024)  # many parts, which cut across the parameters
    loop.train(make_config(**SETTINGS[kind]))
    settings = SETTINGS[kind] | {"train.output": str(tmp_path / "off")}
    own = loop.train_step

    def interrupted(run: Any, step: int, output: Path) -> Any:
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return own(run, step, output)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(make_config(**settings | first))
    loop.train(make_config(**settings | then | {"train.resume": True}))
    got, want = outcome(tmp_path / "off"), outcome(tmp_path / "run")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("key", EVERYTHING)
def test_offloading_needs_a_gpu(key: str, make_config: Callable[..., Any], without_weights: str) -> None:
    with pytest.raises(SdftError, match=f"{key} = true moves memory from a CUDA device .* the model runs on cpu"):
        loop.train(make_config(**{key: True, "model.device": "cpu", "model.name": without_weights}))


# Activations.


def gradients(model: Any, context: Any) -> list[torch.Tensor]:
    ids = torch.arange(24).reshape(2, 12)
    with context:
        hidden = model.hidden(ids)
    hidden.square().sum().backward()
    found = [p.grad for p in model.trainable().values() if p.grad is not None]
    model.lm.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_saved_activations_change_no_gradient(checkpointing: bool, rank: int, load_tiny: Callable[..., Any]) -> None:
    from contextlib import nullcontext

    from sdft.config import LoraConfig
    from sdft.model.activations import enable_gradient_checkpointing
    from sdft.model.lora import add_lora

    model = load_tiny()[1]
    if rank:
        add_lora(model, LoraConfig(rank=rank), 0)
    if checkpointing:
        enable_gradient_checkpointing(model)
    model.lm.train()
    want = gradients(model, nullcontext())
    context = saved_activations()
    moved: list[torch.Tensor] = []
    pack = context.pack_hook

    def spy(tensor: torch.Tensor) -> Any:
        kept = pack(tensor)
        if kept is not tensor:
            moved.append(tensor.detach())
        return kept

    context.pack_hook = spy
    got = gradients(model, context)
    assert len(got) == len(want) > 0
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    weights = {p.untyped_storage().data_ptr() for p in model.lm.parameters()}
    assert not any(t.untyped_storage().data_ptr() in weights for t in moved)
    entries = sum(t.numel() for t in moved if t.is_floating_point())
    if checkpointing:  # the input of each layer, and what the final norm keeps
        assert 2 * 24 * 32 <= entries < 10 * 24 * 32
    else:
        assert entries > 20 * 24 * 32


def test_weights_stay_where_pytorchs_own_would_take_them_along() -> None:
    """The reason for our context; if this test fails, save_on_cpu is enough."""
    moved: list[Any] = []
    context = torch.autograd.graph.save_on_cpu()
    pack = context.pack_hook
    context.pack_hook = lambda t: (moved.append(t), pack(t))[1]
    layer = nn.Linear(3, 4)
    with context:
        layer(torch.ones(2, 3, requires_grad=True))
    assert any(t._base is layer.weight for t in moved)
