"""Tables and plots of the results in `results/`: rebuilt from the JSON files, nothing is typed by hand.

    python examples/paper/figures.py [--results examples/paper/results/full]

Writes `summary.md` and the plots beside the JSON files, the README's tables, and `patterns.png`: which keys each head
sees, the path between two tokens, and the memory of the cache, all counted from the pattern itself.
"""

import argparse
import json
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from patterns import Pattern, count_computed_keys, count_keys  # noqa: E402

from benchmarks.figures import fill_markers  # noqa: E402
from benchmarks.run import describe  # noqa: E402
from modeling_longnet.branches import make_branches  # noqa: E402
from modeling_longnet.reference import count_branches  # noqa: E402

FULL = ROOT / "examples" / "paper" / "results" / "full"
# Perplexity on The Stack of its models of 125M parameters; ours are small and not to be compared with them.
PAPER = """| the paper's own (arXiv 2307.02486, Table 2, The Stack) | 2K | 8K | 32K |
| --- | ---: | ---: | ---: |
| Transformer, trained on 2K | 4.24 | 5.07 | 11.29 |
| Sparse Transformer, trained on 32K | 5.15 | 4.00 | 3.64 |
| LongNet, trained on 32K | 4.37 | 3.33 | 3.01 |"""


def load(folder: Path) -> dict[str, dict]:
    """Every cell's results by its name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _mean(values: list[float]) -> str:
    """Mean over seeds, with the range where there are several."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(results: dict[str, dict], budget: str) -> str:
    """Table 2: one line for each training length and pattern, one column for each context."""
    groups = defaultdict(list)
    for name, result in results.items():
        # Equal time is LongNet's, of the first seed; its own row is that of equal tokens.
        same = budget == "time" and name.startswith("tokens-longnet-") and result["cell"]["seed"] == 0
        if name.startswith(budget + "-") or same:
            groups[result["cell"]["length"], result["cell"]["pattern"]].append(result)
    if not any(name.startswith(budget + "-") for name in results):
        return f"No cell of equal {budget} has been run."
    contexts = next(iter(groups.values()))[0]["scores"]["contexts"]
    header = [
        "trained on",
        "pattern",
        "keys a query",
        "computed",
        "seeds",
        "steps",
        "tokens a processor second",
        "peak MiB",
    ]
    header += [*(f"{c:,}" for c in contexts), "+- at the trained length"]
    lines = ["| " + " | ".join(header) + " |", "| ---: | --- |" + " ---: |" * (len(header) - 2)]
    for (length, pattern), cells in sorted(groups.items()):
        scores = [cell["scores"] for cell in cells]
        columns = zip(*(s["perplexity"] for s in scores), strict=True)
        keys, computed = (count(Pattern(**cells[0]["work"]), length) for count in (count_keys, count_computed_keys))
        steps = np.mean([c["tokens"] / length for c in cells])
        row = [f"{length:,}", pattern, f"{keys:,.0f}", f"{computed:,.0f}", str(len(cells)), f"{steps:,.0f}"]
        row += [f"{np.mean([c['tokens'] / c['seconds'] for c in cells]):,.0f}"]
        row += [f"{np.mean([c['peak_bytes'] for c in cells]) / 2**20:,.0f}"]
        row += [_mean(list(column)) for column in columns]
        row += [f"{np.mean([s['perplexity_error'][contexts.index(length)] for s in scores]):.2f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _shares(recall: dict) -> list[float]:
    """Of the tokens asked for, how many were told, in each bucket of distances."""
    return [right / max(1, asked) for right, asked in zip(recall["right"], recall["asked"], strict=True)]


def recall_groups(results: dict[str, dict]) -> dict[str, list[dict]]:
    """The seeds' results of each pattern and variant."""
    groups = defaultdict(list)
    for name, result in results.items():
        if name.startswith("recall-"):
            groups[name.removeprefix("recall-").rsplit("-", 1)[0]].append(result)
    return groups


def recall_table(results: dict[str, dict]) -> str:
    """Recall by distance, one line for each pattern."""
    groups = recall_groups(results)
    if not groups:
        return "The recall task has not been run."
    edges = next(iter(groups.values()))[0]["recall"]["edges"]
    lines = [
        "| pattern | keys a query | tokens a processor second | seeds | "
        + " | ".join(f"{a:,} to {b:,}" for a, b in pairwise(edges))
        + " |"
    ]
    lines.append("| --- |" + " ---: |" * (len(edges) + 2))
    for name, cells in groups.items():
        shares = [_shares(cell["recall"]) for cell in cells]
        keys = count_keys(Pattern(**cells[0]["work"]), cells[0]["cell"]["length"])
        row = [name, f"{keys:,.0f}", f"{np.mean([c['tokens'] / c['seconds'] for c in cells]):,.0f}", str(len(cells))]
        lines.append("| " + " | ".join(row + [_mean(list(s)) for s in zip(*shares, strict=True)]) + " |")
    return "\n".join(lines)


def sweep_table(results: dict[str, dict]) -> str:
    """The perplexity of every learning rate tried."""
    rows = defaultdict(dict)
    for name, result in results.items():
        if name.startswith("sweep-"):
            is_base = result["cell"]["kind"] == "base"
            tried = f"{result['cell']['pattern']}, {'first' if is_base else 'second'} stage"
            rows[tried][result["cell"]["rate"]] = (
                np.exp(result["loss"]) if is_base else result["scores"]["perplexity"][-1]
            )
    rates = sorted({rate for row in rows.values() for rate in row})
    lines = ["| pattern | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "| --- |" + " ---: |" * len(rates)]
    lines += [
        f"| {p} | " + " | ".join(f"{row[r]:.1f}" if r in row else "" for r in rates) + " |" for p, row in rows.items()
    ]
    return "\n".join(lines)


def plot_text(results: dict[str, dict], path: Path) -> None:
    """Fig. 6 and 7: loss against training FLOPs, against context, and by position; each line the mean of the seeds."""
    groups = defaultdict(list)
    for name, result in results.items():
        if name.startswith("tokens-"):
            groups[result["cell"]["length"], result["cell"]["pattern"]].append(result)
    figure = Figure(figsize=(15, 5), layout="constrained")
    flops, context, position = figure.subplots(1, 3)
    colors = {"dense": "C0", "longnet": "C1", "window": "C2", "sparse": "C3"}
    styles = dict(zip(sorted({length for length, _ in groups}), (":", "--", "-"), strict=False))
    for (length, pattern), cells in sorted(groups.items()):
        look = {"color": colors[pattern], "linestyle": styles.get(length, "-")}
        losses = np.mean([cell["losses"] for cell in cells], 0)
        width = max(1, len(losses) // 12)
        smooth = losses[: len(losses) // width * width].reshape(-1, width).mean(1)
        work = (np.arange(len(smooth)) + 1) * width * length * cells[0]["flops_a_token"]
        flops.plot(work, smooth, **look, label=f"{pattern}, {length:,}")
        scores = np.mean([np.log(cell["scores"]["perplexity"]) for cell in cells], 0)
        context.plot(cells[0]["scores"]["contexts"], scores, **look, marker=".")
        by_position = np.mean([cell["loss_by_position"] for cell in cells], 0)
        position.plot((np.arange(len(by_position)) + 0.5) / len(by_position), by_position, **look)
    flops.set(xscale="log", xlabel="FLOPs of the second stage", ylabel="training loss, nats a token")
    context.set(xscale="log", xlabel="context (tokens)", ylabel="loss of the same held-out targets, nats a token")
    position.set(xlabel="position in the held-out sequence, share of its length", ylabel="loss, nats a token")
    context.set_xscale("log", base=2)
    figure.legend(*flops.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    figure.suptitle("pattern, and tokens of the sequences it was trained on")
    figure.savefig(path, dpi=130)


def plot_recall(results: dict[str, dict], path: Path) -> None:
    """Recall against distance, the mean of the seeds."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for name, cells in recall_groups(results).items():
        recalls = [cell["recall"] for cell in cells]
        edges = recalls[0]["edges"]
        middles = np.sqrt(np.array(edges[:-1]) * edges[1:])
        axis.plot(middles, np.mean([_shares(recall) for recall in recalls], 0), "o-", label=name)
    axis.set(ylim=(-0.02, 1.02), xlabel="distance of passage and question (tokens)", ylabel="recall")
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=130)


def path_steps(segment_lengths: list[int], dilation_rates: list[int], heads: int, length: int) -> np.ndarray:
    """Layers until the last token has heard of each token: (length,), counted on the pattern; 0 for itself."""
    branches = make_branches(tuple(segment_lengths), tuple(dilation_rates), heads, "interleaved")
    positions = torch.arange(length)[None]
    seen = (count_branches(branches, positions, positions) > 0).any(1)[0].double()
    reached, steps = torch.zeros(length, dtype=torch.float64), np.full(length, -1)
    reached[-1] = 1
    for layer in range(64):
        fresh = (reached.numpy() > 0) & (steps < 0)
        steps[fresh] = layer
        if not fresh.any():
            break
        reached = ((reached @ seen) > 0).double()
    return steps


def plot_patterns(path: Path) -> None:
    """Which keys two heads see; layers between the last token and every other; rows in the cache."""
    segments, rates, heads = [16, 64, 256], [1, 4, 16], 16
    figure = Figure(figsize=(15, 4), layout="constrained")
    axes = figure.subplots(1, 4)
    branches = make_branches(tuple(segments), tuple(rates), heads, "interleaved")
    positions = torch.arange(256)[None]
    counts = count_branches(branches, positions, positions)[0]
    for axis, head in zip(axes[:2], (0, 5), strict=True):
        axis.imshow(counts[head].clamp(max=1), cmap="Blues")
        axis.set(title=f"head {head} of {heads}", xlabel="key", ylabel="query")
    for length in (256, 1024):
        longer, rising = [16 * 4**i for i in range(4)], [min(4**i, heads) for i in range(4)]
        longer = [w for w in longer if w <= length]
        steps = path_steps(longer, rising[: len(longer)], heads, length)
        steps = np.where(steps < 0, np.nan, steps)
        size = 6 if length == 256 else 2
        axes[2].plot(length - 1 - np.arange(length), steps, ".", markersize=size, label=f"{length:,} tokens")
    axes[2].set(xscale="log", xlabel="distance from the last token", ylabel="layers until it has heard of it")
    axes[2].legend()
    tokens = np.arange(1, 200_000, 97)
    for name, (w, r) in {
        "2048 ... 32768 / 1 ... 12 (the paper)": ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)),
        "512 ... 32768 / 1 ... 64": ((512, 2048, 8192, 32768), (1, 4, 16, 64)),
    }.items():
        rows = sum(np.ceil(np.minimum(tokens, a) / b) for a, b in zip(w, r, strict=True))
        axes[3].plot(tokens, rows, label=name)
    axes[3].plot(tokens, tokens, "k:", label="dense")
    axes[3].set(xscale="log", yscale="log", xlabel="tokens read", ylabel="rows in the cache, a head and layer")
    axes[3].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


def summarize(results: dict[str, dict]) -> str:
    """Everything as Markdown."""
    settings = max(results.values(), key=lambda result: result["date"])["settings"]
    branches = ", ".join(f"({w}, {r})" for w, r in zip(*settings["branches"], strict=True))
    sizes = ", ".join(f"{name} {value}" for name, value in settings["sizes"].items())
    return "\n\n".join([
        f"# Dense, LongNet, window and sparse attention in one model ({settings['name']})",
        provenance(results),
        f"Model: {sizes}. LongNet's branches {branches}; window and sparse show a query as many keys at the trained "
        "length (at others they do not), on masked blocks that compute about twice as many "
        "(examples/paper/patterns.py), so their speed is that of this folder. What the tables say, and where LongNet "
        "loses: README, Numbers.",
        "## Perplexity of the same held-out targets by context, equal training tokens", table(results, "tokens"),
        "## The same at the training time that LongNet took, first seed", table(results, "time"),
        "## The paper's own numbers", PAPER,
        "## Recall by distance in tokens", recall_table(results),
        "## Learning rates tried: perplexity", sweep_table(results),
    ]) + "\n"  # fmt: skip


def provenance(results: dict[str, dict]) -> str:
    """How many cells, and the commits and days they come from."""
    cells = sorted(results.values(), key=lambda result: result["date"])
    changed = sum(cell["uncommitted_changes"] for cell in cells)
    commits = ", ".join(dict.fromkeys(cell["commit"][:7] for cell in cells))
    return (
        f"{len(cells)} cells, of {cells[0]['date'][:16]} to {cells[-1]['date'][:16]} and the commits {commits} "
        f"({changed} cells beside changes not yet committed), Transformers {cells[-1]['versions']['transformers']}; "
        f"the last: {describe(cells[-1])}"
    )


def stages(results: dict[str, dict]) -> str:
    """Size of the model and of both stages of its training."""
    cell = next((result for result in results.values() if "parameters" in result), None)
    if cell is None:
        return "No model has been trained on text."
    settings = cell["settings"]
    return (
        f"{cell['parameters']:,} parameters; first {settings['base_tokens']:,} tokens in sequences of "
        f"{settings['base_length']:,}, then {settings['tokens']:,} at the trained length."
    )


def headline(results: dict[str, dict]) -> str:
    """What the README shows."""
    return "\n\n".join([
        provenance(results), stages(results),
        "Perplexity of the same held-out targets by context:", table(results, "tokens"),
        "Recall of a passage by its distance in tokens:", recall_table(results),
        "The sweeps, equal training time, the paper's own numbers: "
        "[examples/paper/results/full/summary.md](examples/paper/results/full/summary.md).",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FULL, help="of another folder the README shows nothing")
    folder = parser.parse_args().results
    results = load(folder)
    plot_patterns(folder / "patterns.png")
    if not results:
        print(f"{folder} holds no results: run examples/paper/run.py first.")
        return
    (folder / "summary.md").write_text(summarize(results))
    if any(name.startswith("tokens-") for name in results):
        plot_text(results, folder / "text.png")
    if any(name.startswith("recall-") for name in results):
        plot_recall(results, folder / "recall.png")
    if folder == FULL:
        readme = ROOT / "README.md"
        readme.write_text(fill_markers(readme.read_text(), "paper", headline(results)))
    print(summarize(results))


if __name__ == "__main__":
    main()
