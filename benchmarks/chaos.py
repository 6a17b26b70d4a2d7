"""The demo under random faults at random moments: what it takes to go on, and that nothing is lost.

    python -m benchmarks.chaos --kills 25 --seed 1 [--only PATTERN] [--out DIR]
        [--reference RUN_DIR] [a.b=value ...]

Faults strike one after the other, each when the one before is over. A launcher that is killed is
started again, as a batch system would. With --reference, the folder of an undisturbed run with the
same overrides, every kept row of the metrics must be its row, time aside. Prints a table, and JSON
on the last line.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from gpg_megatron.errors import EXIT_STOPPED
from gpg_megatron.host.reaper import RUN_ID_VARIABLE, SHARED_MEMORY, open_segments
from gpg_megatron.observe.rundir import METRICS, read_metrics

PATIENCE_S = 600.0
NOT_COMPARED = ("timing/", "throughput/", "memory/", "eval/")
"""The clock's, and what is measured after the last step only."""
OVERRIDES = (
    "trainer.test_freq=0",
    "trainer.max_restarts=100000",
    "trainer.max_restarts_per_hour=100000",
    "rollout.max_losses_per_hour=100000",
    "rollout.stall_timeout_s=20",
    "checkpoint.save_freq=2",
    "checkpoint.keep_last=3",
    "policy.timeout_s=60",
)
ENDLESS = "trainer.total_training_steps=100000"
RESTARTED = r"^restart \d+ of"
REPLACED = "is there again"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A row of the table of what may happen."""

    name: str
    victim: str
    """A pattern of its command line or name."""
    number: signal.Signals
    over: str = ""
    """A pattern of the line that is printed when the run has gone on; empty: the next step is."""


FAULTS = (
    Fault(name="policy rank killed", victim="rank", number=signal.SIGKILL, over=RESTARTED),
    Fault(name="policy rank stopped", victim="rank", number=signal.SIGSTOP, over=RESTARTED),
    Fault(name="engine actor killed", victim="ray::Engine", number=signal.SIGKILL, over=REPLACED),
    Fault(name="engine actor stopped", victim="ray::Engine", number=signal.SIGSTOP, over=REPLACED),
    Fault(name="engine core killed", victim="VLLM::", number=signal.SIGKILL, over=REPLACED),
    Fault(name="engine core stopped", victim="VLLM::", number=signal.SIGSTOP, over=REPLACED),
    Fault(name="reward worker killed", victim="reward.worker", number=signal.SIGKILL),
    Fault(name="raylet killed", victim="raylet/raylet", number=signal.SIGKILL, over=RESTARTED),
    Fault(name="launcher killed", victim="launcher", number=signal.SIGKILL, over="resumed from"),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one fault."""

    fault: str
    step: int
    """Reported last when it struck."""
    seconds: float
    """Until the part was there again and the next steps were reported."""
    repeated: int
    """Steps that were reported a second time."""


