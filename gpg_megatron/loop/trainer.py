"""The loop. Every policy rank runs it; rank 0 also drives the engines (rank0.py).

prompts -> rollout -> reward -> advantage -> batch -> policy step -> bridge -> rollout
'------- rank 0, broadcast -----'  '------------ every rank ------------'
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from gpg_megatron.algorithm.advantages import AdvantageStats, assign_advantages
from gpg_megatron.batching.updates import BatchPlan, make_batches
from gpg_megatron.bridge.bridge import WeightBridge
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.host.collectives import OnRank0
from gpg_megatron.loop.checkpoints import RunCheckpoints
from gpg_megatron.loop.collapse import Collapsed, signs, verdict, where_to_go_on
from gpg_megatron.loop.collector import Rollout
from gpg_megatron.loop.generating import Generating
from gpg_megatron.loop.guard import Guard
from gpg_megatron.loop.rank0 import Rank0
from gpg_megatron.loop.rollouts import Rollouts
from gpg_megatron.loop.step_metrics import step_metrics, throughput
from gpg_megatron.loop.suspect import suspect_step
from gpg_megatron.observe.trace import Trace
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.placement.states import Placement, State
from gpg_megatron.policy.policy import Policy
from gpg_megatron.types import Completion, Prompt, StepResult, TrainBatch, TrainSample


def train(run: Run) -> str:
    """Train to the end, from the resume point if there is one; why it left before, or nothing.
    Collective."""
    run.generating.publish = run.send_weights
    run.publish()
    run.check_first_sync()
    run.evaluate_first()
    for step in run.steps():
        with run.place(State.ROLLOUT):
            rollout = run.rollouts.take()
        run.keep_suspect(step, rollout)
        samples, stats = assign_advantages(rollout.groups, run.algorithm)
        batches = make_batches(samples, run.plan, skipped=rollout.skipped)
        with run.place(State.POLICY), run.phase("policy"):
            results = run.policy.learn(batches)
        is_judged = run.guard.check(step, samples, results)
        collapse = run.check_collapse(step, rollout, samples, results)
        run.publish()
        agreement = {} if is_judged else run.check_engines(step)
        evals = run.evaluate_at(step)
        run.save_at(step, evals)
        run.report(step, rollout, samples, stats, batches, results, evals | agreement | collapse)
    run.finish()
    return run.left_because


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Which steps there are, and what happens after which."""

    done: int
    """Steps behind the resume point."""
    last: int
    evaluate_first: bool
    """Also before the first step of a run."""
    evaluate_every: int
    """0: after the last step only."""

    def evaluates_at(self, step: int) -> bool:
        """Whether the held-out prompts are answered after a step."""
        every = self.evaluate_every
        return step == self.last or (every > 0 and step % every == 0)


