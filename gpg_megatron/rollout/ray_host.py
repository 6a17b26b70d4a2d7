"""One host's part of the Ray cluster that the engines of a run on several hosts are placed in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpg_megatron.errors import UserError
from gpg_megatron.rollout.ray_session import OBJECT_STORE_BYTES, VISIBLE

LIMIT_S = 180.0


def start_ray_host(
    *,
    cluster: str,
    is_head: bool,
    own_address: str,
    client_port: int,
    scratch_dir: Path,
    engine_places: int,
    devices: Sequence[str],
) -> None:
    """Start Ray's daemons on this host; they outlive this call, and the run's reaper ends them.
    RAY_AUTH_TOKEN in the environment is the cluster's password.

    Args:
        cluster: host:port of the head.
        client_port: for Ray's clients, of which there are none; free.
        scratch_dir: for sockets and logs; at most 40 characters.
        engine_places: how many engines may be placed here.
        devices: their GPUs, as CUDA_VISIBLE_DEVICES spells them; Ray would take all that it finds,
            those of the policy ranks too.

    Raises:
        UserError: Ray refused; its last line is in the message.
        TimeoutError
    """
    # Ray's fixed ports collide where two runs, or two hosts of a test, share a machine.
    options: dict[str, object] = {
        "node-ip-address": own_address, "temp-dir": scratch_dir,
        "min-worker-port": 0, "max-worker-port": 0, "dashboard-agent-listen-port": 0,
        # An engine asks for one CPU; Ray keeps an idle Python process for each.
        "num-cpus": engine_places, "num-gpus": len(devices),
        "object-store-memory": OBJECT_STORE_BYTES,
    }  # fmt: skip
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
    if is_head:
        command += ["--head", "--include-dashboard", "false"]
        options |= {"port": cluster.rpartition(":")[2], "ray-client-server-port": client_port}
    else:
        options["address"] = cluster
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    # The shell's own Ray, if there is one, is not this run's.
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    env[VISIBLE] = ",".join(devices)
    env.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    env.setdefault("RAY_worker_niceness", "0")  # as in ray_session.py
    log = scratch_dir / "ray_start.log"
    try:
        with log.open("w") as file:  # no pipe: the daemons would keep it open
            subprocess.run(command, env=env, stdout=file, stderr=file, timeout=LIMIT_S, check=True)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"waited {LIMIT_S:g} s for Ray to start") from None
    except subprocess.CalledProcessError as error:
        said = [x.strip() for x in log.read_text().splitlines() if x.strip() and " INFO " not in x]
        raise UserError(
            f"Ray did not start {'its head' if is_head else 'a node'} at {own_address} for the "
            f"cluster {cluster}: {said[-1] if said else f'exit code {error.returncode}'}"
        ) from None
