"""The memory of TRL's trainers with TRL's loss and with `sdft.integrations.trl`: the table of docs/integrations.md.

    python -m bench.integrations trl

One micro-batch of 4 sequences, 64 prompt and 256 completion tokens each, on a random Llama of two layers with
SmolLM2-135M's width, head and vocabulary, in fp32 on the CPU. Memory is the growth of the peak resident set over
`compute_loss` and backward, gradients included; each row is measured in a separate process. Both sides get one batch.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch

from ..measure import Cpu

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "SDFT, full logits": ("SDFT", {"distillation_mode": "full_logits"}),
    "SDFT, full logits, stale rollout and clip": (
        "SDFT",
        {"distillation_mode": "full_logits", "steps_per_generation": 2, "distillation_is_clip": 2.0},
    ),
    "SDFT, top 100": ("SDFT", {"distillation_mode": "topk_logits", "distillation_topk": 100}),
    "SDPO, sampled token": ("SDPO", {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}),
    "SDPO, full logits, half policy": ("SDPO", {"distillation_mode": "full_logits", "distillation_weight": 0.5}),
    "GKD, β = 0.5": ("GKD", {"beta": 0.5}),
    "Distillation, β = 1": ("Distillation", {"beta": 1.0}),
}
B, PROMPT, COMPLETION = 4, 64, 256


def trainer(name: str, side: str, settings: dict[str, Any], folder: str) -> Any:
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental import gkd, sdft, sdpo

    from sdft.integrations import trl as ours

    theirs, config = {
        "SDFT": (sdft.SDFTTrainer, sdft.SDFTConfig),
        "SDPO": (sdpo.SDPOTrainer, sdpo.SDPOConfig),
        "GKD": (gkd.GKDTrainer, gkd.GKDConfig),
        "Distillation": (trl.DistillationTrainer, trl.DistillationConfig),
    }[name]
    cls = theirs if side == "theirs" else getattr(ours, theirs.__name__)
    prompts = [[{"role": "user", "content": "a"}]] * B
    rows = {"prompt": prompts, "privileged_context": ["b"] * B}
    if name == "GKD":
        rows = {"messages": [[*p, {"role": "assistant", "content": "b"}] for p in prompts]}
    common: dict[str, Any] = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": B, "max_steps": 1}
    common |= {"output_dir": f"{folder}/out", "report_to": "none", "save_strategy": "no"}
    if name in ("SDFT", "SDPO"):
        common |= {"num_generations": 2}
    more = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)} if name == "SDPO" else {}
    if name in ("GKD", "Distillation"):
        teacher = AutoModelForCausalLM.from_pretrained(folder)
        for p in teacher.parameters():  # another model than the student
            p.data.add_(torch.randn_like(p), alpha=0.02)
        more["teacher_model"] = teacher
    return cls(
        model=folder,
        args=config(**common | settings),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        **more,
    )


def batch(vocabulary: int, stale: bool) -> dict[str, Any]:
    """Random tokens in the fields that compute_loss of the four trainers reads."""
    ids = torch.randint(3, vocabulary, (B, PROMPT + COMPLETION))
    ones = torch.ones_like(ids)
    teacher = torch.cat([torch.randint(3, vocabulary, (B, PROMPT)), ids], dim=1)
    made: dict[str, Any] = {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": ones[:, :PROMPT],
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": ones[:, PROMPT:],
        "teacher_input_ids": teacher,
        "teacher_attention_mask": torch.ones_like(teacher),
        "advantages": torch.randn(B),
        "num_items_in_batch": torch.tensor(float(B * COMPLETION)),
        "input_ids": ids,
        "attention_mask": ones,
        "labels": ids.masked_fill(torch.arange(PROMPT + COMPLETION) < PROMPT, -100),
    }
    return made | ({"old_per_token_logps": torch.full((B, COMPLETION), -10.8)} if stale else {})


def extra_bytes(row: str, side: str) -> tuple[int, float]:
    """Bytes of one loss with its backward pass, and the value of the loss."""
    from ..trainers import random_qwen

    name, settings = ROWS[row]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        # The sizes of SmolLM2. Qwen2 differs from SmolLM2's Llama by three biases in each layer.
        random_qwen(
            Path(folder), vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=2,
            num_attention_heads=9, num_key_value_heads=3,
        )  # fmt: skip
        made = trainer(name, side, settings, folder)
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    torch.manual_seed(0)
    inputs = batch(49152, "steps_per_generation" in settings)
    found: list[float] = []

    def run() -> None:
        loss = made.compute_loss(made.model, inputs)
        loss.backward()
        found.append(loss.item())

    return Cpu().extra_bytes(run) or 0, found[0]


def main(arguments: list[str]) -> None:
    """Prints the numbers. With arguments: the numbers of one process."""
    if arguments:
        print(*extra_bytes(*arguments))
        return
    print(f"| fp32, {B * COMPLETION} tokens, V = 49152, H = 576 | ours | TRL's | loss, ours | loss, TRL's |")
    for row in ROWS:
        found = {}
        for side in ("ours", "theirs"):
            command = [sys.executable, "-m", "bench.integrations", "trl", row, side]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[side] = out.split()[-2:]
        (ours, loss), (theirs, want) = found["ours"], found["theirs"]
        print(f"| {row} | {int(ours) / 1e6:.0f} MB | {int(theirs) / 1e6:.0f} MB | {loss:.9} | {want:.9} |", flush=True)
