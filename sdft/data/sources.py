"""Files of other formats -> records. Nothing is fetched. A broken record is left out and named with the reason."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdft import files
from sdft.data import checks
from sdft.data.records import Record, parse_record
from sdft.errors import SdftError


@dataclass(frozen=True)
class Converted:
    """The records of a file, the group of each record (an API, a question), and `where: why` for each one left out."""

    records: list[Record] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, record: Record, group: str, where: str) -> None:
        """Adds a record, or leaves it out if it is not valid."""
        try:
            check_record(record, where)
        except SdftError as error:
            self.left_out.append(str(error))
            return
        self.records.append(record)
        self.groups.append(group)


def check_record(record: Record, where: str) -> None:
    """Raises SdftError if a record cannot be read, or if its demonstration does not pass its check."""
    example = parse_record(record, where)
    right = checks.prepare(example)
    for shown in example.demonstrations:
        if shown.prompt is None and not right(shown.response):
            raise SdftError(f"{where}: the demonstration {shown.response!r} is not right by check {example.check!r}")


def read_rows(source: Path, left_out: list[str]) -> list[tuple[str, Any]]:
    """(where, object) of a JSON list, or of a JSONL file, whose broken lines are named in `left_out`."""
    text = files.read_text(source)
    if not text.lstrip().startswith("["):
        return [(line.where, line.row) for line in files.read_json_lines(source, broken=left_out)]
    try:
        return [(f"{source}[{i}]", row) for i, row in enumerate(json.loads(text))]
    except ValueError as error:
        raise SdftError(f"{source}: not JSON ({error})") from None


# ToolAlpaca.

TOOL_PROMPT = """You can call these functions of the API {name}:

{documentation}

Request: {request}

