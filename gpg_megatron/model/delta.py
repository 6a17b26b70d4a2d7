"""What config.json says of gated delta nets: which layers have one, and of what size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpg_megatron.model.hf_keys import Family
from gpg_megatron.model.json_file import Refusal, shown
from gpg_megatron.shapes import DeltaShape

FULL, LINEAR = "full_attention", "linear_attention"
USUAL_INTERVAL = 4
"""Every so many layers one has attention, where the file says nothing."""


def read_delta(family: Family, values: Mapping[str, Any]) -> DeltaShape:
    """The nets of a family that has them.

    Raises:
        Refusal: layers of another kind, or only of one; heads that do not fit.
    """
    keys, heads = values["linear_num_key_heads"], values["linear_num_value_heads"]
    if heads % keys:
        raise Refusal(f"linear_num_key_heads {keys} does not divide linear_num_value_heads {heads}")
    types = _layer_types(values)
    layers = tuple(i for i, kind in enumerate(types) if kind == LINEAR)
    if len(layers) in (0, len(types)):
        # The engine sizes its cache by both.
        raise Refusal(f"layer_types without both of {LINEAR} and {FULL} is not supported")
    return DeltaShape(
        layers=layers,
        key_heads=keys,
        value_heads=heads,
        key_dim=values["linear_key_head_dim"],
        value_dim=values["linear_value_head_dim"],
        kernel=values["linear_conv_kernel_dim"],
        fused=family.fused_delta,
    )


def _layer_types(values: Mapping[str, Any]) -> Sequence[str]:
    """Of each layer. Raises Refusal."""
    number: int = values["num_hidden_layers"]
    types: list[str] | None = values["layer_types"]
    if types is None:
        interval = values.get("full_attention_interval", USUAL_INTERVAL)
        return [LINEAR if (i + 1) % interval else FULL for i in range(number)]
    if any(kind not in (FULL, LINEAR) for kind in types):
        raise Refusal(f"layer_types other than {LINEAR} and {FULL} is not supported")
    if len(types) != number:
        raise Refusal(f"layer_types has {len(types)} entries; num_hidden_layers is {shown(number)}")
    return types
