"""The model of the costs: against numbers counted by hand, against independent bounds; its commands."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import costs, docs, roofline
from bench.costs import DESIGNS, DEVICES, MIB, cost
from bench.roofline import head_shape
from bench.shapes import Shape

H100, H200 = DEVICES["H100"], DEVICES["H200"]
ROUND = Shape(1000, 10_000, 100)


@pytest.mark.parametrize(
    ("model", "head", "cast", "expected"),
    [  # bounds on an H100 and an H200 by 256 MiB, 512 MiB, 1 GiB and 2 GiB, counted when chunks were multiples of 64
        ("Qwen2.5-7B", "trained", False, [(37, 53), (61, 73), (79, 89), (85, 89)]),
        ("Qwen2.5-7B", "frozen", False, [(58, 83), (82, 87), (82, 87), (82, 87)]),
        ("Gemma-3-1B", "trained", False, [(12, 18), (30, 43), (51, 63), (62, 73)]),
        ("SmolLM2-135M", "trained", False, [(40, 54), (46, 58), (48, 58), (49, 58)]),
    ],
)
def test_bounds_of_a_loop_that_reads_logits_twice(
    model: str, head: str, cast: bool, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = head_shape(model, head, cast=cast)
    for mib, pair in zip((256, 512, 1024, 2048), expected, strict=True):
        row_bytes = 8 * shape.vocab + 16 * shape.hidden
        most = mib * MIB // row_bytes // 64 * 64
        even = -(-shape.tokens // -(-shape.tokens // most))
        chunk = min(most, -(-even // 64) * 64)
        monkeypatch.setattr(costs, "plan_of", lambda *_, chunk=chunk: costs.Plan(chunk, ()))
        found = [100 * costs.bound_of(costs.chunked(shape, d, None, reads=2)[0], shape, d) for d in (H100, H200)]
        assert found == pytest.approx(pair, abs=1.5)


def test_peers_bounds() -> None:
    shape = head_shape("Qwen2.5-7B")
    assert [100 * cost(shape, d, "TRL").bound for d in (H100, H200)] == pytest.approx([57, 60], abs=1.5)
    frozen = replace(shape, trained=False)
    assert [100 * cost(frozen, d, "dual", 256 * MIB).bound for d in (H100, H200)] == pytest.approx([93, 95], abs=1.5)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_no_design_does_less_than_the_bare_products(design: str, trained: bool, shared: bool) -> None:
    made = cost(replace(ROUND, trained=trained, shared=shared), H100, design, 64 * MIB)
    flops = sum(phase.flops for phase in made.phases())
    again = {"TRL": 2, "recompute": 2}.get(design, 0)  # both sides' logits once more
    assert flops == pytest.approx(ROUND.product * ((4 if trained else 3) + again))
    assert 0 < made.bound < 1
    assert made.seconds == pytest.approx(sum(phase.seconds for phase in made.phases()))


def test_a_call_counted_by_hand() -> None:
    """One chunk: 1000 tokens, V = 10000, H = 100, bf16, trained."""
    made = cost(ROUND, H100, "chunked", 2**30)
    assert made.chunk == 1000
    found = {phase.name: phase.bytes for phase in made.phases()}
    n, v, h = 1000, 10_000, 100
    assert found["logits"] == 2 * (2 * v * h + 2 * n * h + 4 * n * v)
    assert found["dX"] == 2 * n * v + 2 * v * h + 4 * n * h
    assert found["rows"] in (18 * n * v, 10 * n * v)
    assert found["dW"] == pytest.approx(2 * n * v + 2 * n * h + 4 * v * h, rel=0.2)


def test_fp32_heads_cost_their_casts() -> None:
    plain, cast = (cost(head_shape("Qwen2.5-7B", cast=c), H100, workspace=256 * MIB) for c in (False, True))
    assert cast.bound < plain.bound
    assert "casts" in {phase.name for phase in cast.phases()}


def test_a_call_takes_its_chunks_from_the_loop() -> None:
    small = [cost(head_shape("Qwen2.5-7B"), H100, workspace=mib * MIB).chunk for mib in (256, 512, 1024)]
    assert small == sorted(small)
    assert (
        cost(head_shape("Qwen2.5-7B"), H100).chunk
        == cost(head_shape("Qwen2.5-7B"), H100, workspace=costs.default_workspace(H100)).chunk
    )


def test_a_row_that_stays_on_the_chip_is_read_once() -> None:
    shape, a100 = head_shape("Qwen2.5-7B"), DEVICES["A100"]
    assert [costs.reads_of(shape, device) for device in (H100, a100)] == [1, 2]
    once, twice = ({p.name: p.bytes for p in cost(shape, H100, d).phases()}["rows"] for d in ("chunked", "two reads"))
    assert once / twice == pytest.approx(10 / 18)
    assert cost(shape, a100, "chunked").seconds == cost(shape, a100, "two reads").seconds


def test_the_shipped_default_reaches_its_bars_on_an_h100() -> None:
    for model in ("Qwen2.5-7B", "Llama-3.1-8B"):
        assert cost(head_shape(model, "trained"), H100).bound >= 0.80
        assert cost(head_shape(model, "frozen"), H100).bound >= 0.85


def test_bytes_on_the_wire_of_a_split_head() -> None:
    assert costs.wire_bytes(ROUND, 1) == {"statistics": 0, "dX": 0}
    assert costs.wire_bytes(ROUND, 4) == {"statistics": 3 * 20 * 1000, "dX": 2 * 3 / 4 * 4 * 1000 * 100}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model", "Gemma-3-1B", "--head", "frozen", "--device", "H200", "--workspace", "512", "--ranks", "8"],
        ["--compare", "--cast", "--tokens", "2048"],
        ["--device", "CPU", "--dtype", "float32", "--model", "small", "--tokens", "512"],
    ],
    ids=" ".join,
)
def test_what_the_command_prints(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(arguments)
    out = capsys.readouterr().out
    count = len(DESIGNS) if "--compare" in arguments else 1
    assert out.count("| sum |") == count
    assert ("send in one call" in out) == ("--ranks" in arguments)


def proof_of(folder: Path) -> Path:
    """The file of a proof with one phase of one call, one loss, one step and one rollout."""
    label = {"model": "Qwen2.5-7B", "V": 152064, "H": 3584, "N": 16384, "dtype": "bfloat16", "head": "trained"}
    label |= {"divergence": "reverse_kl", "impl": "triton"}
    ours = label | {"variant": "triton, default", "workspace": None, "trainer": False, "ms": 110.0}
    rows: dict[str, list[dict[str, Any]]] = {
        "kernels": [label | {"phase": "logits", "ms": 50.0, "predicted ms": 40.0}],
        "ours": [ours | {"of the floor": 0.8, "bound": 0.9, "extra MB": 1200.0, "dX error": 2e-3}],
        "peers": [
            label | {"variant": "sdft_kernels triton", "of the floor": 0.82, "ms": 108.0, "extra MB": 1100.0},
            label | {"variant": "dense", "of the floor": 0.3, "ms": 300.0, "extra MB": 9000.0},
            label | {"variant": "TRL GKD", "of the floor": 0.5, "ms": 180.0, "extra MB": 9000.0, "note": "inexact"},
        ],
        "steps": [{"shape": "0.5B, 32 x 128", "contender": "ours", "seconds": 1.5, "peak": 20e9}],
        "rollout": [{"model": "0.5B", "decoder": "ours", "tokens/s": 4000.0}],
    }
    meta = {"device": "NVIDIA H100", "tiny": False}
    phases = {name: [{"item": "one", "rows": r, "seconds": 1.0, "error": None}] for name, r in rows.items()}
    path = folder / "nvidia-h100.json"
    path.write_text(json.dumps({"meta": meta, "phases": phases}))
    return path


def test_predicted_and_measured_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["--measured", str(proof_of(tmp_path))])
    assert "| Qwen2.5-7B, trained, N = 16384, triton | logits | 40 | 50 | 1.25 |" in capsys.readouterr().out


def test_tables_of_a_gpu_come_from_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    assert docs.gpu() == docs.steps() == docs.NOT_MEASURED
    assert docs.headline() == docs.NOT_MEASURED_IN_README
    proof_of(tmp_path)
    assert "triton, default | 110 | 80% | 90% | 1200 | 2e-03 |" in docs.gpu()
    assert "dense | 300 | 30% |" in docs.gpu()
    table = docs.headline()
    assert "sdft_kernels triton | 108 | 82% | 1100 |" in table
    assert "dense | 300 | 30% | 9000 |" in table
    assert "TRL GKD" not in table, "neither the fastest nor exact"
    assert "| 0.5B, 32 x 128 | ours | 1.50 | 20.00 |" in docs.steps()
    assert "4000" in docs.steps()


def test_the_docs_hold_what_the_commands_print() -> None:
    assert list(docs.stale()) == [], "python -m bench.docs"


def test_a_block_is_replaced_between_its_comments() -> None:
    text = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n"
    assert docs.replaced(text, "x", "new\nlines") == "a\n<!-- x -->\nnew\nlines\n<!-- end of x -->\nb\n"
    assert docs.between(text, "x") == "old"
    with pytest.raises(ValueError, match="no comments <!-- y -->"):
        docs.replaced(text, "y", "new")
