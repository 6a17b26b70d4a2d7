"""What a worker on a CPU remembers of its routers, with a runner that does as vLLM's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gpg_megatron.bridge.recorder import RoutingRecorder

LAYERS, WITH_EXPERTS = 3, (1, 2)


class Router:
    """vLLM's, as far as it is asked."""

    def set_capture_fn(self, function: Callable[[torch.Tensor], None]) -> None:
        self.says = function


class Worker:
    """A recorder, its runner and its routers."""

    def __init__(self, n_experts: int = 8) -> None:
        self.runner = SimpleNamespace(
            model_config=SimpleNamespace(
                get_total_num_hidden_layers=lambda: LAYERS, get_num_experts=lambda: n_experts
            )
        )
        self.routers = {layer: Router() for layer in WITH_EXPERTS}
        self.recorder = RoutingRecorder(self.runner, self.routers)

    def step(self, *requests: tuple[str, int, list[int]], padding: int = 0) -> None:
        """(id, first position, number of each token): layer l sends token t to t + l, t + l + 1."""
        self.runner.input_batch = SimpleNamespace(
            req_ids=[name for name, _, _ in requests],
            num_computed_tokens_cpu=np.array([start for _, start, _ in requests]),
        )
        bounds = np.cumsum([0, *(len(numbers) for _, _, numbers in requests)])
        self.runner.query_start_loc = SimpleNamespace(np=np.append(bounds, [bounds[-1]] * 4))
        tokens = [t for _, _, numbers in requests for t in numbers] + [0] * padding
        for layer, router in self.routers.items():
            router.says(torch.tensor([[t + layer, t + layer + 1] for t in tokens]))

    def take(self, name: str) -> dict[int, list[int]]:
        """The tokens of each sample, read from all layers."""
        return {i: _tokens(rows) for i, rows in self.recorder.take(name).items()}


def _tokens(rows: Any) -> list[int]:
    assert rows.shape[1:] == (LAYERS, 2)
    assert not rows[:, 0].any()
    numbers: list[int] = (rows[:, 1, 0].astype(int) - 1).tolist()
    for layer in WITH_EXPERTS:
        assert rows[:, layer].tolist() == [[t + layer, t + layer + 1] for t in numbers]
    return numbers


A, B, ONE = "0_group 7-0123abcd", "1_group 7-0123abcd", "group 17-9876fedc"


def test_samples_are_put_together_step_by_step() -> None:
    worker = Worker()
    worker.step((A, 0, [1, 2]), (ONE, 0, [3]))
    worker.step((ONE, 1, [4]), (A, 2, [5]), (B, 0, [1, 2]), padding=3)
    worker.step((B, 2, [6]), (A, 3, [0]))
    assert worker.take("group 7") == {0: [1, 2, 5, 0], 1: [1, 2, 6]}
    assert worker.take("group 17") == {0: [3, 4]}
    assert worker.take("group 7") == worker.take("group 1") == {}


def test_a_position_keeps_what_it_was_computed_with_first() -> None:
    """Preempted, or its keys were computed again with new weights."""
    worker = Worker()
    worker.step((A, 0, [1, 2]))
    worker.step((A, 2, [3]))
    worker.step((A, 0, [4, 5, 6, 0]))
    worker.step((A, 0, [4, 5, 6]))
    assert worker.take("group 7") == {0: [1, 2, 3, 0]}


def test_a_step_after_the_end_leaves_nothing() -> None:
    worker = Worker()
    worker.step((A, 0, [1, 2]))
    assert worker.take("group 7") == {0: [1, 2]}
    worker.step((A, 2, [3]))
    assert worker.take("group 7") == {}


def test_the_type_holds_every_number() -> None:
    for n_experts, kind in ((256, np.uint8), (257, np.uint16)):
        worker = Worker(n_experts)
        worker.step((A, 0, [3]))
        assert worker.recorder.take("group 7")[0].dtype == kind
