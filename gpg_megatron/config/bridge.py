"""The section `bridge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

from gpg_megatron.config.ranges import ranged

# OmegaConf resolves annotations at run time, so optional fields are spelled Optional[...].


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Moving the policy's weights into the engines."""

    transport: Literal["auto", "shm", "gloo", "nccl", "cuda_ipc"] = "auto"
    """auto: the best of each pair of rank and engine worker. Or one for all of them: shm needs a
    common host, cuda_ipc a common GPU; gloo goes to any host through host memory, nccl between
    GPUs."""
    bucket_mb: int = ranged(16, at_least=1)
    """Bytes moved per message, MiB; each sender holds two."""
    verify: Literal["never", "first", "always"] = "first"
    """Which publishes are read back from the engines' parameters and compared by checksum."""
    timeout_s: int = ranged(300, at_least=1)
    """Limit of every wait between a policy rank and an engine worker, in seconds."""
    canary_tolerance: Optional[float] = ranged(None, above=0)
    """Largest accepted mean of |engine log-prob - policy log-prob|, nats, after the first sync
    and at every step. None: measured for the model when a run starts."""
