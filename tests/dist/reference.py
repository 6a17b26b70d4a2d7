"""What the updates should do, computed by transformers and torch in float64, one sequence at a
time: no packing, no parallel layout, no sample left out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gpg_megatron.algorithm.update import WeighedUpdate, weigh_update
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.config.sections import Config, PolicyConfig
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
    alpha_effective: float
    """How much longer alpha makes the step of Adam, without decay."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a policy has to reproduce."""

    logprobs: torch.Tensor
    """float64 [response tokens of all samples], in their order, before the first update."""
    margin: float
    """Of all choices of experts, how much the logit of the last one chosen exceeded the next, in
    units of the largest; infinite without experts."""
    updates: tuple[Update, ...]
    """Those that have a sample with a gradient."""


def make_reference(config: Config, updates: Sequence[Sequence[TrainSample]]) -> Reference:
    """Run the updates one after the other on the model of config.model.path."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        config.model.path, dtype=torch.float64, experts_implementation="eager"
    )
    margins: list[float] = []
    for number, layer in enumerate(model.model.layers):
        for module in layer.modules():
            module.layer, module.given = number, None
    for module in model.modules():
        # The norms and routers of transformers work in float32, whatever they are given.
        if type(module).__name__.endswith(("RMSNorm", "RMSNormGated")):
            module.forward = partial(_rms_norm, module)
        if hasattr(module, "A_log"):
            code: Any = sys.modules[type(module).__module__]
            code.torch_chunk_gated_delta_rule = _delta_rule
        if hasattr(module, "topk_group"):
            module.forward = partial(_route_by_groups, module, margins)
        elif hasattr(module, "norm_topk_prob"):
            module.forward = partial(_route, module, margins)
    optimizer = _optimizer(model, config.policy)
    with torch.no_grad():
        samples = [sample for update in updates for sample in update]
        temperature = config.rollout.temperature
        start = {_key(s): _distribution(model, s, temperature)[0] for s in samples}
    every = config.algorithm.kl_coef or config.algorithm.entropy_coef
    computed = [u for u in updates if every or any(sample.advantage for sample in u)]
    steps = tuple(_update(model, optimizer, config, samples, start) for samples in computed)
    logprobs = torch.cat(list(start.values()))
    return Reference(logprobs=logprobs, updates=steps, margin=min(margins, default=math.inf))


def _key(sample: TrainSample) -> tuple[int, int]:
    return sample.group, sample.index


def _rms_norm(module: Any, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """A norm that has eps multiplies with 1 + weight."""
    weight, eps = module.weight, getattr(module, "eps", None)
    if eps is None:
        eps = module.variance_epsilon
    else:
        weight = 1.0 + weight
    normed = F.rms_norm(x, weight.shape, weight, eps)
    return normed if gate is None else normed * F.silu(gate)


def _delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Token by token, [1, T, heads, ...]; that of transformers works in float32."""
    query, key = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (query, key))
    state = value.new_zeros(value.shape[2], key.shape[3], value.shape[3])
    outputs = []
    for q, k, v, decay, rate in zip(query[0], key[0], value[0], g[0], beta[0], strict=True):
        state = state * decay.exp()[:, None, None]
        error = rate[:, None] * (v - torch.einsum("hkv,hk->hv", state, k))
        state = state + torch.einsum("hk,hv->hkv", k, error)
        outputs.append(torch.einsum("hkv,hk->hv", state, q) / k.shape[1] ** 0.5)
    return torch.stack(outputs).unsqueeze(0), None


