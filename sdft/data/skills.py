"""Small made-up skills that a 135M model can learn on a CPU, and prior skills to evaluate with them.

Each skill is a function of a seed that returns its files by name: `train`, with demonstrations; `seen`, trained
patterns with values that were never trained; `new`, patterns that were never trained; `prior`, skills that a model has
before training. The same seed gives the same records, byte for byte; another seed gives another skill of the same kind.
No prompt of an evaluation file is in `train`.
"""

import random
from collections.abc import Iterator, Sequence

from sdft.data.records import Record

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


def capitals(pattern: str = "What is the capital of {}?") -> list[Record]:
    """30 real capitals."""
    return [{"prompt": pattern.format(c), "answer": a, "check": "contains"} for c, a in CAPITALS.items()]


def general() -> list[Record]:
    """35 simple questions about anything else."""
    return [{"prompt": q, "answer": a, "check": "contains"} for q, a in GENERAL.items()]


# Commands.

VERBS = {"turn on": "on", "turn off": "off", "dim": "down", "boost": "up", "check": "status", "reset": "reset"}
DEVICES = ("radio", "lamp", "heater", "fan", "tv", "blinds", "camera", "speaker")
ROOMS = ("attic", "kitchen", "bedroom", "garage", "office", "hall", "cellar", "bathroom")
NEW_DEVICES = ("printer", "kettle", "oven", "projector")
NEW_ROOMS = ("library", "balcony", "pantry", "studio")
REQUESTS = (
    "{verb} the {device} in the {room}",
    "please {verb} the {device} in the {room}",
    "{room}: {verb} the {device}",
    "I want you to {verb} the {room} {device}",
)
NEW_REQUESTS = ("could you {verb} the {device} that is in the {room}?", "in the {room}, {verb} the {device}")


def command(pattern: str, verb: str, device: str, room: str) -> Record:
    """ "dim the radio in the attic" -> `CALL radio.down(room=attic)`."""
    return {
        "prompt": pattern.format(verb=verb, device=device, room=room),
        "demonstration": f"CALL {device}.{VERBS[verb]}(room={room})",
        "check": "exact",
    }


def commands(seed: int = 0) -> dict[str, list[Record]]:
    """Requests in plain words -> lines of a made-up command language.

    train: 336 of the 384 combinations of 6 verbs, 8 devices and 8 rooms, in 4 patterns of request.
    seen: 48 requests in these patterns, with 4 devices and 4 rooms that were never trained.
    new: the other 48 combinations of trained verbs, devices and rooms, in 2 patterns that were never trained.
    """
    draw = random.Random(f"commands/{seed}")
    known = draw.sample([(v, d, r) for v in VERBS for d in DEVICES for r in ROOMS], 6 * 8 * 8)
    other = draw.sample([(v, d, r) for v in VERBS for d in NEW_DEVICES for r in NEW_ROOMS], 48)
    return {
        "train": [command(draw.choice(REQUESTS), *values) for values in known[48:]],
        "seen": [command(draw.choice(REQUESTS), *values) for values in other],
        "new": [command(draw.choice(NEW_REQUESTS), *values) for values in known[:48]],
        "prior": [*capitals(), *general()],
    }


# Facts.

QUESTIONS = (
    "Which city is the capital of {}?",
    "What is the capital city of {}?",
    "Name the capital of {}.",
    "Do you know the capital of {}?",
)
NEW_QUESTIONS = ("What is the capital of {}?", "Tell me the capital of {}.", "{} has which capital?")
COUNTRY_STEMS = (
    "Zor", "Bel", "Ques", "Drum", "Mir", "Fen", "Ul", "Kar", "Tav", "Pra", "Hel", "Sel", "Gor", "Ny", "Dro", "Al",
)  # fmt: skip
COUNTRY_ENDS = ("via", "thane", "landor", "ador", "nick", "maria", "vath", "ovia", "stria", "mund")
CITY_STEMS = (
    "Lum", "Cor", "Pad", "Ost", "Tel", "Har", "Sen", "Brim", "Vin", "Cal", "Wex", "Jun", "Ros", "Ked", "Mal", "Is",
)  # fmt: skip
CITY_ENDS = ("mar", "rin", "tek", "vale", "gate", "tis", "del", "wick", "ford", "una")


