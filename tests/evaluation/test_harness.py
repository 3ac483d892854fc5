"""lm-evaluation-harness on the model in memory: its numbers equal direct computations."""

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdft.cli import main
from sdft.config import LoraConfig
from sdft.errors import SdftError
from sdft.evaluation import harness
from sdft.model.lora import add_lora
from sdft.model.packing import enable_packing

# The extra lm-eval is some 350 MB, so dev does not bring it; `make test-harness` does.
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: make test-harness"
)

QUESTIONS = [
    {"q": "one and one", "choices": ["two", "three", "no"], "gold": 0},
    {"q": "the sky", "choices": ["green", "blue", "a very long answer"], "gold": 1},
    {"q": "say b", "choices": ["A", "B", "C"], "gold": 1},
    {"q": "say c", "choices": ["A", "B", "C"], "gold": 2},
]


@torch.no_grad()
def direct(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One whole forward of the Hugging Face model, all logits, no batch."""
    model.lm.eval()
    logits = model.lm(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1].double()
    rows = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
    return float(rows.sum()), logits.argmax(-1).tolist() == continuation


def tuned(load_tiny: Any, nudge: Any) -> tuple[Any, Any]:
    """A tokenizer, and a model whose LoRA adapter differs from its base."""
    tokenizer, model = load_tiny()
    add_lora(model, LoraConfig(rank=4), 0)
    nudge(model, size=0.3)
    return tokenizer, model


def random_pairs(count: int = 12) -> list[tuple[list[int], list[int]]]:
    draw = random.Random(0)
    return [
        ([draw.randrange(256) for _ in range(draw.randint(1, 20))], [draw.randrange(256) for _ in range(1 + i % 5)])
        for i in range(count)
    ]


def test_log_likelihoods_are_the_direct_ones(family: str, load_tiny: Any) -> None:
    model = load_tiny(family)[1]
    pairs = random_pairs()
    pairs += [(pairs[0][0], [token]) for token in (5, 6, 7)]  # a multiple choice by its letters
    context, said = pairs[1][0], []
    for _ in range(3):  # and one that greedy decoding does give
        model.lm.eval()
        said.append(int(model.lm(torch.tensor([context + said])).logits[0, -1].argmax()))
    pairs.append((context, said))
    model.lm.train()
    got = harness.log_likelihoods(model, pairs, 512, batch_tokens=40)
    assert model.lm.training  # as it was
    want = [direct(model, *pair) for pair in pairs]
    assert [g for g, _ in got] == pytest.approx([w for w, _ in want], rel=1e-4, abs=1e-4)
    assert [g for _, g in got] == [w for _, w in want]
    assert got[-1][1]
    whole = harness.log_likelihoods(model, pairs, 512)
    assert [v for v, _ in whole] == pytest.approx([v for v, _ in got], rel=1e-4, abs=1e-4)  # whatever the batch


def test_packed_and_adapted(load_tiny: Any, nudge: Any) -> None:
    model = tuned(load_tiny, nudge)[1]
    want = [direct(model, *pair) for pair in random_pairs()]
    enable_packing(model, "on")
    got = harness.log_likelihoods(model, random_pairs(), 512)
    assert [g for g, _ in got] == pytest.approx([w for w, _ in want], rel=1e-4, abs=1e-4)
    with model.lm.disable_adapter():
        base = harness.log_likelihoods(model, random_pairs(), 512)
    assert [b for b, _ in base] != pytest.approx([w for w, _ in want], rel=1e-2)


@torch.no_grad()
def test_bf16_weights_have_fp32_logits(load_tiny: Any) -> None:
    model = load_tiny(weights_dtype="bfloat16", compute_dtype="bfloat16")[1]
    model.lm.eval()
    for context, said in (([1, 2, 3], [4, 5]), ([9], [8])):
        hidden = model.hidden(torch.tensor([[*context, *said[:-1]]]))[0, -len(said) :].double()
        rows = (hidden @ model.head().weight.double().T).log_softmax(-1)
        want = float(rows.gather(1, torch.tensor(said)[:, None]).sum())
        assert harness.log_likelihoods(model, [(context, said)], 512)[0][0] == pytest.approx(want, rel=1e-5)
        rounded = model.head().logits(hidden.bfloat16()).float().log_softmax(-1)
        assert float(rounded.gather(1, torch.tensor(said)[:, None]).sum()) != pytest.approx(want, rel=1e-4)


def test_pairs_that_differ_in_their_last_token_run_once(load_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_tiny()[1]
    run: list[int] = []
    hidden = type(model).hidden
    monkeypatch.setattr(type(model), "hidden", lambda self, ids, n=None: run.append(len(ids)) or hidden(self, ids, n))
    harness.log_likelihoods(model, [([1, 2, 3], [token]) for token in (4, 5, 6, 7)] + [([1, 2], [3, 4])], 512)
    assert run == [2]  # [1, 2, 3], seen as ([1, 2, 3], []) and as ([1, 2], [3])


def test_long_texts_lose_their_beginning(load_tiny: Any) -> None:
    model = load_tiny()[1]
    text = [i % 250 for i in range(700)]
    got = harness.log_likelihoods(model, [(text[:690], text[690:])], 512)
    want = direct(model, text[700 - 513 : 690], text[690:])
    assert got[0][0] == pytest.approx(want[0], rel=1e-4)
    with pytest.raises(SdftError, match="a text of 513 tokens is to be scored; the model takes 512"):
        harness.log_likelihoods(model, [([1], [0] * 513)], 512)


def test_scores_are_named_as_lm_eval_names_them() -> None:
    got = harness.scores(
        {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 1, "f1_stderr,strict": "N/A", "n": 3}
    )
    assert got == {"acc": harness.Score(0.5, 0.1), "f1,strict": harness.Score(1.0, None)}


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, model_folder: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    harness._manager.cache_clear()
    words = "lm-evaluation-harness is not installed (lm_eval.tasks is missing); run: pip install '.[train,lm-eval]'"
    for name in [n for n in sys.modules if n.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as exit_:
        main(["eval", str(model_folder()), "--harness", "hellaswag"])
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tasks", "options", "words"),
    [
        ([], {}, "no harness tasks are named"),
        (["x"], {"limit": 0}, "limit = 0"),
        (["x"], {"include_path": "/no/such"}, "include_path = '/no/such': no such folder"),
    ],
)
def test_bad_arguments(tasks: list[str], options: Any, words: str) -> None:
    with pytest.raises(SdftError, match=words):
        harness.check(tasks, **options)


def test_eval_needs_something(model_folder: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["eval", str(model_folder())])
    assert "nothing to evaluate on; give DATA.jsonl, or --harness" in capsys.readouterr().err


# With lm_eval.


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks whose data are files: a multiple choice, a generation, a perplexity."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    head = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
    (folder / "choice.yaml").write_text(f"""task: tiny_choice
{head}
output_type: multiple_choice
doc_to_text: "Q: {{{{q}}}}\\nA:"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
""")
    (folder / "speech.yaml").write_text(f"""task: tiny_speech
{head}
output_type: generate_until
doc_to_text: "Q: {{{{q}}}}\\nA:"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs:
  until: ["e"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
""")
    (folder / "surprise.yaml").write_text(f"""task: tiny_surprise
{head}
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{q}}}}"
metric_list:
  - metric: byte_perplexity
