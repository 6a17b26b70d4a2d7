"""The hosts of a run, and this one's part of it where they are several.

meet -> shares -> checks -> Ray on host 0 -> Ray elsewhere -> ranks -> compare -> clean up
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from gpg_megatron.config.sections import Config
from gpg_megatron.errors import UserError
from gpg_megatron.host.network import address_towards, free_port, interface_of
from gpg_megatron.host.reaper import scratch_directory
from gpg_megatron.loop.inputs import check_model
from gpg_megatron.placement.devices import visible_devices
from gpg_megatron.placement.hosts import HostOffer, HostShare, share_hosts
from gpg_megatron.policy.transformer_engine import check_transformer_engine
from gpg_megatron.start.leaving import leaving_in_order
from gpg_megatron.start.meeting import Meeting
from gpg_megatron.start.preflight import may_start
from gpg_megatron.start.world import Failure, own_run, run_ranks, stopped, world_of

ONE_HOST_TRANSPORTS = ("shm", "cuda_ipc")
RENDEZVOUS_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """The hosts of a run and this one's place among them."""

    count: int = 1
    rank: int = 0
    """Of this host; policy rank 0 is on host 0."""
    ranks_here: int | None = None
    """Policy ranks of this host, 0 for engines only; None: as placement/hosts.py shares them."""
    address: str = ""
    """Of host 0."""
    port: int = 0
    """On host 0, for the launchers."""
    ray_port: int = 0
    """On host 0."""

    def ranks_of_a_host(self, world_size: int) -> int:
        """Policy ranks of this host, before the hosts have shared them: as many as it is told, or
        an equal part."""
        even = -(-world_size // self.count)
        return even if self.ranks_here is None else self.ranks_here


def add_host_options(parser: argparse.ArgumentParser) -> None:
    """The options of a run on several hosts; each host gets the same, but for its rank."""
    add = parser.add_argument_group("several hosts", "the same command on each, but --node-rank")
    add.add_argument("--nnodes", type=int, default=1, help="how many hosts")
    add.add_argument("--node-rank", type=int, help="of this host: 0, 1, ...")
    text = "policy ranks of this host, 0: engines only; without it they are shared"
    add.add_argument("--nproc-per-node", type=int, help=text)
    add.add_argument("--master-addr", help="name or address of host 0")
    add.add_argument("--master-port", type=int, default=29500, help="free on host 0")
    add.add_argument("--ray-port", type=int, default=6379, help="free on host 0")


def hosts_of(arguments: argparse.Namespace) -> Hosts:
    """Raises UserError: an option is missing, or the host's rank is none."""
    count, rank = arguments.nnodes, arguments.node_rank
    if count == 1:
        return Hosts()
    if count < 1:
        raise UserError(f"--nnodes is {count}; expected at least 1")
    if rank is None or not 0 <= rank < count:
        raise UserError(f"--node-rank is {rank}; expected 0 to {count - 1} with --nnodes {count}")
    if arguments.nproc_per_node is not None and arguments.nproc_per_node < 0:
        raise UserError(f"--nproc-per-node is {arguments.nproc_per_node}; expected at least 0")
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


def meet(config: Config, hosts: Hosts) -> Meeting:
    """Raises UserError: the run is one of one host."""
    if config.bridge.transport in ONE_HOST_TRANSPORTS:
        raise UserError(
            f"bridge.transport={config.bridge.transport} needs policy ranks and engines on one "
            f"host, and --nnodes is {hosts.count}; expected auto, gloo or nccl"
        )
    return Meeting(hosts.count, hosts.rank, (hosts.address, hosts.port))


def run_among_hosts(
    config: Config,
    arguments: Sequence[str],
    hosts: Hosts,
    meeting: Meeting,
    on_gpus: bool,
    attempt: int,
) -> Failure | None:
    """attempt: restarts so far."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException

    _answer_signals(_raise_stop)
    meeting.begin(attempt)
    with own_run() as run_id:
        failure: Failure | None = None
        try:
            try:
                failure = _run_host(config, arguments, hosts, meeting, run_id, on_gpus, attempt)
            except (UserError, TimeoutError, DistError) as error:
                # torch's: a host is gone, or does not come to the rendezvous.
                code = 2 if isinstance(error, UserError) else 1
                text, is_cause = str(error).splitlines()[0], not isinstance(error, DistError)
                failure = Failure(text=text, exit_code=code, is_cause=is_cause)
            # A signal must not keep this host from telling the others.
            _answer_signals(signal.SIG_IGN)
        except SignalException as stop:
            _answer_signals(signal.SIG_IGN)
            failure = failure or stopped(stop.sigval)
        return meeting.end(failure and replace(failure, host=hosts.rank))


def _raise_stop(number: int, _frame: object) -> NoReturn:
    """As torch's agent does while it has ranks, before and after."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    raise SignalException(f"signal {number}", sigval=signal.Signals(number))


def _answer_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, handler)


