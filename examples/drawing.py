"""How every figure here is drawn: one style file, axes in 2K, 8K, 1M, and names beside the lines instead of legends.

lines = [Line([2048, 8192], [0.1, 1.6], "dense", "dense"), Line([2048, 8192], [0.1, 0.4], "LongNet")]
draw_panels([Panel("Time of a forward pass", lines, scale_seconds)], Path("time.png"))
"""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

STYLE = Path(__file__).with_name("longnet.mplstyle")
WIDTH = 8.0  # inches; a page shows about 100 pixels per inch
# Each contestant has the same colour in every figure.
COLORS = {
    "longnet": "#1764ab",
    "paper": "#6fa8dc",
    "dense": "#303030",
    "window": "#d1741a",
    "sparse": "#3c8d40",
    "other": "#8a4fa3",
}
DASHES = {"forward": "--", "forward+backward": "-"}
styled = matplotlib.rc_context(fname=STYLE)  # a decorator of functions that draw


class Line(NamedTuple):
    """Values against tokens (or whatever the panel counts), with a name; None if another line carries the name.

    `color` is a contestant of `COLORS` or any matplotlib colour, `mode` one of `DASHES`; `band` is the least and the
    most of each value.
    """

    x: list[float]
    y: list[float]
    name: str | None
    color: str = "longnet"
    mode: str = "forward+backward"
    band: tuple[list[float], list[float]] | None = None


class Panel(NamedTuple):
    """Lines under a title; `scale` prepares the y axis, `x_scale` the x axis."""

    title: str
    lines: list[Line]
    scale: Callable[[Axis], None]
    x_label: str = "tokens"
    x_scale: Callable[[Axis], None] | None = None


@styled
def draw_panels(panels: list[Panel], file: Path, *, columns: int = 2, title: str = "", height: float = 3.2) -> None:
    """Draw the panels that have a line of at least two points; if none has, delete the file."""
    panels = [panel for panel in panels if any(len(line.x) > 1 for line in panel.lines)]
    if not panels:
        Path(file).unlink(missing_ok=True)
        return
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = make_figure(height=height * rows + (0.3 if title else 0))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        for line in panel.lines:
            drawn = draw_line(axis, line.x, line.y, line.name, line.color, mode=line.mode)
            if line.band is not None:
                axis.fill_between(line.x, *line.band, color=drawn.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=panel.title, xlabel=panel.x_label)
        (panel.x_scale or scale_tokens)(axis.xaxis)
        panel.scale(axis.yaxis)
    for axis in axes[len(panels) :]:
        axis.remove()
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    for axis in axes[: len(panels)]:
        name_lines(axis)
    figure.savefig(file)


def make_figure(*, width: float = WIDTH, height: float = 3.4) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def format_count(number: float) -> str:
    """Format powers of two in binary units (512, 2K, 64K, 1M), other numbers in thousands, millions and so on."""
    for size, power, letter in ((10**9, 2**30, "B"), (10**6, 2**20, "M"), (10**3, 2**10, "K")):
        if number >= size:
            exact = number / power if number % power == 0 and number >= power else number / size
            return f"{exact:.3g}{letter}"
    return f"{number:g}"


def format_seconds(seconds: float) -> str:
    for size, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size * (1 - 1e-9):
            return f"{seconds / size:,.4g} {unit}"
    return f"{seconds:g} s"


def format_number(value: float) -> str:
    """0.25, 5, 1,000,000."""
    return f"{value:,.0f}" if value >= 1 and value == round(value) else f"{value:g}"


def scale_tokens(axis: Axis, *, ticks: int = 6) -> None:
    """A logarithmic axis of token counts with few ticks, each a power of two."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=2)
    axis.set_major_locator(LogLocator(base=2, numticks=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_count(round(value))))
    axis.set_minor_locator(NullLocator())


def scale_log(axis: Axis, form: Callable[[float], str] = format_number, *, ticks: int = 6) -> None:
    """A logarithmic axis of base 10; `form` writes a tick. If it spans under two powers of ten, ticks are 1, 2, 5."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=10)
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(base=10, subs=(1,) if high > 100 * low else (1, 2, 5), numticks=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axis.set_minor_locator(NullLocator())


def scale_seconds(axis: Axis) -> None:
    scale_log(axis, format_seconds)


def scale_linear(axis: Axis) -> None:
    """From zero, with commas."""
    _start_at_zero(axis)
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))


def scale_counts(axis: Axis) -> None:
    """From zero, in 250M and 1B."""
    _start_at_zero(axis)
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))


