"""What config.json says of the rotary angles: their base, and how they are scaled.

Of the kinds in transformers' modeling_rope_utils.py those that vLLM computes alike: plain, linear,
llama3 and yarn. policy/rope.py computes the angles.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpg_megatron.model.json_file import Refusal, plain, shown
from gpg_megatron.shapes import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

DEFAULT_THETA = 10000.0
ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Number:
    """A key of a kind's object."""

    types: tuple[type, ...] = (int, float)
    at_least: float | None = None
    """None: above 0."""
    default: float | None = None
    """None: the key must be there."""


_FACTOR = _Number(at_least=1.0)
_LENGTH = _Number(types=(int,))
_WORDS: dict[tuple[type, ...], str] = {
    (int, float): "a number",
    (int,): "a whole number (without point or quotes)",
    (float,): "a number with a point",
}
KINDS: dict[str, dict[str, _Number]] = {
    "default": {},
    # vLLM takes a whole number for a list of factors, and fails.
    "linear": {"factor": _Number(types=(float,), at_least=1.0)},
    "llama3": {
        "factor": _FACTOR,
        "low_freq_factor": _Number(),
        "high_freq_factor": _Number(),
        ORIGINAL: _LENGTH,
    },
    "yarn": {
        "factor": _FACTOR,
        "beta_fast": _Number(default=32),
        "beta_slow": _Number(default=1),
        ORIGINAL: _LENGTH,
    },
}
"""The kinds, and the numbers that each reads."""
YARN_ATTENTION = ("attention_factor", "mscale", "mscale_all_dim", "truncate")
PART = "partial_rotary_factor"
KNOWN = {"rope_type", "type", "rope_theta", PART}


def unread(raw: Mapping[str, Any]) -> list[str]:
    """The keys of the object that have no effect, under their full names."""
    name, rope = _rope(raw)
    kind = _kind(rope)
    known = KNOWN | KINDS[kind].keys() | set(YARN_ATTENTION if kind == "yarn" else ())
    return [f"{name}.{key}" for key in sorted(rope.keys() - known)]


def without(raw: Mapping[str, Any], keys: frozenset[str]) -> Mapping[str, Any]:
    """The file without some keys of the object that describes the rotary embedding.

    Raises:
        Refusal: it is no object.
    """
    name, rope = _rope(raw)
    kept = {key: value for key, value in rope.items() if key not in keys}
    return raw if kept == rope else {**raw, name: kept}


def read_rope(
    raw: Mapping[str, Any], max_position_embeddings: int
) -> tuple[float, RopeScaling | None]:
    """The base of the angles, and how they are scaled; None: not at all.

    Raises:
        Refusal: another kind, or a value that transformers or the engine cannot use.
    """
    name, rope = _rope(raw)
    kind = _kind(rope)
    for key, value in rope.items():
        # Angles by position in an image, or by kind of layer.
        if key.endswith("_section") or isinstance(value, dict):
            raise Refusal(f"{name}.{plain(key)} is not supported")
    theta = rope.get("rope_theta", raw.get("rope_theta", DEFAULT_THETA))
    if not _is_number(theta) or not 0 < theta <= sys.float_info.max:
        raise Refusal(f"rope_theta is {shown(theta)}; expected a number above 0")
    found = {ORIGINAL: max_position_embeddings, **rope}
    if ORIGINAL in KINDS[kind] and raw.get(ORIGINAL, found[ORIGINAL]) != found[ORIGINAL]:
        # transformers' functions go by the former; its configuration object, which the engine
        # reads, has the latter.
        raise Refusal(
            f"{ORIGINAL} is {shown(raw[ORIGINAL])} in the file and {shown(found[ORIGINAL])} in its "
            f"{name}; expected the same"
        )
    numbers = {key: _number(name, key, row, found) for key, row in KINDS[kind].items()}
    scaling = _scaling(name, kind, theta, numbers, rope, max_position_embeddings)
    return float(theta), scaling


