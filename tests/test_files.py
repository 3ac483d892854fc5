"""Reading JSON lines, and the lock of a folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from sdft.errors import SdftError
from sdft.files import lock, read_json_lines, read_text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_read_json_lines(file: Path) -> None:
    file.write_bytes('{"a": 1, "b": null}\r\n{"text": "one\u2028line"}\n'.encode())
    lines = read_json_lines(file)
    assert [line.row for line in lines] == [{"a": 1, "b": None}, {"text": "one\u2028line"}]
    assert [line.where for line in lines] == [f"{file}:1", f"{file}:2"]


def test_every_kind_of_line_end_ends_a_line(file: Path) -> None:
    for end in (b"\n", b"\r\n", b"\r"):
        file.write_bytes(end.join([b'{"a": 1}', b'{"a": 2}', b'{"a": 3}', b""]))
        assert [line.row for line in read_json_lines(file)] == [{"a": 1}, {"a": 2}, {"a": 3}], end


@pytest.mark.parametrize("content", [b'{"a": 1}', b'{"a": 1}\n', b'{"a": 1}\n\n', b'{"a": 1}\n \n\n  '])
def test_the_end_of_the_file_may_be_blank(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    for allow in (False, True):
        assert [line.row for line in read_json_lines(file, allow_half_line=allow)] == [{"a": 1}]


def test_an_empty_file_has_no_lines(file: Path) -> None:
    file.write_bytes(b"")
    assert read_json_lines(file) == []


BROKEN = [
    (b"{", "not a JSON object on one line (Expecting property name"),
    (b'{"a": 1} {"b": 2}', "not a JSON object on one line (Extra data)"),
    (b"", "empty line; remove it"),
    (b"  ", "empty line; remove it"),
    (b"[1]", "a line must be a JSON object, not list"),
    (b"null", "a line must be a JSON object, not NoneType"),
    (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' is there twice; remove one"),
    (b'{"b": [{"a": 1, "a": 2}]}', "the key 'a' is there twice; remove one"),
    (b'{"a": "\xff"}', "not UTF-8 ("),
    (b'{"a": ' + b"[" * 100_000 + b"}", "nested too deep"),
    (b'{"a": ' + b"1" * 5000 + b"}", "4300 digits"),
]


@pytest.mark.parametrize(("line", "words"), BROKEN)
def test_a_broken_line_is_named(file: Path, line: bytes, words: str) -> None:
    file.write_bytes(b'{"ok": 1}\n' + line + b'\n{"ok": 2}\n')
    with pytest.raises(SdftError) as error:
        read_json_lines(file, allow_half_line=True)  # the line is not the last one
    assert str(error.value).startswith(f"{file}:2: ")
    assert words in str(error.value)
    broken: list[str] = []
    assert [line.row for line in read_json_lines(file, broken=broken)] == [{"ok": 1}, {"ok": 2}]
    assert broken == [str(error.value)]


@pytest.mark.parametrize("half", [b'{"a": 1', b'{"a": "\xc3', b"\x00\x00"])
def test_a_half_written_last_line(file: Path, half: bytes) -> None:
    file.write_bytes(b'{"ok": 1}\n' + half)
    assert [line.row for line in read_json_lines(file, allow_half_line=True)] == [{"ok": 1}]
    with pytest.raises(SdftError, match=r"rows\.jsonl:2: "):
        read_json_lines(file)
    file.write_bytes(b'{"ok": 1}\n' + half + b"\n")  # a whole line that is broken is not a half line
    with pytest.raises(SdftError, match=r"rows\.jsonl:2: "):
        read_json_lines(file, allow_half_line=True)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for read in (read_json_lines, read_text):
        with pytest.raises(SdftError, match=r"data file .*none: cannot be read \(No such file or directory\)"):
            read(tmp_path / "none", "data file")
        with pytest.raises(SdftError, match=r"cannot be read \(Is a directory\)"):
            read(tmp_path)
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(SdftError, match="not UTF-8"):
        read_text(tmp_path / "latin")


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from sdft.files import lock\n"
        "with lock(pathlib.Path(sys.argv[1])) as mine: print(mine, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with lock(tmp_path) as mine:
            assert not mine
        other.kill()
    with lock(tmp_path, wait=True) as mine:
        assert mine
    assert list(tmp_path.iterdir()) == []  # a lock leaves no file behind