def _route(
    module: Any, margins: list[float], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [T, H] -> logits [T, experts], weights and numbers [T, experts per token]."""
    logits = F.linear(x, module.weight)
    probabilities, own = logits.softmax(-1), logits.topk(module.top_k).indices
    chosen = _replayed(module, own)
    weights = probabilities.gather(-1, chosen)
    if module.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    module.seen = logits.softmax(-1), chosen
    if module.top_k < logits.shape[1]:
        best = logits.detach().topk(module.top_k + 1).values
        gaps = (best[:, -2] - best[:, -1])[_n_given(module) :] / logits.detach().abs().max()
        margins.extend(gaps.tolist())
    return logits, weights, chosen


def _n_given(module: Any) -> int:
    """Tokens whose experts are known: the first ones."""
    return 0 if module.given is None else len(module.given)


def _replayed(module: Any, own: torch.Tensor) -> torch.Tensor:
    """The experts that were given to the first tokens, then those of the router."""
    if module.given is None:
        return own
    given = module.given[:, module.layer]
    return torch.cat([given, own[len(given) :]])


def _route_by_groups(
    module: Any, margins: list[float], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same as arXiv 2412.19437, section 2.1.2, has it with a bias, and 2405.04434, section
    2.1.2, without one; with groups their own choice is in the margin too."""
    logits = F.linear(x.flatten(0, -2), module.weight)
    n_groups, bias = module.num_group, getattr(module, "e_score_correction_bias", None)
    scores = logits.softmax(-1) if bias is None else logits.sigmoid()
    biased = scores.detach() if bias is None else (scores + bias).detach()
    groups = biased.unflatten(-1, (n_groups, -1))
    sums = groups.topk(1 if bias is None else 2).values.sum(-1)
    kept = sums.topk(module.topk_group).indices
    outside = torch.ones_like(sums, dtype=torch.bool).scatter(-1, kept, False)
    biased = groups.masked_fill(outside.unsqueeze(-1), -math.inf).flatten(-2)
    best, own = biased.topk(module.top_k)
    rest = biased.scatter(-1, own, -math.inf).amax(-1)
    gaps = [best[:, -1] - rest]
    if module.topk_group < n_groups:
        others = sums.masked_fill(~outside, -math.inf).amax(-1)
        gaps.append(sums.gather(-1, kept).amin(-1) - others)
    margins.extend(torch.stack(gaps).amin(0)[_n_given(module) :].tolist())
    chosen = _replayed(module, own)
    module.seen = scores / scores.sum(-1, keepdim=True), chosen
    weights = scores.gather(-1, chosen)
    if bias is not None:
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights * module.routed_scaling_factor, chosen


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
    start: Mapping[tuple[int, int], torch.Tensor],
) -> Update:
    loss, unbalance, loads = _loss(model, config, samples, start)
    optimizer.zero_grad()
    (loss + config.policy.moe_aux_loss_coeff * unbalance).backward()
    parameters = dict(model.named_parameters())
    alpha, in_step = _weighed(config, samples).alpha, config.algorithm.alpha_apply == "step"
    before = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    scale = (alpha if in_step else 1.0) * _ess(model, config, samples, start)
    effective = alpha if in_step else _length(model, optimizer, config, 1.0 / alpha)
    for name, gradient in before.items():
        parameters[name].grad = gradient
    limit = config.policy.clip_grad or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = scale * group["lr"], group["weight_decay"] / scale
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = group["lr"] / scale, scale * group["weight_decay"]
    _move_biases(loads, config.policy.moe_router_bias_update_rate)
    state = {n: x.clone() for n, x in model.named_buffers() if n.endswith("correction_bias")}
    return Update(
        loss=loss.item(),
        grad_norm=norm.item(),
        grads=_as_saved({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}),
        weights=_as_saved({name: p.detach().clone() for name, p in parameters.items()} | state),
        alpha_effective=effective,
    )


def _length(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: Config, factor: float
) -> float:
    """How much longer a step is than with the gradient times factor, on copies of everything."""
    lengths = []
    for times in (1.0, factor):
        parameters = [p for p in model.parameters() if p.grad is not None]
        copies = [p.detach().clone().requires_grad_() for p in parameters]
        for copy, p in zip(copies, parameters, strict=True):
            assert p.grad is not None
            copy.grad = times * p.grad
        c = config.policy
        torch.nn.utils.clip_grad_norm_(copies, c.clip_grad or float("inf"))
        betas = (c.adam_beta1, c.adam_beta2)
        adam = torch.optim.Adam(copies, lr=c.lr, betas=betas, eps=c.adam_eps)
        for copy, own in zip(copies, parameters, strict=True):
            adam.state[copy] = deepcopy(optimizer.state[own])
        adam.step()
        moves = [(a - b).norm() for a, b in zip(copies, parameters, strict=True)]
        lengths.append(float(torch.stack(moves).norm()))
    return lengths[0] / lengths[1]


@torch.no_grad()
def _ess(
    model: torch.nn.Module,
    config: Config,
    samples: Sequence[TrainSample],
    start: Mapping[tuple[int, int], torch.Tensor],
) -> float:
    """(sum rho)^2 / (n sum rho^2) over the tokens of the samples with an advantage."""
    if not config.algorithm.ess_lr:
        return 1.0
    assert config.objective.old_logprobs == "policy" and config.objective.loss == "gpg"
    temperature = config.rollout.temperature
    rho = torch.cat(
        [
            (_distribution(model, sample, temperature)[0] - start[_key(sample)]).exp()
            for sample in samples
            if sample.advantage
        ]
    )
    return (rho.sum() ** 2 / (len(rho) * rho.square().sum())).item()


