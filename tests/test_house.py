"""Imports follow the data through a step: a room imports what stands before it in ORDER, and nothing after it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms (folders) and single modules of sdft/, each before whatever may import it. Neither of two on one line may import
# the other.
ORDER = [
    ["errors", "methods", "parallel", "device"],
    ["files"],
    ["config"],
    ["data"],
    ["model"],
    ["rollout"],
    ["score"],
    ["loss"],
    ["update"],
    ["evaluation"],
    ["training", "planning"],
    ["study"],
    ["api"],
    ["cli"],
    ["__main__"],
    ["integrations"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
KERNELS = "sdft_kernels"
MODULES = {
    ".".join(("sdft", *path.relative_to(ROOT / "sdft").with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted((ROOT / "sdft").rglob("*.py"))
}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those within functions included; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def imported_modules(module: str) -> Iterator[tuple[int, str]]:
    """(line, module) of what a module of sdft imports of sdft."""
    for line, name in imports(MODULES[module]):
        if name.split(".")[0] == "sdft":
            while name not in MODULES:
                name = name.rpartition(".")[0]
            if name != module:
                yield line, name


def room(module: str) -> str:
    return module.split(".")[1]


def wrong_way(source: str, target: str) -> bool:
    """Whether a module of room `source` must not import one of room `target`."""
    return source != target and LEVEL[target] >= LEVEL[source]


def test_every_room_has_its_place() -> None:
    assert {room(module) for module in MODULES if module != "sdft"} == set(LEVEL)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "sdft"])
def test_imports_go_one_way(module: str) -> None:
    found = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}"
        for line, name in imported_modules(module)
        if name != "sdft" and wrong_way(room(module), room(name))
    ]
    assert not found, "\n".join(found)


def test_no_circles() -> None:
    """Modules, those of one room too, import each other in one direction; an import in a function counts."""
    graph = {module: {name for _, name in imported_modules(module)} for module in MODULES if module != "sdft"}
    while leaves := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in leaves:
            del graph[module]
    # Every module that is left is in a circle or imports one.
    assert not graph, {module: sorted(targets & graph.keys()) for module, targets in graph.items()}


def test_the_kernels_import_nothing_of_the_trainer() -> None:
    for path in (ROOT / "kernels" / KERNELS).rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = [n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names]
        names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0]
        assert not {name.split(".")[0] for name in names} & {"sdft", "transformers", "peft", "numpy"}, path
