"""How fast each method learns the same task: GPG's variants, GRPO, RLOO, several seeds each.

    python -m benchmarks.learning --out runs/learning [--seeds 5] [--steps 40] [a.b=value ...]

Every run is a real gpg-train, one after the other. A run whose result.json exists is not
repeated, so the command can be stopped and started again. At the end, and after every run, the
results so far are written:

    OUT/<method>/seed<k>/result.json   accuracy and generated tokens of every step
    OUT/learning.md                    a table: mean and spread over the seeds
    OUT/learning.json                  the same with the curves
    OUT/learning.png                   accuracy against steps, and against generated tokens

With --scoreboard every preset is run on-policy and off it, and what comes of it is scoreboard.py's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.scoreboard import arms, write_scoreboard
from gpg_megatron.config.algorithm import PRESETS
from gpg_megatron.config.loading import load_config
from gpg_megatron.errors import UserError, exit_codes
from gpg_megatron.observe.rundir import METRICS, read_metrics

DEMO = Path("configs/demo_cpu.yaml")
# Name -> what it changes. The presets not named here can be asked for, too.
METHODS: dict[str, tuple[str, ...]] = {
    "gpg": (),
    "gpg-alpha-none": ("algorithm.alpha=none",),
    **{name: (f"algorithm.preset={name}",) for name in ("amap", "verl", "grpo", "rloo")},
}
OTHERS = {
    name: (f"algorithm.preset={name}",) for name in PRESETS if name not in {*METHODS, "paper"}
}
RUN_LIMIT_S = 4 * 3600
HELD_OUT = re.compile(r"eval/.+/mean@\d+")
GROUPS = (("drawn", 1), ("carried_in", 1), ("carried_out", -1), ("filtered", -1))
"""What adds up to the groups that a step trains on."""
GRID = 200
"""Points of a curve over generated tokens."""


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--config", type=Path, default=DEMO, help="what the methods have in common")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 .. N for each method")
    parser.add_argument("--steps", type=int, help="default: those of the configuration")
    parser.add_argument("--methods", help="names with commas between; default: all")
    parser.add_argument("--scoreboard", action="store_true", help="all presets at equal tokens")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="for every run")
    args = parser.parse_args(argv)
    # Ends by an exception, so that subprocess.run ends the training that it waits for.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    common = [*args.overrides]
    common += [f"trainer.total_training_steps={args.steps}"] if args.steps else []
    known = METHODS | OTHERS
    if args.scoreboard:
        known = arms(load_config(args.config, common).trainer)
    methods = (
        args.methods.split(",") if args.methods else [*(known if args.scoreboard else METHODS)]
    )
    for name in methods:
        if name not in known:
            raise UserError(f"--methods: no {name!r}; expected some of {', '.join(known)}")
    report = write_scoreboard if args.scoreboard else write_report
    results = []
    for seed in range(1, args.seeds + 1):  # seed by seed: what exists is always comparable
        for name in methods:
            overrides = [*common, *known[name], f"trainer.seed={seed}"]
            load_config(args.config, overrides)  # a mistake is better found now
    for seed in range(1, args.seeds + 1):
        for name in methods:
            overrides = [*common, *known[name], f"trainer.seed={seed}"]
            results.append(run(args.out / name / f"seed{seed}", name, seed, args.config, overrides))
            text = report(args.out, methods, results)
    print(text)
    return 0


def run(
    folder: Path, method: str, seed: int, config: Path, overrides: Sequence[str]
) -> dict[str, Any]:
    """Train once, unless it was done; what result.json holds.

    A run that fails is a result, too: its steps so far and the line that it ended with.

    Raises:
        UserError: the folder holds a result of other settings, or gpg-train refused these.
    """
    settings = {"config": config.read_text(encoding="utf-8"), "overrides": list(overrides)}
    path = folder / "result.json"
    if path.exists():
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if result["settings"] != settings:
            raise UserError(f"{path} is of other settings; expected the same, or another --out")
        print(f"{method}, seed {seed}: already there", flush=True)
        return result
    shutil.rmtree(folder, ignore_errors=True)  # metrics of a run that was stopped
    folder.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "gpg_megatron.start.train",
        "--config",
        str(config),
        *overrides,
    ]
    command += [f"trainer.output_dir={folder}", "logging.tensorboard=false"]
    with (folder / "stdout.log").open("w") as out, (folder / "stderr.log").open("w") as err:
        done = subprocess.run(
            command, stdout=out, stderr=err, env=os.environ, timeout=RUN_LIMIT_S, check=False
        )
    lines = (folder / "stderr.log").read_text(encoding="utf-8").splitlines() or [""]
    began = (folder / METRICS).exists()
    if not began or done.returncode == 2 or done.returncode >= 128 or done.returncode < 0:
        raise UserError(f"{method}, seed {seed}: gpg-train ended ({done.returncode}): {lines[-1]}")
    result = {"method": method, "seed": seed, "settings": settings}
    result |= curves(read_metrics(folder))
    errors = [line for line in lines if line.startswith("error: ")] or lines
    result["ended"] = errors[0] if done.returncode else ""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(path)
    print(f"{method}, seed {seed}: {describe(result)}", flush=True)
    return result


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is compared, from metrics.jsonl.

    Returns:
        accuracy: [steps] of the samples that each step drew, before its update;
        tokens: [steps] response tokens sampled up to the end of each step;
        live: [steps] share of live groups; alpha: [steps]; groups: [steps] that were trained on;
        held_out: {step: accuracy}, the mean over the validation sets.
    """
    steps = [row for row in rows if row["step"] > 0]
    held_out = {}
    for row in rows:
        values = [v for k, v in row.items() if HELD_OUT.fullmatch(k) and v is not None]
        if values:
            held_out[str(row["step"])] = fmean(values)
    return {
        "accuracy": [row["reward/accuracy"] for row in steps],
        "tokens": np.cumsum([row["response/tokens"] for row in steps]).tolist(),
        "live": [row["group/live_fraction"] for row in steps],
        "alpha": [row["group/alpha"] for row in steps],
        "groups": [sum(sign * row[f"group/{name}"] for name, sign in GROUPS) for row in steps],
        "held_out": held_out,
    }


