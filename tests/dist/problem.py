"""What every layout has to solve: tiny models, samples, and the settings of the updates.

The samples make three updates. The first has live and dead samples, one of them longer than a
micro-batch. The second has no live sample. The third has three, too few to fill the
micro-batches of several data-parallel ranks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpg_megatron.batching.updates import BatchPlan
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.config.sections import (
    Config,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)
from gpg_megatron.model.flops import TokenCosts
from gpg_megatron.types import NO_ROUTING, Experts, Routing, TrainSample
from tests.presets import from_preset
from tests.samples import float32, int32

TOKENS_PER_MICRO_BATCH = 32
MAX_RESPONSE = 34
N_LAYERS = 4
N_EXPERTS = 6
EXPERTS_PER_TOKEN = 2
UNKNOWN_GROUP, HALF_KNOWN = 1, (0, 3)
"""A group, and a sample of another, whose experts are not or not all known."""

# update -> group -> advantage of each sample; a zero is a sample that carries no gradient.
ADVANTAGES = (
    ((1.5, -0.5, 0.0, 0.75), (0.25, 1.0, -1.25, 2.0), (0.0, 0.0, 0.0, 0.0)),
    ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
    ((0.0, 1.25, 0.0), (-0.5, 0.0, 0.75), (0.0, 0.0, 0.0)),
)
PROMPT_LENGTHS = (4, 7, 2, 3, 5, 1, 6, 5, 2)
"""Of each group."""
N_UPDATES = len(ADVANTAGES)
GROUPS_PER_UPDATE = len(ADVANTAGES[0])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks share the model, and in which way."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Runs of layers that each pipeline stage holds."""
    cp: int = 1
    dp: int = 1
    ep: int = 1
    """Of the data-parallel ranks, those that share the experts."""
    first: int | None = None
    """Layers of the first pipeline stage; None: as many as in the others."""

    @property
    def name(self) -> str:
        """For example tp2-pp2-vpp2."""
        sizes = {
            "tp": self.tp,
            "pp": self.pp,
            "vpp": self.vpp,
            "cp": self.cp,
            "dp": self.dp,
            "ep": self.ep,
            "first": self.first,
        }
        parts = [f"{key}{n}" for key, n in sizes.items() if n and (n > 1 or key == "first")]
        return "-".join(parts) or "single"

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tp * self.pp * self.cp * self.dp


LAYOUTS = (
    Layout(),
    Layout(tp=2),
    Layout(pp=2),
    Layout(pp=2, first=1),
    Layout(dp=2),
    Layout(dp=2, ep=2),
    Layout(cp=2),
    Layout(tp=2, pp=2),
    Layout(tp=4),
    Layout(pp=4),
    Layout(dp=4),
    Layout(dp=4, ep=2),
    Layout(tp=2, dp=2),
    Layout(tp=2, dp=2, ep=2),
    Layout(pp=2, dp=2),
    Layout(pp=2, vpp=2),
    Layout(tp=2, pp=2, vpp=2),
    Layout(cp=4),
    Layout(tp=2, cp=2),
    Layout(cp=2, dp=2),
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model and how its updates are made."""

    name: str
    family: str
    """Prefix of the classes in transformers, for example Qwen2."""
    tied: bool
    vocab_size: int
    """Odd: some tensor-parallel rank holds tokens and padding, another only padding."""
    head_dim: int
    algorithm: AlgorithmConfig
    """The objective; every aggregation mode and every term of a loss is in one of the problems."""
    temperature: float
    clip_grad: float
    share_prompts: bool = True
    sequence_parallel: bool = False
    """In the layouts with tensor parallelism."""
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    recompute: Literal["none", "attention", "layers"] = "none"
    experts: bool = False
    """In every layer, two for each token; Qwen2Moe also has a shared one."""
    aux_loss: float = 0.0
    """policy.moe_aux_loss_coeff."""
    bias_rate: float = 0.0
    """policy.moe_router_bias_update_rate."""
    rope: Mapping[str, Any] = field(default_factory=dict)
    """What config.json says of the rotary angles, beside their base."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Other keys of config.json."""
    replayed: bool = False
    """The samples say which experts most of their tokens go to."""
    seed: int = 14
    """Of the weights. With more experts than a token visits one where every expert is chosen, and
    never by a hair."""


DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    # What a head reads of a young state is nearly zero, and a norm of it would blow up rounding.
    "rms_norm_eps": 1e-2,
}
ROUTED = {
    "n_routed_experts": N_EXPERTS,
    "num_experts_per_tok": EXPERTS_PER_TOKEN,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.8,
}
"""Of DeepSeek-V3 and its kin."""
LATENT: dict[str, Any] = {
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 12,
}
MSCALE_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 16,
}

