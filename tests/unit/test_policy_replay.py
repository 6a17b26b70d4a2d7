"""Router replay in one router, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from gpg_megatron.policy.replay import RouterReplay

LOGITS = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [0.0, 5.0, 1.0, 2.0]])
NOBODY = [-1, -1]


def route(
    experts: list[list[int]] | None,
    tally: torch.Tensor | None = None,
    chooser: object = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, weights and choice [3 tokens, 4 experts]."""
    tally = torch.zeros(2, dtype=torch.float64) if tally is None else tally
    replay = RouterReplay(tally, chooser)
    if experts is not None:
        replay.experts = torch.tensor(experts, dtype=torch.int16)
    logits = LOGITS.clone().requires_grad_()
    weights, chosen = topk_routing_with_score_function(logits, 2, router_replay=replay, **options)
    return logits, weights, chosen


def chosen_of(chosen: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in chosen]


def test_given_experts_are_chosen_and_the_router_chooses_the_rest() -> None:
    tally = torch.zeros(2, dtype=torch.float64)
    _, weights, chosen = route([[3, 0], [3, 2], NOBODY], tally)
    assert chosen_of(chosen) == [[0, 3], [2, 3], [1, 3]]
    # softmax over the logits of the two
    for row, ours, first, second in ((0, (0, 3), 4, 1), (1, (3, 2), 4, 3), (2, (1, 3), 5, 2)):
        a = 1 / (1 + math.exp(second - first))
        assert weights[row, list(ours)].tolist() == pytest.approx([a, 1 - a])
    # of the four that were given, 3 is not among what the first token's router prefers
    assert tally.tolist() == [1, 4]


def test_what_it_would_have_chosen_anyway_changes_nothing() -> None:
    _, weights, chosen = route([[0, 1], [3, 2], [1, 3]])
    _, alone, own = route(None)
    assert torch.equal(weights, alone) and torch.equal(chosen, own)


def test_the_gradient_reaches_the_logits_of_the_given_experts_alone() -> None:
    logits, weights, _ = route([[3, 0], [1, 0], NOBODY])
    weights.square().sum().backward()
    assert logits.grad is not None
    assert chosen_of(logits.grad != 0) == [[0, 3], [0, 1], [1, 3]]


def test_sigmoids_with_a_bias_and_groups() -> None:
    """The bias chooses and does not weigh; what is given need not lie within a group."""
    bias = torch.tensor([0.0, 0.0, 0.0, 9.0])
    options: dict[str, Any] = {
        "score_function": "sigmoid",
        "expert_bias": bias,
        "num_groups": 2,
        "group_topk": 1,
        "scaling_factor": 2.0,
    }
    _, weights, chosen = route([[0, 2], NOBODY, NOBODY], **options)
    assert chosen_of(chosen) == [[0, 2], [2, 3], [2, 3]]
    a, b = torch.sigmoid(LOGITS[0, [0, 2]]).tolist()
    assert weights[0, [0, 2]].tolist() == pytest.approx([2 * a / (a + b), 2 * b / (a + b)])


def test_the_rest_is_chosen_as_the_model_does_without_replay() -> None:
    class Last:
        """The two last experts."""

        def get_replay_topk(
            self, scores: torch.Tensor, k: int, *_: object, default_compute_topk: object
        ) -> tuple[torch.Tensor, torch.Tensor]:
            last = torch.arange(4 - k, 4).expand(len(scores), k)
            return scores.gather(1, last), last

    tally = torch.zeros(2, dtype=torch.float64)
    _, _, chosen = route([[0, 1], NOBODY, NOBODY], tally, Last())
    assert chosen_of(chosen) == [[0, 1], [2, 3], [2, 3]]
    assert tally.tolist() == [2, 2]
    assert chosen_of(route(None, chooser=Last())[2]) == [[2, 3]] * 3


def test_passes_without_a_gradient_are_not_counted() -> None:
    tally = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        route([[3, 0], [3, 2], NOBODY], tally)
    assert not tally.any()
