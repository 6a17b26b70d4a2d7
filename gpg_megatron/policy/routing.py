"""How Megatron's router chooses experts, and the bias that DeepSeek-V3's adds to its scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

from gpg_megatron.shapes import MoEShape


def router_options(moe: MoEShape) -> dict[str, Any]:
    """The keywords of TransformerConfig about the router and the shared expert's gate."""
    options: dict[str, Any] = {"moe_router_topk": moe.experts_per_token}
    if moe.sigmoid is None:
        return options | {
            "moe_shared_expert_gate": moe.shared_ffn_size > 0,
            # Softmax over the chosen experts alone is the softmax over all, scaled to sum to 1.
            "moe_router_pre_softmax": not moe.renormalised,
            # As transformers and vLLM, the router computes in the model's type. In bf16 its fp32
            # option takes log-probs further from theirs: on random models with 64 experts by
            # 0.0087 instead of 0.0074 nats, on average.
            "moe_router_dtype": None,
        }
    limited = moe.sigmoid.chosen_groups < moe.sigmoid.n_groups
    return options | {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        # The bias is state that stays as it was loaded.
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": moe.sigmoid.scale,
        "moe_router_num_groups": moe.sigmoid.n_groups if limited else None,
        "moe_router_group_topk": moe.sigmoid.chosen_groups if limited else None,
        # As in transformers.
        "moe_router_dtype": "fp32",
    }


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
