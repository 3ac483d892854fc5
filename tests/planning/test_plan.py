"""The closed forms of the plan against the simulation on fake tensors, and against real tensors where that is quick."""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft.config import Config, override
from sdft.errors import SdftError
from sdft.model.shape import FAMILIES, ModelShape, Work
from sdft.planning import costs, plan
from sdft.planning.costs import Costs, Machine, Pass, SimulatedCosts
from sdft.planning.simulate import LiveBytes, simulate

GIB = 2**30
CPU = Machine("cpu", 64 * GIB, 0)
DTYPES = (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"))
LENGTHS = (100, 200, 212)  # of the sequences of a micro-batch
ROWS = 48


def lm_config(family: str, **changes: Any) -> Any:
    """Proportions of a real model, small enough that a simulation takes a tenth of a second."""
    import transformers as t

    kinds = {
        "llama": t.LlamaConfig, "mistral": t.MistralConfig, "qwen2": t.Qwen2Config, "qwen3": t.Qwen3Config,
        "gemma3": t.Gemma3TextConfig, "gpt2": t.GPT2Config,
    }  # fmt: skip
    sizes = {
        "vocab_size": 1000, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    if family in ("qwen3", "gemma3"):
        sizes["head_dim"] = 32  # twice the hidden size in all
    if family == "gpt2":
        sizes = {"vocab_size": 1000, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 4096}
    return kinds[family](**sizes | changes)


def config(**changes: Any) -> Config:
    return override(Config(), {"teacher.kind": "base", "train.batch_size": 3, "rollout.max_new_tokens": 32} | changes)


# The model: sizes of everything that is held all the time.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rank", [0, 4])
def test_counts_are_the_models(family: str, tied: bool, rank: int) -> None:
    from sdft.planning.simulate import count

    lm = lm_config(family, tie_word_embeddings=tied)
    shape, c = ModelShape.from_config(lm), config(**{"lora.rank": rank})
    total, trains = count(lm, c)
    mine = Costs(shape, c, CPU, True)
    assert mine.trained == trains
    assert shape.parameters + mine.adapters * bool(rank) == total


@pytest.mark.parametrize("biased", ["attention_bias", "mlp_bias"])
def test_biases_are_counted(biased: str) -> None:
    from sdft.planning.simulate import count

    lm = lm_config("llama", **{biased: True})
    assert ModelShape.from_config(lm).parameters == count(lm, config())[0]


@pytest.mark.parametrize("lora", [{"targets": ("q_proj", "down_proj")}, {"modules_to_save": ("lm_head",)}])
def test_adapters_are_counted(lora: dict[str, Any]) -> None:
    from sdft.planning.simulate import count

    lm = lm_config("llama", tie_word_embeddings=False)
    c = config(**{"lora.rank": 4} | {f"lora.{name}": value for name, value in lora.items()})
    assert Costs(ModelShape.from_config(lm), c, CPU, True).trained == count(lm, c)[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kind", ["ema", "base", "live"])
def test_what_a_run_holds(make_run: Callable[..., Any], kind: str, rank: int, dtype: str) -> None:
    """Weights, teacher, gradients and moments, against the tensors of a real run after one step."""
    from sdft.training.step import train_step

    settings = {"teacher.kind": kind, "lora.rank": rank, "model.weights_dtype": dtype}
    settings["model.compute_dtype"] = dtype
    run = make_run("llama", **settings)
    seen: dict[str, int] = {}
    step = run.optimizer.step

    def watched() -> None:
        seen["gradients"] = sum(p.grad.nbytes for p in run.model.trainable().values())
        step()

    run.optimizer.step = watched
    train_step(run, 0, Path(run.config.train.output))
    mine = Costs(ModelShape.from_config(run.model.inner.config), run.config, CPU, True)
    assert mine.weights == sum(p.nbytes for p in run.model.lm.parameters())
    assert mine.teacher == sum(t.nbytes for t in run.teacher.masters.values())
    assert mine.gradients == seen["gradients"]
    states = run.optimizer.state.values()
    assert mine.moments == sum(t.nbytes for state in states for t in state.values() if t.ndim)


# One forward and its backward.


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("packed", "kind"), [(True, "cuda"), (False, "cuda"), (True, "cpu")])
def test_saved_activations_are_exact(
    family: str, dtypes: tuple[str, str], rank: int, checkpointing: bool, packed: bool, kind: str
) -> None:
    lm, shape, c, compute = set_up(family, dtypes, rank, checkpointing)
    peaks = simulate(lm, c, compute, LENGTHS, (), ROWS, packed, kind)
    tokens = sum(LENGTHS) if packed else len(LENGTHS) * max(LENGTHS)
    mine = Costs(shape, c, Machine(kind, GIB, 0), packed)
    # Padded sequences share their cosines, sines and positions; the plan counts them for each.
    shared = 0 if packed else (len(LENGTHS) - 1) * max(LENGTHS) * (2 * shape.head_dim * mine.w + 8)
    around = 16 * tokens + 8 * ROWS  # ids and row numbers, which only some of the cases keep
    assert abs(sum(mine.saved(tokens)) - shared + ROWS * shape.hidden * mine.w - peaks.saved) <= around


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
@pytest.mark.parametrize("rank", [0, 4])
def test_saved_activations_of_the_other_families(family: str, rank: int) -> None:
    test_saved_activations_are_exact(family, ("float32", "bfloat16"), rank, False, True, "cuda")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("tied", "again"), [(True, False), (True, True), (False, True)])
def test_peaks_of_a_micro_batch(
    family: str, dtypes: tuple[str, str], rank: int, checkpointing: bool, tied: bool, again: bool
) -> None:
    lm, shape, c, compute = set_up(family, dtypes, rank, checkpointing, tie_word_embeddings=tied)
    c = override(c, {"teacher.kind": "live"})
    mine = Costs(shape, c, CPU, True)
    peaks = simulate(lm, c, compute, LENGTHS, LENGTHS, ROWS, True, micro_batches=1 + again)
    one = Pass(sum(LENGTHS), sum(LENGTHS), ROWS)
    before = mine.gradients * again

    def most(parts: Sequence[dict[str, int]]) -> int:
        return max(sum(part.values()) for part in parts)

    score, backward = most(mine.scoring(one)) + before, most(mine.descending(one, again))
    loss = sum(mine.losing(one).values()) - mine.loss(ROWS) + before
    assert score == pytest.approx(max(peaks.teacher, peaks.student), rel=0.12)
    assert loss == pytest.approx(peaks.loss, rel=0.02)
    assert backward == pytest.approx(peaks.backward, rel=0.12)
    assert peaks.gradients == pytest.approx(mine.gradients, rel=0.001)


def set_up(
    family: str, dtypes: tuple[str, str], rank: int, checkpointing: bool, **changes: Any
) -> tuple[Any, ModelShape, Config, torch.dtype]:
    lm = lm_config(family, **changes)
    settings = {
        "model.weights_dtype": dtypes[0], "model.compute_dtype": dtypes[1], "lora.rank": rank,
        "model.gradient_checkpointing": checkpointing,
    }  # fmt: skip
    return lm, ModelShape.from_config(lm), config(**settings), getattr(torch, dtypes[1])


def test_live_bytes_of_real_tensors() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100).t() + 1  # the view is nothing new
        assert live.now == 8000
        del a
        assert live.now == 4000
        del b
        assert (live.now, live.take_peak(), live.peak) == (0, 8000, 0)


