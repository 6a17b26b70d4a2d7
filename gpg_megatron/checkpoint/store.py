"""The checkpoints of a run: checkpoints/step_N/, found, pruned and removed."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from gpg_megatron.checkpoint.marker import MARKER, read_marker
from gpg_megatron.errors import UserError

TEMPLATES = "additional_chat_templates"
"""Folder of a Hugging Face directory."""


@dataclass(frozen=True, slots=True)
class Saved:
    """One checkpoint of a run."""

    path: Path
    step: int
    complete: bool


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"step_{step}"


def list_saved(root: Path) -> list[Saved]:
    """All checkpoints of a run, complete or not, oldest first."""
    found = []
    for path in root.glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and path.is_dir():
            found.append(Saved(path, int(match[1]), (path / MARKER).exists()))
    return sorted(found, key=lambda saved: saved.step)


def find_resume(root: Path, wanted: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that checkpoint.resume asks for, and a warning for each one passed over.

    Args:
        root: the run's checkpoints.
        wanted: "auto": the newest complete checkpoint of the run, if there is one; "never":
            none; otherwise the path of a checkpoint.

    Raises:
        UserError: "never" in a run that has checkpoints, which would be replaced.
    """
    saved = list_saved(root)
    if wanted == "never" and saved:
        raise UserError(
            f"checkpoint.resume=never, but {root} has checkpoints; expected another "
            f"trainer.output_dir, or checkpoint.resume=auto"
        )
    if wanted not in ("auto", "never"):
        return Path(wanted), []
    warnings: list[str] = []
    for checkpoint in reversed(saved):
        if checkpoint.complete:
            return checkpoint.path, warnings
        warnings.append(f"{checkpoint.path} is incomplete: its save was cut off; it is not used")
    return None, warnings


def prune(root: Path, keep_last: int | None, keep_best: int) -> list[Path]:
    """Remove the complete checkpoints beyond the newest and the best, and older remains.

    Args:
        keep_last: how many of the newest stay; None: all stay.
        keep_best: how many stay for their metric, the highest; of equals the newest.

    Returns:
        what was removed.
    """
    if keep_last is None:
        return []
    saved = list_saved(root)
    complete = [s for s in saved if s.complete]
    metrics = {s.path: read_marker(s.path).metric for s in complete}
    measured = [s for s in complete if metrics[s.path] is not None]
    best = sorted(measured, key=lambda s: (metrics[s.path], s.step), reverse=True)[:keep_best]
    keep = {s.path for s in (*complete[-keep_last:], *best)}
    newest = complete[-1].step if complete else -1
    gone = [s.path for s in saved if s.step < newest and s.path not in keep]
    for path in gone:
        remove(path)
    return gone


def remove(path: Path) -> None:
    """Remove a checkpoint. Cut off half-way it is incomplete, never half a complete one."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)


def relative_files(directory: Path) -> list[str]:
    """Every file below a directory, by its path within it."""
    return sorted(
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    )


def copy_hf_files(source: Path, target: Path) -> None:
    """Carry over what belongs to a Hugging Face model besides its weights: configuration,
    generation settings, tokenizer, chat templates, licence texts."""
    target.mkdir(parents=True, exist_ok=True)
    if (source / TEMPLATES).is_dir():
        copy_hf_files(source / TEMPLATES, target / TEMPLATES)
    for path in sorted(source.iterdir()):
        wanted = path.suffix in (".json", ".txt", ".jinja", ".model", ".md") or path.stem in (
            "LICENSE",
            "NOTICE",
        )
        if path.is_file() and wanted and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
