"""The configuration: typed sections, loaded with OmegaConf, validated in one place.

This is the only file that knows OmegaConf. Everything else receives the frozen dataclasses.
A key that nothing reads does not exist here; each has one spelling.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from gpg_megatron.algorithm_config import PRESETS
from gpg_megatron.algorithm_config import AlgorithmConfig as AlgorithmConfig
from gpg_megatron.config_rules import validate
from gpg_megatron.errors import UserError

# OmegaConf resolves annotations at run time, so optional fields are spelled Optional[...].


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which problems are trained on and how they become token ids."""

    train_files: tuple[str, ...] = ()
    """Parquet or jsonl files in the row schema of docs/data.md."""
    val_files: tuple[str, ...] = ()
    """Held-out files of the same schema; empty: no evaluation."""
    train_weights: tuple[float, ...] = ()
    """Share of each training file among the prompts that are drawn, in any unit; empty: all
    files are one list, and an epoch holds every prompt once."""
    custom_class: Optional[str] = None
    """FILE.py:CLASS; CLASS(file) yields the rows of each data file. None: parquet and jsonl."""
    system_prompt: Optional[str] = None
    """System message of every row that has none of its own."""
    apply_chat_template: bool = True
    """False: the contents of the messages are joined as they are and tokenised without
    special tokens (base models, completion-style prompts)."""
    max_prompt_length: int = 1024
    """Tokens."""
    overlong_prompts: Literal["error", "filter"] = "error"
    """What happens to a prompt of more than max_prompt_length tokens."""
    shuffle: bool = True
    val_max_rows: Optional[int] = None
    """Evaluate on the first N rows only; None: all."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is trained."""

    path: str = ""
    """A Hugging Face directory: config.json, safetensors, tokenizer files."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Compute and parameter type of the policy; master weights are always fp32."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The Megatron ranks: parallel layout, optimizer, micro-batches."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    """Ranks that share the tokens of each packed row, for long responses."""
    data_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    """Data-parallel ranks that share the experts of each layer; 1 for models without experts."""
    num_layers_in_first_pipeline_stage: Optional[int] = None
    num_layers_in_last_pipeline_stage: Optional[int] = None
    sequence_parallel: bool = False
    """Tensor-parallel ranks share out the tokens in norms and residuals, where each would hold
    all of them. Models with experts do it always."""
    use_distributed_optimizer: bool = False
    """Data-parallel ranks share out the optimizer's state, and sum gradients by reduce-scatter."""
    overlap_grad_reduce: bool = False
    """Gradients are summed over data-parallel ranks in buckets, while the backward pass of the
    last micro-batch goes on."""
    recompute: Literal["none", "attention", "layers"] = "none"
    """What the backward pass computes again instead of keeping it: nothing, the attention of each
    layer, or whole layers."""
    max_tokens_per_micro_batch: int = 16384
    """Token budget of one packed micro-batch; a single longer sequence goes alone."""
    share_prompts: bool = True
    """The prompt of samples of one group is computed once per micro-batch. Transformer Engine's
    attention cannot do it: there the key changes nothing."""
    logits_chunk_mb: int = 256
    """Limit of the logits that each rank holds at once, MiB; log-probs are computed by chunks
    of as many tokens as fit, and computed again in the backward pass."""
    lr: float = 1e-6
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = 0
    min_lr: float = 0.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Global gradient-norm limit; 0 turns clipping off."""
    timeout_s: int = 1800
    """Limit of every collective among the policy ranks, in seconds."""
    num_threads: Optional[int] = None
    """CPU threads of each rank; None: the machine's cores shared among its ranks."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The vLLM engines and how they sample."""

    n: int = 8
    """G, samples per prompt. A group of one carries no gradient, except where nothing is compared
    with it (algorithm.dead_by: none)."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1: all tokens."""
    max_response_length: int = 1024
    """Tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a response. The stop string stays part of the response."""
    num_engines: int = 1
    tensor_model_parallel_size: int = 1
    """Of each engine; independent of the policy's."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    gpu_memory_utilization: float = 0.6
    """Share of each GPU that an engine may reserve. Not used on CPU."""
    kv_cache_gb: float = 1.0
    """Key-value cache of each worker of an engine on CPU, GiB."""
    max_num_seqs: int = 256
    """Sequences that an engine decodes at once."""
    enforce_eager: bool = False
    """True: no compilation and no graph capture; starts faster."""
    startup_timeout_s: int = 600
    generate_timeout_s: int = 3600
    """Limit of one rollout batch, in seconds."""
    ray_address: Optional[str] = None
    """None: a private Ray inside rank 0; otherwise the address of a cluster to join."""

    @property
    def truncates(self) -> bool:
        """Whether top_p or top_k cut the distribution that is sampled."""
        return self.top_p < 1.0 or self.top_k != -1


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Moving the policy's weights into the engines."""

    transport: Literal["shm", "gloo", "nccl", "cuda_ipc"] = "shm"
    """shm: policy ranks and engines share a host; gloo: any hosts, through host memory; nccl:
    any hosts, between GPUs; cuda_ipc: rank and engine share a GPU."""
    bucket_mb: int = 16
    """Bytes moved per message, MiB; each sender and each receiver holds two."""
    verify: Literal["never", "first", "always"] = "first"
    """Which publishes are read back from the engines' parameters and compared by checksum."""
    timeout_s: int = 300
    """Limit of every wait between a policy rank and an engine worker, in seconds."""
    canary_tolerance: Optional[float] = None
    """Largest accepted |log-prob difference| between engine and policy: on the canary prompts
    after the first sync, and, when both sides are fp32, in every step's rollouts.
    None: 1e-4 when both sides are fp32, else 0.25."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Scoring of completions."""

    scorer: Literal[
        "auto",
        "exact_match",
        "gsm8k",
        "math",
        "math_verify",
        "verl_gsm8k",
        "verl_math",
        "custom",
    ] = "auto"
    """auto: chosen by each row's data_source."""
    by_source: dict[str, str] = field(default_factory=dict)
    """data_source pattern (shell style) -> scorer; the first that fits comes before `scorer`."""
    custom_function: Optional[str] = None
    """FILE.py:NAME of the scorer called custom."""
    weights: dict[str, float] = field(default_factory=lambda: {"answer": 1.0})
    """What the score is the sum of: answer (the scorer's score), format, overlong, length."""
    format_pattern: Optional[str] = None
    """Regular expression that a response with a right format contains; None: the scorer's own
    notion of format."""
    overlong_buffer: int = 0
    """Tokens before rollout.max_response_length over which the part overlong falls from 0 to -1."""
    num_workers: int = 1
    """Scoring processes."""
    timeout_s: float = 10.0
    """Limit for one answer."""
    timeout_score: float = 0.0
    """Score of an answer that takes too long or too much memory, or crashes its scorer."""
    memory_limit_mb: Optional[int] = 2048
    """Private memory of each scoring process, MiB; None: no limit."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The loop."""

    total_training_steps: int = 100
    """Rollout batches to train on."""
    train_batch_size: int = 64
    """Prompts per rollout batch."""
    mini_batch_size: Optional[int] = None
    """Prompts per optimizer step; None: the whole rollout batch."""
    max_staleness: int = 0
    """1: the engines draw the next rollout batch while the policy learns from this one, so that
    every batch is one step old; 0: they take turns."""
    max_bad_steps: int = 3
    """So many optimizer steps in a row with a loss or gradient that is not finite end the run;
    each of them is skipped."""
    seed: int = 1
    output_dir: str = "runs/default"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    placement: Literal["colocated", "disaggregated"] = "disaggregated"
    """colocated: policy ranks and engines share GPUs and hand their memory to each other;
    disaggregated: each has GPUs of its own, and on CPU nothing is moved."""
    val_before_train: bool = True
    test_freq: int = 0
    """Evaluate every N steps; 0: only before the first and after the last step."""
    val_n: int = 1
    """Samples per held-out prompt."""
    val_temperature: float = 1.0
    """0: the most likely token."""
    val_top_p: float = 1.0
    val_top_k: int = -1
    """-1: all tokens."""
    val_save_generations: bool = True
    """Write the held-out answers of every evaluation to eval/step_N.jsonl."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a run saves and where it goes on. docs/checkpoints.md has the formats."""

    save_freq: int = 0
    """Save every N steps, and after the last one; 0: never."""
    async_save: bool = True
    """Training goes on while a checkpoint is written."""
    keep_last: Optional[int] = None
    """How many of the newest checkpoints stay; None: all."""
    keep_best: int = 0
    """How many more stay for the highest best_metric. Needs keep_last and best_metric."""
    best_metric: Optional[str] = None
    """An evaluation metric by its name in metrics.jsonl, for example eval/gsm8k/mean@1."""
    resume: str = "auto"
    """auto: the newest complete checkpoint of output_dir, if there is one; never; or the path of
    a checkpoint."""
    hf_export: Literal["never", "last", "every"] = "never"
    """Which saved checkpoints are also written as Hugging Face directories, to output_dir/hf."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where metrics go, besides metrics.jsonl."""

    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "gpg_megatron"
    rollout_samples: int = 16
    """Completions of each step that are written to rollouts/step_N.jsonl; 0: none."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All sections."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def world_size(self) -> int:
        """Policy ranks: TP * CP * PP * DP."""
        p = self.policy
        model_parallel = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
        return model_parallel * p.context_parallel_size * p.data_parallel_size

    @property
    def mismatch_tolerance(self) -> float:
        """Largest accepted |engine log-prob - policy log-prob| after a sync."""
        if self.bridge.canary_tolerance is not None:
            return self.bridge.canary_tolerance
        return 1e-4 if self.model.dtype == self.rollout.dtype == "fp32" else 0.25

    @property
    def total_updates(self) -> int:
        """Optimizer steps of the whole run, when no step is skipped."""
        return self.trainer.total_training_steps * self.updates_per_batch

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps for each rollout batch."""
        return self.trainer.train_batch_size // self.prompts_per_update

    @property
    def checkpoint_root(self) -> Path:
        """Where checkpoints of this run are."""
        return Path(self.trainer.output_dir) / "checkpoints"

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is saved after a step."""
        c, last = self.checkpoint, self.trainer.total_training_steps
        if c.save_freq and step % c.save_freq == 0:
            return True
        return step == last and (c.save_freq > 0 or c.hf_export != "never")

    @property
    def prompts_per_update(self) -> int:
        """Prompts per optimizer step."""
        return self.trainer.mini_batch_size or self.trainer.train_batch_size


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply "a.b=value" overrides, check types and cross-field rules.

    Raises:
        UserError: missing or malformed file, unknown key (the nearest known one is named),
            wrong type, or values that do not fit together.
    """
    layers = {str(path): _read(path), "command line": _parse(overrides)}
    defaults = OmegaConf.structured(Config)
    merged = _merge(defaults, layers)
    try:
        # The preset lies below whatever the user sets, wherever the user names it.
        preset = OmegaConf.create({"algorithm": dict(PRESETS[merged.algorithm.preset])})
        config = OmegaConf.to_object(_merge(OmegaConf.merge(defaults, preset), layers))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_one_line(error)}") from None
    assert isinstance(config, Config)
    validate(config)
    return config


