"""The rooms of the house and the doors between them.

Two tables say which room may import which room, and which rooms may know which library. The
test reads the syntax trees, so imports inside functions and behind conditions count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError
from pathlib import Path

import pytest

from tests.import_graph import (
    PACKAGES,
    REPOSITORY,
    file_graph,
    imported_modules,
    module_name,
    picture,
    place_of,
    room_graph,
    room_of,
    source_files,
)

MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60
EVERYTHING = frozenset({"*"})
OBJECTS = frozenset({"types", "shapes", "errors", "config"})
USERS_OWN = frozenset({"answers", "plugins"})

# Room -> the rooms that it may import. Those that wire the others may import all of them.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "types": frozenset(),
    "shapes": frozenset(),
    "errors": frozenset(),
    "answers": frozenset(),
    "plugins": frozenset({"errors"}),
    "config": frozenset({"errors"}),
    "host": frozenset({"types", "errors"}),
    "model": OBJECTS,
    # gpg-data lists the reference answers that their own scorer does not accept; a tokenizer's
    # files are read as the model's other files are.
    "data": OBJECTS | USERS_OWN | {"reward", "model"},
    "reward": OBJECTS | USERS_OWN,
    "algorithm": OBJECTS,
    "batching": OBJECTS | {"algorithm", "model"},
    "layout": OBJECTS | {"model"},
    "placement": OBJECTS | {"model"},
    "rollout": OBJECTS,
    "observe": OBJECTS,
    "bridge": OBJECTS | {"layout", "model", "host"},
    "checkpoint": OBJECTS | {"layout", "model"},
    "policy": OBJECTS | {"model", "algorithm", "layout", "checkpoint", "host"},
    # bridge: the name of the worker extension, which prepares an engine's process on any run;
    # placement: how much an engine may do at once follows from its cache.
    "evaluation": OBJECTS
    | {"data", "reward", "rollout", "model", "host", "layout", "bridge", "placement"},
    "demo": frozenset({"errors", "data", "model"}),
    "loop": EVERYTHING,
    "start": EVERYTHING,
    "checkpoint_convert": OBJECTS | {"model", "batching", "layout", "checkpoint", "policy", "host"},
}

# Library -> the only rooms, or files of a room, that may know it.
KNOWN_BY: dict[str, frozenset[str]] = {
    "omegaconf": frozenset({"config.loading"}),
    "megatron": frozenset({"policy"}),
    "vllm": frozenset({"rollout", "bridge.vllm_worker", "bridge.install"}),
    "ray": frozenset({"rollout"}),
    "datasets": frozenset({"data"}),
    "wandb": frozenset({"observe"}),
}

# Rooms, or files, of mathematics and plain objects: beyond the standard library, these and no more.
ONLY_LIBRARIES: dict[str, frozenset[str]] = {
    "types": frozenset({"numpy", "torch"}),
    "shapes": frozenset(),
    "errors": frozenset(),
    "answers": frozenset(),
    "plugins": frozenset(),
    "config": frozenset({"omegaconf", "yaml"}),
    "model": frozenset({"huggingface_hub"}),
    "algorithm": frozenset({"torch"}),
    "batching": frozenset({"numpy", "torch"}),
    "placement": frozenset(),
    "layout.boxes": frozenset(),
    "layout.families": frozenset(),
    "layout.rows": frozenset(),
    "layout.topology": frozenset(),
    "bridge.plan": frozenset(),
    "bridge.forecast": frozenset(),
    "evaluation.metrics": frozenset(),
}


def is_forbidden(place: str, imported: str) -> bool:
    """Whether the file at a place may not import the module of this dotted name."""
    room = room_of(place)
    library = imported.partition(".")[0]
    if library in PACKAGES:
        target = room_of(place_of(imported))
        outside = target in ("", "__version__", room)
        return not outside and not MAY_IMPORT[room] & {target, "*"}
    if library in sys.stdlib_module_names:
        return False
    allowed = [only for x, only in ONLY_LIBRARIES.items() if _is_within(place, x)]
    if allowed and library not in allowed[0]:
        return True
    known_by = KNOWN_BY.get(library)
    return known_by is not None and not any(_is_within(place, x) for x in known_by)


def _is_within(place: str, room_or_file: str) -> bool:
    return f"{place}.".startswith(f"{room_or_file}.")


def violations(source: str, path: str) -> list[str]:
    """Broken rules of one file, each as "file:line ..."."""
    tree = ast.parse(source, filename=path)
    place = place_of(module_name(path))
    if path.endswith("__init__.py"):
        found = [f"{path}:{x.lineno} has a side effect" for x in tree.body if not _is_inert(x)]
        if not place:
            return found
    else:
        found = []
    if room_of(place) not in MAY_IMPORT:
        return [*found, f"{path}:1 is a room without a row in MAY_IMPORT"]
    return found + [
        f"{path}:{line} imports {imported}, which room {room_of(place)} may not"
        for line, imported in imported_modules(tree, path)
        if is_forbidden(place, imported)
    ]


def _is_inert(statement: ast.stmt) -> bool:
    """A docstring or the version."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Assign) and (
        [ast.unparse(target) for target in statement.targets] == ["__version__"]
        and isinstance(statement.value, ast.Constant)
    )


def judged_files() -> list[Path]:
    """Those of the product; a benchmark may use whatever it measures."""
    return [file for file in source_files() if "benchmarks" not in file.parts]


