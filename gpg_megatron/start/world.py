"""torchrun's agent on this host: its ranks, from their start to what ended them."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpg_megatron.config.sections import Config
from gpg_megatron.errors import EXIT_STOPPED
from gpg_megatron.host.cores import can_bind
from gpg_megatron.host.reaper import (
    RUN_ID_VARIABLE,
    SCRATCH_VARIABLE,
    cleanup_run,
    new_run_id,
    start_reaper,
)
from gpg_megatron.start.leaving import AT_ONCE, leaving_in_order

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

SHUTDOWN_S = 10
"""Ranks do not answer SIGTERM, they end by it."""
_NO_FILE = "<N/A>"
_FOLLOWS = (signal.SIGTERM, signal.SIGABRT)
"""By which ranks end when others have: the agent sends one, NCCL's watchdog the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a host's part of a run ended early."""

    text: str
    """One line, without "error:"."""
    exit_code: int
    is_cause: bool
    """Whether it began there, as far as can be told: a process was killed, an input was bad."""
    is_said: bool = False
    """Whether that host has printed it already."""
    is_host: bool = False
    """Whether the launcher of a host is gone."""
    host: int = 0

    def line(self, here: int) -> str:
        """What host `here` prints of it; empty: nothing."""
        if self.is_said and (self.host == here or self.exit_code == EXIT_STOPPED):
            return ""
        if self.host != here:
            return f"error: host {self.host}: {self.text}"
        return self.text if self.exit_code > 128 else f"error: {self.text}"


def cause_of(failures: Iterable[Failure], here: int) -> Failure | None:
    """What host `here` gives as the reason for the end of the run: a cause rather than what
    followed from it, its own rather than another's."""
    return min(failures, key=lambda f: (not f.is_cause, f.host != here, f.host), default=None)


@contextmanager
def own_run() -> Iterator[str]:
    """A run id and its reaper; at the end nothing of the run is left on this host."""
    run_id = os.environ[RUN_ID_VARIABLE] = new_run_id()
    start_reaper(run_id)
    try:
        yield run_id
    finally:
        cleanup_run(run_id)


def one_host_world(run_id: str, n_ranks: int, on_gpus: bool, is_alone: bool) -> LaunchConfig:
    """is_alone: no engine is on another host. Then nothing has to resolve the host's name."""
    return world_of(
        1,
        n_ranks,
        on_gpus,
        run_id=run_id,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1" if is_alone else None,
    )


def world_of(n_hosts: int, n_ranks: int, on_gpus: bool, **rendezvous: Any) -> LaunchConfig:
    """Of n_hosts with ranks, this one with n_ranks of them, each near its GPU. Within own_run: the
    files in which ranks say why they end are in its folder."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig
    from torch.numa.binding import AffinityMode, NumaOptions

    binds = on_gpus and can_bind()
    return LaunchConfig(
        numa_options=NumaOptions(AffinityMode.NODE) if binds else None,
        min_nodes=n_hosts,
        max_nodes=n_hosts,
        nproc_per_node=n_ranks,
        max_restarts=0,
        monitor_interval=0.5,
        signals_to_handle=AT_ONCE,
        shutdown_timeout=SHUTDOWN_S,
        logs_specs=DefaultLogsSpecs(log_dir=f"{os.environ[SCRATCH_VARIABLE]}/ranks"),
        **rendezvous,
    )


def run_ranks(config: Config, world: LaunchConfig, arguments: Sequence[str]) -> Failure | None:
    """The ranks of this host, to their end."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    # The agent narrates every failure three times; the launcher says it once.
    for name in ("", ".agent.server.api", ".multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    try:
        with leaving_in_order(config):
            elastic_launch(world, sys.executable)("-m", "gpg_megatron.start.train", *arguments)
    except SignalException as stop:
        return stopped(stop.sigval)
    except ChildFailedError as failed:
        return what_ended(failed.failures)
    return None


def what_ended(failures: Mapping[int, ProcessFailure]) -> Failure:
    """Of the ranks of this host that have failed, by rank, what began it."""

    def place(rank: int) -> tuple[bool, bool, bool, int, int]:
        failure = failures[rank]
        killed = failure.exitcode < 0 and -failure.exitcode not in _FOLLOWS
        return not killed, not _words(failure), failure.exitcode < 0, failure.timestamp, rank

    rank = min(failures, key=place)
    failure = failures[rank]
    code = failure.exitcode
    if code == EXIT_STOPPED:
        return Failure(text="left in order", exit_code=code, is_cause=True, is_said=True)
    if code == 2:
        text = "bad input or configuration, as it says there"
        return Failure(text=text, exit_code=2, is_cause=True, is_said=True)
    # Ranks end with 1 when they lose others; they do not kill themselves.
    words = _words(failure)
    text = words or f"policy rank {rank} ended: {_exit_text(code)}"
    return Failure(text=text, exit_code=1, is_cause=bool(words) or code < 0)


def _words(failure: ProcessFailure) -> str:
    """What the rank left; empty: nothing."""
    return "" if failure.error_file == _NO_FILE else failure.message


def _exit_text(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def stopped(number: int) -> Failure:
    text = f"stopped by {signal.Signals(number).name}"
    return Failure(text=text, exit_code=128 + number, is_cause=True)
