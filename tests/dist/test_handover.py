"""Between two actions all ranks wait for each other: a GPU's memory is free before it is taken."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from tests.dist.handover_worker import SLOW_S
from tests.dist.ranks import run_ranks


def test_no_action_begins_before_the_last_one_is_done_on_every_rank(tmp_path: Path) -> None:
    output = run_ranks(tmp_path, "tests.dist.handover_worker", 2)
    paths = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in paths), output
    first, second = (json.loads(path.read_text()) for path in paths)
    names = [name for name, *_ in first["notes"]]
    assert names == ["sleep", "offload", "wake", "offload", "wake", "sleep", "load"]
    assert [name for name, *_ in second["notes"]] == ["offload", "offload", "load"]
    # One clock for the whole host. What both ranks do, they do at once.
    theirs = iter(second["notes"])
    together = [
        [mine, *([next(theirs)] if mine[0] in ("offload", "load") else [])]
        for mine in first["notes"]
    ]
    for before, after in pairwise(together):
        assert max(end for *_, end in before) <= min(begin for _, begin, _ in after)
    slow = 4 * SLOW_S  # two sleeps, and two offloads on rank 1
    assert min(first["seconds"], second["seconds"]) >= 0.95 * slow
