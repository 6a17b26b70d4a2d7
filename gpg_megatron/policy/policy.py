"""The policy of one rank: forward, backward and update through Megatron's own schedule.

TrainBatch -> forward/backward over the micro-batches (schedule.py)
           -> gradients summed over data-parallel ranks -> clip -> Adam -> StepResult
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.utils import get_model_config

from gpg_megatron.algorithm.objective import metrics as objective_metrics
from gpg_megatron.config.sections import Config
from gpg_megatron.host.device import Device
from gpg_megatron.host.products import redirect_bf16_products
from gpg_megatron.policy.attention import flash_takes
from gpg_megatron.policy.balance import Balance
from gpg_megatron.policy.checkpoint import CheckpointWriter, load_all, load_rng, load_weights
from gpg_megatron.policy.model import build_model
from gpg_megatron.policy.names import named_shards
from gpg_megatron.policy.on_cpu import define_missing_names, redirect_megatron_to_cpu
from gpg_megatron.policy.optimizer import (
    adam_norm,
    build_optimizer,
    build_scheduler,
    current_lr,
    scale_step,
)
from gpg_megatron.policy.outputs import (
    OutputFunction,
    logprob_output,
    objective_output,
    reduced,
)
from gpg_megatron.policy.reference import FrozenShards
from gpg_megatron.policy.replay import Replay
from gpg_megatron.policy.residence import Residence
from gpg_megatron.policy.rounding import rounded_elsewhere
from gpg_megatron.policy.row import forward_arguments
from gpg_megatron.policy.schedule import run_schedule
from gpg_megatron.shapes import ModelShape
from gpg_megatron.types import (
    DTYPES,
    Anchors,
    MicroBatch,
    ParallelPosition,
    PolicyPart,
    StepResult,
    TrainBatch,
)

NO_ANCHORS = Anchors()


class Policy:
    """This rank's shard of the model, its optimizer state, and the update."""

    def __init__(self, config: Config, shape: ModelShape, device: Device) -> None:
        """Join the parallel groups and build the model; weights are loaded afterwards.

        The default process group must exist (platform.init_process_group).
        """
        define_missing_names()
        dtype = DTYPES[config.model.dtype]
        if device == "cpu":
            redirect_megatron_to_cpu()
            if dtype == torch.bfloat16:
                redirect_bf16_products()
        p = config.policy
        n_chunks = p.virtual_pipeline_model_parallel_size
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=p.tensor_model_parallel_size,
            pipeline_model_parallel_size=p.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=n_chunks if n_chunks > 1 else None,
            context_parallel_size=p.context_parallel_size,
            expert_model_parallel_size=p.expert_model_parallel_size,
            distributed_timeout_minutes=max(1, p.timeout_s // 60),
            create_gloo_process_groups=device == "cuda",
        )
        model_parallel_cuda_manual_seed(config.trainer.seed)
        self.device = device
        self.position = _position()
        self.version = 0
        if device == "cuda":
            # For heads that flash does not take. cuDNN builds a graph for every new shape.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self._chunks = build_model(
            shape, p, dtype=dtype, device=device, temperature=config.rollout.temperature
        )
        self._models = [chunk.module for chunk in self._chunks]
        modules = [module for model in self._models for module in model.modules()]
        self._balance = Balance(modules, p)
        self._algorithm = config.objective
        for model in self._models:
            model.with_entropy = config.algorithm.entropy_coef > 0.0
        self._reference: FrozenShards | None = None
        replays = config.rollout.router_replay
        self._replay = Replay(self._models, device) if replays else None
        megatron_config = get_model_config(self._chunks[0])
        self._num_experts = shape.num_experts
        multiple = self.position.tp_size if megatron_config.sequence_parallel else 1
        if p.context_parallel_size > 1:
            multiple *= 2 * p.context_parallel_size
        self._row_form: dict[str, Any] = {
            "multiple": multiple,
            "flash": flash_takes(device, dtype, shape.head_dim),
            "kernel": shape.delta.kernel if shape.delta else 0,
            "balance": self._balance.is_kept,
        }
        # The weights hold the global denominator, so nothing divides by a token count again.
        megatron_config.finalize_model_grads_func = _sum_gradients
        self._optimizer = build_optimizer(p, self._chunks, dtype, device)
        self._scheduler = build_scheduler(p, self._optimizer, config.trainer.total_updates)
        self._residence = Residence(self._models, self._optimizer, device)

    def offload(self, parts: Sequence[PolicyPart]) -> None:
        """Move parts to host memory and free them on the device. Gradients are dropped. Shards
        that others hold stay valid, but must not be read."""
        self._residence.offload(parts)

    def load(self, parts: Sequence[PolicyPart]) -> None:
        """Bring offloaded parts back to the device, bit by bit as they were."""
        self._residence.load(parts)

    def named_shards(self) -> dict[str, torch.Tensor]:
        """Every parameter shard and router's bias of this rank under its global name (layer and
        expert numbers of the whole model). The tensors alias the model's: writing to them changes
        it, after which `weights_loaded` must be called."""
        return named_shards(self._models, self._num_experts)

    def weights_loaded(self) -> None:
        """Refresh the optimizer's fp32 master weights after named_shards were written."""
        self._optimizer.reload_model_params()

    def load_weights(self, directory: Path) -> None:
        """Take the parameters of a Megatron checkpoint, written under any layout. Collective."""
        load_weights(self._models, directory)
        self.weights_loaded()

    def resume(self, directory: Path, *, version: int, same_ranks: bool) -> None:
        """Go on where a saved policy stood. Collective.

        Args:
            version: optimizer steps that it had done.
            same_ranks: the checkpoint was written under this very layout, so that each rank can
                also continue its random states.
        """
        load_all(self._models, self._optimizer, directory, n_steps=version)
        if same_ranks:
            load_rng(directory)
        # The schedule is a function of the step; its settings are those of this configuration.
        self._scheduler.num_steps = 0
        self._scheduler.step(increment=version)
        self.version = version

    def save(self, directory: Path, writer: CheckpointWriter, finish: Callable[[], None]) -> None:
        """Begin to save everything that resume needs; see CheckpointWriter.save. Collective.
        When it returns, parameters and optimizer may change or be offloaded."""
        self._residence.require("parameters", "optimizer")
        writer.save(self._models, self._optimizer, directory, finish)

    def keep_reference(self) -> None:
        """Keep the present weights as the reference of the KL term, on the CPU."""
        self._reference = FrozenShards(self.named_shards())

    def learn(self, batches: Sequence[TrainBatch]) -> list[StepResult]:
        """The optimizer steps of one rollout batch, in order; see train. Collective. The first that
        is held back is the last that is computed."""
        results: list[StepResult] = []
        for batch, anchors in zip(batches, self.anchors(batches), strict=True):
            held = bool(results) and results[-1].is_held
            results.append(self._held({}) if held else self.train(batch, anchors))
        return results

    def anchors(self, batches: Sequence[TrainBatch]) -> list[Anchors]:
        """The log-probs that the updates of one rollout batch are held against; to be called
        before the first of them. Nothing is computed that the objective does not read: the
        first update's own log-probs are those of the policy before it."""
        old: list[tuple[torch.Tensor, ...]] = [()] * len(batches)
        reference = list(old)
        if self._algorithm.needs_old_policy:
            old[1:] = [self._fixed(batch) for batch in batches[1:]]
        if self._algorithm.kl_coef:
            assert self._reference is not None, "keep_reference was not called"
            with self._reference.in_place_of(self.named_shards()):
                reference = [self._fixed(batch) for batch in batches]
        return [Anchors(old=o, reference=r) for o, r in zip(old, reference, strict=True)]

    def _fixed(self, batch: TrainBatch) -> tuple[torch.Tensor, ...]:
        return tuple(self.logprobs(batch.micro_batches)) if batch.micro_batches else ()

    def train(self, batch: TrainBatch, anchors: Anchors = NO_ANCHORS) -> StepResult:
        """One optimizer step. Without a sample that has a gradient, with a loss or gradient that
        is not finite, or beyond target_kl nothing changes.

        Args:
            anchors: those of the batch, from `anchors`; GPG without a KL term needs none.
        """
        self._residence.require("parameters", "gradients", "optimizer")
        if not batch.micro_batches:
            return self._result(updated=False, loss=0.0, grad_norm=0.0, metrics={})
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        self._balance.begin(batch.n_loss_tokens)
        outputs = self._run(
            batch.micro_batches,
            partial(objective_output, self._algorithm),
            anchors=anchors,
            forward_only=False,
        )
        statistics = reduced(outputs)
        loss, metrics = statistics["loss"], objective_metrics(statistics, self._algorithm)
        if self._replay is not None:
            metrics = {**metrics, **self._replay.metrics(batch.unrouted)}
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        result = self._result(updated=True, loss=loss, grad_norm=grad_norm, metrics=metrics)
        if result.is_bad:
            return replace(result, updated=False)
        a = self._algorithm
        if a.target_kl and metrics["mismatch/kl_k3"] > a.target_kl:
            return self._held(metrics)
        metrics = metrics | self._alpha_effective(batch.whole_alpha)
        by_alpha = batch.whole_alpha if a.alpha_apply == "step" else 1.0
        scale_step(self._optimizer, by_alpha * (metrics["correction/ess"] if a.ess_lr else 1.0))
        lr = current_lr(self._optimizer)
        self._optimizer.step()
        self._balance.end()
        self._scheduler.step(increment=1)
        self.version += 1
        return replace(result, version=self.version, lr=lr, metrics=metrics)

    def _alpha_effective(self, alpha: float) -> dict[str, float]:
        """What alpha makes of the length of the update that is about to be made, where that is to
        be measured. Collective."""
        every = self._algorithm.alpha_effective_freq
        if not every or self.version % every:
            return {}
        if self._algorithm.alpha_apply == "loss":
            lengths = [
                adam_norm(self._optimizer, factor, n_steps=self.version)
                for factor in (1.0, 1.0 / alpha)
            ]
            alpha = lengths[0] / lengths[1]
        return {"group/alpha_effective": alpha}

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Log-probabilities of the response tokens, fp32 [number of masked-in positions] per
        micro-batch, at the sampling temperature. The same on every pipeline stage."""
        self._residence.require("parameters")
        outputs = self._run(micro_batches, logprob_output, anchors=NO_ANCHORS, forward_only=True)
        box: list[list[torch.Tensor] | None] = [[x.cpu() for x in outputs] if outputs else None]
        dist.broadcast_object_list(
            box,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        assert box[0] is not None
        return box[0]

    def rounded_logprobs(
        self, micro_batches: Sequence[MicroBatch], dtype: torch.dtype, seed: int
    ) -> list[torch.Tensor]:
        """Those of `logprobs`, as a program that rounds to a type elsewhere could have them."""
        with rounded_elsewhere([model.decoder for model in self._models], dtype, seed):
            return self.logprobs(micro_batches)

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        output: OutputFunction,
        *,
        anchors: Anchors,
        forward_only: bool,
    ) -> list[Any]:
        return run_schedule(
            self._chunks,
            micro_batches,
            output,
            arguments=partial(forward_arguments, device=self.device, **self._row_form),
            anchors=anchors,
            forward_only=forward_only,
        )

    def _held(self, metrics: Mapping[str, float]) -> StepResult:
        result = self._result(updated=False, loss=0.0, grad_norm=0.0, metrics=metrics)
        return replace(result, is_held=True)

    def _result(
        self, *, updated: bool, loss: float, grad_norm: float, metrics: Mapping[str, float]
    ) -> StepResult:
        return StepResult(
            version=self.version,
            updated=updated,
            loss=loss,
            grad_norm=grad_norm,
            lr=current_lr(self._optimizer),
            metrics=metrics,
        )


def _sum_gradients(model: list[torch.nn.Module], num_tokens: object, **kwargs: object) -> None:
    """Megatron's gradient reduction without its division by a token count."""
    finalize_model_grads(model, None, **kwargs)


def _position() -> ParallelPosition:
    return ParallelPosition(
        rank=dist.get_rank(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )
