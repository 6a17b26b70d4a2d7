"""What config.json says of experts that are chosen as DeepSeek's models do (arXiv 2405.04434,
2412.19437)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpg_megatron.model.hf_keys import MAX_COUNT
from gpg_megatron.model.json_file import Refusal, shown
from gpg_megatron.shapes import GroupRouting, MoEShape

LEAST_OF_GROUP = 2
"""Experts: of DeepSeek-V3's groups two scores are compared, and of smaller ones the engine has no
groups."""
OTHER_NAMES = ("num_local_experts", "num_experts")
"""Of n_routed_experts in transformers, of one or another family."""


def read_routed_experts(values: Mapping[str, Any], *, has_bias: bool) -> MoEShape:
    """Experts of all layers but the first; the shared ones are one MLP of their joint size.

    Args:
        has_bias: scores are sigmoids with a bias (DeepSeek-V3), whose weights are scaled to sum to
            1; else a softmax, whose weights are not.

    Raises:
        Refusal: no layer has experts, or they do not fit into their groups.
    """
    for name in OTHER_NAMES:
        if name in values:
            raise Refusal(f"{name} beside n_routed_experts is not supported")
    for name in ("n_group", "topk_group", "num_experts_per_tok", "first_k_dense_replace"):
        if values[name] is None:
            raise Refusal(f"{name} is null; expected a whole number")
    layers, dense = values["num_hidden_layers"], values["first_k_dense_replace"]
    if not 0 <= dense < layers:
        raise Refusal(f"first_k_dense_replace is {shown(dense)}; expected 0 to {layers - 1}")
    scale = values["routed_scaling_factor"]
    if not 0 < scale < float("inf"):
        raise Refusal(f"routed_scaling_factor is {shown(scale)}; expected a number above 0")
    if has_bias and values["num_experts_per_tok"] == 1:
        # The only expert would have a constant weight, and its router no gradient.
        raise Refusal("num_experts_per_tok 1 is not supported")
    n_groups, chosen = _groups(values)
    return MoEShape(
        num_experts=values["n_routed_experts"],
        experts_per_token=values["num_experts_per_tok"],
        ffn_size=values["moe_intermediate_size"],
        shared_ffn_size=values["n_shared_experts"] * values["moe_intermediate_size"],
        renormalised=has_bias,
        dense_layers=tuple(range(dense)),
        routing=GroupRouting(
            has_bias=has_bias, n_groups=n_groups, chosen_groups=chosen, scale=scale
        ),
    )


def read_extra_layers(values: Mapping[str, Any]) -> int:
    """Layers after the last that predict further tokens. Raises Refusal."""
    number: int = values.get("num_nextn_predict_layers", values["num_mtp_layers"])
    if not 0 <= number <= MAX_COUNT:
        raise Refusal(f"num_mtp_layers is {shown(number)}; expected 0 to {MAX_COUNT}")
    return number


def _groups(values: Mapping[str, Any]) -> tuple[int, int]:
    """Their number, and that of the chosen. Raises Refusal."""
    number, n_groups, chosen = (values[x] for x in ("n_routed_experts", "n_group", "topk_group"))
    per_token = values["num_experts_per_tok"]
    if number % n_groups or number // n_groups < LEAST_OF_GROUP:
        raise Refusal(
            f"n_group {n_groups} does not divide n_routed_experts {number} into groups of "
            f"{LEAST_OF_GROUP} or more"
        )
    if not chosen <= n_groups or per_token > number // n_groups * chosen:
        raise Refusal(
            f"topk_group is {chosen}; expected at most n_group {n_groups}, and groups with at "
            f"least num_experts_per_tok {per_token} experts"
        )
    if chosen < n_groups and values.get("topk_method") == "greedy":
        # transformers chooses among all experts then, the engine among those of the best groups.
        raise Refusal("topk_method greedy with topk_group below n_group is not supported")
    return n_groups, chosen
