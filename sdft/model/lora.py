"""LoRA adapters on a Hugging Face model: fresh, loaded, stacked, switched off, merged, saved. peft does the arithmetic.

Legend: r rank. An adapter adds dW = scale * B A to a frozen weight W (out, in): A is (r, in), B is (out, r).
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdft.config import LoraConfig
from sdft.errors import SdftError, first_line

EARLIER, NEW = "default", "new"  # peft's names of the adapters; NEW is there in a stack only
WEIGHTS = "adapter_model.safetensors"
MERGED_BASE = "base"  # folder inside an adapter's folder: base weights that are in no other place


# An adapter as model.name.


def read_config(name: str) -> Any:
    """The peft.LoraConfig of an adapter folder or hub name; None where `name` is no adapter.

    Raises SdftError for an adapter of another kind than LoRA.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    found = None
    if not Path(name).expanduser().is_dir() and name.count("/") != 1:
        return None  # adapters on the hub have an owner: nothing is asked there about a file, or a name of our own
    with contextlib.suppress(OSError, ValueError):  # such a hub name is unheard of: loading it says so
        found = find_adapter_config_file(name)
    if found is None:
        return None
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(name)
    except Exception as error:  # peft raises many kinds here
        raise SdftError(f"model.name = {name!r}: its adapter_config.json cannot be read ({error})") from error
    if config.peft_type != peft.PeftType.LORA:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise SdftError(f"model.name = {name!r} is an adapter of kind {kind}; sdft knows LoRA adapters")
    return config


def base_of(name: str, config: Any) -> str:
    """Where an adapter's base model is: in the adapter's own folder, or what its config names."""
    own = Path(name) / MERGED_BASE
    if own.is_dir():
        return str(own)
    base = config.base_model_name_or_path
    if not base:
        raise SdftError(f"model.name = {name!r}: its adapter_config.json names no base_model_name_or_path; add it")
    if read_config(base) is not None:
        raise SdftError(f"model.name = {name!r}: its base {base!r} is an adapter too; merge that one: sdft merge")
    return str(base)


def find_file(name: str, file: str) -> str | None:
    """A file of a folder or hub name, or None."""
    from transformers.utils import cached_file

    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None


def check_earlier(name: str, earlier: Any, config: LoraConfig) -> None:
    """Raises SdftError where `lora.earlier` does not say what becomes of model.name.

    earlier: `read_config` of it.
    """
    if earlier is None:
        if config.earlier:
            raise SdftError(
                f"lora.earlier = {config.earlier!r} but model.name = {name!r} is no LoRA adapter; drop lora.earlier"
            )
        return
    if not config.earlier:
        raise SdftError(
            f"model.name = {name!r} is a LoRA adapter; say by lora.earlier what becomes of it: 'merge' folds it into "
            "the base weights, 'stack' trains a new adapter on top and saves both as one, 'continue' trains it further"
        )
    if earlier.bias != "none" and config.earlier != "merge":
        raise SdftError(f"model.name = {name!r} has trained biases beside its factors; set lora.earlier = 'merge'")
    if config.earlier == "stack" and (earlier.use_dora or earlier.modules_to_save):
        what = "is a DoRA adapter" if earlier.use_dora else f"holds whole modules ({earlier.modules_to_save})"
        raise SdftError(
            f"lora.earlier = 'stack' but model.name = {name!r} {what}, which does not add to another; "
            "set 'merge' or 'continue'"
        )
    if config.earlier == "continue":
        _check_continued(name, config, earlier)


