"""Which parts of the policy lie on the device, and moving the others to host memory and back.

A part is a set of storages. An offloaded storage has no bytes, and everything that views it
(parameters, gradient buckets, shards that the bridge reads) sees the same values again once it is
loaded.

    parameters   of the model
    gradients    what Megatron sums them in; dropped, not kept: every update begins by zeroing them
    optimizer    moments and fp32 master weights
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from gpg_megatron.host.device import Device
from gpg_megatron.types import PolicyPart


@dataclass(slots=True)
class _Away:
    """A storage without bytes, and where its content is."""

    storage: torch.UntypedStorage
    n_bytes: int
    host: torch.Tensor | None
    """uint8 [n_bytes]; None: there is nothing to keep."""


class Residence:
    """The parts of one rank."""

    def __init__(
        self, model: DistributedDataParallel, optimizer: MegatronOptimizer, device: Device
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._device = device
        self._away: dict[PolicyPart, list[_Away]] = {}
        # Pinning memory takes longer than copying into it, so that pinned buffers stay.
        self._pinned: dict[tuple[PolicyPart, int], torch.Tensor] = {}

    def require(self, *parts: PolicyPart) -> None:
        """To be called before they are read: an offloaded tensor would end the process."""
        missing = [part for part in parts if part in self._away]
        assert not missing, f"{', '.join(missing)} of the policy are offloaded"

    def offload(self, parts: Sequence[PolicyPart]) -> None:
        """Move parts to host memory and free them on the device."""
        self.require(*parts)
        found = {part: self._storages(part) for part in parts}
        for part, storages in found.items():
            self._away[part] = [self._copy_out(part, i, s) for i, s in enumerate(storages)]
        self._synchronize()
        for storage in chain.from_iterable(found.values()):
            storage.resize_(0)
        if self._device == "cuda":
            # Torch would keep the memory for this process.
            torch.cuda.empty_cache()

    def load(self, parts: Sequence[PolicyPart]) -> None:
        """Bring parts back, bit by bit as they were; gradients come back as zeros."""
        for part in parts:
            assert part in self._away, f"{part} of the policy are not offloaded"
            for away in self._away.pop(part):
                away.storage.resize_(away.n_bytes)
                content = _bytes(away.storage)
                if away.host is None:
                    content.zero_()
                else:
                    content.copy_(away.host, non_blocking=True)
        self._synchronize()

    def _copy_out(self, part: PolicyPart, index: int, storage: torch.UntypedStorage) -> _Away:
        n_bytes = storage.nbytes()
        if part == "gradients":
            return _Away(storage, n_bytes, None)
        host = self._host_buffer(part, index, n_bytes)
        host.copy_(_bytes(storage), non_blocking=True)
        return _Away(storage, n_bytes, host)

    def _host_buffer(self, part: PolicyPart, index: int, n_bytes: int) -> torch.Tensor:
        if self._device == "cpu":
            return torch.empty(n_bytes, dtype=torch.uint8)
        kept = self._pinned.get((part, index))
        if kept is None or kept.numel() != n_bytes:
            kept = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
            self._pinned[part, index] = kept
        return kept

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    # ---- which storages -----------------------------------------------------------------

    def _storages(self, part: PolicyPart) -> list[torch.UntypedStorage]:
        """The part's own storages that have bytes, each once."""
        if part == "parameters":
            return _distinct(self._parameters())
        if part == "gradients":
            return _distinct(self._gradients())
        # fp32 parameters are their own master weights, and shards of them view the parameters.
        others = _distinct(chain(self._parameters(), self._gradients()))
        theirs = {storage.data_ptr() for storage in others}
        found = _distinct(t for t in self._optimizer_tensors() if t.device.type == self._device)
        return [storage for storage in found if storage.data_ptr() not in theirs]

    def _parameters(self) -> Iterator[torch.Tensor]:
        return (parameter.data for parameter in self._model.module.parameters())

    def _gradients(self) -> Iterator[torch.Tensor]:
        return (parameter.main_grad for parameter in self._model.module.parameters())

    def _optimizer_tensors(self) -> Iterator[torch.Tensor]:
        """Master weights and whatever Adam keeps for each of them."""
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            if part.optimizer is None:  # this rank has no parameters of its kind
                continue
            for group in part.optimizer.param_groups:
                yield from (parameter.data for parameter in group["params"])
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if torch.is_tensor(value))


def _distinct(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Their storages, each once, without empty ones."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return [storage for storage in storages.values() if storage.nbytes()]


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """All of a storage, uint8 [bytes]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
