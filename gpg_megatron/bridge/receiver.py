"""The bridge's end inside a vLLM worker.

    start_weight_update --> update_weights: buckets from all senders, in any order of senders
        --> each rectangle into its strided view (install.py) --> finish_weight_update

vLLM mixes BridgeReceiver into its worker class (worker_extension_cls), and importing this
module registers the weight-transfer engine that vLLM's own control plane drives.
"""

from __future__ import annotations

import functools
import pickle
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from gpg_megatron.bridge.install import Installer
from gpg_megatron.bridge.plan import Bucket, Destination, bucket_elements, incoming
from gpg_megatron.bridge.protocol import (
    BACKEND,
    CHECKSUM_BYTES,
    Connection,
    Update,
)
from gpg_megatron.bridge.transports.base import Inbox, Patience, TransferError
from gpg_megatron.bridge.transports.table import open_inbox


@dataclass(slots=True)
class Source:
    """One sender, as a worker sees it."""

    rank: int
    inbox: Inbox
    buckets: list[Bucket]
    n_read: int = 0
    """Buckets of the present update that have arrived."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """A pickled Connection and the number of the engine."""

    payload: bytes
    engine: int


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A pickled Update."""

    payload: bytes


class TransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives whole updates over the planned routes."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    installer: Installer
    """Set by BridgeReceiver.bridge_layout, as is the next."""
    worker: int
    """Rank within the engine."""
    _sources: tuple[Source, ...] = ()
    _dtype: torch.dtype
    _timeout_s: float

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        connection: Connection = pickle.loads(init_info.payload)
        self.shutdown()
        receiver = init_info.engine * connection.n_workers + self.worker
        buckets = incoming(
            connection.routes[self.worker], init_info.engine, connection.bucket_elements
        )
        self._dtype = getattr(torch, connection.dtype)
        self._timeout_s = connection.timeout_s
        self._sources = tuple(
            Source(
                rank, open_inbox(connection.transport, connection.addresses[rank], receiver), parts
            )
            for rank, parts in buckets.items()
        )

    def start_weight_update(self) -> None:
        self.installer.begin()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class would wait for an accelerator, which need not be there.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    @torch.no_grad()
    def receive_weights(self, update_info: UpdateInfo) -> None:
        update: Update = pickle.loads(update_info.payload)
        for source in self._sources:
            source.n_read = 0
            source.inbox.start()
        patience = Patience(self._timeout_s)
        while waiting := [s for s in self._sources if s.n_read < len(s.buckets)]:
            ranks = ", ".join(str(source.rank) for source in waiting)
            source, data = patience.until(
                functools.partial(self._next_message, waiting),
                f"weights from policy ranks {ranks} (engine worker {self.worker})",
            )
            self._install(source, data, verify=update.verify)
            source.inbox.done()
            source.n_read += 1

    def finish_weight_update(self) -> None:
        self.installer.finish()

    def shutdown(self) -> None:
        for source in self._sources:
            source.inbox.close()
        self._sources = ()

    def _next_message(self, waiting: Sequence[Source]) -> tuple[Source, torch.Tensor] | None:
        # The one that is furthest behind first: modules become complete soon.
        for source in sorted(waiting, key=lambda s: s.buckets[s.n_read][0].place):
            data = source.inbox.poll(self._n_bytes(source.buckets[source.n_read]) + CHECKSUM_BYTES)
            if data is not None:
                return source, data
        return None

    def _n_bytes(self, bucket: Bucket) -> int:
        return bucket_elements(bucket) * self._dtype.itemsize

    def _install(self, source: Source, data: torch.Tensor, *, verify: bool) -> None:
        """Copy the rectangles of a bucket; with verify, from what then stands in the parameters
        the sender's checksum must come out."""
        bucket = source.buckets[source.n_read]
        n_bytes = self._n_bytes(bucket)
        flat = data[:n_bytes].view(self._dtype)
        checksum = source.n_read
        for move in bucket:
            to = move.target
            view = self.installer.target(to.parameter).as_strided(to.shape, to.stride, to.offset)
            view.copy_(flat[move.offset : move.offset + move.numel].view(to.shape))
            if verify:
                # Some CPU kernels keep biases in fp32.
                checksum = zlib.crc32(_bytes_of(view.to(self._dtype)), checksum)
            self.installer.wrote(to.parameter, move.numel)
        if verify and checksum != int(data[n_bytes:].view(torch.int64)):
            raise TransferError(
                f"bucket {source.n_read} of policy rank {source.rank} arrived damaged: its first "
                f"parameter is {bucket[0].target.parameter}"
            )


WeightTransferEngineFactory.register_engine(BACKEND, TransferEngine)
if torch.cpu._is_amx_tile_supported():
    # vLLM's bf16 attention uses the tiles before anything has asked the kernel for them when the
    # first prompt is a single token: the process would die by an illegal instruction.
    torch.cpu._init_amx()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    contiguous = tensor.contiguous().cpu()
    return contiguous.reshape(-1).view(torch.uint8).numpy().data


def _remote(method: Callable[..., Any]) -> Callable[[Any, bytes], bytes]:
    """Arguments and result as pickled bytes."""

    @functools.wraps(method)
    def call(self: Any, arguments: bytes) -> bytes:
        return pickle.dumps(method(self, *pickle.loads(arguments)))

    return call


class BridgeReceiver:
    """Worker extension; every name starts with bridge_ so that none collides with vLLM's."""

    @_remote
    def bridge_layout(self: Any, hf_shapes: Mapping[str, tuple[int, ...]]) -> Sequence[Destination]:
        """Probe the model and say where each Hugging Face element lives in this worker."""
        engine: TransferEngine = self.weight_transfer_engine
        engine.worker = self.rank
        engine.installer = Installer(self.model_runner.get_model())
        return engine.installer.record(hf_shapes)

    def bridge_forget_update(self: Any) -> None:
        """An interrupted update leaves vLLM's session open; a new one must be able to start."""
        self._weight_update_active = False
