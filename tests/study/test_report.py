"""The report of a study: its numbers are those of a study written by hand, whatever the answers hold."""

import functools
import itertools
import json
import math
import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from sdft.cli import main
from sdft.errors import SdftError
from sdft.study import figures, pictures, render, report, results, run, spec, tables
from sdft.study.found import collect, stage_metrics

RATES, SEEDS = (1e-5, 3e-5, 1e-4), (0, 1, 2)
METHODS = {
    "sdft": {"loss": {"method": "sdft"}},
    "sft": {"loss": {"method": "sft"}},
    "offline": {"loss": {"method": "sft"}, "rollout": {"source": "offline"}},
}
BASE = {"facts-seen": 0.0, "facts-new": 0.0, "commands-seen": 0.1, "capitals": 0.7, "general": 0.5}
# After the last stage: facts, commands, prior skills, by method, at the three rates. A seed adds its number in points.
LAST = {
    "sdft": ((0.50, 0.60, 0.60), (0.80, 0.90, 0.58), (0.85, 0.93, 0.40)),
    "sft": ((0.40, 0.70, 0.50), (0.55, 0.90, 0.35), (0.50, 0.95, 0.10)),
    "offline": ((0.30, 0.50, 0.59), (0.60, 0.75, 0.55), (0.70, 0.85, 0.45)),
}
EVIL = 'no | <script>alert("x")</script> ![p](http://evil.example/p.png) `a` *b* \x1b[31m\n\n# head\n| a | b |\ud800'


def accuracy(method: str, rate: int, seed: int, stage: int) -> dict[str, float]:
    """After stage 1 facts are 5 points better than at the end, commands half learned, prior skills half lost."""
    facts, commands, prior = (value + 0.01 * seed for value in LAST.get(method, LAST["sdft"])[rate])
    if stage == 0:
        facts, commands, prior = facts + 0.05, 0.1 + 0.02 * rate, (prior + 0.6) / 2
    return {
        "facts-seen": facts, "facts-new": facts / 2, "commands-seen": commands, "capitals": prior + 0.1,
        "general": prior - 0.1,
    }  # fmt: skip


def answers(values: dict[str, float], evil: bool) -> dict[str, list[dict[str, Any]]]:
    """20 records of every set, the first of them right."""
    return {
        name: [
            {"prompt": f"{name} {i}?", "expected": [f"right {i}"], "given": EVIL if evil and i == 1 else f"given {i}",
             "correct": i < round(20 * value), "tokens": 3, "truncated": False}
            for i in range(20)
        ]
        for name, value in values.items()
    }  # fmt: skip


def metrics(method: str, number: int, seed: int, now: dict[str, float], start: dict[str, float]) -> list[dict]:
    """60 steps with an evaluation every 20."""
    own = ("facts-seen", "facts-new") if number == 0 else ("commands-seen",)
    lines: list[dict[str, Any]] = []
    for step in range(61):
        left = math.exp(-step / 20)
        if step:
            wave = 1 + 0.1 * math.sin(7 * step + seed)
            line = {
                "step": step,
                "loss": (0.1 + left) * wave * (0.4 if method == "sdft" else 2.0),
                "answer_tokens": 12.0,
            }
            line["seconds"] = {"rollout": 1.0, "score": 0.25, "loss": 0.25, "backward": 0.25, "update": 0.25}
            if method == "sdft":
                line |= {"student_entropy": 0.5 + left * wave, "answer_tokens": 10 + 20 * left}
                keys = ("0-0", "1-2", "3-6", "7-14", "15-30")
                line["loss_by_position"] = {key: (0.2 + left) / (1 + i) for i, key in enumerate(keys)}
            lines.append(line)
        if step % 20 == 0:
            values = {name: left * start[name] + (1 - left) * now[name] for name in (*own, "capitals", "general")}
            lines.append({"step": step, "eval": values})
    return lines


