"""What config.json says of experts that are chosen as DeepSeek-V3 does (arXiv 2412.19437)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpg_megatron.model.hf_keys import MAX_COUNT
from gpg_megatron.model.json_file import Refusal, shown
from gpg_megatron.shapes import MoEShape, SigmoidRouting

BEST_OF_GROUP = 2
"""Scores of a group whose sum is compared with those of other groups."""


def read_routed_experts(values: Mapping[str, Any]) -> MoEShape:
    """Experts of all layers but the first; the shared ones are one MLP of their joint size.

    Raises:
        Refusal: no layer has experts, or they do not fit into their groups.
    """
    if "num_local_experts" in values:
        raise Refusal("num_local_experts beside n_routed_experts is not supported")
    for name in ("n_group", "topk_group", "num_experts_per_tok", "first_k_dense_replace"):
        if values[name] is None:
            raise Refusal(f"{name} is null; expected a whole number")
    layers, dense = values["num_hidden_layers"], values["first_k_dense_replace"]
    if not 0 <= dense < layers:
        raise Refusal(f"first_k_dense_replace is {shown(dense)}; expected 0 to {layers - 1}")
    scale = values["routed_scaling_factor"]
    if not 0 < scale < float("inf"):
        raise Refusal(f"routed_scaling_factor is {shown(scale)}; expected a number above 0")
    return MoEShape(
        num_experts=values["n_routed_experts"],
        experts_per_token=values["num_experts_per_tok"],
        ffn_size=values["moe_intermediate_size"],
        shared_ffn_size=values["n_shared_experts"] * values["moe_intermediate_size"],
        renormalised=True,
        dense_layers=tuple(range(dense)),
        sigmoid=_groups(values, scale),
    )


def read_extra_layers(values: Mapping[str, Any]) -> int:
    """Layers after the last that predict further tokens. Raises Refusal."""
    number: int = values.get("num_nextn_predict_layers", values["num_mtp_layers"])
    if not 0 <= number <= MAX_COUNT:
        raise Refusal(f"num_mtp_layers is {shown(number)}; expected 0 to {MAX_COUNT}")
    return number


def _groups(values: Mapping[str, Any], scale: float) -> SigmoidRouting:
    """Raises Refusal."""
    number, n_groups, chosen = (values[x] for x in ("n_routed_experts", "n_group", "topk_group"))
    per_token = values["num_experts_per_tok"]
    if number % n_groups or number // n_groups < BEST_OF_GROUP:
        raise Refusal(
            f"n_group {n_groups} does not divide n_routed_experts {number} into groups of "
            f"{BEST_OF_GROUP} or more"
        )
    if not chosen <= n_groups or per_token > number // n_groups * chosen:
        raise Refusal(
            f"topk_group is {chosen}; expected at most n_group {n_groups}, and groups with at "
            f"least num_experts_per_tok {per_token} experts"
        )
    if per_token == 1:
        # The only expert would have a constant weight, and its router no gradient.
        raise Refusal("num_experts_per_tok 1 is not supported")
    if chosen < n_groups and per_token != BEST_OF_GROUP * chosen:
        # Megatron adds up as many scores of a group as experts are chosen in it.
        raise Refusal(
            f"num_experts_per_tok other than {BEST_OF_GROUP} * topk_group is not supported"
        )
    return SigmoidRouting(n_groups=n_groups, chosen_groups=chosen, scale=scale)
