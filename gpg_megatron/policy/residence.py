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
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from gpg_megatron.host.device import Device
from gpg_megatron.host.pinned import HostBuffer
from gpg_megatron.policy.shards import optimizer_parts
from gpg_megatron.types import PolicyPart


@dataclass(frozen=True, slots=True)
class _Away:
    """The storages of a part, without their bytes, and where these are."""

    storages: list[torch.UntypedStorage]
    sizes: list[int]
    """Bytes of each."""
    host: HostBuffer | None
    """All of them, one behind the other; None: there is nothing to keep."""


class Residence:
    """The parts of one rank."""

    def __init__(
        self, models: Sequence[GPTModel], optimizer: MegatronOptimizer, device: Device
    ) -> None:
        self._models = models
        self._optimizer = optimizer
        self._device = device
        self._away: dict[PolicyPart, _Away] = {}
        # Pinning memory takes longer than copying into it, so that pinned buffers stay.
        self._pinned: dict[PolicyPart, HostBuffer] = {}

    def require(self, *parts: PolicyPart) -> None:
        """To be called before they are read: an offloaded tensor would end the process."""
        missing = [part for part in parts if part in self._away]
        assert not missing, f"{', '.join(missing)} of the policy are offloaded"

    def offload(self, parts: Sequence[PolicyPart]) -> None:
        """Move parts to host memory and free them on the device."""
        self.require(*parts)
        for part in parts:
            self._away[part] = self._copy_out(part)
        self._synchronize()
        for part in parts:
            for storage in self._away[part].storages:
                storage.resize_(0)
        if self._device == "cuda":
            # Torch would keep the memory for this process.
            torch.cuda.empty_cache()

    def load(self, parts: Sequence[PolicyPart]) -> None:
        """Bring parts back, bit by bit as they were; gradients come back as zeros."""
        for part in parts:
            assert part in self._away, f"{part} of the policy are not offloaded"
            away = self._away.pop(part)
            for storage, n_bytes in zip(away.storages, away.sizes, strict=True):
                storage.resize_(n_bytes)
                if away.host is None:
                    _bytes(storage).zero_()
            for content, host in _pairs(away):
                content.copy_(host, non_blocking=True)
        self._synchronize()

    def _copy_out(self, part: PolicyPart) -> _Away:
        storages = self._storages(part)
        sizes = [storage.nbytes() for storage in storages]
        buffer = None if part == "gradients" else self._host_buffer(part, sum(sizes))
        away = _Away(storages, sizes, buffer)
        for content, host in _pairs(away):
            host.copy_(content, non_blocking=True)
        return away

    def _host_buffer(self, part: PolicyPart, n_bytes: int) -> HostBuffer:
        if self._device == "cpu":
            return HostBuffer(n_bytes, self._device)
        kept = self._pinned.get(part)
        if kept is None or kept.n_bytes != n_bytes:
            kept = self._pinned[part] = HostBuffer(n_bytes, self._device)
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
        return (parameter.data for model in self._models for parameter in model.parameters())

    def _gradients(self) -> Iterator[torch.Tensor]:
        return (parameter.main_grad for model in self._models for parameter in model.parameters())

    def _optimizer_tensors(self) -> Iterator[torch.Tensor]:
        """Master weights and whatever Adam keeps for each of them."""
        for part in optimizer_parts(self._optimizer):
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


def _pairs(away: _Away) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The bytes on the device and their places on the host; none where nothing is kept."""
    if away.host is None:
        return
    begin = 0
    for storage, n_bytes in zip(away.storages, away.sizes, strict=True):
        content, done = _bytes(storage), 0
        for host in away.host.views(begin, begin + n_bytes):
            yield content[done : done + len(host)], host
            done += len(host)
        begin += n_bytes
