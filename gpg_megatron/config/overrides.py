"""a.b=value as a person types it: text stays text, whatever YAML would make of it."""

from __future__ import annotations

import re
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml

from gpg_megatron.config.sections import Config
from gpg_megatron.errors import UserError

_ITEM = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'[^']*'(?=\s*(?:,|$))|[^,]+)""")


def split_override(item: str) -> tuple[str, str]:
    """(a.b, value). Raises UserError: it has another form."""
    if not (found := re.fullmatch(r"(\w+\.\w+)=(.*)", item, re.DOTALL)):
        raise UserError(f"override {item!r}: expected a.b=value, for example policy.lr=1e-6")
    return found[1], found[2]


def is_text(key: str) -> bool:
    """Whether the values of a key are texts, or lists of texts."""
    kind = _type_of(key)
    return kind is str or set(get_args(kind)) == {str, NoneType} or get_args(kind) == (str, ...)


def text_value(key: str, value: str) -> str | list[str] | None:
    """What was typed for a key of texts.

    Every character counts, "#" and ":" too; but a text in quotes is what YAML makes of it, so that
    "\\n" is a line break. In a list, a text with a comma needs them. null, or nothing, is None
    where the key may be None.
    """
    kind = _type_of(key)
    if get_args(kind) == (str, ...) and value.startswith("[") and value.endswith("]"):
        return [_unquoted(item[1].strip()) for item in _ITEM.finditer(value[1:-1])]
    if value in ("", "null") and NoneType in get_args(kind):
        return None
    return _unquoted(value)


def _type_of(key: str) -> Any:
    section, _, name = key.partition(".")
    return get_type_hints(get_type_hints(Config).get(section, Config)).get(name)


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        try:
            return str(yaml.safe_load(text))
        except yaml.YAMLError:
            return text
    return text
