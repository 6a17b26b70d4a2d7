"""How busy engines and trainer are: the real state machine of the rollouts, on a clock of its own.

    python -m benchmarks.stream [--setup 7b ...] [--batches 60] [--lengths FILE] [--plot FILE]

Engines and trainer are cost models. A decode step of an engine with b sequences takes t0 + b t1;
the trainer takes so many seconds for a token, and so many to publish. Answers have lognormal
lengths, half of the variance from the prompt, or those of a file, one number a line. A setup's own
numbers can be set: --engines 16. Last line: JSON.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from gpg_megatron.loop.stream import (
    Asked,
    Event,
    Finished,
    Group,
    PublishBegan,
    Published,
    Rules,
    Start,
    State,
    Taken,
    advance,
    age,
    may_publish,
    next_batch,
    room_for,
)

WARM_UP = 12
"""Batches that are not counted: it begins with all engines empty. The end is not in it either: a
run goes on beyond the batches that are counted."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Costs of a model on some GPUs."""

    engines: int
    seqs: int
    """Sequences that one engine decodes at once."""
    t0: float
    """Seconds of a decode step, for reading the weights."""
    t1: float
    """And for each sequence."""
    ranks: int
    """GPUs of the trainer."""
    tokens_per_s: float
    """That each of them learns from."""
    publish: float
    """Seconds."""
    prompts: int
    """Of a batch."""
    n: int
    """Answers to each."""
    median: float
    """Tokens of an answer."""
    sigma: float
    """Standard deviation of the logarithm of its length."""
    longest: int

    @property
    def engine_rate(self) -> float:
        """Tokens a second of all engines when they are full."""
        return self.engines * self.seqs / (self.t0 + self.seqs * self.t1)


SETUPS = {
    # H100: 15 GB of weights at 3.35 TB/s and what else a step needs; 6 x 7.6e9 operations a token
    # at 40 % of 989 TFLOP/s.
    "7b": Setup(
        engines=2, seqs=512, t0=8e-3, t1=3e-5, ranks=6, tokens_per_s=8700, publish=2.0,
        prompts=128, n=8, median=1200, sigma=0.9, longest=8192,
    ),
    # Engines of two GPUs; 3.3e9 active parameters at 25 %.
    "30b-a3b": Setup(
        engines=20, seqs=256, t0=10e-3, t1=4e-5, ranks=24, tokens_per_s=12500, publish=5.0,
        prompts=512, n=8, median=4000, sigma=0.9, longest=32768,
    ),
}  # fmt: skip
MODES: Mapping[str, Mapping[str, Any]] = {
    "in turn (K = 0)": {"staleness": 0},
    "K = 1, drain": {"staleness": 1},
    "K = 2, drain": {"staleness": 2},
    "K = 4, drain": {"staleness": 4},
    "K = 8, drain": {"staleness": 8},
    "K = 1, in flight": {"staleness": 1, "in_flight": True},
    "K = 2, in flight": {"staleness": 2, "in_flight": True},
    "K = 4, in flight": {"staleness": 4, "in_flight": True},
    "K = 8, in flight": {"staleness": 8, "in_flight": True},
    "K = 2, in flight, carry 25 %": {"staleness": 2, "in_flight": True, "extra": 0.25},
    "K = 0, abort 25 %": {"staleness": 0, "extra": 0.25, "unfinished": "abort"},
    "K = 0, cut 25 %": {"staleness": 0, "extra": 0.25, "unfinished": "cut"},
}


@dataclass(kw_only=True)
class Answers:
    """How long the answers to each prompt are."""

    setup: Setup
    lengths: Sequence[int] = ()
    """To draw from; empty: lognormal."""
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    prompts: dict[int, float] = field(default_factory=dict)

    def draw(self, ticket: int) -> list[int]:
        """Tokens of each answer of a group; another draw of the same prompt gives others."""
        s, chance = self.setup, self.chance
        if self.lengths:
            return chance.choices(self.lengths, k=s.n)
        half = s.sigma / math.sqrt(2)
        own = self.prompts.setdefault(ticket, chance.gauss(math.log(s.median), half))
        return [
            max(1, min(s.longest, round(math.exp(chance.gauss(own, half))))) for _ in range(s.n)
        ]


