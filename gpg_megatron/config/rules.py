"""What a configuration must be besides well typed: within its ranges, and of one piece.

A rule is a pair: whether it is broken, and the message. What one key may be by itself stands on
its field, see ranges.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import chain
from typing import get_args

from gpg_megatron.config import off_policy
from gpg_megatron.config.algorithm import group_rules, update_rules
from gpg_megatron.config.ranges import ranges
from gpg_megatron.config.reward import RewardConfig, Scorer
from gpg_megatron.config.sections import Config, PolicyConfig
from gpg_megatron.errors import UserError

STOP_SIGNS = {"entropy": False, "kl": True, "accuracy": False}
"""What trainer.stop_on may name: whether its limit is the most that is allowed, or the least."""
REWARD_PARTS = ("answer", "format", "overlong", "length")
"""What reward.weights may name."""


def validate(config: Config, *, trains: bool = True, has_model: bool = True) -> None:
    """Rules that need no file besides the configuration. Raises UserError.

    Args:
        trains: False for a command that only evaluates and needs no training files.
        has_model: False for one that needs no model either.
    """
    for key, allowed, value in ranges(config):
        if value is not None and value not in allowed:
            raise UserError(f"{key} is {value}; expected {allowed}")
    for broken, message in chain(
        _about_model_and_data(config, trains, has_model),
        _about_the_policy(config.policy),
        _about_the_loop(config),
        _about_the_stream(config),
        _about_stop_strings(config.rollout.stop),
        _about_checkpoints(config),
        _about_rewards(config.reward, config.rollout.max_response_length),
        _about_the_algorithm(config),
    ):
        if broken:
            raise UserError(message)


def config_warnings(config: Config) -> list[str]:
    """What is legal and yet likely not meant, one line each."""
    found = off_policy.warnings_about(config.objective, config.sampled)
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


def _about_the_algorithm(config: Config) -> Iterator[tuple[bool, str]]:
    for broken, message in chain(
        group_rules(config.algorithm, group_size=config.rollout.n),
        off_policy.rules(config.objective, config.sampled),
        update_rules(config.objective),
    ):
        yield broken, f"algorithm.{message}"


def _about_model_and_data(
    config: Config, trains: bool, has_model: bool
) -> Iterator[tuple[bool, str]]:
    d = config.data
    yield (
        has_model and not config.model.path,
        "model.path is not set; expected a Hugging Face directory or ORG/NAME",
    )
    yield trains and not d.train_files, "data.train_files is empty; expected at least one file"
    yield (
        bool(d.chat_template_kwargs) and not d.apply_chat_template,
        "data.chat_template_kwargs is set with data.apply_chat_template=false; expected a template "
        "to be applied, or no arguments of it",
    )
    yield (
        d.curriculum != "none" and config.rollout.n == 1,
        f"data.curriculum={d.curriculum} looks for prompts whose answers differ, but rollout.n is "
        "1; expected rollout.n of at least 2, or none",
    )
    n_weights, n_files = len(d.train_weights), len(d.train_files)
    yield (
        n_weights not in (0, n_files),
        f"data.train_weights has {n_weights} entries for {n_files} training files; expected one "
        "for each, or none",
    )
    yield (
        not all(math.isfinite(w) and w > 0 for w in d.train_weights),
        f"data.train_weights is {list(d.train_weights)}; expected numbers greater than 0",
    )


def _about_the_policy(p: PolicyConfig) -> Iterator[tuple[bool, str]]:
    yield (
        p.data_parallel_size % p.expert_model_parallel_size != 0,
        f"policy.expert_model_parallel_size ({p.expert_model_parallel_size}) does not divide "
        f"policy.data_parallel_size ({p.data_parallel_size}); expected a divisor of it",
    )
    if p.pipeline_model_parallel_size == 1:
        for key, default in (
            ("virtual_pipeline_model_parallel_size", 1),
            ("num_layers_in_first_pipeline_stage", None),
            ("num_layers_in_last_pipeline_stage", None),
        ):
            yield (
                (value := getattr(p, key)) != default,
                f"policy.{key} is {value}, but policy.pipeline_model_parallel_size is 1; expected "
                f"{'null' if default is None else default}, or more stages",
            )
    yield (
        p.sequence_parallel and p.tensor_model_parallel_size == 1,
        "policy.sequence_parallel is true, but policy.tensor_model_parallel_size is 1; expected "
        "false",
    )
    yield (
        p.min_lr > p.lr,
        f"policy.min_lr ({p.min_lr}) exceeds policy.lr ({p.lr}); expected at most lr",
    )


def _about_the_loop(config: Config) -> Iterator[tuple[bool, str]]:
    t, v, transport = config.trainer, config.validation, config.bridge.transport
    n_seqs, n_tokens = config.rollout.max_num_seqs, config.rollout.max_num_batched_tokens
    yield (
        n_seqs is not None and n_tokens is not None and n_tokens < n_seqs,
        f"rollout.max_num_batched_tokens ({n_tokens}) is less than rollout.max_num_seqs "
        f"({n_seqs}); expected at least as many: each sequence has a token in every step",
    )
    least, n_engines = config.rollout.min_engines, config.rollout.num_engines
    yield (
        least > n_engines,
        f"rollout.min_engines is {least} with rollout.num_engines={n_engines}; expected at most "
        "as many",
    )
    for sign, limit in t.stop_on.items():
        key = f"trainer.stop_on.{sign}"
        yield sign not in STOP_SIGNS, f"{key} is unknown; expected {', '.join(STOP_SIGNS)}"
        yield not 0 <= limit < math.inf, f"{key} is {limit}; expected a number of at least 0"
    yield (
        "kl" in t.stop_on and config.rollout.truncates,
        "trainer.stop_on.kl compares with the engine's log-probs, but rollout.top_p or "
        "rollout.top_k cut the distribution that they belong to; expected entropy or accuracy",
    )
    yield (
        t.train_batch_size % t.prompts_per_update != 0,
        f"trainer.mini_batch_size ({t.prompts_per_update}) does not divide "
        f"trainer.train_batch_size ({t.train_batch_size}); expected a divisor of it",
    )
    for key, values, last in (
        ("steps", t.profile_steps, t.total_training_steps),
        ("ranks", t.profile_ranks, config.policy.world_size - 1),
    ):
        first = int(key == "steps")
        yield (
            not all(first <= x <= last for x in values),
            f"trainer.profile_{key} is {list(values)}; expected numbers from {first} to {last}",
        )
    colocated = t.placement == "colocated"
    yield (
        colocated and t.max_staleness > 0,
        f"trainer.max_staleness is {t.max_staleness} with trainer.placement=colocated, where "
        "engines sleep while the policy learns; expected 0, or disaggregated",
    )
    yield (
        colocated and transport == "nccl",
        "bridge.transport is nccl with trainer.placement=colocated; expected auto, shm, gloo or "
        "cuda_ipc: NCCL refuses two processes on one GPU",
    )
    yield (
        not colocated and transport == "cuda_ipc",
        "bridge.transport is cuda_ipc with trainer.placement=disaggregated; expected auto, shm, "
        "gloo or nccl: rank and engine have different GPUs",
    )
    yield (
        v.temperature == 0 and v.n > 1,
        f"validation.n is {v.n} with validation.temperature=0, where all answers are the same; "
        "expected 1",
    )


def _about_the_stream(config: Config) -> Iterator[tuple[bool, str]]:
    r, staleness = config.rollout, config.trainer.max_staleness
    yield (
        r.update == "in-flight" and staleness == 0,
        "rollout.update is in-flight with trainer.max_staleness=0, where no request runs while "
        "weights change; expected drain, or a trainer.max_staleness of at least 1",
    )
    yield (
        r.unfinished != "carry" and r.oversample == 0,
        f"rollout.unfinished is {r.unfinished} with rollout.oversample=0, where a batch waits "
        "for all of its groups; expected carry, or an oversample above 0",
    )
    yield (
        r.oversample > 0 and r.unfinished == "carry" and (r.update == "drain" or staleness < 2),
        f"rollout.oversample is {r.oversample} with rollout.unfinished=carry, but groups can only "
        "go on with rollout.update=in-flight and a trainer.max_staleness of at least 2; expected "
        "them, or abort or cut",
    )
    yield (
        r.update == "drain" and r.in_flight_cache != "keep",
        "rollout.in_flight_cache is recompute with rollout.update=drain, where no request goes on "
        "after an update; expected keep, or rollout.update=in-flight",
    )


def _about_stop_strings(stop: tuple[str, ...]) -> Iterator[tuple[bool, str]]:
    """Those that can be judged without a tokenizer."""
    yield "" in stop, "rollout.stop holds an empty text; expected texts that end a response"
    for text in stop:
        lone = any("\ud800" <= letter <= "\udfff" for letter in text)
        yield lone, f"rollout.stop: {text!r} holds a lone surrogate, which no response does"


def _about_checkpoints(config: Config) -> Iterator[tuple[bool, str]]:
    c, test_freq = config.checkpoint, config.trainer.test_freq
    if not c.keep_best:
        return
    yield (
        c.keep_last is None or c.best_metric is None,
        f"checkpoint.keep_best is {c.keep_best} without checkpoint.keep_last and "
        "checkpoint.best_metric; expected all three or none",
    )
    measured = bool(config.data.val_files) and test_freq > 0 and c.save_freq % test_freq == 0
    yield (
        not measured or not str(c.best_metric).startswith("eval/"),
        f"checkpoint.best_metric ({c.best_metric}) is not measured at every save; expected an "
        "eval/ metric, data.val_files, and a trainer.test_freq that divides checkpoint.save_freq",
    )


def _about_rewards(r: RewardConfig, max_response_length: int) -> Iterator[tuple[bool, str]]:
    scorers = get_args(Scorer)[1:]
    for pattern, name in r.by_source.items():
        yield (
            name not in scorers,
            f"reward.by_source gives {pattern!r} {name!r}; expected {', '.join(scorers)}",
        )
    for part, weight in r.weights.items():
        key = f"reward.weights.{part}"
        yield part not in REWARD_PARTS, f"{key} is unknown; expected {', '.join(REWARD_PARTS)}"
        yield not math.isfinite(weight), f"{key} is {weight}; expected a finite number"
    uses_custom = "custom" in (r.scorer, *r.by_source.values())
    yield (
        uses_custom and r.custom_function is None,
        "reward.custom_function is not set; expected FILE.py:NAME",
    )
    yield (
        not uses_custom and r.custom_function is not None,
        "reward.custom_function is set, but nothing uses it; expected reward.scorer=custom, or "
        "custom in reward.by_source",
    )
    yield (
        bool(r.weights.get("overlong")) != bool(r.overlong_buffer)
        or r.overlong_buffer > max_response_length,
        f"reward.overlong_buffer is {r.overlong_buffer}; expected from 1 to "
        "rollout.max_response_length with reward.weights.overlong, else 0",
    )
    problem = _not_an_expression(r.format_pattern or "")
    yield bool(problem), f"reward.format_pattern: not a regular expression: {problem}"


def _not_an_expression(pattern: str) -> str:
    """What is wrong with a regular expression; empty: nothing."""
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return ""
