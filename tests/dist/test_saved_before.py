"""A checkpoint of an earlier version trains on: the same losses, under its layout and another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist.ranks import run_ranks
from tests.saved_before.problem import FOLDER


@pytest.mark.parametrize(("tp_size", "tolerance"), [(2, 0.0), (1, 1e-5)])
def test_the_next_losses_are_those_of_the_version_that_wrote_it(
    tmp_path: Path, tp_size: int, tolerance: float
) -> None:
    output = run_ranks(tmp_path, "tests.dist.saved_before_worker", tp_size)
    path = tmp_path / f"tp{tp_size}.json"
    assert path.exists(), output
    expected = json.loads((FOLDER / "next.json").read_text())["losses"]
    assert json.loads(path.read_text()) == pytest.approx(expected, abs=tolerance)
