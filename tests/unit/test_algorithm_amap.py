"""The preset amap against AMAP-ML's rule: the size of the gradient, whatever a micro-step holds."""

from __future__ import annotations

import itertools
import random

import pytest

from gpg_megatron.algorithm.advantages import assign_advantages
from gpg_megatron.algorithm.update import weigh_update
from tests.presets import from_preset
from tests.unit.amap import Drawn, amap_size
from tests.unit.draws import batches
from tests.unit.test_algorithm_redraw import group

ANSWERS, GROUP_TOKENS = 2, 4
"""Of a group of test_algorithm_redraw: a prompt of one token and an answer of one, twice."""
BATCH, N_BATCHES = 64, 12


def our_size(share: float, per_step: int, rng: random.Random) -> float:
    """The mean over batches of sum |advantage| * weight, over that of one live answer."""
    config = from_preset("amap")
    total, numbers = 0.0, itertools.count()
    drawn = batches(
        config, size=BATCH, n=N_BATCHES, new=lambda: group(rng.random() < share, next(numbers))
    )
    for selection, _ in drawn:
        samples, _ = assign_advantages(selection.groups, config)
        update = weigh_update(
            samples, config, dp_size=1, max_tokens=per_step * GROUP_TOKENS, max_response_length=1
        )
        total += (
            sum(abs(s.advantage) * w for s, w in zip(update.samples, update.weights, strict=True))
            / 0.5
        )
    return total / N_BATCHES


@pytest.mark.parametrize("per_step", [1, 2, 4, 8])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_the_gradient_is_as_long_as_by_their_rule(share: float, per_step: int) -> None:
    rng = random.Random(1000 * per_step + round(10 * share))
    theirs = amap_size(
        lambda: Drawn(live=rng.random() < share, n_tokens=ANSWERS),
        per_step=per_step,
        n_steps=N_BATCHES * BATCH // per_step,
    )
    assert our_size(share, per_step, rng) == pytest.approx(theirs, rel=0.15)