""")
    return folder


TASKS = ["tiny_choice", "tiny_speech", "tiny_surprise"]


@needs_lm_eval
def test_local_tasks_give_the_numbers_of_direct_computations(local_tasks: Path, load_tiny: Any, nudge: Any) -> None:
    tokenizer, model = tuned(load_tiny, nudge)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    got = harness.run(model, tokenizer, TASKS, include_path=str(local_tasks))
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())

    right, normed, surprise, size = [], [], 0.0, 0
    for row in QUESTIONS:
        context = tokenizer(f"Q: {row['q']}\nA:")["input_ids"]
        values = [direct(model, context, tokenizer(f" {c}")["input_ids"])[0] for c in row["choices"]]
        right.append(int(np.argmax(values)) == row["gold"])
        normed.append(int(np.argmax([v / len(c) for v, c in zip(values, row["choices"], strict=True)])) == row["gold"])
        surprise -= direct(model, [tokenizer.eos_token_id], tokenizer(row["q"])["input_ids"])[0]
        size += len(row["q"].encode())
    assert got["tiny_choice"]["acc"].value == np.mean(right)
    assert got["tiny_choice"]["acc_norm"].value == np.mean(normed)
    assert got["tiny_choice"]["acc"].stderr == pytest.approx(np.std(right, ddof=1) / 2)
    assert got["tiny_surprise"]["byte_perplexity"].value == pytest.approx(np.exp(surprise / size), rel=1e-4)
    assert got["tiny_speech"]["exact_match"].value == 0.0
    assert got == harness.run(model, tokenizer, TASKS, include_path=str(local_tasks), batch_tokens=30, batch_size=1)


@torch.no_grad()
def greedy_text(model: Any, tokenizer: Any, prompt: str, new: int, until: list[str]) -> str:
    """One token at a time, by whole forwards of the Hugging Face model."""
    ids: list[int] = []
    start = tokenizer(prompt)["input_ids"]
    while len(ids) < new:
        token = int(model.lm(torch.tensor([start + ids])).logits[0, -1].argmax())
        if token in model.stop_ids:
            break
        ids.append(token)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for term in until:
        text = text.split(term)[0]
    return text


@needs_lm_eval
@pytest.mark.parametrize("packing", ["off", "on"])
def test_the_models_answers_to_lm_eval(packing: str, load_tiny: Any, nudge: Any) -> None:
    """As HFLM of lm_eval with the same model; completions also as by a direct computation."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer, model = tuned(load_tiny, nudge)
    theirs = HFLM(pretrained=model.lm, tokenizer=tokenizer, batch_size=2)
    enable_packing(model, packing)
    ours = harness.make_lm(model, tokenizer, 64, 2)

    def requests(kind: str, arguments: list[Any]) -> list[Any]:
        return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]

    texts = [("Q: a\nA:", " yes"), ("Q: a\nA:", " no"), ("", "word"), ("ends in spaces  ", "then"), ("x", "é")]
    a, b = (lm.loglikelihood(requests("loglikelihood", texts)) for lm in (ours, theirs))
    assert [v for v, _ in a] == pytest.approx([v for v, _ in b], rel=1e-4)
    assert [g for _, g in a] == [g for _, g in b]
    long = [("word " * 300,), ("short",)]  # 1500 tokens: three windows
    a, b = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", long)) for lm in (ours, theirs))
    assert a == pytest.approx(b, rel=1e-4)
    asked = [("Q: a\nA:", ["e", "\n\n"], 20), ("hello", ["xy"], 9), ("and now, a longer one", ["e", "\n\n"], 20)]
    free = greedy_text(model, tokenizer, "hello", 24, [])
    asked.append(("hello", [free[4:6]], 24))  # a stop text of two tokens
    settings = [(prompt, {"until": until, "max_gen_toks": new}) for prompt, until, new in asked]
    got = ours.generate_until(requests("generate_until", settings))
    assert got == [greedy_text(model, tokenizer, prompt, new, until) for prompt, until, new in asked]
    assert got[3] == free[: free.index(free[4:6])]
    chat = ours.apply_chat_template([{"role": "user", "content": "hi"}])
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@needs_lm_eval
def test_products_are_in_the_compute_dtype(load_tiny: Any) -> None:
    tokenizer, model = load_tiny(weights_dtype="float32", compute_dtype="bfloat16")
    dtypes = []
    model.inner.model.layers[0].mlp.down_proj.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    lm = harness.make_lm(model, tokenizer, 64, 2)
    lm._model_generate(torch.tensor([[1, 2, 3]]), 5, ["x"], attention_mask=torch.ones(1, 3))
    assert set(dtypes) == {torch.bfloat16}


