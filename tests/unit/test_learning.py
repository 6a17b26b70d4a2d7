"""The learning comparison: curves, spread and table from results made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.learning import METHODS, curves, describe, over_tokens, run, summary, table
from benchmarks.learning import main as learning_main
from benchmarks.scoreboard import arms, half_width, scores
from benchmarks.scoreboard import table as scoreboard_table
from gpg_megatron.config.loading import load_config
from gpg_megatron.errors import UserError

MINIMAL = "model: {path: m}\ndata: {train_files: [t]}\n"


def row(step: int, accuracy: float, tokens: int, **more: float) -> dict[str, Any]:
    return {
        "step": step,
        "reward/accuracy": accuracy,
        "response/tokens": tokens,
        "group/live_fraction": 0.5,
        "group/alpha": 2.0,
        "group/drawn": 12,
        "group/carried_in": 2,
        "group/carried_out": 1,
        "group/filtered": 3,
        **more,
    }


def result(
    method: str,
    seed: int,
    accuracy: Sequence[float],
    tokens: Sequence[int],
    held_out: Mapping[str, float],
    ended: str = "",
) -> dict[str, Any]:
    return {
        "method": method,
        "seed": seed,
        "accuracy": accuracy,
        "tokens": tokens,
        "live": [0.5] * len(tokens),
        "groups": [4] * len(tokens),
        "held_out": held_out,
        "ended": ended,
    }


def test_curves_of_a_run() -> None:
    rows = [
        {"step": 0, "eval/a/mean@1": 0.25},
        row(1, 0.3, 100),
        row(
            2, 0.5, 150, **{"eval/a/mean@1": 0.5, "eval/b/mean@1": 0.75, "eval/a/mean@1/ci95": 0.1}
        ),
    ]
    got = curves(rows)
    assert got["accuracy"] == [0.3, 0.5]
    assert got["tokens"] == [100, 250]
    assert got["groups"] == [10, 10]
    assert got["held_out"] == {"0": 0.25, "2": 0.625}


RESULTS = [
    result("gpg", 1, [0.2, 0.6], [10, 20], {"0": 0.1, "2": 0.5}),
    result("gpg", 2, [0.4, 0.8], [10, 40], {"0": 0.3, "2": 0.7}),
    result("amap", 1, [0.2], [10], {"0": 0.1}, ended="error: after 20 redraws ..."),
]


def test_the_table_says_mean_and_spread_and_who_failed() -> None:
    rows = summary(["gpg", "amap", "rloo"], RESULTS)
    assert [r["method"] for r in rows] == ["gpg", "amap"]
    assert rows[0]["held_out_after"] == pytest.approx([0.6, 0.5, 0.7])
    assert rows[0]["mean_accuracy"] == pytest.approx([0.5, 0.4, 0.6])
    lines = table(rows).splitlines()
    assert "| gpg | 2 | 0.200 (0.100 to 0.300) | 0.600 (0.500 to 0.700) |" in lines[2]
    assert lines[2].endswith("| 30 (20 to 40) |")
    assert lines[3] == "| amap | 1 (1 failed) | - | - | - | - | - |"
    assert "ended after 1 steps: error" in describe(RESULTS[2])


def test_accuracy_against_tokens_is_where_the_samples_were_drawn() -> None:
    grid, rows = over_tokens(RESULTS[:2])
    # Step 1 is drawn at 0 tokens, step 2 at 10: there every run has its second accuracy.
    assert (grid[0], grid[-1]) == (0.0, 10.0)
    np.testing.assert_allclose(rows[:, 0], [0.2, 0.4])
    np.testing.assert_allclose(rows[:, -1], [0.6, 0.8])
    middle = rows[0][len(grid) // 2]
    assert 0.39 < middle < 0.41


def test_every_method_is_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL)
    for overrides in METHODS.values():
        load_config(file, overrides)


def test_a_result_is_not_made_again_unless_the_settings_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*_: object, **__: object) -> None:
        raise AssertionError("a run was started")

    monkeypatch.setattr("subprocess.run", trained)
    config = tmp_path / "config.yaml"
    config.write_text(MINIMAL)
    settings = {"config": MINIMAL, "overrides": ["trainer.seed=1"]}
    folder = tmp_path / "gpg" / "seed1"
    folder.mkdir(parents=True)
    made = {**RESULTS[0], "settings": settings}
    (folder / "result.json").write_text(json.dumps(made))
    assert run(folder, "gpg", 1, config, ["trainer.seed=1"]) == made
    with pytest.raises(UserError, match="other settings"):
        run(folder, "gpg", 1, config, ["trainer.seed=1", "policy.lr=1.0"])


def test_an_unknown_method_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert learning_main(["--out", str(tmp_path), "--methods", "gpg,ppo"]) == 2
    assert "'ppo'" in capsys.readouterr().err


def test_arms_are_held_against_each_other_at_the_tokens_that_all_reached() -> None:
    """The second seed is half way from 0.3 to 0.7 after 20 of 40 tokens; a collapse is a last
    accuracy far below the best."""
    fell = result("verl", 1, [0.2, 0.9, 0.1], [5, 10, 20], {"0": 0.2, "2": 0.9, "3": 0.1})
    rows = scores(["gpg", "amap", "verl", "rloo"], [*RESULTS, fell])
    assert [row["arm"] for row in rows] == ["gpg", "amap", "verl"]
    assert {row["tokens"] for row in rows} == {20}
    assert rows[0]["all"] == pytest.approx([0.5, 0.5])
    assert (rows[0]["held_out"], rows[0]["collapsed"]) == (pytest.approx(0.5), 0)
    assert (rows[1]["seeds"], rows[1]["failed"], rows[1]["held_out"]) == (0, 1, None)
    assert (rows[2]["best"], rows[2]["last"], rows[2]["collapsed"]) == (0.9, 0.1, 1)
    # two steps of 4 groups, half of them live: 4 live groups for 20 and for 40 tokens
    assert rows[0]["per_live"] == pytest.approx((5 + 10) / 2)
    assert rows[0]["to_wanted"] == [None, None] and rows[2]["to_wanted"] == [10]
    lines = scoreboard_table(rows).splitlines()
    assert lines[3] == "| amap | 0 (1 failed) | - | - | - | - | - | - |"
    assert lines[4] == "| verl | 1 | 0.100 | 0.900 | 0.100 | 1 | 3.3 | 10 |"


def test_the_interval_is_students() -> None:
    assert half_width([0.5]) is None
    # deviation 0.1, root of 3, t 4.303
    assert half_width([0.4, 0.5, 0.6]) == pytest.approx(4.303 * 0.1 / 3**0.5)


def test_every_arm_is_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL)
    found = arms(load_config(file, ["trainer.train_batch_size=64"]).trainer)
    some = {"paper", "verl-x4", "paper-x4-none", "paper-x16-ess", "paper-old1-weighed", "grpo-old1"}
    assert some <= {*found}
    assert "trainer.train_batch_size=4" in found["paper-small16"]
    for overrides in found.values():
        load_config(file, overrides)
