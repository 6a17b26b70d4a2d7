"""The configurations that come with the package, by their names."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "shipped"
"""In the repository a link to configs/; a build copies what is behind it."""


def shipped_configs() -> dict[str, Path]:
    """Name, as demo_cpu, -> file."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def find_config(path: str | Path) -> Path:
    """The file of that path; a name without folder and suffix that is no file is a shipped one."""
    found = Path(path)
    return found if found.is_file() else shipped_configs().get(str(path), found)
