"""TRL's trainers and ours, on the CPU: losses, gradients, weights after steps, and what is refused."""

import importlib.util
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("trl") is None and not os.environ.get("CI"):  # CI must have it
    pytest.skip("NOT COMPARED WITH TRL, which is missing here: pip install '.[trl]'", allow_module_level=True)

import datasets
import peft
import transformers
import trl
from trl.experimental import gkd, sdft, sdpo

from sdft.errors import SdftError
from sdft.integrations import trl as ours
from sdft.integrations.trl import losses as shared
from sdft.integrations.trl import versions

WORDS = ["ab", "cde", "f", "ghij"]
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "optim": "sgd",  # weights after a step show the gradient itself; AdamW would show its sign
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def reward(completions: list[Any], **_: Any) -> list[float]:
    """1 for half of the completions, whatever they are."""
    return [float(i % 2) for i in range(len(completions))]


class Maker:
    """Makes one of the four trainers, TRL's or ours, on the same models, data and settings."""

    def __init__(self, model_folder: Callable[[str], Path], output: Path) -> None:
        self.folder, self.output = model_folder, str(output)

    def __call__(self, name: str, side: Any = ours, kind: str = "llama", **settings: Any) -> Any:
        """settings: fields of the config; peft_config and the like, for the constructor, in `extra`."""
        folder = str(self.folder(kind))
        extra = {"model": folder, "processing_class": transformers.AutoTokenizer.from_pretrained(folder)}
        extra |= settings.pop("extra", {})
        prompts = [[{"role": "user", "content": word}] for word in WORDS]
        rows: dict[str, list[Any]] = {"prompt": prompts}
        common = COMMON | {"output_dir": self.output}
        if name in ("SDFT", "SDPO"):
            rows["privileged_context"] = [word.upper() for word in WORDS]
            common |= {"max_completion_length": 6, "num_generations": 2}
        else:
            teacher = transformers.AutoModelForCausalLM.from_pretrained(self.folder("qwen3"))
            extra = {"teacher_model": teacher} | extra
        if name == "SDPO":
            extra["reward_funcs"] = reward
        if name == "GKD":
            rows = {"messages": [[*p, {"role": "assistant", "content": "yes " * n}] for n, p in enumerate(prompts, 2)]}
            common |= {"max_new_tokens": 6, "max_length": 48}
        if name == "Distillation":
            common |= {"max_completion_length": 6}
        theirs, config = THEIRS[name]
        cls = theirs if side is trl else getattr(ours, theirs.__name__)
        return cls(args=config(**common | settings), train_dataset=datasets.Dataset.from_dict(rows), **extra)


THEIRS: dict[str, tuple[Any, Any]] = {
    "SDFT": (sdft.SDFTTrainer, sdft.SDFTConfig),
    "SDPO": (sdpo.SDPOTrainer, sdpo.SDPOConfig),
    "GKD": (gkd.GKDTrainer, gkd.GKDConfig),
    "Distillation": (trl.DistillationTrainer, trl.DistillationConfig),
}
# On a CPU, DistillationTrainer of 1.15 runs its Triton kernels in the interpreter, which conftest.py turns on.


@pytest.fixture
def make(model_folder: Callable[[str], Path], tmp_path: Path) -> Maker:
    return Maker(model_folder, tmp_path / "out")


def batch(trainer: Any) -> dict[str, Any]:
    """A micro-batch as the trainer makes it, and then a student that has moved on since."""
    trainer.model.train()
    trainer.create_optimizer_and_scheduler(3)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    torch.manual_seed(0)
    made = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    if "completion_mask" in made:
        made["completion_mask"][0, 3:] = 0  # completions of two lengths, so that a mean of means differs from the mean
    for p in trainer.model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p), alpha=0.03)
    return made


def losses(
    trainer: Any, inputs: dict[str, Any], *more: Any
) -> dict[str, tuple[Tensor, dict[str, Tensor], dict[str, Any]]]:
    """Our code and TRL's code on one trainer, one model and one batch: loss, gradients, what was logged."""
    named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    base = next(c for c in type(trainer).__mro__ if c.__module__.startswith("trl."))
    found = {}
    for side, cls in (("ours", type(trainer)), ("theirs", base)):
        trainer._metrics["train"].clear()
        torch.manual_seed(0)  # of dropout
        if base is trl.DistillationTrainer and side == "theirs":  # its compute_loss would find our method
            lm = trainer.accelerator.unwrap_model(trainer.model)
            loss, entropy, count = base._compute_loss(trainer, lm, dict(inputs), inputs["num_items_in_batch"])
            trainer._metrics["train"]["entropy"].append((entropy / count).item())
        else:
            loss = cls.compute_loss(trainer, trainer.model, dict(inputs), *more)
        made = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        grads = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), made, strict=True)}
        found[side] = loss.detach(), grads, {n: v[-1] for n, v in trainer._metrics["train"].items()}
    return found


def check_same(trainer: Any, inputs: dict[str, Any], *more: Any, rtol: float = 1e-4) -> Tensor:
    found = losses(trainer, inputs, *more)
    (loss, grads, logged), (want, wanted, wanted_log) = found["ours"], found["theirs"]
    assert want.abs() > 1e-3, "a loss near zero compares nothing"
    torch.testing.assert_close(loss, want, rtol=rtol, atol=1e-6)
    assert logged == pytest.approx(wanted_log, rel=rtol)
    assert logged, "nothing was logged"
    whole = torch.cat([g.flatten() for g in wanted.values()]).norm()
    assert whole > 1e-3
    for name, want_grad in wanted.items():
        assert (grads[name] - want_grad).norm() <= rtol * (want_grad.norm() + 1e-2 * whole), name
    return loss


FULL = {"distillation_mode": "full_logits"}
TOPK = {"distillation_mode": "topk_logits", "distillation_topk": 7}
SAMPLED = {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}
STALE = {"steps_per_generation": 2, "distillation_is_clip": 1.05}  # two updates on one rollout
OBJECTIVES = {
    "forward": FULL | {"distillation_alpha": 0.0},
    "reverse": FULL | {"distillation_alpha": 1.0},
    "jsd": FULL | {"distillation_alpha": 0.3, "temperature": 0.7},
    "top-k, tail dropped, forward": TOPK | {"distillation_alpha": 0.0},
    "top-k, tail dropped, reverse": TOPK | {"distillation_alpha": 1.0, "temperature": 1.5},
    "top-k, tail dropped, jsd": TOPK | {"distillation_alpha": 0.5},
    "top-k, tail kept, forward": TOPK | {"distillation_alpha": 0.0, "distillation_add_tail": True},
    "top-k, tail kept, reverse": TOPK | {"distillation_alpha": 1.0, "distillation_add_tail": True},
    "top-k, tail kept, jsd": TOPK | {"distillation_alpha": 0.5, "distillation_add_tail": True},
    "sampled token": SAMPLED | {"temperature": 0.7},
}


