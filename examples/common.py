"""What the examples of the loss share, and what your own project has already: two models, prompts, sampled answers.

The loss is in the examples. Imported by them: train_plain.py, train_hf.py, train_accelerate.py, train_lightning.py,
distill_external.py, distill_topk.py.
"""

import argparse
import gc
from typing import Any

import torch
import torch.distributed.nn  # before there is a process group: it keeps one that it finds, and its threads
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

CAPITALS = {"Zorvia": "Lumar", "Belthane": "Corrin", "Quessia": "Vale", "Drumland": "Ostek"}
RECORDS = [{"prompt": f"Capital of {c}?", "demonstration": f"It is {capital}."} for c, capital in CAPITALS.items()]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def parse(about: str, steps: int, *more: str) -> argparse.Namespace:
    """The options that all examples have, and the names of more models."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    for role in ("model", *more):
        parser.add_argument(f"--{role}", help="a hub name or a folder; without it, a tiny random Llama made here")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    parser.add_argument("--lr", type=float, help="learning rate; 1e-5 for a real model, 5e-3 for the tiny one")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="the longest answer")
    args = parser.parse_args()
    args.lr = args.lr or (1e-5 if args.model else 5e-3)
    return args


def load(name: str | None, hidden: int = 32, vocab: int = 384) -> tuple[Any, Any]:
    """Tokenizer and causal LM. A tiny one has letters for tokens and random weights, the same in every process."""
    if name:
        tokenizer, lm = (
            AutoTokenizer.from_pretrained(name),
            AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
        )
    else:
        torch.manual_seed(hidden)
        tokenizer = ByT5Tokenizer()
        tokenizer.chat_template = TEMPLATE
        lm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
                num_attention_heads=4, initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=1,
            )
        )  # fmt: skip
    check_head(lm)
    return tokenizer, lm.train()


@torch.no_grad()
def check_head(lm: Any) -> None:
    """Refuses a model whose logits are not hidden states times head: Gemma's have a soft cap, Granite's a scale."""
    out = lm.eval()(torch.arange(4, device=lm.device)[None] + 3, output_hidden_states=True)
    plain = out.hidden_states[-1] @ lm.get_output_embeddings().weight.T  # (1, 4, V)
    if not torch.allclose(plain, out.logits, rtol=1e-2, atol=1e-2):
        raise SystemExit(f"{type(lm).__name__}: pass bias=, softcap= or scale= of its head to linear_divergence")


def leave_group() -> None:
    """Where one of several processes is done: they part together, and the threads of gloo end.

    One that still frees a tensor while Python shuts down aborts its process ("terminate called without an active
    exception"). Trainers, and models in DDP, hold the group: let them go before.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        gc.collect()


def chat_ids(tokenizer: Any, *turns: str) -> Tensor:
    """A conversation that ends before the model's turn -> (T,) int64."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


@torch.no_grad()
def sample(
    lm: Any, tokenizer: Any, prompts: list[Tensor], max_new_tokens: int, temperature: float = 1.0
) -> list[Tensor]:
    """One answer a prompt, from the whole distribution; the end token belongs to it."""
    training, end = lm.training, tokenizer.eos_token_id
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    made = lm.eval().generate(
        ids.to(lm.device), attention_mask=mask.to(lm.device), max_new_tokens=max_new_tokens, do_sample=True,
        temperature=temperature, top_k=0, top_p=1.0, repetition_penalty=1.0, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    lm.train(training)
    answers = made[:, ids.shape[1] :].cpu()
    ended = (answers == end).cumsum(1) - (answers == end).long()  # ends before each token
    return [answer[before == 0] for answer, before in zip(answers, ended, strict=True)]


def join(prompts: list[Tensor], answers: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, T) ids, padded on the right, and (B, T) bool: the positions that predict a token of the answer.

    Real tokens of a causal model never see the padding behind them, so no attention mask is needed.
    """
    ids = pad_sequence([torch.cat(pair) for pair in zip(prompts, answers, strict=True)], batch_first=True)
    first = torch.tensor([len(p) - 1 for p in prompts])[:, None]
    count = torch.tensor([len(a) for a in answers])[:, None]
    position = torch.arange(ids.shape[1])
    return ids, (position >= first) & (position < first + count)


def answer(lm: Any, tokenizer: Any, records: list[dict[str, str]], max_new_tokens: int) -> dict[str, Tensor]:
    """The model answers each prompt; the same answers behind the student's prompt and behind the teacher's.

    The teacher sees the demonstration as an earlier turn. Row by row, teacher_ids[teacher_rows] and
    input_ids[rows] predict the same tokens.
    """
    prompts = [chat_ids(tokenizer, r["prompt"]) for r in records]
    contexts = [chat_ids(tokenizer, r["prompt"], r["demonstration"], r["prompt"]) for r in records]
    answers = sample(lm, tokenizer, prompts, max_new_tokens)
    (ids, rows), (teacher_ids, teacher_rows) = join(prompts, answers), join(contexts, answers)
    batch = {"input_ids": ids, "rows": rows, "teacher_ids": teacher_ids, "teacher_rows": teacher_rows}
    return {name: tensor.to(lm.device) for name, tensor in batch.items()}
