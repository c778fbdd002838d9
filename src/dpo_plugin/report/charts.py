"""Charts of a run as SVG, one drawing for light and dark pages."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_plugin.health.history import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

BUCKETS = 240
"""Stretches of steps along a chart; of each, a long history keeps the least and the greatest value."""

SMOOTHED_FROM = 60
"""Number of points above which a running mean is drawn over the values."""

BINS = 30
"""Bars of a histogram."""

Values = tuple["NDArray[Any]", "NDArray[Any]"]

_COLOURS = ("#1f6feb", "#c2410c", "#0f8a5f", "#8250df", "#a07a00", "#0e7490")
_INK, _GRID, _MARK = "#60656c", ("#80868f", 0.3), "#c62828"
"""Legible on a white card; a dark page inverts their lightness and keeps their hue (report.css)."""


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        held_out: Whether it comes from evaluations; drawn with dots.
        band: Lower and upper bound of an area that is shaded around it.
        colour: Which of the six colours; None for that of its place in the chart.
        layer: 0 for a single run; of several, the first is broad and those above it dashed, so that all are seen where
            they coincide.
    """

    label: str
    series: Series
    held_out: bool = False
    band: tuple[Series, Series] | None = None
    colour: int | None = None
    layer: int = 0


@dataclass(frozen=True)
class Chart:
    """One drawing.

    Attributes:
        key: Its anchor in the page.
        caption: What it shows and what it should do.
        lines: At most six; none in a chart of spreads.
        level: A horizontal line with its name, e.g. ln 2.
        log: Whether the vertical axis is logarithmic.
        marks: Number of a finding → its first and last step.
        last: The last step of the run, where every chart's axis ends.
        spreads: Name in the legend → values, drawn as histograms over one axis instead of lines over steps.
        span: Least and greatest value on the axis of histograms that are to be compared.
        across: What the horizontal axis of lines is.
    """

    key: str
    title: str
    caption: str
    lines: Sequence[Line] = ()
    level: tuple[float, str] | None = None
    log: bool = False
    marks: Mapping[int, tuple[int, int]] | None = None
    last: int = 0
    spreads: Mapping[str, Sequence[float]] = field(default_factory=dict)
    span: tuple[float, float] | None = None
    across: str = "step"


def thinned(series: Series) -> Values:
    """Thin out a series to the least and the greatest value of each stretch of steps, so that a spike stays."""
    steps, values = as_arrays(series)
    if len(values) <= 2 * BUCKETS:
        return steps, values
    parts = np.array_split(np.arange(len(values)), BUCKETS)
    picked = sorted({int(part[place(values[part])]) for part in parts for place in (np.argmin, np.argmax)})
    return steps[picked], values[picked]


