"""Keys that name files: ~ and $VARIABLES in them are those of the shell."""

from __future__ import annotations

import os
from dataclasses import field, fields, replace
from typing import Any, TypeVar

_T = TypeVar("_T")
_METADATA = "path"


def file_path(default: _T) -> _T:
    """A dataclass field whose text, or texts, name files."""
    return field(default=default, metadata={_METADATA: True})


def expanded(config: Any) -> Any:
    """A Config with the paths of all sections written out."""
    sections = {}
    for section in fields(config):
        values = getattr(config, section.name)
        named = {
            key.name: _expand(getattr(values, key.name))
            for key in fields(values)
            if _METADATA in key.metadata
        }
        sections[section.name] = replace(values, **named)
    return replace(config, **sections)


def _expand(value: Any) -> Any:
    if isinstance(value, str):
        return os.path.expanduser(os.path.expandvars(value))
    return tuple(map(_expand, value)) if isinstance(value, tuple) else value
