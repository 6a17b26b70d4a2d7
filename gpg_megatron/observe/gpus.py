"""Memory and utilisation of the GPUs of rank 0's host, read once a second.

NVML, where nvidia-ml-py is installed, tells both of every GPU that is visible; without it torch
tells the memory of the rank's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from importlib import util
from statistics import fmean
from typing import Any, NamedTuple

import torch

from gpg_megatron.observe.metrics import GIGABYTE

INTERVAL_S = 1.0


class Reading(NamedTuple):
    """Of one GPU at one moment."""

    used: int
    """Bytes, of all processes."""
    busy: float | None
    """Share of the last moments in which a kernel ran; None: not known."""


def gpu_metrics(readings: Sequence[Reading]) -> dict[str, float]:
    """memory/gpu_gb: the most that was used on one GPU, 10^9 bytes. throughput/gpu_busy: mean
    share of the time in which a kernel ran, over GPUs and readings, where it is known."""
    found = {}
    if readings:
        found["memory/gpu_gb"] = max(reading.used for reading in readings) / GIGABYTE
    if busy := [reading.busy for reading in readings if reading.busy is not None]:
        found["throughput/gpu_busy"] = fmean(busy)
    return found


def read_gpus() -> list[Reading]:
    """One reading of each GPU that can be read."""
    if util.find_spec("pynvml") is not None:
        import pynvml

        # Some GPUs, and parts of GPUs (MIG), have no utilisation; containers may hide NVML.
        try:
            return [
                Reading(torch.cuda.device_memory_used(i), torch.cuda.utilization(i) / 100)
                for i in range(torch.cuda.device_count())
            ]
        except pynvml.NVMLError:
            pass
    free, total = torch.cuda.mem_get_info()
    return [Reading(total - free, None)]


class GpuWatch:
    """Reads in a thread of its own until close."""

    def __init__(self, read: Callable[[], Sequence[Reading]] = read_gpus) -> None:
        self._read = read
        self._readings: list[Reading] = list(read())
        self._lock = threading.Lock()
        self._stop = threading.Event()
        # CUDA's current device is the thread's.
        self._device: Any = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._watch, name="gpus", daemon=True)
        self._thread.start()

    def take(self) -> dict[str, float]:
        """The metrics since the last call."""
        with self._lock:
            taken, self._readings = self._readings, []
        return gpu_metrics(taken)

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while not self._stop.wait(INTERVAL_S):
            found = self._read()
            with self._lock:
                self._readings += found
