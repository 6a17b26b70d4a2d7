"""Starts the policy ranks of this host, and with other hosts the Ray that all of them share.

    one host:       checks -> ranks -> clean up
    several hosts:  meet -> checks -> Ray on host 0 -> Ray elsewhere -> ranks -> leave -> clean up

Each host has a run id and a reaper of its own, so that nothing is left on it whatever died.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from gpg_megatron.config.sections import Config
from gpg_megatron.errors import UserError
from gpg_megatron.host.network import address_towards, interface_of
from gpg_megatron.host.reaper import (
    RUN_ID_VARIABLE,
    cleanup_run,
    new_run_id,
    scratch_directory,
    start_reaper,
)
from gpg_megatron.loop.inputs import check_model
from gpg_megatron.start.meeting import Failure, Hosts, Meeting
from gpg_megatron.start.preflight import check_devices, has_work, preflight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.launcher.api import LaunchConfig

ONE_HOST_TRANSPORTS = ("shm", "cuda_ipc")
RENDEZVOUS_TIMEOUT_S = 120


def add_host_options(parser: argparse.ArgumentParser) -> None:
    """The options of a run on several hosts; each host gets the same, but for its rank."""
    group = parser.add_argument_group("several hosts", "the same command on each, but --node-rank")
    group.add_argument("--nnodes", type=int, default=1, help="how many hosts")
    group.add_argument("--node-rank", type=int, help="of this host: 0, 1, ...")
    group.add_argument(
        "--nproc-per-node", type=int, help="policy ranks of this host; all, shared evenly, unless"
    )
    group.add_argument("--master-addr", help="name or address of host 0")
    group.add_argument("--master-port", type=int, default=29500, help="free on host 0")
    group.add_argument("--ray-port", type=int, default=6379, help="free on host 0")


def hosts_of(arguments: argparse.Namespace) -> Hosts:
    """Raises UserError: an option is missing, or the host's rank is none."""
    count, rank = arguments.nnodes, arguments.node_rank
    if count == 1:
        return Hosts()
    if count < 1:
        raise UserError(f"--nnodes is {count}; expected at least 1")
    if rank is None or not 0 <= rank < count:
        raise UserError(f"--node-rank is {rank}; expected 0 to {count - 1} with --nnodes {count}")
    if not arguments.master_addr:
        raise UserError(f"--master-addr is not set; with --nnodes {count} it names the first host")
    return Hosts(
        count=count,
        rank=rank,
        ranks_here=arguments.nproc_per_node,
        address=arguments.master_addr,
        port=arguments.master_port,
        ray_port=arguments.ray_port,
    )


def launch(config: Config, arguments: Sequence[str], hosts: Hosts) -> int:
    """Check the inputs, then run one torchrun agent on this host; leave nothing of it behind.

    Returns:
        the exit code, the same on all hosts.
    """
    from gpg_megatron.host.device import resolve_device

    n_ranks = hosts.local_ranks(config.policy.world_size)
    check_devices(config, n_ranks)
    if resolve_device(config.trainer.device) == "cpu":
        # Idle threads that spin would take the cores from other ranks, engines and programs.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if hosts.count == 1:
        if not has_work(config, preflight(config, n_ranks)):
            return 0
        with _own_run() as run_id:
            failure = _run_ranks(_world(config, run_id, hosts), arguments)
    else:
        failure = _run_among_hosts(config, arguments, hosts)
    if failure is None:
        return 0
    if line := failure.line(hosts.rank):
        print(line, file=sys.stderr)
    return failure.exit_code


@contextmanager
def _own_run() -> Iterator[str]:
    """A run id and its reaper; at the end nothing of the run is left on this host."""
    run_id = os.environ[RUN_ID_VARIABLE] = new_run_id()
    start_reaper(run_id)
    try:
        yield run_id
    finally:
        cleanup_run(run_id)


def _world(config: Config, run_id: str, hosts: Hosts) -> LaunchConfig:
    from torch.distributed.launcher.api import LaunchConfig

    if hosts.count == 1:
        backend, endpoint, options = "c10d", "localhost:0", {}
    else:
        # Host k has the k-th ranks; c10d would order hosts by name.
        backend, endpoint = "static", f"{hosts.address}:{hosts.port}"
        options = {"rank": hosts.rank, "timeout": RENDEZVOUS_TIMEOUT_S}
    return LaunchConfig(
        min_nodes=hosts.count,
        max_nodes=hosts.count,
        nproc_per_node=hosts.local_ranks(config.policy.world_size),
        run_id=run_id if hosts.count == 1 else "gpg",
        rdzv_backend=backend,
        rdzv_endpoint=endpoint,
        rdzv_configs=options,
        max_restarts=0,
        monitor_interval=0.5,
    )


