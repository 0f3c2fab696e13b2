"""`python -m benchmarks.figures`: rebuild tables and plots from the JSON files of `benchmarks.run`.

Beside every `results/NAME-MACHINE-DATE.json` it writes a `.md` with all numbers and a `.png`. It puts the newest
headline of each NAME and command between NAME's two markers in one of the pages, and a table of speed into the README.
It makes tables and pictures from the examples' results in `docs/` in the same way, draws branches and patterns, and
fills `model_card.md`.
"""

import argparse
import json
import os
import re
from pathlib import Path

import torch
from matplotlib.colors import PowerNorm

from examples import compare, model_card
from examples.drawing import make_figure, styled
from examples.evaluate_perplexity import plot_comparison
from modeling_longnet import dilated_attention, parse_pattern
from modeling_longnet.testing import Pattern

from .measure import ROOT
from .run import BENCHMARKS, RESULTS, describe
from .summary import tabulate_speed

NAMES = ("README.md", "benchmarks/README.md", "docs/billion.md", "docs/patterns.md", "docs/quality.md", "docs/speed.md")
PAGES = [ROOT / name for name in NAMES]

# Results of examples/: files in `--docs` by the name of their markers.
EXAMPLES = {
    "demo": ["demo.json", "demo_window.json", "demo_dense.json"],
    "extend_llama": ["extend_llama.json"],
    "long_documents": ["long_documents.json"],
    "segments": ["same_segments.json", "longer_segments.json"],
}


def tabulate_example(paths: list[Path]) -> str:
    """Tabulate perplexity by context of the models of one comparison, or of each file's one model, and its source."""
    reports = [json.loads(path.read_text()) for path in paths]
    models = {}
    for report in reports:
        models |= report.get("results") or {_name(report, models): report}
    contexts = next(iter(models.values()))["contexts"]
    lines = ["| context | " + " | ".join(f"{context:,}" for context in contexts) + " |"]
    lines.append("| --- |" + " ---: |" * len(contexts))
    for name, scores in models.items():
        pairs = zip(scores["perplexity"], scores["perplexity_error"], strict=True)
        cells = dict(zip(scores["contexts"], pairs, strict=True))
        shown = [_write_score(*cells[context]) if context in cells else "" for context in contexts]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    for path, report in zip(paths, reports, strict=True):
        if missing := {"date", "machine", "torch", "transformers"} - report.keys():
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: run the example that wrote it again.")
    scores, report = next(iter(models.values())), reports[0]
    command = f"`{report['command']}`, " if "command" in report else ""
    source = (
        f"Perplexity of the same {scores['tokens']:,} held-out targets ({scores['blocks']} blocks in "
        f"{scores['documents']} documents), +- one standard error; one seed. {command}{report['date']}, "
        f"{report['machine']}, PyTorch {report['torch']}, Transformers {report['transformers']}."
    )
    others = [f"{name} ({x['date']})" for name, x in models.items() if x["bytes"] != scores["bytes"]]
    if others:  # 'python' is the code of the installed packages
        source += f" Measured on slightly different text, the packages of another day: {', '.join(others)}."
    return source + "\n\n" + "\n".join(lines)


def _write_score(value: float, error: float | None) -> str:
    return f"{value:.1f}" + ("" if error is None else f" +- {error:.1f}")


def _name(report: dict, others: dict[str, dict]) -> str:
    """Return the name of the demo's model, or the branches that a model was read with."""
    if isinstance(report.get("model"), dict):
        return list(compare.name_reports([*others.values(), report]))[-1]
    if not report.get("segment_lengths"):
        return "its own branches"
    return ", ".join(f"({w}, {r})" for w, r in zip(report["segment_lengths"], report["dilation_rates"], strict=True))


def rebuild(path: Path) -> dict:
    """Write the table and the plot of one JSON file beside it; return its content."""
    result = json.loads(path.read_text())
    module = BENCHMARKS[result["name"]]
    picture = path.with_suffix(".png")
    module.plot(result, picture)
    shown = [f"![{path.stem}]({picture.name})"] if picture.exists() else []  # of one point there is no picture
    parts = [f"# {path.stem}", describe(result), *shown, module.tables(result)]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    return result


def fill_markers(text: str, name: str, content: str) -> str:
    """Put `content` between `<!-- results:NAME -->` and `<!-- end:NAME -->`.

    Raises:
        ValueError: the text does not hold the two markers once each.
    """
    begin, end = f"<!-- results:{name} -->", f"<!-- end:{name} -->"
    filled, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}",
        lambda _: f"{begin}\n{content}\n{end}",
        text,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"the page has {count} places from {begin} to {end}; it needs exactly one.")
    return filled


def map_attention(segment_lengths, dilation_rates, heads: int, tokens: int, **pattern) -> torch.Tensor:
    """Return the attention weights of the op when all scores are equal: (heads, tokens, tokens).

    With the identity as values, the output is the map of the weights.
    """
    scores = torch.zeros(1, 1, tokens, tokens).expand(1, heads, -1, -1)
    values = torch.eye(tokens).expand(1, heads, -1, -1)
    return dilated_attention(scores, scores, values, segment_lengths, dilation_rates, backend="eager", **pattern)[0]