@dataclass(slots=True, kw_only=True)
class Run:
    """One rank's view of a run: its parts, made by build.py, and what they do together."""

    schedule: Schedule
    algorithm: AlgorithmConfig
    plan: BatchPlan
    policy: Policy
    placement: Placement
    bridge: WeightBridge
    rollouts: Rollouts
    checkpoints: RunCheckpoints
    guard: Guard
    watchdog: Watchdog
    on_rank0: OnRank0
    generating: Generating
    """on_rank0, for what waits for engines."""
    rank0: Rank0 | None
    """None on the other ranks."""
    peak_flops_per_s: float
    """Of all policy ranks together."""
    trace: Trace
    """What a step runs in: nothing, or the profiler."""
    stop_on: Mapping[str, float]
    """Sign of a collapse -> its limit, see collapse.py."""
    asked_to_leave: Callable[[], str]
    """Asked on rank 0: why the run is to leave; empty: it is not."""
    left_because: str = field(default="", init=False)
    _published: int | None = field(default=None, init=False)
    """The version that the engines have."""
    _step_began: float = field(default=0.0, init=False)

    def steps(self) -> Iterator[int]:
        """Those that are still to be done, from 1."""
        self.left_because = self.on_rank0(self.asked_to_leave)
        for step in range(self.schedule.done + 1, self.schedule.last + 1):
            if self.left_because:
                return
            with self.trace(step):
                self._step_began = time.perf_counter()
                yield step

    @contextmanager
    def place(self, state: State) -> Iterator[None]:
        """The GPUs' memory is where the body needs it, and stays there until the next place."""
        self.placement.enter(state)
        yield

    def phase(self, name: str) -> AbstractContextManager[None]:
        """The body's time is timing/<name>_s of this step."""
        return self.watchdog.phase(name)

    def publish(self) -> None:
        """The engines have the policy's weights. Nothing moves where they have them already."""
        with self.rollouts.updating():
            if self.policy.version == self._published and not self.placement.must_publish:
                return
            with self.place(State.SYNC):
                self.send_weights()

    def send_weights(self) -> None:
        """Whatever the engines have. In the middle of a wait for engines, those that replace lost
        ones get theirs by it."""
        with self.phase("sync"):
            self.bridge.publish(self.policy.version)
        self._published = self.policy.version

    def check_collapse(
        self,
        step: int,
        rollout: Rollout,
        samples: Sequence[TrainSample],
        results: Sequence[StepResult],
    ) -> dict[str, float]:
        """The signs of a collapse that are watched, as metrics.

        Raises:
            Collapsed: one is beyond its limit. Nothing of this step is saved.
        """
        if not (limits := self.stop_on):
            return {}
        found = signs(rollout.metrics["reward/accuracy"], samples, results)
        if said := verdict(step, found, limits):
            raise Collapsed(f"{said}; {where_to_go_on(self.checkpoints.newest())}")
        return {f"stop/{name}": found[name] for name in limits if name in found}

    def check_first_sync(self) -> None:
        """Refuse to train when the engines do not compute what the policy computes."""
        canary = self._canary()
        with self.place(State.READ):
            self.guard.measure(canary, self.policy)
            found = self.guard.check_canary("after the first sync", canary, self.policy)
        self.say(
            f"first sync verified: log-probs agree within {found.mean:.1e} in the mean "
            f"(limit {self.guard.limit.of(found):.1e})"
        )

    def check_engines(self, step: int) -> dict[str, float]:
        """The same after a step whose rollouts cannot be judged; what was found, as metrics."""
        canary = self._canary()
        with self.place(State.READ):
            found = self.guard.check_canary(f"after step {step}", canary, self.policy)
        return {
            "mismatch/canary_mean": found.mean,
            "mismatch/canary_max": found.largest,
            "mismatch/canary_unlikely_mean": found.unlikely,
        }

    def _canary(self) -> list[tuple[Prompt, Completion]]:
        with self.place(State.ROLLOUT):
            return self.generating(lambda: self._rank0.canary())

    def evaluate_first(self) -> None:
        """The state before training, as step 0."""
        if not self.schedule.evaluate_first or self.schedule.done:
            return
        metrics = self._evaluate(0, "before training")
        if self.rank0 is not None:
            timings = self.watchdog.pop_timings()
            self.rank0.report(0, {"version": self.policy.version, **metrics, **timings})

    def evaluate_at(self, step: int) -> dict[str, float]:
        """Held-out accuracy where it is due; else nothing."""
        if not self.schedule.evaluates_at(step):
            return {}
        return self._evaluate(step, f"after step {step}")

    def keep_suspect(self, step: int, rollout: Rollout) -> None:
        """The batch of a step in which the run has failed before is written down."""
        if step == suspect_step():
            self.on_rank0(lambda: self._rank0.keep_suspect(step, rollout.groups))

    def save_at(self, step: int, evals: Mapping[str, float]) -> None:
        """A checkpoint where it is due, and where the run is asked to leave. After the last step
        all of them are written."""
        if step < self.schedule.last:
            self.left_because = self.on_rank0(self.asked_to_leave)
        leaves = bool(self.left_because)
        if self.checkpoints.saves_at(step, leaves):
            self.placement.enter(State.READ)
        with self.phase("checkpoint"):
            self.checkpoints.save_at(step, self.policy, evals, leaves)

    def report(
        self,
        step: int,
        rollout: Rollout,
        samples: Sequence[TrainSample],
        stats: AdvantageStats,
        batches: Sequence[TrainBatch],
        results: Sequence[StepResult],
        others: Mapping[str, float],
    ) -> None:
        """Write what a step was, on rank 0. timing/step_s is its time without the evaluation.

        Raises:
            UserError: on every rank, when the disk is full.
        """

        def write() -> None:
            timings = self.watchdog.pop_timings() | dict(rollout.timings)
            seconds = time.perf_counter() - self._step_began - timings.get("timing/eval_s", 0.0)
            metrics = step_metrics(rollout, samples, stats, batches, results)
            metrics |= dict(others) | timings | {"timing/step_s": seconds}
            metrics |= throughput(metrics, self.peak_flops_per_s)
            self._rank0.report(step, metrics, rollout.groups, samples)
            self._rank0.warn_of_shaped_scores(step, stats)

        self.on_rank0(write)

    def finish(self) -> None:
        """The last words of a run that came to its end, or leaves in order."""
        self.on_rank0(lambda: self._rank0.finish(self.left_because))

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self.rank0 is not None:
            self.rank0.message(text)

    @property
    def _rank0(self) -> Rank0:
        assert self.rank0 is not None, "called on rank 0 only"
        return self.rank0

    def _evaluate(self, step: int, when: str) -> dict[str, float]:
        def evaluate() -> dict[str, float]:
            with self.rollouts.evaluating():
                return self._rank0.evaluate(step)

        with self.place(State.ROLLOUT), self.phase("eval"):
            metrics = self.generating(evaluate)
        for name, value in metrics.items():
            if not name.endswith("/ci95"):
                self.say(f"{name} {when}: {value:.3f}")
        return metrics
