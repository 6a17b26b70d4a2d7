"""Launchers that meet, as threads of one process; what ends a run, and what each host says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from gpg_megatron.errors import UserError
from gpg_megatron.host.network import free_port
from gpg_megatron.start import meeting
from gpg_megatron.start.meeting import Meeting
from gpg_megatron.start.world import Failure, cause_of

KILLED = Failure(text="policy rank 3 ended: killed by SIGKILL", exit_code=1, is_cause=True, host=1)
FOLLOWED = Failure(text="policy rank 0 ended: exit code 1", exit_code=1, is_cause=False, host=0)
STOPPED = Failure(text="stopped by SIGHUP", exit_code=129, is_cause=True, host=0)

Where = tuple[str, int]


@pytest.fixture
def where() -> Where:
    return "127.0.0.1", free_port()


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """In place of the signal to this process; and what is silent is found early."""
    event = threading.Event()
    monkeypatch.setattr("gpg_megatron.start.meeting.os.kill", lambda pid, number: event.set())
    for name, seconds in (("SILENT_AFTER_S", 1.5), ("LEAVE_TIMEOUT_S", 2.0), ("BEAT_S", 0.1)):
        monkeypatch.setattr(meeting, name, seconds)
    return event


@pytest.fixture
def both(where: Where, signalled: threading.Event) -> Iterator[tuple[Meeting, Meeting]]:
    first, second = Meeting(2, 0, where, 20.0), Meeting(2, 1, where, 20.0)
    for one in (first, second):
        one.begin(0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(first.all_say, "to start")
        second.all_say("to start")
    yield first, second
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Meeting.__exit__, (first, second)))


def die(one: Meeting) -> None:
    """As a launcher that is killed: host 0 takes the store with it."""
    one._closed.set()
    one._keeper.join()


def end_both(
    meetings: tuple[Meeting, Meeting], failures: tuple[Failure | None, Failure | None]
) -> list[Failure | None]:
    """At the same time, as each waits for the other."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(Meeting.end, meetings, failures))


def test_hosts_wait_for_each_other_and_hear_what_is_said(both: tuple[Meeting, Meeting]) -> None:
    first, second = both
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[list[object]] = pool.submit(first.all_say, "the address", None)
        time.sleep(0.3)
        assert not waiting.done()
        assert second.all_say("the address", "192.0.2.1") == [None, "192.0.2.1"]
        assert waiting.result(timeout=10) == [None, "192.0.2.1"]
    assert end_both(both, (None, None)) == [None, None]


def test_a_host_that_does_not_come_is_named(where: Where, signalled: threading.Event) -> None:
    at = f"waited 0.5 s at {where[0]}:{where[1]}"
    named = pytest.raises(UserError, match=rf"{at} for hosts \[0\]: to start")
    with Meeting(2, 1, where, 0.5) as alone, named:
        alone.all_say("to start")
    with Meeting(3, 1, where, 20.0) as second, Meeting(3, 0, where, 5.0) as first:
        second._say("to start")
        with pytest.raises(UserError, match=r"hosts \[2\]: to start"):
            first.all_say("to start")


def test_a_port_that_is_taken(where: Where, signalled: threading.Event) -> None:
    with socket.socket() as taken:
        taken.bind(("", where[1]))
        taken.listen()
        with Meeting(2, 0, where, 2.0) as first:
            first.begin(0)
            assert signalled.wait(timeout=10)
            reason = first.end(STOPPED)
    assert reason is not None and reason.exit_code == 2
    assert reason.line(0).startswith(f"error: cannot use 127.0.0.1:{where[1]}: ")


def test_both_hosts_give_the_cause_and_not_what_followed_from_it(
    both: tuple[Meeting, Meeting],
) -> None:
    ended = end_both(both, (FOLLOWED, KILLED))
    assert ended == [KILLED, KILLED]
    said = [failure.line(here) for here, failure in enumerate(ended) if failure]
    assert said == [
        "error: host 1: policy rank 3 ended: killed by SIGKILL",
        "error: policy rank 3 ended: killed by SIGKILL",
    ]