def _weighed(config: Config, samples: Sequence[TrainSample]) -> WeighedUpdate:
    return weigh_update(
        samples,
        config.algorithm,
        dp_size=config.policy.data_parallel_size,
        max_tokens=config.policy.row_tokens,
        max_response_length=config.rollout.max_response_length,
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


Loads = dict[Any, torch.Tensor]
"""Router -> how many positions of responses went to each expert."""


def _loss(
    model: torch.nn.Module,
    config: Config,
    samples: Sequence[TrainSample],
    start: Mapping[tuple[int, int], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, Loads]:
    """Over every response token, those without advantage included; then the auxiliary loss and the
    loads of the samples that a policy computes.

    Args:
        start: log-probs before the first update. The reference model of a KL term is the same.
    """
    update = _weighed(config, samples)
    every = config.algorithm.kl_coef or config.algorithm.entropy_coef
    n_positions = sum(len(s.response_token_ids) for s in samples if every or s.advantage)
    terms, unbalance, loads = [], torch.zeros((), dtype=torch.float64), Loads()
    for sample, weight in zip(update.samples, update.weights, strict=True):
        terms.append(weight * _sample_loss(model, config, sample, start[_key(sample)]))
        if every or sample.advantage:
            unbalance = unbalance + _unbalance(model, sample, loads) / n_positions
    return torch.stack(terms).sum(), unbalance, loads


def _unbalance(model: torch.nn.Module, sample: TrainSample, loads: Loads) -> torch.Tensor:
    """arXiv 2412.19437, equations 17 to 20, of the routes of the last forward pass: the sum over
    layers, times the positions that predict a response token."""
    n_response, total = len(sample.response_token_ids), torch.zeros((), dtype=torch.float64)
    own = slice(len(sample.prompt_token_ids) - 1, -1)
    routers: list[Any] = [x for x in model.modules() if hasattr(x, "seen")]
    for router in routers:
        scores, chosen = router.seen
        (n_experts,), n_chosen = scores.shape[1:], chosen.shape[1]
        load = chosen[own].flatten().bincount(minlength=n_experts)
        loads[router] = loads.get(router, 0) + load
        if n_response:
            f = n_experts * load / (n_chosen * n_response)
            total = total + n_response * (f * scores[own].mean(0)).sum()
    return total


def _move_biases(loads: Loads, rate: float) -> None:
    for router, load in loads.items():
        if rate:
            mean = load.double().mean()
            router.e_score_correction_bias += rate * torch.sign(mean - load)


def _sample_loss(
    model: torch.nn.Module, config: Config, sample: TrainSample, start: torch.Tensor
) -> torch.Tensor:
    """The sum over the tokens of one sample, without its aggregation weight."""
    a, advantage = config.objective, sample.advantage
    logprobs, entropy = _distribution(model, sample, config.rollout.temperature)
    if not len(logprobs):
        return logprobs.sum()
    engine = torch.tensor(sample.rollout_logprobs, dtype=torch.float64)
    if a.loss == "gpg":
        old = start if a.old_logprobs == "policy" else engine
        factor = _correction(a, logprobs.detach() - old)
        gradient = logprobs * advantage
    else:
        factor = _correction(a, start - engine)
        log_ratio = logprobs - (engine if a.old_logprobs == "rollout" else start)
        if a.loss == "clip-sequence":  # its value for every token, the gradient of its own
            log_ratio = log_ratio.detach().mean() + logprobs - logprobs.detach()
        ratio = torch.exp(log_ratio)
        clipped = ratio.clamp(1 - a.clip_low, 1 + a.clip_high)
        gradient = torch.minimum(ratio * advantage, clipped * advantage)
    behind = start - logprobs
    kl = torch.exp(behind) - 1 - behind
    return (-factor * gradient + a.kl_coef * kl - a.entropy_coef * entropy).sum()


def _correction(a: AlgorithmConfig, log_ratio: torch.Tensor) -> torch.Tensor | float:
    """Of the tokens of one sample."""
    low, high = math.log(a.correction_min), math.log(a.correction_max)
    if a.correction == "truncate-sequence":
        return math.exp(min(log_ratio.sum().item(), high))
    if a.correction == "truncate-token":
        return log_ratio.clamp(max=high).exp()
    if a.correction == "mask-token":
        return torch.where((log_ratio < low) | (log_ratio > high), 0.0, log_ratio.exp())
    if a.correction == "reject-sequence":
        return float(low <= log_ratio.mean().item() <= high)
    assert a.correction == "none"
    return 1.0


def _distribution(
    model: Any, sample: TrainSample, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [L] each: log-probs of the response tokens of one sample, and the entropies of the
    distributions that they were drawn from."""
    prompt, response = sample.prompt_token_ids, sample.response_token_ids
    tokens = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    rows = [x for x in (sample.routing.prompt, sample.routing.response) if len(x)]
    given = torch.from_numpy(np.concatenate(rows)).long() if rows else None
    for module in model.model.layers.modules():
        module.given = given
    logits = model(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
    every = torch.log_softmax(logits, dim=-1)
    chosen = torch.tensor(response.tolist(), dtype=torch.int64).unsqueeze(1)
    return every.gather(1, chosen).squeeze(1), -(every.exp() * every).sum(-1)


def save_reference(reference: Reference, path: Path) -> None:
    """For the ranks, which do not pay for importing transformers."""
    torch.save(reference, path)


def load_reference(path: Path) -> Reference:
    """What save_reference wrote."""
    reference = torch.load(path, weights_only=False)
    assert isinstance(reference, Reference)
    return reference
