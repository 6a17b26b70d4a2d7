"""Publishing a policy's weights into another process that holds parameters as an engine does.

    publish_sender: a policy rank, WeightBridge --way--> publish_worker: Receiver into tensors

Neither needs vLLM: where its workers keep their parameters is known (bridge/engine_layout.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpg_megatron.host.device import Device
from tests.gpu.machine import ROOT
from tests.gpu.rows.sized import sized_config

LIMIT_S = 150
PATIENCE_S = 10.0
"""The bridge's own limit, where a sender is killed."""


def shm(device: Device, folder: Path) -> str:
    """Over shared memory."""
    return _published(_job(device, folder, "shm"))


def cuda_ipc(device: Device, folder: Path) -> str:
    """Over CUDA memory that both processes map; the worker numbers its GPUs in another way."""
    plain = _published(_job(device, folder, "cuda_ipc"))
    expandable = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    expanded = _published(_job(device, folder, "cuda_ipc"), expandable)
    return f"{plain}; with expandable segments {expanded}"


def peers(device: Device, folder: Path) -> str:
    """From one GPU to another over whatever auto takes."""
    return _published(_job(device, folder, "auto", worker_gpu=1))


def network(device: Device, folder: Path) -> str:
    """As between hosts: NCCL from GPU to GPU, gloo on the CPU."""
    way = "nccl" if device == "cuda" else "gloo"
    return _published(_job(device, folder, way, worker_gpu=1))


def killed(device: Device, folder: Path) -> str:
    """A sender dies between two buckets; the worker gives up, and the next sender succeeds."""
    told = []
    for way in ("shm", "cuda_ipc") if device == "cuda" else ("shm",):
        job = _job(device, folder, way) | {"timeout_s": PATIENCE_S}
        with _worker(job):
            code = _sender(job | {"dies_at": 2})
            assert code == -signal.SIGKILL, f"the sender was to be killed, and ended with {code}"
            assert _sender(job) == 0, f"{way}: the next sender failed; see the log"
        failures = json.loads(Path(job["worker_out"]).read_text())["failures"]
        assert len(failures) == 1, failures
        told.append(f"{way}: {failures[0]}; the next sender published")
    return "; ".join(told)


def _job(device: Device, folder: Path, way: str, worker_gpu: int = 0) -> dict[str, Any]:
    """What both processes are told; config.json is there before they are.

    Args:
        worker_gpu: its number as this process counts; the worker itself sees them in the other
            order, or by another name.
    """
    sized_config(device, folder)
    return {
        "device": device,
        "way": way,
        "folder": str(folder),
        "socket": str(folder / "control"),
        "sender_out": str(folder / "sender.json"),
        "worker_out": str(folder / "worker.json"),
        "timeout_s": 60.0,
        "worker_gpu": worker_gpu,
    }


def _published(job: dict[str, Any], environment: dict[str, str] | None = None) -> str:
    with _worker(job):
        code = _sender(job, environment)
    assert code == 0, f"the sender ended with {code}: {_last_words(job)}"
    seen = json.loads(Path(job["sender_out"]).read_text())
    return (
        f"by {', '.join(seen['ways'])}: {seen['bytes'] / 1e9:.3g} GB, right in {seen['tensors']} "
        f"tensors; {seen['bytes'] / 1e9 / seen['seconds']:.2g} GB/s"
    )


def _last_words(job: dict[str, Any]) -> str:
    out = Path(job["sender_out"])
    return str(json.loads(out.read_text()).get("error", "")) if out.exists() else "nothing said"


def _sender(job: dict[str, Any], environment: dict[str, str] | None = None) -> int:
    """Run a sender to its end; its exit code."""
    Path(job["sender_out"]).unlink(missing_ok=True)
    process = _start("publish_sender", job, environment or {})
    try:
        return process.wait(LIMIT_S)
    finally:
        process.kill()
        process.wait()


@contextmanager
def _worker(job: dict[str, Any]) -> Iterator[None]:
    """A worker that serves senders until the end of the block."""
    Path(job["socket"]).unlink(missing_ok=True)
    environment: dict[str, str] = {}
    index = 0
    if job["device"] == "cuda":
        environment, index = _seen_otherwise(job["worker_gpu"])
    process = _start("publish_worker", job | {"index": index}, environment)
    try:
        yield
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        process.kill()
        process.wait()


def _seen_otherwise(gpu: int) -> tuple[dict[str, str], int]:
    """An environment in which the GPUs have other numbers, or the only one another name; and the
    number that one of them has there."""
    count = torch.cuda.device_count()
    names = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in reversed(range(count))]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names)}, count - 1 - gpu


def _start(
    module: str, job: dict[str, Any], environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.gpu.rows.{module}", json.dumps(job)],
        cwd=ROOT,
        env=os.environ | environment,
    )
