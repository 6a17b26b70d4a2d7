"""The loop. Every policy rank runs it; rank 0 also drives the engines (conductor.py).

prompts -> rollout -> reward -> advantage -> batch -> policy step -> bridge -> rollout
'------- rank 0, broadcast -----'  '------------ every rank ------------'
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from gpg_megatron.algorithm.advantages import AdvantageStats, assign_advantages
from gpg_megatron.batching.updates import left_out, make_batches, pack, split_updates
from gpg_megatron.bridge.bridge import WeightBridge
from gpg_megatron.bridge.protocol import BACKEND, RECEIVER
from gpg_megatron.checkpoint.marker import read_marker
from gpg_megatron.checkpoint.resume import ResumePoint, find_resume_point
from gpg_megatron.config.sections import Config
from gpg_megatron.host.collectives import on_rank0
from gpg_megatron.host.device import Device, has_transformer_engine, peak_flops_per_s
from gpg_megatron.host.reaper import scratch_directory
from gpg_megatron.layout.hf_io import load_hf
from gpg_megatron.layout.topology import policy_grid
from gpg_megatron.loop.agreement import canary_sample, check_canary, check_mismatch
from gpg_megatron.loop.checkpoints import (
    RunCheckpoints,
    check_bytes,
    layout_of,
    read_trainer_state,
)
from gpg_megatron.loop.guard import BadSteps, TooManyBadSteps
from gpg_megatron.loop.handover import Handover
from gpg_megatron.loop.inputs import is_converted, load_inputs, model_files
from gpg_megatron.loop.rank0 import Conductor
from gpg_megatron.loop.rollouts import Rollout
from gpg_megatron.loop.step_metrics import step_metrics, throughput
from gpg_megatron.model.flops import token_costs
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.placement.devices import engine_devices, visible_devices
from gpg_megatron.placement.states import Placement, State
from gpg_megatron.policy.policy import DTYPES, Policy
from gpg_megatron.rollout.engine import EngineSpec
from gpg_megatron.rollout.fleet import Fleet
from gpg_megatron.types import (
    ModelShape,
    StepResult,
    TrainBatch,
    TrainSample,
)

T = TypeVar("T")
WATCHDOG_LIMIT_S = 300.0
CPU_WARNING = (
    "warning: trainer.placement=colocated saves no memory on CPU: vLLM's workers cannot sleep there"
)


class Trainer:
    """One rank's view of a run. Use as a context manager, so that engines end with it."""

    def __init__(self, config: Config, shape: ModelShape, device: Device, run_id: str) -> None:
        """Collective. Engines start while the policy is built."""
        self.config = config
        self.watchdog = Watchdog(rank=dist.get_rank(), limit_s=WATCHDOG_LIMIT_S)
        limit = timedelta(seconds=_rank0_limit_s(config))
        self._costs = token_costs(shape)
        # Before the engines start: they would take the cores that are measured.
        self._peak_flops_per_s = _peak_flops_per_s(device, DTYPES[config.model.dtype])
        self._waiting = dist.new_group(timeout=limit, backend="gloo")
        self.fleet: Fleet | None = None
        self.conductor: Conductor | None = None
        self.bridge: WeightBridge | None = None
        self._warned = False
        self._bad_steps = BadSteps(config.trainer.max_bad_steps)
        begin = time.perf_counter()
        with ExitStack() as undo:
            undo.callback(self.close)
            self._on_rank0(lambda: self._start_engines(device, run_id))
            self._placement = Placement(config.trainer.placement, self._handover())
            self._placement.enter(State.POLICY)
            self.policy = Policy(config, shape, device)
            self.parallel = self.policy.position
            self.checkpoints = RunCheckpoints(config, shape, self._on_rank0)
            self._resume_point = self._on_rank0(lambda: self._find_resume_point(shape))
            self._load_weights(shape)
            self._open_conductor()
            self._say(f"policy and engines ready in {time.perf_counter() - begin:.0f} s")
            self._placement.enter(State.SYNC)
            self.bridge = WeightBridge(
                shards=self.policy.named_shards(),
                model=shape,
                grid=policy_grid(config.policy, shape, transformer_engine=has_transformer_engine()),
                rank=self.parallel.rank,
                run_id=run_id,
                config=config.bridge,
                wire_dtype=DTYPES[config.rollout.dtype],
                engines=self.fleet,
                group=self._waiting,
            )
            undo.pop_all()

    def run(self) -> None:
        """Train to the end."""
        self._publish()
        self._check_canary()
        done = self._resume_point.marker.step if self._resume_point else 0
        if self.config.validation.before_train and not done:
            self._evaluate(0)
        for step in range(done + 1, self.config.trainer.total_training_steps + 1):
            begin = time.perf_counter()
            self._placement.enter(State.ROLLOUT)
            rollout = self._collect(step)
            samples, stats = assign_advantages(rollout.groups, self.config.algorithm)
            self._warn_of_shaped_scores(step, stats)
            batches = self._batches(rollout, samples)
            before = self.policy.version
            self._placement.enter(State.POLICY)
            with self.watchdog.phase("policy"):
                anchors = self.policy.anchors(batches)
                results = [self.policy.train(b, a) for b, a in zip(batches, anchors, strict=True)]
            self._check_finite(step, samples, results)
            self._wait_for_engines()
            if all(sample.version == before for sample in samples):
                check_mismatch(self.config, step, results)
            if self.policy.version > before or self._placement.must_publish:
                self._publish()
            metrics = step_metrics(rollout, samples, stats, batches, results, before)
            self._report(step, begin, metrics, rollout, samples)
            if self.config.saves_at(step):
                self._placement.enter(State.READ)
            with self.watchdog.phase("checkpoint"):
                self.checkpoints.poll()
                self.checkpoints.save(
                    step, self.policy, lambda: self._conductor.rollouts.state(), metrics
                )
        with self.watchdog.phase("checkpoint"):
            self.checkpoints.wait()
        self._on_rank0(self._finish)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engines and the scorers, and close the logs."""
        for part in (self.conductor, self.fleet, self.bridge, self.watchdog):
            if part is not None:
                part.close()

    # ---- set-up -----------------------------------------------------------------------

    def _start_engines(self, device: Device, run_id: str) -> None:
        """They go on starting while the policy is built, which takes as long; engines that will
        share its GPUs must have taken, and given back, their memory first."""
        config = self.config
        colocated = config.trainer.placement == "colocated"
        spec = EngineSpec(
            rollout=config.rollout,
            model_path=os.path.abspath(model_files(config)),
            random_weights=is_converted(config),
            device=device,
            max_model_len=config.data.max_prompt_length + config.rollout.max_response_length,
            gives_memory_back=colocated,
            worker_extension=RECEIVER,
            weight_transfer=BACKEND,
            scratch=scratch_directory(run_id),
        )
        self.fleet = Fleet.start(
            spec,
            run_id=run_id,
            log_dir=Path(config.trainer.output_dir) / "logs",
            devices=self._engine_devices() if device == "cuda" else None,
        )
        if colocated:
            self.fleet.wait_ready()
            if device == "cpu":
                print(CPU_WARNING, file=sys.stderr)

    def _engine_devices(self) -> tuple[str, ...] | None:
        """For a private Ray; an existing cluster has its own."""
        r = self.config.rollout
        if r.ray_address is not None:
            return None
        variable = os.environ.get("CUDA_VISIBLE_DEVICES")
        return engine_devices(
            visible_devices(variable, torch.cuda.device_count()),
            mode=self.config.trainer.placement,
            n_ranks=int(os.environ["LOCAL_WORLD_SIZE"]),
            n_workers=r.num_engines * r.tensor_model_parallel_size,
        )

    def _handover(self) -> Handover:
        return Handover(
            fleet=self.fleet,
            policy=lambda: self.policy,
            on_rank0=self._on_rank0,
            group=self._waiting,
            watchdog=self.watchdog,
        )

    def _find_resume_point(self, shape: ModelShape) -> ResumePoint | None:
        point, warnings = find_resume_point(self.config, shape)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return point

    def _load_weights(self, shape: ModelShape) -> None:
        """Those of model.path; a run that is resumed goes on with its checkpoint's."""
        point, needs_reference = self._resume_point, self.config.algorithm.kl_coef > 0.0
        if point is None or needs_reference:
            self._load_model(shape)
        if needs_reference:
            self.policy.keep_reference()
        if point is not None:
            check_bytes(point.directory, point.marker)
            same = point.marker.layout == layout_of(self.config)
            self.policy.resume(point.directory, version=point.marker.version, same_ranks=same)

    def _load_model(self, shape: ModelShape) -> None:
        """From a converted model, or from Hugging Face files."""
        path = Path(self.config.model.path)
        if is_converted(self.config):
            check_bytes(path, read_marker(path))
            self.policy.load_weights(path)
        else:
            load_hf(path, self.policy.named_shards(), shape, self.parallel)
            self.policy.weights_loaded()

    def _open_conductor(self) -> None:
        pids: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(pids, os.getpid())

        def open_on_rank0() -> None:
            assert self.fleet is not None
            inputs = load_inputs(self.config)
            self.fleet.wait_ready()
            self.conductor = Conductor(
                self.config, inputs, self.fleet, self.watchdog, [*pids[1:], os.getppid()]
            )
            if self._resume_point is not None:
                directory = self._resume_point.directory
                self.conductor.rollouts.restore(read_trainer_state(directory))
                self._say(f"resumed from {directory}")

        self._on_rank0(open_on_rank0)

    def _on_rank0(self, action: Callable[[], T]) -> T:
        """Collective; the other ranks wait as long as engines may take."""
        return on_rank0(action, self._waiting)

    @property
    def _conductor(self) -> Conductor:
        assert self.conductor is not None, "only rank 0 has a conductor"
        return self.conductor

    # ---- steps of the loop --------------------------------------------------------------

    def _collect(self, step: int) -> Rollout:
        """The rollout batch of a step; the engines begin the next one if they may run ahead."""
        rollout = self._on_rank0(lambda: self._conductor.rollouts.take(step))
        trainer = self.config.trainer
        if self.conductor and trainer.max_staleness and step < trainer.total_training_steps:
            self.conductor.rollouts.begin(step + 1)
        return rollout

    def _wait_for_engines(self) -> None:
        """Until they have drawn the next batch: weights must not change under it."""
        if self.config.trainer.max_staleness:
            with self.watchdog.phase("wait"):
                self._on_rank0(lambda: self._conductor.rollouts.wait())

    def _publish(self) -> None:
        self._placement.enter(State.SYNC)
        with self.watchdog.phase("sync"):
            assert self.bridge is not None
            self.bridge.publish(self.policy.version)

    def _check_canary(self) -> None:
        """Refuse to train when the engines do not compute what the policy computes."""
        self._placement.enter(State.ROLLOUT)
        pairs = self._on_rank0(lambda: self._conductor.canary())
        # A data-parallel rank would pack its own share; here every rank computes all of it.
        batch = pack([canary_sample(p, c) for p, c in pairs], [1.0] * len(pairs))
        self._placement.enter(State.READ)
        (logprobs,) = self.policy.logprobs([batch])
        limit = self.config.mismatch_tolerance
        gap = check_canary(pairs, batch, logprobs, limit)
        self._say(f"first sync verified: log-probs agree within {gap:.1e} (limit {limit:g})")

    def _batches(self, rollout: Rollout, samples: Sequence[TrainSample]) -> list[TrainBatch]:
        at = self.parallel
        batches = make_batches(
            samples,
            self.config,
            dp_rank=at.dp_rank,
            dp_size=at.dp_size,
            costs=self._costs,
            can_share_prompts=not has_transformer_engine(),
        )
        return list(map(left_out, batches)) if rollout.selection.skipped else batches

    def _check_finite(
        self, step: int, samples: Sequence[TrainSample], results: Sequence[StepResult]
    ) -> None:
        """End the run when too many updates in a row were skipped; their samples are written."""
        self._bad_steps.see(step, split_updates(samples, len(results)), results)
        for result in filter(lambda r: r.is_bad, results):
            self._say(
                f"step {step}: update skipped, loss {result.loss:g}, gradient norm "
                f"{result.grad_norm:g}"
            )
        if not self._bad_steps.are_too_many:
            return
        path = Path(self.config.trainer.output_dir) / "bad_samples.jsonl"
        if self.conductor is not None:
            self._bad_steps.write(path)
        raise TooManyBadSteps(
            f"step {step}: {self.config.trainer.max_bad_steps} updates in a row "
            f"(trainer.max_bad_steps) had a loss or gradient that is not finite; their samples "
            f"are in {path}"
        )

    def _warn_of_shaped_scores(self, step: int, stats: AdvantageStats) -> None:
        """Once: the alpha that counts right answers by their score does not here."""
        if self.conductor is None or self._warned or not stats.n_shaped:
            return
        if self.config.algorithm.alpha == "nonzero":
            self._warned = True
            print(
                f"warning: step {step}: {stats.n_shaped} of {stats.n_samples} scores are neither 0 "
                "nor 1, but algorithm.alpha=nonzero takes every score other than 0 for a right "
                "answer; algorithm.alpha=group counts dead groups instead",
                file=sys.stderr,
            )

    def _evaluate(self, step: int) -> dict[str, float]:
        """Held-out accuracy on rank 0; written as step 0 before training."""
        self._placement.enter(State.ROLLOUT)
        metrics = self._on_rank0(lambda: self._conductor.evaluate(step))
        for name, value in metrics.items():
            if name.endswith("/ci95"):
                continue
            when = "before training" if step == 0 else f"after step {step}"
            self._say(f"{name} {when}: {value:.3f}")
        if step == 0 and self.conductor:
            metrics = {**metrics, **self.watchdog.pop_timings()}
            self.conductor.report(0, {"version": self.policy.version, **metrics})
        return metrics

    def _report(
        self,
        step: int,
        begin: float,
        metrics: dict[str, float],
        rollout: Rollout,
        samples: Sequence[TrainSample],
    ) -> None:
        seconds = time.perf_counter() - begin
        every, last = self.config.trainer.test_freq, self.config.trainer.total_training_steps
        if step == last or (every and step % every == 0):
            metrics |= self._evaluate(step)
        timings = self.watchdog.pop_timings()
        if self.conductor is None:
            return
        metrics |= timings | dict(rollout.timings) | {"timing/step_s": seconds}
        metrics |= throughput(metrics, self._peak_flops_per_s)
        self.conductor.report(step, metrics, rollout.groups, samples)

    def _finish(self) -> None:
        for line in self._conductor.finish():
            self._say(line)

    def _say(self, text: str) -> None:
        if self.conductor is not None:
            self.conductor.message(text)


def _rank0_limit_s(config: Config) -> int:
    """Longer than anything that rank 0 does alone may take; its own limits come first."""
    r = config.rollout
    draws = 1 + config.algorithm.max_redraws
    return r.startup_timeout_s + 2 * draws * r.generate_timeout_s


def _peak_flops_per_s(device: Device, dtype: torch.dtype) -> float:
    """Collective. What all policy ranks together could do at best; they measure at once, because
    those of one host share its cores."""
    dist.all_reduce(torch.zeros(1))  # waits for all; a barrier would use the GPU
    total = torch.tensor(peak_flops_per_s(device, dtype), dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()
