"""The demo under random faults at random moments: what it takes to go on, and that nothing is lost.

    python -m benchmarks.chaos --kills 25 --seed 1 [--minutes M] [--only PATTERN] [--out DIR]
        [--reference DIR] [a.b=value ...]

Faults strike one after the other, each when the one before is over; those that need two ranks
strike a second run. A launcher that has ended is started again, as a batch system would, and what a
person has to mend (a full disk, a damaged checkpoint) is mended before. At the end an undisturbed
run goes as many steps (it is kept in DIR, and goes on when more are needed): every kept row of the
metrics must be its row, time aside. Prints a table, and JSON on the last line. Needs Linux, and a
user who may make namespaces: checkpoints are on a disk of their own, which can be filled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos_faults import FAULTS, READY, Demo, Fault
from gpg_megatron.errors import EXIT_STOPPED
from gpg_megatron.observe.rundir import read_metrics

PATIENCE_S = 600.0
DISK_MIB = 160
NOTICE_S, ENGINE_S, RANKS_S = 5.0, 10.0, 15.0
"""How long it may take to notice a fault; and to recover, beyond the time of a start."""
NOT_COMPARED = ("timing/", "throughput/", "memory/", "eval/")
"""The clock's, and what is measured after the last step only."""
INSIDE = "GPG_CHAOS_NAMESPACE"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one fault. Seconds count from it."""

    fault: str
    by: str
    """What recovered it; "": nothing did."""
    step: int
    """Reported last when it struck."""
    noticed_s: float | None
    """Until something said so, or had ended what was left; None: nothing has to."""
    back_s: float | None
    """Until what was struck was there again; None: nothing says it."""
    seconds: float
    """Until steps were reported that had not been reported before."""
    repeated: int
    """Steps that were reported a second time."""
    is_late: bool
    """Whether it took longer than it may."""

    def line(self) -> str:
        noticed, back = (
            "-" if value is None else f"{value:.1f}" for value in (self.noticed_s, self.back_s)
        )
        late = " late" if self.is_late else ""
        by = self.by or "LOST"
        times = f"{noticed:>8} {back:>7} {self.seconds:8.1f}"
        return f"{self.fault:26} {self.step:5} {times} {self.repeated:8}  {by}{late}"


TITLE = f"{'fault':26} {'step':>5} {'noticed':>8} {'back':>7} {'seconds':>8} {'repeated':>8}  by"


def strike(demo: Demo, fault: Fault, draw: random.Random, start_s: float) -> Outcome:
    """One fault, and all that follows from it.

    Args:
        start_s: what a start of the run takes.
    """
    time.sleep(draw.uniform(0.0, 5.0))
    steps, said, begin = demo.steps(), len(demo.printed()), time.monotonic()
    last, fresh = max(steps, default=0), len(steps)
    fault.strike(demo, draw)
    noticed: float | None = None
    back = None if fault.back else 0.0
    seconds, by, may_end = 0.0, fault.by, True
    while by:
        code = demo.process.poll()
        seconds, text = time.monotonic() - begin, demo.printed()[said:]
        if noticed is None and fault.sign and re.search(fault.sign, text, re.MULTILINE):
            noticed = seconds
        if code is not None:
            if not may_end or code != fault.ends or (fault.sign and noticed is None):
                by = ""
                break
            may_end = False
            demo.wait_until_gone()
            noticed = noticed or time.monotonic() - begin
            fault.mend(demo)
            demo.start()
        if back is None and re.search(fault.back, text):
            back, fresh = seconds, len(demo.steps())
        # What was under way may still be reported: two rows more are new work.
        new = demo.steps()[fresh:]
        if back is not None and len(new) >= 2 and max(new) > last:
            break
        by = by if seconds < PATIENCE_S else ""
        demo.find("")
        time.sleep(0.25)
    extra_s = ENGINE_S if fault.by == "another engine" else RANKS_S
    limit_s = NOTICE_S + fault.waits_s
    return Outcome(
        fault=fault.name,
        by=by,
        step=last,
        noticed_s=noticed,
        back_s=back if fault.back else None,
        seconds=seconds,
        repeated=sum(step <= last for step in demo.steps()[len(steps) :]),
        is_late=bool(by)
        and ((noticed or 0.0) > limit_s or (back or 0.0) > fault.waits_s + start_s + extra_s),
    )


def disturbed(
    demo: Demo, faults: Sequence[Fault], draw: random.Random, deadline: float
) -> tuple[list[Outcome], dict[str, Any]]:
    """A run under these faults, one after the other, which then leaves in order."""
    demo.checkpoints.mkdir(parents=True)
    size = f"size={DISK_MIB}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", demo.checkpoints], check=True)
    outcomes: list[Outcome] = []
    code: int | None = None
    try:
        begin = time.monotonic()
        demo.start()
        while READY not in demo.printed():
            is_early = time.monotonic() < begin + PATIENCE_S
            assert demo.process.poll() is None and is_early, demo.printed()
            time.sleep(0.25)
        start_s = time.monotonic() - begin
        for fault in faults:
            if time.monotonic() > deadline:
                break
            # A checkpoint is there, and no restart is the same as the one before.
            demo.wait_for_steps(3, PATIENCE_S)
            outcomes.append(one := strike(demo, fault, draw, start_s))
            print(one.line(), flush=True)
            if not one.by:
                print(demo.printed()[-3000:], file=sys.stderr)
                demo.kill()
                with suppress(OSError, IndexError):  # nothing to mend
                    fault.mend(demo)
                demo.start()
        demo.process.send_signal(signal.SIGTERM)
        code = demo.process.wait(timeout=PATIENCE_S)
        demo.wait_until_gone()
    finally:
        if demo.process.poll() is None:
            demo.kill()
    return outcomes, {
        "start_s": start_s,
        "left_in_order": code == EXIT_STOPPED,
        "left_behind": demo.left_behind,
    }


def compared(run: Path, undisturbed: Demo) -> dict[str, Any]:
    """Which kept rows are not those of a run that nothing happens to."""

    def rows(folder: Path) -> dict[int, dict[str, Any]]:
        return {
            row["step"]: {k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)}
            for row in read_metrics(folder)
        }

    mine = rows(run)
    missing = max(mine) - max(undisturbed.steps(), default=0)
    if missing > 0:
        undisturbed.start()
        try:
            undisturbed.wait_for_steps(missing, PATIENCE_S + 20.0 * missing)
            undisturbed.process.send_signal(signal.SIGTERM)
            undisturbed.process.wait(timeout=PATIENCE_S)
        finally:
            undisturbed.kill()
    right = rows(undisturbed.output)
    first, last = min(mine), max(mine)
    return {
        "steps": last,
        "steps_missing": sorted(set(range(first, last + 1)) - mine.keys()),
        "rows_that_differ": [step for step in mine if mine[step] != right.get(step)],
        "accuracy_at_the_end": mine[last]["reward/accuracy"],
        "accuracy_undisturbed": right[last]["reward/accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600.0, help="no fault after these")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--only", default="", metavar="PATTERN", help="of the faults' names")
    parser.add_argument("--reference", type=Path, default=Path("runs/chaos_undisturbed"))
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    given = parser.parse_args()
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        command = ["unshare", "--map-root-user", "--mount", "--", sys.executable, "-m"]
        os.execvp(command[0], [*command, "benchmarks.chaos", *sys.argv[1:]])
    if given.out.exists():
        parser.error(f"--out {given.out} exists; expected a new folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the demo is ended, too
    draw, deadline = random.Random(given.seed), time.monotonic() + 60.0 * given.minutes
    some = [fault for fault in FAULTS if re.search(given.only, fault.name)]
    rounds = -(-given.kills // len(some))
    drawn = [fault for _ in range(rounds) for fault in draw.sample(some, len(some))][: given.kills]
    outcomes: list[Outcome] = []
    runs: dict[str, Any] = {}
    print(TITLE)
    for needs in dict.fromkeys(fault.needs for fault in drawn):
        name = "two_ranks" if needs else "one_rank"
        overrides = [*needs, *given.overrides]
        demo = Demo(given.out.absolute() / name, overrides)
        mine = [fault for fault in drawn if fault.needs == needs]
        found, end = disturbed(demo, mine, draw, deadline)
        outcomes += found
        if found:
            end |= compared(demo.output, Demo(given.reference.absolute() / name, overrides))
        runs[name] = end
    print(json.dumps(summary(outcomes, runs)))


def summary(outcomes: Sequence[Outcome], runs: dict[str, Any]) -> dict[str, Any]:
    """The JSON."""
    recovered = [one for one in outcomes if one.by]
    return {
        "kills": len(outcomes),
        "recovered": len(recovered),
        "lost": len(outcomes) - len(recovered),
        "late": sum(one.is_late for one in recovered),
        "seconds_to_recover_median": statistics.median(one.seconds for one in recovered),
        "seconds_by_fault": {
            name: statistics.median(one.seconds for one in recovered if one.fault == name)
            for name in Counter(one.fault for one in recovered)
        },
        "runs": runs,
        "outcomes": [asdict(one) for one in outcomes],
    }


if __name__ == "__main__":
    main()
