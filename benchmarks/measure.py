"""Seconds and peak memory of a block, on the CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path

import torch

from gpg_megatron.host.device import Device


class Clock:
    """Seconds of the wall clock, and of all threads of the process, inside a with block. What the
    block launched on a GPU belongs to it."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def __enter__(self) -> Clock:
        synchronize(self._device)
        self._begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        synchronize(self._device)
        wall, cpu = self._begin
        self.seconds, self.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu


class PeakMemory:
    """The most memory inside a with block, 10^9 bytes: resident, of the process; on a GPU what
    torch's allocator gave out."""

    before_gb = peak_gb = 0.0

    def __init__(self, device: Device) -> None:
        self._device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what an earlier variant has freed
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present size
        self.before_gb = self._most_gb()
        return self

    def __exit__(self, *_: object) -> None:
        self.peak_gb = self._most_gb()

    def _most_gb(self) -> float:
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        lines = Path("/proc/self/status").read_text().splitlines()
        (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return int(peak) * 1024 / 1e9


def synchronize(device: Device) -> None:
    """What was launched on the device has ended."""
    if device == "cuda":
        torch.cuda.synchronize()