def scale_share(axis: Axis) -> None:
    """From 0 to 100 %."""
    axis.axes.set(**{f"{axis.axis_name}lim": (-0.03, 1.03)})
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))


def scale_plain(axis: Axis) -> None:
    """As matplotlib chooses."""


def _start_at_zero(axis: Axis) -> None:
    axis.axes.set(**{f"{axis.axis_name}lim": (0, 1.06 * axis.get_data_interval()[1])})


def name_pattern(words: str) -> str:
    """Return the name of a written pattern in figures."""
    if words.startswith("flex"):
        return "window in\nFlexAttention"
    window = re.match(r"w(\d+)", words)
    branches = re.findall(r"(\d+)/\d+(:1)?", words)
    if window is None:
        return f"{len(branches)} branches\nfrom {format_count(int(branches[0][0]))}"
    if not branches:
        return f"window of {window[1]}"
    period = re.search(r"every(\d+)", words)
    name = "summaries" if all(rate for _, rate in branches) else "branches"
    return f"window and\n{name}" + (f",\n1 layer in {period[1]}" if period else "")


def draw_line(axis: Axes, x, y, name: str | None, color: str, *, mode: str = "forward+backward", **look) -> Line2D:
    """Draw a line with a dot at each point; the arguments are those of `Line`."""
    look = {"marker": "o", "color": COLORS.get(color, color), "linestyle": DASHES[mode]} | look
    (line,) = axis.plot(x, y, label=name or "_", **look)
    return line


def mark(axis: Axes, x: float, text: str, *, height: float = 0.98) -> None:
    """Draw a vertical dotted line with its text on the left, at the share `height` of the panel."""
    axis.axvline(x, color="#909090", linestyle=":", linewidth=1.2, zorder=1)
    axis.annotate(
        text,
        (x, height),
        xycoords=axis.get_xaxis_transform(),
        xytext=(-3, 0),
        textcoords="offset points",
        ha="right",
        va="top",
        rotation=90,
        fontsize=9,
        color="#606060",
    )


def name_lines(axis: Axes, *, size: float = 10) -> None:
    """Write each line's label at its last point in its colour, moved up or down where two would overlap.

    The label is on the right of the point, or on its left if a rising line ends before the panel does.
    """
    axis.figure.draw_without_rendering()  # places the panel
    points, panel = axis.figure.dpi / 72, axis.get_window_extent()
    lines, ends, places, inside = [], [], [], []
    for line in axis.get_lines():
        x, y = (np.asarray(part, float) for part in line.get_data())
        seen = np.flatnonzero(np.isfinite(y) & (y >= axis.get_ylim()[0]) & (y <= axis.get_ylim()[1]))
        if line.get_label().startswith("_") or not len(seen):
            continue
        lines.append(line)
        ends.append((x[seen[-1]], y[seen[-1]]))
        places.append(axis.transData.transform(ends[-1]))
        ends_inside = not np.isfinite(y[seen[-1] + 1 :]).any()  # rather than leave by the top
        rises = len(seen) > 1 and y[seen[-1]] > y[seen[-2]] and ends_inside
        inside.append(rises and 0.3 < (places[-1][0] - panel.x0) / panel.width < 0.85)
    heights = [1.25 * size * points * (1 + line.get_label().count("\n")) for line in lines]
    moved = _push_apart(np.array(places).reshape(-1, 2), np.array(heights), panel.y0, panel.y1)
    for line, end, place, height, left in zip(lines, ends, places, moved, inside, strict=True):
        axis.annotate(
            line.get_label(),
            end,
            xytext=(-7 if left else 7, (height - place[1]) / points + (4 if left else 0)),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=size,
            color=to_hex(line.get_color()),
            annotation_clip=False,
        )


def _push_apart(places: np.ndarray, heights: np.ndarray, low: float, high: float, near: float = 120) -> np.ndarray:
    """Return heights for labels at these places, far enough apart; labels far to the side do not count."""
    y = places[:, 1].copy()
    for _ in range(200):
        y = np.clip(y, low + heights / 2 - 6, high - heights / 2 + 6)
        order = np.argsort(y, kind="stable")
        for below, above in pairwise(order):
            overlap = (heights[below] + heights[above]) / 2 - (y[above] - y[below])
            if overlap > 0 and abs(places[above, 0] - places[below, 0]) < near:
                y[below] -= overlap / 2
                y[above] += overlap / 2
    return y
