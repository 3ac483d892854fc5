"""Whether a model's attention keeps sequences apart that lie end to end in one row."""

import torch

from sdft.errors import SdftError, first_line
from sdft.model import attention
from sdft.model.language_model import LanguageModel


def enable_packing(model: LanguageModel, setting: str) -> None:
    """Lets sequences lie end to end if a probe finds that the model keeps them apart.

    setting: train.packing. Raises SdftError for `on` if the model does not.
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
    """Why packing would change the hidden states; empty if it does not."""
    lengths = (5, 9, 3)
    rows = model.inner.get_input_embeddings().weight.shape[0]
    ids = [[(17 * i + 7 * n + 3) % rows for i in range(n)] for n in lengths]
    row = torch.tensor([[i for x in ids for i in x]], device=model.device)  # (1, T)
    try:
        with model.evaluating():
            packed = model.hidden(row, lengths)[0].float()  # (T, H)
            alone = torch.cat([model.hidden(torch.tensor([x], device=model.device))[0] for x in ids]).float()  # (T, H)
    except Exception as error:  # a model without these arguments may raise any error
        return first_line(error)
    # bf16 alone gives errors of about 1%. If a sequence sees another one, or continues its positions, errors are tens
    # of percent.
    gap = ((packed - alone).norm() / alone.norm()).item()
    return "" if gap < 0.05 else f"its hidden states change by {gap:.0%}"
