"""The pages under docs/ and the README: links, the index of the pages, and the map of the source code.

python tests/test_docs.py    # writes the map in docs/house.md
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("**/*.md")])


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not fragment or fragment in anchors(file), f"{page.name}: {target}: no such heading"


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {page for page in pages if f"({page})" not in index} == set()


def map_of_modules() -> str:
    """A table of every module of both packages, with the first sentence of its docstring."""
    lines = ["| file | what it holds |", "|---|---|"]
    for package in ("sdft", "kernels/sdft_kernels"):
        for path in sorted((ROOT / package).rglob("*.py"), key=lambda path: (path.parent, path.name)):
            text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
            name = str(path.relative_to(ROOT)).removesuffix("__init__.py")
            lines.append(f"| `{name}` | {text.replace('|', '&#124;')} |")
    return "\n".join(lines)


HOUSE, BEGIN, END = ROOT / "docs" / "house.md", "<!-- map -->\n", "\n<!-- end of map -->"


def test_the_map_is_true() -> None:
    text = HOUSE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert text == map_of_modules(), "run: python tests/test_docs.py"


if __name__ == "__main__":  # writes the map
    before, _, rest = HOUSE.read_text().partition(BEGIN)
    HOUSE.write_text(before + BEGIN + map_of_modules() + END + rest.partition(END)[2])
