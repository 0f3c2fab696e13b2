"""Rebuild tables and plots from the JSON files in `results/`; nothing is written by hand.

    python -m examples.paper.figures [--results examples/paper/results/full]

Writes `summary.md` and the plots beside the JSON files, the tables of docs/paper.md and docs/patterns.md, the README's
table of quality, and `patterns.png`: which keys each head sees, the path between two tokens, and the memory of the
cache, all counted from the pattern itself.
"""

if not __package__:
    raise SystemExit("Run this as a module from the repository's root: python -m examples.paper.figures")

import argparse
import json
import math
import re
from collections import defaultdict
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch

from benchmarks.figures import fill_markers, map_attention
from benchmarks.run import describe
from examples.drawing import (
    Line,
    Panel,
    draw_line,
    draw_panels,
    format_count,
    make_figure,
    name_lines,
    scale_plain,
    scale_share,
    scale_tokens,
    styled,
)

from .cells import sweep_score
from .patterns import LONGER, RIVALS, Pattern, count_computed_keys, count_keys, file_name, make_pattern

ROOT = Path(__file__).resolve().parent.parent.parent
FULL = ROOT / "examples" / "paper" / "results" / "full"
# The paper's perplexity on The Stack with models of 125M parameters; beyond the trained length it uses blockwise causal
# attention. Our models are small and must not be compared with these.
PAPER = """| the paper's own (arXiv 2307.02486, Table 2, The Stack) | 2K | 8K | 32K |
| --- | ---: | ---: | ---: |
| Transformer, trained on 2K | 4.24 | 5.07 | 11.29 |
| Sparse Transformer, trained on 8K | 4.39 | 3.35 | 8.79 |
| LongNet, trained on 8K | 4.23 | 3.24 | 3.36 |
| Sparse Transformer, trained on 16K | 4.85 | 3.73 | 19.77 |
| LongNet, trained on 16K | 4.27 | 3.26 | 3.31 |
| Sparse Transformer, trained on 32K | 5.15 | 4.00 | 3.64 |
| LongNet, trained on 32K | 4.37 | 3.33 | 3.01 |"""
BEST = "w136_2048-8q1_once_every2"
NAMES = {"dense": "dense", "longnet": "LongNet,\nthe paper's", "window": "window", "sparse": "Sparse"}
NAMES[BEST] = "LongNet,\nthe best"
LINE_COLORS = {"longnet": "paper", BEST: "longnet"}  # other names are keys of `COLORS` themselves
MOST_LINES = 5  # in a panel
DISTANCE = "tokens between passage and question"
# Rows of the README's table of quality: title, pattern of the text cells, name of the recall cells.
QUALITY = [
    (
        "LongNet, window, in every 2nd layer also 1 key in 8",
        "w136 2048/8:1 once every2",
        BEST + LONGER,
    ),
    ("LongNet, window, in every layer also 1 key in 16", "w136 2048/16:1 once", "w136_2048-16q1_once" + LONGER),
    ("LongNet, the paper's pattern", "512/1 2048/2 8192/4 32768/8", "longnet" + LONGER),
    ("sliding window", "w192", "window" + LONGER),
    ("Sparse Transformer", "sparse", "sparse" + LONGER),
    ("dense attention", "1048576/1", "dense"),
]
ENDS = [(32, 256), (256, 2048)]  # ranges of the distance between passage and question, in tokens


def load(folder: Path) -> dict[str, dict]:
    """Return every cell's results by its name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _mean(values: list[float]) -> str:
    """Format the mean over seeds, with the range if there are several."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def text_groups(results: dict[str, dict], budget: str) -> dict[tuple[int, str], list[dict]]:
    """Group results by trained length and pattern, one per seed; the budget is equal `tokens` or equal `time`."""
    cells = [r for name, r in results.items() if name.startswith(budget + "-") and r["cell"]["pattern"] in RIVALS]
    if budget == "time":  # equal to the time that LongNet takes for equal tokens
        seeds = {cell["cell"]["seed"] for cell in cells}
        cells += [r for name, r in results.items() if name.startswith("tokens-longnet-") and r["cell"]["seed"] in seeds]
    groups = defaultdict(list)
    for cell in cells:
        groups[cell["cell"]["length"], cell["cell"]["pattern"]].append(cell)
    return dict(sorted(groups.items()))


