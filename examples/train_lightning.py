"""Self-distillation (SDFT) as a LightningModule. Lightning accumulates, clips and runs the processes.

    python examples/train_lightning.py [--model NAME] [--steps 40]    # after: pip install lightning

`training_step` samples completions and returns a sum over their tokens. `on_before_optimizer_step`, which runs before
clipping, divides the gradient by the tokens of all micro-batches and processes: the loss is the mean over them all.
"""

import copy

import lightning
import torch
from common import RECORDS, complete, leave_group, load, parse
from sdft_kernels import linear_divergence
from torch import Tensor
from torch.utils.data import DataLoader


class SelfDistillation(lightning.LightningModule):
    def __init__(self, name: str | None, lr: float, max_new_tokens: int):
        super().__init__()
        self.tokenizer, self.student = load(name)
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.lr, self.max_new_tokens = lr, max_new_tokens
        self.so_far: Tensor | float = 0.0  # this step's divergence and tokens; no buffer, which DDP would overwrite

    def training_step(self, records: list[dict[str, str]]) -> Tensor:
        batch = complete(self.student, self.tokenizer, records, self.max_new_tokens)
        x = self.student.base_model(batch["input_ids"]).last_hidden_state[batch["rows"]]  # (N, H)
        with torch.no_grad():
            teacher_x = self.teacher.base_model(batch["teacher_ids"]).last_hidden_state[batch["teacher_rows"]]  # (N, H)
        head, teacher_head = (m.get_output_embeddings().weight for m in (self.student, self.teacher))  # (V, H)
        total = linear_divergence(x, head, teacher_x, teacher_head, divergence="reverse_kl", reduction="sum")
        self.so_far = self.so_far + torch.stack([total.detach(), batch["rows"].sum()])
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        divergence, tokens = self.trainer.strategy.reduce(self.so_far, reduce_op="sum")
        # Lightning divided by the micro-batches and averaged over the processes: undo both.
        for p in self.student.parameters():
            if p.grad is not None:
                p.grad.mul_(self.trainer.accumulate_grad_batches * self.trainer.world_size / tokens)
        self.so_far = 0.0
        if self.trainer.global_step % 5 == 0:
            self.print(f"step {self.trainer.global_step} loss {(divergence / tokens).item():.6f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=self.lr, weight_decay=0.0)


if __name__ == "__main__":
    args = parse(__doc__, steps=40)
    loader = DataLoader(RECORDS, batch_size=1, shuffle=True, collate_fn=list)
    lightning.Trainer(
        max_steps=args.steps, accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    ).fit(SelfDistillation(args.model, args.lr, args.max_new_tokens), loader)  # fmt: skip
    leave_group()
