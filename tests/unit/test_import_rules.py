"""The rooms of the house and the doors between them.

Two tables say which room may import which room, and which rooms may know which library. The
test reads the syntax trees, so imports inside functions and behind conditions count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("gpg_megatron", "checkpoint_convert", "benchmarks")
EVERYTHING = frozenset({"*"})
OBJECTS = frozenset({"types", "errors", "config", "algorithm_config"})

# Room -> the rooms that it may import. Those that wire the others may import all of them.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "types": frozenset(),
    "errors": frozenset(),
    "algorithm_config": frozenset({"errors"}),
    # The two are one room: the rules name the types of the sections, at no run time.
    "config": frozenset({"types", "errors", "algorithm_config", "config_rules"}),
    "config_rules": frozenset({"errors", "algorithm_config", "config"}),
    "answers": frozenset(),
    "eval_metrics": frozenset(),
    "plugins": frozenset({"errors"}),
    "hf_config": OBJECTS,
    "memory": OBJECTS | {"hf_config", "placement"},
    "placement": OBJECTS,
    "devices": OBJECTS | {"placement"},
    "handover": EVERYTHING,
    "collectives": OBJECTS,
    "console": OBJECTS,
    "platform": frozenset({"errors"}),
    # gpg-data lists the reference answers that their own scorer does not accept.
    "data": OBJECTS | {"console", "answers", "plugins", "reward"},
    "reward": OBJECTS | {"answers", "plugins"},
    "algorithm": OBJECTS,
    "flops": OBJECTS,
    "planning": OBJECTS | {"flops"},
    "batching": OBJECTS | {"algorithm", "flops", "planning"},
    "policy": OBJECTS | {"hf_config", "collectives", "platform", "algorithm", "checkpoint"},
    "rollout": OBJECTS,
    "checkpoint": OBJECTS,
    "network": frozenset({"errors"}),
    "meeting": frozenset({"errors"}),
    "bridge": OBJECTS | {"hf_config", "collectives", "checkpoint", "network"},
    "observe": OBJECTS,
    "reaper": frozenset({"errors"}),
    "doctor": frozenset({"errors", "console"}),
    "demo": OBJECTS | {"data", "console", "demo_model"},
    "demo_model": OBJECTS | {"data", "demo"},
    "preflight": EVERYTHING,
    "run_checkpoints": EVERYTHING,
    "bad_steps": OBJECTS,
    "group_json": OBJECTS,
    "agreement": OBJECTS,
    "step_metrics": EVERYTHING,
    "collector": EVERYTHING,
    "conductor": EVERYTHING,
    "trainer": EVERYTHING,
    "train": EVERYTHING,
    "launcher": EVERYTHING,
    "evaluate": EVERYTHING,
    "evaluate_cli": EVERYTHING,
    "dry_run": OBJECTS | {"hf_config", "bridge", "memory", "devices"},
    "checkpoint_convert": OBJECTS
    | {
        "hf_config",
        "collectives",
        "console",
        "platform",
        "policy",
        "bridge",
        "batching",
        "checkpoint",
    },
    "benchmarks": EVERYTHING,
}

# Library -> the only rooms, or files of a room, that may know it.
KNOWN_BY: dict[str, frozenset[str]] = {
    "omegaconf": frozenset({"config"}),
    "megatron": frozenset({"platform", "policy"}),
    "vllm": frozenset({"rollout", "bridge.receiver", "bridge.install", "benchmarks"}),
    "ray": frozenset({"rollout"}),
    "datasets": frozenset({"data"}),
    "wandb": frozenset({"observe"}),
}

# Rooms of mathematics and plain objects: beyond the standard library, these and no more.
ONLY_LIBRARIES: dict[str, frozenset[str]] = {
    "types": frozenset({"torch"}),
    "errors": frozenset(),
    "algorithm_config": frozenset(),
    "answers": frozenset(),
    "eval_metrics": frozenset(),
    "plugins": frozenset(),
    "config": frozenset({"omegaconf", "yaml"}),
    "hf_config": frozenset(),
    "memory": frozenset(),
    "placement": frozenset(),
    "devices": frozenset(),
    "algorithm": frozenset({"torch"}),
    "flops": frozenset(),
    "planning": frozenset(),
    "batching": frozenset({"torch"}),
}


def module_name(path: str) -> str:
    """gpg_megatron/bridge/plan.py -> gpg_megatron.bridge.plan; a package is its __init__."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def place_of(module: str) -> str:
    """The dotted place in the house: "bridge.plan"; "" for gpg_megatron itself."""
    return module.removeprefix("gpg_megatron").removeprefix(".")


def room_of(place: str) -> str:
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
    if room in ONLY_LIBRARIES:
        return library not in ONLY_LIBRARIES[room]
    known_by = KNOWN_BY.get(library)
    return known_by is not None and not any(f"{place}.".startswith(f"{x}.") for x in known_by)


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


def source_files() -> list[Path]:
    return sorted(file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py"))


def test_no_file_breaks_the_rules() -> None:
    assert len(source_files()) > 3
    broken = [
        line
        for file in source_files()
        for line in violations(
            file.read_text(encoding="utf-8"), file.relative_to(REPOSITORY).as_posix()
        )
    ]
    assert not broken, "\n" + "\n".join(broken)


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
        ("gpg_megatron/trainer.py", "import megatron.core", "megatron.core"),
        ("gpg_megatron/bridge/plan.py", "import vllm", "vllm"),
        ("gpg_megatron/bridge/receivers.py", "import vllm", "vllm"),
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
        ("gpg_megatron/policy/step.py", "from gpg_megatron.platform import x\nimport megatron"),
        ("gpg_megatron/policy/step.py", "from . import model\nfrom .model import build"),
        ("gpg_megatron/bridge/receiver.py", "import vllm"),
        ("gpg_megatron/bridge/receiver/engine.py", "import vllm"),
        ("gpg_megatron/trainer.py", "import gpg_megatron.rollout\nimport gpg_megatron.policy"),
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
