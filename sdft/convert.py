"""Other formats -> sdft records."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdft import SdftError

TOOL_PROMPT = """You can call these functions of the API {name}:

{documentation}

Request: {request}

Answer with the calls that fulfil the request, each as
Action: <function>
Action Input: <JSON arguments>"""


def toolalpaca(source: Path, target: Path) -> int:
    """Converts a ToolAlpaca file (Tang et al. 2023) to JSONL; returns the number of records.

    One record for each request: the API's documentation and the request as prompt, the golden calls as
    demonstration, checked by `tool_call`. Raises SdftError for a file of another form, and where an API's requests
    and golden answers do not pair up.
    """
    try:
        apis = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise SdftError(f"{source}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise SdftError(f"{source}: not JSON ({error})") from None
    if not isinstance(apis, list) or not all(isinstance(api, dict) for api in apis):
        raise SdftError(f"{source}: a ToolAlpaca file is a JSON list of APIs")
    records = [record for number, api in enumerate(apis) for record in _toolalpaca_records(api, f"{source}[{number}]")]
    if not records:
        raise SdftError(f"{source}: no requests with golden answers in it")
    write_jsonl(target, records)
    return len(records)


def _toolalpaca_records(api: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    missing = [key for key in ("Name", "NLDocumentation", "Instructions", "Golden_Answers") if key not in api]
    if missing:
        raise SdftError(f"{where}: {missing[0]!r} is missing; is this a ToolAlpaca evaluation file?")
    requests, golden = api["Instructions"], api["Golden_Answers"]
    if not isinstance(requests, list) or not isinstance(golden, list):
        raise SdftError(f"{where}: 'Instructions' and 'Golden_Answers' must be lists")
    if len(requests) != len(golden):
        raise SdftError(f"{where}: {len(requests)} instructions but {len(golden)} golden answers")
    for number, (request, calls) in enumerate(zip(requests, golden, strict=True)):
        whole = isinstance(calls, list) and all(
            isinstance(c, dict) and {"Action", "Action_Input"} <= c.keys() for c in calls
        )
        if not calls or not whole:
            raise SdftError(f"{where}: golden answer {number} must be a list of {{'Action', 'Action_Input'}} objects")
        yield {
            "prompt": TOOL_PROMPT.format(name=api["Name"], documentation=api["NLDocumentation"], request=request),
            "demonstration": "\n".join(f"Action: {c['Action']}\nAction Input: {c['Action_Input']}" for c in calls),
            "check": "tool_call",
        }


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes records one a line; raises SdftError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    except OSError as error:
        raise SdftError(f"{path}: cannot be written ({error.strerror})") from None
