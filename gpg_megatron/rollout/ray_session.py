"""Ray for the rollout: a private one inside this process, or an existing cluster."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpg_megatron.config.sections import RolloutConfig
from gpg_megatron.errors import RunError, UserError

OBJECT_STORE_BYTES = 256 << 20
"""Only requests and completions pass through it; weights do not."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


def open_ray(
    config: RolloutConfig,
    *,
    run_id: str,
    scratch_dir: Path,
    gpus_per_engine: int,
    devices: Sequence[str] | None = None,
) -> None:
    """ray.init, quiet; a private Ray gets exactly the CPUs that the engines ask for.

    Args:
        devices: GPUs that a private Ray may give away, as CUDA_VISIBLE_DEVICES spells them;
            None: those that it finds.

    Raises:
        UserError: no cluster at config.ray_address, or too few free resources.
        RunError: a private Ray did not start.
    """
    _set_environment()
    import ray

    assert not ray.is_initialized(), "one fleet at a time in a process"
    quiet: dict[str, Any] = {
        "namespace": run_id,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if config.ray_address is None:
        try:
            with _visible(devices):
                ray.init(
                    num_cpus=config.num_engines,  # Ray keeps one idle Python process per CPU
                    num_gpus=None if devices is None else len(devices),
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(scratch_dir),
                    **quiet,
                )
        except Exception as error:  # Ray's own time-outs have no narrower type
            raise RunError(f"a private Ray did not start: {str(error).splitlines()[0]}") from error
    else:
        try:
            ray.init(address=config.ray_address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"rollout.ray_address {config.ray_address}: no Ray cluster answers ({reason}); "
                "expected the address of a running one, or none for a private Ray"
            ) from None
    # Ray would answer SIGTERM, by which the launcher ends a rank, with a traceback.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    check_resources(
        [node["Resources"] for node in ray.nodes() if node["Alive"]],
        num_engines=config.num_engines,
        gpus_per_engine=gpus_per_engine,
    )


def raylets() -> list[Any]:
    """psutil's processes of a private Ray that place what is started; of another Ray none."""
    import psutil

    return [child for child in psutil.Process().children() if child.name() == "raylet"]


def has_ended(process: Any) -> bool:
    """psutil's process, also when nobody has asked for its exit code yet."""
    import psutil

    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def leave_ray(limit_s: float) -> None:
    """Leave Ray, ending it if it is private. A raylet that does not answer, since it is stopped,
    would keep this from returning: after limit_s it is killed."""
    import psutil
    import ray

    mine = raylets()

    def kill() -> None:
        for raylet in mine:
            with suppress(psutil.NoSuchProcess):
                raylet.kill()

    late = threading.Timer(limit_s, kill)
    late.start()
    try:
        ray.shutdown()
    finally:
        late.cancel()


def _set_environment() -> None:
    """What Ray reads when it is imported, and when it starts."""
    # A thread that asks when the run has ended would start another Ray.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would give its workers the lowest priority: on a busy CPU the engines would starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@contextmanager
def _visible(devices: Sequence[str] | None) -> Iterator[None]:
    """Processes that are started within see these GPUs only. This one has opened its own."""
    before = os.environ.get(VISIBLE)
    if devices is not None:
        os.environ[VISIBLE] = ",".join(devices)
    try:
        yield
    finally:
        os.environ.pop(VISIBLE, None)
        if before is not None:
            os.environ[VISIBLE] = before


def check_resources(
    nodes: list[dict[str, float]], *, num_engines: int, gpus_per_engine: int
) -> None:
    """Whether Ray can ever place the engines, each with one CPU and all its GPUs on one node.

    Args:
        nodes: the total resources of each living node, as ray.nodes() gives them.

    Raises:
        UserError: they do not fit; the message names what is asked and what there is.
    """
    places = 0
    for node in nodes:
        fit = int(node.get("CPU", 0))
        if gpus_per_engine:
            fit = min(fit, int(node.get("GPU", 0)) // gpus_per_engine)
        places += fit
    if places < num_engines:
        need = f"{num_engines} engines of 1 CPU"
        need += f" and {gpus_per_engine} GPUs on one node" if gpus_per_engine else ""
        have = "; ".join(f"{n.get('CPU', 0):g} CPU, {n.get('GPU', 0):g} GPU" for n in nodes)
        raise UserError(
            f"rollout.num_engines: {need} are asked for, room for {places} in Ray's nodes "
            f"({have}); expected fewer engines, a smaller rollout.tensor_model_parallel_size "
            "or more nodes"
        )
