"""What each method is worth at equal generated tokens, on-policy and off it; for
`python -m benchmarks.learning --scoreboard`.

    OUT/scoreboard.md     a table: held-out accuracy, mean and 95 % interval over the seeds
    OUT/scoreboard.json   the same, and the curves of every run
    OUT/scoreboard.png    the accuracies as bars
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import inf, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from gpg_megatron.config.algorithm import PRESETS
from gpg_megatron.config.sections import TrainerConfig

T_95 = (inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided, by degrees of freedom; beyond the last 1.96 will do."""
WANTED = 0.9
"""Held-out accuracy that runs are timed to, in tokens."""
COLLAPSED = 0.5
"""A run whose last held-out accuracy is below this share of its best has collapsed."""


def arms(config: TrainerConfig) -> dict[str, tuple[str, ...]]:
    """Name -> what it changes. config: what the arms have in common.

    Every preset with one update for each batch and with 4 ("x4"). The paper's objective also with
    16 ("x16") and with batches that are one and three steps old ("old1", "old3"), where GRPO is
    beside it: with what is the default there, without a correction ("none"), with a correction
    alone ("weighed"), and with that and ess_lr ("ess"). Batches of a fourth and of a sixteenth,
    with one update each ("small4", "small16"), take as many updates of as many prompts as x4 and
    x16, all of them on-policy: what these lose beyond is what off-policyness costs. And redraws
    with each curriculum, for data of few enough prompts that they come again.
    """
    batch_size = config.train_batch_size
    parts = [n for n in (4, 16) if batch_size % n == 0]
    presets = {name: (f"algorithm.preset={name}",) for name in PRESETS}
    ways = {f"x{n}": (f"trainer.mini_batch_size={batch_size // n}",) for n in parts} | {
        f"old{n}": (f"trainer.max_staleness={n}",) for n in (1, 3)
    }
    kinds = {
        "-none": ("algorithm.correction=none",),
        "-weighed": ("algorithm.target_kl=0",),
        "": (),
        "-ess": ("algorithm.target_kl=0", "algorithm.ess_lr=true"),
    }
    paper = {
        f"paper-{way}{kind}": (*keys, *more)
        for way, keys in ways.items()
        for kind, more in kinds.items()
    }
    small = {
        f"paper-small{n}": (
            f"trainer.train_batch_size={batch_size // n}",
            f"trainer.total_training_steps={n * config.total_training_steps}",
            f"trainer.test_freq={n * config.test_freq}",
        )
        for n in parts
    }
    others = {
        f"{name}-{way}": (*keys, *ways[way])
        for way in ways
        for name, keys in presets.items()
        if way == "x4" or name == "grpo"
    }
    redraws = {
        f"paper-redraw-{kind}": ("algorithm.beta_th=0.6", f"data.curriculum={kind}")
        for kind in ("none", "thompson", "pools")
    }
    return presets | others | small | paper | redraws


def held_out_at(result: Mapping[str, Any], budget: float) -> float:
    """Held-out accuracy after so many generated tokens, between two evaluations interpolated."""
    steps = sorted(map(int, result["held_out"]))
    tokens = [0, *result["tokens"]]
    accuracy = [result["held_out"][str(step)] for step in steps]
    return float(np.interp(budget, [tokens[step] for step in steps], accuracy))


def tokens_to(result: Mapping[str, Any], accuracy: float) -> float | None:
    """Generated tokens at the first evaluation that has this held-out accuracy; None: none has."""
    tokens = [0, *result["tokens"]]
    return next((tokens[int(s)] for s, a in result["held_out"].items() if a >= accuracy), None)


def tokens_per_live_group(result: Mapping[str, Any]) -> float:
    """Generated tokens over the live groups that were trained on."""
    live = sum(share * n for share, n in zip(result["live"], result["groups"], strict=True))
    return float(result["tokens"][-1] / max(live, 1.0))


def scores(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each arm that has a result; all are held against each other at the tokens that
    every run reached. Runs that failed, and those without an evaluation, count as failed alone."""
    good = [r for r in results if not r["ended"] and r["held_out"]]
    budget = min((r["tokens"][-1] for r in good), default=0)
    rows = []
    for name in names:
        all_of_it = [r for r in results if r["method"] == name]
        own = [r for r in good if r["method"] == name]
        if not all_of_it:
            continue
        found = [held_out_at(r, budget) for r in own]
        curves = [list(r["held_out"].values()) for r in own]
        rows.append(
            {
                "arm": name,
                "seeds": len(own),
                "failed": len(all_of_it) - len(own),
                "tokens": budget,
                "held_out": fmean(found) if found else None,
                "half_width": half_width(found),
                "all": found,
                "best": fmean(map(max, curves)) if curves else None,
                "last": fmean(curve[-1] for curve in curves) if curves else None,
                "per_live": fmean(map(tokens_per_live_group, own)) if own else None,
                "to_wanted": [tokens_to(r, WANTED) for r in own],
                "collapsed": sum(curve[-1] < COLLAPSED * max(curve) for curve in curves),
            }
        )
    return rows


def half_width(values: Sequence[float]) -> float | None:
    """Of the 95 % interval of their mean, by Student's t; None: fewer than two."""
    n = len(values)
    if n < 2:
        return None
    return (T_95[n - 1] if n <= len(T_95) else 1.96) * stdev(values) / sqrt(n)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    tokens = rows[0]["tokens"] if rows else 0
    head = (
        "arm",
        "seeds",
        f"held-out at {tokens:,} tokens",
        "best",
        "last",
        "collapsed",
        "tokens per live group",
        f"tokens to {WANTED}",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        seeds = f"{row['seeds']}" + (f" ({row['failed']} failed)" if row["failed"] else "")
        cells = [row["arm"], seeds]
        if row["held_out"] is None:
            cells += ["-"] * 6
        else:
            wide = row["half_width"]
            cells.append(f"{row['held_out']:.3f}" + ("" if wide is None else f" ± {wide:.3f}"))
            cells += [f"{row['best']:.3f}", f"{row['last']:.3f}", f"{row['collapsed']}"]
            cells.append(f"{row['per_live']:.1f}")
            cells.append(", ".join("-" if n is None else f"{n:,}" for n in row["to_wanted"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_scoreboard(out: Path, names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    """Table, JSON and plot of the results so far; returns the table."""
    rows = scores(names, results)
    record = {"rows": rows, "runs": list(results)}
    (out / "scoreboard.md").write_text(table(rows), encoding="utf-8")
    (out / "scoreboard.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot(out / "scoreboard.png", [row for row in rows if row["held_out"] is not None])
    return table(rows)


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A bar for each arm with its interval, and a point for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 1 + 0.28 * len(rows)))
    for place, row in enumerate(rows):
        axis.barh(place, row["held_out"], xerr=row["half_width"], color="C0", alpha=0.5)
        axis.plot(row["all"], [place] * len(row["all"]), ".", color="C1")
    axis.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    axis.set(xlabel="held-out accuracy at equal generated tokens", xlim=(0, 1))
    axis.invert_yaxis()
    axis.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