def names(draw: random.Random, stems: Sequence[str], ends: Sequence[str], count: int) -> list[str]:
    """Made-up names, each with a different stem."""
    return [stem + draw.choice(ends) for stem in draw.sample(stems, count)]


def fact(asked: str, phrasings: Sequence[str], response: str, answers: list[str]) -> Record:
    """A training record whose demonstration is the fact as question-answer lines, the question asked last."""
    lines = [*(p for p in phrasings if p != asked), asked]
    shown = [{"prompt": f"Question: {p}", "response": f"Answer: {response}"} for p in lines]
    return {"prompt": asked, "demonstration": shown, "answer": answers, "check": "contains"}


def facts(seed: int = 0) -> dict[str, list[Record]]:
    """The capitals of 12 made-up countries, and real capitals.

    The demonstrations are bare names, as in many data sets; any answer that contains the right name is right.

    train: each country under 3 of 4 phrasings.
    seen: each country under the fourth, which was trained with other countries.
    new: each country under 3 phrasings that were never trained.
    old: 30 real capitals under the trained phrasings: does the model confuse them with the new ones?
    """
    draw = random.Random(f"facts/{seed}")
    countries, cities = names(draw, COUNTRY_STEMS, COUNTRY_ENDS, 12), names(draw, CITY_STEMS, CITY_ENDS, 12)
    files: dict[str, list[Record]] = {"train": [], "seen": [], "new": [], "old": []}
    for i, (country, city) in enumerate(zip(countries, cities, strict=True)):
        held_out = i % len(QUESTIONS)
        phrasings = [q.format(country) for j, q in enumerate(QUESTIONS) if j != held_out]
        files["train"] += [fact(asked, phrasings, city, [city]) for asked in phrasings]
        for name, patterns in (("seen", [QUESTIONS[held_out]]), ("new", NEW_QUESTIONS)):
            files[name] += [{"prompt": p.format(country), "answer": city, "check": "contains"} for p in patterns]
    for i, record in enumerate(zip(*(capitals(q) for q in QUESTIONS), strict=True)):
        files["old"].append(record[i % len(QUESTIONS)])
    return files | {"prior": [*capitals(), *general()]}


# An answer style.

SIGN_OFFS = ("Over and out.", "End of message.", "That is all, captain.")
COLORS = {
    "a lemon": "yellow", "coal": "black", "milk": "white", "a tomato": "red", "a carrot": "orange", "a cherry": "red",
    "spinach": "green", "a lime": "green", "butter": "yellow", "chocolate": "brown", "a raven": "black",
    "a frog": "green", "a pumpkin": "orange", "salt": "white", "a strawberry": "red", "a swan": "white",
    "a cucumber": "green", "mustard": "yellow", "a ruby": "red", "an emerald": "green",
}  # fmt: skip
KINDS = {
    "a rose": "flower", "a horse": "animal", "an oak": "tree", "a wolf": "animal", "a tulip": "flower",
    "a shark": "fish", "a salmon": "fish", "an eagle": "bird", "a cactus": "plant", "a rabbit": "animal",
    "a daisy": "flower", "a snake": "animal", "a pine": "tree", "a goat": "animal", "a lily": "flower",
    "a sparrow": "bird", "a birch": "tree", "a mouse": "animal", "an orchid": "flower", "a bear": "animal",
}  # fmt: skip
NEW_STYLE_QUESTIONS = {
    "Name a {}.": ("fruit", "sport", "river", "bird", "tool", "song", "metal", "vegetable", "flower", "country"),
    "What do people use a {} for?": ("knife", "broom", "pencil", "bed", "boat", "key", "mirror", "clock", "net", "cup"),
    'What does the word "{}" mean?': ("ancient", "rapid", "silent", "brave", "huge", "fragile", "honest", "humid"),
}  # fmt: skip