def build(folder: Path, evil: bool = False, **changes: Any) -> spec.Study:
    """A study whose OUTPUT is written by hand, without a model. changes: of the TOML."""
    records = folder / "records.jsonl"
    records.write_text('{"prompt": "a", "demonstration": "b"}\n')
    table = {
        "output": str(folder / "study"),
        "seeds": list(SEEDS),
        "learning_rates": list(RATES),
        "config": {"model": {"name": "a-model"}, "train": {"steps": 60}, "eval": {"every": 20}},
        "tasks": [
            {"name": "facts", "train": str(records), "eval": {"seen": str(records), "new": str(records)}},
            {"name": "commands", "train": str(records), "eval": {"seen": str(records)}},
        ],
        "prior": {"capitals": str(records), "general": str(records)},
        "methods": METHODS,
    } | changes
    (folder / "study.toml").write_text(tomli_w.dumps(table))
    found = spec.load_study(folder / "study.toml")
    sets = found.sets
    base = {name: BASE[name] for name in sets}
    save(found.output / "base", {"model": "a-model", "sets": sets, "accuracy": base}, answers(base, False))
    for cell in spec.cells(found):
        start = base
        for number, task in enumerate(found.tasks):
            index = RATES.index(cell.learning_rate)
            at = accuracy(cell.method.name, index, cell.seed, number if len(found.tasks) > 1 else 1)
            now = {name: at[name] for name in sets}
            place = spec.stage_folder(found, cell, number)
            result = {
                "method": cell.method.name, "learning_rate": cell.learning_rate, "seed": cell.seed,
                "task": task.name, "settings": results.stage_settings(found, cell, number), "accuracy": now,
                "tokens": 1000 * (index + 1), "seconds": {"train": 100.0, "evaluate": 10.0},
            } | ({"flops": 10**13} if index else {})  # fmt: skip
            save(place, result, answers(now, evil))
            for config in spec.stage_configs(found, cell, number, "a-model"):
                lines = metrics(cell.method.name, number, cell.seed, at, BASE | start)
                Path(config.train.output).mkdir(parents=True)
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (Path(config.train.output) / "metrics.jsonl").write_text(text)
            start = now
    return found