@pytest.mark.parametrize("rows", [7, 300, 3000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_work_space_of_the_loss(rows: int, dtype: str, divergence: str) -> None:
    from sdft_kernels.call import Grads, Inputs, Scales
    from sdft_kernels.checks import make_options
    from sdft_kernels.chunks import Outputs
    from sdft_kernels.loop import run_linear
    from sdft_kernels.torch_rows import DivergenceRows

    budget = 2**22
    c = config(**{"loss.chunk_bytes": budget, "loss.divergence": divergence, "model.compute_dtype": dtype})
    shape = ModelShape.from_config(lm_config("llama"))
    x, w = torch.randn(rows, shape.hidden), torch.randn(shape.vocab, shape.hidden)
    inputs = Inputs(x, w, None, torch.randn(rows, shape.hidden), w.clone())
    labels, scales = torch.zeros(rows, dtype=torch.int64), Scales(None, None, 1.0, masked=False)
    options = make_options(
        divergence=divergence,
        beta=0.5,
        temperature=1.0,
        reduction="sum",
        vocab=shape.vocab,
        return_tokens=True,
        chunk_bytes=budget,
    )
    autocast = torch.bfloat16 if dtype == "bfloat16" else None
    with LiveBytes([labels, *(t for t in vars(inputs).values() if t is not None)]) as live:
        values = Outputs(rows, torch.float32, x.device, tokens=True, labels=True)
        work = DivergenceRows(options, (None, None), labels, values, scales, need_grad=True)
        made = run_linear(inputs, options, work, Grads(True, True, False), scales, autocast)
    outputs = sum(t.nbytes for t in made.made()) + rows * 21  # the values of each row
    mine = Costs(shape, c, Machine("cpu", GIB, 0, threads=torch.get_num_threads()), True).loss(rows)
    assert live.peak - outputs <= mine * 1.02 + 2**16
    assert mine <= min(budget, (live.peak - outputs) * 1.3 + 2**18)


# A plan.


def work() -> Work:
    return Work((60, 80, 100), (200, 250, 300), (32, 32, 32))


def test_the_phases_of_a_step() -> None:
    shape = ModelShape.from_config(lm_config("llama"))
    found = plan.predict(shape, config(), work(), CPU)
    assert list(found.phases) == ["rollout", "score", "loss", "backward", "update"]
    assert all(set(terms) == set(plan.TERMS) for terms in found.phases.values())
    assert found.peak == max(found.total(phase) for phase in found.phases)
    assert found.phases["rollout"]["KV cache"] == 3 * (100 + 32) * 3 * 2 * 32 * Costs(shape, config(), CPU, True).c
    assert not found.phases["update"]["activations"]
    sft = plan.predict(shape, config(**{"loss.method": "sft"}), Work((60,) * 3, (), (32,) * 3), CPU)
    assert plan.predict(shape, config(**{"loss.method": "dft"}), Work((60,) * 3, (), (32,) * 3), CPU) == sft
    assert "rollout" not in sft.phases
    assert not any(terms["teacher"] for terms in sft.phases.values())


@pytest.mark.parametrize(
    ("family", "rank", "kind"),
    [("llama", 0, "cpu"), ("llama", 0, "cuda"), ("llama", 4, "cpu"), ("qwen3", 4, "cuda")],
)
def test_the_largest_budget_fits_and_one_token_more_does_not(family: str, rank: int, kind: str) -> None:
    shape = ModelShape.from_config(lm_config(family))
    c, w = config(**{"lora.rank": rank}), Work((360,) * 30, (400,) * 30, (32,) * 30)
    roomy = Machine(kind, 64 * GIB, 2**20, 0.1)
    whole = plan.predict(shape, c, w, roomy)
    assert whole.budget == 0
    least = plan.predict(shape, override(c, {"train.micro_batch_tokens": 1}), w, roomy)
    tight = Machine(kind, (whole.peak + least.peak) // 2, 2**20, 0.1)
    known = costs.costs_of(shape, c, w, tight)
    budget = plan.largest_budget(known, w)
    assert budget
    assert max(w.sizes) <= budget < sum(w.sizes)

    def peak(tokens: int) -> int:
        phases = plan._phases(known, w, [costs.share_of(w, tokens)], True)
        return max(sum(terms.values()) for terms in phases.values())

    assert peak(budget) <= tight.memory < peak(budget + 1)
    within = plan.predict(shape, override(c, {"train.micro_batch_tokens": budget}), w, tight)
    assert within.fits
    none = Machine(kind, 2**20, 2**20)
    assert plan.largest_budget(costs.costs_of(shape, c, w, none), w) is None


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_micro_batches_are_the_trainers(packing: str) -> None:
    c = config(**{"train.micro_batch_tokens": 600, "train.packing": packing})
    passes = costs.passes_of(c, work(), packing == "auto")
    assert sum(p.rows for p in passes) == 96
    assert len(passes) == 2
    if packing == "auto":
        assert sum(p.teacher for p in passes) == 750 + 96 - 3
    else:
        assert passes[0].teacher == 2 * (250 + 31)


def test_each_setting_saves_what_it_is_for() -> None:
    shape, gpu = ModelShape.from_config(lm_config("llama")), Machine("cuda", GIB, 0)
    base = config(**{"teacher.kind": "ema", "model.weights_dtype": "bfloat16"})
    plain = plan.predict(shape, base, work(), gpu).phases["backward"]
    for changes, term in (
        ({"model.gradient_checkpointing": True}, "activations"),
        ({"model.activation_offload": True}, "activations"),
        ({"optim.name": "adamw_8bit"}, "moments"),
        ({"optim.offload": True}, "moments"),
        ({"teacher.offload": True}, "teacher"),
        ({"teacher.kind": "live"}, "teacher"),
        ({"lora.rank": 4}, "gradients"),
        ({"lora.rank": 4, "model.quantize": "4bit"}, "weights"),
    ):
        assert plan.predict(shape, override(base, changes), work(), gpu).phases["backward"][term] < plain[term], changes


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
@pytest.mark.parametrize("rank", [0, 4])
def test_other_families_are_simulated(family: str, rank: int) -> None:
    lm = lm_config(family)
    c = config(**{"lora.rank": rank, "model.compute_dtype": "float32"})
    found = plan.predict(ModelShape.from_config(lm), c, work(), CPU)
    one = costs.passes_of(c, work(), False)[0]
    peaks = simulate(lm, c, torch.float32, (one.student,), (one.teacher,), one.rows, False)
    weights = found.phases["update"]["weights"] + found.phases["update"]["teacher"] + found.phases["update"]["moments"]
    assert found.total("backward") - weights == pytest.approx(peaks.backward, rel=0.02)
    assert found.budget == 0
    assert "simulation" in found.notes[0]


def test_the_simulation_stands_in_for_the_closed_forms() -> None:
    shape, c, gpu = ModelShape.from_config(lm_config("llama")), config(), Machine("cuda", GIB, 0)
    mine, simulated = Costs(shape, c, gpu, True), SimulatedCosts(shape, c, gpu, True, work())
    assert (simulated.trained, simulated.weights) == (mine.trained, mine.weights)
    one = costs.share_of(work(), 600)
    for again in (False, True):
        known = max(sum(part.values()) for part in mine.descending(one, again))
        assert sum(simulated.descending(one, again)[0].values()) == pytest.approx(known, rel=0.05)


def test_dora_is_simulated_too() -> None:
    c = config(**{"lora.rank": 4, "lora.dora": True})
    assert isinstance(costs.costs_of(ModelShape.from_config(lm_config("llama")), c, work(), CPU), SimulatedCosts)


def test_a_shape_alone_cannot_be_simulated() -> None:
    shape = ModelShape("gpt2", 2, 32, 64, 4, 4, 8, 100, True)
    with pytest.raises(SdftError, match="Hugging Face config"):
        plan.predict(shape, config(), work(), CPU)


# Words and pictures.


def test_advice_leads_to_a_run_that_fits() -> None:
    shape = ModelShape.from_config(lm_config("llama", num_hidden_layers=8, vocab_size=50_000))
    c, w = config(**{"teacher.kind": "ema"}), Work((360,) * 30, (400,) * 30, (32,) * 30)
    plain = plan.predict(shape, c, w, Machine("cuda", GIB, 0))
    assert plan.advice(shape, c, w, Machine("cuda", plain.peak, 0)) == []
    half = Machine("cuda", plain.peak // 2, 0)
    said = plan.advice(shape, c, w, half)
    assert said[0].startswith("train.micro_batch_tokens = ")
    budget = int(said[0].split()[2])
    assert plan.predict(shape, override(c, {"train.micro_batch_tokens": budget}), w, half).fits
    assert any(line.startswith("model.gradient_checkpointing = true: ") for line in said)
    # No token budget makes room for weights, gradients, moments and teacher: five times the weights.
    short = plan.advice(shape, c, w, Machine("cuda", plain.phases["update"]["weights"] * 4, 0))
    assert not short[0].startswith("train.micro_batch_tokens")
    first = ("rollout.batch_size = 7", "model.gradient_checkpointing = true", 'optim.name = "adamw_8bit"')
    assert short[-1].startswith("together these fit: " + ", ".join(first))
    settings = dict(part.split(" = ") for part in short[-1].removeprefix("together these fit: ").split(", "))
    changed = override(c, {key: json.loads(value) for key, value in settings.items()})
    assert plan.predict(shape, changed, w, Machine("cuda", plain.phases["update"]["weights"] * 4, 0)).fits
    none = plan.advice(shape, c, w, Machine("cuda", 1000, 0))
    assert "even together" in none[-1]


def test_the_picture_shows_every_phase_and_term() -> None:
    from rich.console import Console

    found = plan.predict(ModelShape.from_config(lm_config("llama")), config(), work(), Machine("cpu", GIB, 2**20))
    console = Console(width=120, record=True, file=io.StringIO())
    for part in plan.picture(found):
        console.print(part)
    text = console.export_text()
    for word in (*found.phases, *(t for t in plan.TERMS if any(terms[t] for terms in found.phases.values()))):
        assert word in text
    bars = [line.count("█") for line in text.splitlines()[:5]]
    totals = [found.total(phase) for phase in found.phases]
    assert bars[totals.index(max(totals))] == max(bars)
    for bar, total in zip(bars, totals, strict=True):
        assert abs(bar / max(bars) - total / max(totals)) < 0.05


@pytest.mark.parametrize(
    ("text", "want"),
    [("12GB", 12 * GIB), ("12 gib", 12 * GIB), ("900MB", 900 * 2**20), ("1.5g", 3 * GIB // 2), ("8", 8)],
)
def test_sizes(text: str, want: int) -> None:
    assert plan.parse_size(text) == want


@pytest.mark.parametrize("text", ["", "much", "12XB", "-3GB", "0GB", "1.2.3GB"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(SdftError, match="--memory"):
        plan.parse_size(text)


# The command.


@pytest.fixture
def weightless(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model folder without its weights."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    (folder / "model.safetensors").unlink()
    return folder


def test_the_command_reads_no_weights(weightless: Path, skill: Path, tmp_path: Path, capsys: Any) -> None:
    from sdft.cli import main

    path = tmp_path / "c.toml"
    path.write_text(f'[model]\nname = "{weightless}"\n[data]\ntrain = "{skill}"\n[teacher]\ncontext = "as_turns"\n')
    main(["plan", str(path)])
    said = capsys.readouterr().out
    assert "it fits" in said
    assert "backward" in said
    main(["plan", str(path), "--json", "--model.device", "cuda", "--memory", "8GB"])
    found = json.loads(capsys.readouterr().out)
    assert found["memory"] == 8 * GIB
    assert set(found["phases"]) == {"rollout", "score", "loss", "backward", "update"}
    with pytest.raises(SystemExit) as exit_:
        main(["plan", str(path), "--memory", "100MB"])
    assert exit_.value.code == 1
    assert "does not fit" in capsys.readouterr().out


def test_lengths_in_place_of_data(weightless: Path, tmp_path: Path, capsys: Any) -> None:
    from sdft.cli import main

    path = tmp_path / "c.toml"
    path.write_text(f'[model]\nname = "{weightless}"\n[rollout]\nmax_new_tokens = 20\n[train]\nbatch_size = 3\n')
    peaks = []
    for tokens in ("100", "200"):
        main(["plan", str(path), "--prompt-tokens", tokens, "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["step_tokens"] == 3 * (int(tokens) + 40)
        peaks.append(found["phases"]["score"]["activations"])
    assert peaks[1] > 1.5 * peaks[0]


def test_the_data_gives_the_longest_step(make_config: Callable[..., Any]) -> None:
    from sdft.data.dataset import batch_indices, tokenize
    from sdft.data.formats import load_records
    from sdft.model.loading import load_tokenizer

    c = make_config()
    found = plan.work_of(c)
    tokenizer, stops = load_tokenizer(c.model)
    examples = tokenize(load_records(c.data.train, "train"), tokenizer, stops, c.data, c.teacher).examples
    steps = [[examples[i] for i in batch_indices(len(examples), 3, step, c.train.seed)] for step in range(4)]
    assert found.teacher_prompts in [tuple(len(e.teacher_prompt) for e in step) for step in steps]
    assert sum(found.teacher_prompts) == max(sum(len(e.teacher_prompt) for e in step) for step in steps)
    assert found.completions == (6, 6, 6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_gpu_that_is_not_here_needs_its_size() -> None:
    with pytest.raises(SdftError, match="--memory"):
        plan.this_machine(config(**{"model.device": "cuda"}))
    assert plan.this_machine(config(**{"model.device": "cuda"}), GIB).memory == GIB


# The benchmark's table.


def test_the_table_has_every_model_and_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import memory

    monkeypatch.setattr(memory, "full_logits", lambda: (16.0, 20.0))  # counted on trl, which the tests do without
    lines = memory.table().splitlines()
    assert len(lines) == 2 + len(memory.SHAPES) * len(memory.METHODS)
    assert all(line.count("|") == 3 + len(memory.GPUS) for line in lines)

    def tokens(cell: str) -> int:
        return 10**9 if "whole" in cell else int(cell.split("(")[0].replace(",", "") or 0) if cell != "–" else 0

    for line in lines[2:]:
        cells = [[tokens(part.strip()) for part in cell.split("/")] for cell in line.split("|")[3:-1]]
        assert [cell[0] for cell in cells] == sorted(cell[0] for cell in cells)  # more memory, no fewer tokens
        assert all(cell[0] >= cell[-1] for cell in cells)  # full logits never hold more


@pytest.mark.parametrize(
    ("name", "billions"), [("Qwen2.5-0.5B", 0.494), ("Qwen2.5-7B", 7.616), ("Llama-3.1-8B", 8.030)]
)
def test_the_tables_models_have_their_weights(name: str, billions: float) -> None:
    from bench.memory import SHAPES

    sizes = SHAPES[name]
    assert ModelShape(*sizes, qkv_bias=sizes[0] == "qwen2").parameters / 1e9 == pytest.approx(billions, abs=0.001)