def _run_ranks(world: LaunchConfig, arguments: Sequence[str]) -> Failure | None:
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
        return _stopped(stop.sigval)
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


def _stopped(number: int) -> Failure:
    text = f"stopped by {signal.Signals(number).name}"
    return Failure(text=text, exit_code=128 + number, is_cause=True)


# ---- several hosts ----------------------------------------------------------------------


def _raise_stop(number: int, _frame: object) -> NoReturn:
    """As torch's agent does while it has ranks, before and after."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    raise SignalException(f"signal {number}", sigval=signal.Signals(number))


def _run_among_hosts(config: Config, arguments: Sequence[str], hosts: Hosts) -> Failure | None:
    if config.bridge.transport in ONE_HOST_TRANSPORTS:
        raise UserError(
            f"bridge.transport={config.bridge.transport} needs policy ranks and engines on one "
            f"host, and --nnodes is {hosts.count}; expected gloo or nccl"
        )
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException

    _answer_signals(_raise_stop)
    with _own_run() as run_id:
        meeting = Meeting(hosts)
        failure: Failure | None = None
        try:
            try:
                failure = _run_host(meeting, config, arguments, hosts, run_id)
            except UserError as error:
                failure = Failure(text=str(error), exit_code=2, is_cause=True)
            except TimeoutError as error:
                failure = Failure(text=str(error), exit_code=1, is_cause=True)
            except DistError as error:  # host 0 is gone, or a host does not come to the rendezvous
                failure = Failure(text=str(error).splitlines()[0], exit_code=1, is_cause=False)
            # A signal must not keep this host from telling the others.
            _answer_signals(signal.SIG_IGN)
        except SignalException as stop:
            _answer_signals(signal.SIG_IGN)
            failure = failure or _stopped(stop.sigval)
        return meeting.end(failure and replace(failure, host=hosts.rank))


def _answer_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, handler)


def _run_host(
    meeting: Meeting, config: Config, arguments: Sequence[str], hosts: Hosts, run_id: str
) -> Failure | None:
    """Host 0 checks what all need, once; then Ray everywhere, then the ranks."""
    meeting.wait_for_all("to start")
    meeting.watch()
    if hosts.rank == 0:
        found = preflight(config, hosts.local_ranks(config.policy.world_size))
        goes_on = has_work(config, found)
        meeting.tell("the checks", "work" if goes_on else "none")
    else:
        check_model(config)
        goes_on = meeting.hear("the checks") == "work"
    if not goes_on:
        return None
    # On host 0 its own name may resolve to a loopback address: another host says what it sees.
    if hosts.rank == 1:
        meeting.tell("the address of host 0", socket.gethostbyname(hosts.address))
    hosts = replace(hosts, address=meeting.hear("the address of host 0"))
    own_address = address_towards(hosts.address)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, interface_of(own_address))
    arguments = list(arguments)
    if config.rollout.ray_address is None:
        arguments.append(f"rollout.ray_address={hosts.address}:{hosts.ray_port}")
        _start_ray(meeting, config, hosts, run_id, own_address)
    return _run_ranks(_world(config, run_id, hosts), arguments)


def _start_ray(
    meeting: Meeting, config: Config, hosts: Hosts, run_id: str, own_address: str
) -> None:
    """The head on host 0, then a node on each other host; returns when all of them stand."""
    from gpg_megatron.host.device import resolve_device
    from gpg_megatron.rollout.ray_host import start_ray_host

    # Whatever token this user's other clusters have, each host must have the same one here.
    token = secrets.token_hex(32) if hosts.rank == 0 else meeting.hear("Ray's token")
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    count, with_gpus = config.rollout.num_engines, resolve_device(config.trainer.device) == "cuda"
    start_ray_host(
        cluster=f"{hosts.address}:{hosts.ray_port}",
        is_head=hosts.rank == 0,
        own_address=own_address,
        scratch_dir=scratch_directory(run_id),
        # Without GPUs, which decide where there are some, the hosts share the engines evenly.
        engine_places=count if with_gpus else math.ceil(count / hosts.count),
        with_gpus=with_gpus,
    )
    if hosts.rank == 0:  # the head stands, others may join it
        meeting.tell("Ray's token", token)
    meeting.wait_for_all("to have Ray")
