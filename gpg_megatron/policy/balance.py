"""Balance among the experts of a layer: a bias that follows their load (DeepSeek-V3, arXiv
2412.19437, section 2.1.2), and an auxiliary loss of each response (equations 17 to 20 there).

Both go by the positions that predict a response token. Each of those is computed once in any
layout; the tokens of a shared prompt may be computed several times, and fillers are nobody's.

Megatron has both, and neither is used. Its bias moves while gradients are summed, before anything
knows whether the update is made, and by counts that are of the model's type (in bf16 they stop at
256) and have fillers in them: its mask of fillers [t] does not fit the routes [t, experts]. Its
auxiliary loss is one of each micro-batch, or of a row as if it were one sequence, so its gradient
would depend on the packing; and it is to be divided by a number of tokens afterwards, which here
nothing is.

Shape legend: t tokens of this rank, S responses of the row, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from gpg_megatron.config.sections import PolicyConfig


def load_of(chosen_tE: torch.Tensor, members_St: torch.Tensor) -> torch.Tensor:
    """int64 [E]: how many positions of responses go to each expert.

    Args:
        chosen_tE: bool.
        members_St: bool, whether a position is one of a response.
    """
    return (chosen_tE & members_St.any(0).unsqueeze(1)).sum(0)


def balance_loss(
    scores_tE: torch.Tensor,
    chosen_tE: torch.Tensor,
    members_St: torch.Tensor,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """fp32: the sum, over this rank's positions of responses, of E sum_i f_i p_i; it is as many as
    there are positions where all experts of a response have the same load. Collective.

    p are the scores of the position, and f the experts' shares of the load of its response,
    through which there is no gradient.

    Args:
        scores_tE: fp32, of each token with the sum 1.
        group: the ranks that share the tokens of the row.
    """
    members = members_St.float()
    load_SE = members @ chosen_tE.float()
    if group.size() > 1 and len(load_SE):
        dist.all_reduce(load_SE, group=group)
    share_SE = load_SE / load_SE.sum(-1, keepdim=True).clamp(min=1.0)
    return scores_tE.shape[1] * (members.T @ share_SE * scores_tE).sum()


def moved(bias_E: torch.Tensor, load_E: torch.Tensor, rate: float) -> torch.Tensor:
    """fp32 [E]: the bias after an update. Those of experts with less than the mean load rise."""
    under_E = load_E.sum() - len(load_E) * load_E
    return bias_E + rate * under_E.sign().float()


class Balance:
    """That of the routers of this rank's chunks."""

    def __init__(self, modules: Iterable[Any], config: PolicyConfig) -> None:
        """modules: all of the chunks'; those with a load_E are routers."""
        self._routers = [module for module in modules if hasattr(module, "load_E")]
        self._coefficient = config.moe_aux_loss_coeff
        self._rate = config.moe_router_bias_update_rate

    @property
    def is_kept(self) -> bool:
        """Whether anything is to be counted."""
        return bool(self._coefficient or self._rate)

    def begin(self, n_positions: int) -> None:
        """An update.

        Args:
            n_positions: that predict a response token, of all ranks.
        """
        for router in self._routers:
            router.load_E.zero_()
            router.loss_factor = self._coefficient / max(1, n_positions)

    @torch.no_grad()
    def end(self) -> None:
        """The update is made: move the biases by the load of all ranks. Collective."""
        if not self._rate or not self._routers:
            return
        loads_LE = torch.stack([router.load_E for router in self._routers])
        # Tensor-parallel ranks share the tokens, and those that share experts are data-parallel.
        dist.all_reduce(loads_LE, group=parallel_state.get_tensor_and_data_parallel_group())
        for router, load_E in zip(self._routers, loads_LE, strict=True):
            router.expert_bias.copy_(moved(router.expert_bias, load_E, self._rate))