class Engines:
    """Sequences that share their engine's steps. An engine is brought up to date when its batch
    changes."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.now = 0.0
        self.produced = 0.0
        """Tokens."""
        n = setup.engines
        self._at = [0.0] * n
        """When each was brought up to date."""
        self._clock = [0.0] * n
        """Steps that it had done then."""
        self._end = [math.inf] * n
        """When its next answer ends."""
        self._running: list[list[tuple[float, int, int]]] = [[] for _ in range(n)]
        """Heaps of (step at which it ends, ticket, attempt)."""
        self._queues: list[deque[tuple[int, int, int]]] = [deque() for _ in range(n)]
        """(tokens, ticket, attempt) of those that an engine has no room for."""
        self._left: dict[tuple[int, int], int] = {}
        """(ticket, attempt) -> answers that have not ended."""
        self._attempt: Counter[int] = Counter()
        self._began: dict[tuple[int, int], tuple[int, float]] = {}
        """(ticket, attempt) -> its engine, and the step at which it began."""

    def start(self, ticket: int, lengths: Sequence[int]) -> None:
        """On the engine with the least to do."""
        self._attempt[ticket] += 1
        key = ticket, self._attempt[ticket]
        self._left[key] = len(lengths)
        engine = min(
            range(self.setup.engines), key=lambda e: len(self._running[e]) + len(self._queues[e])
        )
        self._update(engine)
        self._began[key] = engine, self._clock[engine]
        self._queues[engine] += [(length, *key) for length in lengths]
        self._fill(engine)

    def stop(self, ticket: int) -> int:
        """End what runs of it; tokens of each answer that did, 0: none ran."""
        key = ticket, self._attempt[ticket]
        if not self._left.pop(key, 0):
            return 0
        engine, began = self._began[key]
        self._update(engine)
        running = self._running[engine]
        running[:] = [x for x in running if x[1:] != key]
        heapq.heapify(running)
        self._queues[engine] = deque(x for x in self._queues[engine] if x[1:] != key)
        self._fill(engine)
        return max(1, round(self._clock[engine] - began))

    def next_end(self) -> float:
        """When the next answer ends, if nothing is started before."""
        return min(self._end)

    def go_to(self, now: float) -> list[int]:
        """Work until then, at most to the next end; the tickets that finished."""
        self.now, done = now, []
        for engine, end in enumerate(self._end):
            if end > now:
                continue
            self._update(engine)
            running = self._running[engine]
            while running and running[0][0] <= self._clock[engine] + 1e-6:
                _, *key = heapq.heappop(running)
                self._left[key[0], key[1]] -= 1
                if not self._left[key[0], key[1]]:
                    done.append(key[0])
            self._fill(engine)
        return done

    def pause(self, seconds: float) -> None:
        """Nothing is decoded."""
        for engine in range(self.setup.engines):
            self._update(engine)
            self._at[engine] += seconds
            self._fill(engine)
        self.now += seconds

    def _step_s(self, engine: int) -> float:
        return self.setup.t0 + self.setup.t1 * len(self._running[engine])

    def _update(self, engine: int) -> None:
        steps = (self.now - self._at[engine]) / self._step_s(engine)
        self._clock[engine] += steps
        self.produced += steps * len(self._running[engine])
        self._at[engine] = self.now

    def _fill(self, engine: int) -> None:
        waiting, running = self._queues[engine], self._running[engine]
        while waiting and len(running) < self.setup.seqs:
            length, *key = waiting.popleft()
            heapq.heappush(running, (self._clock[engine] + length, key[0], key[1]))
        left = running[0][0] - self._clock[engine] if running else math.inf
        self._end[engine] = self._at[engine] + left * self._step_s(engine)


@dataclass(kw_only=True)
class Result:
    """Of one mode, over the batches that are counted."""

    step_s: float
    bound_s: float
    """The slower of the two phases, if both were always busy."""
    engines_busy: float
    """Share of what the engines could decode when they are full."""
    trainer_busy: float
    ages: Mapping[int, float]
    """Batches -> share of the groups that were trained on at that age."""
    early_length: float
    """Mean tokens of the answers of the first batches, over that of all answers."""
    late_length: float
    """The same for the batches that are counted."""
    cut: float
    """Share of the answers that were cut."""


class Simulation:
    """Trainer and engines that do what the state machine says."""

    def __init__(self, setup: Setup, rules: Rules, answers: Answers) -> None:
        self.setup, self.rules, self.answers = setup, rules, answers
        self.engines = Engines(setup)
        self.state = State()
        self.lengths: dict[int, list[int]] = {}
        self.batches: list[tuple[Group, ...]] = []
        self.trained: list[list[int]] = []
        """Lengths of each batch's answers."""
        self.ages: list[Counter[int]] = []
        self.marks: list[tuple[float, float, float]] = []
        """After each batch: seconds, tokens that were decoded, seconds of learning."""
        self.learning = 0.0
        self.n_cut = 0

    def run(self, batches: int) -> None:
        """So many batches."""
        self.publish()
        while self.state.closed < batches:
            self.event(Asked())
            self.wait(lambda: next_batch(self.rules, self.state) is not None)
            batch = next_batch(self.rules, self.state)
            assert batch is not None
            lengths = [n for group in batch for n in self.lengths.pop(group.ticket)]
            self.ages.append(Counter(age(self.state, group.weights) for group in batch))
            self.trained.append(lengths)
            self.event(Taken())
            seconds = sum(lengths) / (self.setup.ranks * self.setup.tokens_per_s)
            self.learning += seconds
            self.work_until(self.engines.now + seconds)
            self.publish()
            self.marks.append((self.engines.now, self.engines.produced, self.learning))

    def publish(self) -> None:
        self.event(PublishBegan())
        self.wait(lambda: may_publish(self.rules, self.state))
        self.engines.pause(self.setup.publish)
        self.event(Published())

    def wait(self, there: Callable[[], bool]) -> None:
        while not there():
            while not self.work_until(self.engines.next_end()):
                assert self.engines.next_end() < math.inf, "it will never be there"

    def work_until(self, then: float) -> bool:
        """Whether a group finished."""
        any_finished = False
        while True:
            end = min(then, self.engines.next_end())
            for ticket in self.engines.go_to(end):
                self.event(Finished(ticket, True))
                any_finished = True
            if end >= then:
                return any_finished

    def event(self, event: Event) -> None:
        self.state, actions = advance(self.rules, self.state, event)
        for action in actions:
            for ticket in action.tickets:
                if isinstance(action, Start):
                    self.lengths[ticket] = self.answers.draw(ticket)
                    self.engines.start(ticket, self.lengths[ticket])
                elif (done := self.engines.stop(ticket)) and action.keep:
                    self.n_cut += sum(length > done for length in self.lengths[ticket])
                    self.lengths[ticket] = [min(n, done) for n in self.lengths[ticket]]
                    self.event(Finished(ticket, True))


