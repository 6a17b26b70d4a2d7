"""Seconds of a whole step by phase, drawing ahead switched off and on.

    python -m benchmarks.loop --config FILE [--steps 12] [--repeats 2] [a.b=value ...]

Real gpg-train runs, off and on by turns, so that a busy machine slows both. The first two steps of
a run are left out: they warm up. Medians over the other steps. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import machine
from gpg_megatron.observe.rundir import read_metrics

N_WARM_UP = 2
RUN_LIMIT_S = 3600
MODES = {"off": "trainer.max_staleness=0", "on": "trainer.max_staleness=1"}
COLUMNS = ("rollout", "reward", "policy", "wait", "sync", "step")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/demo_cpu.yaml"))
    parser.add_argument("--steps", type=int, default=12, help=f"more than {N_WARM_UP}")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="for every run")
    args = parser.parse_intermixed_args()
    if args.steps <= N_WARM_UP:
        parser.error(f"--steps: expected more than {N_WARM_UP}")
    print(f"{machine()}; {args.repeats} runs of {args.steps} steps each way")
    steps: dict[str, list[Mapping[str, Any]]] = {mode: [] for mode in MODES}
    for _ in range(args.repeats):
        for mode, override in MODES.items():
            steps[mode] += train(args.config, [*args.overrides, override], args.steps)
    seconds = {mode: medians(rows) for mode, rows in steps.items()}
    print(table(seconds))
    off, on = seconds["off"]["step"], seconds["on"]["step"]
    print(json.dumps({"step_s_off": off, "step_s_on": on, "speedup_ahead": round(off / on, 3)}))


def train(config: Path, overrides: Sequence[str], steps: int) -> list[Mapping[str, Any]]:
    """The metrics of each step of one run that are measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gpg_megatron.start.train", "--config", str(config)]
        command += [*overrides, f"trainer.total_training_steps={steps}"]
        command += [f"trainer.output_dir={folder}/run", "validation.before_train=false"]
        command += ["checkpoint.save_freq=0", "checkpoint.hf_export=never"]
        done = subprocess.run(command, timeout=RUN_LIMIT_S, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"gpg-train ended with {done.returncode}: {done.stderr}")
        return [row for row in read_metrics(Path(folder) / "run") if row["step"] > N_WARM_UP]


def medians(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Phase -> its median seconds; 0 where a run has no such phase."""
    return {
        name: round(median(row.get(f"timing/{name}_s", 0.0) for row in rows), 3) for name in COLUMNS
    }


def table(seconds: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown."""
    lines = ["| drawing ahead | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for mode, row in seconds.items():
        lines.append(f"| {mode} | " + " | ".join(f"{row[name]:.2f}" for name in COLUMNS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
