"""Which experts a token goes to where it may go to some groups only, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpg_megatron.policy.routing import _BestGroups, router_options
from gpg_megatron.shapes import GroupRouting, MoEShape

# Three groups of two experts. The first has the best score, the second the best sum.
SCORES = torch.tensor([[0.4, 0.0, 0.25, 0.3, 0.05, 0.0], [0.0, 0.1, 0.2, 0.0, 0.35, 0.35]])


@pytest.mark.parametrize(
    ("n_best", "n_groups", "chosen"),
    [
        (1, 1, [[0, 1], [4, 5]]),  # DeepSeek-V2
        (2, 1, [[2, 3], [4, 5]]),  # DeepSeek-V3
        (1, 2, [[0, 3], [4, 5]]),
    ],
)
def test_a_group_counts_by_its_best_scores(
    n_best: int, n_groups: int, chosen: list[list[int]]
) -> None:
    values, experts = _BestGroups(n_best).get_replay_topk(SCORES, 2, 3, n_groups, None)
    assert experts.sort().values.tolist() == chosen
    torch.testing.assert_close(values, SCORES.gather(1, experts))


def test_more_experts_than_groups_have_best_scores() -> None:
    """Three of two groups, as their scores say: no number of each is fixed."""
    _, experts = _BestGroups(2).get_replay_topk(SCORES, 3, 3, 2, None)
    assert experts.sort().values.tolist() == [[0, 2, 3], [2, 4, 5]]


def test_the_routers_of_deepseek_v2_and_v3() -> None:
    routing = GroupRouting(has_bias=False, n_groups=8, chosen_groups=3, scale=16.0)
    moe = MoEShape(
        num_experts=160,
        experts_per_token=6,
        ffn_size=8,
        shared_ffn_size=16,
        renormalised=False,
        routing=routing,
    )
    v2 = router_options(moe)
    assert v2["moe_router_pre_softmax"] and "moe_router_enable_expert_bias" not in v2
    assert v2["moe_router_topk_scaling_factor"] == 16.0
    assert (v2["moe_router_num_groups"], v2["moe_router_group_topk"]) == (8, 3)
    v3 = router_options(replace(moe, renormalised=True, routing=replace(routing, has_bias=True)))
    assert v3["moe_router_score_function"] == "sigmoid" and v3["moe_router_enable_expert_bias"]
