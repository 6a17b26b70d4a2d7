"""Who imports whom in gpg_megatron: python -m tests.import_graph prints the picture.

A room is a folder of gpg_megatron, or a file beside them. Imports inside functions and behind
conditions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("gpg_megatron", "checkpoint_convert", "benchmarks")

Graph = Mapping[str, frozenset[str]]
"""Module or room -> those that it imports."""


def source_files() -> list[Path]:
    """Every Python file of the packages."""
    return sorted(file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py"))


def module_name(path: str) -> str:
    """gpg_megatron/bridge/plan.py -> gpg_megatron.bridge.plan; a package is its __init__."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def place_of(module: str) -> str:
    """The dotted place in the house: "bridge.plan"; "" for gpg_megatron itself."""
    return module.removeprefix("gpg_megatron").removeprefix(".")


def room_of(place: str) -> str:
    """The room of a place: "bridge"."""
    return place.partition(".")[0]


def imported_modules(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, importlib.import_module("x") included.

    "from a import b" gives a.b, because b may be a module.
    """
    module = module_name(path)
    package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            argument = node.args[0]
            if called in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value)


def file_graph() -> dict[str, frozenset[str]]:
    """Module -> the modules of the packages that it imports."""
    paths = {f.relative_to(REPOSITORY).as_posix(): f for f in source_files()}
    modules = {module_name(path) for path in paths}
    graph = {}
    for path, file in paths.items():
        names = (n for _, n in imported_modules(ast.parse(file.read_text("utf-8")), path))
        found = {m for n in names for m in (n, n.rpartition(".")[0]) if m in modules}
        graph[module_name(path)] = frozenset(found - {module_name(path), "gpg_megatron"})
    return graph


def room_graph(files: Graph) -> dict[str, frozenset[str]]:
    """Room -> the rooms that its files import."""
    rooms: dict[str, set[str]] = {}
    for module, imported in files.items():
        room = room_of(place_of(module))
        rooms.setdefault(room, set()).update(room_of(place_of(x)) for x in imported)
    outside = {"", "benchmarks"}
    return {
        room: frozenset(found - outside - {room})
        for room, found in rooms.items()
        if room not in outside
    }


def picture(rooms: Graph) -> list[str]:
    """A line for each room, below all that it imports. Raises graphlib.CycleError: a circle."""
    order = list(TopologicalSorter({x: sorted(rooms[x]) for x in sorted(rooms)}).static_order())
    width = max(map(len, order))
    return [
        f"{room:{width}} <- {' '.join(x for x in order if x in rooms[room])}".rstrip(" <-")
        for room in order
    ]


if __name__ == "__main__":
    print("\n".join(picture(room_graph(file_graph()))))