@pytest.fixture
def make_finished(tmp_path: Path) -> Callable[..., spec.Study]:
    """make_finished(**changes) is a finished study in a new folder."""
    return functools.partial(build, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUTPUT of a finished study with a malicious answer, and its report; to be read alone."""
    return report.write_report(build(tmp_path_factory.mktemp("finished"), evil=True)).parent


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are drawn fast."""
    monkeypatch.setattr(pictures, "DPI", 30)


def save(folder: Path, result: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> None:
    (folder / "answers").mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    for name, found in rows.items():
        (folder / f"answers/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def rows(text: str, heading: str) -> dict[tuple[str, ...], list[str]]:
    """The first table under a heading of report.md: its first two cells -> the others."""
    lines = text.split(f"# {heading}\n")[1].splitlines()
    table = itertools.takewhile(lambda line: line.startswith("|"), itertools.dropwhile(lambda x: x[:1] != "|", lines))
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in table if line.startswith("| ")]
    return {tuple(c[:2]): c[2:] for c in cells}


# Numbers.


def test_the_numbers_are_the_known_ones(finished: Path) -> None:
    text = (finished / "report.md").read_text()
    final = rows(text, "Accuracy after the last stage")
    assert len(final) == 1 + 1 + 9
    assert final[("method", "learning rate")] == ["seeds", "facts-seen", "commands-seen", "capitals", "general"]
    assert final[("base", "")] == ["", "0.0", "10.0", "70.0", "50.0"]
    # 80, 81 and 82 points: mean 81, and of three seeds the interval is the range.
    assert final[("sdft", "3e-05")][:3] == ["3", "81.0 (80.0 to 82.0)", "91.0 (90.0 to 92.0)"]
    assert "| offline | 0.0001 | 3 | 35.5 (35.0 to 36.0) |" in text  # the column next to facts-new
    # Facts fall 5 points after their stage; commands rise 2 x 1 points before theirs; prior skills lose 24 on average.
    assert rows(text, "Learning and forgetting")[("sft", "3e-05")] == [
        "3", "73.5 (72.5 to 74.5)", "5.0 (5.0 to 5.0)", "-5.0 (-5.0 to -5.0)", "+2.0 (+2.0 to +2.0)",
        "-24.0 (-25.0 to -23.0)",
    ]  # fmt: skip
    # sdft: (56+61)/2, (86+59)/2, (90+41)/2 -> the middle rate; sft alike, by 56+51 < 73.5+36 > 73.5+11.
    best = rows(text, "Each method at its best learning rate")
    assert [key for key in best if key[0] in METHODS] == [(m, "3e-05") for m in METHODS]
    assert best[("sdft", "3e-05")] == ["3", "86.0 (85.0 to 87.0)", "59.0 (58.0 to 60.0)", "72.5 (71.5 to 73.5)"]
    differences = rows(text, "Differences, seed by seed")
    assert differences[("sdft minus sft", "tasks")] == ["3", "+12.5 (+12.5 to +12.5)", "0.25"]
    assert differences[("sft minus offline", "prior skills")] == ["3", "-20.0 (-20.0 to -20.0)", "0.25"]
    assert "With 3 seeds, p is never below 0.25. So 3 seeds cannot show a difference at the 5% level" in text
    # 2 stages of 1000 tokens x the rate's number, of 60 steps of 2 s, 100 s and 10 s.
    assert rows(text, "Cost")[("offline", "3e-05")] == ["3", "4,000", "20", "240", "200", "20"]
    assert rows(text, "Cost")[("offline", "1e-05")][2] == "–"  # results of before operations were counted
    assert "On the front (after the last stage): sdft at 1e-05, sdft at 3e-05, sdft at 0.0001." in text
    assert "What is missing" not in text


def test_the_best_rate_never_has_fewer_seeds_than_another(make_finished: Any) -> None:
    found = make_finished()
    assert collect(found).best["sdft"].rate == 3e-5
    shutil.rmtree(found.output / "sdft/lr-3e-05/seed-2")
    assert collect(found).best["sdft"].rate == 1e-4  # 65.5 is more than 58.5
    text = report.write_report(found).read_text()
    assert rows(text, "Differences, seed by seed")[("sdft minus sft", "tasks")][0] == "3"
    assert "- sdft/lr-3e-05/seed-2: 0 of 2 stages" in text


@pytest.mark.parametrize(
    ("n", "message"), [(1, "Run more seeds"), (2, "below 0.5. So 2"), (5, "0.0625. So"), (6, "0.0312. ")]
)
def test_what_seeds_show(n: int, message: str) -> None:
    assert message in tables.what_seeds_show(n)
    assert ("cannot show a difference" in tables.what_seeds_show(n)) == (1 < n < 6)


def test_the_samples_are_those_in_disagreement(finished: Path) -> None:
    """Of 20 facts, base has none right, sdft 16, sft 11, offline 12 (seed 0): record 11 is the only 2 to 2."""
    text = (finished / "report.md").read_text()
    samples = [line for line in text.splitlines() if line.startswith("| facts-seen | facts-seen ")]
    assert (
        samples[0] == "| facts-seen | facts-seen 11? | right 11 | ✗ given 11 | ✓ given 11 | ✗ given 11 | ✓ given 11 |"
    )
    assert [line.split("? |")[0][-1] for line in samples[1:]] == ["0", "1"]


def test_curves_are_means_over_seeds_and_blocks(make_finished: Any) -> None:
    found = make_finished(methods={"two": {"phases": [{"loss": {"method": "sft"}}, {"loss": {"method": "sdft"}}]}})
    cell = spec.cells(found)[0]
    first, second = stage_metrics(found, cell, 1)
    assert (first[0]["step"], first[-1]["step"], second[-1]["step"]) == (0, 60, 120)
    steps, values = figures.training_curve([[first, second]], "loss", [False, True])
    assert (steps[0], steps[-1], len(steps)) == (61.5, 119.5, 30)
    losses = [line["loss"] for line in second if "loss" in line]
    assert values[0] == pytest.approx((losses[0] + losses[1]) / 2)
    lines = [{"loss_by_position": {"1-2": float(i), "0-0": None}} for i in range(1, 21)]
    assert figures.first_and_last([lines]) == ({"1-2": 1.5}, {"1-2": 19.5})  # the first two of twenty, and the last two
    report.write_report(found)


# What is not there.


def test_a_study_that_is_partly_finished(make_finished: Any) -> None:
    found = make_finished()
    shutil.rmtree(found.output / "sft")
    for seed in SEEDS:
        (found.output / f"offline/lr-1e-05/seed-{seed}/2-commands/result.json").unlink()
    shutil.rmtree(found.output / "sdft/lr-0.0001/seed-0/2-commands/run")
    text = report.write_report(found).read_text()
    assert "15 of 27 cells are finished" in text
    assert "- sft/lr-1e-05/seed-0: 0 of 2 stages" in text
    assert "- offline/lr-1e-05/seed-1: 1 of 2 stages" in text
    assert ("offline", "1e-05") not in rows(text, "Accuracy after the last stage")
    assert not any(key[0] == "sft" for key in rows(text, "Cost"))


def test_first_stages_alone(make_finished: Any) -> None:
    found = make_finished()
    for path in found.output.glob("*/*/*/2-commands"):
        shutil.rmtree(path)
    text = report.write_report(found).read_text()
    assert "No cell has finished its last task yet" in text
    assert "On the front (after stage 1: facts)" in text
    assert (found.output / "report/pareto.png").exists()


@pytest.mark.parametrize(
    ("changes", "missing", "message"),
    [
        ({"prior": {}}, "", "names no prior skills"),
        ({}, "metrics.jsonl", "metrics.jsonl are not there"),
        ({}, "answers/*", "The completions are not there"),
        ({"seeds": [1]}, "", "One seed shows nothing about chance"),
    ],
    ids=["prior skills", "metrics", "answers", "seeds"],
)
def test_a_study_without(changes: dict[str, Any], missing: str, message: str, make_finished: Any) -> None:
    found = make_finished(**changes)
    for path in found.output.rglob(missing) if missing else ():
        path.unlink()
    assert message in report.write_report(found).read_text()


def test_a_single_task_has_no_transfer(make_finished: Any, tmp_path: Path) -> None:
    records = str(tmp_path / "records.jsonl")
    found = make_finished(tasks=[{"name": "facts", "train": records, "eval": {"seen": records}}])
    text = report.write_report(found).read_text()
    assert rows(text, "Learning and forgetting")[("sft", "3e-05")][2:5] == ["–"] * 3
    assert "A study of one task has no transfer" in text


def test_nothing_finished_is_told(make_finished: Any) -> None:
    found = make_finished()
    for name in METHODS:
        shutil.rmtree(found.output / name)
    with pytest.raises(SdftError, match=r"no stage is finished yet, .*run `sdft study` first"):
        report.write_report(found)
    shutil.rmtree(found.output / "base")
    with pytest.raises(SdftError, match=r"base/result.json is missing: nothing is finished yet; run `sdft study`"):
        report.write_report(found)
    assert not list(found.output.glob("report*"))


# What is written.


class Page(HTMLParser):
    """Tags that are open, and everything that a browser would fetch or run."""

    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        assert not any(key.startswith("on") or key == "style" for key, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_needs_nothing_else_and_shows_answers_as_they_are(finished: Path) -> None:
    source = (finished / "report.html").read_text()
    page = Page()
    page.feed(source)
    assert page.open == []
    assert "script" not in page.tags
    assert page.tags.count("img") == len(list((finished / "report").glob("*.png"))) == 5
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "url(" not in source
    assert 'no | <script>alert("x")</script> ![p](http://evil.example/p.png) `a` *b* �[31m ⏎ # head' in page.text


def test_markdown_shows_answers_as_they_are(finished: Path) -> None:
    lines = (finished / "report.md").read_text().splitlines()
    cells = [line for line in lines if "alert" in line]
    assert cells
    for line in cells:
        assert len(re.findall(r"(?<!\\)\|", line)) == 8  # seven columns
        assert "<" not in line
        assert "://" not in line
        assert not re.search(r"(?<!\\)[`*\[\]]", line)
    assert render.markdown_text("a\\|b www.x.y $5 http://x <b>") == (r"a\\\|b www&#46;x.y \$5 http&#58;//x &lt;b&gt;")


def test_same_input_same_bytes(make_finished: Any) -> None:
    found = make_finished()
    report.write_report(found)
    written = [found.output / "report.md", found.output / "report.html", *(found.output / "report").iterdir()]
    before = {path: path.read_bytes() for path in written}
    assert len(before) == 7
    for path in written:
        path.unlink()
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "axes.grid": True}):  # whatever the reader has set
        report.write_report(found)
    assert {path: path.read_bytes() for path in written} == before
    assert not list(found.output.rglob("partial-*"))


def test_methods_differ_without_colour() -> None:
    from sdft.study.pictures import styles

    look = styles([str(i) for i in range(30)])
    assert len({(s.color, s.marker, str(s.line)) for s in look.values()}) == 30
    assert len({(s.marker, str(s.line)) for s in look.values()}) == 30


def test_labels_do_not_cover_each_other() -> None:
    """A lone point keeps its method's side; those that lie on each other stay apart as long as there is room."""
    look = pictures.styles(["a", "b", "c", "d"])
    apart = {"a": [(1e-5, 0.1, 0.9), (2e-5, 0.9, 0.9)], "b": [(1e-5, 0.9, 0.1)]}
    plane = pictures.Plane("", "", (0.0, 0.0), apart, {})
    for (name, _, _), side in pictures.label_sides(plane, look).items():
        assert side == look[name].label_at
    crowd = {name: [(1e-5, 0.5, 0.5), (2e-5, 0.505, 0.5)] for name in look}
    sides = list(pictures.label_sides(pictures.Plane("", "", (0.0, 0.0), crowd, {}), look).values())
    assert len(sides) == len(set(sides)) == 8
    one = pictures.Plane("", "", (0.5, 0.5), {"a": [(1e-5, 0.5, 0.5)]}, {})  # no span to measure by
    assert list(pictures.label_sides(one, look).values()) == [look["a"].label_at]


# The command.


def test_the_command_ends_with_the_report_and_can_write_it_alone(
    make_finished: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_finished()
    path = str(found.output.parent / "study.toml")
    monkeypatch.setattr(run, "run_stage", None)  # nothing is run
    shutil.rmtree(found.output / "sft/lr-1e-05/seed-0")
    main(["study", path, "--report"])
    assert f"Report: {found.output}/report.md" in capsys.readouterr().out
    assert "26 of 27 cells" in (found.output / "report.md").read_text()
    assert not (found.output / "table.md").exists()
    (found.output / "report.md").unlink()
    main(["study", path, "--only", "sdft"])
    assert (found.output / "table.md").read_text() in capsys.readouterr().out
    assert "26 of 27 cells" in (found.output / "report.md").read_text()


# docs/study.md.

DOCS = (Path(__file__).parents[2] / "docs/study.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)


def test_the_example_of_the_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Any, capsys: Any
) -> None:
    """Its commands in order, on a tiny model and six records of each file."""
    monkeypatch.chdir(tmp_path)
    data, commands = (block.splitlines() for block in blocks("bash"))
    for line in data:
        main(line.split()[1:])
    for path in tmp_path.glob("runs/tasks/*/*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    text = blocks("toml")[0].replace("smollm2-135m", str(model_folder("llama")))
    Path("study.toml").write_text(text)
    for line in commands:
        words = line.split("  #")[0].split()
        assert words[:2] == ["sdft", "study"]
        main(words[1:])
    assert "sdft/lr-1e-05/seed-0: 0 of 2 stages" in capsys.readouterr().out
    found = Path("runs/study/report.md").read_text()
    final = rows(found, "Accuracy after the last stage")
    result = json.loads(Path("runs/study/sft/lr-1e-05/seed-0/2-commands/result.json").read_text())
    names = ["facts-seen", "commands-new", "known"]
    assert final[("sft", "1e-05")] == ["1", *(f"{100 * result['accuracy'][name]:.1f}" for name in names)]
    assert rows(found, "Cost")[("sft", "1e-05")][0] == "1"
    for name in ("pareto", "matrix", "stages", "positions", "training"):
        assert f"](report/{name}.png)" in found
        assert (tmp_path / f"runs/study/report/{name}.png").exists()
    assert {path.name for path in Path("runs/study").iterdir()} == {
        "base", "report", "report.html", "report.md", "sdft", "sft", "table.md"
    }  # fmt: skip


def test_the_other_block_of_the_docs_is_a_method(make_finished: Any) -> None:
    found = make_finished(methods=tomllib.loads(blocks("toml")[1])["methods"])
    text = report.write_report(found).read_text()
    assert "- sft-then-reinvoke: SFT: cross-entropy of the student on the demonstrations. Then SDFT: " in text


def test_added_seeds_and_rates_run_alone(make_finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/study.md says."""
    found = make_finished()
    ran = []
    monkeypatch.setattr(run, "run_stage", lambda _, cell, number: ran.append((cell.name, number)))
    sdft = replace(found.methods[0], learning_rates=(*RATES, 1e-3))
    run.run_study(replace(found, seeds=(*SEEDS, 3), methods=(sdft, *found.methods[1:])))
    assert len(ran) == 2 * (3 + 4 + 3 + 3)
    assert all("lr-0.001/" in name or "seed-3" in name for name, _ in ran)


def test_the_docs_name_every_key(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("nothing = 1")
    with pytest.raises(SdftError) as message:
        spec.load_study(tmp_path / "study.toml")
    for key in str(message.value).split("valid: ")[1].split(", "):
        assert f"| `{key}` |" in DOCS
