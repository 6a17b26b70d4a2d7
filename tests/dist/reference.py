"""What the updates should do, computed by transformers and torch in float64, one sequence at a
time: no packing, no parallel layout, no sample left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from gpg_megatron.algorithm.aggregation import aggregation_weights
from gpg_megatron.config import Config, PolicyConfig
from gpg_megatron.types import TrainSample


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimizer step. Tensors are float64, under their Hugging Face names and shapes."""

    loss: float
    grad_norm: float
    """Before clipping."""
    grads: dict[str, torch.Tensor]
    """After clipping."""
    weights: dict[str, torch.Tensor]
    """After the step."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a policy has to reproduce."""

    logprobs: torch.Tensor
    """float64 [response tokens of all samples], in their order, before the first update."""
    margin: float
    """Of all choices of experts, how much the logit of the last one chosen exceeded the next, in
    units of the largest; infinite without experts."""
    updates: tuple[Update, ...]
    """Those that have a live sample."""


def make_reference(config: Config, updates: Sequence[Sequence[TrainSample]]) -> Reference:
    """Run the updates one after the other on the model of config.model.path."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        config.model.path, dtype=torch.float64, experts_implementation="eager"
    )
    margins: list[float] = []
    for module in model.modules():
        # The norms and routers of transformers work in float32, whatever they are given.
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(_rms_norm, module)
        if hasattr(module, "norm_topk_prob"):
            module.forward = partial(_route, module, margins)
    optimizer = _optimizer(model, config.policy)
    with torch.no_grad():
        samples = [sample for update in updates for sample in update]
        logprobs = torch.cat([_logprobs(model, s, config.rollout.temperature) for s in samples])
    live = [update for update in updates if any(sample.advantage for sample in update)]
    steps = tuple(_update(model, optimizer, config, samples) for samples in live)
    return Reference(logprobs=logprobs, updates=steps, margin=min(margins, default=math.inf))


def _rms_norm(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _route(
    module: torch.nn.Module, margins: list[float], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [T, H] -> logits [T, experts], weights and numbers [T, experts per token]."""
    logits = F.linear(x, module.weight)
    weights, chosen = logits.softmax(-1).topk(module.top_k)
    if module.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    best = logits.detach().topk(module.top_k + 1).values
    margins.append(((best[:, -2] - best[:, -1]).min() / logits.detach().abs().max()).item())
    return logits, weights, chosen


def _optimizer(model: torch.nn.Module, config: PolicyConfig) -> torch.optim.AdamW:
    """Norms and biases do not decay, as in Megatron."""
    vectors = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
    )


def _update(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    samples: Sequence[TrainSample],
) -> Update:
    loss = _loss(model, config, samples)
    optimizer.zero_grad()
    loss.backward()
    limit = config.policy.clip_grad or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    parameters = dict(model.named_parameters())
    return Update(
        loss=loss.item(),
        grad_norm=norm.item(),
        grads=_as_saved({name: p.grad.clone() for name, p in parameters.items()}),
        weights=_as_saved({name: p.detach().clone() for name, p in parameters.items()}),
    )


def _as_saved(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a checkpoint names them: transformers holds the experts of a layer in one tensor,
    [experts, ...], and their gate_proj and up_proj too."""
    saved = {}
    for name, tensor in tensors.items():
        layer, is_expert, kind = name.partition(".experts.")
        if not is_expert:
            saved[name] = tensor
            continue
        kinds = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
        for number, expert in enumerate(tensor):
            for key, part in zip(kinds, expert.chunk(len(kinds)), strict=True):
                saved[f"{layer}.experts.{number}.{key}.weight"] = part.clone()
    return saved


def _loss(model: torch.nn.Module, config: Config, samples: Sequence[TrainSample]) -> torch.Tensor:
    """-sum log pi * A * w over every response token, those without advantage included."""
    weights = aggregation_weights(
        samples, config.algorithm.loss_aggregation, config.rollout.max_response_length
    )
    terms = [
        _logprobs(model, sample, config.rollout.temperature).sum() * sample.advantage * weight
        for sample, weight in zip(samples, weights, strict=True)
    ]
    return -torch.stack(terms).sum()


def _logprobs(model: torch.nn.Module, sample: TrainSample, temperature: float) -> torch.Tensor:
    """float64 [L], of the response tokens of one sample."""
    prompt, response = sample.prompt_token_ids, sample.response_token_ids
    tokens = torch.tensor([(*prompt, *response)])
    logits = model(tokens).logits[0, len(prompt) - 1 : -1] / temperature
    chosen = torch.tensor(response, dtype=torch.int64).unsqueeze(1)
    return torch.log_softmax(logits, dim=-1).gather(1, chosen).squeeze(1)


def save_reference(reference: Reference, path: Path) -> None:
    """For the ranks, which do not pay for importing transformers."""
    torch.save(reference, path)


def load_reference(path: Path) -> Reference:
    """What save_reference wrote."""
    return torch.load(path, weights_only=False)