def simulate(setup: Setup, mode: Mapping[str, Any], batches: int, lengths: Sequence[int]) -> Result:
    """One mode of one setup."""
    answers = Answers(setup=setup, lengths=lengths)
    extra = math.ceil(mode.get("extra", 0) * setup.prompts)
    room = room_for(setup.engines * setup.seqs, setup.n)
    last = batches + mode.get("staleness", 0) + 1
    rules = Rules(**{**mode, "extra": extra}, size=setup.prompts, last=last, room=room)
    run = Simulation(setup, rules, answers)
    run.run(batches)
    counted = batches - WARM_UP
    begin, end = run.marks[WARM_UP - 1], run.marks[-1]
    seconds, produced, learning = (y - x for x, y in zip(begin, end, strict=True))
    tokens = [sum(batch) for batch in run.trained[WARM_UP:]]
    whole = fmean(n for ticket in range(20_000) for n in answers.draw(-1 - ticket))
    ages = sum(run.ages[WARM_UP:], Counter())
    n_tokens = fmean(tokens)
    learn = n_tokens / (setup.ranks * setup.tokens_per_s) + setup.publish
    return Result(
        step_s=seconds / counted,
        bound_s=max(n_tokens / setup.engine_rate, learn),
        engines_busy=produced / seconds / setup.engine_rate,
        trainer_busy=learning / seconds,
        ages={a: n / ages.total() for a, n in sorted(ages.items())},
        early_length=fmean(n for batch in run.trained[:3] for n in batch) / whole,
        late_length=fmean(n for batch in run.trained[WARM_UP:] for n in batch) / whole,
        cut=run.n_cut / sum(map(len, run.trained)),
    )


