"""Line charts as SVG text that takes its colours from the page it is put into."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["line", "log", "stack"]

N_COLORS = 6
"""The page defines --c0 .. --c5, and currentColor for text and axes."""
# Stand-ins that are replaced in the SVG text, since matplotlib only takes real colours.
_INK = "#010101"
_SERIES = tuple(f"#0101f{i}" for i in range(N_COLORS))
_STYLE: dict[Any, Any] = {
    **{
        f"{what}color": _INK
        for what in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.", "grid.")
    },
    "svg.fonttype": "none",
    "font.size": 8.5,
    "lines.linewidth": 1.6,
    "axes.grid": True,
    "grid.alpha": 0.13,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-3, 5),
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes over the steps."""

    label: str
    """What the values are, or their unit."""
    series: Mapping[str, Sequence[float]]
    """Name in the legend -> one value for each step, nan where there is none but not
    everywhere. At most N_COLORS of them in a stack."""
    kind: Kind = "line"
    limits: tuple[float, float] | None = None
    """Of the y axis; None: fitted to the values."""


def chart_svg(steps: Sequence[int], panels: Sequence[Panel], name: str) -> str:
    """The panels below each other over one step axis, as one <svg> element.

    `name` keeps the element ids of several charts on a page apart.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, panel in zip(axes, panels, strict=True):
            _draw(ax, steps, panel)
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _themed(buffer.getvalue())


def _draw(ax: Axes, steps: Sequence[int], panel: Panel) -> None:
    ax.set_ylabel(panel.label)
    edges = [*(step - 0.5 for step in steps), steps[-1] + 0.5]
    bottom = [0.0] * len(steps)
    for (name, values), color in zip(panel.series.items(), cycle(_SERIES), strict=False):
        if panel.kind == "stack":
            top = [
                b + (v if math.isfinite(v) else 0.0) for b, v in zip(bottom, values, strict=True)
            ]
            ax.stairs(top, edges, baseline=bottom, fill=True, color=color, label=name)
            bottom = top
        else:
            _draw_line(ax, steps, values, color, name)
    positive = any(v > 0 for values in panel.series.values() for v in values)
    if panel.kind == "log" and positive:
        ax.set_yscale("log", nonpositive="mask")
    if panel.limits:
        ax.set_ylim(*panel.limits)
    if len(panel.series) > 1:
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=min(6, len(panel.series)),
                  borderaxespad=0.1, handlelength=1.2, columnspacing=1.2)  # fmt: skip


def _draw_line(
    ax: Axes, steps: Sequence[int], values: Sequence[float], color: str, name: str
) -> None:
    points = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    # A value every so many steps: the line between two of them was not measured.
    sparse = len(points) <= len(steps) / 2
    ax.plot(
        *zip(*points, strict=True),
        color=color,
        label=name,
        linestyle="--" if sparse else "-",
        marker="o" if sparse or len(points) <= 40 else None,
        markersize=4.5 if sparse else 2.8,
    )


def _themed(svg: str) -> str:
    """Only the <svg> element, with the page's colours."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Group ids (figure_1, axes_1 ...) repeat from chart to chart and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace(_INK, "currentColor")
    return re.sub(r"#0101f(\d)", r"var(--c\1)", svg)
