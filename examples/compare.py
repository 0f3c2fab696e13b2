"""Compare the demo's results with those of other models: which may be compared, their names, and the figure."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from matplotlib.axes import Axes

from modeling_longnet.testing import Pattern

from .drawing import COLORS, draw_line, format_count, make_figure, mark, name_lines, scale_log, scale_tokens, styled
from .evaluate_perplexity import write_figure

ROOT = Path(__file__).resolve().parent.parent
# Models of the same size, trained by the demo with its configuration and others.
NAMES = ("demo", "demo_dense", "demo_window")
BASELINES = [ROOT / "docs" / f"{name}.json" for name in NAMES]


def read_baselines(results: dict, files: list[Path]) -> list[dict]:
    """Return results of other runs whose kind of text, vocabulary size, training and number of targets are the same.

    The text 'python' is the code of the installed packages, which differs a little from one environment to the next.
    """

    def kind(report: dict) -> list:
        training = report.get("training", {})
        made = [training.get(name) for name in ("text", "tokens", "sequence_length")]
        return [report["tokens"], report.get("model", {}).get("vocab_size"), *made]

    found = []
    for file in filter(Path.exists, files):
        report = json.loads(file.read_text())
        if kind(report) != kind(results):
            print(f"Not drawn: {file}: its text, vocabulary size, training or number of targets differ.")
        elif any(report.get(name) != results.get(name) for name in ("text_digest", "date", "command")):  # not itself
            found.append(report)
    return found


def is_same_text(report: dict, other: dict) -> bool:
    """Return whether the digests of all tokens agree or, where a report has none, the bytes of the targets."""
    digests = report.get("text_digest"), other.get("text_digest")
    if None in digests:
        return report["bytes"] == other["bytes"]
    return digests[0] == digests[1]


def describe_baselines(results: dict, baselines: list[dict]) -> str:
    """Return a sentence that names the models measured on slightly different text; empty if there are none."""
    others = [report for report in baselines if not is_same_text(report, results)]
    names = dict.fromkeys(name_model(report["model"])[0].replace("\n", " ") for report in others)
    dates = sorted({report["date"] for report in others})
    if not others:
        return ""
    dates = " and ".join(dates)
    return f"Measured on slightly different text, packages of {dates} (docs/demo*.json): {', '.join(names)}"


def name_model(model: dict) -> tuple[str, str]:
    """Return the name of a model with these fields in figures and tables, and its key in `COLORS`."""
    if model["window_size"] is None:
        return ("dense", "dense") if model["dilation_rates"] == [1] else ("the paper's\npattern", "paper")
    if not model["segment_lengths"]:
        return f"window of {model['window_size']}", "window"
    return "LongNet", "longnet"


def name_reports(reports: list[dict]) -> dict[str, dict]:
    """Return the reports by their model's name; a second report of the same name gets ", repeated" added."""
    named = {}
    for report in reports:
        name = name_model(report["model"])[0].replace("\n", " ")
        while name in named:
            name += ", repeated"
        named[name] = report
    return named


def describe_pattern(model: dict) -> str:
    """Describe in words which keys a query of a model with these fields sees."""
    return Pattern.of(SimpleNamespace(**model)).describe().rstrip(".")


def mark_lengths(axis: Axes, results: dict) -> None:
    """Mark the trained length, the window and the segments of a model."""
    marks = {results["training"]["sequence_length"]: ["trained length"]}
    model = results["model"]
    for length in model["segment_lengths"]:
        marks.setdefault(length, []).append("segment")
    if model["window_size"]:
        marks.setdefault(model["window_size"], []).append("LongNet's window")
    for length, texts in marks.items():
        if length <= max(results["contexts"]):
            mark(axis, length, " = ".join(texts))


def count_keys(model: dict, context: int) -> float:
    """Return the mean number of keys that a query sees per head in a text of `context` tokens."""
    return Pattern.of(SimpleNamespace(**model)).count_work(context)


@styled
def plot(results: dict, baselines: list[dict], file: Path) -> None:
    """Draw perplexity and the work of attention against context, beside those of other models.

    `results` sets the scale of perplexity. A line that leaves the panel is labelled with its highest value.
    """
    figure = make_figure(height=3.9)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    top, repeated = max(1.02 * max(results["perplexity"]), 3.2 * min(results["perplexity"])), ""
    for report in [*baselines, results]:
        name, color = name_model(report["model"])
        contexts, perplexity = report["contexts"], report["perplexity"]
        look = {"zorder": 4} if report is results else {}
        if report is not results and name == name_model(results["model"])[0]:
            draw_line(left, contexts, perplexity, None, color, linewidth=1, marker="")
            repeated = "\n(thin: training repeated)"
            continue
        draw_line(left, contexts, perplexity, name, color, **look)
        keys = [count_keys(report["model"], context) for context in results["contexts"]]
        draw_line(right, results["contexts"], keys, name, color, **look)
        lowest = perplexity.index(min(perplexity))
        over = next((i for i, value in enumerate(perplexity) if i > lowest and value > top), None)
        if over:
            most = perplexity.index(max(perplexity))
            text = f"{perplexity[most]:,.0f} at {format_count(contexts[most])} \u2191"
            place = (contexts[over], 0.9), left.get_xaxis_transform()
            left.annotate(text, place[0], xycoords=place[1], va="top", fontsize=10, color=COLORS[color])
    error = results["perplexity_error"]
    if None not in error:
        low, high = (np.add(results["perplexity"], np.multiply(sign, error)) for sign in (-1, 1))
        left.fill_between(results["contexts"], low, high, color=COLORS["longnet"], alpha=0.12, linewidth=0)
    left.set(
        title="Perplexity of held-out text (band: 1 standard error)" + repeated,
        ylim=(0.9 * min(results["perplexity"]), top),
    )
    right.set(title="Keys that a query sees")
    scale_log(right.yaxis)
    for axis in (left, right):
        axis.set_xlabel("context (tokens)")
        scale_tokens(axis.xaxis)
    mark_lengths(left, results)
    if note := describe_baselines(results, baselines):
        figure.supxlabel(note, fontsize=9, color="#606060")
    name_lines(left)
    name_lines(right)
    write_figure(figure, file)
