"""Starts the policy ranks of this host, and with other hosts the Ray that all of them share.

    one host:       checks -> ranks -> clean up
    several hosts:  hosts.py

Each host has a run id and a reaper of its own, so that nothing is left on it whatever died.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

from gpg_megatron.config.sections import Config
from gpg_megatron.host.allocator import allocator_variables
from gpg_megatron.host.cores import waiting_variables
from gpg_megatron.host.leaving import BEGAN_VARIABLE
from gpg_megatron.host.limits import allow_open_files
from gpg_megatron.loop.suspect import SUSPECT_VARIABLE
from gpg_megatron.policy.transformer_engine import check_transformer_engine
from gpg_megatron.start.hosts import Hosts, meet, run_among_hosts
from gpg_megatron.start.preflight import check_devices, may_start
from gpg_megatron.start.restarts import Restarts
from gpg_megatron.start.world import Failure, one_host_world, own_run, run_ranks


def launch(config: Config, arguments: Sequence[str], hosts: Hosts) -> int:
    """Check the inputs, then run one torchrun agent on this host; leave nothing of it behind. A
    run in which something died is started again, as trainer.max_restarts says. Returns the exit
    code, the same on all hosts."""
    from gpg_megatron.host.device import resolve_device

    allow_open_files()
    on_gpus = resolve_device(config.trainer.device) == "cuda"
    os.environ[BEGAN_VARIABLE] = str(time.time())
    if not on_gpus:
        by_turns = config.trainer.max_staleness == 0
        os.environ |= waiting_variables(os.environ, by_turns=by_turns)
        os.environ |= allocator_variables(os.environ)
    restarts = Restarts(config)
    with meet(config, hosts) if hosts.count > 1 else nullcontext() as meeting:

        def run(attempt: int, *more: str) -> Failure | None:
            if meeting is None:
                return _run_here(config, [*arguments, *more], on_gpus, attempt)
            return run_among_hosts(config, [*arguments, *more], hosts, meeting, on_gpus, attempt)

        failure = run(0)
        while failure is not None and restarts.allows(failure, time.monotonic()):
            if hosts.rank == 0:
                print(restarts.line, file=sys.stderr)
            os.environ[SUSPECT_VARIABLE] = str(restarts.step)
            failure = run(restarts.done, *restarts.overrides)
        if failure is None:
            return 0
        if line := failure.line(hosts.rank):
            print(f"{line}{restarts.remark}", file=sys.stderr)
        return failure.exit_code


def _run_here(
    config: Config, arguments: Sequence[str], on_gpus: bool, attempt: int
) -> Failure | None:
    """attempt: 0, or how often the run was started again; its inputs are known then."""
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
