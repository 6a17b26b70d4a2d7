"""torchrun's agent on this host: its ranks, from their start to what ended them."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gpg_megatron.host.cores import can_bind
from gpg_megatron.host.reaper import RUN_ID_VARIABLE, cleanup_run, new_run_id, start_reaper
from gpg_megatron.start.meeting import Failure

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig


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
    """Of n_hosts with ranks, this one with n_ranks of them, each near its GPU."""
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
        **rendezvous,
    )


def run_ranks(world: LaunchConfig, arguments: Sequence[str]) -> Failure | None:
    """The ranks of this host, to their end."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    # The agent narrates every failure three times; the launcher says it once.
    for name in ("", ".agent.server.api", ".multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    try:
        elastic_launch(world, sys.executable)("-m", "gpg_megatron.start.train", *arguments)
    except SignalException as stop:
        return stopped(stop.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        code = failure.exitcode
        if code == 2:
            text = "bad input or configuration, as it says there"
            return Failure(text=text, exit_code=2, is_cause=True, is_said=True)
        # Ranks end with 1 when they lose others; they do not kill themselves.
        text = f"policy rank {rank} ended: {_exit_text(code)}"
        return Failure(text=text, exit_code=1, is_cause=code < 0)
    return None


def _exit_text(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def stopped(number: int) -> Failure:
    text = f"stopped by {signal.Signals(number).name}"
    return Failure(text=text, exit_code=128 + number, is_cause=True)
