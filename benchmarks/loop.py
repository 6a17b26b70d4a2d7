"""Seconds of a whole step by phase, and held-out accuracy, for engines that run ahead by K batches.

    python -m benchmarks.loop --config FILE [--steps 12] [--repeats 2] [a.b=value ...]

Real gpg-train runs, by turns, so that a busy machine slows all. The first two steps of a run are
left out: they warm up. Medians over the other steps; accuracy is the mean of the runs, each with a
seed of its own, and its range. `algorithm.correction` is auto unless a row says otherwise. Last
line: JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.machine import machine
from gpg_megatron.observe.rundir import read_metrics

N_WARM_UP = 2
RUN_LIMIT_S = 3600
UNCORRECTED = "algorithm.correction=none"
IN_FLIGHT = "rollout.update=in-flight"
MODES = {
    "K = 0": ["trainer.max_staleness=0"],
    "K = 1": ["trainer.max_staleness=1"],
    "K = 2, in flight": ["trainer.max_staleness=2", IN_FLIGHT],
    "K = 4, in flight": ["trainer.max_staleness=4", IN_FLIGHT],
    "K = 1, uncorrected": ["trainer.max_staleness=1", UNCORRECTED],
    "K = 2, in flight, uncorrected": ["trainer.max_staleness=2", IN_FLIGHT, UNCORRECTED],
    "K = 4, in flight, uncorrected": ["trainer.max_staleness=4", IN_FLIGHT, UNCORRECTED],
}
COLUMNS = ("rollout", "reward", "policy", "wait", "idle", "sync", "step")


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
    print(f"{machine()}; {args.repeats} runs of {args.steps} steps each")
    steps: dict[str, list[Mapping[str, Any]]] = {mode: [] for mode in MODES}
    for seed in range(1, args.repeats + 1):
        for mode, overrides in MODES.items():
            own = [*args.overrides, *overrides, f"trainer.seed={seed}"]
            steps[mode] += train(args.config, own, args.steps)
    seconds = {mode: medians(rows) for mode, rows in steps.items()}
    print(table(seconds, {mode: accuracies(rows) for mode, rows in steps.items()}))
    first = seconds["K = 0"]["step"]
    print(json.dumps({mode: round(first / row["step"], 3) for mode, row in seconds.items()}))


def train(config: Path, overrides: Sequence[str], steps: int) -> list[Mapping[str, Any]]:
    """The metrics of each step of one run that are measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gpg_megatron.start.train", "--config", str(config)]
        command += [*overrides, f"trainer.total_training_steps={steps}"]
        command += [f"trainer.output_dir={folder}/run", "validation.before_train=false"]
        command += ["checkpoint.save_freq=0", "checkpoint.hf_export=never", "trainer.test_freq=0"]
        done = subprocess.run(command, timeout=RUN_LIMIT_S, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"gpg-train ended with {done.returncode}: {done.stderr}")
        return [row for row in read_metrics(Path(folder) / "run") if row["step"] > N_WARM_UP]


def medians(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Phase -> its median seconds; 0 where a run has no such phase."""
    return {
        name: round(median(row.get(f"timing/{name}_s", 0.0) for row in rows), 3) for name in COLUMNS
    }


def accuracies(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Held-out, after the last step of each run."""
    return [
        value
        for row in rows
        for key, value in row.items()
        if key.startswith("eval/") and not key.endswith("/ci95")
    ]


def table(seconds: Mapping[str, Mapping[str, float]], found: Mapping[str, Sequence[float]]) -> str:
    """Markdown."""
    lines = [
        "| ahead | " + " | ".join(COLUMNS) + " | accuracy |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for mode, row in seconds.items():
        cells = [mode, *(f"{row[name]:.2f}" for name in COLUMNS)]
        values = found[mode]
        cells.append(f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
