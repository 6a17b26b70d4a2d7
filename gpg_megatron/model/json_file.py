"""Read a user's JSON file: an object comes back, or one line says what is wrong with the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Never

from gpg_megatron.errors import UserError

POINTER = "version https://git-lfs"
"""How the file begins that git-lfs leaves in place of one that it has not fetched."""
IS_POINTER = "a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"


class Refusal(Exception):
    """What is wrong with a file: the rest of the line after its name."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Every text in it can be encoded.

    Raises:
        UserError: the file cannot be read or is not such an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    if text.startswith(POINTER):
        raise UserError(f"{path}: {IS_POINTER}")
    try:
        content = json.loads(text, parse_constant=_no_number)
        json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from None
    except UnicodeEncodeError:
        raise UserError(f"{path}: a lone surrogate (\\ud800 to \\udfff) is not text") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except ValueError as error:  # _no_number, and Python's limit on the digits of an integer
        raise UserError(f"{path}: {str(error).partition(';')[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def shown(value: object) -> str:
    """A value as JSON has it, short and on one line."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def plain(value: object) -> str:
    """As `shown`, but a text without its quotes."""
    return shown(value).strip('"')


def _no_number(name: str) -> Never:
    raise ValueError(f"{name} is not a number in JSON")
