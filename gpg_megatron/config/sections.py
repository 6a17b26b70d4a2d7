"""The sections of the configuration: frozen dataclasses, one for each.

A key that nothing reads does not exist here; each has one spelling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.config.bridge import BridgeConfig
from gpg_megatron.config.off_policy import Sampled, settled
from gpg_megatron.config.paths import file_path
from gpg_megatron.config.ranges import ranged
from gpg_megatron.config.reward import RewardConfig

MIB, GIB = 2**20, 2**30
"""What keys that end in _mb and _gb are counted in, in bytes."""
MOST_SAMPLES = 16384
"""vLLM takes no request of more. Of a temperature below 0.01 it would make 0.01."""

# OmegaConf resolves annotations at run time, so optional fields are spelled Optional[...].


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which problems are trained on and how they become token ids."""

    train_files: tuple[str, ...] = file_path(())
    """Parquet or jsonl files in the row schema of docs/data.md."""
    val_files: tuple[str, ...] = file_path(())
    """Held-out files of the same schema; empty: no evaluation."""
    train_weights: tuple[float, ...] = ()
    """Share of each training file among the prompts that are drawn, in any unit; empty: all
    files are one list, and an epoch holds every prompt once."""
    custom_class: Optional[str] = file_path(None)
    """FILE.py:CLASS; CLASS(file) yields the rows of each data file. None: parquet and jsonl."""
    system_prompt: Optional[str] = None
    """System message of every row that has none of its own."""
    apply_chat_template: bool = True
    """False: the contents of the messages are joined, and tokenised without special tokens."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments that the chat template reads, such as enable_thinking."""
    max_prompt_length: int = ranged(1024, at_least=1)
    """Tokens."""
    overlong_prompts: Literal["error", "filter"] = "error"
    """What happens to a prompt of more than max_prompt_length tokens."""
    shuffle: bool = True
    curriculum: Literal["none", "thompson", "pools"] = "none"
    """Which prompts come more often: none; those whose groups are likely to be live, by a draw from
    what is known of each; those not at rest, as always-right and always-wrong ones are."""
    val_max_rows: Optional[int] = ranged(None, at_least=1)
    """Evaluate on the first N rows only; None: all."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is trained."""

    path: str = file_path("")
    """A Hugging Face directory (config.json, safetensors, tokenizer files), or the ORG/NAME of a
    model of the Hugging Face Hub, which is fetched into the local cache when it is not there."""
    revision: Optional[str] = None
    """Branch, tag or commit of a model of the Hub; None: its main branch. The config.yaml of a run
    has the commit."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Compute and parameter type of the policy; master weights are always fp32."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The Megatron ranks: parallel layout, optimizer, micro-batches."""

    tensor_model_parallel_size: int = ranged(1, at_least=1)
    pipeline_model_parallel_size: int = ranged(1, at_least=1)
    virtual_pipeline_model_parallel_size: int = ranged(1, at_least=1)
    """Runs of layers that each pipeline stage holds; with more than one the stages are
    interleaved."""
    context_parallel_size: int = ranged(1, at_least=1)
    """Ranks that share the tokens of each packed row, for long responses."""
    data_parallel_size: int = ranged(1, at_least=1)
    expert_model_parallel_size: int = ranged(1, at_least=1)
    """Data-parallel ranks that share the experts of each layer; 1 for models without experts."""
    num_layers_in_first_pipeline_stage: Optional[int] = ranged(None, at_least=1)
    num_layers_in_last_pipeline_stage: Optional[int] = ranged(None, at_least=1)
    sequence_parallel: bool = False
    """Tensor-parallel ranks share out the tokens in norms and residuals, where each would hold
    all of them. Models with experts do it always."""
    use_distributed_optimizer: bool = False
    """Data-parallel ranks share out the optimizer's state, and sum gradients by reduce-scatter."""
    overlap_grad_reduce: bool = False
    """Gradients are summed over data-parallel ranks in buckets, while the backward pass of the
    last micro-batch goes on."""
    recompute: Literal["auto", "none", "attention", "layers"] = "auto"
    """What the backward pass computes again instead of keeping it: nothing, the attention of each
    layer, or whole layers. auto: layers where the dry run says that nothing would not fit."""
    moe_aux_loss_coeff: float = ranged(0.0, at_least=0)
    """Of a loss that is 1 where the experts of each layer have the same load in every response, and
    greater elsewhere."""
    moe_router_bias_update_rate: float = ranged(0.0, at_least=0)
    """After each update the bias of an expert with less than the mean load rises so much, that of
    one with more falls (DeepSeek-V3)."""
    max_tokens_per_micro_batch: Optional[int] = ranged(None, at_least=1)
    """Token budget of one packed micro-batch; a single longer sequence goes alone. None: 16,384,
    on a CPU 768."""
    share_prompts: bool = True
    """The prompt of samples of one group is computed once per micro-batch."""
    logits_chunk_mb: int = ranged(256, at_least=1)
    """Limit of the logits that each rank holds at once, MiB; log-probs are computed by chunks
    of as many tokens as fit, all but one of them again in the backward pass."""
    lr: float = ranged(1e-6, above=0)
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = ranged(0, at_least=0)
    min_lr: float = ranged(0.0, at_least=0)
    weight_decay: float = ranged(0.0, at_least=0)
    adam_beta1: float = ranged(0.9, at_least=0, below=1)
    adam_beta2: float = ranged(0.999, at_least=0, below=1)
    adam_eps: float = ranged(1e-8, above=0)
    clip_grad: float = ranged(1.0, at_least=0)
    """Global gradient-norm limit; 0 turns clipping off."""
    timeout_s: int = ranged(1800, at_least=1)
    """Limit of every collective among the policy ranks, and of a rank without a sign of life, in
    seconds."""
    num_threads: Optional[int] = ranged(None, at_least=1)
    """CPU threads of each rank; None: the machine's cores shared among its ranks."""

    @property
    def row_tokens(self) -> int:
        """max_tokens_per_micro_batch, where the default has been decided already."""
        assert self.max_tokens_per_micro_batch is not None
        return self.max_tokens_per_micro_batch

    @property
    def world_size(self) -> int:
        """Ranks: TP * CP * PP * DP."""
        model_parallel = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return model_parallel * self.context_parallel_size * self.data_parallel_size


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The vLLM engines and how they sample."""

    n: int = ranged(8, at_least=1, at_most=MOST_SAMPLES)
    """G, samples per prompt. A group of one has no gradient, but with algorithm.dead_by: none."""
    temperature: float = ranged(1.0, at_least=0.01, at_most=2)
    top_p: float = ranged(1.0, above=0, at_most=1)
    top_k: int = ranged(-1, at_least=1, or_value=-1)
    """-1: all tokens."""
    max_response_length: int = ranged(1024, at_least=1)
    """Tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a response. The stop string stays part of the response; that of a special
    token stays among its tokens only."""
    num_engines: int = ranged(1, at_least=1)
    tensor_model_parallel_size: int = ranged(1, at_least=1)
    """Of each engine; independent of the policy's."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    gpu_memory_utilization: float = ranged(0.6, above=0, at_most=1)
    """Share of each GPU that an engine may reserve. Not used on CPU."""
    kv_cache_gb: float = ranged(1.0, above=0)
    """Key-value cache of each worker of an engine on CPU, GiB."""
    max_num_seqs: Optional[int] = ranged(None, at_least=1)
    """Sequences that an engine decodes at once; None: 256, on a GPU up to 1,024 if they fit."""
    max_num_batched_tokens: Optional[int] = ranged(None, at_least=1)
    """Prompt and decode tokens of one engine step; None: a share of the cache."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """More of vLLM's engine arguments, handed to it as they are."""
    enforce_eager: bool = False
    """True: no compilation and no graph capture; starts faster."""
    min_engines: int = ranged(1, at_least=1)
    """With fewer, because others were lost, the run waits until they are replaced."""
    max_losses_per_hour: int = ranged(6, at_least=0)
    """So many engines that are lost in any hour are replaced; the next one ends the run."""
    stall_timeout_s: int = ranged(180, at_least=1)
    """An engine that answers nothing for so long, not even that it lives, is ended and replaced."""
    startup_timeout_s: int = ranged(600, at_least=1)
    generate_timeout_s: int = ranged(3600, at_least=1)
    """Limit of one group, or of one batch of held-out prompts, in seconds."""
    update: Literal["drain", "in-flight"] = "drain"
    """What new weights do with running requests: wait for their end, or change under them."""
    in_flight_cache: Literal["keep", "recompute"] = "keep"
    """What older weights computed for a request that goes on."""
    oversample: float = ranged(0.0, at_least=0, below=1)
    """Share of a batch whose slowest groups it does not wait for."""
    unfinished: Literal["carry", "abort", "cut"] = "carry"
    """Those come into a later batch; or are drawn again; or end as they are, in the batch."""
    router_replay: bool = False
    """The policy sends each token to the experts to which the engine sent it."""
    ray_address: Optional[str] = None
    """None: a private Ray inside rank 0; otherwise the address of a cluster to join."""

    @property
    def truncates(self) -> bool:
        """Whether top_p or top_k cut the distribution that is sampled."""
        return self.top_p < 1.0 or self.top_k != -1


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The loop."""

    total_training_steps: int = ranged(100, at_least=1)
    """Rollout batches to train on."""
    train_batch_size: int = ranged(64, at_least=1)
    """Prompts per rollout batch."""
    mini_batch_size: Optional[int] = ranged(None, at_least=1)
    """Prompts per optimizer step; None: the whole rollout batch."""
    max_staleness: int = ranged(0, at_least=0)
    """Rollout batches that weights learned from since they sampled; 0: they take turns."""
    max_bad_steps: int = ranged(3, at_least=1)
    """So many optimizer steps in a row with a loss or gradient that is not finite end the run;
    each of them is skipped."""
    max_hours: Optional[float] = ranged(None, above=0)
    """A run that takes longer leaves in order after the step in hand; None: no limit."""
    max_restarts: int = ranged(0, at_least=0)
    """How often a run in which something died is started again from its newest checkpoint."""
    max_restarts_per_hour: int = ranged(3, at_least=1)
    """Of any hour."""
    grace_s: int = ranged(240, at_least=1)
    """Seconds that a run has to leave in order after it was asked by a signal."""
    stop_on: dict[str, float] = field(default_factory=dict)
    """Limits beyond which a run has collapsed and ends: the least entropy and accuracy of the
    answers, the most kl to what sampled them."""
    seed: int = ranged(1, at_least=0, below=2**63)
    output_dir: str = file_path("runs/default")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    placement: Literal["colocated", "disaggregated"] = "disaggregated"
    """colocated: ranks and engines share GPUs, and hand their memory to each other."""
    test_freq: int = ranged(0, at_least=0)
    """Evaluate every N steps; 0: only before the first and after the last step."""
    profile_steps: tuple[int, ...] = ()
    """Steps of which torch's profiler writes a trace."""
    profile_ranks: tuple[int, ...] = (0,)
    """Policy ranks that write one, each for itself."""

    @property
    def prompts_per_update(self) -> int:
        """Prompts per optimizer step."""
        return self.mini_batch_size or self.train_batch_size

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps for each rollout batch."""
        return self.train_batch_size // self.prompts_per_update

    @property
    def total_updates(self) -> int:
        """Optimizer steps of the whole run, when no step is skipped."""
        return self.total_training_steps * self.updates_per_batch

    @property
    def checkpoint_root(self) -> Path:
        """Where checkpoints of this run are."""
        return Path(self.output_dir) / "checkpoints"


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """How the held-out prompts are answered."""

    before_train: bool = True
    """Evaluate before the first step, too."""
    n: int = ranged(1, at_least=1, at_most=MOST_SAMPLES)
    """Samples per held-out prompt."""
    temperature: float = ranged(1.0, at_least=0.01, at_most=2, or_value=0)
    """0: the most likely token."""
    top_p: float = ranged(1.0, above=0, at_most=1)
    top_k: int = ranged(-1, at_least=1, or_value=-1)
    """-1: all tokens."""
    alone: bool = False
    """No rollout runs meanwhile where engines draw ahead; False: both share the engines."""
    save_generations: bool = True
    """Write the held-out answers of every evaluation to eval/step_N.jsonl."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a run saves and where it goes on. docs/checkpoints.md has the formats."""

    save_freq: int = ranged(0, at_least=0)
    """Save every N steps, and after the last one; 0: never."""
    async_save: bool = True
    """Training goes on while a checkpoint is written."""
    keep_last: Optional[int] = ranged(None, at_least=1)
    """How many of the newest checkpoints stay; None: all."""
    keep_best: int = ranged(0, at_least=0)
    """How many more stay for the highest best_metric. Needs keep_last and best_metric."""
    best_metric: Optional[str] = None
    """An evaluation metric by its name in metrics.jsonl, for example eval/gsm8k/mean@1."""
    resume: str = file_path("auto")
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
    rollout_samples: int = ranged(16, at_least=0)
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
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def sampled(self) -> Sampled:
        """How far the policy may be from what sampled its answers."""
        return Sampled(
            n_updates=self.trainer.updates_per_batch,
            stale=self.trainer.max_staleness > 0,
            carried=self.algorithm.wanted_fraction > 0,
            truncated=self.rollout.truncates,
            other_type=self.rollout.dtype != self.model.dtype,
        )

    @property
    def objective(self) -> AlgorithmConfig:
        """The section algorithm as the loss takes it: nothing is left to auto."""
        return settled(self.algorithm, self.sampled)
