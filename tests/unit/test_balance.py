"""The balance among experts by hand: load, auxiliary loss, bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gpg_megatron.config.sections import Config, ModelConfig, PolicyConfig
from gpg_megatron.errors import UserError
from gpg_megatron.model.layout_rules import check_policy_layout
from gpg_megatron.policy.balance import Balance, balance_loss, load_of, moved
from gpg_megatron.shapes import GroupRouting, ModelShape, MoEShape

# Five tokens and three experts, two for each token. The first token is of a prompt, the last a
# filler; then come two of one response and one of another.
CHOSEN = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 1, 1]], dtype=torch.bool)
MEMBERS = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)
NOBODY = torch.zeros(0, 5, dtype=torch.bool)


class Alone:
    """A process group of one rank."""

    def size(self) -> int:
        return 1


ALONE: Any = Alone()


def test_the_load_is_that_of_positions_of_responses() -> None:
    assert load_of(CHOSEN, MEMBERS).tolist() == [2, 2, 2]
    assert load_of(CHOSEN, MEMBERS[:1]).tolist() == [2, 1, 1]
    assert load_of(CHOSEN, NOBODY).tolist() == [0, 0, 0]


def test_a_load_has_every_token() -> None:
    """In bf16, the type of a model, a count stops at 256."""
    chosen = torch.ones(1000, 2, dtype=torch.bool)
    assert load_of(chosen, torch.ones(1, 1000, dtype=torch.bool)).tolist() == [1000, 1000]


def test_the_auxiliary_loss_by_hand() -> None:
    """3 (0.5 p_0 + 0.25 p_1 + 0.25 p_2) of the two tokens, and 3 (0.5 p_1 + 0.5 p_2) of the one;
    prompt and filler have no part in it."""
    scores = torch.tensor(
        [[9.0, 9.0, 9.0], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.5, 0.3], [9.0, 9.0, 9.0]],
        requires_grad=True,
    )
    loss = balance_loss(scores, CHOSEN, MEMBERS, ALONE)
    assert loss.item() == pytest.approx(3 * (0.3 + 0.1 + 0.25 + 0.125 + 0.4))
    (gradient,) = torch.autograd.grad(loss, scores)
    right = [[0.0, 0.0, 0.0], *[[1.5, 0.75, 0.75]] * 2, [0.0, 1.5, 1.5], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(gradient, torch.tensor(right))


def test_the_auxiliary_loss_of_equal_loads_is_the_number_of_positions() -> None:
    chosen = torch.eye(4, dtype=torch.bool).repeat(3, 1)
    scores = torch.randn(12, 4).softmax(-1)
    loss = balance_loss(scores, chosen, torch.ones(1, 12, dtype=torch.bool), ALONE)
    assert loss.item() == pytest.approx(12.0)


def test_a_row_without_a_response_has_no_auxiliary_loss() -> None:
    scores = torch.randn(5, 3).softmax(-1).requires_grad_()
    loss = balance_loss(scores, CHOSEN, NOBODY, ALONE)
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, scores)[0].any()


def test_a_bias_rises_below_the_mean_load_and_falls_above() -> None:
    bias, load = torch.tensor([0.5, -0.5, 0.25, 0.0]), torch.tensor([7, 4, 4, 1])
    torch.testing.assert_close(moved(bias, load, 0.125), torch.tensor([0.375, -0.5, 0.25, 0.125]))


def test_a_bias_moves_by_whole_numbers() -> None:
    """2 ** 24 + 1 is no number of fp32: one token more than the mean still counts."""
    load = torch.tensor([2**24 + 1, 2**24 - 1])
    assert moved(torch.zeros(2), load, 1.0).tolist() == [-1.0, 1.0]
    assert moved(torch.zeros(2), torch.tensor([3, 3]), 1.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, False), ({"moe_aux_loss_coeff": 0.1}, True), ({"moe_router_bias_update_rate": 1}, True)],
)
def test_nothing_is_counted_unless_asked(options: dict[str, Any], kept: bool) -> None:
    assert Balance([], PolicyConfig(**options)).is_kept == kept


DENSE = ModelShape(
    architecture="LlamaForCausalLM", num_layers=1, hidden_size=8, ffn_size=8, num_heads=1,
    num_kv_heads=1, head_dim=8, vocab_size=8, tied=True, rope_theta=1e4, rms_norm_eps=1e-6,
    max_position_embeddings=8,
)  # fmt: skip
EXPERTS = MoEShape(
    num_experts=4, experts_per_token=2, ffn_size=8, shared_ffn_size=0, renormalised=True
)
SOFTMAX = replace(DENSE, architecture="Qwen3MoeForCausalLM", moe=EXPERTS)
SIGMOID = replace(
    DENSE,
    architecture="Glm4MoeForCausalLM",
    moe=replace(
        EXPERTS,
        shared_ffn_size=8,
        routing=GroupRouting(has_bias=True, n_groups=1, chosen_groups=1, scale=1.0),
    ),
)


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        (SIGMOID, {"moe_aux_loss_coeff": 0.1, "moe_router_bias_update_rate": 0.001}, ""),
        (SOFTMAX, {"moe_aux_loss_coeff": 0.1}, ""),
        (
            SOFTMAX,
            {"moe_router_bias_update_rate": 0.001},
            "policy.moe_router_bias_update_rate=0.001, but no router of Qwen3MoeForCausalLM has a "
            "bias; expected 0",
        ),
        (
            DENSE,
            {"moe_aux_loss_coeff": 0.1},
            "policy.moe_aux_loss_coeff=0.1, but LlamaForCausalLM has no experts; expected 0",
        ),
    ],
)
def test_what_has_no_experts_or_no_bias_is_refused(
    shape: ModelShape, options: dict[str, Any], words: str
) -> None:
    config = Config(model=ModelConfig(path="x"), policy=PolicyConfig(**options))
    if not words:
        check_policy_layout(config, shape)
        return
    with pytest.raises(UserError) as caught:
        check_policy_layout(config, shape)
    assert str(caught.value) == words
