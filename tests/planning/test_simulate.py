"""The simulation of a micro-batch: what it counts; a few layers give the numbers of many."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdft.config import Config
from sdft.errors import SdftError
from sdft.model.shape import ModelShape
from sdft.planning import depth
from sdft.planning.depth import SimulatedModel
from sdft.planning.live_bytes import LiveBytes
from sdft.planning.work import Pass

ONE = Pass(student=500, teacher=700, rows=96)


def simulated(lm: Any, config: Config, compute: torch.dtype = torch.bfloat16, kind: str = "cuda") -> SimulatedModel:
    return SimulatedModel(ModelShape.from_config(lm), config, compute, packed=True, kind=kind)


def whole(model: SimulatedModel, again: bool, one: Pass = ONE) -> dict[str, int]:
    """The peak of every phase."""
    peaks: dict[str, int] = {}
    for (phase, _), uses in model.peaks(one, again).items():
        peaks[phase] = max(peaks.get(phase, 0), sum(uses.values()))
    return peaks


def at_full_depth(monkeypatch: pytest.MonkeyPatch, lm: Any, config: Config) -> SimulatedModel:
    with monkeypatch.context() as patch:
        patch.setattr(depth, "_depths", lambda shape: (shape.layers,))
        return simulated(lm, config)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora.rank": 4, "model.weights_dtype": "bfloat16"},
        {"model.gradient_checkpointing": True},
        pytest.param({"lora.rank": 4, "model.quantize": "4bit"}, marks=pytest.mark.slow),
        pytest.param({"model.weights_dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"model.activation_offload": True}, marks=pytest.mark.slow),
    ],
)
def test_two_shallow_models_give_the_peaks_of_a_deep_one(
    settings: dict[str, Any], lm_config: Callable[..., Any], planned: Callable[..., Config], monkeypatch: Any
) -> None:
    lm, config = lm_config("llama", num_hidden_layers=9), planned(**settings)
    shallow, deep = simulated(lm, config), at_full_depth(monkeypatch, lm, config)
    assert len(shallow.depths) == 2
    assert max(shallow.depths) < 5
    assert shallow.counts == deep.counts
    for again in (False, True):
        assert whole(shallow, again) == pytest.approx(whole(deep, again), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_other_families_are_cut_as_well(
    family: str, lm_config: Callable[..., Any], planned: Callable[..., Config], monkeypatch: Any
) -> None:
    lm = lm_config(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 25 if family == "gemma3" else 9})
    shallow, deep = simulated(lm, planned()), at_full_depth(monkeypatch, lm, planned())
    assert len(shallow.depths) == 2
    assert shallow.counts == deep.counts
    assert whole(shallow, again=True) == pytest.approx(whole(deep, again=True), rel=1e-3)


def test_layers_without_a_pattern_are_all_simulated(
    lm_config: Callable[..., Any], planned: Callable[..., Config]
) -> None:
    lm = lm_config("gemma3", num_hidden_layers=8)
    lm.layer_types = ["full_attention"] + ["sliding_attention"] * 7
    assert simulated(lm, planned()).depths == (8,)


def test_a_later_micro_batch_adds_to_the_gradients(
    lm_config: Callable[..., Any], planned: Callable[..., Config]
) -> None:
    model = simulated(lm_config("llama", tie_word_embeddings=False), planned(), torch.float32)
    gradients = 4 * model.counts.trained
    first, later = whole(model, again=False), whole(model, again=True)
    for phase in ("teacher", "student", "loss"):
        assert later[phase] - first[phase] == gradients
    assert first["backward"] < later["backward"] <= first["backward"] + gradients


def test_quantized_weights_are_unpacked_one_at_a_time(
    lm_config: Callable[..., Any], planned: Callable[..., Config]
) -> None:
    lm, settings = lm_config(), {"lora.rank": 4, "model.weights_dtype": "bfloat16"}
    few = Pass(student=8, teacher=8, rows=4)
    plain = whole(simulated(lm, planned(**settings)), False, few)
    packed = whole(simulated(lm, planned(**settings, **{"model.quantize": "4bit"})), False, few)
    assert 0 < packed["teacher"] - plain["teacher"] <= 2 * 96 * 256 * 2  # the largest matrix, in bf16


def test_a_model_without_its_config_is_refused(planned: Callable[..., Config]) -> None:
    shape = ModelShape("gpt2", 2, 32, 64, 4, 4, 8, 100, True)
    with pytest.raises(SdftError, match="Hugging Face config"):
        depth.simulated_model(shape, planned(), torch.float32, True, "cpu")


# The counter.


def test_live_bytes_of_real_tensors() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100).t() + 1  # the view is nothing new
        assert live.now == 8000
        del a
        assert live.now == 4000
        del b
        assert (live.now, live.take_peak(), live.peak) == (0, 8000, 0)


def test_peaks_by_span_and_use() -> None:
    weight = torch.zeros(100)
    with LiveBytes([weight]) as live:
        live.begin("one")
        kept = weight.to(torch.bfloat16)
        extra = torch.zeros(50)
        live.name(extra, "activations")
        del extra
        live.begin("two")
        gradient = torch.zeros(100)
        live.add_to_sum(gradient)
        peaks, later = live.peaks(), live.peaks(again=True)
    assert peaks["one"] == {"cast weights": 200, "activations": 200}
    assert peaks["two"] == {"cast weights": 200, "activations": 0, "gradients": 400}
    assert later["one"] == peaks["one"] | {"gradients": 400}
    assert later["two"]["gradients"] == 800  # the sum, and the gradient that is added to it
    del kept
