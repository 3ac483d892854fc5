"""Offloading to the CPU (teacher, optimizer, activations), and runs of the trainer with it: the same values.

Offloading may change only the place: every check compares with the same tensors kept on the device.
"""

import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .check import Check, Found, recorded
from .phase import Item, Place
from .steps import random_model

OFFLOAD = {"teacher.offload": True, "optim.offload": True, "model.activation_offload": True}


def items(place: Place) -> list[Item]:
    return [Item(check.name, partial(recorded, check, place)) for check in CHECKS]


def llama(place: Place, dtype: torch.dtype) -> Any:
    """A random Llama of 27M weights (tiny: 20 thousand) as a LanguageModel."""
    import transformers

    from sdft.model.language_model import LanguageModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300}
    if not place.tiny:
        sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 16_000}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).to(place.device)
    device = torch.device("cuda", 0) if place.device == "cuda" else torch.device("cpu")
    return LanguageModel(lm, device, torch.bfloat16, 0, (1,))


def tokens(place: Place) -> Tensor:
    rows, width, vocab = (2, 16, 300) if place.tiny else (8, 512, 16_000)
    return torch.randint(0, vocab, (rows, width), generator=torch.Generator().manual_seed(0)).to(place.device)


def moved(parameters: list[Tensor], step: int, device: str) -> Iterator[Tensor]:
    """A random change of each parameter."""
    draw = torch.Generator(device).manual_seed(step)
    for p in parameters:
        yield (torch.randn(p.shape, generator=draw, device=device) * 0.01).to(p.dtype)