def _run_host(
    config: Config,
    arguments: Sequence[str],
    hosts: Hosts,
    meeting: Meeting,
    run_id: str,
    on_gpus: bool,
    attempt: int,
) -> Failure | None:
    """Host 0 checks what all need, once; then Ray everywhere, then the ranks."""
    offers = meeting.all_say("to start", _offer(hosts, on_gpus))
    shares = _shares(config, offers)
    share = shares[hosts.rank]
    # On host 0 its own name may resolve to a loopback address: another host says what it sees.
    seen = socket.gethostbyname(hosts.address) if hosts.rank == 1 else None
    head = meeting.all_say("the address of host 0", seen)[1]
    own_address = address_towards(head)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, interface_of(own_address))
    works = hosts.rank > 0 or may_start(config, share.n_ranks, attempt=attempt)
    if hosts.rank:
        check_model(config)
    if on_gpus:
        check_transformer_engine()
    has_own_ray, cluster = config.rollout.ray_address is None, f"{head}:{hosts.ray_port}"
    if has_own_ray:
        arguments = [*arguments, f"rollout.ray_address={cluster}"]
        # Whatever token this user's other clusters have, each host must have the same one here.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": offers[0]["token"]}
        if works and hosts.rank == 0:
            _start_ray(cluster, run_id, own_address, share, is_head=True)
    if not meeting.all_say("the checks", works)[0]:
        return None
    if has_own_ray and hosts.rank:
        _start_ray(cluster, run_id, own_address, share, is_head=False)
    meeting.all_say("to have Ray")
    if not share.n_ranks:
        with leaving_in_order(config):
            meeting.wait_for_the_end()
        return None
    # torchrun knows of no hosts without ranks, and would sort the others by name.
    with_ranks = [k for k, other in enumerate(shares) if other.n_ranks]
    world = world_of(
        len(with_ranks),
        share.n_ranks,
        on_gpus,
        run_id="gpg",
        rdzv_backend="static",
        rdzv_endpoint=f"{head}:{offers[0]['port']}",
        rdzv_configs={"rank": with_ranks.index(hosts.rank), "timeout": RENDEZVOUS_TIMEOUT_S},
    )
    return run_ranks(config, world, arguments)


def _offer(hosts: Hosts, on_gpus: bool) -> dict[str, Any]:
    """What this host says of itself; the port, for the policy ranks, and Ray's token are those of
    host 0."""
    import torch

    return {
        "n_gpus": torch.cuda.device_count() if on_gpus else None,
        "n_ranks": hosts.ranks_here,
        "port": free_port(),
        "token": secrets.token_hex(32),
    }


def _shares(config: Config, offers: Sequence[Mapping[str, Any]]) -> tuple[HostShare, ...]:
    """[host] what it has of the run; all compute the same. Raises UserError."""
    return share_hosts(
        [HostOffer(n_gpus=offer["n_gpus"], n_ranks=offer["n_ranks"]) for offer in offers],
        mode=config.trainer.placement,
        world_size=config.policy.world_size,
        group_size=config.policy.tensor_model_parallel_size,
        n_engines=config.rollout.num_engines,
        workers_per_engine=config.rollout.tensor_model_parallel_size,
    )


def _start_ray(
    cluster: str, run_id: str, own_address: str, share: HostShare, *, is_head: bool
) -> None:
    """This host's daemons."""
    import torch

    from gpg_megatron.rollout.ray_host import start_ray_host

    devices = visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())
    start_ray_host(
        cluster=cluster,
        is_head=is_head,
        own_address=own_address,
        client_port=free_port(),
        scratch_dir=scratch_directory(run_id),
        engine_places=share.n_engines,
        devices=devices[share.first_device :][: share.n_devices],
    )
