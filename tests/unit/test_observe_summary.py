"""The closing lines of a run, from hand-made rows."""

from __future__ import annotations

from gpg_megatron.observe.rundir import Row
from gpg_megatron.observe.summary import summary_lines


def test_first_and_last_evaluation_sums_of_seconds_and_peak_memory() -> None:
    rows: list[Row] = [
        {"step": 0, "eval/a/mean@1": 0.25, "timing/eval_s": 2.0, "memory/rss_gb": 3.0},
        {"step": 1, "timing/rollout_s": 10.4, "timing/policy_s": 5.0, "memory/rss_gb": 7.25},
        {"step": 2, "timing/rollout_s": 10.4, "eval/a/mean@1": 0.75, "memory/rss_gb": None},
    ]
    assert summary_lines(rows) == [
        "eval/a/mean@1: 0.250 -> 0.750",
        "rollout 21 s, reward 0 s, policy 5 s, sync 0 s, eval 2 s; peak memory 7.2 GB",
    ]


def test_every_held_out_set_has_its_line() -> None:
    rows = [{"step": 0, "eval/b/mean@4": 0.5, "eval/a/mean@4": 0.0}]
    assert [line.split(":")[0] for line in summary_lines(rows)[:-1]] == [
        "eval/a/mean@4",
        "eval/b/mean@4",
    ]


def test_a_single_evaluation_has_no_arrow() -> None:
    assert summary_lines([{"step": 2, "eval/a/mean@1": 0.5}])[0] == "eval/a/mean@1: 0.500"