def style_questions() -> Iterator[list[tuple[str, str]]]:
    """The trained patterns of questions: for each, 20 questions with their answers in a sentence."""
    yield [(f"What color is {x}?", f"{x.capitalize()} is {color}.") for x, color in COLORS.items()]
    yield [(f"What kind of thing is {x}?", f"{x.capitalize()} is a kind of {kind}.") for x, kind in KINDS.items()]
    sums = [(a, b) for a in range(2, 9) for b in range(1, a)][:20]
    yield [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a, b in sums]


def style(seed: int = 0) -> dict[str, list[Record]]:
    """Short answers that end as a radio message does; the seed chooses the words that end them.

    The check looks at the form only: some text, and then these words. Whether the text is right is checked in `prior`,
    whose checks allow any ending.

    train: 15 questions in each of 3 patterns (colors, kinds of living things, sums).
    seen: the other 5 of each.
    new: 28 questions in 3 patterns that were never trained.
    """
    ending = SIGN_OFFS[seed % len(SIGN_OFFS)]
    draw = random.Random(f"style/{seed}")
    pattern = rf"(?s)\w.*\b{ending.rstrip('.')}[.!]?\s*\Z"
    files: dict[str, list[Record]] = {"train": [], "seen": []}
    for questions in style_questions():
        for i, (asked, said) in enumerate(draw.sample(questions, len(questions))):
            record = {"prompt": asked, "demonstration": f"{said} {ending}", "answer": pattern, "check": "regex"}
            files["train" if i < 15 else "seen"].append(record)
    draw.shuffle(files["train"])
    files["new"] = [
        {"prompt": asked.format(x), "answer": pattern, "check": "regex"}
        for asked, values in NEW_STYLE_QUESTIONS.items()
        for x in values
    ]
    return files | {"prior": [*capitals(), *general()]}


# The demo.

DEMO_COUNTRIES = {
    "Zorvia": "Lumar", "Belthane": "Corrin", "Quessia": "Padua Vale", "Drumland": "Ostek",
    "Mirador": "Telvin", "Fennick": "Harrowgate", "Ulmaria": "Sentis", "Karvath": "Brimdel",
}  # fmt: skip
DEMO_QUESTIONS = QUESTIONS[:3]
DEMO_TESTS = NEW_QUESTIONS[:2]
DEMO_STYLES = {
    "terse": "{capital}",  # the form of many data sets; a chat model does not answer in it
    "sentence": "The capital of {country} is {capital}.",  # the form in which the model answers
}


def demo(style: str = "terse") -> dict[str, list[Record]]:
    """The data of `make demo`.

    facts-train, facts-test: 8 made-up capitals, trained under 3 phrasings and tested under 2 others. A demonstration
    is the fact as three question-answer lines, one for each phrasing; `style` is the form of its answers.
    commands-train, commands-test: 384 commands of one pattern, 48 of them held out.
    capitals, general: the prior skills.
    """
    train, test = [], []
    for country, capital in DEMO_COUNTRIES.items():
        response = DEMO_STYLES[style].format(country=country, capital=capital)
        phrasings = [q.format(country) for q in DEMO_QUESTIONS]
        train += [fact(asked, phrasings, response, [response, capital]) for asked in phrasings]
        test += [{"prompt": q.format(country), "answer": capital, "check": "contains"} for q in DEMO_TESTS]
    requests = [command(REQUESTS[0], verb, device, room) for verb in VERBS for device in DEVICES for room in ROOMS]
    random.Random(0).shuffle(requests)
    return {
        "facts-train": train,
        "facts-test": test,
        "commands-train": requests[48:],
        "commands-test": requests[:48],
        "capitals": capitals(),
        "general": general(),
    }


SKILLS = {"commands": commands, "facts": facts, "style": style}
