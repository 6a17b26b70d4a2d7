"""A receiver that fails on request: faults that cannot be made from outside at the right time."""

from __future__ import annotations

import time
from typing import Any

import torch

from gpg_megatron.bridge.receiver import Source
from gpg_megatron.bridge.vllm_worker import BridgeReceiver

AT_BUCKET = 2


class FaultyReceiver(BridgeReceiver):
    """Inside vLLM's worker."""

    def fault(self: Any, kind: str, seconds: float = 0.0) -> None:
        """What goes wrong at the third bucket of the next update: raise, damage, or sleep; last:
        the very last bucket raises."""
        engine = self.weight_transfer_engine.receiver
        install = type(engine)._install
        seen = 0

        def faulty(source: Source, data: torch.Tensor, *, verify: bool) -> None:
            nonlocal seen
            left = sum(len(s.buckets) - s.n_read for s in engine._sources.values())
            if left == 1 if kind == "last" else seen == AT_BUCKET:
                if kind in ("raise", "last"):
                    raise OSError("the fault that was asked for")
                if kind == "damage":
                    data = data.clone()
                    data[0] ^= 1
                time.sleep(seconds)
            seen += 1
            install(engine, source, data, verify=verify)

        engine._install = faulty

    def heal(self: Any) -> None:
        """Work as usual again."""
        del self.weight_transfer_engine.receiver._install