@styled
def draw_maps(panels: dict[str, torch.Tensor], path: Path, label: str, columns: int = 3) -> None:
    """Draw maps of (query, key) by their titles, with one colour bar labelled `label`."""
    rows = -(-len(panels) // columns)
    figure = make_figure(height=2.85 * rows)
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True).flat)
    for axis, (title, values) in zip(axes, panels.items(), strict=False):
        # The square root makes the many small values of late queries visible beside the early ones.
        image = axis.imshow(values.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set(xticks=[0, len(values) // 2, len(values) - 1], yticks=[0, len(values) // 2, len(values) - 1])
        axis.grid(False)
        axis.label_outer()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for row in range(rows):
        axes[row * columns].set_ylabel("query")
    for column in range(columns):
        axes[min((rows - 1) * columns + column, len(axes) - 1)].set_xlabel("key")
    figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, label=label, ticks=[0, 0.05, 0.25, 0.5, 1])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_branches(path: Path) -> None:
    """Draw the weights with which a query sees keys: dense, a window, LongNet and its branches, by the op itself."""
    tokens, pattern = 64, {16: 1, 32: 2, 64: 4}
    panels = {
        "dense attention": map_attention([tokens], [1], 1, tokens)[0],
        "sliding window of 16": map_attention([], [], 1, tokens, window_size=16)[0],
        "LongNet: the branches below": map_attention(list(pattern), list(pattern.values()), 4, tokens)[0],
    }
    for w, r in pattern.items():
        every = "every token" if r == 1 else f"every {r}th" if r > 3 else "every 2nd"
        panels[f"branch w = {w}, r = {r}:\n{every} of each {w}"] = map_attention([w], [r], 4, tokens)[0]
    draw_maps(panels, path, "weight of a key, if all scores are equal (head 0)")


def draw_patterns(path: Path) -> None:
    """Draw in how many heads and layers a query sees a key, for the paper's pattern and those beyond it."""
    tokens, heads, layers, panels = 64, 8, 4, {}
    for title, words in {
        "the paper's pattern": "16/1 64/4",
        "rotated offsets": "16/1 64/4 rotate",
        "staggered segments": "16/1 64/4 stagger",
        "sliding window": "w12",
        "window, rotated branch": "w8 64/4 rotate once",
        "window and summaries": "w8 64/8:1 once",
    }.items():
        fields, keys = parse_pattern(words), Pattern.parse(words).count_work(tokens)
        seen = [map_attention(heads=heads, tokens=tokens, layer=i, **fields) > 0 for i in range(layers)]
        panels[f"{title}\n{words} ({keys:.0f} keys)"] = torch.stack(seen).double().mean((0, 1))
    draw_maps(panels, path, "share of heads and layers that see the key")


def draw_length(results: list[dict], path: Path) -> None:
    """Draw time and memory beside dense attention, from the newest result of `length`, on a GPU if there is one."""
    results = [r for r in results if r["name"] == "length" and any(row["who"] == "sdpa" for row in r["rows"])]
    if results:
        best = max(results, key=lambda r: (r["rows"][0]["device"] == "cuda", r["date"]))
        BENCHMARKS["length"].plot(best, path)


def draw_demo(folder: Path) -> None:
    """Draw the stored result of the demo beside the others that were measured on the same text."""
    file = folder / "demo.json"
    if file.exists():
        report = json.loads(file.read_text())
        baselines = compare.read_baselines(report, [folder / path.name for path in compare.BASELINES])
        compare.plot(report, baselines, folder / "demo.png")


def draw_comparisons(folder: Path) -> None:
    """Draw the stored perplexity of several models by context, beside its JSON file."""
    for name in ("extend_llama", "long_documents"):
        if (file := folder / f"{name}.json").exists():
            report = json.loads(file.read_text())
            trained = report.get("settings", {}).get("trained") or report.get("settings", {}).get("length")
            plot_comparison(report["results"], file.with_suffix(".png"), trained=trained)


def find_page(texts: dict[Path, str], name: str) -> Path:
    """Return the one page that holds the name's markers."""
    pages = [page for page, text in texts.items() if f"<!-- results:{name} -->" in text]
    if len(pages) != 1:
        raise ValueError(f"{name}: {len(pages)} of the pages {[*map(str, texts)]} hold its markers; exactly one must.")
    return pages[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, help="files that hold the markers")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of branches.png")
    args = parser.parse_args(arguments)
    draw_branches(args.docs / "branches.png")
    draw_patterns(args.docs / "patterns.png")
    draw_demo(args.docs)
    draw_comparisons(args.docs)
    if args.docs == ROOT / "docs":
        model_card.make_repository_card().save(model_card.CARD)
    results = []
    newest: dict[str, dict[str, tuple[dict, Path]]] = {}  # by name and command
    for path in sorted(args.results.glob("*.json")):
        result = rebuild(path)
        results.append(result)
        print(f"Wrote {path.with_suffix('.md')}")
        runs = newest.setdefault(result["name"], {})
        command = result["command"]
        if command not in runs or runs[command][0]["date"] <= result["date"]:
            runs[command] = (result, path)
    draw_length(results, args.docs / "length.png")
    texts = {page: page.read_text() for page in args.pages}
    for name, files in EXAMPLES.items():
        if present := [args.docs / file for file in files if (args.docs / file).exists()]:
            page = find_page(texts, name)
            texts[page] = fill_markers(texts[page], name, tabulate_example(present))
    for name, runs in newest.items():
        page = find_page(texts, name)
        parts = []
        for result, path in runs.values():
            table = path.with_suffix(".md")
            link = Path(os.path.relpath(table.resolve(), page.resolve().parent)).as_posix()
            parts += [describe(result), BENCHMARKS[name].headline(result), f"All of it: [{table.name}]({link})."]
        texts[page] = fill_markers(texts[page], name, "\n\n".join(parts))
    for page in (page for page, text in texts.items() if "<!-- results:speed -->" in text):
        speed = tabulate_speed(result for runs in newest.values() for result, _ in runs.values())
        texts[page] = fill_markers(texts[page], "speed", speed)
    for page, text in texts.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