def test_a_host_that_came_to_its_end_hears_of_the_others_failure(
    both: tuple[Meeting, Meeting],
) -> None:
    assert end_both(both, (None, KILLED)) == [KILLED, KILLED]


def test_the_next_attempt_has_words_of_its_own(
    both: tuple[Meeting, Meeting], signalled: threading.Event
) -> None:
    """Also where one host is in it already while another hears what ended the one before."""
    first, second = both
    assert second.end(KILLED) == KILLED
    second.begin(1)
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(second.all_say, "to start", "again")
        assert signalled.wait(timeout=10)
        assert first.end(STOPPED) == KILLED
        signalled.clear()
        first.begin(1)
        assert first.all_say("to start") == [None, "again"] == again.result(timeout=10)
    assert not signalled.is_set()
    assert end_both(both, (None, None)) == [None, None]


@pytest.mark.parametrize("listens", [True, False])
def test_a_launcher_that_died_is_the_reason(
    both: tuple[Meeting, Meeting], signalled: threading.Event, listens: bool
) -> None:
    """Whether its own ranks are running or have lost theirs."""
    first, second = both
    die(second)
    assert not listens or signalled.wait(timeout=10)
    reason = first.end(STOPPED if listens else FOLLOWED)
    assert reason is not None and reason.is_host
    assert reason.line(0) == "error: host 1: its launcher has been silent for 1.5 s"


def test_a_host_0_that_died_is_the_reason(both: tuple[Meeting, Meeting]) -> None:
    """Its store ends with it."""
    die(both[0])
    reason = both[1].end(replace(FOLLOWED, host=1))
    assert reason is not None and reason.is_host
    assert reason.line(1) == "error: host 0: its launcher is gone"


def test_a_store_that_does_not_answer(
    both: tuple[Meeting, Meeting], signalled: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the network to host 0 is gone: a call of it never comes back."""
    back = threading.Event()
    stuck = lambda value: back.wait() and "{}"  # noqa: E731
    monkeypatch.setattr("gpg_megatron.start.meeting.json.dumps", stuck)
    assert signalled.wait(timeout=10)
    reason = both[1].end(None)
    back.set()
    assert reason is not None
    assert reason.line(1) == "error: host 0: its launcher has been silent for 1.5 s"


def test_the_signal_comes_once_another_fails(
    both: tuple[Meeting, Meeting], signalled: threading.Event
) -> None:
    first, second = both
    assert not signalled.wait(timeout=2.5), "both beat"
    assert second.end(KILLED) == KILLED
    assert signalled.wait(timeout=10)
    # The launcher hears its own signal as a stop, which is no news.
    assert first.end(STOPPED) == KILLED


@pytest.mark.parametrize(
    ("failures", "here", "expected"),
    [
        ([], 0, None),
        ([FOLLOWED], 0, FOLLOWED),
        ([FOLLOWED, KILLED], 0, KILLED),
        ([STOPPED, KILLED], 0, STOPPED),  # its own
        ([STOPPED, KILLED], 1, KILLED),
        ([STOPPED, KILLED], 2, STOPPED),
    ],
)
def test_the_cause(failures: list[Failure], here: int, expected: Failure | None) -> None:
    assert cause_of(failures, here) == expected


def test_what_a_host_prints() -> None:
    assert STOPPED.line(0) == "stopped by SIGHUP"
    assert STOPPED.line(1) == "error: host 0: stopped by SIGHUP"
    assert replace(KILLED, is_said=True).line(1) == ""


def test_a_host_without_ranks_waits_for_host_0(both: tuple[Meeting, Meeting]) -> None:
    first, second = both
    with ThreadPoolExecutor(2) as pool:
        waits = pool.submit(second.wait_for_the_end)
        time.sleep(0.5)
        assert not waits.done()
        ended = pool.submit(first.end, None)
        waits.result(timeout=20)
        assert second.end(None) is None
        assert ended.result(timeout=20) is None