def table(results: Mapping[str, Result]) -> str:
    """Markdown."""
    lines = [
        "| mode | step, s | of the bound | engines | trainer | ages of the groups | "
        "length, first 3 batches | length, later | cut |",
        "|---" * 9 + "|",
    ]
    for mode, r in results.items():
        ages = ", ".join(f"{a}: {share:.0%}" for a, share in r.ages.items() if share >= 0.005)
        lines.append(
            f"| {mode} | {r.step_s:.1f} | {r.bound_s / r.step_s:.2f} | {r.engines_busy:.0%} | "
            f"{r.trainer_busy:.0%} | {ages} | {r.early_length:.2f} | {r.late_length:.2f} | "
            f"{r.cut:.1%} |"
        )
    return "\n".join(lines)


def plot(results: Mapping[str, Mapping[str, Result]], path: Path) -> None:
    """Step time over K, for each setup."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for ax, (name, modes) in zip(axes, results.items(), strict=True):
        for update, marker in (("drain", "o-"), ("in flight", "s-")):
            points = {0: modes["in turn (K = 0)"].step_s} | {
                k: modes[f"K = {k}, {update}"].step_s for k in (1, 2, 4, 8)
            }
            ax.plot(list(points), list(points.values()), marker, label=update)
        bound = modes["K = 8, in flight"].bound_s
        ax.axhline(bound, color="gray", linestyle="--", label="max of the two phases")
        ax.set(title=name, xlabel="K, rollout batches", ylabel="seconds a step", ylim=(0, None))
        ax.legend()
    figure.savefig(path)


_KEYS = {key.name for key in fields(Setup)}


def main() -> None:
    """Print a table for each setup."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__)
    parser.add_argument("--setup", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--batches", type=int, default=60, help=f"more than {WARM_UP}")
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--plot", type=Path)
    for key in fields(Setup):
        parser.add_argument(f"--{key.name}", type=float if key.type == "float" else int)
    args = parser.parse_args()
    if args.batches <= WARM_UP:
        parser.error(f"--batches: expected more than {WARM_UP}")
    lengths = [int(line) for line in args.lengths.read_text().split()] if args.lengths else []
    own = {name: x for name, x in vars(args).items() if name in _KEYS and x is not None}
    results = {}
    for name in args.setup:
        setup = replace(SETUPS[name], **own)
        print(f"{name}: {setup}")
        results[name] = {
            mode: simulate(setup, rules, args.batches, lengths) for mode, rules in MODES.items()
        }
        print(table(results[name]), flush=True)
    if args.plot:
        plot(results, args.plot)
    summary = {
        name: {mode: round(r.bound_s / r.step_s, 3) for mode, r in modes.items()}
        for name, modes in results.items()
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