@pytest.mark.parametrize("clip", [False, True], ids=["fresh", "clip"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("name", ["SDFT", "SDPO"])
def test_self_distillation(make: Maker, name: str, objective: dict[str, Any], clip: bool) -> None:
    trainer = make(name, **objective, **(STALE if clip else {}))
    inputs = batch(trainer)
    assert ("old_per_token_logps" in inputs) == clip
    check_same(trainer, inputs)


def test_the_clip_clips(make: Maker) -> None:
    """Looser and no clip give other losses, both TRL's: the ratio is in the comparison above."""
    trainer = make("SDFT", **FULL, **STALE)
    inputs, found = batch(trainer), []
    for clip in (1.05, 20.0, None):
        trainer.args.distillation_is_clip = clip
        found.append(check_same(trainer, inputs).item())
    assert len({round(f, 4) for f in found}) == 3


def test_logprobs_of_the_rollout(make: Maker) -> None:
    trainer = make("SDFT", temperature=0.7, **FULL, **STALE)
    inputs = batch(trainer)
    tensors = [inputs[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
    torch.testing.assert_close(
        trainer._compute_rollout_logps(*tensors), sdft.SDFTTrainer._compute_rollout_logps(trainer, *tensors),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("skip", [2, 99], ids=["some", "all"])
def test_tokens_skipped(make: Maker, skip: int) -> None:
    trainer = make("SDFT", **FULL, num_loss_tokens_to_skip=skip)
    inputs = batch(trainer)
    if skip == 2:
        check_same(trainer, inputs)
    else:
        loss, grads, logged = losses(trainer, inputs)["ours"]
        assert loss == 0
        assert all((g == 0).all() for g in grads.values())
        assert logged["sdft/distillation_loss"] == 0


@pytest.mark.parametrize("teacher", ["base", "ema", "live"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_teachers(make: Maker, teacher: str, lora: bool) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make("SDFT", **FULL, teacher_model_kind=teacher, extra={"peft_config": config} if lora else {})
    if teacher == "ema":  # its teacher moves at the step's end
        trainer.train()
    check_same(trainer, batch(trainer))


@pytest.mark.parametrize("weight", [0.0, 0.4])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_sdpo_with_a_policy_loss(make: Maker, weight: float, loss_type: str) -> None:
    trainer = make("SDPO", **FULL, **STALE, distillation_weight=weight, loss_type=loss_type, scale_rewards="none")
    check_same(trainer, batch(trainer))


def test_sdpo_policy_of_sequences(make: Maker) -> None:
    trainer = make("SDPO", **SAMPLED, **STALE, distillation_weight=0.4, importance_sampling_level="sequence")
    check_same(trainer, batch(trainer))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("items", [None, 11], ids=["own count", "given count"])
def test_gkd(make: Maker, beta: float, items: int | None) -> None:
    trainer = make("GKD", beta=beta, temperature=0.7)
    inputs = batch(trainer)
    found = losses(trainer, inputs, False, None if items is None else torch.tensor(items))
    (loss, grads, _), (want, wanted, _) = found["ours"], found["theirs"]
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-6)
    for name in wanted:
        torch.testing.assert_close(grads[name], wanted[name], rtol=1e-3, atol=1e-5)


def test_gkd_evaluation(make: Maker) -> None:
    trainer = make("GKD")
    trainer.model.eval()
    inputs = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    logits_made = calls_of_the_head(trainer)
    loss, logits, _ = trainer.prediction_step(trainer.model, dict(inputs), True)
    assert (logits, logits_made) == (None, [])
    want, logits, _ = trainer.prediction_step(trainer.model, dict(inputs), False)  # TRL's code, for its logits
    assert logits.shape[-1] == 264
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_distillation(make: Maker, beta: float, temperature: float) -> None:
    trainer = make("Distillation", beta=beta, temperature=temperature)
    check_same(trainer, batch(trainer))


@pytest.mark.parametrize("name", ["GKD", "Distillation"])
def test_a_teacher_of_another_width(make: Maker, name: str) -> None:
    config = transformers.AutoConfig.from_pretrained(make.folder("llama"), hidden_size=16)
    torch.manual_seed(1)
    trainer = make(name, extra={"teacher_model": transformers.AutoModelForCausalLM.from_config(config)})
    assert trainer.teacher_model.get_output_embeddings().weight.shape[1] == 16
    inputs = batch(trainer)
    found = losses(trainer, inputs)
    torch.testing.assert_close(found["ours"][0], found["theirs"][0], rtol=1e-4, atol=1e-6)


def test_tokens_of_tools(make: Maker) -> None:
    """The text of a tool does not count as a completion of the student."""
    trainer = make("Distillation")
    inputs = batch(trainer)
    plain = check_same(trainer, inputs)
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][1, 1:3] = 0
    assert (check_same(trainer, inputs) - plain).abs() > 1e-3


@pytest.mark.parametrize("kind", ["gemma3", "granite", "phi", "gpt2", "llama-tied"])
@pytest.mark.parametrize("name", ["SDFT", "Distillation"])
def test_families(make: Maker, name: str, kind: str) -> None:
    """Soft caps, scales and biases of heads; a tied one, which gets its gradient from both ends."""
    trainer = make(name, kind=kind, **(FULL if name == "SDFT" else {}))
    check_same(trainer, batch(trainer), rtol=1e-3)


@pytest.mark.parametrize("name", ["SDFT", "SDPO", "GKD", "Distillation"])
def test_training_ends_at_the_same_weights(make: Maker, name: str) -> None:
    """Three steps of train(): rollouts, accumulation, optimizer and logs are TRL's on both sides."""
    ends, logs = [], []
    for side in (trl, ours):
        trainer = make(name, side, gradient_accumulation_steps=2)
        before = weights(trainer)
        torch.manual_seed(0)
        random.seed(0)
        trainer.train()
        ends.append(weights(trainer))
        trainer.evaluate(trainer.train_dataset)
        logs.append([{k: v for k, v in line.items() if k in LOGGED} for line in trainer.state.log_history])
    assert (ends[0] - before).abs().max() > 1e-3
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)
    assert len(logs[0][0]) >= 2
    assert "eval_loss" in logs[0][-1]
    for theirs, found in zip(*logs, strict=True):
        assert found == pytest.approx(theirs, rel=1e-3)


LOGGED = ("loss", "eval_loss", "grad_norm", "entropy", "self_distillation/distillation_loss", "completions/mean_length")


def weights(trainer: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("name", ["SDFT", "SDPO", "GKD", "Distillation"])
def test_mixed_precision(make: Maker, name: str) -> None:
    """bf16=True: products of the same dtype on both sides, a loss as near as bf16 allows."""
    seen, found = [], []
    for side in (trl, ours):
        trainer = make(name, side, bf16=True, max_steps=1, **(FULL if name in ("SDFT", "SDPO") else {}))
        kinds: set[torch.dtype] = set()
        compute_loss, layer = trainer.compute_loss, trainer.model.model.layers[0].mlp.up_proj

        def watched(
            *args: Any, _loss: Any = compute_loss, _layer: Any = layer, _kinds: Any = kinds, **more: Any
        ) -> Any:
            handle = _layer.register_forward_hook(lambda m, i, o: _kinds.add(o.dtype))
            loss = _loss(*args, **more)
            handle.remove()
            return loss

        trainer.compute_loss = watched
        torch.manual_seed(0)
        random.seed(0)
        trainer.train()
        seen.append(kinds)
        found.append(trainer.state.log_history[0]["loss"])
    assert len(seen[0]) == 1
    assert seen[0] == seen[1]
    assert found[1] == pytest.approx(found[0], rel=0.02)


def calls_of_the_head(trainer: Any) -> list[str]:
    """Grows by a word for every product with a head as a module, which is where logits come from."""
    made: list[str] = []
    for lm in trainer._models():
        shared.inner(lm).get_output_embeddings().register_forward_hook(lambda *_: made.append("logits"))
    return made


@pytest.mark.parametrize("name", ["SDFT", "SDPO", "GKD", "Distillation"])
def test_no_logits_of_the_batch(make: Maker, name: str) -> None:
    trainer = make(name)
    inputs = batch(trainer)
    made = calls_of_the_head(trainer)
    trainer.compute_loss(trainer.model, inputs).backward()
    assert made == []


# What is refused.


def lora(*targets: str) -> dict[str, Any]:
    return {"peft_config": peft.LoraConfig(target_modules=list(targets), task_type="CAUSAL_LM")}


def test_a_head_with_an_adapter_is_refused(make: Maker) -> None:
    with pytest.raises(SdftError, match="take it out of target_modules"):
        make("SDFT", extra=lora("q_proj", "lm_head"))


def test_virtual_tokens_are_refused(make: Maker) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(SdftError, match="virtual tokens"):
        make("SDFT", extra={"peft_config": config})


def test_a_teacher_in_a_server_is_refused(make: Maker) -> None:
    with pytest.raises(SdftError, match="use_teacher_server=True"):
        make("SDFT", use_teacher_server=True)


def test_top_k_without_k_is_refused(make: Maker) -> None:
    with pytest.raises(SdftError, match="needs distillation_topk"):
        make("SDPO", distillation_mode="topk_logits", distillation_topk=None)


def test_outputs_are_refused(make: Maker) -> None:
    trainer = make("SDFT")
    with pytest.raises(ValueError, match="returns no outputs"):
        trainer.compute_loss(trainer.model, batch(trainer), return_outputs=True)


def test_a_model_that_does_more_than_a_head_is_refused(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = transformers.LlamaForCausalLM.forward

    def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", twice)
    with pytest.raises(SdftError, match="does more between hidden states and logits"):
        make("SDFT")


@pytest.mark.parametrize("what", ["is_deepspeed_enabled", "is_fsdp_enabled", "_n_gpu"])
def test_sharded_heads_are_refused(make: Maker, what: str) -> None:
    trainer = make("GKD")
    setattr(trainer.args if what == "_n_gpu" else trainer, what, 2)
    with pytest.raises(SdftError, match="no whole head"):
        trainer._check_setting()


def test_images_are_refused(make: Maker) -> None:
    class Processor:
        image_processor = None

    trainer = make("Distillation")
    trainer.processing_class = Processor()
    with pytest.raises(SdftError, match="image processor"):
        trainer._check_setting()


# The import.


def test_without_the_extra_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("sdft.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"needs TRL 1\.15 or later: pip install '\.\[trl\]' in a checkout \(.*trl"):
        importlib.import_module("sdft.integrations.trl")


def test_the_extra_brings_all_that_the_import_needs() -> None:
    """The packages of the extra `train` that neither TRL nor transformers needs may be missing."""
    code = "import sys; sys.modules |= dict.fromkeys(['pydantic', 'tomli_w', 'tyro', 'scipy', 'gguf'])"
    subprocess.run([sys.executable, "-c", f"{code}; import sdft.integrations.trl"], check=True)


def test_versions() -> None:
    assert ".".join(trl.__version__.split(".")[:2]) in versions.TESTED
    with pytest.raises(ImportError, match=r"needs TRL 1\.15 or later, not 1\.9\.2"):
        versions.check_version("1.9.2")
    with pytest.warns(UserWarning, match=r"not with 1\.17\.0: .* pip install 'trl==1\.16\.\*'"):
        versions.check_version("1.17.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_version("1.15.3")
        versions.check_version("1.16.0.dev0")


def test_nothing_of_trl_is_patched() -> None:
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "trl"}
    assert "trl.experimental.sdft.sdft_trainer" in modules
    for name, module in modules.items():
        for held in (module, *(v for v in vars(module).values() if isinstance(v, type))):
            found = [k for k, v in vars(held).items() if str(getattr(v, "__module__", "")).startswith("sdft")]
            assert not found, (name, held, found)


@pytest.mark.slow
def test_ddp(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Two processes (gloo): the same weights as by TRL's trainers in two processes, on both ranks."""
    folders = {kind: model_folder(kind) for kind in ("llama", "qwen3")}
    script = tmp_path / "run.py"
    script.write_text(f"""
import random, sys
from pathlib import Path, PosixPath
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import torch
from ranks import check_threads, leave_group
from test_integrations_trl import Maker, THEIRS, ours, trl, weights
make = Maker({folders!r}.get, Path({str(tmp_path)!r}, "out"))
for name in THEIRS:
    ends = []
    for side in (trl, ours):
        trainer = make(name, side, ddp_backend="gloo", max_steps=2)
        before = weights(trainer)
        random.seed(0)
        trainer.train()
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        ends.append(weights(trainer))
    assert (ends[0] - before).abs().max() > 1e-3
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)
    other = [torch.empty_like(ends[1]) for _ in range(2)]
    torch.distributed.all_gather(other, ends[1])
    assert torch.equal(*other)
rank = torch.distributed.get_rank()
del trainer
leave_group()
check_threads()
Path({str(tmp_path)!r}, f"same-{{rank}}").touch()  # what two processes print may interleave
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(list(tmp_path.glob("same-*"))) == 2