PROBLEMS: tuple[Problem, ...] = (
    Problem(
        name="qwen2-tied",
        family="Qwen2",
        tied=True,
        vocab_size=301,
        head_dim=8,
        algorithm=from_preset(
            "paper",
            correction="truncate-token",
            old_logprobs="policy",
            alpha_scope="mini-batch",
            alpha_effective_freq=1,
            ess_lr=True,
        ),
        temperature=1.0,
        clip_grad=0.5,
    ),
    Problem(
        name="qwen2-untied",
        family="Qwen2",
        tied=False,
        vocab_size=131,
        head_dim=8,
        algorithm=from_preset(
            "verl", correction="reject-sequence", correction_min=0.3, entropy_coef=0.05
        ),
        temperature=0.7,
        clip_grad=0.0,
        overlap_grad_reduce=True,
        sequence_parallel=True,
        recompute="layers",
    ),
    Problem(
        name="qwen3-tied",
        family="Qwen3",
        tied=True,
        vocab_size=257,
        head_dim=16,
        algorithm=from_preset(
            "gspo",
            old_logprobs="policy",
            clip_low=0.2,
            clip_high=0.2,
            dead_by="score",
            alpha="group",
            alpha_scope="mini-batch",
            alpha_apply="step",
            alpha_effective_freq=2,
        ),
        temperature=1.3,
        clip_grad=1000.0,
        rope={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        sequence_parallel=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        recompute="attention",
    ),
    Problem(
        name="llama-untied",
        family="Llama",
        tied=False,
        vocab_size=301,
        head_dim=16,
        options={"attention_bias": True, "mlp_bias": True},
        algorithm=from_preset(
            "dr-grpo", old_logprobs="policy", correction="truncate-token", kl_coef=0.2
        ),
        temperature=1.0,
        clip_grad=0.5,
        rope={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        share_prompts=False,
        use_distributed_optimizer=True,
    ),
    Problem(
        name="mistral-tied",
        family="Mistral",
        tied=True,
        vocab_size=131,
        head_dim=8,
        options={"sliding_window": 5},
        algorithm=from_preset("dapo", old_logprobs="rollout"),
        temperature=1.0,
        clip_grad=1000.0,
        rope={"rope_type": "linear", "factor": 2.0},
    ),
    Problem(
        name="glm4-untied",
        family="Glm4",
        tied=False,
        vocab_size=131,
        head_dim=8,
        algorithm=from_preset("paper"),
        temperature=1.0,
        clip_grad=1000.0,
        sequence_parallel=True,
    ),
    Problem(
        name="qwen35-tied",
        family="Qwen3_5",
        tied=True,
        vocab_size=131,
        head_dim=16,
        options=DELTA,
        algorithm=from_preset("paper"),
        temperature=1.0,
        clip_grad=1000.0,
        recompute="attention",
    ),
    Problem(
        name="qwen3moe-tied",
        family="Qwen3Moe",
        tied=True,
        vocab_size=257,
        head_dim=16,
        algorithm=from_preset("rloo", correction="mask-token", correction_max=9.0),
        temperature=1.3,
        clip_grad=1000.0,
        recompute="layers",
        experts=True,
        seed=34,
    ),
    Problem(
        name="qwen2moe-untied",
        family="Qwen2Moe",
        tied=False,
        vocab_size=131,
        head_dim=8,
        options={"mlp_only_layers": [1]},
        algorithm=from_preset("amap", correction="truncate-sequence", correction_max=4.0),
        temperature=1.0,
        clip_grad=0.5,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        experts=True,
        seed=55,
    ),
    Problem(
        name="qwen3next-untied",
        family="Qwen3Next",
        tied=False,
        vocab_size=131,
        head_dim=16,
        options=DELTA | {"mlp_only_layers": [1], "num_experts": EXPERTS_PER_TOKEN},
        algorithm=from_preset("paper"),
        temperature=1.0,
        clip_grad=1000.0,
        recompute="layers",
        use_distributed_optimizer=True,
        experts=True,
    ),
    Problem(
        name="glm4moe-untied",
        family="Glm4Moe",
        tied=False,
        vocab_size=131,
        head_dim=8,
        options=ROUTED | {"attention_bias": True, "use_qk_norm": True},
        algorithm=from_preset("paper"),
        temperature=1.0,
        clip_grad=1000.0,
        experts=True,
        aux_loss=0.05,
        bias_rate=0.02,
        seed=66,
    ),
    Problem(
        name="deepseekv3-untied",
        family="DeepseekV3",
        tied=False,
        vocab_size=131,
        head_dim=6,
        options=ROUTED
        | LATENT
        | {"q_lora_rank": 24, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        rope=MSCALE_YARN,
        algorithm=from_preset("paper"),
        temperature=1.0,
        clip_grad=1000.0,
        recompute="attention",
        experts=True,
        seed=106,
    ),
    # Without a choice of experts: hardly any weights leave none that is made by a hair. That of
    # groups is in test_policy_routing.py.
    Problem(
        name="deepseekv2-untied",
        family="DeepseekV2",
        tied=False,
        vocab_size=131,
        head_dim=6,
        options=ROUTED
        | LATENT
        | {"q_lora_rank": None, "topk_method": "greedy"}
        | {"n_routed_experts": EXPERTS_PER_TOKEN, "n_group": 1},
        rope=MSCALE_YARN,
        algorithm=from_preset("paper"),
        temperature=1.0,
        clip_grad=1000.0,
        recompute="layers",
        experts=True,
        seed=106,
    ),
)
REPLAYED = (
    Problem(
        name="qwen2moe-replayed",
        family="Qwen2Moe",
        tied=False,
        vocab_size=131,
        head_dim=8,
        options={"mlp_only_layers": [1]},
        algorithm=from_preset("paper", correction="truncate-token", old_logprobs="policy"),
        temperature=1.0,
        clip_grad=1000.0,
        recompute="layers",
        experts=True,
        replayed=True,
        seed=55,
    ),
    Problem(
        name="deepseekv3-replayed",
        family="DeepseekV3",
        tied=False,
        vocab_size=131,
        head_dim=6,
        options=next(p.options for p in PROBLEMS if p.family == "DeepseekV3"),
        algorithm=from_preset("paper"),
        temperature=1.0,
        clip_grad=1000.0,
        experts=True,
        replayed=True,
        seed=106,
    ),
)
PROBLEMS += REPLAYED
_LAYOUTS_WITH_EXPERTS = {
    Layout(),
    Layout(tp=2),
    Layout(pp=2),
    Layout(dp=2, ep=2),
    Layout(tp=2, pp=2),
    Layout(tp=2, dp=2, ep=2),
    Layout(dp=4, ep=2),
}


def problems_of(layout: Layout) -> list[Problem]:
    """Those that can go wrong there in a way of their own: ranks are slow on few cores."""
    return [problem for problem in PROBLEMS if _is_solved(problem, layout)]


def _is_solved(problem: Problem, layout: Layout) -> bool:
    if layout.first:
        return problem.family == "Llama"
    if problem.replayed:
        alone, others = Layout(), (Layout(tp=2), Layout(pp=2, vpp=2), Layout(dp=2, ep=2))
        return layout == alone or (layout in others and problem.family == "Qwen2Moe")
    if layout.vpp > 1:
        with_tp = problem.name in ("qwen3-tied", "qwen2moe-untied")
        return with_tp if layout.tp > 1 else problem.name in ("qwen2-untied", "qwen3moe-tied")
    if problem.family == "Mistral":
        return layout in (Layout(), Layout(cp=2))  # beside the window it has Llama's parts
    if problem.family in ("Glm4", "Qwen3_5"):
        return layout in (Layout(), Layout(tp=2))
    if problem.family == "Qwen3Next":
        return layout == Layout()
    if problem.family == "DeepseekV2":
        return layout == Layout()  # beside its router it has DeepSeek-V3's parts
    if problem.family in ("Glm4Moe", "DeepseekV3"):
        return layout in (Layout(), Layout(tp=2), Layout(dp=2, ep=2))
    if problem.experts:
        every = layout.world_size < 4 or (layout.tp > 1 and layout.ep > 1)
        return layout in _LAYOUTS_WITH_EXPERTS and (every or problem.tied)
    every = layout.world_size < 4 or layout == Layout(tp=2, pp=2)
    return layout.ep == 1 and (every or problem.tied)


def depends_on_ranks(problem: Problem) -> bool:
    """Whether the gradient is a different one for each number of data-parallel ranks, because
    something is counted over the micro-batches of all of them."""
    return problem.algorithm.alpha_scope == "micro-batch"


def reference_name(problem: Problem, layout: Layout) -> str:
    """Of the file that says what a layout has to compute."""
    return f"reference-dp{layout.dp}.pt" if depends_on_ranks(problem) else "reference.pt"


def config_of(problem: Problem, layout: Layout, model: Path) -> Config:
    """The configuration of one run; model is the Hugging Face directory."""
    return Config(
        model=ModelConfig(path=str(model), dtype="fp32"),
        policy=PolicyConfig(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp,
            context_parallel_size=layout.cp,
            data_parallel_size=layout.dp,
            expert_model_parallel_size=layout.ep,
            num_layers_in_first_pipeline_stage=layout.first,
            max_tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH,
            share_prompts=problem.share_prompts,
            sequence_parallel=problem.sequence_parallel and layout.tp > 1,
            use_distributed_optimizer=problem.use_distributed_optimizer,
            overlap_grad_reduce=problem.overlap_grad_reduce,
            recompute=problem.recompute,
            lr=1e-2,
            weight_decay=0.1,
            adam_beta2=0.95,
            # Adam divides by the gradient's size: a small eps would turn the rounding error of
            # a gradient near zero into a step of full length.
            adam_eps=1e-2,
            clip_grad=problem.clip_grad,
            moe_aux_loss_coeff=problem.aux_loss,
            moe_router_bias_update_rate=problem.bias_rate,
        ),
        rollout=RolloutConfig(
            temperature=problem.temperature,
            max_response_length=MAX_RESPONSE,
            router_replay=problem.replayed,
        ),
        algorithm=problem.algorithm,
        trainer=TrainerConfig(
            total_training_steps=1,
            train_batch_size=N_UPDATES * GROUPS_PER_UPDATE,
            mini_batch_size=GROUPS_PER_UPDATE,
            device="cpu",
        ),
    )


def plan_of(config: Config, costs: TokenCosts, dp_rank: int) -> BatchPlan:
    """Of one data-parallel rank of a run."""
    return BatchPlan(
        algorithm=config.algorithm,
        n_updates=config.trainer.updates_per_batch,
        max_tokens=config.policy.row_tokens,
        max_response_length=config.rollout.max_response_length,
        dp_rank=dp_rank,
        dp_size=config.policy.data_parallel_size,
        costs=costs,
        share_prompts=config.policy.share_prompts,
    )


def make_samples(problem: Problem) -> list[TrainSample]:
    """The rollout batch of all updates, the same on every rank."""
    rng = random.Random(7)
    groups = [group for update in ADVANTAGES for group in update]
    vocab = problem.vocab_size
    prompts = [tuple(rng.randrange(vocab) for _ in range(n)) for n in PROMPT_LENGTHS]
    samples = [
        _sample(rng, vocab, prompts[group], group, index, advantage, live=any(advantages))
        for group, advantages in enumerate(groups)
        for index, advantage in enumerate(advantages)
    ]
    return [replace(s, routing=_routing(s)) for s in samples] if problem.replayed else samples


def _routing(sample: TrainSample) -> Routing:
    """Any experts, for all layers. Of one group nothing is known, of one sample half."""
    if sample.group == UNKNOWN_GROUP:
        return NO_ROUTING
    of_prompt = np.random.default_rng(sample.group)
    of_response = np.random.default_rng([sample.group, sample.index])
    n_response = len(sample.response_token_ids)
    if (sample.group, sample.index) == HALF_KNOWN:
        n_response //= 2
    n_prompt = len(sample.prompt_token_ids) - 1
    return Routing(prompt=_rows(of_prompt, n_prompt), response=_rows(of_response, n_response))


def _rows(rng: np.random.Generator, n_tokens: int) -> Experts:
    order = rng.random((n_tokens, N_LAYERS, N_EXPERTS)).argsort(-1)
    return order[..., :EXPERTS_PER_TOKEN].astype(np.uint8)


def _sample(
    rng: random.Random,
    vocab_size: int,
    prompt: tuple[int, ...],
    group: int,
    index: int,
    advantage: float,
    *,
    live: bool,
) -> TrainSample:
    in_last_update = group >= (N_UPDATES - 1) * GROUPS_PER_UPDATE
    # Two of the last update's samples do not fit into one micro-batch.
    n_response = rng.randint(16, 20) if in_last_update else rng.randint(1, 12)
    n_response = {(0, 0): MAX_RESPONSE, (0, 2): 0}.get((group, index), n_response)
    return TrainSample(
        prompt_id=f"toy/{group}",
        group=group,
        index=index,
        prompt_token_ids=int32(prompt),
        response_token_ids=int32(rng.randrange(vocab_size) for _ in range(n_response)),
        rollout_logprobs=float32(rng.uniform(-8.0, -2.0) for _ in range(n_response)),
        advantage=advantage,
        version=0,
        live=live,
        score=advantage,
    )


def make_model(problem: Problem, directory: Path) -> None:
    """Write a random model with 8 query heads and 2 key-value heads, fp32 safetensors."""
    import torch
    import transformers

    has_softmax = problem.experts and "n_routed_experts" not in problem.options
    experts = {
        "num_experts": N_EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
        "norm_topk_prob": problem.family != "Qwen2Moe",
    }
    # Of a model of images and text, the part for text.
    name = f"{problem.family}TextConfig"
    config_class = getattr(transformers, name, getattr(transformers, f"{problem.family}Config"))
    config = config_class(
        vocab_size=problem.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=8,
        head_dim=problem.head_dim,
        max_position_embeddings=64,
        tie_word_embeddings=problem.tied,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **problem.rope},
        pad_token_id=None,
        **{
            "sliding_window": None,
            "num_key_value_heads": 2,
            **(experts if has_softmax else {}),
            **problem.options,
        },
    )
    torch.manual_seed(problem.seed)
    model = getattr(transformers, f"{problem.family}ForCausalLM")(config).float()
    for name, parameter in model.named_parameters():
        # Norms of one and biases of zero, as transformers makes them, would hide a mix-up.
        is_factor = "norm" in name and "linear_num_key_heads" not in problem.options
        is_factor |= "linear_attn.norm" in name
        torch.nn.init.normal_(parameter, mean=float(is_factor), std=0.1)
        if "conv1d" in name:
            parameter.data *= 5.0  # values that are nearly zero teach nothing
        if name.endswith("mlp.gate.weight"):
            parameter.data *= 2.0  # experts that are nearly equal teach their router nothing
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            torch.nn.init.normal_(buffer, std=0.05)
    model.save_pretrained(directory)