def _merge(defaults: Any, layers: Mapping[str, DictConfig]) -> Any:
    """The layers, the last one on top; where a layer comes from -> the layer."""
    merged = defaults
    for where, layer in layers.items():
        try:
            merged = OmegaConf.merge(merged, layer)
        except ConfigKeyError as error:
            raise UserError(f"{where}: {_unknown(str(error.full_key))}") from None
        except (OmegaConfBaseException, TypeError) as error:
            raise UserError(f"{where}: {_one_line(error)}") from None
    return merged


def config_yaml(config: Config) -> str:
    """The resolved configuration as YAML; load_config reads it back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def _read(path: str | Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"config file not found: {path}") from None
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable YAML file: {_one_line(error)}") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{path}: is a list; expected sections, for example policy: {{lr: 1e-6}}")
    return content


def _parse(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if not re.match(r"\w+\.\w+=", item):
            raise UserError(f"override {item!r}: expected a.b=value, for example policy.lr=1e-6")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"override: not a YAML value: {_one_line(error)}") from None


def _unknown(key: str) -> str:
    """ "unknown key ...", with the nearest known key or, failing that, all keys of its section."""
    section, _, name = key.partition(".")
    types = {f.name: type(getattr(Config(), f.name)) for f in dataclasses.fields(Config)}
    known = [f.name for f in dataclasses.fields(types[section])] if name else list(types)
    near = difflib.get_close_matches(name or section, known, n=1)
    prefix = f"{section}." if name else ""
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
    return f"unknown key {key}; {hint}"


def _one_line(error: Exception) -> str:
    """The message with the full key, without OmegaConf's lines of type bookkeeping."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((x.removeprefix("full_key: ") for x in lines if x.startswith("full_key: ")), "")
    return f"{key}: {lines[0]}" if key else lines[0]