def describe(result: Mapping[str, Any]) -> str:
    """One line about one run."""
    if result["ended"]:
        return f"ended after {len(result['accuracy'])} steps: {result['ended']}"
    held_out = list(result["held_out"].values())
    text = f"training accuracy {result['accuracy'][0]:.3f} -> {result['accuracy'][-1]:.3f}"
    return f"{text}, held-out {held_out[0]:.3f} -> {held_out[-1]:.3f}" if held_out else text


def summary(methods: Sequence[str], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method that has a result.

    Numbers over seeds are [mean, least, largest]. Runs that failed count in `failed` alone.
    """
    rows = []
    for method in methods:
        own = [r for r in results if r["method"] == method]
        good = [r for r in own if not r["ended"]]
        row: dict[str, Any] = {"method": method, "seeds": len(own), "failed": len(own) - len(good)}
        row["held_out_before"] = _spread([_end(r, 0) for r in good])
        row["held_out_after"] = _spread([_end(r, -1) for r in good])
        row["mean_accuracy"] = _spread([fmean(r["accuracy"]) for r in good])
        row["last_accuracy"] = _spread([fmean(r["accuracy"][-5:]) for r in good])
        row["tokens"] = _spread([r["tokens"][-1] for r in good])
        if own:
            rows.append(row)
    return rows


def _end(result: Mapping[str, Any], which: int) -> float | None:
    return list(result["held_out"].values())[which] if result["held_out"] else None


def _spread(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return [fmean(known), min(known), max(known)] if known else None


_COLUMNS = (
    ("held-out before", "held_out_before", ".3f"),
    ("held-out after", "held_out_after", ".3f"),
    ("training, last 5 steps", "last_accuracy", ".3f"),
    ("training, all steps", "mean_accuracy", ".3f"),
    ("generated tokens", "tokens", ",.0f"),
)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: mean (least to largest over the seeds)."""
    lines = ["| method | seeds | " + " | ".join(title for title, _, _ in _COLUMNS) + " |"]
    lines.append("|---" * (2 + len(_COLUMNS)) + "|")
    for row in rows:
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        cells = [f"{row['method']}", f"{row['seeds']}{failed}"]
        for _, key, spec in _COLUMNS:
            value = row[key]
            if value is None:
                cells.append("-")
                continue
            mean, low, high = (format(x, spec) for x in value)
            cells.append(mean if low == high else f"{mean} ({low} to {high})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_report(out: Path, methods: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    """Table, JSON and plot of the results so far; returns the table."""
    rows = summary(methods, results)
    (out / "learning.md").write_text(table(rows), encoding="utf-8")
    record = {"summary": rows, "runs": list(results)}
    (out / "learning.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot(out / "learning.png", methods, results)
    return table(rows)


def over_tokens(runs: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies of several runs at the same numbers of generated tokens.

    A step's accuracy stands where its samples were drawn: at the tokens before it. Between two
    steps it is interpolated.

    Returns:
        [GRID] tokens that every run reached, [runs, GRID] accuracies.
    """
    begins = [np.concatenate([[0.0], run["tokens"][:-1]]) for run in runs]
    first, last = max(b[0] for b in begins), min(b[-1] for b in begins)
    grid = np.linspace(first, last, GRID)
    rows = [np.interp(grid, b, run["accuracy"]) for b, run in zip(begins, runs, strict=True)]
    return grid, np.stack(rows)


def plot(path: Path, methods: Sequence[str], results: Sequence[Mapping[str, Any]]) -> None:
    """The mean of the seeds as a line, from the least to the largest as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_step, by_token) = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for number, method in enumerate(methods):
        runs = [r for r in results if r["method"] == method and not r["ended"]]
        if not runs:
            continue
        colour = f"C{number}"
        n_steps = min(len(run["accuracy"]) for run in runs)
        accuracy = np.stack([run["accuracy"][:n_steps] for run in runs])
        tokens = over_tokens(runs)
        steps = np.arange(1, n_steps + 1)
        for axis, x, y in ((by_step, steps, accuracy), (by_token, *tokens)):
            axis.plot(x, y.mean(0), color=colour, label=f"{method} ({len(runs)})")
            axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)
    by_step.set(xlabel="step", ylabel="training accuracy")
    by_token.set(xlabel="generated tokens")
    by_step.legend(title="method (seeds)")
    for axis in (by_step, by_token):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
