"""A checkpoint of an earlier version trains on: the same losses, under its layout and another.

Under its layout the first is the same bit by bit. After an update the arithmetic of this version's
gradients and Adam shows, in the last digit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist.ranks import run_ranks
from tests.saved_before.problem import FOLDER


@pytest.mark.parametrize(("tp_size", "tolerances"), [(2, (0.0, 1e-6)), (1, (1e-5, 1e-5))])
def test_the_next_losses_are_those_of_the_version_that_wrote_it(
    tmp_path: Path, tp_size: int, tolerances: tuple[float, float]
) -> None:
    output = run_ranks(tmp_path, "tests.dist.saved_before_worker", tp_size)
    path = tmp_path / f"tp{tp_size}.json"
    assert path.exists(), output
    expected = json.loads((FOLDER / "next.json").read_text())["losses"]
    losses = json.loads(path.read_text())
    for loss, right, tolerance in zip(losses, expected, tolerances, strict=True):
        assert loss == pytest.approx(right, rel=0.0, abs=tolerance)