def test_no_file_breaks_the_rules() -> None:
    assert len(judged_files()) > 3
    broken = [
        line
        for file in judged_files()
        for line in violations(
            file.read_text(encoding="utf-8"), file.relative_to(REPOSITORY).as_posix()
        )
    ]
    assert not broken, "\n" + "\n".join(broken)


def test_there_is_no_circle_of_files_or_rooms() -> None:
    files = file_graph()
    assert len(picture(files)) == len(files)
    assert picture(room_graph(files))


def test_a_circle_is_caught() -> None:
    with pytest.raises(CycleError):
        picture({"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a")})


def test_the_top_of_the_house_is_small() -> None:
    top = sorted(path.name for path in (REPOSITORY / "gpg_megatron").glob("*.py"))
    assert top == ["__init__.py", "answers.py", "errors.py", "plugins.py", "shapes.py", "types.py"]


def test_files_and_functions_are_short() -> None:
    long = []
    for file in judged_files():
        source = file.read_text(encoding="utf-8")
        name = file.relative_to(REPOSITORY).as_posix()
        if (n := source.count("\n")) > MAX_FILE_LINES:
            long.append(f"{name}: {n} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n = (node.end_lineno or 0) - node.lineno + 1
                if n > MAX_FUNCTION_LINES:
                    long.append(f"{name}:{node.lineno} {node.name}: {n} lines")
    assert not long, "\n" + "\n".join(long)


def test_every_folder_of_modules_is_a_package() -> None:
    without = {
        file.parent.relative_to(REPOSITORY).as_posix()
        for file in source_files()
        if not (file.parent / "__init__.py").exists()
    }
    assert not without, f"no __init__.py in {sorted(without)}: they would not be installed"


@pytest.mark.parametrize(
    ("path", "source", "imported"),
    [
        ("gpg_megatron/policy/step.py", "import gpg_megatron.rollout", "gpg_megatron.rollout"),
        ("gpg_megatron/policy/step.py", "from gpg_megatron import rollout", "gpg_megatron.rollout"),
        ("gpg_megatron/policy/step.py", "from ..rollout import x", "gpg_megatron.rollout.x"),
        ("gpg_megatron/policy/__init__.py", "from .. import rollout", "gpg_megatron.rollout"),
        ("gpg_megatron/reward/pool.py", "def f():\n  import ray", "ray"),
        ("gpg_megatron/data/cli.py", "from omegaconf import OmegaConf", "omegaconf.OmegaConf"),
        ("gpg_megatron/loop/trainer.py", "import megatron.core", "megatron.core"),
        ("gpg_megatron/config/rules.py", "import omegaconf", "omegaconf"),
        ("gpg_megatron/layout/boxes.py", "import torch", "torch"),
        ("gpg_megatron/bridge/plan.py", "import vllm", "vllm"),
        ("gpg_megatron/bridge/receiver.py", "import vllm", "vllm"),
        ("gpg_megatron/algorithm/loss.py", "import numpy", "numpy"),
        ("gpg_megatron/observe/x.py", "import importlib as i\ni.import_module('vllm.x')", "vllm.x"),
        ("checkpoint_convert/verify.py", "import gpg_megatron.rollout", "gpg_megatron.rollout"),
        ("gpg_megatron/data/x.py", "import benchmarks.loop", "benchmarks.loop"),
    ],
)
def test_a_forbidden_import_is_caught(path: str, source: str, imported: str) -> None:
    room = room_of(place_of(module_name(path)))
    line = 1 + source.count("\n")
    message = f"{path}:{line} imports {imported}, which room {room} may not"
    assert message in violations(source, path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gpg_megatron/policy/step.py", "from gpg_megatron.host import device\nimport megatron"),
        ("gpg_megatron/policy/step.py", "from . import model\nfrom .model import build"),
        ("gpg_megatron/bridge/vllm_worker.py", "import vllm"),
        ("gpg_megatron/bridge/vllm_worker/engine.py", "import vllm"),
        ("gpg_megatron/loop/x.py", "import gpg_megatron.rollout\nimport gpg_megatron.policy"),
        ("gpg_megatron/observe/loggers.py", "import wandb\nfrom gpg_megatron import __version__"),
        ("gpg_megatron/algorithm/loss.py", "import math, torch\nfrom ..types import TrainSample"),
        ("gpg_megatron/__init__.py", '"""Words."""\n__version__ = "1"'),
    ],
)
def test_an_allowed_import_passes(path: str, source: str) -> None:
    assert violations(source, path) == []


def test_a_room_without_a_row_is_caught() -> None:
    assert violations("", "gpg_megatron/attic/box.py") == [
        "gpg_megatron/attic/box.py:1 is a room without a row in MAY_IMPORT"
    ]


@pytest.mark.parametrize("source", ["import os", "x = 1", "__version__ = f()", "print()"])
def test_a_package_with_a_side_effect_is_caught(source: str) -> None:
    assert violations(source, "gpg_megatron/__init__.py") == [
        "gpg_megatron/__init__.py:1 has a side effect"
    ]


BLOCK_AND_IMPORT = """
import importlib, sys
BLOCKED = {"ray", "vllm", "megatron", "torch", "transformers", "omegaconf"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Block())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_packages_import_without_heavy_libraries() -> None:
    packages = [
        module_name(x.relative_to(REPOSITORY).as_posix())
        for x in source_files()
        if x.name == "__init__.py"
    ]
    assert "gpg_megatron" in packages
    done = subprocess.run(
        [sys.executable, "-c", BLOCK_AND_IMPORT, *packages],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
