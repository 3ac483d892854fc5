"""The pages under docs/ and the README: every link leads somewhere, the index has every page, the map every file."""

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


def test_the_map_has_every_module() -> None:
    """docs/house.md names every module of both packages, and no file that is not there."""
    named = set(re.findall(r"`((?:sdft|kernels)/[\w/]+\.py)`", (ROOT / "docs" / "house.md").read_text()))
    modules = {
        str(path.relative_to(ROOT))
        for package in ("sdft", "kernels/sdft_kernels")
        for path in (ROOT / package).rglob("*.py")
        if not path.name.startswith("__")
    }
    assert modules - named == set(), "not on the map"
    assert named - modules == set(), "on the map, but not there"
