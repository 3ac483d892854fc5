"""Self-distillation (SDFT) in Hugging Face's Trainer: a subclass with two methods.

    python examples/train_hf.py [--model NAME] [--steps 40]
    torchrun --nproc-per-node 2 examples/train_hf.py    # without a GPU: ACCELERATE_USE_CPU=true torchrun ...

`get_batch_samples` fetches the micro-batches of a step. There the student completes the prompts, and the completion
tokens are counted over micro-batches and processes, before the first backward pass. The loss is the mean over them all.
"""

import copy
import tempfile
from typing import Any

import torch
from common import RECORDS, complete, leave_group, load, parse
from sdft_kernels import linear_divergence
from transformers import Trainer, TrainingArguments


class SelfDistillationTrainer(Trainer):
    def __init__(self, *args: Any, teacher: torch.nn.Module, max_new_tokens: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher, self.max_new_tokens = teacher.to(self.args.device), max_new_tokens
        self.model_accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch here, not by the Trainer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        fetched, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [complete(self.model, self.processing_class, b["records"], self.max_new_tokens) for b in fetched]
        tokens = sum(b["rows"].sum() for b in batches)
        return batches, self.accelerator.gather(tokens).sum()

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # The forward of the wrapped model, because DDP and FSDP act on it. It computes one row of logits, unused.
        out = model(inputs["input_ids"], output_hidden_states=True, logits_to_keep=1, use_cache=False)
        with torch.no_grad():
            seen = self.teacher.base_model(inputs["teacher_ids"]).last_hidden_state
        x, teacher_x = out.hidden_states[-1][inputs["rows"]], seen[inputs["teacher_rows"]]  # (N, H)
        head, teacher_head = (m.get_output_embeddings().weight for m in (self.model, self.teacher))  # (V, H)
        total = linear_divergence(x, head, teacher_x, teacher_head, divergence="reverse_kl", reduction="sum")
        return total * self.accelerator.num_processes / num_items_in_batch  # the Trainer averages over processes


if __name__ == "__main__":
    args = parse(__doc__, steps=40)
    tokenizer, student = load(args.model)
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=args.steps, learning_rate=args.lr, per_device_train_batch_size=1,
        gradient_accumulation_steps=2, logging_steps=5, logging_first_step=True, report_to="none", save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True, seed=0,
    )  # fmt: skip
    SelfDistillationTrainer(
        student, settings, train_dataset=RECORDS, data_collator=lambda records: {"records": records},
        processing_class=tokenizer, teacher=copy.deepcopy(student).eval().requires_grad_(False),
        max_new_tokens=args.max_new_tokens,
    ).train()  # fmt: skip
    leave_group()