def apart(pairs: Any) -> float:
    """The largest relative distance of pairs of tensors, each moved to the second one's device."""
    return max(
        ((a.to(b.device).double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item() for a, b in pairs
    )


def teacher(place: Place, dtype: torch.dtype) -> Iterator[Found]:
    """EMA masters on the CPU average like masters on the device, through five updates and a saved state."""
    from sdft.update.ema import AveragedTeacher

    model = llama(place, dtype)
    parameters = list(model.trainable().values())
    plain, away = (AveragedTeacher(model, 0.1, offload=o) for o in (False, True))
    for step in range(5):
        for p, change in zip(parameters, moved(parameters, step, place.device), strict=True):
            p.data.add_(change)
        plain.update()
        away.update()
        away.wait()
    yield Found("masters", apart((away.masters[n], plain.masters[n]) for n in plain.masters), 1e-6)
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-6
    yield Found("copies", apart((away.tensors[n], plain.masters[n]) for n in plain.masters), rounding)
    tracked = away.tracked().item(), plain.tracked().item()
    yield Found("tracked share", abs(tracked[0] / tracked[1] - 1), 1e-4)
    off_device = [t.device.type for t in away.masters.values()]
    yield Found("masters that are not on the CPU", float(sum(kind != "cpu" for kind in off_device)), 0.0)
    again = AveragedTeacher(model, 0.1, offload=True)
    again.load_state({name: t.clone() for name, t in away.state().items()})
    yield Found("loaded from its state", apart((again.tensors[n], away.tensors[n]) for n in away.tensors), 0.0)


def teacher_bytes(place: Place) -> Iterator[Found]:
    from sdft.update.ema import AveragedTeacher

    model = llama(place, torch.bfloat16)
    weights = sum(p.numel() for p in model.trainable().values())
    for offload, most in ((False, 4.3), (True, 2.4)):
        before = torch.cuda.memory_allocated()
        made = AveragedTeacher(model, 0.1, offload=offload)
        made.update()
        made.wait()
        torch.cuda.synchronize()
        taken = (torch.cuda.memory_allocated() - before) / weights
        yield Found(f"bytes a weight, offload {offload}", taken, most)
        del made


def teacher_beside_the_forward(place: Place) -> Iterator[Found]:
    """The host does not wait between the update and the next forward pass, although the device is busy throughout."""
    from sdft.update.ema import AveragedTeacher

    model = llama(place, torch.bfloat16)
    made, ids = AveragedTeacher(model, 0.5, offload=True), tokens(place)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.01)
        made.update()  # the first update allocates pinned memory
        made.wait()
        want = model.hidden(ids)
    before = {name: t.clone() for name, t in made.masters.items()}
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    busy = torch.cuda.Event()
    busy.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.update()
        tracked = made.tracked()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        got = model.hidden(ids)
    yield Found("the host waited for the device", float(busy.query()), 0.0)
    yield Found("the average was done before", float(made.pending is None or made.pending.done()), 0.0)
    yield Found("hidden states of the student", apart([(got, want)]), 0.0)
    made.wait()
    yield Found("tracked share", abs(tracked.item() - 0.75), 0.25)
    yield Found("masters that stayed", float(sum(torch.equal(made.masters[n], before[n]) for n in before)), 0.0)
    with made.weights():
        pairs = [(p, made.masters[name].to(p.dtype)) for name, p in model.trainable().items()]
        yield Found("weights of the teacher", apart((p.cpu(), master) for p, master in pairs), 0.0)


def optimizer(place: Place, dtype: torch.dtype) -> Iterator[Found]:
    """Six steps of AdamW with its states on the CPU, saved to a file and loaded in the middle."""
    from sdft.config import OptimConfig
    from sdft.update.optim import clip, make_optimizer

    config = OptimConfig(lr=1e-3, weight_decay=0.1)
    weights, taken = {}, {}
    for offload in (False, True):
        model = llama(place, dtype)
        parameters = list(model.trainable().values())
        made = make_optimizer(parameters, replace(config, offload=offload))
        before = torch.cuda.memory_allocated() if place.device == "cuda" else 0
        for step in range(6):
            if step == 3:
                made = through_a_file(made, make_optimizer(parameters, replace(config, offload=offload)))
            for p, change in zip(parameters, moved(parameters, step, place.device), strict=True):
                p.grad = change * 100
            clip(parameters, config)
            made.step()
            made.zero_grad(set_to_none=True)
        if place.device == "cuda":
            torch.cuda.synchronize()
            taken[offload] = (torch.cuda.memory_allocated() - before) / sum(p.nbytes for p in parameters)
        weights[offload] = [p.detach().clone() for p in parameters]
        del made, model, parameters
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    yield Found("weights", apart(zip(weights[True], weights[False], strict=True)), bound)
    if taken:
        yield Found("bytes on the device, of the weights'", taken[True], 0.05)
        yield Found("without offloading", taken[False], 2.1)


def through_a_file(before: torch.optim.Optimizer, after: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Give `after` the state of `before`, as a resume does."""
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return after


def activations(place: Place, checkpointing: bool) -> Iterator[Found]:
    from contextlib import nullcontext

    from sdft.model.activations import enable_gradient_checkpointing, saved_activations

    model = llama(place, torch.float32)
    model.compute_dtype = torch.float32
    model.lm.train()
    if checkpointing:
        enable_gradient_checkpointing(model)
    gradients, held = {}, {}
    for offload in (False, True):
        for _ in range(2):  # the first is for warm-up
            model.lm.zero_grad(set_to_none=True)
            before = allocated(place)
            with saved_activations() if offload else nullcontext():
                hidden = model.hidden(tokens(place))
            held[offload] = allocated(place) - before - hidden.nbytes
            hidden.square().mean().backward()
        gradients[offload] = [p.grad.clone() for p in model.trainable().values()]
    yield Found("gradients", apart(zip(gradients[True], gradients[False], strict=True)), 1e-4)
    if place.device == "cuda":
        yield Found("bytes kept, of what is kept without", held[True] / held[False], 0.3)


def allocated(place: Place) -> int:
    if place.device != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def eight_bits(place: Place, name: str) -> Iterator[Found]:
    """AdamW of bitsandbytes: a run that is saved and loaded equals an uninterrupted run, bit for bit."""
    from sdft.config import OptimConfig
    from sdft.update.optim import make_optimizer

    config = OptimConfig(name=name, lr=1e-3)  # type: ignore[arg-type]
    outcomes = []
    for resumed in (False, True):
        model = llama(place, torch.bfloat16)
        parameters = list(model.trainable().values())
        made = make_optimizer(parameters, config)
        for step in range(4):
            if resumed and step == 2:
                made = through_a_file(made, make_optimizer(parameters, config))
            for p, change in zip(parameters, moved(parameters, step, place.device), strict=True):
                p.grad = change * 100
            made.step()
        outcomes.append([p.detach().clone() for p in parameters])
    yield Found("weights", apart(zip(*outcomes, strict=True)), 0.0)


def whole_run(place: Place, rank: int) -> Iterator[Found]:
    """Four steps of the trainer on the device, with everything offloaded and with nothing; then both resume."""
    from sdft.config import Config, override
    from sdft.training.loop import train
    from sdft.training.metrics import read_metrics

    away = OFFLOAD if place.device == "cuda" else {}  # the trainer refuses to offload from a CPU
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.jsonl")
        data.write_text("".join(f'{{"prompt": "say {c}{c}", "demonstration": "{c.upper()}"}}\n' for c in "abcdefgh"))
        common: dict[str, Any] = {
            "model.name": random_model("tiny", place), "model.device": place.device,
            "model.weights_dtype": "bfloat16", "model.compute_dtype": "bfloat16", "data.train": str(data),
            "teacher.context": "as_turns", "rollout.max_new_tokens": 6, "rollout.temperature": 0.0, "optim.lr": 1e-2,
            "optim.warmup_steps": 1, "train.steps": 4, "train.batch_size": 3, "lora.rank": rank,
        }  # fmt: skip
        lines = []
        for name, settings in (("plain", {}), ("away", away)):
            output = Path(folder, name)
            config = override(Config(), common | settings | {"train.output": str(output)})
            train(config)
            train(override(config, {"train.resume": True}))  # at the end too: this reads every state
            lines.append(read_metrics(output))
    yield Found("steps that are missing", float(8 - sum(map(len, lines))), 0.0)
    # They differ by the rounding of one step; later steps sample other completions.
    for key, bound in (("loss", 1e-3), ("grad_norm", 1e-2), ("teacher_tracked", 1e-2)):
        yield Found(f"first step: {key}", abs(lines[1][0][key] / lines[0][0][key] - 1), bound)


DTYPES = (torch.float32, torch.bfloat16)
CHECKS = (
    *(Check(f"teacher, {str(d).removeprefix('torch.')}", partial(teacher, dtype=d)) for d in DTYPES),
    *(Check(f"optimizer, {str(d).removeprefix('torch.')}", partial(optimizer, dtype=d)) for d in DTYPES),
    *(Check(f"activations{', checkpointing' if again else ''}", partial(activations, checkpointing=again))
      for again in (False, True)),
    Check("bytes of the teacher", teacher_bytes, needs_gpu=True),
    Check("the teacher's average beside the next forward", teacher_beside_the_forward, needs_gpu=True),
    *(Check(f"a run{', LoRA' if rank else ''}", partial(whole_run, rank=rank)) for rank in (0, 4)),
    *(Check(name, partial(eight_bits, name=name), needs_gpu=True, module="bitsandbytes")
      for name in ("adamw_8bit", "paged_adamw_8bit")),
)  # fmt: skip
