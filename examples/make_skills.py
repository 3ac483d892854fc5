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

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
    "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon",
    "Austria": "Vienna", "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Ireland": "Dublin", "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana",
    "Peru": "Lima", "Argentina": "Buenos Aires", "Chile": "Santiago", "India": "New Delhi", "Thailand": "Bangkok",
    "Turkey": "Ankara", "Kenya": "Nairobi", "Hungary": "Budapest", "Iraq": "Baghdad", "Belgium": "Brussels",
}  # fmt: skip

GENERAL = {
    "What color is the sky on a clear day?": ["blue"], "What color is grass?": ["green"],
    "What color is a banana?": ["yellow"], "What color is snow?": ["white"], "What color is blood?": ["red"],
    "What is the opposite of hot?": ["cold", "cool"], "What is the opposite of up?": ["down"],
    "What is the opposite of big?": ["small", "little", "tiny"], "What is the opposite of day?": ["night"],
    "What is the opposite of fast?": ["slow"], "What is 2 + 2?": ["4", "four"], "What is 3 + 5?": ["8", "eight"],
    "What is 10 - 4?": ["6", "six"], "What is 5 + 5?": ["10", "ten"], "What is 3 times 3?": ["9", "nine"],
    "How many days are in a week?": ["7", "seven"], "How many months are in a year?": ["12", "twelve"],
    "How many legs does a spider have?": ["8", "eight"], "How many hours are in a day?": ["24"],
    "How many minutes are in an hour?": ["60", "sixty"], "Which planet is closest to the Sun?": ["Mercury"],
    "Who wrote Romeo and Juliet?": ["Shakespeare"], "What is the largest ocean on Earth?": ["Pacific"],
    "What gas do plants absorb from the air?": ["carbon dioxide", "CO2"],
    "What is the chemical formula of water?": ["H2O", "H₂O"],
    "What is the largest planet in the solar system?": ["Jupiter"],
    "What language is spoken in Brazil?": ["Portuguese"], "What is the frozen form of water called?": ["ice"],
    "What animal says meow?": ["cat"], "Who was the first president of the United States?": ["Washington"],
    "What is the past tense of go?": ["went"], "On which continent is Egypt?": ["Africa"],
    "What is the currency of Japan?": ["yen"], "Which organ pumps blood through the body?": ["heart"],
    "What is the tallest mountain in the world?": ["Everest"],
}  # fmt: skip

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

DEVICES = ("radio", "lamp", "heater", "fan", "tv", "blinds", "camera", "speaker")
ROOMS = ("attic", "kitchen", "bedroom", "garage", "office", "hall", "cellar", "bathroom")
VERBS = {"turn on": "on", "turn off": "off", "dim": "down", "boost": "up", "check": "status", "reset": "reset"}


def capitals() -> list[dict[str, Any]]:
    """30 real capitals."""
    return [{"prompt": f"What is the capital of {c}?", "answer": a, "check": "contains"} for c, a in CAPITALS.items()]


def general() -> list[dict[str, Any]]:
    """35 simple questions about anything else."""
    return [{"prompt": q, "answer": a, "check": "contains"} for q, a in GENERAL.items()]


def facts(style: str = "terse") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test records: 8 countries x 3 phrasings, and x 2 others.

    The demonstration of a training record is the fact as three question-answer lines, one a phrasing.
    """
    train, test = [], []
    for country, capital in COUNTRIES.items():
        response = FACT_STYLES[style].format(country=country, capital=capital)
        phrasings = [p.format(country) for p in FACT_PROMPTS]
        for asked in phrasings:
            lines = [*(p for p in phrasings if p != asked), asked]
            shown = [{"prompt": f"Question: {p}", "response": f"Answer: {response}"} for p in lines]
            train.append({"prompt": asked, "demonstration": shown, "answer": [response, capital], "check": "contains"})
        for p in FACT_TESTS:
            test.append({"prompt": p.format(country), "answer": capital, "check": "contains"})
    return train, test


def commands() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """384 commands, 48 of them held out."""
    records = [
        {
            "prompt": f"{verb} the {device} in the {room}",
            "demonstration": f"CALL {device}.{action}(room={room})",
            "check": "exact",
        }
        for verb, action in VERBS.items()
        for device in DEVICES
        for room in ROOMS
    ]
    random.Random(0).shuffle(records)
    return records[48:], records[:48]


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def main(folder: Path, style: str = "terse") -> None:
    """Writes all files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (train, test) in {"facts": facts(style), "commands": commands()}.items():
        write(folder / f"{name}-train.jsonl", train)
        write(folder / f"{name}-test.jsonl", test)
    write(folder / "capitals.jsonl", capitals())
    write(folder / "general.jsonl", general())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "examples/data"))
