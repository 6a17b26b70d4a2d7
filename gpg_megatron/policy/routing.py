"""How Megatron's router chooses experts, and the bias that DeepSeek-V3's adds to its scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from gpg_megatron.policy.balance import balance_loss, load_of
from gpg_megatron.shapes import GroupRouting, MoEShape


def router_options(moe: MoEShape) -> dict[str, Any]:
    """The keywords of TransformerConfig about the router and the shared expert's gate."""
    options: dict[str, Any] = {
        "moe_router_topk": moe.experts_per_token,
        # Softmax over the chosen experts alone is the softmax over all, scaled to sum to 1.
        "moe_router_pre_softmax": not moe.renormalised,
    }
    if moe.routing is None:
        return options | {
            "moe_shared_expert_gate": moe.shared_ffn_size > 0,
            # As transformers and vLLM, the router computes in the model's type. In bf16 its fp32
            # option takes log-probs further from theirs: on random models with 64 experts by
            # 0.0087 instead of 0.0074 nats, on average.
            "moe_router_dtype": None,
        }
    limited = moe.routing.chosen_groups < moe.routing.n_groups
    options |= {
        "moe_router_topk_scaling_factor": moe.routing.scale,
        "moe_router_num_groups": moe.routing.n_groups if limited else None,
        "moe_router_group_topk": moe.routing.chosen_groups if limited else None,
        # As in transformers.
        "moe_router_dtype": "fp32",
    }
    if not moe.routing.has_bias:
        return options
    return options | {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        # balance.py moves the bias, if anything does.
        "moe_router_bias_update_rate": 0.0,
    }


class Router(TopKRouter):  # type: ignore[misc]  # Megatron has no types
    """Megatron's router of a layer, which counts what balance.py goes by.

    Where a token goes to experts of some groups only, the choice of groups is the model's: Megatron
    compares sums of as many scores of each as experts are chosen in it.
    """

    loss_factor: float = 0.0
    """Of balance_loss; 0: without it."""

    def __init__(self, *args: Any, routing: GroupRouting | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if routing and routing.chosen_groups < routing.n_groups:
            self.router_replay = _BestGroups(routing.best_of_group)
        load_E = torch.zeros(self.config.num_moe_experts, dtype=torch.int64)
        self.register_buffer("load_E", load_E, persistent=False)

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Any:
        """As TopKRouter's, but for the mask, which Megatron hands through its layers and keeps for
        what the backward pass computes again.

        Args:
            padding_mask: bool [t, S], SegmentParams.members_ST of this rank's tokens; None: nothing
                is to be counted.
        """
        probs, chosen_tE = super().routing(logits)
        # Without gradients something is only looked at, or the backward pass will compute it again.
        if padding_mask is not None and torch.is_grad_enabled():
            members_St = padding_mask.T
            self.load_E += load_of(chosen_tE, members_St)
            if self.loss_factor:
                scores_tE = self._scores(logits.flatten(0, -2).float())
                loss = balance_loss(scores_tE, chosen_tE, members_St, self.tp_group)
                probs = MoEAuxLossAutoScaler.apply(probs, self.loss_factor * loss)
        return probs, chosen_tE

    def _scores(self, logits_tE: torch.Tensor) -> torch.Tensor:
        """Positive, of each token with the sum 1."""
        if self.score_function == "softmax":
            return logits_tE.softmax(-1)
        scores_tE = logits_tE.sigmoid()
        return scores_tE / scores_tE.sum(-1, keepdim=True)


class _BestGroups:
    """In the place of Megatron's RouterReplay, which its router asks for the experts of a token."""

    def __init__(self, n_best: int) -> None:
        self._n_best = n_best

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        n_experts: int,
        n_groups: int,
        n_chosen: int,
        default_compute_topk: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [t, experts], those of choosing -> the best of them and their experts
        [t, n_experts], out of the groups with the largest sums of their n_best scores."""
        groups = scores.unflatten(-1, (n_groups, -1))
        kept = groups.topk(self._n_best).values.sum(-1).topk(n_chosen).indices
        outside = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, kept, False)
        inside = groups.masked_fill(outside.unsqueeze(-1), -math.inf).flatten(-2)
        best, experts = inside.topk(n_experts)
        return best, experts


def parameters_and_state(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor): all parameters, then the fp32 bias [experts] of each router that has one."""
    yield from model.named_parameters()
    for name, module in model.named_modules():
        if isinstance(module, TopKRouter) and module.expert_bias is not None:
            yield f"{name}.expert_bias", module.expert_bias


def keep_fp32(model: torch.nn.Module) -> None:
    """Of a model that was cast as a whole: experts are chosen by the bias's last bits."""
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module._maintain_float32_expert_bias()
