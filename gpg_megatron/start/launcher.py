"""Starts the policy ranks of this host, and with other hosts the Ray that all of them share.

    one host:       checks -> ranks -> clean up
    several hosts:  hosts.py

Each host has a run id and a reaper of its own, so that nothing is left on it whatever died.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from gpg_megatron.config.sections import Config
from gpg_megatron.errors import UserError
from gpg_megatron.host.leaving import BEGAN_VARIABLE
from gpg_megatron.host.limits import allow_open_files
from gpg_megatron.loop.suspect import SUSPECT_VARIABLE
from gpg_megatron.policy.transformer_engine import check_transformer_engine
from gpg_megatron.start.hosts import run_among_hosts
from gpg_megatron.start.meeting import Failure, Hosts
from gpg_megatron.start.preflight import check_devices, may_start
from gpg_megatron.start.restarts import Restarts
from gpg_megatron.start.world import one_host_world, own_run, run_ranks


def add_host_options(parser: argparse.ArgumentParser) -> None:
    """The options of a run on several hosts; each host gets the same, but for its rank."""
    group = parser.add_argument_group("several hosts", "the same command on each, but --node-rank")
    group.add_argument("--nnodes", type=int, default=1, help="how many hosts")
    group.add_argument("--node-rank", type=int, help="of this host: 0, 1, ...")
    group.add_argument(
        "--nproc-per-node",
        type=int,
        help="policy ranks of this host, 0: engines only; without it they are shared",
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


def launch(config: Config, arguments: Sequence[str], hosts: Hosts) -> int:
    """Check the inputs, then run one torchrun agent on this host; leave nothing of it behind. A
    run in which something died is started again, as trainer.max_restarts says.

    Returns:
        the exit code, the same on all hosts.
    """
    from gpg_megatron.host.device import resolve_device

    allow_open_files()
    on_gpus = resolve_device(config.trainer.device) == "cuda"
    os.environ[BEGAN_VARIABLE] = str(time.time())
    if not on_gpus:  # idle threads that spin would take the cores from other ranks and engines
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    restarts = Restarts(config)
    failure = _run(config, arguments, hosts, on_gpus, attempt=0)
    while failure is not None and restarts.allows(failure, time.monotonic()):
        if hosts.rank == 0:
            print(restarts.line, file=sys.stderr)
        os.environ[SUSPECT_VARIABLE] = str(restarts.step)
        again = [*arguments, *restarts.overrides]
        failure = _run(config, again, hosts, on_gpus, attempt=restarts.done)
    if failure is None:
        return 0
    if line := failure.line(hosts.rank):
        print(f"{line}{restarts.remark}", file=sys.stderr)
    return failure.exit_code


def _run(
    config: Config, arguments: Sequence[str], hosts: Hosts, on_gpus: bool, *, attempt: int
) -> Failure | None:
    """attempt: 0, or how often the run was started again; its inputs are known then."""
    if hosts.count > 1:
        return run_among_hosts(config, arguments, hosts, attempt)
    n_ranks, is_alone = config.policy.world_size, config.rollout.ray_address is None
    if is_alone:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not attempt:
        check_devices(config, n_ranks)
        if on_gpus:
            check_transformer_engine()
        if not may_start(config, n_ranks, attempt=attempt):
            return None
    with own_run() as run_id:
        return run_ranks(config, one_host_world(run_id, n_ranks, on_gpus, is_alone), arguments)
