"""The parameters of a rank by names that are the same on every rank."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from gpg_megatron.policy.routing import parameters_and_state

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")
# Its place in the name: with the local layer spec, with Transformer Engine.
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+|(?<=\.experts\.linear_fc[12]\.weight)\d+$")


def named_shards(models: Sequence[GPTModel], num_experts: int) -> dict[str, torch.Tensor]:
    """Every parameter shard and router's bias of this rank under its global name (layer and expert
    numbers of the whole model). The tensors alias the models'.

    Args:
        models: the chunks of this rank.
        num_experts: of a layer of the whole model.
    """
    n_local = num_experts // parallel_state.get_expert_model_parallel_world_size()
    first_expert = n_local * parallel_state.get_expert_model_parallel_rank()
    found = {}
    for model in models:
        layers = [layer.layer_number - 1 for layer in model.decoder.layers]
        for name, tensor in parameters_and_state(model):
            found[_global_name(name, layers, first_expert)] = tensor.data
    return found


def _global_name(name: str, layers: Sequence[int], first_expert: int) -> str:
    """A parameter's name with numbers of the whole model instead of this chunk's.

    Args:
        layers: for each of the chunk's layers its number.
        first_expert: the number of this rank's first expert.
    """
    name = _LAYER.sub(lambda found: str(layers[int(found[0])]), name)
    return _EXPERT.sub(lambda found: str(first_expert + int(found[0])), name)
