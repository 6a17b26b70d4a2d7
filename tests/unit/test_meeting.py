"""Launchers that meet, as threads of one process; what ends a run, and what each host says."""

from __future__ import annotations

import gc
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from gpg_megatron.errors import UserError
from gpg_megatron.start.meeting import COMPARE_S, Failure, Hosts, Meeting, cause_of

KILLED = Failure(text="policy rank 3 ended: killed by SIGKILL", exit_code=1, is_cause=True, host=1)
FOLLOWED = Failure(text="policy rank 0 ended: exit code 1", exit_code=1, is_cause=False, host=0)
STOPPED = Failure(text="stopped by SIGHUP", exit_code=129, is_cause=True, host=0)


@pytest.fixture
def hosts() -> Hosts:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Hosts(count=2, address="127.0.0.1", port=probe.getsockname()[1])


def both(hosts: Hosts) -> tuple[Meeting, Meeting]:
    return Meeting(hosts, 20.0), Meeting(replace(hosts, rank=1), 20.0)


def end_both(
    meetings: tuple[Meeting, Meeting], failures: tuple[Failure | None, Failure | None]
) -> list[Failure | None]:
    """At the same time, as host 0 waits for the other."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(Meeting.end, meetings, failures))


def test_hosts_wait_for_each_other_and_hear_what_is_told(hosts: Hosts) -> None:
    first, second = both(hosts)
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[None] = pool.submit(first.wait_for_all, "to start")
        time.sleep(0.3)
        assert not waiting.done()
        second.wait_for_all("to start")
        waiting.result(timeout=10)
    second.tell("the address", "192.0.2.1")
    assert first.hear("the address") == second.hear("the address") == "192.0.2.1"
    assert end_both((first, second), (None, None)) == [None, None]


def test_a_host_that_does_not_come_is_named(hosts: Hosts) -> None:
    first = Meeting(hosts, 0.5)
    with pytest.raises(UserError, match=r"waited 0.5 s for hosts \[1\]: to start"):
        first.wait_for_all("to start")
    with pytest.raises(UserError, match="waited 0.5 s to hear the address"):
        first.hear("the address")


def test_a_host_0_that_does_not_come_is_named(hosts: Hosts) -> None:
    with pytest.raises(UserError, match=f"waited 0.5 s for host 0 at 127.0.0.1:{hosts.port}"):
        Meeting(replace(hosts, rank=1), 0.5)


def test_a_port_that_is_taken(hosts: Hosts) -> None:
    with socket.socket() as taken:
        taken.bind(("", hosts.port))
        taken.listen()
        with pytest.raises(UserError, match=f"cannot use 127.0.0.1:{hosts.port}"):
            Meeting(hosts, 2.0)


def test_both_hosts_give_the_cause_and_not_what_followed_from_it(hosts: Hosts) -> None:
    meetings = both(hosts)
    ended = end_both(meetings, (FOLLOWED, KILLED))
    assert ended == [KILLED, KILLED]
    said = [failure.line(here) for here, failure in enumerate(ended) if failure]
    assert said == [
        "error: host 1: policy rank 3 ended: killed by SIGKILL",
        "error: policy rank 3 ended: killed by SIGKILL",
    ]


def test_a_host_that_came_to_its_end_hears_of_the_others_failure(hosts: Hosts) -> None:
    first, second = both(hosts)
    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(second.end, KILLED)
        assert failing.result(timeout=COMPARE_S + 5) == KILLED
    assert first.end(None) == KILLED


def test_a_launcher_that_died_is_the_reason(hosts: Hosts) -> None:
    """It never beats and never says anything."""
    first, _ = both(hosts)
    reason = first.end(FOLLOWED)
    assert reason is not None
    assert reason.line(0) == "error: host 1: its launcher does not answer any more"


def test_a_host_0_that_died_is_the_reason(hosts: Hosts) -> None:
    """Its store ends with it."""
    first, second = both(hosts)
    del first
    gc.collect()
    reason = second.end(replace(FOLLOWED, host=1))
    assert reason is not None
    assert reason.line(1) == "error: host 0: its launcher is gone"


def test_the_watcher_sends_the_signal_once_another_fails(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled = threading.Event()
    monkeypatch.setattr("gpg_megatron.start.meeting.os.kill", lambda pid, number: signalled.set())
    first, second = both(hosts)
    first.watch()
    second.watch()
    assert not signalled.wait(timeout=2.5), "both beat"
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(second.end, KILLED)
        assert signalled.wait(timeout=10)
        # The launcher hears its own signal as a stop, which is no news.
        assert first.end(STOPPED) == KILLED
        assert ending.result(timeout=10) == KILLED


def test_a_silent_host_ends_the_others(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled = threading.Event()
    monkeypatch.setattr("gpg_megatron.start.meeting.os.kill", lambda pid, number: signalled.set())
    monkeypatch.setattr("gpg_megatron.start.meeting.SILENT_AFTER_S", 1.5)
    monkeypatch.setattr("gpg_megatron.start.meeting.LEAVE_TIMEOUT_S", 0.5)
    first, _ = both(hosts)
    first.watch()
    assert signalled.wait(timeout=10)
    reason = first.end(STOPPED)
    assert reason is not None
    assert reason.line(0) == "error: host 1: its launcher has been silent for 1.5 s"


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


def test_a_host_without_ranks_waits_for_host_0(hosts: Hosts) -> None:
    first, second = both(hosts)
    with ThreadPoolExecutor(2) as pool:
        waits = pool.submit(second.wait_for_the_end)
        time.sleep(0.5)
        assert not waits.done()
        ended = pool.submit(first.end, None)
        waits.result(timeout=20)
        assert second.end(None) is None
        assert ended.result(timeout=20) is None
