"""One bad input: a folder with a run that would start, what is wrong in it, and what is printed."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from tests.import_graph import REPOSITORY
from tests.tiny import make_tiny_model, write_problems

COMMANDS = {
    "gpg-train": ("gpg_megatron.start.train", ("--config", "config.yaml")),
    "gpg-eval": ("gpg_megatron.evaluation.cli", ("--config", "config.yaml")),
    "gpg-data": ("gpg_megatron.data.cli", ()),
    "gpg-convert": ("checkpoint_convert.__main__", ()),
}
"""Command -> its module, and the arguments that every case of it has."""
CONFIG = {
    "data": {"train_files": ["train.jsonl"], "apply_chat_template": False, "max_prompt_length": 16},
    "model": {"path": "model"},
    "rollout": {"max_response_length": 4},
    "trainer": {"output_dir": "run", "device": "cpu"},
}

Content = str | bytes | None | Callable[[Path], object]
"""What a file becomes: a text, bytes, nothing, or what a function makes of its path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row of the page."""

    name: str
    """What is wrong, in words; no two cases have the same."""
    brings: str
    """What the user brings, in Markdown."""
    command: str = "gpg-train"
    arguments: tuple[str, ...] = ()
    files: Mapping[str, Content] = field(default_factory=dict)
    """Path within the folder -> what it is."""
    environment: Mapping[str, str] = field(default_factory=dict)
    shell: str = ""
    """What a shell does before it, as `ulimit -n 64`; then it runs in a process of its own."""


def given(name: str, *arguments: str, command: str = "gpg-train") -> Case:
    """A case of nothing but arguments."""
    shown = code(" ".join(arguments))
    return Case(name=name, brings=shown, command=command, arguments=arguments)


def edited(**changes: object) -> Callable[[Path], object]:
    """A change of some keys of a JSON file; one that becomes None is removed."""

    def edit(path: Path) -> None:
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


def make_folder(folder: Path) -> Path:
    """config.yaml, train.jsonl and model/ of a run that would start."""
    folder.mkdir(parents=True)
    make_tiny_model(folder / "model", num_layers=4)
    write_problems(folder / "train.jsonl", ["1+1=", "2+2="])
    (folder / "config.yaml").write_text(json.dumps(CONFIG))
    return folder


def printed(case: Case, good: Path, folder: Path) -> str:
    """The line that a case prints, in a copy of the good folder. Nothing else may happen.

    Raises:
        AssertionError: more or less than one line, another exit code than 2, a process or a run
            directory.
    """
    shutil.copytree(good, folder)
    for name, content in case.files.items():
        _write(folder / name, content)
    exit_code, out, err = _run_in_shell(case, folder) if case.shell else _run_here(case, folder)
    assert exit_code == 2 and not out, (exit_code, out, err)
    (line,) = filter(str.strip, err.split("\n"))
    assert line.startswith("error: "), line
    assert not (folder / "run").exists(), "something was written"
    line = line.replace(f"{folder}/", "").replace(str(folder), ".")
    line = re.sub(r"[\d.]+ GB are free", "N GB are free", line)
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", line)


def _run_here(case: Case, folder: Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    module, first = COMMANDS[case.command]
    main = importlib.import_module(module).main
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, case.environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _no_process(),
        _no_network(folder),
    ):
        exit_code = main([*first, *case.arguments])
    return exit_code, out.getvalue(), err.getvalue()


def _run_in_shell(case: Case, folder: Path) -> tuple[int, str, str]:
    module, first = COMMANDS[case.command]
    words = [sys.executable, "-m", module, *first, *case.arguments]
    done = subprocess.run(
        ["sh", "-c", f'{case.shell} && exec "$@"', "sh", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def code(text: str) -> str:
    """A text as it is, in a cell of a Markdown table."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}".replace("|", "\\|")


def _write(path: Path, content: Content) -> None:
    if callable(content):
        content(path)
    elif content is None:
        path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def _no_network(folder: Path) -> Iterator[None]:
    """And an empty cache of the Hugging Face Hub."""
    constants = "huggingface_hub.constants"
    with (
        mock.patch(f"{constants}.HF_HUB_OFFLINE", True),
        mock.patch(f"{constants}.HF_HUB_CACHE", str(folder / "hub")),
    ):
        yield


@contextlib.contextmanager
def _no_process() -> Iterator[None]:
    """A reaper is the first process of every run."""
    started = AssertionError("a process was started")
    with contextlib.ExitStack() as patches:
        for module in ("start.world", "host.reaper"):
            name = f"gpg_megatron.{module}.start_reaper"
            patches.enter_context(mock.patch(name, side_effect=started))
        yield
