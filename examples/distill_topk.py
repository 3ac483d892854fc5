"""On-policy distillation from a teacher on an inference server, which returns its top-k log-probabilities.

    python examples/distill_topk.py [--model STUDENT --teacher TEACHER] [--steps 60]

`ask` stands for the request to the server. Here a second model in this process replies, in the form of vLLM's
`prompt_logprobs`. The printed loss is the mean reverse KL of a token over k + 1 events: the k tokens that the server
returned, and all others together (docs/topk.md).
"""

from typing import Any

import torch
from common import RECORDS, chat_ids, join, load, parse, sample
from sdft_kernels import linear_topk_divergence

K = 16


@torch.no_grad()
def ask(teacher: Any, text: list[int]) -> list[dict[int, float]]:
    """For each token of the text after the first: the K likeliest tokens there, with their log-probabilities."""
    found = teacher(torch.tensor([text])).logits[0, :-1].log_softmax(-1).topk(K)  # (T - 1, K)
    return [dict(zip(*row, strict=True)) for row in zip(found.indices.tolist(), found.values.tolist(), strict=True)]


def main() -> None:
    args = parse(__doc__, 60, "teacher")
    tokenizer, student = load(args.model)
    _, teacher = load(args.teacher, hidden=48, vocab=448)
    teacher.eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0)
    torch.manual_seed(0)
    prompts = [chat_ids(tokenizer, record["prompt"]) for record in RECORDS]
    for step in range(args.steps):
        completions = sample(student, tokenizer, prompts, args.max_new_tokens)
        entries = []  # one for each completion token
        for prompt, completion in zip(prompts, completions, strict=True):
            entries += ask(teacher, [*prompt.tolist(), *completion.tolist()])[len(prompt) - 1 :]
        named = torch.tensor([list(entry) for entry in entries])  # (N, K); if a server returns fewer, pad with id -1
        logprobs = torch.tensor([list(entry.values()) for entry in entries])  # (N, K)
        ids, rows = join(prompts, completions)  # (B, T)
        x = student.base_model(ids).last_hidden_state[rows]  # (N, H)
        loss = linear_topk_divergence(
            x, student.get_output_embeddings().weight, named, logprobs, divergence="reverse_kl"
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step} loss {loss.item():.6f}")


if __name__ == "__main__":
    main()
