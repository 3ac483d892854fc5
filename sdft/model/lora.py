"""LoRA adapters on a model: fresh, loaded, stacked, switched off, merged. peft does the arithmetic.

Legend: r rank. An adapter adds dW = scale * B A to a frozen weight W (out, in): A is (r, in), B is (out, r).
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sdft.config import LoraConfig
from sdft.errors import SdftError, first_line
from sdft.model import lean
from sdft.model.adapters import find_file
from sdft.model.language_model import LanguageModel, few_logits, near

EARLIER, NEW = "default", "new"  # peft's names of the adapters; NEW is there in a stack only
WEIGHTS = "adapter_model.safetensors"


def set_up_lora(model: LanguageModel, config: LoraConfig, seed: int) -> None:
    """Adds or continues adapters by the settings `lora`; prints what happens to an earlier adapter."""
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
        train_on(model.lm)
    elif config.rank:
        add_lora(model, config, seed)


def add_lora(model: LanguageModel, config: LoraConfig, seed: int) -> None:
    """Wraps the model in a fresh LoRA adapter; everything else is frozen."""
    model.lm = add(model.lm, config, seed)
    if model.compute_dtype != torch.float32:
        lean.share_inputs(model.lm)


def load(lm: nn.Module, name: str, device: torch.device) -> Any:
    """The adapter `name` on its base, frozen; factors and whole modules in fp32 whatever the base's dtype."""
    import peft

    if find_file(name, WEIGHTS) is None:
        raise SdftError(f"model.name = {name!r}: no {WEIGHTS} in it; adapters are read from safetensors only")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(lm, name, torch_device=str(device))
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise SdftError(f"model.name = {name!r}: {WEIGHTS} lacks some of the adapter's weights; it is not whole")
    whole = [module for wrapper in whole_modules(adapted) for module in wrapper.modules_to_save.values()]
    if any(p.dtype != torch.float32 for module in whole for p in module.parameters()):
        for module in whole:  # peft gave them the dtype of the base, which may have rounded them
            module.float()
        peft.set_peft_model_state_dict(adapted, peft.utils.load_peft_weights(name, device=str(device)))
    return adapted


def add(lm: Any, config: LoraConfig, seed: int) -> Any:
    """Wraps the model in a fresh LoRA adapter, which alone trains, in fp32; on an adapter, it is stacked on it.

    Raises SdftError for targets or whole modules that do not exist, or that the fused loss would ignore.
    """
    import peft

    targets: str | list[str] = list(config.targets)
    if config.targets == ("all-linear",):
        targets = "all-linear"
    stacked = hasattr(lm, "peft_config")
    inner = lm.get_base_model() if stacked else lm
    peft_config = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides; a float is as good
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.rslora,
        use_dora=config.dora,
        modules_to_save=find_whole_modules(inner, config) or None,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        if stacked:
            lm.add_adapter(NEW, peft_config)
            activate_stack(lm)
        else:
            lm = peft.get_peft_model(lm, peft_config)
    except (ValueError, TypeError) as error:  # TypeError: lora.modules_to_save names a list of layers
        raise SdftError(
            f"lora.targets = {list(config.targets)}, lora.modules_to_save = {list(config.modules_to_save)}: "
            f"{first_line(error)}"
        ) from None
    if hasattr(inner.get_output_embeddings(), "base_layer"):
        raise SdftError(
            f"lora.targets = {list(config.targets)}: the head cannot take an adapter; leave it out, or train it whole "
            "if it is not tied to the embedding: lora.modules_to_save"
        )
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # adapters are small; bf16 would lose their updates
    if config.dora:
        _exact_row_norms(lm)
    return lm


