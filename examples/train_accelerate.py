"""Self-distillation (SDFT) with Accelerate, with gradient accumulation and any number of processes.

    python examples/train_accelerate.py [--model NAME] [--steps 40]
    torchrun --nproc-per-node 2 examples/train_accelerate.py    # without a GPU: ACCELERATE_USE_CPU=true torchrun ...

The loss is the mean over all completion tokens of an optimizer step. Completions differ in length, so a mean of means
would give tokens of short completions more weight. So the tokens are counted first, over all processes.
"""

import copy
import itertools

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from common import RECORDS, complete, leave_group, load, parse
from sdft_kernels import linear_divergence
from torch.utils.data import DataLoader


def main() -> None:
    args = parse(__doc__, steps=40)
    accumulate = 2
    # No early step at the end of the data: the records of a step are fetched before its first backward pass.
    plugin = GradientAccumulationPlugin(num_steps=accumulate, sync_with_dataloader=False)
    accelerator = Accelerator(gradient_accumulation_plugin=plugin)
    tokenizer, student = load(args.model)
    teacher = copy.deepcopy(student).eval().requires_grad_(False).to(accelerator.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0)
    loader = DataLoader(RECORDS, batch_size=1, shuffle=True, collate_fn=list)
    model, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    set_seed(0, device_specific=True)  # the processes sample different completions
    records = itertools.chain.from_iterable(itertools.repeat(loader))
    for step in range(args.steps):
        batches = [complete(student, tokenizer, next(records), args.max_new_tokens) for _ in range(accumulate)]
        tokens = accelerator.reduce(sum(b["rows"].sum() for b in batches))
        divergence = torch.zeros((), device=accelerator.device)
        for batch in batches:
            with accelerator.accumulate(model):
                # The forward of the prepared model, because DDP acts on it. It computes one row of logits, unused.
                out = model(batch["input_ids"], output_hidden_states=True, logits_to_keep=1, use_cache=False)
                with torch.no_grad():
                    seen = teacher.base_model(batch["teacher_ids"]).last_hidden_state
                x, teacher_x = out.hidden_states[-1][batch["rows"]], seen[batch["teacher_rows"]]  # (N, H)
                head, teacher_head = (m.get_output_embeddings().weight for m in (student, teacher))  # (V, H)
                total = linear_divergence(x, head, teacher_x, teacher_head, divergence="reverse_kl", reduction="sum")
                # Accelerate divides by the micro-batches and averages over the processes: undo both.
                accelerator.backward(total * accelerator.num_processes * accumulate / tokens)
                optimizer.step()
                optimizer.zero_grad()
            divergence += total.detach()
        loss = accelerator.reduce(divergence) / tokens
        if step % 5 == 0 or step == args.steps - 1:
            accelerator.print(f"step {step} loss {loss.item():.6f}")


if __name__ == "__main__":
    main()
    leave_group()
