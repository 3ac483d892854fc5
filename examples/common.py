"""What the examples of the loss share, and what your project already has: two models, prompts, sampled completions.

The loss itself is in the examples that import this file: train_plain.py, train_hf.py, train_accelerate.py,
train_lightning.py, distill_external.py, distill_topk.py.
"""

import argparse
import gc
from typing import Any

import torch
import torch.distributed.nn  # must come before a process group exists: this module keeps the group that it finds
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

CAPITALS = {"Zorvia": "Lumar", "Belthane": "Corrin", "Quessia": "Vale", "Drumland": "Ostek"}
RECORDS = [{"prompt": f"Capital of {c}?", "demonstration": f"It is {capital}."} for c, capital in CAPITALS.items()]
NAMES = "a hub name (owner/name) or a folder with a whole model, not an adapter, a .gguf file or smollm2-135m"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def parse(about: str, steps: int, *more: str) -> argparse.Namespace:
    """The options that all examples have, and an option for each further model."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    for role in ("model", *more):
        parser.add_argument(f"--{role}", help=f"{NAMES}; without it, a tiny random Llama made here")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    parser.add_argument("--lr", type=float, help="learning rate; 1e-5 for a real model, 5e-3 for the tiny one")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="the longest completion")
    args = parser.parse_args()
    args.lr = args.lr or (1e-5 if args.model else 5e-3)
    return args


def load(name: str | None, hidden: int = 32, vocab: int = 384) -> tuple[Any, Any]:
    """Tokenizer and causal LM. Without a name: bytes as tokens, and a tiny model that is the same in every process."""
    if name:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            lm = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        except (OSError, ValueError) as error:  # transformers raises either for a name that is no model
            raise SystemExit(f"{name}: no model loads ({str(error).splitlines()[0]}); give {NAMES}") from None
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
    """Refuses a model whose logits are not hidden states times head: Gemma has a soft cap, Granite a scale."""
    out = lm.eval()(torch.arange(4, device=lm.device)[None] + 3, output_hidden_states=True)
    plain = out.hidden_states[-1] @ lm.get_output_embeddings().weight.T  # (1, 4, V)
    if not torch.allclose(plain, out.logits, rtol=1e-2, atol=1e-2):
        raise SystemExit(f"{type(lm).__name__}: pass bias=, softcap= or scale= of its head to linear_divergence")


def leave_group() -> None:
    """The last line of each process: all processes leave the group together, and the threads of gloo end.

    If such a thread frees a tensor while Python shuts down, its process aborts ("terminate called without an active
    exception"). Trainers and DDP models hold the group: delete them before this call.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        gc.collect()


def chat_ids(tokenizer: Any, *turns: str) -> Tensor:
    """A conversation that ends before the model's turn, as token ids (T,) int64."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


@torch.no_grad()
def sample(
    lm: Any, tokenizer: Any, prompts: list[Tensor], max_new_tokens: int, temperature: float = 1.0
) -> list[Tensor]:
    """One completion for each prompt, sampled from the whole distribution. It includes its end token."""
    training, end = lm.training, tokenizer.eos_token_id
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    made = lm.eval().generate(
        ids.to(lm.device), attention_mask=mask.to(lm.device), max_new_tokens=max_new_tokens, do_sample=True,
        temperature=temperature, top_k=0, top_p=1.0, repetition_penalty=1.0, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    lm.train(training)
    completions = made[:, ids.shape[1] :].cpu()
    ended = (completions == end).cumsum(1) - (completions == end).long()  # number of end tokens before each token
    return [completion[before == 0] for completion, before in zip(completions, ended, strict=True)]


def join(prompts: list[Tensor], completions: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, T) ids, padded on the right, and (B, T) bool: the positions that predict a token of the completion.

    In a causal model, no token sees the padding after it, so no attention mask is needed.
    """
    ids = pad_sequence([torch.cat(pair) for pair in zip(prompts, completions, strict=True)], batch_first=True)
    first = torch.tensor([len(p) - 1 for p in prompts])[:, None]
    count = torch.tensor([len(c) for c in completions])[:, None]
    position = torch.arange(ids.shape[1])
    return ids, (position >= first) & (position < first + count)


def complete(lm: Any, tokenizer: Any, records: list[dict[str, str]], max_new_tokens: int) -> dict[str, Tensor]:
    """The model completes each prompt. The same completions follow the student's prompt and the teacher's prompt.

    The teacher's prompt shows the demonstration as an earlier turn. Row by row, teacher_ids[teacher_rows] and
    input_ids[rows] predict the same tokens.
    """
    prompts = [chat_ids(tokenizer, r["prompt"]) for r in records]
    contexts = [chat_ids(tokenizer, r["prompt"], r["demonstration"], r["prompt"]) for r in records]
    completions = sample(lm, tokenizer, prompts, max_new_tokens)
    (ids, rows), (teacher_ids, teacher_rows) = join(prompts, completions), join(contexts, completions)
    batch = {"input_ids": ids, "rows": rows, "teacher_ids": teacher_ids, "teacher_rows": teacher_rows}
    return {name: tensor.to(lm.device) for name, tensor in batch.items()}
