"""How every figure here is drawn: one style file, axes in 2K, 8K, 1M, and names beside the lines instead of legends.

@styled
def plot(file):
    figure = make_figure(height=3.6)
    axis = figure.subplots()
    draw_line(axis, [2048, 8192], [1, 4], "dense", "dense")
    scale_tokens(axis.xaxis)
    name_lines(axis)
    figure.savefig(file)
"""

from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

STYLE = Path(__file__).with_name("longnet.mplstyle")
WIDTH = 8.0  # inches, of which a page shows about 100 pixels each
# A contestant has one colour in every figure.
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


def make_figure(*, width: float = WIDTH, height: float = 3.4) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def format_count(number: float) -> str:
    """512, 2K, 64K, 1M: powers of two as the field writes them; other numbers with the same letters of a thousand."""
    for size, power, letter in ((10**9, 2**30, "B"), (10**6, 2**20, "M"), (10**3, 2**10, "K")):
        if number >= size:
            exact = number / power if number % power == 0 and number >= power else number / size
            return f"{exact:.3g}{letter}"
    return f"{number:g}"


def format_seconds(seconds: float) -> str:
    for size, unit in ((60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size * (1 - 1e-9):
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:g} s"


def scale_tokens(axis: Axis, *, ticks: int = 6) -> None:
    """A logarithmic axis of token counts with few ticks, each a power of two."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=2)
    axis.set_major_locator(LogLocator(base=2, numticks=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_count(round(value))))
    axis.set_minor_locator(NullLocator())


def scale_log(axis: Axis, form=lambda value: f"{value:g}", *, ticks: int = 6) -> None:
    """A logarithmic axis of base 10; `form` writes a tick."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=10)
    axis.set_major_locator(LogLocator(base=10, numticks=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axis.set_minor_locator(NullLocator())


def draw_line(axis: Axes, x, y, name: str | None, color: str, *, mode: str = "forward+backward", **look) -> Line2D:
    """A line with a dot at each point; `color` is a contestant of `COLORS` or any colour, `mode` one of `DASHES`."""
    look = {"marker": "o", "color": COLORS.get(color, color), "linestyle": DASHES[mode]} | look
    (line,) = axis.plot(x, y, label=name or "_", **look)
    return line


def mark(axis: Axes, x: float, text: str, *, height: float = 0.98) -> None:
    """A vertical dotted line with its text on the left, `height` of the panel up."""
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
    """Write each line's label beside its last point in its colour, moved up or down where two would overlap."""
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    axis.figure.draw_without_rendering()  # places the panel
    points = axis.figure.dpi / 72
    ends, low, high = [], *axis.get_ylim()
    for line in lines:
        x, y = (np.asarray(part, float) for part in line.get_data())
        seen = np.flatnonzero(np.isfinite(y) & (y >= low) & (y <= high))
        if len(seen):
            ends.append((line, (x[seen[-1]], y[seen[-1]])))
    places = np.array([axis.transData.transform(end) for _, end in ends]).reshape(-1, 2)
    heights = [1.25 * size * points * (1 + line.get_label().count("\n")) for line, _ in ends]
    moved = _push_apart(places, heights)
    for (line, end), shift in zip(ends, moved - places[:, 1], strict=True):
        axis.annotate(
            line.get_label(),
            end,
            xytext=(7, shift / points),
            textcoords="offset points",
            va="center",
            fontsize=size,
            color=to_hex(line.get_color()),
            annotation_clip=False,
        )


def _push_apart(places: np.ndarray, heights: list[float], near: float = 120) -> np.ndarray:
    """Heights of labels at these places, none nearer to another than both need; labels far to the side do not count."""
    y = places[:, 1].copy()
    for _ in range(200):
        order = np.argsort(y, kind="stable")
        for below, above in pairwise(order):
            overlap = (heights[below] + heights[above]) / 2 - (y[above] - y[below])
            if overlap > 0 and abs(places[above, 0] - places[below, 0]) < near:
                y[below] -= overlap / 2
                y[above] += overlap / 2
    return y
