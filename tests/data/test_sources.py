"""ToolAlpaca files to records."""

import json
from pathlib import Path
from typing import Any

import pytest

from sdft.data.checks import check_tool_call, parse_tool_calls
from sdft.data.formats import load_records, write_jsonl
from sdft.data.sources import read_toolalpaca
from sdft.errors import SdftError

REAL = Path(__file__).resolve().parents[3] / "shared/data/toolalpaca/eval_simulated.json"


def api(**changes: Any) -> dict[str, Any]:
    """One API as ToolAlpaca has it, with two requests."""
    return {
        "Name": "Weather {v1}",
        "Description": "not used",
        "NLDocumentation": 'now: Weather now.\nParameters: {"city": "string"}',
        "Instructions": ["Is it raining in Bern?", "Bern, then Thun?"],
        "Golden_Answers": [
            [{"Action": "now", "Action_Input": '{"city": "Bern"}'}],
            [
                {"Action": "now", "Action_Input": '{"city": "Bern"}'},
                {"Action": "now", "Action_Input": '{"city": "Thun"}'},
            ],
        ],
    } | changes


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "apis.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_each_request_becomes_a_record(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.jsonl"
    found = read_toolalpaca(write(tmp_path, [api(), api(Name="Other")]))
    rows = found.records
    assert (len(rows), found.left_out) == (4, [])
    write_jsonl(target, rows)
    assert rows[0] == {
        "prompt": "You can call these functions of the API Weather {v1}:\n\nnow: Weather now.\nParameters: "
        '{"city": "string"}\n\nRequest: Is it raining in Bern?\n\nAnswer with the calls that fulfil the request, '
        "each as\nAction: <function>\nAction Input: <JSON arguments>",
        "demonstration": 'Action: now\nAction Input: {"city": "Bern"}',
        "check": "tool_call",
    }
    assert rows[1]["demonstration"].count("Action: now") == 2
    assert "API Other:" in rows[2]["prompt"]
    examples = load_records(str(target))
    assert [e.check for e in examples] == ["tool_call"] * 4
    assert parse_tool_calls(examples[1].answers[0]) == [("now", {"city": "Bern"}), ("now", {"city": "Thun"})]


GOLDEN = [[{"Action": "now", "Action_Input": "{}"}]] * 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "apis.json: not JSON ("),
        ({"Name": "x"}, "apis.json: a ToolAlpaca file is a JSON list of APIs"),
        ([3], "apis.json: a ToolAlpaca file is a JSON list of APIs"),
        ([], "apis.json: no requests with golden answers in it"),
        ([api(Instructions=[], Golden_Answers=[])], "apis.json: no requests"),
        ([{k: v for k, v in api().items() if k != "NLDocumentation"}], "apis.json[0]: 'NLDocumentation' is missing"),
        ([api(), api(Golden_Answers=GOLDEN[:1])], "apis.json[1]: 2 instructions but 1 golden answers"),
        ([api(Golden_Answers=[[], []])], "apis.json[0]: golden answer 0"),
        ([api(Golden_Answers=[[{"Action": "now"}]] * 2)], "apis.json[0]: golden answer 0"),
        ([api(Golden_Answers=["now", "now"])], "apis.json[0]: golden answer 0"),
        ([api(Instructions=3)], "apis.json[0]: 'Instructions'"),
    ],
)
def test_files_of_another_form(tmp_path: Path, content: Any, words: str) -> None:
    """Raised, or named among what is left out."""
    source = write(tmp_path, content)
    try:
        named = " ".join(read_toolalpaca(source).left_out)
    except SdftError as error:
        named = str(error)
    assert words in named


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(SdftError, match=r"none\.json: cannot be read \(No such file"):
        read_toolalpaca(tmp_path / "none.json")
    (tmp_path / "file").touch()
    with pytest.raises(SdftError, match=r"out\.jsonl: cannot be written \("):
        write_jsonl(tmp_path / "file" / "out.jsonl", [])


def test_the_real_file(tmp_path: Path) -> None:
    if not REAL.exists():
        pytest.skip(f"{REAL} is not here: the real ToolAlpaca file is not converted in this run")
    target = tmp_path / "out.jsonl"
    write_jsonl(target, read_toolalpaca(REAL).records)
    examples = load_records(str(target))
    assert len(examples) == 100
    golden = [calls for api in json.loads(REAL.read_text()) for calls in api["Golden_Answers"]]
    for example, calls in zip(examples, golden, strict=True):
        assert [name for name, _ in parse_tool_calls(example.answers[0])] == [c["Action"].strip() for c in calls]
        assert check_tool_call(example.answers[0], example.answers[0])