def smoothed(series: Series) -> Values:
    """Compute a running mean over a thirtieth of the points, at as many points as are drawn."""
    steps, values = as_arrays(series)
    width = max(2, len(values) // 30)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.unique(np.linspace(0, len(values) - 1, min(len(values), BUCKETS)).astype(int))
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    return steps[at], (total[high] - total[low]) / (high - low)


def as_arrays(series: Series) -> Values:
    """Steps and values without a copy."""
    return np.asarray(series.steps), np.asarray(series.values)


def to_svg(chart: Chart) -> str:
    """Draw a chart as an SVG element; its text is text, in the page's font."""
    import matplotlib

    out = io.StringIO()
    # The salt keeps the ids of one chart's clip paths apart from another's in the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.key, "text.parse_math": False}):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        draw(chart).savefig(out, format="svg", transparent=True, metadata=nothing)
    return out.getvalue().partition("<!DOCTYPE")[2].partition(">")[2].strip()


def draw(chart: Chart) -> Figure:
    """Draw a chart with matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.7, 2.7), layout="constrained")
    axes = figure.add_subplot()
    for place, line in enumerate(chart.lines):
        _draw_line(axes, line, _COLOURS[(place if line.colour is None else line.colour) % len(_COLOURS)])
    _draw_spreads(axes, chart)
    if chart.level is not None:
        axes.axhline(chart.level[0], color=_INK, linewidth=0.8, linestyle=(0, (2, 3)), label=chart.level[1])
    if chart.log and any(_wide(line.series) for line in chart.lines):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # matplotlib's own writes TeX
    elif chart.lines and (constant := _constant(chart)) is not None:
        axes.set_ylim(*sorted((0.0, 2 * constant)) if constant else (-1.0, 1.0))
    for number, (first, last) in (chart.marks or {}).items():
        _mark(axes, number, first, last)
    _dress(axes, chart.across if chart.lines else "reward")
    if chart.lines and chart.last:
        axes.set_xlim(-0.02 * chart.last, 1.02 * chart.last)
    return figure


def _draw_spreads(axes: Axes, chart: Chart) -> None:
    if not chart.spreads:
        return
    every = [value for values in chart.spreads.values() for value in values]
    low, high = chart.span or (min(every), max(every))
    margin = 0.02 * (high - low) or 0.5
    edges = np.linspace(low - margin, high + margin, BINS + 1)
    for (label, values), colour in zip(chart.spreads.items(), _COLOURS, strict=False):
        shares = np.histogram(values, edges)[0] / max(1, len(values))
        axes.stairs(shares, edges, color=colour, fill=True, alpha=0.25)
        axes.stairs(shares, edges, color=colour, label=label)


def _constant(chart: Chart) -> float | None:
    """The one value of all lines, or None; an axis should not magnify rounding."""
    values = np.concatenate([as_arrays(line.series)[1] for line in chart.lines])
    least, greatest = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    return greatest if greatest - least <= 1e-6 * max(abs(least), abs(greatest)) else None


def _wide(series: Series) -> bool:
    """Whether values span enough for a logarithmic axis to have several labels."""
    _, values = as_arrays(series)
    above = values[values > 0]
    return bool(len(above)) and float(above.max()) > 100 * float(above.min())


_LAYERS: Sequence[dict[str, Any]] = (
    {"linewidth": 4.5, "alpha": 0.5}, {"linewidth": 1.8, "linestyle": (0, (5, 4))},
    {"linewidth": 1.8, "linestyle": (2, (1.5, 2.5))}, {"linewidth": 1.2},
    {"linewidth": 1.2, "linestyle": (0, (8, 2, 1, 2))}, {"linewidth": 1.2, "linestyle": (0, (3, 6))},
)  # fmt: skip
"""How the lines of several runs look, from the lowest up."""


def _draw_line(axes: Axes, line: Line, colour: str) -> None:
    steps, values = thinned(line.series)
    if line.band is not None and all(map(len, line.band)):
        low, high = (smoothed(side) if len(side) > SMOOTHED_FROM else as_arrays(side) for side in line.band)
        if len(low[0]) == len(high[0]):
            axes.fill_between(low[0], low[1], high[1], color=colour, alpha=0.14, linewidth=0, label="p10 to p90")
    many = len(line.series) > SMOOTHED_FROM
    if line.held_out or line.layer:
        dots = {"marker": "o", "markersize": 3.2} if line.held_out else {}
        looks = _LAYERS[(line.layer - 1) % len(_LAYERS)] if line.layer else {"linewidth": 1.2}
        shown = smoothed(line.series) if many and not line.held_out else (steps, values)
        axes.plot(*shown, color=colour, label=line.label, **{**dots, **looks})
        return
    axes.plot(steps, values, color=colour, linewidth=0.6 if many else 1.4, alpha=0.35 if many else 1.0,
              label=None if many else line.label)  # fmt: skip
    if many:
        axes.plot(*smoothed(line.series), color=colour, linewidth=1.6, label=line.label)


def _mark(axes: Axes, number: int, first: int, last: int) -> None:
    if last > first:
        axes.axvspan(first, last, color=_MARK, alpha=0.07, linewidth=0)
    axes.axvline(first, color=_MARK, linewidth=1.0)
    axes.annotate(str(number), (first, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), fontsize=9.5,
                  textcoords="offset points", color=_MARK, fontweight="bold")  # fmt: skip


def _dress(axes: Axes, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9.5, length=0)
    axes.tick_params(which="minor", labelleft=False, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=unit == "step"))
    axes.set_xlabel(unit, color=_INK, fontsize=9.5, labelpad=1)
    axes.margins(x=0.02)
    labels = [text for text in axes.get_legend_handles_labels()[1] if text]
    if labels:
        legend = axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=min(3, len(labels)), frameon=False, fontsize=9.5,
            labelcolor=_INK, handlelength=1.2, columnspacing=1.0, borderaxespad=0.1,
        )  # fmt: skip
        for text in legend.get_texts():  # a source may be called $x$
            text.set_parse_math(False)
