"""On-policy distillation: the student samples completions, and another, larger model is the teacher.

    python examples/distill_external.py [--model STUDENT --teacher TEACHER] [--steps 60]

The two models differ in hidden size and in the padding of their heads, as small and large models of one family do (the
tiny models have 400 and 448 rows for 384 tokens). They must share a tokenizer. The printed loss is the mean reverse KL
of a completion token.
"""

import torch
from common import RECORDS, chat_ids, join, load, parse, sample
from sdft_kernels import linear_divergence

TEMPERATURE = 0.9  # of sampling, and of both distributions in the loss, which has no factor of its square


def main() -> None:
    args = parse(__doc__, 60, "teacher")
    tokenizer, student = load(args.model, hidden=32, vocab=400)
    teacher_tokenizer, teacher = load(args.teacher, hidden=48, vocab=448)
    if tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        raise SystemExit("--model and --teacher have different tokenizers: their tokens cannot be compared one by one")
    teacher.eval().requires_grad_(False)
    head, teacher_head = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    vocab = min(len(tokenizer), head.shape[0], teacher_head.shape[0])  # later rows are no tokens

    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0)
    torch.manual_seed(0)
    prompts = [chat_ids(tokenizer, record["prompt"]) for record in RECORDS]
    for step in range(args.steps):
        completions = sample(student, tokenizer, prompts, args.max_new_tokens, TEMPERATURE)
        ids, rows = join(prompts, completions)  # (B, T)
        x = student.base_model(ids).last_hidden_state.flatten(0, 1)  # (B·T, H_s)
        with torch.no_grad():
            teacher_x = teacher.base_model(ids).last_hidden_state.flatten(0, 1)  # (B·T, H_t)
        loss = linear_divergence(
            x, head, teacher_x, teacher_head, divergence="reverse_kl", temperature=TEMPERATURE, vocab_size=vocab,
            token_weights=rows.flatten().float(),  # prompts and padding have weight 0 and cost nothing
        )  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step} loss {loss.item():.6f}")


if __name__ == "__main__":
    main()
