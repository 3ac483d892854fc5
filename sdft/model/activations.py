"""Less memory for the activations that a forward pass saves: computed again, or kept on the CPU."""

import torch
from torch import Tensor, nn

from sdft.model.language_model import LanguageModel


def enable_gradient_checkpointing(model: LanguageModel) -> None:
    """Makes the backward pass compute the layers again."""
    model.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(model.lm, "enable_input_require_grads"):
        model.inner.enable_input_require_grads()  # otherwise frozen embeddings cut the graph


class saved_activations(torch.autograd.graph.save_on_cpu):  # noqa: N801  # named as the context it extends
    """A context that moves what a forward pass saves to pinned CPU memory, and back when the backward pass needs it.

    Weights are not moved; PyTorch's save_on_cpu would copy them, once for every layer that uses them. With gradient
    checkpointing only the inputs of the layers are moved.
    """

    def __init__(self) -> None:
        super().__init__(pin_memory=True)
        pack, unpack = self.pack_hook, self.unpack_hook
        self.pack_hook = lambda t: t if is_weight(t) else pack(t)
        self.unpack_hook = lambda kept: kept if isinstance(kept, Tensor) else unpack(kept)


def is_weight(tensor: Tensor) -> bool:
    # A linear layer saves its weight transposed: a view.
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
