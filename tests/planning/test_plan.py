"""The plan of a run: its phases against real tensors and a real process, the token budget, advice, the command."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft.config import Config, override
from sdft.model.shape import FAMILIES, ModelShape, Work
from sdft.planning.advice import advice
from sdft.planning.held import Held
from sdft.planning.live_bytes import LiveBytes
from sdft.planning.machine import Machine
from sdft.planning.picture import picture
from sdft.planning.plan import TERMS, Costs, largest_budget, peak, predict
from sdft.planning.simulate import Counts, Simulation
from sdft.planning.work import passes_of, work_of

GIB = 2**30
CPU = Machine("cpu", 64 * GIB, 0)
GPU = Machine("cuda", GIB, 0)


# Against real tensors.


@pytest.mark.parametrize(
    ("kind", "rank", "dtype"),
    [("ema", 0, "float32"), ("base", 0, "bfloat16"), ("ema", 4, "float32"), ("live", 4, "bfloat16")],
)
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
    held = Costs(ModelShape.from_config(run.model.inner.config), run.config, CPU).held
    assert held.weights == sum(p.nbytes for p in run.model.lm.parameters())
    assert held.teacher == sum(t.nbytes for name, t in run.teacher.state().items() if name.startswith("masters."))
    assert held.gradients == seen["gradients"]
    states = run.optimizer.state.values()
    assert held.moments == sum(t.nbytes for state in states for t in state.values() if t.ndim)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/clear_refs and VmHWM")
def test_the_peaks_of_a_real_run(
    lm_config: Callable[..., Any], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Predicted in one process and measured in another (bench/memory.py), beyond what the process itself takes."""
    import transformers

    sizes = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 5}
    lm = transformers.AutoModelForCausalLM.from_config(lm_config("llama", **sizes))
    lm.save_pretrained(tmp_path / "model")
    ours = shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json")
    shutil.copytree(model_folder("llama"), tmp_path / "model", ignore=ours, dirs_exist_ok=True)
    rows = [{"prompt": f"{'say it ' * 12}{i}", "demonstration": "yes"} for i in range(12)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/facts-train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = json.dumps(
        {
            "model.name": str(tmp_path / "model"), "model.compute_dtype": "float32", "teacher.kind": "ema",
            "train.steps": 2, "train.batch_size": 12, "rollout.max_new_tokens": 4, "rollout.batch_size": 4,
            "loss.chunk_bytes": 2**24,
        }
    )  # fmt: skip

    def apart(what: str) -> Any:
        command = [sys.executable, "-m", "bench.memory", "--worker", what, settings, str(tmp_path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[2])
        return json.loads(done.stdout.splitlines()[-1])

    plan, run = apart("predicted"), apart("measured")
    runtime = plan["loss"]["runtime"]
    predicted = max(sum(terms.values()) for terms in plan.values()) - runtime
    measured = max(run[phase] for phase in plan) - runtime
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_like_the_models(family: str, tied: bool, lm_config: Callable[..., Any]) -> None:
    """The sum of ModelShape, which the study's files and the FLOPs use, against the simulated model's."""
    lm = lm_config(family, tie_word_embeddings=tied, num_hidden_layers=2)
    c = Config()
    counts = Simulation(lm, c.model, c.lora, torch.float32, packed=True, kind="cpu").counts
    assert ModelShape.from_config(lm).parameters == counts.trained
    assert counts.frozen == 0


@pytest.mark.parametrize("biased", ["attention_bias", "mlp_bias"])
def test_biases_are_counted(biased: str, lm_config: Callable[..., Any]) -> None:
    lm, c = lm_config("llama", **{biased: True}), Config()
    counts = Simulation(lm, c.model, c.lora, torch.float32, packed=True, kind="cpu").counts
    assert ModelShape.from_config(lm).parameters == counts.trained


@pytest.mark.parametrize("rows", [7, 300, 3000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_workspace_of_the_loss(
    rows: int, dtype: str, divergence: str, lm_config: Callable[..., Any], planned: Callable[..., Config]
) -> None:
    from sdft_kernels.call import Grads, Inputs, Scales
    from sdft_kernels.checks import make_options
    from sdft_kernels.chunks import Outputs
    from sdft_kernels.loop import run_linear
    from sdft_kernels.torch_rows import DivergenceRows

    budget = 2**22
    settings = {"loss.chunk_bytes": budget, "loss.divergence": divergence, "model.compute_dtype": dtype}
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
    held = Held(shape, planned(**settings), Machine("cpu", GIB, 0), Counts(0, shape.parameters, 0)).loss(rows)
    assert held <= budget
    assert live.peak - outputs <= 1.1 * held + 2**16
    assert held <= 2 * (live.peak - outputs) + 2**18


# A plan.


def test_the_phases_of_a_step(lm_config: Callable[..., Any], planned: Callable[..., Config], work: Work) -> None:
    shape = ModelShape.from_config(lm_config("llama"))
    found = predict(shape, planned(), work, CPU)
    assert list(found.phases) == ["rollout", "score", "loss", "backward", "update"]
    assert all(set(terms) == set(TERMS) for terms in found.phases.values())
    assert found.peak == max(found.total(phase) for phase in found.phases) == peak(shape, planned(), work, CPU)
    assert found.phases["rollout"]["KV cache"] == 3 * (100 + 32) * 3 * 2 * 32 * (2 if CPU.bf16 else 4)
    assert not found.phases["update"]["activations"]
    labels_only = Work((60,) * 3, (), (32,) * 3)
    sft = predict(shape, planned(**{"loss.method": "sft"}), labels_only, CPU)
    assert predict(shape, planned(**{"loss.method": "dft"}), labels_only, CPU) == sft
    assert "rollout" not in sft.phases
    assert not any(terms["teacher"] for terms in sft.phases.values())


def test_more_sequences_and_longer_ones_take_more(
    lm_config: Callable[..., Any], planned: Callable[..., Config]
) -> None:
    shape = ModelShape.from_config(lm_config("llama"))
    few, more, longer = (
        predict(shape, planned(), Work((p,) * n, (2 * p,) * n, (32,) * n), GPU) for p, n in ((60, 3), (60, 6), (120, 3))
    )
    for phase in ("score", "loss", "backward"):
        assert few.total(phase) < more.total(phase)
        assert few.total(phase) < longer.total(phase)
    lora = predict(shape, planned(**{"lora.rank": 4}), Work((60,) * 3, (120,) * 3, (32,) * 3), GPU)
    assert lora.peak < few.peak


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_the_largest_budget_fits_and_one_token_more_does_not(
    packing: str, lm_config: Callable[..., Any], planned: Callable[..., Config]
) -> None:
    shape = ModelShape.from_config(lm_config("llama"))
    c, w = planned(**{"train.packing": packing}), Work((360,) * 30, (400,) * 30, (32,) * 30)
    roomy = Machine("cuda", 64 * GIB, 2**20, 0.1)
    assert predict(shape, c, w, roomy).budget == 0
    least = peak(shape, override(c, {"train.micro_batch_tokens": 1}), w, roomy)
    tight = Machine("cuda", (peak(shape, c, w, roomy) + least) // 2, 2**20, 0.1)
    costs = Costs(shape, c, tight)
    budget = largest_budget(costs, w)
    assert budget
    assert max(w.sizes) <= budget < sum(w.sizes)

    def share(tokens: int) -> int:
        return max(sum(terms.values()) for terms in costs.share(w, tokens).values())

    assert share(budget) <= tight.memory < share(budget + 1)
    assert predict(shape, override(c, {"train.micro_batch_tokens": budget}), w, tight).fits
    # The true peak, not the one between simulated sizes: nearly all of the memory is used.
    assert 0.9 * tight.memory < peak(shape, override(c, {"train.micro_batch_tokens": budget}), w, tight)
    assert largest_budget(Costs(shape, c, Machine("cuda", 2**20, 2**20)), w) is None


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_are_the_trainers(packed: bool, work: Work) -> None:
    passes = passes_of(work, 600, packed)
    assert sum(p.rows for p in passes) == 96
    assert len(passes) == 2
    if packed:
        assert sum(p.teacher for p in passes) == 750 + 96 - 3
    else:
        assert (passes[0].teacher, passes[0].sequences) == (2 * (250 + 31), 2)


def test_each_setting_saves_what_it_is_for(
    lm_config: Callable[..., Any], planned: Callable[..., Config], work: Work
) -> None:
    shape = ModelShape.from_config(lm_config("llama"))
    base = planned(**{"teacher.kind": "ema", "model.weights_dtype": "bfloat16"})
    plain = predict(shape, base, work, GPU).phases["loss"]
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
        assert predict(shape, override(base, changes), work, GPU).phases["loss"][term] < plain[term], changes


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_other_families_have_a_plan(
    family: str, lm_config: Callable[..., Any], planned: Callable[..., Config], work: Work
) -> None:
    found = predict(ModelShape.from_config(lm_config(family)), planned(), work, CPU)
    assert found.budget == 0
    assert "padded" in found.notes[1]
    assert found.phases["backward"]["gradients"]


def test_eager_attention_keeps_its_scores(
    lm_config: Callable[..., Any], planned: Callable[..., Config], work: Work
) -> None:
    shape, c = ModelShape.from_config(lm_config("llama")), planned(**{"train.packing": "off"})
    fused = predict(shape, c, work, GPU).phases["loss"]["activations"]
    eager = predict(shape, override(c, {"model.attention": "eager"}), work, GPU).phases["loss"]["activations"]
    scores = 3 * 6 * 3 * (100 + 31) ** 2  # sequences, heads, layers: at least one T x T matrix each
    assert eager - fused > 2 * scores


# Words and pictures.


def test_advice_leads_to_a_run_that_fits(lm_config: Callable[..., Any], planned: Callable[..., Config]) -> None:
    shape = ModelShape.from_config(lm_config("llama", num_hidden_layers=8, vocab_size=50_000))
    c, w = planned(**{"teacher.kind": "ema"}), Work((360,) * 16, (400,) * 16, (32,) * 16)
    plain = predict(shape, c, w, GPU)
    assert advice(shape, c, w, Machine("cuda", plain.peak, 0)) == []
    less = Machine("cuda", plain.peak * 3 // 4, 0)
    lines = advice(shape, c, w, less)
    assert lines[0].startswith("train.micro_batch_tokens = ")
    budget = int(lines[0].split()[2])
    assert predict(shape, override(c, {"train.micro_batch_tokens": budget}), w, less).fits
    assert any(line.startswith("model.gradient_checkpointing = true: ") for line in lines)


@pytest.mark.slow
def test_advice_of_several_settings_at_once(lm_config: Callable[..., Any], planned: Callable[..., Config]) -> None:
    shape = ModelShape.from_config(lm_config("llama", num_hidden_layers=8, vocab_size=50_000))
    c, w = planned(**{"teacher.kind": "ema"}), Work((360,) * 16, (400,) * 16, (32,) * 16)
    plain = predict(shape, c, w, GPU)
    # No token budget makes room for weights, gradients, moments and teacher: five times the weights.
    small = Machine("cuda", plain.phases["update"]["weights"] * 4, 0)
    short = advice(shape, c, w, small)
    assert not short[0].startswith("train.micro_batch_tokens")
    assert short[-1].startswith("together these fit: ")
    settings = dict(part.split(" = ") for part in short[-1].removeprefix("together these fit: ").split(", "))
    assert "optim.name" in settings
    changed = override(c, {key: json.loads(value) for key, value in settings.items()})
    assert predict(shape, changed, w, small).fits
    none = advice(shape, c, w, Machine("cuda", 1000, 0))
    assert "even together" in none[-1]


def test_the_picture_shows_every_phase_and_term(
    lm_config: Callable[..., Any], planned: Callable[..., Config], work: Work
) -> None:
    from rich.console import Console

    found = predict(ModelShape.from_config(lm_config("llama")), planned(), work, Machine("cpu", GIB, 2**20))
    console = Console(width=120, record=True, file=io.StringIO())
    for part in picture(found):
        console.print(part)
    text = console.export_text()
    for word in (*found.phases, *(t for t in TERMS if any(terms[t] for terms in found.phases.values()))):
        assert word in text
    bars = [line.count("█") for line in text.splitlines()[:5]]
    totals = [found.total(phase) for phase in found.phases]
    assert bars[totals.index(max(totals))] == max(bars)
    for bar, total in zip(bars, totals, strict=True):
        assert abs(bar / max(bars) - total / max(totals)) < 0.05


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
    found = work_of(c)
    tokenizer, stops = load_tokenizer(c.model)
    examples = tokenize(load_records(c.data.train, "train"), tokenizer, stops, c.data, c.teacher).examples
    steps = [[examples[i] for i in batch_indices(len(examples), 3, step, c.train.seed)] for step in range(4)]
    assert found.teacher_prompts in [tuple(len(e.teacher_prompt) for e in step) for step in steps]
    assert sum(found.teacher_prompts) == max(sum(len(e.teacher_prompt) for e in step) for step in steps)
    assert found.completions == (6, 6, 6)


# The benchmark's table.


@pytest.mark.slow
def test_the_table_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import memory

    monkeypatch.setattr(memory, "full_logits", lambda: (16.0, 20.0))  # counted on trl, which the tests do without
    monkeypatch.setattr(memory, "MODELS", dict(list(memory.MODELS.items())[:1]))
    lines = memory.table().splitlines()
    assert len(lines) == 2 + len(memory.METHODS)
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
    from bench.memory import shape_of

    assert shape_of(name).parameters / 1e9 == pytest.approx(billions, abs=0.001)
