"""How much memory a host needs for its policy ranks and engine workers: pure arithmetic, in bytes.

What the processes themselves take (Python, CUDA's own, the scorers) is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpg_megatron.config.sections import Config
from gpg_megatron.host.pinned import pinned_bytes
from gpg_megatron.placement.memory import FP32, PolicyMemory, optimizer_item
from gpg_megatron.types import DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Of one policy rank or engine worker, or of all on a host."""

    offloaded: int = 0
    """Pinned copies of parameters and optimizer. They are made once and kept."""
    reference: int = 0
    """The frozen weights of a KL term."""
    written: int = 0
    """Copies that a save makes of what the rank writes, until the files are there."""
    asleep: int = 0
    """Weights of engines that sleep while the policy is read; their pinned copies stay, too."""
    read: int = 0
    """Pieces of a checkpoint that a resume holds: one, and the one before it."""

    def __add__(self, other: HostMemory) -> HostMemory:
        return HostMemory(
            offloaded=self.offloaded + other.offloaded,
            reference=self.reference + other.reference,
            written=self.written + other.written,
            asleep=self.asleep + other.asleep,
            read=self.read + other.read,
        )

    @property
    def states(self) -> dict[str, int]:
        """What a run does -> what the host needs."""
        always = self.offloaded + self.reference + self.asleep
        return {"training": always, "saving": always + self.written, "resuming": self.read}


def rank_host_memory(
    config: Config,
    memory: PolicyMemory,
    *,
    n_parameters: int,
    n_in_experts: int,
    largest: int,
    replica: int,
) -> HostMemory:
    """Of a policy rank on a GPU.

    Args:
        memory: of the rank, on its GPU.
        n_parameters, n_in_experts: that it holds, in all and in experts.
        largest: elements of its largest parameter.
        replica: which of the ranks that hold the same dense parameters it is; the first of those
            that hold the same tensor writes it.
    """
    p = config.policy
    n_dense = n_parameters - n_in_experts
    first_experts = replica < p.expert_model_parallel_size
    n_written = (n_dense if replica == 0 else 0) + (n_in_experts if first_experts else 0)
    state = memory.optimizer if p.use_distributed_optimizer else n_written * optimizer_item(config)
    colocated = config.trainer.placement == "colocated"
    kept = (memory.parameters, memory.optimizer)
    return HostMemory(
        offloaded=sum(map(pinned_bytes, kept)) if colocated else 0,
        reference=memory.parameters if config.algorithm.kl_coef else 0,
        written=state + n_written * DTYPES[config.model.dtype].itemsize,
        read=2 * largest * FP32,
    )
