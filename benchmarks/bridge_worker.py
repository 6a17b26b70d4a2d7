"""The worker extension of benchmarks.bridge: the bridge's, and the engine's own reload."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from gpg_megatron.bridge import vllm_worker
from gpg_megatron.bridge.install import Installer
from gpg_megatron.bridge.vllm_worker import BridgeReceiver


class MeasuredInstaller(Installer):
    """Sees what its updates take."""

    peak_staged_bytes = 0
    effect_seconds = 0.0
    """Spent on counting what has arrived, and on the engine's own post-processing."""

    def target(self, name: str) -> torch.Tensor:
        tensor = super().target(name)
        staged = n_bytes(t for part in self._parts for t in part.staging.values())
        self.peak_staged_bytes = max(self.peak_staged_bytes, staged)
        return tensor

    def wrote(self, name: str, n_elements: int) -> None:
        begin = time.perf_counter()
        super().wrote(name, n_elements)
        self.effect_seconds += time.perf_counter() - begin


def n_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


_module: Any = vllm_worker
_module.Installer = MeasuredInstaller


class BenchReceiver(BridgeReceiver):
    """Inside vLLM's worker."""

    def bench_parameter_bytes(self: Any) -> int:
        """What this worker must receive."""
        installer = self.weight_transfer_engine.installer
        return int(sum(installer._expected.values()) * self.model_config.dtype.itemsize)

    def bench_staged_bytes(self: Any) -> int:
        """The most that staging tensors held at once."""
        return int(self.weight_transfer_engine.installer.peak_staged_bytes)

    def bench_largest_module_bytes(self: Any) -> int:
        """The largest module that must be staged."""
        parts = self.weight_transfer_engine.installer._parts
        return max(n_bytes(part.loadable.values()) for part in parts)

    def bench_effect_seconds(self: Any) -> float:
        """Spent on repacking weights so far."""
        return float(self.weight_transfer_engine.installer.effect_seconds)

    def bench_reload(self: Any, path: str, manifest: list[Any]) -> None:
        """Full tensors in shared memory through vLLM's own layerwise reload."""
        size = max(offset + 4 * torch.Size(shape).numel() for _, shape, offset in manifest)
        memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        tensors = (
            (name, memory[o : o + 4 * torch.Size(s).numel()].view(torch.float32).view(s))
            for name, s, o in manifest
        )
        self.model_runner.reload_weights(weights_iterator=tensors)