Answer with the calls that fulfil the request, each as
Action: <function>
Action Input: <JSON arguments>"""


def read_toolalpaca(source: Path) -> Converted:
    """The requests of a ToolAlpaca file (Tang et al. 2023, arXiv 2306.05301), grouped by API.

    The prompt is the API's documentation and the request; the demonstration is the calls as `Action:` / `Action Input:`
    pairs, checked by `tool_call`. Two kinds of file are read. Evaluation files have `Instructions` and `Golden_Answers`
    (tested with the real eval_simulated.json). Training files have `Instances` of `input` and `intermediate_steps`
    (written after ToolAlpaca's README and its build_dataset.py; no real file was at hand). In a training instance, the
    hint after the request is removed, and so are the steps of `getDetails`, which asks the user a question.
    """
    try:
        apis = json.loads(files.read_text(source))
    except ValueError as error:
        raise SdftError(f"{source}: not JSON ({error})") from None
    if not isinstance(apis, list) or not all(isinstance(api, dict) for api in apis):
        raise SdftError(f"{source}: a ToolAlpaca file is a JSON list of APIs")
    found = Converted()
    for number, api in enumerate(apis):
        where = f"{source}[{number}]"
        try:
            training = "Instances" in api and "Golden_Answers" not in api
            requests = list((_instances if training else _golden_answers)(api, where))
        except SdftError as error:
            found.left_out.append(str(error))
            continue
        for place, request, calls in requests:
            if not _are_calls(calls):
                found.left_out.append(f"{place} must be a list of {{'Action', 'Action_Input'}} objects")
                continue
            if not isinstance(request, str) or not request.strip():
                found.left_out.append(f"{place}: its request is not a text but {request!r}")
                continue
            record = {
                "prompt": TOOL_PROMPT.format(name=api["Name"], documentation=api["NLDocumentation"], request=request),
                "demonstration": "\n".join(f"Action: {c['Action']}\nAction Input: {c['Action_Input']}" for c in calls),
                "check": "tool_call",
            }
            found.add(record, str(api["Name"]), place)
    if not found.records and not found.left_out:
        raise SdftError(f"{source}: no requests with golden answers in it")
    return found


Request = tuple[str, Any, Any]  # where, the request, its calls


def _golden_answers(api: Record, where: str) -> Iterator[Request]:
    _need(api, ("Name", "NLDocumentation", "Instructions", "Golden_Answers"), where)
    requests, golden = api["Instructions"], api["Golden_Answers"]
    if not isinstance(requests, list) or not isinstance(golden, list):
        raise SdftError(f"{where}: 'Instructions' and 'Golden_Answers' must be lists")
    if len(requests) != len(golden):
        raise SdftError(f"{where}: {len(requests)} instructions but {len(golden)} golden answers")
    for i, (request, calls) in enumerate(zip(requests, golden, strict=True)):
        yield f"{where}: golden answer {i}", request, calls


def _instances(api: Record, where: str) -> Iterator[Request]:
    _need(api, ("Name", "NLDocumentation", "Instances"), where)
    if not isinstance(api["Instances"], list):
        raise SdftError(f"{where}: 'Instances' must be a list")
    for i, instance in enumerate(api["Instances"]):
        try:
            request = instance["input"].rsplit("\nHint: ", 1)[0]
            steps = [(action, arguments) for (action, arguments, _), _ in instance["intermediate_steps"]]
            calls = [{"Action": a, "Action_Input": b} for a, b in steps if a != "getDetails"]
        except (KeyError, ValueError, TypeError, AttributeError):
            request, calls = None, []  # the caller leaves it out and names its place
        yield f"{where}: the steps of instance {i}", request, calls


def _need(api: Record, keys: tuple[str, ...], where: str) -> None:
    missing = [key for key in keys if api.get(key) in (None, "")]
    if missing:
        raise SdftError(f"{where}: {missing[0]!r} is missing; is this a ToolAlpaca file?")


def _are_calls(calls: Any) -> bool:
    return bool(calls) and isinstance(calls, list) and all(
        isinstance(c, dict) and all(isinstance(c.get(key), str) for key in ("Action", "Action_Input")) for c in calls
    )  # fmt: skip


def has_placeholder(record: Record) -> bool:
    """Whether a call is no JSON, or needs the result of an earlier call, as in {"id": ${id from search}}."""
    # Braces around bare words; in a JSON object, a quote or nothing follows a brace.
    return any(
        isinstance(arguments, str) or re.search(r"\{\s*[A-Za-z][^\"{}]*\}", json.dumps(arguments))
        for _, arguments in checks.parse_tool_calls(record["demonstration"])
    )


# SciKnowEval.

CHOICE_PROMPT = """{question}

{options}

Answer with the letter of the right choice."""


def read_sciknoweval(source: Path, domain: str = "", level: str = "") -> Converted:
    """The multiple-choice questions of a SciKnowEval file (Feng et al. 2024, arXiv 2406.09098), grouped by question.

    The file is JSON or JSONL with the fields of SciKnowEval's README and repository: `question`, `choices` (`text` and
    `label`, two lists), `answerKey`, `type`, `domain`, `details` (`level`, `task`, `subtask`). The first three fields
    are enough. A field `demonstration` may hold a worked answer; without it, the demonstration is the letter and the
    text of the right choice. `domain` ("Chemistry") and `level` ("L3") select questions.
    """
    found, there = Converted(), set()
    for where, row in read_rows(source, found.left_out):
        if not isinstance(row, dict):
            found.left_out.append(f"{where}: not a JSON object")
            continue
        details = row.get("details")
        of_level = details.get("level") if isinstance(details, dict) else None
        there.add(f"{row.get('domain')} {of_level}")
        if (domain and row.get("domain") != domain) or (level and of_level != level):
            continue
        try:
            record = _choice_record(row, where)
        except SdftError as error:
            found.left_out.append(str(error))
            continue
        found.add(record, " ".join(row["question"].split()).casefold(), where)
    if not found.records and not found.left_out:
        raise SdftError(
            f"{source}: no questions of domain {domain or 'any'} and level {level or 'any'} in it; there are: "
            f"{', '.join(sorted(there)) or 'none at all'}"
        )
    return found


def _choice_record(row: Record, where: str) -> Record:
    question, choices, key = row.get("question"), row.get("choices"), row.get("answerKey")
    if not choices or not key:
        raise SdftError(f"{where}: type {row.get('type')!r} without choices and answerKey is no multiple choice")
    texts, labels = (choices.get(k) if isinstance(choices, dict) else None for k in ("text", "label"))
    if not (isinstance(question, str) and question.strip() and isinstance(texts, list) and isinstance(labels, list)):
        raise SdftError(f"{where}: needs a 'question' and 'choices' with the lists 'text' and 'label'")
    if len(texts) != len(labels) or len(set(map(str, labels))) != len(labels):
        raise SdftError(f"{where}: {len(texts)} choices with the labels {', '.join(map(str, labels))}")
    options = checks.options_of({"choices": dict(zip(map(str, labels), texts, strict=True))}, where) or {}
    if key not in options:
        raise SdftError(f"{where}: answerKey {key!r} is none of {', '.join(options)}")
    return {
        "prompt": CHOICE_PROMPT.format(
            question=question.strip(), options="\n".join(f"{letter}. {text}" for letter, text in options.items())
        ),
        "demonstration": row.get("demonstration") or f"The answer is {key}. {options[key]}",
        "answer": key,
        "choices": options,
        "check": "choice",
    }


# Articles with questions.


def read_knowledge(source: Path) -> dict[str, Converted]:
    """Articles and questions about them -> `train`, `strict`, `lenient` and `ood` records, grouped by article.

    A line of the file is one article:

        {"title": "...", "article": "...", "questions": [{"question": "...", "answer": "Lumar",
         "facts": ["Lumar", "1912"], "response": "It moved to Lumar in 1912.", "rephrased": ["..."]}]}

    - `answer`: the main fact, a string or a list of ways to write it. `lenient`: one of them must be in the answer.
    - `facts` (optional): all facts of a full answer; default: the first `answer`. `strict`: all must be in the answer.
    - `response` (optional): a full answer, the demonstration together with the article; default: the first `answer`.
    - `rephrased` (optional): the question in other words, or other questions with the same answer. `ood`: these
      questions, checked as in `lenient`.
    """
    kinds = {name: Converted() for name in ("train", "strict", "lenient", "ood")}
    left_out = kinds["train"].left_out
    others: list[tuple[str, str, Record]] = []  # where, article, a rephrased question as a record
    for where, row in read_rows(source, left_out):
        if not isinstance(row, dict):
            left_out.append(f"{where}: not a JSON object")
        elif not all(isinstance(row.get(k), str) and row[k].strip() for k in ("title", "article")):
            left_out.append(f"{where}: needs a 'title' and an 'article'")
        elif not isinstance(row.get("questions"), list) or not row["questions"]:
            left_out.append(f"{where}: needs a list of 'questions'")
        else:
            for i, question in enumerate(row["questions"]):
                place = f"{where}: question {i}"
                try:
                    made = _question_records(question, row, place)
                except SdftError as error:
                    left_out.append(str(error))
                    continue
                for name, record in made.items():
                    kinds[name].add(record, row["title"], place)
                reworded = question.get("rephrased") or []
                others += [(place, row["title"], {**made["lenient"], "prompt": other}) for other in reworded]
    trained = {record["prompt"] for record in kinds["train"].records}
    for place, title, record in others:
        if record["prompt"] in trained:
            left_out.append(f"{place}: 'rephrased' repeats the trained question {record['prompt']!r}")
        else:
            kinds["ood"].add(record, title, place)
    left_out += kinds["ood"].left_out
    if not kinds["train"].records and not left_out:
        raise SdftError(f"{source}: no articles in it")
    return kinds


def _question_records(question: Any, row: Record, where: str) -> dict[str, Record]:
    """The train, strict and lenient record of a question. Raises SdftError for a bad question or a wrong response."""
    if not isinstance(question, dict) or not question.get("question") or not question.get("answer"):
        raise SdftError(f"{where}: needs a 'question' and an 'answer'")
    prompt, answers = question["question"], question["answer"]
    answers = answers if isinstance(answers, list) else [answers]
    response = question.get("response") or answers[0]
    strict = {"prompt": prompt, "answer": question.get("facts") or answers[:1], "check": "contains_all"}
    lenient = {"prompt": prompt, "answer": answers, "check": "contains"}
    for record in (strict, lenient):
        check_record({**record, "demonstration": response}, where)
    article = {"prompt": f"Read this article: {row['title']}", "response": row["article"]}
    return {"train": {**lenient, "demonstration": [article, response]}, "strict": strict, "lenient": lenient}
