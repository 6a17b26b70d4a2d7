"""How much memory a run needs, from shapes: pure arithmetic, in bytes.

Legend: b bytes of a compute element (bf16 2, fp32 4); t tensor-parallel size; h hidden size;
f intermediate size; H query heads and K key-value heads of d each; V rows of the vocabulary;
T packed tokens of a micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpg_megatron.config.sections import GIB, MIB, Config
from gpg_megatron.errors import UserError
from gpg_megatron.model.pipeline import passes_in_flight, pipeline_chunks
from gpg_megatron.model.shape import padded_vocab_size
from gpg_megatron.placement.delta import kept_bytes
from gpg_megatron.placement.states import RESIDENT, Mode, State
from gpg_megatron.shapes import ModelShape
from gpg_megatron.types import DTYPES

FP32 = DTYPES["fp32"].itemsize
MIN_SEQS, MAX_SEQS = 256, 1024
MIN_GPU_TOKENS, MAX_GPU_TOKENS, CPU_TOKENS = 2048, 16384, 8192
POLICY_PARTS = frozenset({"parameters", "gradients", "optimizer"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyMemory:
    """Of one rank."""

    parameters: int
    gradients: int
    optimizer: int
    """Adam's two moments and, for bf16 parameters, the fp32 master weights."""
    activations: int
    """Kept for the backward pass, at the most micro-batches that are under way at once."""
    logits: int
    """Of one micro-batch; on the last stage only."""
    projection: int
    """The gradient of the projection onto the vocabulary, while it is summed over chunks of
    logits; on the last stage only."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.working

    @property
    def working(self) -> int:
        """Of the forward and the backward pass alone."""
        return self.activations + self.logits + self.projection


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Of one worker of an engine."""

    reserved: int
    """Everything that the worker may take."""
    parameters: int
    kv_cache: int
    """What is left of it for keys and values, the engine's own workspace not deducted."""
    kv_bytes_per_token: int
    packed: int = 0
    """On CPU: copies of the vocabulary's weights in the order that vLLM's products read. It makes
    one of the embedding too, which nothing multiplies with."""

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit."""
        return max(0, self.kv_cache) // self.kv_bytes_per_token


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Of one engine, in one step."""

    max_num_seqs: int
    max_num_batched_tokens: int


