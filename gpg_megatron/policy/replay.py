"""Router replay (arXiv 2510.11370): experts are those that the engine chose, their weights and
gradients those of the policy's own router.

    packed row -> SegmentParams.experts --hook before each layer--> RouterReplay of its router

A layer is told anew in every forward pass, also in one that the backward pass makes again, so
nothing depends on the order in which the schedule computes micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""(scores [T, experts], k, groups, chosen groups) -> values and numbers [T, k]."""


class RouterReplay:
    """What Megatron's router asks for its choice, in the place of Megatron's own RouterReplay."""

    def __init__(self, tally: torch.Tensor, chooser: Any) -> None:
        """
        Args:
            tally: float64 [2] that grows; see Replay.
            chooser: what the router asks without replay, as it asks this; None: nothing but the
                function that it brings.
        """
        self.experts: torch.Tensor | None = None
        """Integers [T, k] for the tokens of the next call, negative where the router itself is to
        choose; None: everywhere."""
        self._tally, self._chooser = tally, chooser

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: TopK,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [T, experts] -> those of the chosen, and their numbers, [T, k] each."""
        choose = default_compute_topk
        if self._chooser is not None:
            choose = partial(self._chooser.get_replay_topk, default_compute_topk=choose)
        if self.experts is None:
            return choose(scores, topk, num_groups, group_topk)
        given = self.experts.long()
        assert given.shape == (len(scores), topk), (given.shape, scores.shape, topk)
        _, own = choose(scores.detach(), topk, num_groups, group_topk)
        is_known = given[:, :1] >= 0
        chosen = torch.where(is_known, given, own)
        if torch.is_grad_enabled():  # once for each update, whatever is computed again
            others = (chosen.unsqueeze(2) != own.unsqueeze(1)).all(2)
            self._tally += torch.stack([others.sum(), topk * is_known.sum()])
        return scores.gather(1, chosen), chosen


class Replay:
    """Router replay in all layers with experts of a rank's chunks."""

    def __init__(self, models: Sequence[Any], device: str) -> None:
        self._tally = torch.zeros(2, dtype=torch.float64, device=device)
        """Experts that the routers would not have chosen, and all that were given to them."""
        for layer in (layer for model in models for layer in model.decoder.layers):
            if isinstance(layer.mlp, MoELayer):
                router = layer.mlp.router
                replay = router.router_replay = RouterReplay(self._tally, router.router_replay)
                layer.register_forward_pre_hook(partial(_tell, replay), with_kwargs=True)

    def metrics(self, unrouted: float) -> Mapping[str, float]:
        """Of the update that was just computed, the same on every rank. Collective.

        Args:
            unrouted: as TrainBatch has it.
        """
        total = self._tally.clone()
        self._tally.zero_()
        dist.all_reduce(total)
        differing, given = total.tolist()
        return {
            "policy/routing_missing": unrouted,
            "policy/routing_differs": differing / max(given, 1.0),
        }


def _tell(replay: RouterReplay, layer: Any, _: Any, arguments: Mapping[str, Any]) -> None:
    """A hook before a layer's forward pass."""
    experts = arguments["packed_seq_params"].experts
    replay.experts = None if experts is None else experts[:, layer.layer_number - 1]
