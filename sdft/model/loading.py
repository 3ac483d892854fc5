"""Loads tokenizers and weights: dtype, device, attention, 4-bit weights."""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sdft.config import ModelConfig
from sdft.device import has_fast_bf16
from sdft.errors import SdftError, first_line
from sdft.model import adapters, lean, lora
from sdft.model.language_model import LanguageModel, check_head
from sdft.model.sources import drop_quantization, find_base

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(config: ModelConfig) -> tuple[Any, tuple[int, ...]]:
    """The tokenizer, and the ids that end a completion; loads no weights."""
    from transformers import AutoTokenizer, GenerationConfig

    base, extra, adapter = find_base(config.name)
    own = adapter is not None and adapters.find_file(adapter, "tokenizer_config.json") is not None
    name = str(adapter) if own else base
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code, **extra)
    except Exception as error:  # transformers raises many kinds here
        raise SdftError(f"model.name = {config.name!r}: no tokenizer loads ({first_line(error)})") from error
    stops = [tokenizer.eos_token_id]
    with contextlib.suppress(OSError, ValueError):  # a model without a generation config is normal
        if not extra:
            eos = GenerationConfig.from_pretrained(base).eos_token_id
            stops += eos if isinstance(eos, list) else [eos]
    ids = tuple(dict.fromkeys(i for i in stops if i is not None))
    if not ids:
        raise SdftError(f"model.name = {config.name!r}: the tokenizer has no end-of-sequence token")
    return tokenizer, ids


def load(config: ModelConfig, tokenizer: Any, stop_ids: tuple[int, ...]) -> LanguageModel:
    """Loads the weights, with the adapter if the name is one, and checks the head.

    Files are safetensors or GGUF. Code from the hub runs only if model.trust_remote_code is set.
    """
    model = load_unchecked(config, tokenizer, stop_ids)
    check_head(model)
    return model


def load_unchecked(config: ModelConfig, tokenizer: Any, stop_ids: tuple[int, ...]) -> LanguageModel:
    """`load` without the check of the head: for models that the fused loss cannot take."""
    from transformers import AutoModelForCausalLM

    name, extra, adapter = find_base(config.name)
    device = pick_device(config.device)
    compute = pick_compute_dtype(config, device)
    attention = pick_attention(config, device, compute)
    try:
        with no_progress_bar():
            lm: Any = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=DTYPES[config.weights_dtype],
                attn_implementation=attention,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=None if extra else True,
                **extra,
                **(quantization(compute, device) if config.quantize == "4bit" else {}),
            )
    except Exception as error:  # transformers raises many kinds here
        raise SdftError(f"model.name = {config.name!r}: no weights load ({first_line(error)})") from error
    if extra:
        drop_quantization(lm)
    rows = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise SdftError(
            f"model.name = {config.name!r}: the tokenizer has {len(tokenizer)} tokens but the model only {rows} "
            "embedding rows; they do not belong together"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    disable_dropout(lm)
    lean.install(lm)
    if config.quantize == "none":
        lm.to(device)
    else:  # loading has put the weights on the device
        keep_unpacked(lm)
    if adapter is not None:
        lm = lora.load(lm, adapter, device)
    if compute != torch.float32:
        lean.share_inputs(lm)
    return LanguageModel(lm, device, compute, pad, stop_ids)


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """A context in which transformers shows no bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def quantization(compute: torch.dtype, device: torch.device) -> dict[str, Any]:
    """from_pretrained's arguments for QLoRA (Dettmers et al. 2023): NF4 with double quantization, without the head."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SdftError(
            "model.quantize = '4bit' needs bitsandbytes, which is not installed; run: pip install bitsandbytes"
        )
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def keep_unpacked(lm: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for a CPU's bf16 units at the first forward without gradients.

    Repacked they have scales rounded to bf16 and, from then on, a product that passes no gradient: after the first
    rollout the adapters below the last layer would no longer learn.
    """
    module: Any
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def disable_dropout(lm: nn.Module) -> None:
    """Sets the dropout of the model to 0, because noise on the student alone would count as divergence."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  # attention layers that hand a number to the kernel


def check_context(model: "LanguageModel", prompt: int, new: int) -> None:
    """Raises SdftError if the longest prompt and a completion do not fit the model's positions."""
    limit = getattr(model.inner.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt + new > limit:
        raise SdftError(
            f"the longest prompt ({prompt} tokens) and rollout.max_new_tokens = {new} exceed the model's {limit} "
            f"positions; lower rollout.max_new_tokens, or data.max_prompt_tokens and teacher.max_prompt_tokens"
        )


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA if there is a GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SdftError(f"model.device = {name!r} cannot be used: {first_line(error)}") from None
    return device


def pick_compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 if the device has it (a CPU with AMX or AVX512-BF16, an Ampere GPU or later)."""
    if config.compute_dtype != "auto":
        return DTYPES[config.compute_dtype]
    if config.weights_dtype == "bfloat16":
        return torch.bfloat16
    return torch.bfloat16 if has_fast_bf16(device) else torch.float32


def pick_attention(config: ModelConfig, device: torch.device, compute: torch.dtype) -> str:
    """`auto` is flash_attention_2 only if it can run. By name, it raises SdftError if it cannot."""
    usable = importlib.util.find_spec("flash_attn") is not None and device.type == "cuda"
    if config.attention == "flash_attention_2" and not usable:
        raise SdftError("model.attention = 'flash_attention_2' needs CUDA and the package flash-attn; set 'sdpa'")
    if config.attention == "auto":
        return "flash_attention_2" if usable and compute == torch.bfloat16 else "sdpa"
    return config.attention