def read_rotary_dim(raw: Mapping[str, Any], usual: float | None, head_dim: int) -> int | None:
    """How many elements of a head are rotated; None: all.

    Args:
        usual: the part where the file does not say it; None: the family rotates all.

    Raises:
        Refusal: a part that the family has not, or that is no even number of elements.
    """
    name, rope = _rope(raw)
    part = rope.get(PART, 1 if usual is None else raw.get(PART, usual))
    if usual is None:
        # transformers' code of these families would fail.
        if not _is_number(part) or part != 1:
            raise Refusal(f"{name}.{PART} other than 1 is not supported")
        return None
    name = f"{name}.{PART}" if PART in rope else PART
    if not _is_number(part) or not 0 < part <= 1 or int(head_dim * part) % 2:
        raise Refusal(
            f"{name} is {shown(part)}; expected a number above 0 and up to 1 that makes an even "
            f"number of a head's {head_dim} elements"
        )
    return int(head_dim * part)


def _rope(raw: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(key, value) of what describes the rotary embedding: the older name goes first.

    As convert_rope_params_to_dict in transformers' modeling_rope_utils.py. Raises Refusal.
    """
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(name) or {}
    if not isinstance(rope, dict):
        raise Refusal(f"{name} is {shown(rope)}; expected an object or null")
    return name, rope


def _kind(rope: Mapping[str, Any]) -> str:
    """Raises Refusal."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise Refusal(f"rope type {plain(kind)} is not supported")
    return kind


def _number(name: str, key: str, row: _Number, found: Mapping[str, Any]) -> float:
    """Raises Refusal."""
    if key not in found and row.default is None:
        raise Refusal(f"{name} has no {key}")
    value = found.get(key, row.default)
    least = row.at_least
    fits = type(value) in row.types and 0 < value <= sys.float_info.max
    if not fits or (least is not None and value < least):
        bound = "above 0" if least is None else f"of {least:g} or more"
        raise Refusal(f"{name}.{key} is {shown(value)}; expected {_WORDS[row.types]} {bound}")
    return float(value)


def _scaling(
    name: str,
    kind: str,
    theta: float,
    numbers: Mapping[str, float],
    rope: Mapping[str, Any],
    max_position_embeddings: int,
) -> RopeScaling | None:
    """Raises Refusal."""
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=numbers["factor"])
    factor, original = numbers["factor"], int(numbers[ORIGINAL])
    if kind == "llama3":
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        if low >= high:
            raise Refusal(f"{name}.low_freq_factor {low:g} is not below high_freq_factor {high:g}")
        return Llama3Scaling(
            factor=factor, low_freq_factor=low, high_freq_factor=high, original_length=original
        )
    if factor * original < max_position_embeddings:
        raise Refusal(
            f"{name}: factor {factor:g} times {ORIGINAL} {original} is less than "
            f"max_position_embeddings {max_position_embeddings}, and the engine goes no further"
        )
    if theta <= 1:
        raise Refusal(f"rope_theta is {theta:g}; expected a number above 1 for yarn")
    if numbers["beta_fast"] < numbers["beta_slow"]:
        raise Refusal(f"{name}.beta_fast is below beta_slow")
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise Refusal(f"{name}.truncate is {shown(truncate)}; expected true or false")
    return YarnScaling(
        factor=factor,
        original_length=original,
        beta_fast=numbers["beta_fast"],
        beta_slow=numbers["beta_slow"],
        truncate=truncate,
        attention_factor=_attention_factor(name, factor, rope),
    )


def _attention_factor(name: str, factor: float, rope: Mapping[str, Any]) -> float:
    """What cosine and sine are multiplied by (arXiv 2309.00071, section 3.4). Raises Refusal."""
    given = {key: rope.get(key) for key in YARN_ATTENTION[:3]}
    for key, value in given.items():
        if value is not None and not (_is_number(value) and 0 < value <= sys.float_info.max):
            raise Refusal(f"{name}.{key} is {shown(value)}; expected a number above 0 or null")
    own, mscale, mscale_all_dim = given.values()
    if own is not None:
        return float(own)
    if mscale and mscale_all_dim:
        return _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