@needs_lm_eval
def test_the_command(local_tasks: Path, model_folder: Any, tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "c.toml"
    config.write_text(f"[model]\nname = '{model_folder()}'\ncompute_dtype = 'float32'\n")
    options = ["--harness", "tiny_choice, tiny_speech", "--include-path", str(local_tasks), "--limit", "2", "--json"]
    printed = []
    for model in (str(config), str(model_folder())):
        main(["eval", model, *options, "--compute-dtype", "float32"])
        printed.append(capsys.readouterr().out.splitlines())
    assert printed[0] == printed[1]
    found = json.loads(printed[0][-1])
    assert set(found) == {"tiny_choice", "tiny_speech"}
    assert found["tiny_choice"]["acc"]["value"] in (0.0, 0.5, 1.0)  # of two items
    assert any(line.startswith("tiny_choice  acc  ") for line in printed[0])
    main(["eval", str(config), *options, "--chat"])
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])) == set(found)


@needs_lm_eval
def test_what_the_user_can_put_right(local_tasks: Path, load_tiny: Any, tmp_path: Path) -> None:
    tokenizer, model = load_tiny()
    with pytest.raises(SdftError, match=r"harness task 'tiny_choise' is unknown; near it: .*tiny_choice"):
        harness.check(["tiny_choise"], include_path=str(local_tasks))
    with pytest.raises(SdftError, match="'qqqqqqqqqqqqq' is unknown; `lm-eval ls tasks` lists them all"):
        harness.check(["qqqqqqqqqqqqq"], include_path=str(local_tasks))
    with pytest.raises(SdftError, match="harness hellaswag: the data cannot be loaded"):  # no network here
        harness.run(model, tokenizer, ["hellaswag"], include_path=str(local_tasks))
    moved = (local_tasks / "choice.yaml").read_text().replace("data.jsonl", "gone.jsonl")
    (tmp_path / "gone.yaml").write_text(moved)
    with pytest.raises(SdftError, match=r"the data cannot be loaded \(FileNotFoundError: .*gone.jsonl"):
        harness.run(model, tokenizer, [str(tmp_path / "gone.yaml")], include_path=str(local_tasks))
    (tmp_path / "long.yaml").write_text((local_tasks / "speech.yaml").read_text().replace("toks: 12", "toks: 600"))
    with pytest.raises(SdftError, match=r"requested max tokens to generate \(600\)"):
        harness.run(model, tokenizer, [str(tmp_path / "long.yaml")], include_path=str(local_tasks))
    (tmp_path / "code.yaml").write_text((local_tasks / "speech.yaml").read_text() + "unsafe_code: true\n")
    with pytest.raises(SdftError, match="allow it with --allow-code"):
        harness.run(model, tokenizer, [str(tmp_path / "code.yaml")], include_path=str(local_tasks))
    got = harness.run(model, tokenizer, [str(tmp_path / "code.yaml")], include_path=str(local_tasks), allow_code=True)
    assert got["tiny_speech"]["exact_match"].value == 0.0