def find_whole_modules(lm: Any, config: LoraConfig) -> list[str]:
    """The full names of the modules that lora.modules_to_save names; they train whole and get no adapter.

    Raises SdftError for a name without a module, a weight that head and embedding share, and 4-bit weights.
    """
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    asked, modules, found = f"lora.modules_to_save = {list(config.modules_to_save)}", dict(lm.named_modules()), []
    for wanted in config.modules_to_save:
        # peft would take any name with this ending: input_layernorm for norm.
        names = [name for name in modules if f".{name}".endswith(f".{wanted}")]
        if not names:
            leaves = {name.rpartition(".")[2] for name, module in modules.items() if not list(module.children())}
            raise SdftError(f"{asked}: the model has no module {wanted!r}; it has {', '.join(sorted(leaves))}")
        if head.weight is embedding.weight and any(modules[name] in (head, embedding) for name in names):
            raise SdftError(
                f"{asked}: {wanted!r} is one weight for embedding and head in this model, and a copy of it would "
                "untie them; leave it out, or train every weight: lora.rank = 0"
            )
        if not all(p.is_floating_point() for name in names for p in modules[name].parameters()):
            raise SdftError(f"{asked}: {wanted!r} is quantized and cannot train; leave it out")
        found += names
    return found


def whole_modules(lm: nn.Module) -> list[Any]:
    """peft's wrappers of the modules that train whole (lora.modules_to_save)."""
    from peft.utils import ModulesToSaveWrapper

    return [module for module in lm.modules() if isinstance(module, ModulesToSaveWrapper)]


def _exact_row_norms(lm: nn.Module) -> None:
    # peft computed them in the dtype of the weights; rounded to bf16, the adapter would not start at the model.
    module: Any
    for module in lm.modules():
        for name, magnitude in getattr(module, "lora_magnitude_vector", {}).items():
            factors = {"lora_A": module.lora_A[name].weight, "lora_B": module.lora_B[name].weight}
            magnitude.update_layer(base_layer=module.get_base_layer(), scaling=module.scaling[name], **factors)


def activate_stack(lm: Any) -> None:
    """Both adapters act, the new one trains."""
    lm.base_model.set_adapter([EARLIER, NEW])
    for name, parameter in lm.named_parameters():
        if f".{EARLIER}." in name:
            parameter.requires_grad_(False)


def is_stack(lm: Any) -> bool:
    return NEW in getattr(lm, "peft_config", {})


def train_on(lm: Any) -> None:
    """A loaded adapter trains further."""
    lm.set_adapter(EARLIER)
    lm.peft_config[EARLIER].inference_mode = False


def is_fresh(lm: nn.Module) -> bool:
    """Whether the adapter that trains has no effect yet: every B is zero, every module trained whole unmoved."""
    factors = [p for name, p in lm.named_parameters() if p.requires_grad and ".lora_B." in name]
    if not factors or any(p.any() for p in factors):
        return False
    pairs = [
        pair
        for wrapper in whole_modules(lm)
        for own in wrapper.modules_to_save.values()
        for pair in zip(own.parameters(), wrapper.original_module.parameters(), strict=True)
    ]
    return all(torch.equal(own, was.to(own.dtype)) for own, was in pairs)


@contextlib.contextmanager
def switched_off(lm: Any) -> Iterator[None]:
    """A context in which the adapter that trains is off (an earlier one stays on), and nothing counts as trainable."""
    if not is_stack(lm):
        with lm.disable_adapter():
            yield
        return
    lm.base_model.set_adapter(EARLIER, inference_mode=True)
    try:
        yield
    finally:
        activate_stack(lm)


@torch.no_grad()
def merge_adapter(model: LanguageModel) -> None:
    """Adds the model's adapter to its weights. Raises SdftError if the result is another model."""
    want = few_logits(model)
    model.lm = merge(model.lm)
    exact = model.weights_dtype == model.compute_dtype == torch.float32
    if not near(few_logits(model), want, 1e-3 if exact else 0.05):
        raise SdftError("the adapter cannot be merged: the merged model computes something else")


def merge(lm: Any) -> Any:
    """The plain model with dW added to its weights, once rounded to their dtype; every weight trains.

    Raises SdftError for an adapter on a weight that embedding and head share: merged, it would change both.
    """
    inner = lm.get_base_model()
    if getattr(inner.config.get_text_config(), "tie_word_embeddings", False):
        for module in (inner.get_output_embeddings(), inner.get_input_embeddings()):
            if hasattr(module, "base_layer") or module in whole_modules(lm):
                raise SdftError("the adapter cannot be merged: it changes one of embedding and head, which are tied")
    for wrapper in whole_modules(lm):
        for own in wrapper.modules_to_save.values():
            own.to(next(wrapper.original_module.parameters()).dtype)
    return lm.merge_and_unload().requires_grad_(True)
