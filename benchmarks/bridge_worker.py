"""The worker extension of benchmarks.bridge: the bridge's, and the engine's own reload."""

from __future__ import annotations

from typing import Any

import torch

from gpg_megatron.bridge.receiver import BridgeReceiver


class BenchReceiver(BridgeReceiver):
    """Inside vLLM's worker."""

    def bench_parameter_bytes(self: Any) -> int:
        """What this worker must receive."""
        installer = self.weight_transfer_engine.installer
        return int(installer.expected_elements * self.model_config.dtype.itemsize)

    def bench_staged_bytes(self: Any) -> int:
        """The most that staging tensors held at once."""
        return int(self.weight_transfer_engine.installer.peak_staged_bytes)

    def bench_largest_module_bytes(self: Any) -> int:
        """The largest module that must be staged."""
        return int(self.weight_transfer_engine.installer.largest_staged_module_bytes)

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
