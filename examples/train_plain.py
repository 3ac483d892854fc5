"""Self-distillation (SDFT) in a plain PyTorch loop: `linear_divergence` is the only call that is not plain PyTorch.

    python examples/train_plain.py [--model NAME] [--steps 60]

In each step the student completes a few prompts. The teacher is a moving average of the student that also sees a
demonstration. At every completion token it gives a distribution over the next token, and the student moves towards this
distribution. The printed loss is the mean reverse KL of a completion token.
"""

import copy

import torch
from common import RECORDS, complete, load, parse
from sdft_kernels import linear_divergence
from torch import Tensor

EMA = 0.01  # how far the teacher moves towards the student in each step
CLIP = 1.0


def main() -> None:
    args = parse(__doc__, steps=60)
    tokenizer, student = load(args.model)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0)
    torch.manual_seed(0)
    for step in range(args.steps):
        batch = complete(student, tokenizer, RECORDS, args.max_new_tokens)
        loss = distance(student, teacher, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.lerp_(new, EMA)
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step} loss {loss.item():.6f}")


def distance(student: torch.nn.Module, teacher: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean over the N completion tokens, from hidden states: no logits are kept, and prompts cost nothing."""
    x = student.base_model(batch["input_ids"]).last_hidden_state[batch["rows"]]  # (N, H)
    with torch.no_grad():
        teacher_x = teacher.base_model(batch["teacher_ids"]).last_hidden_state[batch["teacher_rows"]]  # (N, H)
    head, teacher_head = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight  # (V, H)
    return linear_divergence(x, head, teacher_x, teacher_head, divergence="reverse_kl")


if __name__ == "__main__":
    main()
