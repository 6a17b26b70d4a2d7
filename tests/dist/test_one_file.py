"""examples/gpg_in_one_file.py and the policy make the same updates from the same rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.dist.one_file_problem import ALPHAS, TP_SIZE, config_of, rollouts
from tests.dist.ranks import run_ranks
from tests.one_file import example
from tests.tiny import make_tiny_model

GRADIENT_TOLERANCE = 1e-5
"""Norm of the difference over the norm."""
WEIGHT_TOLERANCE = 1e-3
"""Norm of the difference over the distance that the weights moved."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Both:
    """What each of the two did: for each update alpha, loss, grads and weights."""

    start: Tensors
    example: list[dict[str, Any]]
    policy: list[dict[str, Any]]
    """With n_micro_batches, and grad_norm before clipping."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("one_file")
    make_tiny_model(folder / "model", sharpness=0.3)
    output = run_ranks(folder, "tests.dist.one_file_worker", TP_SIZE)
    assert (folder / "policy.pt").exists(), output
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is large enough to share
    start, updates = _example(folder / "model")
    torch.set_num_threads(threads)
    return Both(start=start, example=updates, policy=torch.load(folder / "policy.pt"))


def test_the_gradients_of_every_update_are_the_same(both: Both) -> None:
    """After clipping; alpha and loss, too."""
    for ours, theirs in zip(both.example, both.policy, strict=True):
        assert _norm(ours["grads"], theirs["grads"]) <= GRADIENT_TOLERANCE * _norm(theirs["grads"])
        assert ours["alpha"] == pytest.approx(theirs["alpha"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_the_weights_end_at_the_same_place(both: Both) -> None:
    ours, theirs = both.example[-1]["weights"], both.policy[-1]["weights"]
    assert _norm(ours, theirs) <= WEIGHT_TOLERANCE * _norm(theirs, both.start)


def test_the_rollouts_would_tell(both: Both) -> None:
    """Dead groups count, the policy spreads an update over micro-batches, and some gradients are
    clipped, some are not."""
    assert [update["alpha"] for update in both.policy] == pytest.approx(ALPHAS)
    assert all(update["n_micro_batches"] > 1 for update in both.policy)
    limit = example.MAX_GRAD_NORM
    assert {update["grad_norm"] > limit for update in both.policy} == {True, False}
    for update in both.policy:
        assert _norm(update["grads"]) == pytest.approx(min(limit, update["grad_norm"]), rel=1e-4)


def _example(path: Path) -> tuple[Tensors, list[dict[str, Any]]]:
    """The first weights and the updates of the example, made as its command makes them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    policy = config_of(path).policy
    optimizer = example.make_optimizer(model, policy.lr, policy.adam_eps)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    updates = []
    for rollout in rollouts():
        advantages, alpha = example.advantages(torch.tensor(rollout.rewards))
        loss = example.update(model, optimizer, rollout.prompts, rollout.answers, advantages)
        named = dict(model.named_parameters())
        grads = {name: p.grad.clone() for name, p in named.items()}
        weights = {name: p.detach().clone() for name, p in named.items()}
        updates.append({"alpha": alpha, "loss": loss, "grads": grads, "weights": weights})
    return start, updates


def _norm(tensors: Tensors, others: Tensors | None = None) -> float:
    """Euclidean norm of all elements, less those of the others."""
    assert others is None or tensors.keys() == others.keys()
    gaps = [x.double() - others[name] if others else x.double() for name, x in tensors.items()]
    return float(torch.stack([gap.norm() for gap in gaps]).norm())
