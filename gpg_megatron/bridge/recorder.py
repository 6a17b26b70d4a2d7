"""The experts to which an engine on a CPU sends its tokens.

vLLM returns them (enable_return_routed_experts) only from the model runner that needs Triton. The
routers themselves call a function with what they choose, everywhere.

    routers of a step, layer after layer --> rows [tokens, layers, experts per token]
        --> by request, each position as it was computed first --> take
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Rows = npt.NDArray[Any]
"""uint8 or uint16 [tokens, layers of the model, experts per token]."""


class RoutingRecorder:
    """Inside a worker. Prefix caching must be off: only what is computed is seen."""

    def __init__(self, runner: Any, routers: Mapping[int, Any]) -> None:
        """
        Args:
            runner: vLLM's GPUModelRunner, that of its first version.
            routers: vLLM's, by the number of their layer.
        """
        self._runner = runner
        self._n_layers = runner.model_config.get_total_num_hidden_layers()
        self._dtype = np.uint8 if runner.model_config.get_num_experts() <= 256 else np.uint16
        self._step: Rows = np.empty((0, 0, 0), self._dtype)
        self._requests: dict[str, list[Rows]] = {}
        """By vLLM's internal id; parts of its rows, from the first position on."""
        self._known: Counter[str] = Counter()
        """Rows of each."""
        self._first, self._last = min(routers), max(routers)
        for layer, router in routers.items():
            router.set_capture_fn(partial(self._capture, layer))

    def take(self, name: str) -> Mapping[int, Rows]:
        """Number of a sample -> its rows, of a request that has ended, which is forgotten."""
        # vLLM's ids of the samples of a request: 0_NAME-1a2b3c4d; of a single one without a number.
        pattern = re.compile(rf"(?:(\d+)_)?{re.escape(name)}-[0-9a-f]{{8}}")
        found = {key: match for key in self._requests if (match := pattern.fullmatch(key))}
        for key in found:
            del self._known[key]
        return {
            int(match[1] or 0): np.concatenate(self._requests.pop(key))
            for key, match in found.items()
        }

    def _capture(self, layer: int, experts: torch.Tensor) -> None:
        """One layer of a step; experts [tokens, experts per token]."""
        if layer == self._first:
            shape = (len(experts), self._n_layers, experts.shape[1])
            self._step = np.zeros(shape, self._dtype)
        self._step[:, layer] = experts.numpy()
        if layer == self._last:
            self._commit()

    def _commit(self) -> None:
        batch = self._runner.input_batch
        bounds = self._runner.query_start_loc.np
        for i, request in enumerate(batch.req_ids):
            rows = self._step[bounds[i] : bounds[i + 1]]
            start, known = int(batch.num_computed_tokens_cpu[i]), self._known[request]
            # A request may run once more after its end, and what was preempted is computed again.
            if start <= known < start + len(rows):
                self._requests.setdefault(request, []).append(rows[known - start :].copy())
                self._known[request] = start + len(rows)
