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
_MAX_BARS = 80
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-3, 5),
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
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
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0.0)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, panel in zip(axes, panels, strict=True):
            _draw(ax, steps, panel)
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _themed(buffer.getvalue())


def _draw(ax: Axes, steps: Sequence[int], panel: Panel) -> None:
    ax.patch.set_alpha(0.0)
    ax.set_ylabel(panel.label)
    if panel.kind == "stack":
        _draw_stack(ax, steps, panel.series)
    else:
        for (name, values), color in zip(panel.series.items(), cycle(_SERIES), strict=False):
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


def _draw_stack(ax: Axes, steps: Sequence[int], series: Mapping[str, Sequence[float]]) -> None:
    layers = {name: [v if math.isfinite(v) else 0.0 for v in vs] for name, vs in series.items()}
    if len(steps) > _MAX_BARS:
        ax.stackplot(steps, *layers.values(), labels=list(layers), colors=_SERIES)
        return
    bottom = [0.0] * len(steps)
    for (name, values), color in zip(layers.items(), _SERIES[: len(layers)], strict=True):
        ax.bar(steps, values, bottom=bottom, width=0.85, color=color, label=name)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]


def _themed(svg: str) -> str:
    """Only the <svg> element, sized by the page, with the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Group ids (figure_1, axes_1 ...) repeat from chart to chart and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace(_INK, "currentColor")
    for i, color in enumerate(_SERIES):
        svg = svg.replace(color, f"var(--c{i})")
    return svg
