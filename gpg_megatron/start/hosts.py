"""This host's part of a run on several hosts.

meet -> checks -> shares -> Ray on host 0 -> Ray elsewhere -> ranks -> leave -> clean up
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NoReturn

from gpg_megatron.config.sections import Config
from gpg_megatron.errors import UserError
from gpg_megatron.host.network import address_towards, interface_of
from gpg_megatron.host.reaper import scratch_directory
from gpg_megatron.loop.inputs import check_model
from gpg_megatron.placement.devices import visible_devices
from gpg_megatron.placement.hosts import HostOffer, HostShare, share_hosts
from gpg_megatron.policy.transformer_engine import check_transformer_engine
from gpg_megatron.start.leaving import leaving_in_order
from gpg_megatron.start.meeting import Failure, Hosts, Meeting
from gpg_megatron.start.preflight import may_start
from gpg_megatron.start.world import own_run, run_ranks, stopped, world_of

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

ONE_HOST_TRANSPORTS = ("shm", "cuda_ipc")
RENDEZVOUS_TIMEOUT_S = 120


def _raise_stop(number: int, _frame: object) -> NoReturn:
    """As torch's agent does while it has ranks, before and after."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    raise SignalException(f"signal {number}", sigval=signal.Signals(number))


def run_among_hosts(
    config: Config, arguments: Sequence[str], hosts: Hosts, attempt: int
) -> Failure | None:
    """attempt: restarts so far."""
    if config.bridge.transport in ONE_HOST_TRANSPORTS:
        raise UserError(
            f"bridge.transport={config.bridge.transport} needs policy ranks and engines on one "
            f"host, and --nnodes is {hosts.count}; expected auto, gloo or nccl"
        )
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException

    _answer_signals(_raise_stop)
    with own_run() as run_id:
        meeting = Meeting(hosts, attempt=attempt)
        failure: Failure | None = None
        try:
            try:
                failure = _run_host(meeting, config, arguments, hosts, run_id, attempt)
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
            failure = failure or stopped(stop.sigval)
        return meeting.end(failure and replace(failure, host=hosts.rank))


def _answer_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, handler)


def _run_host(
    meeting: Meeting,
    config: Config,
    arguments: Sequence[str],
    hosts: Hosts,
    run_id: str,
    attempt: int,
) -> Failure | None:
    """Host 0 checks what all need, once; then Ray everywhere, then the ranks."""
    from gpg_megatron.host.device import resolve_device

    meeting.wait_for_all("to start")
    meeting.watch()
    if hosts.rank == 0:
        n_ranks = hosts.ranks_of_a_host(config.policy.world_size)
        works = may_start(config, n_ranks, attempt=attempt)
        meeting.tell("the checks", "work" if works else "none")
    else:
        check_model(config)
        works = meeting.hear("the checks") == "work"
    if not works:
        return None
    # On host 0 its own name may resolve to a loopback address: another host says what it sees.
    if hosts.rank == 1:
        meeting.tell("the address of host 0", socket.gethostbyname(hosts.address))
    hosts = replace(hosts, address=meeting.hear("the address of host 0"))
    own_address = address_towards(hosts.address)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, interface_of(own_address))
    on_gpus = resolve_device(config.trainer.device) == "cuda"
    if on_gpus:
        check_transformer_engine()
    arguments = list(arguments)
    shares = _shares(meeting, config, hosts)
    if config.rollout.ray_address is None:
        arguments.append(f"rollout.ray_address={hosts.address}:{hosts.ray_port}")
        _start_ray(meeting, hosts, run_id, own_address, shares[hosts.rank])
    if not shares[hosts.rank].n_ranks:
        with leaving_in_order(config):
            meeting.wait_for_the_end()
        return None
    return run_ranks(config, _world_of_hosts(hosts, shares, on_gpus, attempt), arguments)


def _world_of_hosts(
    hosts: Hosts, shares: Sequence[HostShare], on_gpus: bool, attempt: int
) -> LaunchConfig:
    """The hosts that have ranks, in order; torchrun knows no others, and would sort by name."""
    with_ranks = [k for k, share in enumerate(shares) if share.n_ranks]
    return world_of(
        len(with_ranks),
        shares[hosts.rank].n_ranks,
        on_gpus,
        run_id=f"gpg{attempt}",
        rdzv_backend="static",
        rdzv_endpoint=f"{hosts.address}:{hosts.port}",
        rdzv_configs={"rank": with_ranks.index(hosts.rank), "timeout": RENDEZVOUS_TIMEOUT_S},
    )


def _shares(meeting: Meeting, config: Config, hosts: Hosts) -> tuple[HostShare, ...]:
    """What each host has of the run; all compute the same from what each says. Raises UserError."""
    import torch

    from gpg_megatron.host.device import resolve_device

    on_gpus = resolve_device(config.trainer.device) == "cuda"
    offer = HostOffer(
        n_gpus=torch.cuda.device_count() if on_gpus else None, n_ranks=hosts.ranks_here
    )
    meeting.tell(f"what host {hosts.rank} has", json.dumps(asdict(offer)))
    said = [json.loads(meeting.hear(f"what host {k} has")) for k in range(hosts.count)]
    return share_hosts(
        [HostOffer(**one) for one in said],
        mode=config.trainer.placement,
        world_size=config.policy.world_size,
        group_size=config.policy.tensor_model_parallel_size,
        n_engines=config.rollout.num_engines,
        workers_per_engine=config.rollout.tensor_model_parallel_size,
    )


def _start_ray(
    meeting: Meeting, hosts: Hosts, run_id: str, own_address: str, share: HostShare
) -> None:
    """The head on host 0, then a node on each other host; returns when all of them stand."""
    import torch

    from gpg_megatron.rollout.ray_host import start_ray_host

    # Whatever token this user's other clusters have, each host must have the same one here.
    token = secrets.token_hex(32) if hosts.rank == 0 else meeting.hear("Ray's token")
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    devices = visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())
    start_ray_host(
        cluster=f"{hosts.address}:{hosts.ray_port}",
        is_head=hosts.rank == 0,
        own_address=own_address,
        scratch_dir=scratch_directory(run_id),
        engine_places=share.n_engines,
        devices=devices[share.first_device :][: share.n_devices],
    )
    if hosts.rank == 0:  # the head stands, others may join it
        meeting.tell("Ray's token", token)
    meeting.wait_for_all("to have Ray")
