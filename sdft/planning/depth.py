"""The simulation of a deep model from two shallow ones: what each further layer adds is the same.

Every peak is taken at its place in the step (in the first layer, in the last, before them, after them), and at each
place its bytes are linear in the number of layers. Models whose layers repeat in a pattern are cut by whole patterns. A
model without a pattern is simulated at its full depth.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from sdft.config import Config
from sdft.errors import SdftError, first_line
from sdft.model.shape import FAMILIES, ModelShape
from sdft.planning.simulate import UNPLANNABLE, Counts, Peaks, Simulation
from sdft.planning.work import Pass

_made: dict[Any, "SimulatedModel"] = {}


def simulated_model(
    shape: ModelShape, config: Config, compute: torch.dtype, packed: bool, kind: str
) -> "SimulatedModel":
    """The model of a run; the same object for all configs whose micro-batches hold the same.

    compute: dtype of matrix products. packed: sequences lie end to end. kind: of device. Raises SdftError if the model
    cannot be simulated.
    """
    if shape.config is None:
        raise SdftError(f"model of type {shape.family!r}: the plan needs its Hugging Face config (ModelShape.config)")
    model, lora = config.model, config.lora
    settings: list[Any] = [model.weights_dtype, model.quantize, model.attention, model.gradient_checkpointing]
    if lora.rank:
        settings += [lora.rank, tuple(lora.targets), lora.dora, bool(lora.dropout), tuple(lora.modules_to_save)]
    key = (shape.config.to_json_string(), *settings, model.activation_offload, compute, packed, kind)
    if key not in _made:
        _made[key] = SimulatedModel(shape, config, compute, packed, kind)
    return _made[key]


class SimulatedModel:
    """Peaks of a model's micro-batches; each size is simulated once."""

    def __init__(self, shape: ModelShape, config: Config, compute: torch.dtype, packed: bool, kind: str) -> None:
        self.depth = shape.layers
        self.depths = _depths(shape)

        def simulation(depth: int) -> Simulation:
            lm_config = _with_layers(shape.config, depth)
            return Simulation(lm_config, config.model, config.lora, compute, packed, kind)

        try:
            self.models = [simulation(depth) for depth in self.depths]
            if len(self.depths) > 1 and shape.family not in FAMILIES:
                whole = _entries(shape.config)
                if self.counts.frozen + self.counts.trained != whole and not config.lora.rank:
                    self.depths, self.models = (shape.layers,), [simulation(shape.layers)]
        except UNPLANNABLE as error:
            raise _cannot(shape, error) from None
        self.shape = shape
        self._peaks: dict[Pass, tuple[Peaks, Peaks]] = {}
        self._prompts: dict[int, int] = {}

    @property
    def counts(self) -> Counts:
        counts = [model.counts for model in self.models]
        if len(counts) == 1:
            return counts[0]
        low, high = self.depths
        return counts[0].at_depth(counts[1], low, high, self.depth)

    def peaks(self, one: Pass, again: bool) -> Peaks:
        """Peaks of a micro-batch beyond the weights. again: the gradients of an earlier micro-batch are there."""
        if one not in self._peaks:
            try:
                found = [model.micro_batch(one) for model in self.models]
            except UNPLANNABLE as error:
                raise _cannot(self.shape, error) from None
            first, later = zip(*found, strict=True)
            self._peaks[one] = self._deep(first), self._deep(later)
        return self._peaks[one][again]

    def between(self, low: Pass, high: Pass, tokens: int, again: bool) -> Peaks:
        """`peaks` of a micro-batch between two others, by a straight line; tokens: of the student's pass."""
        start, span = self.peaks(low, again), high.student - low.student
        return _line(start, self.peaks(high, again), tokens - low.student, span) if span else start

    def prompt_pass(self, tokens: int) -> int:
        """Most bytes at once during a forward pass of this many tokens without gradients."""
        if tokens not in self._prompts:
            found = [{("", ""): {"": model.prompt_pass(tokens)}} for model in self.models]
            self._prompts[tokens] = self._deep(found)["", ""][""]
        return self._prompts[tokens]

    def _deep(self, found: Sequence[Peaks]) -> Peaks:
        """Peaks of the whole model, from the peaks of the shallow ones."""
        if len(found) == 1:
            return found[0]
        low, high = self.depths
        return _line(found[0], found[1], self.depth - low, high - low)


def _line(low: Peaks, high: Peaks, way: int, whole: int) -> Peaks:
    """The point `way` from low on the straight line to high, which is `whole` from low; it may be beyond high."""

    def between(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
        return {use: max(0, a.get(use, 0) + (b.get(use, 0) - a.get(use, 0)) * way // whole) for use in a | b}

    return {place: between(uses, high[place]) for place, uses in low.items() if place in high}


def _cannot(shape: ModelShape, error: Exception) -> SdftError:
    return SdftError(f"a model of type {shape.family!r} cannot be planned: {first_line(error)}")


def _depths(shape: ModelShape) -> tuple[int, ...]:
    """The depths to simulate: two, or the full one alone."""
    text, layers = shape.config.get_text_config(), shape.layers
    patterns = [v for v in vars(text).values() if isinstance(v, (list, tuple)) and len(v) == layers]
    for period in range(1, layers // 2 + 1):
        if all(v[i] == v[i % period] for v in patterns for i in range(layers)):
            break
    else:
        return (layers,)
    low = layers % period
    while low < 2:
        low += period
    return (low, low + period) if 2 * low + period < layers else (layers,)


def _with_layers(lm_config: Any, layers: int) -> Any:
    """A copy of a Hugging Face config with this many layers."""
    changed = copy.deepcopy(lm_config)
    text = changed.get_text_config()
    whole = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, (list, tuple)) and len(value) == whole:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return changed


def _entries(lm_config: Any) -> int:
    """Entries of all weights of the model; a tied one once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(lm_config).parameters())
