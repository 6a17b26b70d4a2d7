"""Off-policy corrections against values by hand and against their purpose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.algorithm.correction import LARGEST_LOG_RATIO, correction_weights, ratio
from gpg_megatron.config.algorithm import AlgorithmConfig
from tests.presets import from_preset

MODES = get_args(get_type_hints(AlgorithmConfig)["correction"])[1:]  # without auto
# Two responses; the ratios are 4, 1/4, 1 and 2, 2. Products 1 and 4, geometric means 1 and 2.
RATIOS = [4.0, 0.25, 1.0, 2.0, 2.0]
RESPONSES = torch.tensor([0, 0, 0, 1, 1])


def weights(
    mode: str,
    ratios: Sequence[float] = RATIOS,
    responses: torch.Tensor = RESPONSES,
    low: float = 0.5,
    high: float = 2.0,
) -> tuple[list[float], list[bool]]:
    engine = torch.full((len(ratios),), -3.0)
    policy = (engine + torch.tensor(ratios).log()).requires_grad_()
    config = from_preset("paper", correction=mode, correction_min=low, correction_max=high)
    factors, cut = correction_weights(policy, engine, responses, config)
    assert not factors.requires_grad and cut.dtype == torch.bool
    return factors.tolist(), cut.tolist()


@pytest.mark.parametrize(
    ("mode", "high", "factors", "cut"),
    [
        ("none", 2.0, [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]),
        ("truncate-token", 3.0, [3, 0.25, 1, 2, 2], [1, 0, 0, 0, 0]),
        ("truncate-sequence", 3.0, [1, 1, 1, 3, 3], [0, 0, 0, 1, 1]),
        ("mask-token", 3.0, [0, 0, 1, 2, 2], [1, 1, 0, 0, 0]),
        ("reject-sequence", 1.5, [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]),
        ("reject-sequence", 2.5, [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]),
    ],
)
def test_by_hand(mode: str, high: float, factors: list[float], cut: list[int]) -> None:
    got, got_cut = weights(mode, high=high)
    assert got == pytest.approx(factors)
    assert got_cut == [bool(x) for x in cut]


@pytest.mark.parametrize("mode", MODES)
def test_on_policy_nothing_is_corrected(mode: str) -> None:
    factors, cut = weights(mode, [1.0] * 5)
    assert factors == [1.0] * 5 and not any(cut)


@pytest.mark.parametrize("mode", MODES)
def test_no_tokens(mode: str) -> None:
    assert weights(mode, [], torch.zeros(0, dtype=torch.int64)) == ([], [])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_ratios_without_bound_stay_finite(mode: str, gap: float) -> None:
    config = from_preset("paper", correction=mode)
    zeros = torch.zeros(2)
    factors, _ = correction_weights(zeros + gap, zeros, torch.tensor([0, 0]), config)
    assert factors.isfinite().all()
    assert ratio(zeros + gap, zeros).log().abs().max() <= LARGEST_LOG_RATIO + 1e-3


@pytest.mark.parametrize("mode", [m for m in MODES if m != "none"])
def test_a_log_prob_that_is_no_number_is_not_hidden_by_truncation(mode: str) -> None:
    factors, _ = weights(mode, [math.nan, 1.0], torch.tensor([0, 1]))
    assert math.isnan(factors[0]) or mode == "reject-sequence"
    assert factors[1] == 1.0


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    data=st.data(),
)
def test_sequence_modes_are_their_definition(lengths: list[int], data: st.DataObject) -> None:
    logs = [
        [data.draw(st.floats(-2.0, 2.0, width=32)) for _ in range(length)] for length in lengths
    ]
    flat = torch.tensor([x for row in logs for x in row])
    responses = torch.tensor([i for i, row in enumerate(logs) for _ in row])
    for mode, direct in (
        ("truncate-sequence", [min(math.exp(math.fsum(row)), 2.0) for row in logs]),
        (
            "reject-sequence",
            [float(0.5 <= math.exp(math.fsum(row) / len(row)) <= 2.0) for row in logs],
        ),
    ):
        edge = [abs(abs(math.fsum(row)) / len(row) - math.log(2.0)) < 1e-4 for row in logs]
        config = from_preset("paper", correction=mode)
        factors, _ = correction_weights(flat, torch.zeros_like(flat), responses, config)
        for factor, response in zip(factors.tolist(), responses.tolist(), strict=True):
            assert edge[response] or factor == pytest.approx(direct[response], rel=1e-4)


def test_importance_sampling_makes_the_off_policy_gradient_on_policy() -> None:
    """Over all actions, sampled as the engine does: sum mu * rho * grad log pi * A equals
    sum pi * grad log pi * A, as long as nothing is truncated."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    engine = (logits.detach() + 0.3 * torch.randn(7).double()).log_softmax(-1)
    values = torch.randn(7).double()
    policy = logits.log_softmax(-1)
    config = from_preset("paper", correction="truncate-token", correction_max=1e6)
    rho, _ = correction_weights(policy, engine, torch.arange(7), config)
    (got,) = torch.autograd.grad(
        (engine.exp() * rho * values * policy).sum(), logits, retain_graph=True
    )
    (right,) = torch.autograd.grad((policy.exp() * values).sum(), logits)
    torch.testing.assert_close(got, right)
