"""What vLLM's engine is started with: the section's keys, and whatever else the user names.

rollout.engine_args goes to vLLM as it is. A key that this project sets would be set twice, and one
that changes how many workers an engine has would break the weights' way into them: both are
refused, and so is what vLLM does not know.
"""

from __future__ import annotations

import ast
import difflib
import functools
from importlib import util
from pathlib import Path
from typing import Any

from gpg_megatron.config.sections import GIB, RolloutConfig
from gpg_megatron.errors import UserError
from gpg_megatron.rollout.spec import EngineSpec

KEY = "rollout.engine_args"
BLOCK_TOKENS = 32
"""Of the cache on a CPU: the fewest that vLLM's kernels there take."""
_ONE_WORLD = "an engine has rollout.tensor_model_parallel_size workers"
_AGREEMENT = "engine and policy must agree on it"
# vLLM's name -> why a user does not set it here.
TAKEN = {
    "model": "it is model.path",
    "tokenizer": "prompts arrive as token ids",
    "skip_tokenizer_init": "stop strings need the tokenizer",
    "load_format": "it follows from the files at model.path",
    "dtype": "it is rollout.dtype",
    "tensor_parallel_size": "it is rollout.tensor_model_parallel_size",
    "max_model_len": "it is data.max_prompt_length + rollout.max_response_length",
    "max_num_seqs": "it is rollout.max_num_seqs",
    "max_num_batched_tokens": "it is rollout.max_num_batched_tokens",
    "gpu_memory_utilization": "it is rollout.gpu_memory_utilization",
    "kv_cache_memory_bytes": "it is rollout.kv_cache_gb",
    "enforce_eager": "it is rollout.enforce_eager",
    "enable_chunked_prefill": "it follows from the device",
    "distributed_executor_backend": "it follows from the device",
    "enable_sleep_mode": "it follows from trainer.placement",
    "enable_prefix_caching": "answers to one prompt share it",
    "enable_return_routed_experts": "it is rollout.router_replay",
    "disable_log_stats": "the run has its own",
    "logprobs_mode": _AGREEMENT,
    "generation_config": _AGREEMENT,
    "override_generation_config": _AGREEMENT,
    "logits_processors": _AGREEMENT,
    "hf_overrides": _AGREEMENT,
    "worker_cls": "the bridge works inside vLLM's own",
    "worker_extension_cls": "it is the bridge's",
    "weight_transfer_config": "it is the bridge's",
    "seed": "each request has its own, from trainer.seed",
    "pipeline_parallel_size": _ONE_WORLD,
    "data_parallel_size": _ONE_WORLD,
    "prefill_context_parallel_size": _ONE_WORLD,
    "nnodes": _ONE_WORLD,
}


def check_engine_args(rollout: RolloutConfig) -> None:
    """Names only; a value is judged by vLLM when the engine starts.

    Raises:
        UserError: a key is taken, or vLLM does not know it.
    """
    for key in rollout.engine_args:
        if key in TAKEN:
            raise UserError(f"{KEY}.{key} cannot be set here: {TAKEN[key]}")
        known = vllm_fields()
        if known and key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "expected a field of its EngineArgs"
            raise UserError(f"{KEY}.{key}: vLLM does not know it; {hint}")


@functools.cache
def vllm_fields() -> frozenset[str]:
    """Of EngineArgs and AsyncEngineArgs of the vLLM that is installed; empty: none is.

    Read from the source, since importing vLLM takes seconds.
    """
    found = util.find_spec("vllm")
    if found is None or found.origin is None:
        return frozenset()
    source = (Path(found.origin).parent / "engine" / "arg_utils.py").read_text()
    classes = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
    ]
    return frozenset(
        line.target.id
        for node in classes
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and not line.target.id.startswith("_")
    )


def engine_args(spec: EngineSpec) -> dict[str, Any]:
    """The keywords of vLLM's AsyncEngineArgs."""
    r = spec.rollout
    args: dict[str, Any] = {
        "model": spec.model_path,
        "load_format": "dummy" if spec.random_weights else "auto",
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[r.dtype],
        "tensor_parallel_size": r.tensor_model_parallel_size,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_num_seqs,
        "max_num_batched_tokens": spec.max_num_batched_tokens,
        "enforce_eager": r.enforce_eager,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # the model's own would alter the sampling distribution
        "worker_extension_cls": spec.worker_extension,
        "seed": 0,
    }
    if spec.weight_transfer:
        args["weight_transfer_config"] = {"backend": spec.weight_transfer}
    if spec.device == "cpu":
        args["kv_cache_memory_bytes"] = int(r.kv_cache_gb * GIB)
        # A prompt cut in two makes vLLM rewind the request's random generator, and torch's CPU
        # generators cannot: the engine core would die.
        args["enable_chunked_prefill"] = False
        # vLLM keeps states for prompts that come again only where it may cut prompts.
        # Experts are recorded where tokens are computed; bridge/recorder.py.
        args["enable_prefix_caching"] = not spec.has_states and not r.router_replay
        in_core = r.tensor_model_parallel_size == 1
        args["distributed_executor_backend"] = "uni" if in_core else "mp"
    else:
        args["gpu_memory_utilization"] = r.gpu_memory_utilization
        args["enable_sleep_mode"] = spec.gives_memory_back  # refused on CPU
        if r.router_replay:
            args["enable_return_routed_experts"] = True
    assert args.keys() <= TAKEN.keys(), args.keys() - TAKEN.keys()
    return args | _small_blocks(spec) | _without_kernels(spec) | dict(r.engine_args)


def _small_blocks(spec: EngineSpec) -> dict[str, Any]:
    """Only whole blocks of a prompt are shared, and on CPU vLLM's have 128 tokens: most prompts
    would be computed for each answer. For latent attention and states vLLM has to choose."""
    if spec.device == "cuda" or spec.is_latent or spec.has_states:
        return {}
    return {"block_size": BLOCK_TOKENS}


def _without_kernels(spec: EngineSpec) -> dict[str, Any]:
    """vLLM 0.32's kernel on CPU turns the rotated parts of latent attention, which are views, by
    wrong angles: log-probs are up to 0.4 nats from those of transformers, and 2e-6 without it."""
    wrong = spec.is_latent and spec.device == "cpu"
    return {"compilation_config": {"custom_ops": ["-rotary_embedding"]}} if wrong else {}
