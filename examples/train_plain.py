"""Self-distillation (SDFT) in a plain PyTorch loop: `linear_divergence` is the only line that is not PyTorch's own.

    python examples/train_plain.py [--model NAME] [--steps 60]

Each step the student answers a few prompts. The teacher, a moving average of the student that also sees a
demonstration, says for every token of the answers what it would have said; the student moves towards it. The printed
loss is the mean reverse KL of a token of the answers.
"""

import copy

import torch
from common import RECORDS, answer, load, parse
from sdft_kernels import linear_divergence
from torch import Tensor

EMA = 0.01  # the teacher's step towards the student
CLIP = 1.0


def main() -> None:
    args = parse(__doc__, steps=60)
    tokenizer, student = load(args.model)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0)
    torch.manual_seed(0)
    for step in range(args.steps):
        batch = answer(student, tokenizer, RECORDS, args.max_new_tokens)
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
    """Mean over the answers' N tokens, from hidden states alone: no logits, and none of the prompts' rows."""
    x = student.base_model(batch["input_ids"]).last_hidden_state[batch["rows"]]  # (N, H)
    with torch.no_grad():
        teacher_x = teacher.base_model(batch["teacher_ids"]).last_hidden_state[batch["teacher_rows"]]  # (N, H)
    head, teacher_head = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight  # (V, H)
    return linear_divergence(x, head, teacher_x, teacher_head, divergence="reverse_kl")


if __name__ == "__main__":
    main()
