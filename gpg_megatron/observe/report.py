"""report.html: one self-contained page about a run, made from its directory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gpg_megatron.errors import writing
from gpg_megatron.observe.charts import N_COLORS, Kind, Panel, chart_svg
from gpg_megatron.observe.page import PAGE
from gpg_megatron.observe.rundir import Row, damage, read_metrics, read_rollouts

if TYPE_CHECKING:
    from pandas import DataFrame

SAMPLES_PER_STEP = 8

_EVAL = re.compile(r"eval/.+/(?:mean|pass|maj)@\d+")
_LOOP = ("rollout", "reward", "policy", "sync")
_SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "DP": "data_parallel_size",
}
_HOLDERS = ("policy", "engines", "other")
_LABELS = {
    "reward/accuracy": "training accuracy",
    "reward/mean": "training reward",
    "mismatch/logprob_max": "max",
    "mismatch/logprob_mean": "mean",
    "throughput/rollout_tokens_per_s": "rollout",
    "throughput/policy_tokens_per_s": "policy",
    "memory/rss_gb": "all",
    **{f"memory/{holder}_gb": holder for holder in _HOLDERS},
}


def write_report(output_dir: str | Path) -> Path:
    """Write output_dir/report.html from metrics.jsonl, config.yaml and rollouts/.

    The page needs no network and no script, and follows the reader's light or dark theme.

    Raises:
        UserError: metrics.jsonl is missing or has no rows.
    """
    from jinja2 import Environment
    from pandas import DataFrame

    directory = Path(output_dir)
    frame = DataFrame(read_metrics(directory)).set_index("step").dropna(axis=1, how="all")
    config_path = directory / "config.yaml"
    config = config_path.read_text(encoding="utf-8") if config_path.is_file() else ""
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["number"] = _number
    page = environment.from_string(PAGE).render(
        title=directory.resolve().name,
        subtitle=_subtitle(frame, yaml.safe_load(config) or {}, damage(directory)),
        tiles=_tiles(frame),
        charts=[(*words, chart_svg(frame.index, panels, words[0]))
                for *words, panels in _charts(frame)],
        samples=_samples(read_rollouts(directory)),
        metrics=[(key, (*_ends(frame, key), frame[key].min(), frame[key].max()))
                 for key in sorted(frame)],
        config=config,
    )  # fmt: skip
    path = directory / "report.html"
    partial = path.with_suffix(".partial")
    with writing(path):
        # A response may hold halves of surrogate pairs.
        partial.write_text(page, encoding="utf-8", errors="replace")
        os.replace(partial, path)
    return path


def _subtitle(frame: DataFrame, config: Mapping[str, Any], damaged: str | None) -> str:
    model = Path(str(config.get("model", {}).get("path", ""))).name
    policy = config.get("policy", {})
    sizes = " × ".join(f"{name} {policy[key]}" for name, key in _SIZES.items() if key in policy)
    return " · ".join(filter(None, (model, sizes, f"{frame.index[-1]} steps", damaged)))


def _tiles(frame: DataFrame) -> Iterator[tuple[str, str, str]]:
    """(value, label, remark) of each."""
    for key in _eval_keys(frame):
        data_set, _, metric = key.removeprefix("eval/").rpartition("/")
        first, last = _ends(frame, key)
        yield f"{last:.3f}", f"held-out {metric}", f"{data_set}, from {first:.3f}"
    for key in _score_keys(frame):
        first, last = _ends(frame, key)
        yield f"{last:.3f}", _LABELS[key], f"from {first:.3f}"
    if "mismatch/logprob_max" in frame:
        worst = frame["mismatch/logprob_max"].max()
        yield f"{worst:.1e}", "largest log-prob mismatch", "engine against policy, nats"
    if "timing/step_s" in frame:
        seconds = frame["timing/step_s"]
        yield _duration(seconds.sum()), "in steps", f"{seconds.mean():.1f} s a step"
    if "throughput/rollout_tokens_per_s" in frame:
        speed = frame["throughput/rollout_tokens_per_s"].mean()
        yield f"{speed:,.0f}", "rollout tokens/s", "mean of the steps"
    if "memory/rss_gb" in frame:
        yield f"{frame['memory/rss_gb'].max():.1f} GB", "peak memory", "resident, whole run"


def _charts(frame: DataFrame) -> Iterator[tuple[str, str, list[Panel]]]:
    """(title, remark, panels) of each chart that has data."""
    drawn = (
        ("Accuracy", "Share of right answers, in training and on held-out problems.",
         [_panel(frame, "share", [*_score_keys(frame), *_eval_keys(frame)])]),
        ("Live groups and alpha", "Live: answers of both kinds. Alpha makes up for the others.",
         [_panel(frame, "live share", ["group/live_fraction"]),
          _panel(frame, "alpha", ["group/alpha", "group/alpha_effective"])]),
        ("Loss and gradient norm", "The gradient norm is the one before clipping.",
         [_panel(frame, "loss", ["policy/loss"]),
          _panel(frame, "gradient norm", ["policy/grad_norm"])]),
        ("Log-prob mismatch", "|engine - policy| over the sampled tokens.",
         [_panel(frame, "nats", ["mismatch/logprob_max", "mismatch/logprob_mean"], kind="log")]),
        ("Effective sample size", "Of the ratios, and of the weights that are left of them.",
         [_panel(frame, "share", ["correction/ess", "correction/ess_cut"])]),
        ("Age of the groups", "In rollout batches; and what was not yet in a batch.",
         [_panel(frame, "share", sorted(frame.filter(regex="^staleness/batch_"), key=_last_number)),
          _panel(frame, "groups", ["stream/ready", "stream/in_flight", "stream/waiting"])]),
        ("Time by phase", "What a step is made of.", [_timing_panel(frame)]),
        ("Throughput", "Tokens sampled and tokens trained on, per second of their phase.",
         [_panel(frame, "tokens/s",
                 ["throughput/rollout_tokens_per_s", "throughput/policy_tokens_per_s"])]),
        ("Memory", "Resident on rank 0's host. Other: the launcher, Ray, processes that score.",
         [_panel(frame, "GB", ["memory/rss_gb", *(f"memory/{part}_gb" for part in _HOLDERS)])]),
    )  # fmt: skip
    for title, remark, panels in drawn:
        if panels := [panel for panel in panels if panel.series]:
            yield title, remark, panels


def _panel(frame: DataFrame, label: str, keys: Sequence[str], kind: Kind = "line") -> Panel:
    found = [key for key in keys if key in frame]
    values = frame[found].stack().dropna()
    is_share = "share" in label and values.between(0, 1).all()
    limits = (-0.02, 1.02) if is_share else None
    series = {_label(key): frame[key] for key in found}
    return Panel(label=label, series=series, kind=kind, limits=limits)


def _last_number(key: str) -> int:
    return int(key.rpartition("_")[2])


def _timing_panel(frame: DataFrame) -> Panel:
    """Seconds by phase, in the order of the loop. What no phase names, and phases for which
    there is no colour left, are "other"."""
    phases = frame.filter(regex="^timing/.+_s$").rename(columns=lambda key: key[7:-2])
    steps = phases.pop("step") if "step" in phases else None
    largest = phases[phases.sum().nlargest(N_COLORS - 1).index]
    order = sorted(largest, key=lambda n: (_LOOP.index(n) if n in _LOOP else len(_LOOP), n))
    series = {name: largest[name] for name in order}
    if series and steps is not None:
        series["other"] = (steps - largest.sum(axis=1)).clip(lower=0)
    return Panel(label="seconds", series=series, kind="stack")


def _samples(rollouts: Mapping[int, Sequence[Row]]) -> list[list[Row]]:
    """Rows of the table, grouped by the prompt that they share, which is shown once."""
    rows = [row for samples in rollouts.values() for row in samples[:SAMPLES_PER_STEP]]
    groups = groupby(rows, key=lambda row: (row["step"], row["group"]))
    return [list(group) for _, group in groups]


def _label(key: str) -> str:
    if _EVAL.fullmatch(key):
        return " ".join(key.removeprefix("eval/").rsplit("/", 1))
    return _LABELS.get(key, key)


def _eval_keys(frame: DataFrame) -> list[str]:
    return [key for key in sorted(frame) if _EVAL.fullmatch(key)]


def _score_keys(frame: DataFrame) -> list[str]:
    """Accuracy, and the mean reward where it says something else."""
    keys = [key for key in ("reward/accuracy", "reward/mean") if key in frame]
    same = len(keys) == 2 and frame[keys[0]].equals(frame[keys[1]])
    return keys[:1] if same else keys


def _ends(frame: DataFrame, key: str) -> tuple[float, float]:
    known = frame[key].dropna()
    return known.iloc[0], known.iloc[-1]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
