"""Records in, token ids out: forms, mistakes, teacher contexts, length budgets, order."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdft.config import DataConfig, TeacherConfig
from sdft.data.dataset import batch_indices, tokenize
from sdft.data.formats import load_records
from sdft.data.prompts import (
    IN_PROMPT,
    encode_chat,
    encode_target,
    set_chat_template,
    student_messages,
    teacher_messages,
)
from sdft.data.records import Demonstration, Example, parse_record
from sdft.errors import SdftError

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "dim it"}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture
def jsonl(tmp_path: Path) -> Any:
    def write(*lines: str) -> str:
        path = tmp_path / "d.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="module")
def tokenizer(load_tiny: Any) -> Any:
    return load_tiny()[0]


# Records.


@pytest.mark.parametrize(
    ("record", "messages", "demonstrations", "answers"),
    [
        ({"prompt": "p", "demonstration": "d"}, (user("p"),), (Demonstration("d"),), ("d",)),
        ({"messages": [SYSTEM, USER], "demonstration": "d"}, (SYSTEM, USER), (Demonstration("d"),), ("d",)),
        (
            {"prompt": "p", "demonstration": ["d", "e"]},
            (user("p"),), (Demonstration("d"), Demonstration("e")), ("d", "e"),
        ),
        (
            {"prompt": "p", "demonstration": [{"prompt": "q", "response": "r"}, "d"]},
            (user("p"),), (Demonstration("r", "q"), Demonstration("d")), ("d",),
        ),
        (
            {"prompt": "p", "demonstration": {"prompt": None, "response": "r"}, "answer": ["a", "b"]},
            (user("p"),), (Demonstration("r"),), ("a", "b"),
        ),
        ({"prompt": "p", "answer": "a"}, (user("p"),), (), ("a",)),
        ({"prompt": "p", "answer": "a", "answers": 2, "message": "m", "unit": "km"}, (user("p"),), (), ("a",)),
        ({"prompt": "p", "messages": None, "demonstration": None, "answer": "a"}, (user("p"),), (), ("a",)),
    ],
)  # fmt: skip
def test_forms(jsonl: Any, record: Any, messages: Any, demonstrations: Any, answers: Any) -> None:
    path = jsonl(json.dumps(record))
    assert load_records(path) == [Example(messages, demonstrations, answers, "contains", f"{path}:1")]


def test_line_separators_inside_a_string_are_text(jsonl: Any) -> None:
    text = "one\u2028two\u2029three\x85four"
    rows = [{"prompt": text, "demonstration": text, "check": "exact"}, {"prompt": "p", "demonstration": "d"}]
    loaded = load_records(jsonl(*(json.dumps(r, ensure_ascii=False) for r in rows)))
    assert [e.messages[0]["content"] for e in loaded] == [text, "p"]
    assert [e.check for e in loaded] == ["exact", "contains"]


GOOD = '{"prompt": "p", "demonstration": "d"}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "empty line"),
        ("   ", "empty line"),
        ("{", "not a JSON object on one line"),
        ('{"prompt": "p"', "not a JSON object on one line"),
        ("[1]", "must be a JSON object, not list"),
        ('"text"', "must be a JSON object, not str"),
        ("{}", "exactly one of 'prompt' and 'messages'; has no fields"),
        ('{"Prompt": "p"}', "unknown key 'Prompt'; did you mean 'prompt'?"),
        ('{"question": "p"}', "exactly one of 'prompt' and 'messages'; has question"),
        ('{"prompt": "p", "demonstraton": "d"}', "unknown key 'demonstraton'; did you mean 'demonstration'?"),
        ('{"prompt": "p", "answers": ["d"]}', "unknown key 'answers'; did you mean 'answer'?"),
        ('{"prompt": "p", "sytem": "s"}', "'sytem' is no key of a record; put a system message first in 'messages'"),
        ('{"prompt": "p", "system": "s"}', "'system' is no key of a record"),
        ('{"prompt": "p", "demonstration": {"promt": "q", "response": "r"}}', "'response', not 'promt'"),
        ('{"prompt": "p", "messages": []}', "exactly one of 'prompt' and 'messages'"),
        ('{"prompt": " ", "demonstration": "d"}', "'prompt' must be a non-empty string, not ' '"),
        ('{"prompt": 3, "demonstration": "d"}', "'prompt' must be a non-empty string, not 3"),
        ('{"messages": "hi"}', "'messages' must be a list"),
        ('{"messages": []}', "'messages' must be a list"),
        ('{"messages": ["hi"]}', "'messages' must be a list"),
        ('{"messages": [{"role": "user"}]}', "'content' must be a non-empty string, not None"),
        ('{"messages": [{"content": "x"}]}', "'role' must be a non-empty string, not None"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "must end with the user's request, not with role"),
        ('{"prompt": "p", "demonstration": ""}', "'demonstration' must be a non-empty string"),
        ('{"prompt": "p", "demonstration": ["d", 3]}', "a {'prompt', 'response'} pair, or a list of these, not 3"),
        ('{"prompt": "p", "demonstration": {"prompt": "q"}}', "'demonstration.response' must be a non-empty string"),
        ('{"prompt": "p", "demonstration": {"prompt": 3, "response": "r"}}', "'demonstration.prompt' must be"),
        ('{"prompt": "p", "answer": 3}', "'answer' must be a non-empty string, or a list of them, not 3"),
        ('{"prompt": "p", "answer": "a", "check": 3}', "'check' must be a non-empty string, not 3"),
    ],
)
def test_malformed_line(jsonl: Any, line: str, words: str) -> None:
    path = jsonl(GOOD, line, GOOD)
    with pytest.raises(SdftError) as error:
        load_records(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert words in str(error.value)


def test_unreadable_files(tmp_path: Path, jsonl: Any) -> None:
    with pytest.raises(SdftError, match=r"none\.jsonl: cannot be read \(No such file"):
        load_records(str(tmp_path / "none.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(SdftError, match=r"latin\.jsonl:1: not UTF-8"):
        load_records(str(tmp_path / "latin.jsonl"))
    with pytest.raises(SdftError, match=r"d\.jsonl:1: empty line"):
        load_records(jsonl(""))


# Folders of the `datasets` package.

ROWS = [
    {"prompt": "p", "messages": None, "demonstration": [{"prompt": None, "response": "d"}], "answer": None},
    {"prompt": None, "messages": [SYSTEM, USER], "demonstration": [{"prompt": "q", "response": "r"}], "answer": "a"},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "set"


def check_rows(path: Path) -> None:
    assert load_records(str(path)) == [
        Example((user("p"),), (Demonstration("d"),), ("d",), "contains", f"{path}[0]"),
        Example((SYSTEM, USER), (Demonstration("r", "q"),), ("a",), "contains", f"{path}[1]"),
    ]


def test_saved_dataset(folder: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    check_rows(folder)


def test_saved_dataset_with_splits(folder: Path) -> None:
    import datasets

    both = {"train": datasets.Dataset.from_list(ROWS[:1]), "held": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(both).save_to_disk(folder)
    assert [e.messages[-1]["content"] for e in load_records(str(folder), "held")] == ["dim it"]
    with pytest.raises(SdftError, match=r"no split 'test'; set data\.split to one of train, held"):
        load_records(str(folder), "test")


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_folder_of_files(folder: Path, kind: str) -> None:
    import datasets

    folder.mkdir()
    getattr(datasets.Dataset.from_list(ROWS), f"to_{kind}")(folder / f"data.{kind}")
    check_rows(folder)


def test_a_bad_row_of_a_dataset_is_named(folder: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"prompt": "p"}, {"prompt": ""}]).save_to_disk(folder)
    with pytest.raises(SdftError, match=r"set\[1\]: 'prompt' must be a non-empty string"):
        load_records(str(folder))


def test_folders_that_are_no_dataset(folder: Path) -> None:
    with pytest.raises(SdftError, match="no such file or folder"):
        load_records(str(folder))
    folder.mkdir()
    with pytest.raises(SdftError, match="datasets cannot load it"):
        load_records(str(folder))


# Teacher contexts.

EXAMPLE = Example((SYSTEM, USER), (Demonstration("A"), Demonstration("B", "ask")))


def test_in_prompt_is_one_turn_that_holds_both() -> None:
    system, turn = teacher_messages(EXAMPLE, TeacherConfig())
    assert system == SYSTEM
    assert turn == user(IN_PROMPT.format(request="dim it", demonstration="A\n\nask\nB"))
    assert turn["content"].startswith("dim it\n\nHere is an example")
    assert turn["content"].endswith("response of your own to the request, in the same spirit as the example.")


def test_as_turns_repeats_in_order_and_asks_again() -> None:
    got = teacher_messages(EXAMPLE, TeacherConfig(context="as_turns", turns=3))
    shown = [USER, assistant("A"), user("ask"), assistant("B"), USER, assistant("A")]
    assert got == [SYSTEM, *shown, USER]
    assert teacher_messages(EXAMPLE, TeacherConfig(context="as_turns", turns=1)) == [SYSTEM, USER, assistant("A"), USER]


def test_as_turns_repeats_a_whole_conversation() -> None:
    talk = (user("1"), assistant("2"), user("3"))
    config = TeacherConfig(context="as_turns", turns=1, request="{request} In full: {request}")
    got = teacher_messages(Example(talk, (Demonstration("A"),)), config, system="be brief")
    assert got == [SYSTEM, *talk, assistant("A"), *talk[:2], user("3 In full: 3")]


@pytest.mark.parametrize("context", ["in_prompt", "as_turns", "template"])
def test_the_conversations_own_system_message_wins(context: Any) -> None:
    config = TeacherConfig(context=context, template="{demonstration}{request}")
    assert student_messages(EXAMPLE, "other") == [SYSTEM, USER]
    got = teacher_messages(EXAMPLE, config, "other")
    assert [m for m in got if m["role"] == "system"] == [got[0]] == [SYSTEM]


tricky = st.text("{}rd", max_size=6) | st.sampled_from(
    ["{request}", "{demonstration}", "{0}", "{{request}}", "%s", "\\1"]
)


@given(request=tricky, shown=tricky, glue=st.tuples(*[st.text("{} xy", max_size=3)] * 3))
def test_braces_of_request_and_demonstration_survive(request: str, shown: str, glue: tuple[str, str, str]) -> None:
    a, b, c = glue
    example = Example((user(request),), (Demonstration(shown),))
    config = TeacherConfig(context="template", template=f"{a}{{demonstration}}{b}{{request}}{c}")
    assert teacher_messages(example, config) == [user(a + shown + b + request + c)]
    again = teacher_messages(example, TeacherConfig(context="as_turns", turns=1))
    assert again == [user(request), assistant(shown), user(request)]


# Token ids.


def test_prompt_is_the_chat_template(tokenizer: Any) -> None:
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\ndim it<|im_end|>\n<|im_start|>assistant\n"
    ids = encode_chat(tokenizer, [SYSTEM, USER], "w")
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text) - 3 * len("<|im_start|>") - 2 * len("<|im_end|>") + 5  # a byte each, specials one


@given(response=st.text(min_size=1, max_size=12).filter(str.strip))
def test_target_continues_the_prompt_and_stops(tokenizer: Any, response: str) -> None:
    stop = tokenizer.eos_token_id
    ids = encode_target(tokenizer, [USER], response, (stop,), "w")
    assert ids[-1] == stop
    assert stop not in ids[:-1]
    assert tokenizer.decode(ids[:-1]) == response
    whole = tokenizer.apply_chat_template([USER, assistant(response)], tokenize=True)["input_ids"]
    prompt = encode_chat(tokenizer, [USER], "w")
    assert prompt + ids == whole[: len(prompt) + len(ids)]
    assert tokenizer.decode(whole[len(prompt) + len(ids) :]) == "\n"


@pytest.mark.parametrize(
    "template",
    [
        # the generation prompt opens a think block that a finished turn has not
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
        # a finished turn carries no stop token
        "{% for m in messages %}{% if m['role'] == 'user' %}[{% endif %}{{ m['content'] }}\n{% endfor %}",
    ],
)
def test_target_of_an_unusual_template(template: str, load_tiny: Any) -> None:
    tokenizer = load_tiny()[0]
    tokenizer.chat_template = template
    ids = encode_target(tokenizer, [USER], "on", (257, 258), "w")
    assert (tokenizer.decode(ids[:-1]), ids[-1]) == ("on", 257)


def test_no_chat_template(tmp_path: Path, load_tiny: Any) -> None:
    tokenizer = load_tiny()[0]
    tokenizer.chat_template = None
    with pytest.raises(SdftError, match=r"no chat template.*set data\.chat_template to a Jinja file"):
        tokenize([EXAMPLE], tokenizer, (257,), DataConfig(), TeacherConfig())
    with pytest.raises(SdftError, match=r"none\.jinja' cannot be read"):
        set_chat_template(tokenizer, str(tmp_path / "none.jinja"))
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}!")
    set_chat_template(tokenizer, str(tmp_path / "t.jinja"))
    assert tokenizer.decode(encode_chat(tokenizer, [USER], "w")) == "dim it!"


def test_a_template_that_refuses_names_the_record(load_tiny: Any) -> None:
    tokenizer = load_tiny()[0]
    tokenizer.chat_template = "{{ raise_exception('no system messages here') }}"
    with pytest.raises(SdftError, match=r"f\.jsonl:7: the chat template refuses.*no system messages here"):
        encode_chat(tokenizer, [SYSTEM, USER], "f.jsonl:7")


def records(*words: str) -> list[Example]:
    return [parse_record({"prompt": w, "demonstration": w.upper()}, f"f:{i}") for i, w in enumerate(words, 1)]


def test_over_length_is_dropped_and_counted_never_cut(tokenizer: Any) -> None:
    examples = records("a", "bb" * 20, "ccc", "d" * 11, "e" * 12)
    fixed = len(encode_chat(tokenizer, [user("")], "w"))
    data = tokenize(examples, tokenizer, (257,), DataConfig(max_prompt_tokens=fixed + 11), TeacherConfig())
    assert data.dropped == 2
    assert [len(e.prompt) - fixed for e in data.examples] == [1, 3, 11]
    assert all(
        e.prompt == encode_chat(tokenizer, x.messages, "w")
        for e, x in zip(data.examples, [examples[i] for i in (0, 2, 3)], strict=True)
    )


def test_the_teacher_has_a_budget_of_its_own(tokenizer: Any) -> None:
    examples = records("a", "b" * 30)
    whole = tokenize(examples, tokenizer, (257,), DataConfig(), TeacherConfig(context="as_turns"))
    limit = len(whole.examples[0].teacher_prompt)
    short = TeacherConfig(context="as_turns", max_prompt_tokens=limit)
    data = tokenize(examples, tokenizer, (257,), DataConfig(), short)
    assert (data.dropped, data.examples) == (1, whole.examples[:1])
    strict = DataConfig(over_length="error")
    with pytest.raises(SdftError, match=rf"f:2: prompt of \d+ tokens is over teacher.max_prompt_tokens = {limit}"):
        tokenize(examples, tokenizer, (257,), strict, short)
    with pytest.raises(SdftError, match=r"f:1: prompt of \d+ tokens is over data.max_prompt_tokens = 3"):
        tokenize(examples, tokenizer, (257,), DataConfig(over_length="error", max_prompt_tokens=3), short)
    with pytest.raises(SdftError, match="all 2 records are over the length budget"):
        tokenize(examples, tokenizer, (257,), DataConfig(max_prompt_tokens=3), short)


def test_sft_target_is_an_answer_to_this_request(tokenizer: Any) -> None:
    def target(**record: Any) -> str:
        example = parse_record({"prompt": "p"} | record, "f:1")
        data = tokenize([example], tokenizer, (257,), DataConfig(), TeacherConfig())
        return tokenizer.decode(data.examples[0].target, skip_special_tokens=True)

    other = {"prompt": "q", "response": "r"}
    assert target(demonstration=[other, "mine"]) == "mine"
    assert target(demonstration=[other], answer=["a", "b"]) == "a"
    with pytest.raises(SdftError, match="f:1: no demonstration answers this request and 'answer' is missing"):
        target(demonstration=[other])
    with pytest.raises(SdftError, match="f:1: 'demonstration' is missing"):
        target(answer="a")


def test_digest_tells_data_apart(tokenizer: Any) -> None:
    def digest(examples: list[Example], turns: int = 2) -> str:
        return tokenize(
            examples, tokenizer, (257,), DataConfig(), TeacherConfig(context="as_turns", turns=turns)
        ).digest

    assert digest(records("a", "b")) == digest(records("a", "b"))
    assert (
        len({digest(records("a", "b")), digest(records("b", "a")), digest(records("a")), digest(records("a", "b"), 1)})
        == 4
    )


# Order.


@given(size=st.integers(1, 40), batch=st.integers(1, 17), seed=st.integers(0, 5))
def test_every_epoch_is_a_permutation(size: int, batch: int, seed: int) -> None:
    steps = -(-3 * size // batch)
    picked = [i for step in range(steps) for i in batch_indices(size, batch, step, seed)]
    assert len(picked) == steps * batch
    for start in range(0, 3 * size, size):
        assert sorted(picked[start : start + size]) == list(range(size))


def test_order_depends_on_epoch_and_seed_only() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        return batch_indices(50, 50, number, seed)

    assert epoch(1, 7) == epoch(1, 7)
    assert epoch(0, 7) != epoch(1, 7) != epoch(1, 8)
    assert epoch(0, 7) != list(range(50))
    assert batch_indices(50, 20, 1, 7) == epoch(0, 7)[20:40]