def _check_continued(name: str, config: LoraConfig, earlier: Any) -> None:
    targets = earlier.target_modules
    has = {
        "rank": earlier.r,
        "alpha": earlier.lora_alpha,
        "dropout": earlier.lora_dropout,
        "targets": (targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        "rslora": earlier.use_rslora,
        "dora": earlier.use_dora,
        "modules_to_save": tuple(earlier.modules_to_save or ()),
    }
    for key, value in has.items():
        asked = getattr(config, key)
        same = sorted(asked) == sorted(value) if isinstance(value, tuple) else asked == value
        if asked != getattr(LoraConfig(), key) and not same:
            raise SdftError(
                f"lora.{key} = {asked!r} but the adapter {name!r} has {value!r}; lora.earlier = 'continue' trains it "
                f"as it is: leave lora.{key} out"
            )


def load(lm: nn.Module, name: str, device: torch.device) -> Any:
    """The adapter `name` on its base, frozen; factors and whole modules in fp32 whatever the base's dtype."""
    import peft

    if find_file(name, WEIGHTS) is None:
        raise SdftError(f"model.name = {name!r}: no {WEIGHTS} in it; adapters are read from safetensors only")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(lm, name, torch_device=str(device))
    for warning in told:
        if "missing adapter keys" in str(warning.message):
            raise SdftError(f"model.name = {name!r}: {WEIGHTS} lacks some of the adapter's weights; it is not whole")
    whole = [module for wrapper in whole_modules(adapted) for module in wrapper.modules_to_save.values()]
    if any(p.dtype != torch.float32 for module in whole for p in module.parameters()):
        for module in whole:  # peft gave them the dtype of the base, which may have rounded them
            module.float()
        peft.set_peft_model_state_dict(adapted, peft.utils.load_peft_weights(name, device=str(device)))
    return adapted


# Training.


def add(lm: Any, config: LoraConfig, seed: int) -> Any:
    """Wraps the model in a fresh LoRA adapter, which alone trains, in fp32; on an adapter, it is stacked on it.

    Raises SdftError for targets or whole modules that are not there or that the fused loss could not see.
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
            "where it is not tied to the embedding: lora.modules_to_save"
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
    """Within it, the adapter that trains is off (an earlier one under it stays on), and nothing counts as trainable."""
    if not is_stack(lm):
        with lm.disable_adapter():
            yield
        return
    lm.base_model.set_adapter(EARLIER, inference_mode=True)
    try:
        yield
    finally:
        activate_stack(lm)


# Out.


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


def save(lm: Any, folder: Path, base: str | None = None) -> None:
    """The adapter as a folder that plain peft loads; a stack as one adapter. base: names another base model."""
    if is_stack(lm):
        _save_stack(lm, folder)
        return
    config = lm.peft_config[EARLIER]
    config.base_model_name_or_path = base or config.base_model_name_or_path
    lm.save_pretrained(folder, save_embedding_layers=False)  # nothing here resizes them; peft would ask the hub


def _save_stack(lm: Any, folder: Path) -> None:
    """[B1 B2] [A1; A2] = B1 A1 + B2 A2: concatenated factors, the scales folded into B.

    A module that has one of the two adapters only, or a smaller rank, is padded with zeros to the largest rank, so
    that no per-module pattern is needed to read it.
    """
    import peft
    from safetensors.torch import save_file

    factors: dict[str, tuple[Tensor, Tensor]] = {}
    layers: list[tuple[str, Any]] = list(lm.get_base_model().named_modules())
    for name, module in layers:
        if hasattr(module, "lora_A"):
            own = [adapter for adapter in (EARLIER, NEW) if adapter in module.lora_A]
            down = [module.lora_A[adapter].weight.detach() for adapter in own]  # (r_i, in)
            up = [module.lora_B[adapter].weight.detach() * module.scaling[adapter] for adapter in own]  # (out, r_i)
            factors[name] = torch.cat(down), torch.cat(up, 1)  # (r, in), (out, r)
    rank = max(len(a) for a, _ in factors.values())
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, rank - len(a)))
        tensors[f"base_model.model.{name}.lora_B.weight"] = nn.functional.pad(b, (0, rank - b.shape[1]))
    earlier = lm.peft_config[EARLIER]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(factors),
        fan_in_fan_out=earlier.fan_in_fan_out,
        task_type="CAUSAL_LM",
        base_model_name_or_path=earlier.base_model_name_or_path,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config.save_pretrained(str(folder))


def base_weights(lm: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without its adapters, by its own names; the tensors are the model's."""
    weights = {}
    for name, tensor in lm.state_dict().items():
        if ".lora_" not in name and ".modules_to_save." not in name:
            weights[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return weights
