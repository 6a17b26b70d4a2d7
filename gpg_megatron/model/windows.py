"""What config.json says of sliding windows: how far back the tokens of a layer attend.

transformers goes by layer_types where the family declares it, else by sliding_window alone. vLLM
has one window for all layers: it has none where layer_types has any full attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpg_megatron.model.hf_keys import Family
from gpg_megatron.model.json_file import Refusal, shown

FULL, SLIDING = "full_attention", "sliding_attention"
_NAMES = {FULL: FULL, "attention": FULL, SLIDING: SLIDING}
"""In layer_types; the second is an older name of the first."""


def read_window(family: Family, values: Mapping[str, Any]) -> int | None:
    """Tokens that a token attends to, itself included; None: all before it.

    Raises:
        Refusal: layers differ, or the window is of no use.
    """
    window = _window(family, values)
    types = _layer_types(family, values, window)
    if window is None or (types and SLIDING not in types and "layer_types" in family.declared):
        if SLIDING in types:
            raise Refusal("layer_types other than full_attention is not supported")
        return None
    if FULL in types:
        raise Refusal(
            "a sliding window in some layers only (use_sliding_window, max_window_layers, "
            "layer_types) is not supported"
        )
    if window < 1:
        raise Refusal(f"sliding_window is {shown(window)}; expected 1 or more")
    return window


def _window(family: Family, values: Mapping[str, Any]) -> int | None:
    """In force, if there are layers that have it."""
    declared = family.declared
    used = "use_sliding_window" not in declared or values["use_sliding_window"]
    return values["sliding_window"] if used and "sliding_window" in declared else None


def _layer_types(family: Family, values: Mapping[str, Any], window: int | None) -> Sequence[str]:
    """Of each layer; empty: the file and the family say nothing. Raises Refusal."""
    number, types = values["num_hidden_layers"], values.get("layer_types")
    if types is None:
        if window is None or family.slides is None:
            return ()
        slides, first = family.slides, values["max_window_layers"]
        return [SLIDING if slides(i, first) else FULL for i in range(number)]
    if any(not isinstance(x, str) or x not in _NAMES for x in types):
        raise Refusal(
            "layer_types other than full_attention and sliding_attention is not supported"
        )
    if len(types) != number:
        raise Refusal(f"layer_types has {len(types)} entries; num_hidden_layers is {number}")
    return [_NAMES[x] for x in types]
