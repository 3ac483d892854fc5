"""Tasks made of a user's files: what is read, what is held out, what is left out; and the commands of docs/tasks.md."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdft import cli
from sdft.data import sources, tasks
from sdft.data.checks import prepare
from sdft.data.formats import load_records
from sdft.errors import SdftError
from sdft.evaluation.accuracy import check_evaluable

ROOT = Path(__file__).parents[2]
REAL = Path(__file__).resolve().parents[3] / "shared/data/toolalpaca/eval_simulated.json"


def api(name: str, requests: int = 5) -> dict[str, Any]:
    """An API of an evaluation file."""
    return {
        "Name": name,
        "NLDocumentation": f"get: from {name}.\nParameters: {{}}",
        "Instructions": [f"{name} {i}?" for i in range(requests)],
        "Golden_Answers": [[{"Action": "get", "Action_Input": json.dumps({"n": i})}] for i in range(requests)],
    }


def step(action: str, arguments: str) -> list[Any]:
    return [[action, arguments, f"\nThought: so\nAction: {action}\nAction Input: {arguments}"], "done"]


TRAINING = {
    "Name": "Trains",
    "NLDocumentation": "find: a train.",
    "Instructions": ["not used"],
    "Instances": [
        {
            "input": "To Bern?\nHint: ask",
            "output": "yes",
            "intermediate_steps": [step("getDetails", "{}"), step("find", '{"to": "Bern"}')],
        },
        {"input": "To Thun?", "output": "no", "intermediate_steps": []},
        {"input": "To Chur?", "intermediate_steps": [["broken"]]},
        {"output": "no input", "intermediate_steps": [step("find", "{}")]},
    ],
}


def question(number: int, **changes: Any) -> dict[str, Any]:
    """A question as SciKnowEval has it."""
    return {
        "prompt": {"default": "not used"},
        "question": f"What boils at {number} K?\n",
        "choices": {"text": [f"w{number}", "x", "y", "z"], "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[number % 4],
        "type": "mcq-4-choices",
        "domain": "Chemistry" if number % 2 else "Biology",
        "details": {"level": "L3" if number % 3 else "L1", "task": "t", "subtask": "s"},
        "answer": "",
    } | changes


ARTICLE = {
    "title": "The move",
    "article": "In 1912 the court moved to Lumar.",
    "questions": [
        {
            "question": "Where did the court move?",
            "answer": ["Lumar", "the city of Lumar"],
            "facts": ["Lumar", "1912"],
            "response": "It moved to Lumar in 1912.",
            "rephrased": ["Which city got the court?"],
        },
        {"question": "When?", "answer": "1912"},
    ],
}


def save(path: Path, content: Any, lines: bool = False) -> Path:
    path.write_text("".join(json.dumps(c) + "\n" for c in content) if lines else json.dumps(content))
    return path


# ToolAlpaca.


def test_toolalpaca_holds_out_apis_and_requests(tmp_path: Path) -> None:
    source = save(tmp_path / "apis.json", [api(f"api{i}") for i in range(10)])
    task = tasks.toolalpaca(source, held_out=0.3)
    assert {name: len(records) for name, records in task.files.items()} == {
        "train": 28, "seen": 7, "new": 15, "placeholders": 0
    }  # fmt: skip
    apis = {name: {re.findall(r"from (api\d)", r["prompt"])[0] for r in task.files[name]} for name in task.files}
    assert len(apis["new"]) == 3
    assert not apis["new"] & apis["train"]
    assert apis["seen"] == apis["train"]
    assert task == tasks.toolalpaca(source, held_out=0.3)
    assert task != tasks.toolalpaca(source, held_out=0.3, seed=1)
    assert len(tasks.toolalpaca(source, held_out=0).files["train"]) == 50
    assert len(tasks.toolalpaca(source, held_out=1).files["new"]) == 50
    with pytest.raises(SdftError, match=r"held_out = 1\.5 must be from 0"):
        tasks.toolalpaca(source, held_out=1.5)


def test_toolalpaca_training_instances(tmp_path: Path) -> None:
    task = tasks.toolalpaca(save(tmp_path / "train.json", [TRAINING]), held_out=0)
    assert [(r["demonstration"], r["prompt"].split("Request: ")[1].split("\n")[0]) for r in task.files["train"]] == [
        ('Action: find\nAction Input: {"to": "Bern"}', "To Bern?")
    ]
    assert [line.removeprefix(str(tmp_path)) for line in task.left_out] == [
        f"/train.json[0]: the steps of instance {i} must be a list of {{'Action', 'Action_Input'}} objects"
        for i in (1, 2, 3)
    ]


def test_toolalpaca_names_what_is_broken_and_keeps_placeholders_apart(tmp_path: Path) -> None:
    broken = api("broken", 4)
    broken["Golden_Answers"][1] = "get"
    broken["Instructions"].append(7)
    broken["Golden_Answers"].append(broken["Golden_Answers"][0])
    broken["Golden_Answers"][2] = [{"Action": "get", "Action_Input": '{"id": ${id from find}}'}]
    broken["Golden_Answers"][3] = [{"Action": "get", "Action_Input": '{"day": "{start date}", "empty": {}}'}]
    source = save(tmp_path / "apis.json", [api("good"), broken, {"Name": "bare"}, api("x") | {"Instructions": ["one"]}])
    task = tasks.toolalpaca(source, held_out=0)
    assert [len(task.files[name]) for name in ("train", "placeholders")] == [6, 2]
    assert [line.removeprefix(str(tmp_path)) for line in task.left_out] == [
        "/apis.json[1]: golden answer 1 must be a list of {'Action', 'Action_Input'} objects",
        "/apis.json[1]: golden answer 4: its request is not a text but 7",
        "/apis.json[2]: 'NLDocumentation' is missing; is this a ToolAlpaca file?",
        "/apis.json[3]: 1 instructions but 5 golden answers",
    ]
    lines = tasks.write(task, tmp_path / "out")
    assert lines[2:4] == [
        "2 requests with placeholders in their calls are kept apart: no model can fill them",
        f"4 broken records left out, all named in {tmp_path}/out/left-out.txt:",
    ]
    assert (tmp_path / "out/left-out.txt").read_text().splitlines() == list(task.left_out)


def test_toolalpaca_of_the_real_file(tmp_path: Path) -> None:
    if not REAL.exists():
        pytest.skip(f"{REAL} is not here: the real ToolAlpaca file is not read in this run")
    task = tasks.toolalpaca(REAL)
    counts = {name: len(records) for name, records in task.files.items()}
    assert counts.pop("placeholders") == 31
    assert sum(counts.values()) == 69
    assert min(counts.values()) > 0
    assert not task.left_out
    tasks.write(task, tmp_path)
    for name in counts:
        examples = load_records(str(tmp_path / f"{name}.jsonl"))
        check_evaluable(examples)
        assert all(prepare(e)(e.demonstrations[0].response + "\n\nThat is all.") for e in examples)


# SciKnowEval.


@pytest.mark.parametrize("lines", [True, False])
def test_sciknoweval(tmp_path: Path, lines: bool) -> None:
    source = save(tmp_path / "sci.json", [question(i) for i in range(40)], lines)
    task = tasks.sciknoweval(source)
    assert (len(task.files["train"]), len(task.files["eval"]), task.left_out) == (36, 4, ())
    record = next(r for r in task.files["train"] if "at 2 K" in r["prompt"])
    assert record == {
        "prompt": "What boils at 2 K?\n\nA. w2\nB. x\nC. y\nD. z\n\nAnswer with the letter of the right choice.",
        "demonstration": "The answer is C. y",
        "answer": "C",
        "choices": {"A": "w2", "B": "x", "C": "y", "D": "z"},
        "check": "choice",
    }
    assert not {r["prompt"] for r in task.files["train"]} & {r["prompt"] for r in task.files["eval"]}
    some = tasks.sciknoweval(source, domain="Chemistry", level="L3", held_out=0).files["train"]
    assert len(some) == sum(i % 2 == 1 and i % 3 > 0 for i in range(40))
    with pytest.raises(SdftError, match=r"of domain Physics and level any in it; there are: .*Chemistry L3"):
        tasks.sciknoweval(source, domain="Physics")


def test_sciknoweval_names_what_it_leaves_out(tmp_path: Path) -> None:
    labels = {"text": ["x", "y"], "label": ["A", "A"]}
    rows = [
        question(1),
        question(2, demonstration="Boiling needs heat. The answer is C."),
        question(3, demonstration="The answer is A."),
        question(4, choices=labels),
        question(5, answerKey="E"),
        question(6, type="true_or_false", choices={}, answerKey="", answer="True"),
        question(7, question=""),
        question(8, choices=["x", "y"]),
        [1],
    ]
    source = save(tmp_path / "sci.jsonl", rows, lines=True)
    source.write_text(source.read_text() + "\n{broken\n")
    task = tasks.sciknoweval(source, held_out=0)
    assert [r["demonstration"][:6] for r in task.files["train"]] == ["The an", "Boilin"]
    assert [line.removeprefix(f"{source}:").split(" (")[0] for line in task.left_out] == [
        "9: a line must be a JSON object, not list",
        "10: empty line; remove it",
        "11: not a JSON object on one line",
        "3: the demonstration 'The answer is A.' is not right by check 'choice'",
        "4: 2 choices with the labels A, A",
        "5: answerKey 'E' is none of A, B, C, D",
        "6: type 'true_or_false' without choices and answerKey is no multiple choice",
        "7: needs a 'question' and 'choices' with the lists 'text' and 'label'",
        "8: needs a 'question' and 'choices' with the lists 'text' and 'label'",
    ]


@given(st.lists(st.integers(0, 12), min_size=2, max_size=30), st.floats(0, 1), st.integers())
def test_no_question_on_both_sides(numbers: list[int], share: float, seed: int) -> None:
    found = sources.Converted()
    for n in numbers:
        found.add({"prompt": f"q{n}", "answer": "a"}, f"q{n}", "f:1")
    files = tasks._split(found, share, str(seed))
    sides = [{r["prompt"] for r in files[name]} for name in ("train", "eval")]
    assert not sides[0] & sides[1]
    assert len(files["train"]) + len(files["eval"]) == len(numbers)
    if 0 < share < 1 and len(set(numbers)) > 1:
        assert all(sides)


# Articles.


def test_knowledge(tmp_path: Path) -> None:
    task = tasks.knowledge(save(tmp_path / "articles.jsonl", [ARTICLE], lines=True))
    assert {name: len(records) for name, records in task.files.items()} == {
        "train": 2, "strict": 2, "lenient": 2, "ood": 1
    }  # fmt: skip
    assert task.files["train"][0] == {
        "prompt": "Where did the court move?",
        "answer": ["Lumar", "the city of Lumar"],
        "check": "contains",
        "demonstration": [
            {"prompt": "Read this article: The move", "response": "In 1912 the court moved to Lumar."},
            "It moved to Lumar in 1912.",
        ],
    }
    tasks.write(task, tmp_path)
    checks = {n: prepare(load_records(str(tmp_path / f"{n}.jsonl"))[0]) for n in ("strict", "lenient", "ood")}
    assert [right("To Lumar.") for right in checks.values()] == [False, True, True]
    assert [right("In 1912, to Lumar.") for right in checks.values()] == [True] * 3
    assert not any(right("To Ostek in 1911.") for right in checks.values())
    assert task.files["ood"][0]["prompt"] == "Which city got the court?"


def test_knowledge_names_what_it_leaves_out(tmp_path: Path) -> None:
    questions = [
        {"question": "Q1?", "answer": "a"},
        {"question": "Q2?"},
        {"question": "Q3?", "answer": "b", "response": "c"},
        {"question": "Q4?", "answer": "b", "response": "b", "facts": ["b", "c"]},
        {"question": "Q5?", "answer": "e", "rephrased": ["Q1?", "Q6?", 3]},
    ]
    rows: list[Any] = [{"title": "T", "article": "A", "questions": questions}, {"title": "T"}]
    rows += [{"title": "T", "article": "A"}, {"title": " ", "article": "A", "questions": questions}, "text"]
    task = tasks.knowledge(source := save(tmp_path / "articles.jsonl", rows, lines=True))
    assert [r["prompt"] for r in task.files["train"]] == ["Q1?", "Q5?"]
    assert [r["prompt"] for r in task.files["ood"]] == ["Q6?"]
    assert [line.removeprefix(f"{source}:") for line in task.left_out] == [
        "5: a line must be a JSON object, not str",
        "1: question 1: needs a 'question' and an 'answer'",
        "1: question 2: the demonstration 'c' is not right by check 'contains_all'",
        "1: question 3: the demonstration 'b' is not right by check 'contains_all'",
        "2: needs a 'title' and an 'article'",
        "3: needs a list of 'questions'",
        "4: needs a 'title' and an 'article'",
        "1: question 4: 'rephrased' repeats the trained question 'Q1?'",
        "1: question 4: 'prompt' must be a non-empty string, not 3",
    ]


# The command.


def test_nothing_that_was_there_is_written_over(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    cli.main(["data", "facts", str(folder)])
    cli.main(["data", "facts", str(folder)])
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(SdftError, match=r"train\.jsonl exists with other content"):
        tasks.write(tasks.made_up("facts", seed=1), folder)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_a_file_with_nothing_valid_in_it(tmp_path: Path) -> None:
    task = tasks.knowledge(save(tmp_path / "articles.jsonl", [{"title": "T"}], lines=True))
    with pytest.raises(SdftError, match=r"no valid record is left; .*articles\.jsonl:1: needs a 'title'"):
        tasks.write(task, tmp_path / "out")
    for loader, words in ((tasks.knowledge, "no articles in it"), (tasks.sciknoweval, "no questions of domain")):
        with pytest.raises(SdftError, match=words):
            loader(save(tmp_path / "empty.jsonl", [], lines=True))  # type: ignore[operator]
        with pytest.raises(SdftError, match=r"none\.jsonl: cannot be read \(No such file"):
            loader(tmp_path / "none.jsonl")  # type: ignore[operator]


def test_help_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["data"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.DATA_ARGS)
    with pytest.raises(SystemExit):
        cli.main(["data", "fact", "out"])
    assert "unknown task 'fact'; did you mean 'facts'?" in capsys.readouterr().err


# docs/tasks.md.

DOCS = (ROOT / "docs/tasks.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)


def test_every_command_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Any) -> None:
    """Unchanged, but on a tiny model and few records."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/demo-sdft.toml").write_text((ROOT / "examples/demo-sdft.toml").read_text())
    save(Path("eval_simulated.json"), [api(f"api{i}") for i in range(4)])
    save(Path("train_data.json"), [TRAINING])
    save(Path("sciknoweval.jsonl"), [question(i) for i in range(60)], lines=True)
    Path("articles.jsonl").write_text(" ".join(blocks("json")[0].split()) + "\n")
    for block in blocks("python"):
        Path("checks.py").write_text(block)
    Path("units.jsonl").write_text("".join(line + "\n" for line in blocks("jsonl")[0].splitlines()))
    tiny = str(model_folder("llama"))
    ran = set()
    for line in "".join(blocks("bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line.split("  #")[0])
        if not words:
            continue
        assert words.pop(0) == "sdft", line
        words = [tiny if w == "smollm2-135m" else w for w in words]
        if words[0] == "check":
            words += ["--model.name", tiny, "--count", "2", "--eval.max-new-tokens", "2"]
            with pytest.raises(SystemExit) as exit_:
                cli.main(words)
            assert exit_.value.code == 1  # the tiny model cannot use a demonstration
        else:
            cli.main(words + (["--max-new-tokens", "2"] if words[0] == "eval" else []))
        ran.add((words[0], words[1] if words[0] == "data" else ""))
    assert {name for command, name in ran if command == "data"} == set(cli.DATA_ARGS)
    assert {"check", "eval"} <= {command for command, _ in ran}


def test_the_docs_name_every_check() -> None:
    from sdft.data.checks import CHECKS

    assert all(f"`{name}`" in DOCS for name in CHECKS)
