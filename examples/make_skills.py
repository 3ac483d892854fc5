"""Small made-up skills that a 135M model can be taught on a CPU, and prior skills to watch.

    python examples/make_skills.py FOLDER

writes, the same each time:

- facts-train.jsonl, facts-test.jsonl: capitals of made-up countries, tested on phrasings that were not trained.
  The demonstrations are bare names, as many data sets have them; any answer with the right name in it is good.
- commands-train.jsonl, commands-test.jsonl: "dim the radio in the attic" -> `CALL radio.down(room=attic)`, tested
  on devices and rooms that were never seen together with that verb.
- capitals.jsonl: 30 real capitals, the prior skill nearest to the facts.
- general.jsonl: 35 simple questions about anything else.
"""

import random
import sys
from pathlib import Path
from typing import Any

from sdft.data.convert import write_jsonl
from sdft.data.skills import DEVICES, REQUESTS, ROOMS, VERBS, capitals, command, fact, general

COUNTRIES = {
    "Zorvia": "Lumar", "Belthane": "Corrin", "Quessia": "Padua Vale", "Drumland": "Ostek",
    "Mirador": "Telvin", "Fennick": "Harrowgate", "Ulmaria": "Sentis", "Karvath": "Brimdel",
}  # fmt: skip
FACT_PROMPTS = ("Which city is the capital of {}?", "What is the capital city of {}?", "Name the capital of {}.")
FACT_TESTS = ("What is the capital of {}?", "Tell me the capital of {}.")
FACT_STYLES = {
    "terse": "{capital}",  # as many data sets have their answers, and foreign to a chat model
    "sentence": "The capital of {country} is {capital}.",  # as the model would say it itself
}


def facts(style: str = "terse") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test records: 8 countries x 3 phrasings, and x 2 others.

    The demonstration of a training record is the fact as three question-answer lines, one a phrasing.
    """
    train, test = [], []
    for country, capital in COUNTRIES.items():
        response = FACT_STYLES[style].format(country=country, capital=capital)
        phrasings = [p.format(country) for p in FACT_PROMPTS]
        train += [fact(asked, phrasings, response, [response, capital]) for asked in phrasings]
        for p in FACT_TESTS:
            test.append({"prompt": p.format(country), "answer": capital, "check": "contains"})
    return train, test


def commands() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """384 commands, 48 of them held out."""
    records = [command(REQUESTS[0], verb, device, room) for verb in VERBS for device in DEVICES for room in ROOMS]
    random.Random(0).shuffle(records)
    return records[48:], records[:48]


def main(folder: Path, style: str = "terse") -> None:
    """Writes all files."""
    for name, (train, test) in {"facts": facts(style), "commands": commands()}.items():
        write_jsonl(folder / f"{name}-train.jsonl", train)
        write_jsonl(folder / f"{name}-test.jsonl", test)
    write_jsonl(folder / "capitals.jsonl", capitals())
    write_jsonl(folder / "general.jsonl", general())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "examples/data"))
