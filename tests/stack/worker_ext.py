"""A worker extension for the tests; vLLM imports it in its workers by dotted path."""

from __future__ import annotations

from typing import Any

from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)


class NoTransfer(WeightTransferEngine[WeightTransferInitInfo, WeightTransferUpdateInfo]):
    """Updates that change nothing, or fail when they are told to."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = WeightTransferUpdateInfo

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        raise NotImplementedError

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if update_info["payload"] == b"fail":
            raise ValueError("the update failed")

    def receive_weights(self, update_info: WeightTransferUpdateInfo) -> None:
        raise NotImplementedError

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("none", NoTransfer)


class Extension:
    """Mixed into vLLM's worker: self.rank and self.model_runner are the worker's."""

    def hello(self: Any, *args: Any) -> list[Any]:
        return [self.rank, list(args)]

    def fail(self, text: str) -> None:
        raise ValueError(text)

    def sleep_for(self, seconds: float) -> float:
        import time

        time.sleep(seconds)
        return seconds

    def scale(self: Any, factor: float) -> None:
        """Other keys and values in the first layer, and all that follows from them."""
        layers = self.model_runner.get_model().model.layers
        layers[0].input_layernorm.weight.data *= factor

    def bridge_forget_update(self) -> None:
        self._weight_update_active = False
