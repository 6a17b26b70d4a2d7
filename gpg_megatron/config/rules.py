"""What a configuration must be besides well typed: ranges, and keys that fit together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from gpg_megatron.config.algorithm import check_algorithm, warnings_about
from gpg_megatron.errors import UserError

if TYPE_CHECKING:
    from gpg_megatron.config.sections import Config, RewardConfig

REWARD_PARTS = ("answer", "format", "overlong", "length")
"""What reward.weights may name."""

# (what is right, test, keys). A key whose value is None is not judged.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "at least 1",
        lambda v: v >= 1,
        "policy.tensor_model_parallel_size policy.pipeline_model_parallel_size "
        "policy.context_parallel_size "
        "policy.data_parallel_size policy.expert_model_parallel_size "
        "policy.max_tokens_per_micro_batch policy.timeout_s "
        "policy.num_layers_in_first_pipeline_stage policy.num_layers_in_last_pipeline_stage "
        "policy.num_threads policy.logits_chunk_mb data.max_prompt_length data.val_max_rows "
        "rollout.top_k rollout.num_engines rollout.tensor_model_parallel_size "
        "rollout.max_response_length rollout.max_num_seqs rollout.startup_timeout_s "
        "rollout.generate_timeout_s bridge.bucket_mb bridge.timeout_s reward.num_workers "
        "trainer.total_training_steps trainer.train_batch_size trainer.mini_batch_size "
        "trainer.max_bad_steps validation.n rollout.n checkpoint.keep_last",
    ),
    (
        "at least 0",
        lambda v: v >= 0,
        "policy.lr_warmup_steps policy.min_lr policy.weight_decay policy.clip_grad "
        "algorithm.max_redraws algorithm.alpha_max algorithm.f_norm_eps algorithm.kl_coef "
        "algorithm.entropy_coef trainer.seed trainer.test_freq validation.temperature "
        "logging.rollout_samples checkpoint.save_freq checkpoint.keep_best",
    ),
    (
        "greater than 0",
        lambda v: v > 0,
        "policy.lr policy.adam_eps rollout.temperature rollout.kv_cache_gb "
        "bridge.canary_tolerance reward.timeout_s algorithm.clip_high algorithm.correction_min "
        "algorithm.correction_max",
    ),
    (
        "greater than 0 and at most 1",
        lambda v: 0 < v <= 1,
        "rollout.top_p rollout.gpu_memory_utilization algorithm.clip_low",
    ),
    ("at least 1", lambda v: v >= 1, "reward.memory_limit_mb validation.top_k"),
    ("at least 0", lambda v: v >= 0, "reward.overlong_buffer"),
    ("0 or 1", lambda v: v in (0, 1), "trainer.max_staleness"),
    ("greater than 0 and at most 1", lambda v: 0 < v <= 1, "validation.top_p"),
    ("a finite number", lambda v: True, "reward.timeout_score"),
    ("between 0 and 1", lambda v: 0 <= v <= 1, "algorithm.beta_th"),
    ("at least 0 and less than 1", lambda v: 0 <= v < 1, "policy.adam_beta1 policy.adam_beta2"),
)


def validate(config: Config, *, trains: bool = True) -> None:
    """Rules that need no file besides the configuration. Raises UserError.

    trains: False for a command that only evaluates and needs no training files."""
    t = config.trainer
    _require(bool(config.model.path), "model.path", "is not set", "a Hugging Face directory")
    has_files = bool(config.data.train_files)
    _require(has_files or not trains, "data.train_files", "is empty", "at least one file")
    for right, test, keys in _RANGES:
        for key in keys.split():
            section, name = key.split(".")
            value = getattr(getattr(config, section), name)
            unset = value is None or (name.endswith("top_k") and value == -1)
            fits = unset or (math.isfinite(value) and test(value))
            _require(fits, key, f"is {value}", right)
    update = config.prompts_per_update
    _require(
        t.train_batch_size % update == 0,
        "trainer.mini_batch_size",
        f"({update}) does not divide trainer.train_batch_size ({t.train_batch_size})",
        "a divisor of it",
    )
    p = config.policy
    _require(
        p.data_parallel_size % p.expert_model_parallel_size == 0,
        "policy.expert_model_parallel_size",
        f"({p.expert_model_parallel_size}) does not divide policy.data_parallel_size "
        f"({p.data_parallel_size})",
        "a divisor of it",
    )
    _check_checkpoints(config)
    colocated, transport = t.placement == "colocated", config.bridge.transport
    _require(
        not (colocated and t.max_staleness),
        "trainer.max_staleness",
        f"is {t.max_staleness} with trainer.placement=colocated, where engines sleep while the "
        "policy learns",
        "0, or disaggregated",
    )
    _require(
        transport != ("nccl" if colocated else "cuda_ipc"),
        "bridge.transport",
        f"is {transport} with trainer.placement={t.placement}",
        "shm, gloo or cuda_ipc: NCCL refuses two processes on one GPU"
        if colocated
        else "shm, gloo or nccl: rank and engine have different GPUs",
    )
    _require(
        p.tensor_model_parallel_size > 1 or not p.sequence_parallel,
        "policy.sequence_parallel",
        "is true, but policy.tensor_model_parallel_size is 1",
        "false",
    )
    _require(
        config.validation.temperature > 0 or config.validation.n == 1,
        "validation.n",
        f"is {config.validation.n} with validation.temperature=0, where all answers are the same",
        "1",
    )
    _validate_reward(config.reward, config.rollout.max_response_length)
    weights, files = config.data.train_weights, config.data.train_files
    _require(
        not weights or len(weights) == len(files),
        "data.train_weights",
        f"has {len(weights)} entries for {len(files)} training files",
        "one for each, or none",
    )
    _require(
        all(math.isfinite(w) and w > 0 for w in weights),
        "data.train_weights",
        f"is {list(weights)}",
        "numbers greater than 0",
    )
    _require(
        p.min_lr <= p.lr, "policy.min_lr", f"({p.min_lr}) exceeds policy.lr ({p.lr})", "at most lr"
    )
    check_algorithm(
        config.algorithm,
        n_updates=config.updates_per_batch,
        truncates=config.rollout.truncates,
        group_size=config.rollout.n,
    )


def config_warnings(config: Config) -> list[str]:
    """What is legal and yet likely not meant, one line each."""
    found = warnings_about(
        config.algorithm,
        n_updates=config.updates_per_batch,
        stale=config.trainer.max_staleness > 0,
    )
    reward = config.reward
    shaped = [
        f"reward.weights.{part}" for part, w in reward.weights.items() if w and part != "answer"
    ]
    if reward.timeout_score:
        shaped.append("reward.timeout_score")
    if shaped and config.algorithm.alpha == "nonzero":
        found.append(
            f"algorithm.alpha=nonzero takes every score other than 0 for a right answer, and "
            f"{shaped[0]} gives others; algorithm.alpha=group counts dead groups instead"
        )
    return found


def _check_checkpoints(config: Config) -> None:
    c, test_freq = config.checkpoint, config.trainer.test_freq
    if c.keep_best:
        _require(
            c.keep_last is not None and c.best_metric is not None,
            "checkpoint.keep_best",
            f"is {c.keep_best} without checkpoint.keep_last and checkpoint.best_metric",
            "all three or none",
        )
        measured = bool(config.data.val_files) and test_freq > 0 and c.save_freq % test_freq == 0
        _require(
            measured and str(c.best_metric).startswith("eval/"),
            "checkpoint.best_metric",
            f"({c.best_metric}) is not measured at every save",
            "an eval/ metric, data.val_files, and a trainer.test_freq that divides "
            "checkpoint.save_freq",
        )


def _validate_reward(reward: RewardConfig, max_response_length: int) -> None:
    """Names, and keys that only make sense together. Raises UserError."""
    scorers = get_args(get_type_hints(type(reward))["scorer"])[1:]
    for pattern, name in reward.by_source.items():
        key = "reward.by_source"
        _require(name in scorers, key, f"gives {pattern!r} {name!r}", ", ".join(scorers))
    for part, weight in reward.weights.items():
        key = f"reward.weights.{part}"
        _require(part in REWARD_PARTS, key, "is unknown", ", ".join(REWARD_PARTS))
        _require(math.isfinite(weight), key, f"is {weight}", "a finite number")
    uses_custom = "custom" in (reward.scorer, *reward.by_source.values())
    _require(
        uses_custom == (reward.custom_function is not None),
        "reward.custom_function",
        "is not set" if uses_custom else "is set, but nothing uses it",
        "FILE.py:NAME" if uses_custom else "reward.scorer=custom, or custom in reward.by_source",
    )
    buffer = reward.overlong_buffer
    _require(
        bool(reward.weights.get("overlong")) == bool(buffer) and buffer <= max_response_length,
        "reward.overlong_buffer",
        f"is {buffer}",
        "from 1 to rollout.max_response_length with reward.weights.overlong, else 0",
    )
    if reward.format_pattern is not None:
        try:
            re.compile(reward.format_pattern)
        except re.error as error:
            raise UserError(f"reward.format_pattern: not a regular expression: {error}") from None


def _require(condition: bool, key: str, problem: str, right: str) -> None:
    if not condition:
        raise UserError(f"{key} {problem}; expected {right}")