class Demo:
    """The run, through all of its launchers."""

    def __init__(self, output: Path, overrides: list[str]) -> None:
        self.output = output
        self._log = output.with_suffix(".log")
        self._command = [sys.executable, "-m", "gpg_megatron.start.train"]
        self._command += ["--config", "configs/demo_cpu.yaml", *OVERRIDES, *overrides]
        self._command += [f"trainer.output_dir={output}"]
        self.run_ids: set[str] = set()
        self.segments: set[str] = set()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.unlink(missing_ok=True)
        self.start()

    def start(self) -> None:
        with self._log.open("a") as file:
            self.process = subprocess.Popen(self._command, stdout=file, stderr=file)

    def steps(self) -> list[int]:
        """As they were reported, repeated ones too."""
        path = self.output / METRICS
        found = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with suppress(json.JSONDecodeError):  # half written
                found.append(int(json.loads(line)["step"]))
        return found

    def printed(self) -> str:
        return self._log.read_text()

    def victims(self, kind: str) -> list[psutil.Process]:
        """Processes that a fault may strike; what is there is remembered."""
        mine = psutil.Process(self.process.pid)
        if kind == "launcher":
            return [mine]
        found, below = [], mine.children(recursive=True)
        for process in below:
            with suppress(psutil.Error):
                if mark := process.environ().get(RUN_ID_VARIABLE):
                    self.run_ids.add(mark)
                is_rank = process.ppid() == mine.pid and "RANK" in process.environ()
                line = f"{process.name()} {' '.join(process.cmdline())}"
                if is_rank if kind == "rank" else kind in line:
                    found.append(process)
        self.segments |= open_segments(process.pid for process in below)
        return found

    def wait(self, is_true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_true():
            assert time.monotonic() < deadline, f"waited for {what}\n{self.printed()[-3000:]}"
            assert self.process.poll() is None, f"ended\n{self.printed()[-3000:]}"
            time.sleep(0.2)

    def left(self) -> list[str]:
        """Processes and segments that are there when it has ended."""
        found = [name for name in self.segments if (SHARED_MEMORY / name).exists()]
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(RUN_ID_VARIABLE) in self.run_ids:
                    found.append(str(process))
        return found


def strike(demo: Demo, fault: Fault, draw: random.Random) -> Outcome:
    """One fault, and all that follows from it."""
    demo.wait(lambda: bool(demo.victims(fault.victim)), f"a process for: {fault.name}")
    time.sleep(draw.uniform(0.0, 5.0))
    victim = draw.choice(demo.victims(fault.victim))
    steps, said = demo.steps(), len(demo.printed())
    begin = time.monotonic()
    victim.send_signal(fault.number)
    if fault.victim == "launcher":
        demo.process.wait()
        demo.start()

    def is_over() -> bool:
        # What was under way may still be reported: two rows more are new work.
        found = re.search(fault.over, demo.printed()[said:], re.MULTILINE)
        return bool(found) and len(demo.steps()) >= len(steps) + 2

    demo.wait(is_over, fault.name)
    last = max(steps, default=0)
    return Outcome(
        fault=fault.name,
        step=last,
        seconds=time.monotonic() - begin,
        repeated=sum(step <= last for step in demo.steps()[len(steps) :]),
    )


def compared(run: Path, reference: Path | None) -> dict[str, Any]:
    """Which kept rows are not those of an undisturbed run, of the steps that both have."""
    if reference is None:
        return {}

    def rows(folder: Path) -> dict[int, dict[str, Any]]:
        return {
            row["step"]: {k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)}
            for row in read_metrics(folder)
        }

    mine, right = rows(run), rows(reference)
    both = sorted(mine.keys() & right.keys())
    differ = [step for step in both if mine[step] != right[step]]
    return {"rows_compared": len(both), "rows_that_differ": differ}


def disturbed(
    folder: Path, overrides: list[str], faults: list[Fault], draw: random.Random
) -> tuple[list[Outcome], dict[str, Any]]:
    """A run under these faults, one after the other, which then leaves in order."""
    demo = Demo(folder, [*overrides, ENDLESS])
    outcomes: list[Outcome] = []
    print(f"{'fault':24} {'step':>5} {'seconds':>8} {'repeated':>9}")
    try:
        demo.wait(lambda: len(demo.steps()) > 2, "the first steps")
        for fault in faults:
            outcomes.append(one := strike(demo, fault, draw))
            print(f"{one.fault:24} {one.step:5} {one.seconds:8.1f} {one.repeated:9}", flush=True)
        demo.process.send_signal(signal.SIGTERM)
        code = demo.process.wait(timeout=PATIENCE_S)
    finally:
        if demo.process.poll() is None:
            demo.process.kill()
    time.sleep(5.0)  # for the reaper
    return outcomes, {"left_in_order": code == EXIT_STOPPED, "left_behind": demo.left()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--only", default="", metavar="PATTERN", help="of the faults' names")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the demo is ended, too
    draw, out = random.Random(arguments.seed), arguments.out.absolute()
    some = [fault for fault in FAULTS if re.search(arguments.only, fault.name)]
    rounds = -(-arguments.kills // len(some))
    faults = [fault for _ in range(rounds) for fault in draw.sample(some, len(some))]
    outcomes, end = disturbed(out, arguments.overrides, faults[: arguments.kills], draw)
    kept = [int(row["step"]) for row in read_metrics(out)]
    result = {
        "kills": arguments.kills,
        "recovered": len(outcomes),
        "lost": arguments.kills - len(outcomes),
        "seconds_to_recover_median": statistics.median(one.seconds for one in outcomes),
        "seconds_by_fault": {
            name: statistics.median(one.seconds for one in outcomes if one.fault == name)
            for name in Counter(one.fault for one in outcomes)
        },
        "steps": kept[-1],
        "no_step_missing": kept == list(range(kept[0], kept[-1] + 1)),
        **compared(out, arguments.reference),
        **end,
        "outcomes": [asdict(one) for one in outcomes],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