def policy_memory(
    config: Config,
    shape: ModelShape,
    *,
    n_parameters: int,
    n_in_experts: int = 0,
    stage: int,
    fused: bool = False,
) -> PolicyMemory:
    """Of a rank of a pipeline stage that holds n_parameters, n_in_experts of them in experts.

    Gradients are summed in fp32 whatever the parameters are. With the distributed optimizer
    every replica holds its share of the optimizer's state, else all of it; ranks that share the
    tokens of a row are replicas too, and experts have fewer of them. Where whole layers are
    computed again, a token keeps one hidden state for each layer, and one layer at a time is
    complete; recompute: attention is counted as none.
    """
    item = DTYPES[config.model.dtype].itemsize
    p = config.policy
    replicas = p.context_parallel_size * p.data_parallel_size
    shares = replicas if p.use_distributed_optimizer else 1
    of_experts = shares // p.expert_model_parallel_size if p.use_distributed_optimizer else 1
    state = optimizer_item(config)
    tokens = math.ceil(p.row_tokens / p.context_parallel_size)
    pp = p.pipeline_model_parallel_size
    layers = max(pipeline_chunks(p, shape.num_layers)[stage::pp])
    in_flight = passes_in_flight(p, stage, micro_batches_per_update(config))
    last = stage == pp - 1
    complete = activation_bytes(config, shape, fused=fused)
    kept = in_flight * layers * complete
    if p.recompute == "layers":
        kept = in_flight * layers * (item * shape.hidden_size // sequence_shares(config)) + complete
    return PolicyMemory(
        parameters=n_parameters * item,
        gradients=n_parameters * FP32,
        optimizer=(n_parameters - n_in_experts) * state // shares
        + n_in_experts * state // of_experts,
        activations=tokens * kept,
        logits=logit_bytes(config, shape) if last else 0,
        projection=projection_bytes(config, shape) if last else 0,
    )


def optimizer_item(config: Config) -> int:
    """Bytes that Adam keeps for one parameter: two moments and, for bf16, the master weight."""
    return (3 if DTYPES[config.model.dtype].itemsize < FP32 else 2) * FP32


def gpu_states(
    mode: Mode, policy: PolicyMemory | None, engine: EngineMemory | None
) -> dict[str, tuple[int, int]]:
    """State -> (policy bytes, engine bytes) of one GPU; disaggregated, there is but one state.

    A sleeping engine is counted as nothing, though its CUDA context and captured graphs stay.

    Args:
        policy, engine: of the rank and of the engine worker there; None: there is none.
    """
    if mode == "disaggregated":
        return {"always": (policy.total if policy else 0, engine.reserved if engine else 0)}
    result = {}
    for state, resident in RESIDENT.items():
        if state is State.START:
            continue  # an engine as in ROLLOUT, and no policy
        held = sum(getattr(policy, part) for part in POLICY_PARTS & resident) if policy else 0
        if policy and state is State.POLICY:
            held += policy.working
        awake = 0
        if engine and "kv_cache" in resident:
            awake = engine.reserved
        elif engine and "weights" in resident:
            awake = engine.parameters
        result[state.value] = (held, awake)
    return result


def activation_bytes(config: Config, shape: ModelShape, *, fused: bool = False) -> int:
    """Of one token in one layer: what autograd keeps of the project's own layer.

                                     on a CPU                    fused
        two norms (or four)          2 x (b h + 4)               2 x (2 b h + 4)
                                     (input)                     (input, result before the
                                                                 weight)
        inputs of fc1 and of q, k, v 2 x b h                     2 x b h
        sines and cosines            4 b d                       4 b d
        attention                    b (4 H + 3 K) d / t         b (2 H + 2 c K) d / t, or
                                                                 b (3 H + 3 K) d / t
        its normaliser               4 H / t                     4 H / t
        gated linear unit            3 b f / t                   3 b f / t

    Attention keeps q, k, v as the projection gave them, rotated q and k, and the output, of each
    sequence and of all. In one call it keeps rotated q, the output, and keys and values: c copies
    of a token's where prompts are shared, else views of what the projection gave. The gated linear
    unit keeps gate and up, and the product.

    In the manner of Korthikanti et al. 2022 (arXiv 2205.05198, section 4), without dropout and
    without the score matrix. With experts f is what a token visits, and each visit keeps a
    copy of the token; where layers differ, in experts or by gated delta nets, the one that keeps
    more is meant. A gate of attention's output adds 2 b H d / t, itself and what it multiplies.
    Transformer Engine's layer keeps less. The first two rows and the tables of sines and cosines
    are divided by t under sequence parallelism.

    Args:
        fused: a norm is one kernel, attention one call, as on CUDA in bf16.
    """
    item, t = DTYPES[config.model.dtype].itemsize, config.policy.tensor_model_parallel_size
    h, d, heads, kv_heads = shape.hidden_size, shape.head_dim, shape.num_heads, shape.num_kv_heads
    norms = ((1 + fused) * item * h + FP32) * (4 if shape.post_norms else 2)
    whole = (norms + 2 * item * h + 4 * item * d) // sequence_shares(config)
    if shape.latent is not None:
        # Before and after their norms; keys, values and queries are counted as every head's own.
        whole += 3 * item * (shape.latent.q_rank + shape.latent.kv_rank) // sequence_shares(config)
    kept_heads = 4.0 * heads + 3 * kv_heads
    if fused and config.policy.share_prompts:
        kept_heads = 2 * (heads + _copies_of_keys(config) * kv_heads)
    elif fused:
        kept_heads = 3 * (heads + kv_heads)
    kept_heads += 2 * heads * shape.output_gate
    attention = math.ceil(item * kept_heads * d) + FP32 * heads
    if shape.delta:
        attention = max(attention, kept_bytes(shape.delta, item))
    mlp = 3 * shape.ffn_size if shape.dense_layers else 0
    if shape.moe is not None:
        ffn = shape.moe.experts_per_token * shape.moe.ffn_size + shape.moe.shared_ffn_size
        mlp = max(mlp, 3 * ffn + shape.moe.experts_per_token * shape.hidden_size)
    return whole + (attention + item * mlp) // t


def _copies_of_keys(config: Config) -> float:
    """How often a row's token is a key, where every answer of a group sees one shared prompt: in
    groups of the longest prompt and the longest answers."""
    prompt, response = config.data.max_prompt_length, config.rollout.max_response_length
    n = config.rollout.n
    return n * (prompt + response) / (prompt + n * response)


def sequence_shares(config: Config) -> int:
    """Among how many ranks the tokens of norms and residuals are shared out."""
    p = config.policy
    return p.tensor_model_parallel_size if p.sequence_parallel else 1


def logit_bytes(config: Config, shape: ModelShape) -> int:
    """Of a chunk of tokens, or of all responses of a micro-batch if they are fewer: logits as the
    projection gives them, in fp32, and their gradient."""
    p = config.policy
    rows = padded_vocab_size(shape, p.tensor_model_parallel_size) // p.tensor_model_parallel_size
    responses = config.rollout.max_response_length
    share = responses / (config.data.max_prompt_length + responses)
    tokens = p.row_tokens / p.context_parallel_size
    chunk = max(1, p.logits_chunk_mb * MIB // (FP32 * rows))
    of_each = DTYPES[config.model.dtype].itemsize + 2 * FP32
    return min(math.ceil(tokens * share), chunk) * rows * of_each


def projection_bytes(config: Config, shape: ModelShape) -> int:
    """One gradient of the projection in the model's type beside the sum: in bf16 a chunk's product,
    and at the end what autograd is handed."""
    t = config.policy.tensor_model_parallel_size
    rows = padded_vocab_size(shape, t) // t
    return rows * shape.hidden_size * DTYPES[config.model.dtype].itemsize


def micro_batches_per_update(config: Config) -> int:
    """Of one data-parallel rank, if every sequence is live and has its full length."""
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    sequences = config.trainer.prompts_per_update * config.rollout.n
    mine = math.ceil(sequences / config.policy.data_parallel_size)
    together = max(1, config.policy.row_tokens // longest)
    return math.ceil(mine / together)


def engine_memory(
    config: Config, shape: ModelShape, *, n_parameters: int, device_bytes: int | None
) -> EngineMemory:
    """Of a worker that holds n_parameters.

    Args:
        device_bytes: of its GPU; None: on CPU, where the cache has a size of its own.
    """
    t, item = config.rollout.tensor_model_parallel_size, DTYPES[config.rollout.dtype].itemsize
    kept = 2 * max(1, shape.num_kv_heads // t) * shape.head_dim
    if shape.latent is not None:  # what is compressed, on every worker
        kept = shape.latent.kv_rank + shape.latent.rope_dim
    cache = str(config.rollout.engine_args.get("kv_cache_dtype", "auto"))
    cache_item = 1 if cache.startswith("fp8") else item
    parameters = n_parameters * item
    packed = 0
    if device_bytes is None:
        kv_cache = int(config.rollout.kv_cache_gb * GIB)
        reserved = parameters + kv_cache
        packed = 2 * item * padded_vocab_size(shape, t) // t * shape.hidden_size
    else:
        reserved = int(config.rollout.gpu_memory_utilization * device_bytes)
        kv_cache = reserved - parameters
    return EngineMemory(
        reserved=reserved,
        parameters=parameters,
        kv_cache=kv_cache,
        packed=packed,
        # A gated delta net keeps a state for each sequence instead.
        kv_bytes_per_token=(shape.num_layers - len(shape.delta_layers)) * kept * cache_item,
    )


def cache_problem(config: Config, engine: EngineMemory) -> str | None:
    """Why the cache cannot hold one sequence of full length; None: it can."""
    r = config.rollout
    if engine.kv_cache <= 0:
        return (
            f"engine: the weights take {engine.parameters / GIB:.2f} GiB of the "
            f"{engine.reserved / GIB:.2f} GiB that rollout.gpu_memory_utilization="
            f"{r.gpu_memory_utilization:g} gives each worker; raise it or "
            "rollout.tensor_model_parallel_size"
        )
    longest = config.data.max_prompt_length + r.max_response_length
    if engine.kv_tokens < longest:
        return (
            f"engine: the cache holds {engine.kv_tokens:,} tokens, one sequence may have "
            f"{longest:,}; raise rollout.gpu_memory_utilization (on CPU rollout.kv_cache_gb)"
        )
    return None


def engine_limits(config: Config, engine: EngineMemory, *, on_gpu: bool) -> EngineLimits:
    """What an engine may do at once: the section's keys or, where they are not set,

        sequences   256, and on a GPU as many more as the cache holds at full length: none of
                    them is ever put off for others
        tokens      on a GPU a 32nd of the cache's tokens, rounded down to a power of two, from
                    2,048 to 16,384 (vLLM's own values for servers); on CPU, where prompts are
                    not cut, 8,192 or one sequence of full length

    Raises:
        UserError: on CPU one sequence does not fit in rollout.max_num_batched_tokens.
    """
    r = config.rollout
    longest = config.data.max_prompt_length + r.max_response_length
    n_seqs, n_tokens = r.max_num_seqs, r.max_num_batched_tokens
    if n_seqs is None:
        held = engine.kv_tokens // longest // 8 * 8
        n_seqs = min(max(held, MIN_SEQS), MAX_SEQS) if on_gpu else MIN_SEQS
        n_seqs = min(n_seqs, n_tokens or n_seqs)
    if n_tokens is None:
        share = 2 ** max(0, (engine.kv_tokens // 32).bit_length() - 1)
        n_tokens = min(max(share, MIN_GPU_TOKENS), MAX_GPU_TOKENS)
        n_tokens = max(n_tokens, n_seqs) if on_gpu else max(longest, CPU_TOKENS)
    if not on_gpu and n_tokens < longest:
        raise UserError(
            f"rollout.max_num_batched_tokens is {n_tokens}; on CPU vLLM does not cut prompts, and "
            f"data.max_prompt_length + rollout.max_response_length is {longest}; expected at least "
            "as many"
        )
    return EngineLimits(max_num_seqs=n_seqs, max_num_batched_tokens=n_tokens)


def fitting_limits(
    config: Config, shape: ModelShape, *, n_parameters: int, device_bytes: int | None
) -> EngineLimits:
    """engine_limits of an engine that is about to start; the arguments are those of engine_memory.

    Raises:
        UserError: one sequence of full length does not fit.
    """
    engine = engine_memory(config, shape, n_parameters=n_parameters, device_bytes=device_bytes)
    if problem := cache_problem(config, engine):
        raise UserError(problem)
    return engine_limits(config, engine, on_gpu=device_bytes is not None)
