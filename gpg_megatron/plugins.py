"""Users' own functions and classes, named as FILE.py:NAME."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from gpg_megatron.errors import UserError, users_mistake


def split_spec(spec: str, key: str) -> tuple[Path, str]:
    """(file, name) of "FILE.py:NAME".

    Args:
        key: where the text stands, for the message.

    Raises:
        UserError: another form, or no such file.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise UserError(f"{key} is {spec!r}; expected FILE.py:NAME")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{key}: no such file: {file}")
    return path, name


def load_object(spec: str, key: str) -> Any:
    """Run the file and return what it calls NAME. The file's folder becomes importable.

    Raises:
        UserError: as split_spec, the file fails, or it has no such name.
    """
    path, name = split_spec(spec, key)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    module_spec = importlib.util.spec_from_file_location(f"gpg_user_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None, path
    module = importlib.util.module_from_spec(module_spec)
    # Before it runs: dataclasses and pickle look their module up.
    sys.modules[module_spec.name] = module
    with users_mistake(f"{key}: {path}", Exception, SystemExit):
        module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise UserError(f"{key}: {path} has no {name}")
    return getattr(module, name)