def table(results: dict[str, dict], budget: str) -> str:
    """Return our version of the paper's Table 2: one line per trained length and pattern, one column per context."""
    groups = text_groups(results, budget)
    if not groups:
        return f"No cell of equal {budget} has been run."
    contexts = min((cell["scores"]["contexts"] for cells in groups.values() for cell in cells), key=len)
    header = [
        "trained on",
        "pattern",
        "keys per query",
        "computed",
        "seeds",
        "steps",
        "tokens per CPU second",
        "peak MiB",
    ]
    header += [*(f"{c:,}" for c in contexts), "+- at the trained length"]
    lines = ["| " + " | ".join(header) + " |", "| ---: | --- |" + " ---: |" * (len(header) - 2)]
    for (length, pattern), cells in groups.items():
        scores = [cell["scores"] for cell in cells]
        columns = zip(*(s["perplexity"][: len(contexts)] for s in scores), strict=True)
        keys, computed = (count(Pattern(**cells[0]["work"]), length) for count in (count_keys, count_computed_keys))
        steps = np.mean([c["tokens"] / length for c in cells])
        row = [f"{length:,}", pattern, f"{keys:,.0f}", f"{computed:,.0f}", str(len(cells)), f"{steps:,.0f}"]
        row += [f"{np.mean([c['tokens'] / c['seconds'] for c in cells]):,.0f}"]
        row += [f"{np.mean([c['peak_bytes'] for c in cells]) / 2**20:,.0f}"]
        row += [_mean(list(column)) for column in columns]
        row += [f"{np.mean([s['perplexity_error'][contexts.index(length)] for s in scores]):.2f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def ratio_table(results: dict[str, dict], budget: str) -> str:
    """Tabulate LongNet's perplexity divided by each other pattern's at the trained length, seed by seed."""
    groups = text_groups(results, budget)
    others = [pattern for pattern in RIVALS if pattern != "longnet"]
    lines = ["| trained on | " + " | ".join(f"LongNet / {name}" for name in others) + " |"]
    lines += ["| ---: |" + " ---: |" * len(others)]
    for length in sorted({length for length, _ in groups}):
        ours, *theirs = (
            {r["cell"]["seed"]: _at_trained(r) for r in groups.get((length, name), [])} for name in ("longnet", *others)
        )
        row = []
        for scores in theirs:
            ratios = [ours[seed] / score for seed, score in sorted(scores.items()) if seed in ours]
            mean = f"{np.exp(np.mean(np.log(ratios))):.2f} " if ratios else ""
            row.append(mean + f"({', '.join(f'{ratio:.2f}' for ratio in ratios)})")
        lines.append(f"| {length:,} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def written_table(results: dict[str, dict], part: str) -> str:
    """Tabulate perplexity of written patterns at their trained length: mean, each seed's, and divided by each window's.

    Part `full` is one stage at that length, `long` is one with more training, and `extended` a second stage after it;
    `tokens` is a second stage after dense attention at 512 tokens.
    """
    groups = written_groups(results, part)
    if not groups:
        return "No such cell has been run."
    windows = sorted({p for _, p in groups if p[1:].isdigit()}, key=lambda p: int(p[1:]))
    header = ["trained on", "pattern", "keys", "perplexity (each seed's)", *(f"over {w}" for w in windows)]
    lines = ["| " + " | ".join(header) + " |", "| ---: | --- | ---: |" + " ---: |" * (len(windows) + 1)]
    for (length, pattern), seeds in sorted(groups.items(), key=lambda x: (x[0][0], np.mean(list(x[1].values())))):
        keys = count_keys(make_pattern(pattern, ((), ()), length), length)
        row = [f"{length:,}", f"`{pattern}`", f"{keys:,.0f}", _each([seeds[seed] for seed in sorted(seeds)], ".2f")]
        for window in windows:
            theirs = groups.get((length, window), {})
            ratios = [seeds[seed] / theirs[seed] for seed in sorted(seeds.keys() & theirs.keys())]
            row.append(_each(ratios, ".3f") if ratios and window != pattern else "")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def written_groups(results: dict[str, dict], part: str) -> dict[tuple[int, str], dict[int, float]]:
    """Return the perplexity of written patterns at their trained length, by length and pattern, then by seed."""
    groups = defaultdict(dict)
    for name, result in results.items():
        cell = result["cell"]
        if name.startswith(part + "-") and cell["pattern"] not in RIVALS:
            perplexity = math.exp(result["loss"]) if "loss" in result else _at_trained(result)
            groups[cell["length"], cell["pattern"]][cell["seed"]] = perplexity
    return groups


def equal_time_table(results: dict[str, dict]) -> str:
    """Tabulate two patterns' perplexity after equal time, of which the cheaper one has trained on more tokens."""
    lines = [
        "| trained on | pattern | perplexity (each seed's) | in the same time | tokens | perplexity | ratio |",
        "| ---: | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for part in ("long", "extended"):
        ours, cheaper = written_groups(results, part), written_groups(results, f"time_{part}")
        for (length, window), theirs in sorted(cheaper.items()):
            cells = [r for name, r in results.items() if name.startswith(f"time_{part}-{file_name(window)}-{length}-")]
            timed = cells[0]["settings"]["timed"][0]
            bases = cells[0]["settings"]["extended_text"].get(str(length), {timed: timed})
            pattern = next(name for name, base in bases.items() if base == timed)
            seeds = sorted(theirs.keys() & ours.get((length, pattern), {}).keys())
            ours_each, theirs_each = [ours[length, pattern][x] for x in seeds], [theirs[x] for x in seeds]
            ratios = [a / b for a, b in zip(ours_each, theirs_each, strict=True)]
            more = np.mean([cell["tokens"] / cell["settings"][f"{part}_tokens"] for cell in cells])
            row = [f"{length:,}", f"`{pattern}`", _each(ours_each, ".2f"), f"`{window}`", f"{more:.2f} times"]
            lines.append("| " + " | ".join([*row, _each(theirs_each, ".2f"), _each(ratios, ".3f")]) + " |")
    return "\n".join(lines) if len(lines) > 2 else "No such cell has been run."


def _each(values: list[float], form: str) -> str:
    """Format the geometric mean, and each value if there are several."""
    mean = f"{np.exp(np.mean(np.log(values))):{form}}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{x:{form}}' for x in values)})"


def _at_trained(result: dict) -> float:
    """Return the perplexity under a context of the trained length."""
    scores = result["scores"]
    return scores["perplexity"][scores["contexts"].index(result["cell"]["length"])]


def _shares(recall: dict) -> list[float]:
    """Return the share of the tokens asked for that were predicted, by bucket of distances."""
    return [right / max(1, asked) for right, asked in zip(recall["right"], recall["asked"], strict=True)]


def recall_groups(results: dict[str, dict], part: str) -> dict[str, list[dict]]:
    """Group the results of part `recall`, or `far` (longer texts), by name without the seed."""
    groups = defaultdict(list)
    for name, result in results.items():
        if name.startswith(part + "-"):
            groups[name.removeprefix(part + "-").rsplit("-", 1)[0]].append(result)
    return groups


def recall_table(results: dict[str, dict], part: str, task: str, variants: bool = True) -> str:
    """Tabulate the share recalled by distance and its mean over the distances, one line per pattern and training.

    The task is `recall` or `passkey`. `variants` includes other branches and offsets of the paper's pattern.
    """
    groups = recall_groups(results, part)
    if not groups:
        return "This task has not been run."
    edges = next(iter(groups.values()))[0][task]["edges"]
    header = ["pattern", "keys per query", "tokens per CPU second", "seeds"]
    header += [*(f"{a:,} to {b:,}" for a, b in pairwise(edges)), "mean"]
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for name, cells in groups.items():
        pattern = cells[0]["cell"]["pattern"]
        model = name.removeprefix(file_name(pattern))
        if not variants and pattern == "longnet" and model:
            continue
        shares = [_shares(cell[task]) for cell in cells]
        keys = count_keys(Pattern(**cells[0]["work"]), cells[0]["cell"]["length"])
        row = [(pattern if pattern in RIVALS else f"`{pattern}`") + model, f"{keys:,.0f}"]
        row += [f"{np.mean([c['tokens'] / c['seconds'] for c in cells]):,.0f}", str(len(cells))]
        row += [_mean(list(s)) for s in zip(*shares, strict=True)] + [_mean([np.mean(s) for s in shares])]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def quality_table(results: dict[str, dict]) -> str:
    """Return the README's table: perplexity on text and recall at two distances, one line per kind of attention.

    Text is scored after one stage of training at 2,048 tokens, the longer one, on every machine. What has not been
    run is left empty.
    """
    lines = [
        "| attention | keys per query, text | perplexity | keys per query, recall | recall, up to 256 tokens back "
        "| recall, 256 to 2,048 back |",
        "| --- |" + " ---: |" * 5,
    ]
    recall, counts = recall_groups(results, "recall"), set()
    for title, text, task in QUALITY:
        trained = ("long-", "repeat_long-")
        cells = [r for name, r in results.items() if name.startswith(trained) and r["cell"]["pattern"] == text]
        row = ["", ""]
        if cells:
            keys = count_keys(make_pattern(text, ((), ()), 2048), 2048)
            row = [f"{keys:,.0f}", _range([math.exp(r["loss"]) for r in cells], ".1f")]
        found = recall.get(task, [])
        if found:
            row.append(f"{count_keys(Pattern(**found[0]['work']), found[0]['cell']['length']):,.0f}")
            row += [_range([100 * _share_between(r["recall"], *ends) for r in found], ".0f", " %") for ends in ENDS]
        lines.append("| " + " | ".join([title, *row, *[""] * (5 - len(row))]) + " |")
        counts |= {len(cells), len(found)} - {0}
    means = f"Means of {min(counts)} to {max(counts)} runs, the range in parentheses."
    return "\n".join(lines) + f"\n\n{means} Empty: not trained for so long."


def _range(values: list[float], form: str, unit: str = "") -> str:
    """Format the mean, and the least and the most if they differ in the digits shown; say if there is one value."""
    mean, least, most = (f"{x:{form}}" for x in (np.mean(values), min(values), max(values)))
    if len(values) == 1:
        return f"{mean}{unit} (one run)"
    return f"{mean}{unit}" if least == most else f"{mean}{unit} ({least} to {most})"


def _share_between(recall: dict, least: int, most: int) -> float:
    """Return the share of the tokens asked for at distances from `least` to `most` that were predicted."""
    buckets = [i for i, (a, b) in enumerate(pairwise(recall["edges"])) if least <= a and b <= most]
    return sum(recall["right"][i] for i in buckets) / sum(recall["asked"][i] for i in buckets)


def sweep_table(results: dict[str, dict], prefix: str) -> str:
    """Tabulate the score of every learning rate tried; the rate with the lowest was used."""
    rows = defaultdict(dict)
    for name, result in results.items():
        if name.startswith(prefix + "-"):
            stage = {"base": ", first stage", "text": ", second stage", "recall": ""}[result["cell"]["kind"]]
            rows[result["cell"]["pattern"] + stage][result["cell"]["rate"]] = sweep_score(result)
    rates = sorted({rate for row in rows.values() for rate in row})
    lines = ["| pattern | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "| --- |" + " ---: |" * len(rates)]
    lines += [
        f"| {p} | " + " | ".join(f"{row[r]:.4g}" if r in row else "" for r in rates) + " |" for p, row in rows.items()
    ]
    return "\n".join(lines)


def count_all_flops(result: dict) -> float:
    """Return the FLOPs of both stages of a cell's training."""
    settings, length, work = result["settings"], result["cell"]["length"], Pattern(**result["work"])
    sizes = settings["sizes"]
    first = make_pattern(  # window and sparse see the whole short sequence
        "longnet" if work.name == "longnet" else "dense", settings["branches"], settings["base_length"]
    )
    a_key = 12 * sizes["hidden_size"] * sizes["num_hidden_layers"]
    saved = a_key * (count_keys(work, length) - count_keys(first, settings["base_length"]))
    return result["tokens"] * result["flops_a_token"] + settings["base_tokens"] * (result["flops_a_token"] - saved)


def _line(x, values: list[list[float]], name: str | None, color: str) -> Line:
    """Return a line of the means over seeds, with a band from the least to the most."""
    values = np.array(values, float)
    return Line(list(x), list(values.mean(0)), name, color, band=(list(values.min(0)), list(values.max(0))))


def plot_text(results: dict[str, dict], path: Path) -> None:
    """Draw loss by trained length, by training FLOPs (Fig. 6), by context and by position (Fig. 7), with seeds' range.

    The last two panels show the models trained on the longest sequences.
    """
    groups = text_groups(results, "tokens")
    lengths = sorted({length for length, _ in groups})
    by_length, by_work, by_context, by_position = [], [], [], []
    for pattern in RIVALS:
        name, color = NAMES[pattern], LINE_COLORS.get(pattern, pattern)
        trained = {length: groups[length, pattern] for length in lengths if (length, pattern) in groups}
        if not trained:
            continue
        losses = [[np.log(_at_trained(cell)) for cell in cells] for cells in trained.values()]
        by_length.append(_each_place(trained, losses, name, color))
        work = [np.mean([count_all_flops(cell) for cell in cells]) for cells in trained.values()]
        by_work.append(_each_place([flops / 1e13 for flops in work], losses, name.replace("\n", " "), color))
        cells = trained[max(trained)]
        scores = [np.log(cell["scores"]["perplexity"]) for cell in cells]
        by_context.append(_line(cells[0]["scores"]["contexts"], scores, name, color))
        positions = [cell["loss_by_position"] for cell in cells]
        middles = (np.arange(len(positions[0])) + 0.5) / len(positions[0])
        by_position.append(_line(middles, positions, name, color))
    longest = format_count(max(lengths))
    panels = [
        Panel("at the trained length", by_length, scale_plain, "trained length (tokens)"),
        Panel("against the work of training", by_work, scale_plain, "training FLOPs ($10^{13}$)", scale_plain),
        Panel(f"trained on {longest}: by context", by_context, scale_plain, "context (tokens)"),
        Panel(f"trained on {longest}: by position", by_position, scale_plain, "share of the sequence", scale_plain),
    ]
    draw_panels(panels, path, title="Held-out loss, nats per token; equal training tokens")


def _each_place(places, values: list[list[float]], name: str | None, color: str) -> Line:
    """Return a line of the means at each place; the number of values may differ between places."""
    band = ([min(seeds) for seeds in values], [max(seeds) for seeds in values])
    return Line(list(places), [float(np.mean(seeds)) for seeds in values], name, color, band=band)


def _recall_line(cells: list[dict], task: str, name: str, color: str) -> Line:
    edges = np.array(cells[0][task]["edges"], float)
    return _line(np.sqrt(edges[:-1] * edges[1:]), [_shares(cell[task]) for cell in cells], name, color)


def plot_recall(results: dict[str, dict], path: Path) -> None:
    """Draw recall and passkey against distance, in both lengths of text: the rivals, and the best pattern."""
    panels = []
    for part, task in product(("recall", "far"), ("recall", "passkey")):
        groups = recall_groups(results, part)
        lines = [
            _recall_line(groups[name], task, NAMES[name], LINE_COLORS.get(name, name))
            for name in (*RIVALS, BEST)
            if name in groups
        ]
        length = next((cells[0]["cell"]["length"] for cells in groups.values()), 0)
        what = {"recall": "many passages", "passkey": "one passage"}[task]
        panels.append(Panel(f"{what}, texts of {format_count(length)}", lines, scale_share, DISTANCE))
    draw_panels(panels, path, title="Share of a passage's tokens recalled")


def plot_recall_variants(results: dict[str, dict], path: Path) -> None:
    """Draw recall of many passages for every other pattern, five lines per panel."""
    groups = {name: cells for name, cells in recall_groups(results, "recall").items() if name not in RIVALS}
    longer = [name for name in groups if name.endswith(LONGER)]
    shorter = [name for name in groups if name not in longer]
    kinds = {
        "Window and branches": [name for name in shorter if re.match(r"w\d", name)],
        "Trained 4 times as long": longer,
        "Like the paper's: two branches": [x for x in shorter if re.fullmatch(r"longnet \d+,\d+ by \d+,\d+", x)],
    }
    kinds["Like the paper's: other choices"] = [x for x in shorter if not any(x in names for names in kinds.values())]
    panels = []
    for title, names in kinds.items():
        for part in np.array_split(names, math.ceil(len(names) / MOST_LINES)) if names else ():
            lines = [
                _recall_line(groups[name], "recall", _short(name.removesuffix(LONGER)), f"C{number}")
                for number, name in enumerate(part.tolist())
            ]
            panels.append(Panel(title, lines, scale_share, DISTANCE))
    draw_panels(panels, path, columns=1, title="Share of a passage's tokens recalled, many passages in 2K")


def _short(name: str) -> str:
    """Return a cell's pattern in the usual notation, without the word LongNet."""
    if match := re.fullmatch(r"longnet ([\d,]+) by ([\d,]+)", name):
        return " ".join(f"{w}/{r}" for w, r in zip(match[1].split(","), match[2].split(","), strict=True))
    name = {"longnet": "the paper's", "longnet own first stage": "first stage with the paper's pattern"}.get(name, name)
    words = re.sub(r"(\d)-(\d)", r"\1/\2", name.removeprefix("longnet ").replace("_", " "))
    return re.sub(r"(\d)q(\d)", r"\1:\2", words)


def path_steps(segment_lengths: list[int], dilation_rates: list[int], heads: int, length: int) -> np.ndarray:
    """Return how many layers information from each token needs to reach the last one: (length,), 0 for itself."""
    seen = (map_attention(segment_lengths, dilation_rates, heads, length) > 0).any(0).double()
    reached, steps = torch.zeros(length, dtype=torch.float64), np.full(length, -1)
    reached[-1] = 1
    for layer in range(64):
        fresh = (reached.numpy() > 0) & (steps < 0)
        steps[fresh] = layer
        if not fresh.any():
            break
        reached = ((reached @ seen) > 0).double()
    return steps


@styled
def plot_patterns(path: Path) -> None:
    """Draw which keys two heads see, the layers between the last token and every other, and the rows in the cache."""
    segments, rates, heads = [16, 64, 256], [1, 4, 16], 16
    figure = make_figure(height=6.6)
    axes = figure.subplots(2, 2).flat
    weights = map_attention(segments, rates, heads, 256)
    for axis, head in zip(axes, (0, 5), strict=False):
        axis.imshow(weights[head] > 0, cmap="Blues", interpolation="nearest")
        axis.set(title=f"keys of head {head}: 16/1 64/4 256/16", xlabel="key", ylabel="query")
        axis.set(xticks=[0, 128, 255], yticks=[0, 128, 255])
        axis.grid(False)
    layers, cache = list(figure.axes)[2:]
    for number, length in enumerate((256, 1024)):
        longer, rising = [16 * 4**i for i in range(4)], [min(4**i, heads) for i in range(4)]
        longer = [w for w in longer if w <= length]
        steps = path_steps(longer, rising[: len(longer)], heads, length)
        distance = length - 1 - np.arange(length)
        y = np.where((steps > 0) & (distance > 0), steps + 0.12 * number, np.nan)
        layers.plot(distance, y, ".", markersize=4)
        layers.text(1.2, 2 + 0.12 * number, f"{format_count(length)} tokens", color=f"C{number}", va="center")
    layers.set(title="layers needed to reach the last token", xlabel="distance (tokens)", ylim=(0.6, 2.6))
    layers.set_yticks([1, 2])
    tokens = np.unique(np.geomspace(1, 1 << 18, 400).astype(int))
    for name, color, w, r in (
        ("the paper's:\n2K/1 to 32K/12", "longnet", (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)),
        ("512/1 to\n32K/64", "window", (512, 2048, 8192, 32768), (1, 4, 16, 64)),
    ):
        rows = sum(np.ceil(np.minimum(tokens, a) / b) for a, b in zip(w, r, strict=True))
        draw_line(cache, tokens, rows, name, color, marker="")
    draw_line(cache, tokens, tokens, "dense", "dense", marker="")
    cache.set(title="cached tokens, per head and layer", xlabel="tokens read")
    scale_tokens(layers.xaxis)
    scale_tokens(cache.xaxis)
    scale_tokens(cache.yaxis)
    name_lines(cache)
    figure.savefig(path)


def summarize(results: dict[str, dict]) -> str:
    """Return all tables as Markdown."""
    settings = max(results.values(), key=lambda result: result["date"])["settings"]
    branches = ", ".join(f"({w}, {r})" for w, r in zip(*settings["branches"], strict=True))
    sizes = ", ".join(f"{name} {value}" for name, value in settings["sizes"].items())
    return "\n\n".join([
        f"# Dense, LongNet, window and sparse attention in one model ({settings['name']})",
        provenance(results),
        f"Model: {sizes}. LongNet's branches {branches}; window and sparse show a query as many keys at the trained "
        "length (at others they do not), on masked blocks that compute about twice as many "
        "(examples/paper/patterns.py), so their speed is that of this folder. What the tables say, and where LongNet "
        "loses: docs/paper.md.",
        "## Perplexity of the same held-out targets by context, equal training tokens", table(results, "tokens"),
        "LongNet's perplexity divided by the others' at the trained length: mean and each seed's",
        ratio_table(results, "tokens"),
        "## Patterns beyond the paper, one stage at full length", written_table(results, "full"),
        "## The same with more training", written_table(results, "long"),
        "The same with more training, on another machine:", written_table(results, "repeat_long"),
        "## Longer texts after that", written_table(results, "extended"),
        "## A cheaper pattern trained for as long", equal_time_table(results),
        "## Patterns beyond the paper, after a first stage of 512 tokens", written_table(results, "tokens"),
        "## The same at the training time that LongNet took", table(results, "time"), ratio_table(results, "time"),
        "## The paper's own numbers", PAPER,
        "## Recall by distance in tokens, many passages", recall_table(results, "recall", "recall"),
        "## One passage: a passkey", recall_table(results, "recall", "passkey"),
        "## Many passages in longer texts", recall_table(results, "far", "recall"),
        "## One passage in longer texts", recall_table(results, "far", "passkey"),
        "## Learning rates tried: perplexity", sweep_table(results, "sweep"),
        "## Learning rates tried: share of the recall task that is missed", sweep_table(results, "sweep_recall"),
    ]) + "\n"  # fmt: skip


def provenance(results: dict[str, dict]) -> str:
    """Say how many cells there are, and from which commits and days."""
    cells = sorted(results.values(), key=lambda result: result["date"])
    changed = sum(cell["uncommitted_changes"] for cell in cells)
    commits = ", ".join(dict.fromkeys(cell["commit"][:7] for cell in cells))
    return (
        f"{len(cells)} cells, run from {cells[0]['date'][:16]} to {cells[-1]['date'][:16]} at commits {commits} "
        f"({changed} cells with uncommitted changes), Transformers {cells[-1]['versions']['transformers']}; "
        f"the last: {describe(cells[-1])}"
    )


def stages(results: dict[str, dict]) -> str:
    """Say the size of the model and of both stages of its training."""
    cell = next((result for result in results.values() if "parameters" in result), None)
    if cell is None:
        return "No model has been trained on text."
    settings = cell["settings"]
    return (
        f"{cell['parameters']:,} parameters; first {settings['base_tokens']:,} tokens in sequences of "
        f"{settings['base_length']:,}, then {settings['tokens']:,} at the trained length."
    )


def headline(results: dict[str, dict]) -> str:
    """Return what docs/paper.md shows."""
    return "\n\n".join([
        provenance(results), stages(results),
        "Perplexity of the same held-out targets by context:", table(results, "tokens"),
        "LongNet's perplexity divided by the others' at the trained length, mean and each seed's; with equal tokens:",
        ratio_table(results, "tokens"),
        "And with equal time:", ratio_table(results, "time"),
        "Recall of a passage by its distance in tokens, many passages:", recall_table(results, "recall", "recall"),
        "The sweeps, everything at equal time, passkeys, longer texts, and the paper's own numbers: "
        "[summary.md](../examples/paper/results/full/summary.md).",
    ])  # fmt: skip


def beyond_headline(results: dict[str, dict]) -> str:
    """Return what docs/patterns.md shows."""
    timed = ["The window trained for the time that the pattern took, in both stages:", equal_time_table(results)]
    return "\n\n".join([
        provenance({name: r for name, r in results.items() if r["cell"].get("pattern", "") not in RIVALS}),
        "Perplexity of held-out text at the trained length, one stage of training at that length:",
        written_table(results, "full"),
        "The same with 4 times the training, on a newer version of the text; compare within this table only:",
        written_table(results, "long"),
        "And on another machine, with the same seeds:",
        written_table(results, "repeat_long"),
        "A second stage on longer texts, after that longer training on 2,048 tokens:",
        written_table(results, "extended"),
        *(timed if any(name.startswith("time_") for name in results) else ()),
        f"The first table after a first stage of dense attention on 512 tokens. {stages(results)}",
        written_table(results, "tokens"),
        "Share recalled by distance in tokens, many passages:",
        recall_table(results, "recall", "recall", variants=False),
        "One passage:", recall_table(results, "recall", "passkey", variants=False),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FULL, help="JSON files; only the default fills pages")
    folder = parser.parse_args().results
    results = load(folder)
    plot_patterns(folder / "patterns.png")
    if not results:
        print(f"{folder} holds no results. Run python -m examples.paper.run first.")
        return
    (folder / "summary.md").write_text(summarize(results))
    if any(name.startswith("tokens-") for name in results):
        plot_text(results, folder / "text.png")
    if any(name.startswith("recall-") for name in results):
        plot_recall(results, folder / "recall.png")
        plot_recall_variants(results, folder / "recall_variants.png")
    if folder == FULL:
        page = ROOT / "docs" / "patterns.md"
        page.write_text(fill_markers(page.read_text(), "beyond", beyond_headline(results)))
        page = ROOT / "docs" / "paper.md"
        page.write_text(fill_markers(page.read_text(), "paper", headline(results)))
        readme = ROOT / "README.md"
        readme.write_text(fill_markers(readme.read_text(), "quality", quality_table(results)))
    print(summarize(results))


if __name__ == "__main__":
    main()
