"""Progress and watchdog: what they print and when."""

from __future__ import annotations

import io
import re
import time
from contextlib import closing

import pytest

from gpg_megatron.observe.progress import Progress, step_line
from gpg_megatron.observe.watchdog import Watchdog

METRICS = {
    "reward/accuracy": 0.5123,
    "reward/mean": 0.5123,
    "group/live_fraction": 0.875,
    "group/alpha": 1.1428,
    "policy/loss": -0.01234,
    "policy/grad_norm": 0.851,
    "mismatch/logprob_max": 3.1e-6,
    "response/length_mean": 3.21,
    "throughput/rollout_tokens_per_s": 1834.4,
    "timing/step_s": 4.12,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_step_line() -> None:
    assert " ".join(step_line(3, 40, METRICS).split()) == (
        "step 3/40 acc 0.512 reward 0.512 live 0.88 alpha 1.14 loss -0.0123 gnorm 0.85 "
        "mismatch 3e-06 len 3.2 1834 tok/s 4.1 s"
    )


def test_step_lines_are_aligned() -> None:
    late = {
        **METRICS,
        "group/alpha": 12.5,
        "policy/loss": 0.2,
        "response/length_mean": 812.4,
        "throughput/rollout_tokens_per_s": 99.0,
        "timing/step_s": 100.0,
    }
    skipped = {k: v for k, v in METRICS.items() if not k.startswith("policy/")}
    rows = [step_line(3, 400, METRICS), step_line(400, 400, late), step_line(4, 400, skipped)]
    assert len({len(row) for row in rows}) == 1
    for label in ("acc", "alpha", "loss", "gnorm", "mismatch", "len", "tok/s"):
        assert len({row.index(label) for row in rows}) == 1, label
    assert "loss       -  gnorm     -" in rows[2]
    assert "loss       -" in step_line(4, 400, {**METRICS, "policy/loss": None})


def test_without_a_terminal_there_is_one_line_a_step() -> None:
    stream = io.StringIO()
    with closing(Progress(40, stream)) as progress:
        progress.message("engine ready in 31 s")
        progress.step(1, METRICS)
        progress.step(2, METRICS)
    assert stream.getvalue().split("\n") == [
        "engine ready in 31 s",
        step_line(1, 40, METRICS),
        step_line(2, 40, METRICS),
        "",
    ]


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with closing(Progress(40, stream)) as progress:
        progress.message("engine [bold]ready[/bold]")
        progress.step(7, METRICS)
    text = stream.getvalue()
    assert "engine [bold]ready[/bold]\n" in text
    for piece in ("7/40", "acc 0.512", "reward 0.512", "live 0.88", "1834 tok/s"):
        assert piece in text
    assert text.rstrip(" ").endswith("\n") or "\x1b[?25h" in text


def test_phases_are_timed_and_added_up() -> None:
    with closing(Watchdog(rank=0, limit_s=60)) as watchdog:
        for _ in range(2):
            with watchdog.phase("rollout"):
                time.sleep(0.05)
        with watchdog.phase("step"), watchdog.phase("policy"):
            time.sleep(0.02)
        timings = watchdog.pop_timings()
        assert watchdog.pop_timings() == {}
    assert set(timings) == {"timing/rollout_s", "timing/step_s", "timing/policy_s"}
    assert 0.1 <= timings["timing/rollout_s"] < 2
    assert timings["timing/step_s"] >= timings["timing/policy_s"] >= 0.02


def test_a_phase_that_fails_is_timed_and_over() -> None:
    stream = io.StringIO()
    with closing(Watchdog(rank=0, limit_s=0.1, stream=stream)) as watchdog:
        with pytest.raises(KeyError), watchdog.phase("reward"):
            raise KeyError("x")
        time.sleep(0.3)
        assert list(watchdog.pop_timings()) == ["timing/reward_s"]
    assert stream.getvalue() == ""


def test_the_watchdog_names_the_innermost_phase_and_the_rank() -> None:
    stream = io.StringIO()
    watchdog = Watchdog(rank=3, limit_s=1.0, stream=stream)
    with closing(watchdog), watchdog.phase("step"), watchdog.phase("rollout"):
        deadline = time.monotonic() + 20
        while not stream.getvalue():
            assert time.monotonic() < deadline, "waited 20 s for the watchdog's line"
            time.sleep(0.05)
    found = re.match(r"\[rank 3\] rollout has been running for (\d+) s\n", stream.getvalue())
    assert found and 1 <= int(found[1]) <= 20


class Others:
    """Rank 1 has learned on, rank 2 waits as this one does, rank 3 is stopped."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def tell(self, text: str) -> None:
        self.told.append(text)

    def hear(self) -> dict[int, str]:
        n = len(self.told)
        return {1: f"{n} 7 sync", 2: f"{n} 5 policy", 3: "4 2 policy", 4: ""}

    def hear_one(self) -> tuple[int, str]:
        return 3, self.hear()[3]


def test_the_watchdog_names_the_ranks_that_are_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpg_megatron.observe.watchdog.BEAT_S", 0.05)
    stream, others = io.StringIO(), Others()
    watchdog = Watchdog(rank=0, limit_s=0.2, ranks=others, stream=stream)
    with closing(watchdog), watchdog.phase("policy"):
        deadline = time.monotonic() + 20
        while not stream.getvalue():
            assert time.monotonic() < deadline, "waited 20 s for the watchdog's line"
            time.sleep(0.05)
    assert others.told[0].endswith(" policy")
    late = "rank 1 is in sync for 7 s; rank 3 gives no sign, last in policy; rank 4 gives no sign"
    assert stream.getvalue().splitlines()[0].endswith(f" s; {late}")


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_a_rank_without_a_sign_is_given_up(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Whatever this one is in. One that works, and one that has not begun, are waited for."""
    monkeypatch.setattr("gpg_megatron.observe.watchdog.BEAT_S", 0.05)
    others, said = Others(), list[str]()
    monkeypatch.setattr(others, "hear_one", lambda: (rank, others.hear()[rank]))
    watchdog = Watchdog(
        rank=0, limit_s=0.2, ranks=others, silent_s=0.4, give_up=said.append, stream=io.StringIO()
    )
    with closing(watchdog):
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            time.sleep(0.05)
    assert set(said[:1]) == ({"policy rank 3 has given no sign for 0 s"} if rank == 3 else set())


def test_the_watchdog_says_nothing_while_phases_change() -> None:
    stream = io.StringIO()
    with closing(Watchdog(rank=0, limit_s=1.0, stream=stream)) as watchdog:
        end = time.monotonic() + 1.6
        with watchdog.phase("step"):
            while time.monotonic() < end:
                with watchdog.phase("policy"):
                    time.sleep(0.05)
    assert stream.getvalue() == ""
