"""report.html: one self-contained page about a run, made from its directory."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from gpg_megatron.observe.charts import N_COLORS, Kind, Panel, chart_svg
from gpg_megatron.observe.page import PAGE
from gpg_megatron.observe.rundir import Row, read_metrics, read_rollouts

SAMPLES_PER_STEP = 8

_EVAL = re.compile(r"eval/(?P<set>.+)/(?P<metric>(?:mean|pass|maj)@\d+)")
_LOOP = ("rollout", "reward", "policy", "sync")
_LABELS = {
    "reward/accuracy": "training accuracy",
    "reward/mean": "training reward",
    "mismatch/logprob_max": "max",
    "mismatch/logprob_mean": "mean",
    "throughput/rollout_tokens_per_s": "rollout",
    "throughput/policy_tokens_per_s": "policy",
}


def write_report(output_dir: str | Path) -> Path:
    """Write output_dir/report.html from metrics.jsonl, config.yaml and rollouts/.

    The page needs no network and no script, and follows the reader's light or dark theme.

    Raises:
        UserError: metrics.jsonl is missing, has no rows, or is malformed.
    """
    directory = Path(output_dir)
    rows = read_metrics(directory)
    config_path = directory / "config.yaml"
    config_text = config_path.read_text(encoding="utf-8") if config_path.is_file() else ""
    page = PAGE.substitute(
        title=escape(directory.resolve().name),
        subtitle=escape(_subtitle(rows, yaml.safe_load(config_text) or {})),
        tiles="".join(_tile(*tile) for tile in _headline(rows)),
        charts="".join(_figure(*chart, rows) for chart in _charts(rows)),
        samples=_samples_table(read_rollouts(directory)),
        metrics=_metrics_table(rows),
        config=escape(config_text),
    )
    path = directory / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def _subtitle(rows: Sequence[Row], config: Mapping[str, Any]) -> str:
    model = Path(str(config.get("model", {}).get("path", ""))).name
    policy = config.get("policy", {})
    sizes = [
        f"{name} {policy[key]}"
        for name, key in (
            ("TP", "tensor_model_parallel_size"),
            ("PP", "pipeline_model_parallel_size"),
            ("CP", "context_parallel_size"),
            ("DP", "data_parallel_size"),
        )
        if key in policy
    ]
    steps = f"{rows[-1]['step']} steps"
    return " · ".join(filter(None, (model, " × ".join(sizes), steps)))


def _headline(rows: Sequence[Row]) -> Iterable[tuple[str, str, str]]:
    """(value, label, remark) of each tile."""
    for key in _keys(rows, _EVAL):
        found = _EVAL.fullmatch(key)
        assert found is not None
        first, last = _ends(rows, key)
        yield f"{last:.3f}", f"held-out {found['metric']}", f"{found['set']}, from {first:.3f}"
    for key in _score_keys(rows):
        first, last = _ends(rows, key)
        yield f"{last:.3f}", _LABELS[key], f"from {first:.3f}"
    if _has(rows, "mismatch/logprob_max"):
        worst = max(_known(rows, "mismatch/logprob_max"))
        yield f"{worst:.1e}", "largest log-prob mismatch", "engine against policy, nats"
    if _has(rows, "timing/step_s"):
        seconds = _known(rows, "timing/step_s")
        yield _duration(sum(seconds)), "in steps", f"{sum(seconds) / len(seconds):.1f} s a step"
    if _has(rows, "throughput/rollout_tokens_per_s"):
        speed = _known(rows, "throughput/rollout_tokens_per_s")
        yield f"{sum(speed) / len(speed):,.0f}", "rollout tokens/s", "mean of the steps"
    if _has(rows, "memory/rss_gb"):
        yield f"{max(_known(rows, 'memory/rss_gb')):.1f} GB", "peak memory", "resident, whole run"


def _charts(rows: Sequence[Row]) -> Iterable[tuple[str, str, list[Panel]]]:
    """(title, remark, panels) of each chart that has data."""
    drawn = (
        ("Accuracy", "Share of right answers, in training and on held-out problems.",
         [_panel(rows, "share", [*_score_keys(rows), *_keys(rows, _EVAL)])]),
        ("Live groups and alpha", "Live: answers of both kinds. Alpha makes up for the others.",
         [_panel(rows, "live share", ["group/live_fraction"]),
          _panel(rows, "alpha", ["group/alpha"])]),
        ("Loss and gradient norm", "The gradient norm is the one before clipping.",
         [_panel(rows, "loss", ["policy/loss"]),
          _panel(rows, "gradient norm", ["policy/grad_norm"])]),
        ("Log-prob mismatch", "|engine - policy| over the sampled tokens.",
         [_panel(rows, "nats", ["mismatch/logprob_max", "mismatch/logprob_mean"], kind="log")]),
        ("Time by phase", "What a step is made of.", [_timing_panel(rows)]),
        ("Throughput", "Tokens sampled and tokens trained on, per second of their phase.",
         [_panel(rows, "tokens/s",
                 ["throughput/rollout_tokens_per_s", "throughput/policy_tokens_per_s"])]),
    )  # fmt: skip
    for title, remark, panels in drawn:
        if panels := [panel for panel in panels if panel.series]:
            yield title, remark, panels


def _panel(rows: Sequence[Row], label: str, keys: Sequence[str], kind: Kind = "line") -> Panel:
    series = {_label(key): _values(rows, key) for key in keys if _has(rows, key)}
    values = [v for vs in series.values() for v in vs if math.isfinite(v)]
    is_share = "share" in label and all(0 <= v <= 1 for v in values)
    limits = (-0.02, 1.02) if is_share else None
    return Panel(label=label, series=series, kind=kind, limits=limits)


def _timing_panel(rows: Sequence[Row]) -> Panel:
    """Seconds by phase, in the order of the loop. What no phase names, and phases for which
    there is no colour left, are "other"."""
    keys = [k for k in _keys(rows, re.compile(r"timing/.+_s")) if k != "timing/step_s"]
    largest = sorted(keys, key=lambda k: -sum(_known(rows, k)))[: N_COLORS - 1]
    phases = {key.removeprefix("timing/").removesuffix("_s"): key for key in largest}
    names = sorted(phases, key=lambda n: (_LOOP.index(n) if n in _LOOP else len(_LOOP), n))
    series = {name: _values(rows, phases[name]) for name in names}
    if series and _has(rows, "timing/step_s"):
        totals = _values(rows, "timing/step_s")
        named = [
            sum(v for v in seconds if math.isfinite(v))
            for seconds in zip(*series.values(), strict=True)
        ]
        series["other"] = [max(0.0, t - n) for t, n in zip(totals, named, strict=True)]
    return Panel(label="seconds", series=series, kind="stack")


def _figure(title: str, remark: str, panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    svg = chart_svg([row["step"] for row in rows], panels, title)
    heading = f"<h3>{escape(title)}</h3><p>{escape(remark)}</p>"
    return f'<figure aria-label="{escape(title)}">{heading}{svg}</figure>'


def _samples_table(rollouts: Mapping[int, Sequence[Row]]) -> str:
    rows = [row for samples in rollouts.values() for row in samples[:SAMPLES_PER_STEP]]
    if not rows:
        return "<p>No completions were written (logging.rollout_samples is 0).</p>"
    head = "".join(f"<th>{name}</th>" for name in ("step", "prompt", "truth", "response"))
    head += "<th>verdict</th><th class=n>advantage</th>"
    groups = groupby(rows, key=lambda row: (row["step"], row["group"]))
    body = "".join(_sample_group(list(group)) for _, group in groups)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _sample_group(rows: Sequence[Row]) -> str:
    """Table rows of completions that share a prompt, which is shown once."""
    first, span = rows[0], f"rowspan={len(rows)}"
    shared = (
        f"<td {span}>{first['step']}</td><td {span}><pre>{escape(first['prompt'])}</pre></td>"
        f"<td {span}><pre>{escape(first['ground_truth'])}</pre></td>"
    )
    cells = [_sample_cells(row) for row in rows]
    return f"<tr>{shared}{cells[0]}</tr>" + "".join(f"<tr>{cell}</tr>" for cell in cells[1:])


def _sample_cells(row: Row) -> str:
    right = row["accuracy"] == 1.0
    verdict = "✓ right" if right else "✗ wrong"
    if row["reward"] != row["accuracy"]:
        verdict += f" ({_number(row['reward'])})"
    return (
        f"<td><pre>{escape(row['response'])}</pre></td>"
        f"<td class={'right' if right else 'wrong'}>{verdict}</td>"
        f"<td class=n>{_number(row['advantage'])}</td>"
    )


def _metrics_table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th class=n>{name}</th>" for name in ("first", "last", "min", "max"))
    body = []
    for key in sorted({key for row in rows for key in row} - {"step"}):
        if values := _known(rows, key):
            cells = (values[0], values[-1], min(values), max(values))
            numbers = "".join(f"<td class=n>{_number(value)}</td>" for value in cells)
            body.append(f"<tr><td><code>{escape(key)}</code></td>{numbers}</tr>")
    head = f"<thead><tr><th>metric</th>{head}</tr></thead>"
    return f"<table>{head}<tbody>{''.join(body)}</tbody></table>"


def _tile(value: str, label: str, remark: str) -> str:
    return (
        f"<div class=tile><b>{escape(value)}</b><span>{escape(label)}</span>"
        f"<small>{escape(remark)}</small></div>"
    )


def _label(key: str) -> str:
    found = _EVAL.fullmatch(key)
    return f"{found['set']} {found['metric']}" if found else _LABELS.get(key, key)


def _keys(rows: Sequence[Row], pattern: re.Pattern[str]) -> list[str]:
    keys = sorted({key for row in rows for key in row if pattern.fullmatch(key)})
    return [key for key in keys if _has(rows, key)]


def _known(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _has(rows: Sequence[Row], key: str) -> bool:
    return bool(_known(rows, key))


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [math.nan if row.get(key) is None else float(row[key]) for row in rows]


def _ends(rows: Sequence[Row], key: str) -> tuple[float, float]:
    values = _known(rows, key)
    return values[0], values[-1]


def _score_keys(rows: Sequence[Row]) -> list[str]:
    """Accuracy, and the mean reward where it says something else."""
    keys = [key for key in ("reward/accuracy", "reward/mean") if _has(rows, key)]
    same = len(keys) == 2 and all(row.get(keys[0]) == row.get(keys[1]) for row in rows)
    return keys[:1] if same else keys


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
