"""The parts of a report, and the templates that make HTML and Markdown of them.

All text is plain text. The templates' environments escape every value, so neither a section nor a template can forget
it: a model's completion may hold anything.
"""

import base64
import functools
import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Heading:
    kind: ClassVar = "heading"
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    kind: ClassVar = "text"
    text: str


@dataclass(frozen=True)
class Items:
    kind: ClassVar = "items"
    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    kind: ClassVar = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1  # the first columns hold words; the other columns hold numbers and are aligned right


@dataclass(frozen=True)
class Picture:
    kind: ClassVar = "picture"
    name: str  # of its file, without .png
    title: str  # for a reader who cannot see the picture
    png: bytes
    caption: str

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


Block = Heading | Text | Items | Table | Picture


def to_html(blocks: Sequence[Block]) -> str:
    """One HTML file that needs no other file."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    return _environment(one_line).get_template("report.html.jinja").render(blocks=blocks, title=title)


def to_markdown(blocks: Sequence[Block]) -> str:
    """Markdown, with its pictures in the folder report/."""
    marks = {level: Markup("#" * level) for level in (1, 2, 3)}
    return _environment(markdown_text).get_template("report.md.jinja").render(blocks=blocks, marks=marks)


@functools.cache
def _environment(written: Callable[[str], str]) -> Environment:
    """Templates in which `written` and then the escapes of HTML are applied to every value that is not Markup yet."""

    def finalize(value: Any) -> Any:
        return written(value) if type(value) is str else value

    return Environment(
        loader=PackageLoader("sdft.study"),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def markdown_text(text: str) -> Markup:
    """Text that Markdown shows unchanged, on one line: no markup, no HTML, no links, no columns."""
    text = html.escape(one_line(text), quote=False)
    text = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", text)
    return Markup(text.replace("://", "&#58;//").replace("www.", "www&#46;"))


def one_line(text: str) -> str:
    """Text with a sign for each line break, and another sign for characters that UTF-8 or HTML does not allow."""
    text = re.sub(r"\s*[\r\n\x0b\x0c\x85\u2028\u2029]\s*", " ⏎ ", text.strip())
    return re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "�", text)
