"""The bridge's end inside a vLLM worker.

    start_weight_update --> update_weights: receiver.py --> install.py --> finish_weight_update

vLLM mixes BridgeReceiver into its worker class (worker_extension_cls), and importing this
module registers the weight-transfer engine that vLLM's own control plane drives.
"""

from __future__ import annotations

import functools
import pickle
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
from vllm.platforms import current_platform

from gpg_megatron.bridge.install import Installer
from gpg_megatron.bridge.links import Seat
from gpg_megatron.bridge.plan import Destination
from gpg_megatron.bridge.protocol import BACKEND
from gpg_megatron.bridge.receiver import Receiver
from gpg_megatron.bridge.recorder import RoutingRecorder
from gpg_megatron.bridge.seats import own_seat
from gpg_megatron.host.products import redirect_bf16_products


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
    receiver: Receiver

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.receiver.connect(pickle.loads(init_info.payload), init_info.engine)

    def start_weight_update(self) -> None:
        self.installer.begin()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class would wait for an accelerator, which need not be there.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self.receiver.receive(pickle.loads(update_info.payload))

    def finish_weight_update(self) -> None:
        self.installer.finish()

    def shutdown(self) -> None:
        if hasattr(self, "receiver"):
            self.receiver.close()


WeightTransferEngineFactory.register_engine(BACKEND, TransferEngine)
if torch.cpu._is_amx_tile_supported():
    # vLLM's bf16 attention uses the tiles before anything has asked the kernel for them when the
    # first prompt is a single token: the process would die by an illegal instruction.
    torch.cpu._init_amx()
if current_platform.is_cpu():
    redirect_bf16_products()  # before the model is there, and what is compiled of it


def _remote(method: Callable[..., Any]) -> Callable[[Any, bytes], bytes]:
    """Arguments and result as pickled bytes."""

    @functools.wraps(method)
    def call(self: Any, arguments: bytes) -> bytes:
        return pickle.dumps(method(self, *pickle.loads(arguments)))

    return call


class BridgeReceiver:
    """Worker extension; every name starts with bridge_ so that none collides with vLLM's."""

    @_remote
    def bridge_layout(
        self: Any, hf_shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[Sequence[Destination], Seat]:
        """Probe the model and say where each Hugging Face element lives in this worker, and where
        the worker is."""
        engine: TransferEngine = self.weight_transfer_engine
        engine.shutdown()
        engine.installer = Installer(self.model_runner.get_model())
        engine.receiver = Receiver(engine.installer, self.rank)
        return engine.installer.record(hf_shapes), own_seat(engine.installer.device)

    @_remote
    def bridge_record_routing(self: Any) -> None:
        """Begin to record the experts that tokens are sent to."""
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        modules = self.model_runner.get_model().modules()
        routers = {m.layer_id: m.router for m in modules if isinstance(m, MoERunner)}
        self.bridge_recorder = RoutingRecorder(self.model_runner, routers)

    @_remote
    def bridge_take_routing(self: Any, name: str) -> Mapping[int, Any]:
        """What was recorded of a request that has ended; see RoutingRecorder.take."""
        taken: Mapping[int, Any] = self.bridge_recorder.take(name)
        return taken

    def bridge_forget_update(self: Any) -> None:
        """An interrupted update leaves vLLM's session open; a new one must be able to start."""
        self._weight_update_active = False
