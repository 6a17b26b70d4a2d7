"""One host's part of the Ray cluster that the engines of a run on several hosts are placed in."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpg_megatron.errors import UserError
from gpg_megatron.rollout.ray_session import OBJECT_STORE_BYTES, VISIBLE

START_TIMEOUT_S = 180.0


def start_ray_host(
    *,
    cluster: str,
    is_head: bool,
    own_address: str,
    scratch_dir: Path,
    engine_places: int,
    devices: Sequence[str],
) -> None:
    """Start Ray's daemons on this host; they outlive this call, and the run's reaper ends them.

    RAY_AUTH_TOKEN in the environment is the cluster's password.

    Args:
        cluster: host:port of the head.
        own_address: of this host.
        scratch_dir: for sockets and logs; at most 40 characters.
        engine_places: how many engines may be placed here.
        devices: their GPUs, as CUDA_VISIBLE_DEVICES spells them; Ray would take all that it finds,
            those of the policy ranks too.

    Raises:
        UserError: Ray refused; its last line is in the message.
        TimeoutError
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
    command += ["--node-ip-address", own_address, "--temp-dir", str(scratch_dir)]
    # Ray's fixed ports collide where two runs, or two hosts of a test, share a machine.
    command += ["--min-worker-port", "0", "--max-worker-port", "0"]
    command += ["--dashboard-agent-listen-port", "0"]
    # An engine asks for one CPU; Ray keeps an idle Python process for each.
    command += ["--num-cpus", str(engine_places)]
    command += ["--object-store-memory", str(OBJECT_STORE_BYTES)]
    command += ["--num-gpus", str(len(devices))]
    if is_head:
        port = cluster.rpartition(":")[2]
        command += ["--head", "--port", port, "--include-dashboard", "false"]
        command += ["--ray-client-server-port", str(_free_port())]
    else:
        command += ["--address", cluster]
    # The shell's own Ray, if there is one, is not this run's.
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment[VISIBLE] = ",".join(devices)
    environment.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    environment.setdefault("RAY_worker_niceness", "0")  # as in ray_session.py
    log = scratch_dir / "ray_start.log"
    with log.open("w") as file:
        try:
            # Not through pipes: the daemons would keep them open.
            done = subprocess.run(
                command, env=environment, stdout=file, stderr=file, timeout=START_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"waited {START_TIMEOUT_S:g} s for Ray to start") from None
    if done.returncode != 0:
        raise UserError(
            f"Ray did not start {'its head' if is_head else 'a node'} at {own_address} for the "
            f"cluster {cluster}: {_last_error(log) or f'exit code {done.returncode}'}"
        )


def _last_error(log: Path) -> str:
    said = [line.strip() for line in log.read_text().splitlines()]
    return next((line for line in reversed(said) if line and " INFO " not in line), "")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
