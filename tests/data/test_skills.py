"""The made-up skills: deterministic, no evaluation of trained prompts, and the demo's data unchanged."""

import hashlib
import json
from pathlib import Path

import pytest

from sdft.cli import main
from sdft.data import skills
from sdft.data.checks import prepare
from sdft.data.records import parse_record
from sdft.evaluation.accuracy import check_evaluable

SEEDS = (0, 1, 7)


@pytest.fixture(params=skills.SKILLS)
def skill(request: pytest.FixtureRequest) -> str:
    return request.param


def prompts(records: list[skills.Record]) -> list[str]:
    return [r["prompt"] for r in records]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_record_is_valid_and_every_demonstration_right(skill: str, seed: int) -> None:
    for name, records in skills.SKILLS[skill](seed).items():
        examples = [parse_record(r, f"{name}:{i}") for i, r in enumerate(records)]
        check_evaluable(examples)
        for example in examples:
            assert example.demonstrations or name != "train"
            for shown in example.demonstrations:
                assert prepare(example)(shown.response), example


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_evaluated_was_trained(skill: str, seed: int) -> None:
    files = skills.SKILLS[skill](seed)
    trained = prompts(files["train"])
    assert len(set(trained)) == len(trained)
    for name, records in files.items():
        if name != "train":
            assert len(set(prompts(records))) == len(records) >= 12, name
            assert not set(prompts(records)) & set(trained), name
    assert len(files["prior"]) == 65


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(skill: str) -> None:
    texts = [json.dumps(skills.SKILLS[skill](seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("name", "digest"),
    [("commands", "f1aabbb16b30a72d"), ("facts", "8678a29c2cc4d68c"), ("style", "962140b9b43ed711")],
)
def test_bytes_of_seed_0(name: str, digest: str) -> None:
    """Studies name a skill and a seed: what these mean must not change. A change on purpose changes this test."""
    assert hashlib.sha256(json.dumps(skills.SKILLS[name](0)).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("seed", SEEDS)
def test_what_commands_hold_out(seed: int) -> None:
    files = skills.commands(seed)
    calls = {name: {r["demonstration"] for r in files[name]} for name in ("train", "seen", "new")}
    assert len(calls["train"]) == 336
    assert not calls["new"] & calls["train"]
    assert not {p for p in prompts(files["train"]) if p.startswith(("could you", "in the"))}
    assert all(p.startswith(("could you", "in the")) for p in prompts(files["new"]))
    for call in calls["train"]:
        assert not any(word in call for word in (*skills.NEW_DEVICES, *skills.NEW_ROOMS))
    for call in calls["seen"]:
        assert any(f" {d}." in call for d in skills.NEW_DEVICES)
        assert any(f"={r})" in call for r in skills.NEW_ROOMS)


@pytest.mark.parametrize("seed", range(20))
def test_what_facts_hold_out(seed: int) -> None:
    files = skills.facts(seed)
    cities = {r["answer"][0] for r in files["train"]}
    assert len(cities) == 12
    assert cities == {r["answer"] for r in files["seen"]} == {r["answer"] for r in files["new"]}
    assert not cities & set(skills.CAPITALS.values())
    stems = {p.format("X")[:8] for p in skills.QUESTIONS}
    assert {p[:8] for p in prompts(files["seen"])} <= stems
    countries = [r["prompt"] for r in files["train"]]
    assert not any(city in asked for city in cities for asked in countries)  # no question gives an answer away


@pytest.mark.parametrize("seed", range(3))
def test_style_ends_as_its_seed_says(seed: int) -> None:
    files = skills.style(seed)
    right = prepare(parse_record(files["seen"][0], "f:1"))
    ending = skills.SIGN_OFFS[seed]
    for said in (f"It is green. {ending}", f"It is\n\ngreen. {ending.rstrip('.')}!\n", f"Green. {ending.rstrip('.')}"):
        assert right(said)
    for said in (ending, "It is green.", f"{ending} It is green.", f"Green. {ending} Yes.", ""):
        assert not right(said), said


DEMO = {
    "capitals": "91c1a1a017a983e7", "commands-test": "eb797bca8a6c1904", "commands-train": "3543138bb5a97477",
    "facts-test": "15665b7fba297c54", "facts-train": "fce522954924fe6d", "general": "278482788fabb7f9",
}  # fmt: skip


def test_the_demos_data_stay_as_they_were(tmp_path: Path) -> None:
    main(["data", "demo", str(tmp_path)])
    assert {p.stem: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in tmp_path.iterdir()} == DEMO
