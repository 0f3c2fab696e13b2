"""`python -m benchmarks.figures`: rebuild tables and plots from the JSON files of `benchmarks.run`.

Beside every `results/NAME-MACHINE-DATE.json` it writes a `.md` with all numbers and a `.png`, and
puts the newest headline of each NAME and command between NAME's two markers in one of the pages, and a table of six
rows of them in the README. What the examples wrote, kept in `docs/`, becomes tables in the same way. It also draws the
pictures of branches and patterns.
"""

import argparse
import json
import os
import re
from pathlib import Path

import torch
from matplotlib.figure import Figure

from modeling_longnet import dilated_attention, parse_pattern
from modeling_longnet.testing import Pattern

from .measure import ROOT
from .run import BENCHMARKS, RESULTS, describe
from .summary import tabulate_speed

NAMES = ("README.md", "benchmarks/README.md", "docs/patterns.md", "docs/quality.md", "docs/speed.md")
PAGES = [ROOT / name for name in NAMES]

# Files of one comparison that do not name their model themselves.
LABELS = {"demo_paper": "the paper's pattern", "demo": "window of 512, summaries, keys once"}
# What examples/ wrote: files of `--docs` by the name of their markers.
EXAMPLES = {
    "demo": ["demo_paper.json", "demo.json"],
    "extend_llama": ["extend_llama.json"],
    "long_documents": ["long_documents.json"],
    "segments": ["same_segments.json", "longer_segments.json"],
}


def tabulate_example(paths: list[Path]) -> str:
    """Perplexity by context of the models in one comparison, or of each file's one model, and where it comes from."""
    reports = [json.loads(path.read_text()) for path in paths]
    models = {}
    for path, report in zip(paths, reports, strict=True):
        models |= report.get("results") or {LABELS.get(path.stem) or _branches(report): report}
    contexts = next(iter(models.values()))["contexts"]
    lines = ["| context | " + " | ".join(f"{context:,}" for context in contexts) + " |"]
    lines.append("| --- |" + " ---: |" * len(contexts))
    for name, scores in models.items():
        cells = zip(scores["perplexity"], scores["perplexity_error"], strict=True)
        shown = (f"{value:.1f}" + ("" if error is None else f" +- {error:.1f}") for value, error in cells)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    for path, report in zip(paths, reports, strict=True):
        if missing := {"date", "machine", "torch", "transformers"} - report.keys():
            raise ValueError(f"{path} does not say its {', '.join(sorted(missing))}: run the example again.")
    scores, report = next(iter(models.values())), reports[-1]
    command = f"`{report['command']}`, " if "command" in report else ""
    source = (
        f"Perplexity of the same {scores['tokens']:,} held-out targets ({scores['blocks']} blocks in "
        f"{scores['documents']} documents), +- one standard error; one seed. {command}{report['date']}, "
        f"{report['machine']}, PyTorch {report['torch']}, Transformers {report['transformers']}."
    )
    return source + "\n\n" + "\n".join(lines)


def _branches(report: dict) -> str:
    """The branches that a model was read with."""
    if not report.get("segment_lengths"):
        return "its own branches"
    return ", ".join(f"({w}, {r})" for w, r in zip(report["segment_lengths"], report["dilation_rates"], strict=True))


def rebuild(path: Path) -> dict:
    """Write the table and the plot of one JSON file beside it; returns its content."""
    result = json.loads(path.read_text())
    module = BENCHMARKS[result["name"]]
    picture = path.with_suffix(".png")
    module.plot(result, picture)
    parts = [
        f"# {path.stem}",
        describe(result),
        f"![{path.stem}]({picture.name})",
        module.tables(result),
    ]
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
        raise ValueError(f"{count} places from {begin} to {end}; a page needs exactly one.")
    return filled


def map_attention(segment_lengths, dilation_rates, heads: int, tokens: int, **pattern) -> torch.Tensor:
    """Return the attention weights of the op when all scores are equal: (heads, tokens, tokens).

    With the identity as values, the output is the map of the weights.
    """
    scores = torch.zeros(1, 1, tokens, tokens).expand(1, heads, -1, -1)
    values = torch.eye(tokens).expand(1, heads, -1, -1)
    return dilated_attention(scores, scores, values, segment_lengths, dilation_rates, backend="eager", **pattern)[0]


def draw_branches(path: Path) -> None:
    """Draw which keys a query sees: each branch of a small pattern alone, then all of them, by the op itself."""
    tokens, pattern = 64, {16: 1, 32: 2, 64: 4}
    panels = {f"w={w}, r={r}": ([w], [r]) for w, r in pattern.items()}
    panels["all, mixed"] = (list(pattern), list(pattern.values()))
    figure = Figure(figsize=(2.4 * len(panels), 5))
    axes = figure.subplots(2, len(panels), sharex=True, sharey=True)
    for column, (title, branches) in enumerate(panels.items()):
        weights = map_attention(*branches, 2, tokens)
        axes[0][column].set_title(title)
        for head in range(2):
            # The root lets the many small weights of late queries be seen beside the early ones.
            axes[head][column].imshow(weights[head].sqrt().numpy(), cmap="Blues", vmin=0, vmax=0.6)
    for head in range(2):
        axes[head][0].set_ylabel(f"head {head}: query")
    figure.supxlabel("key")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_patterns(path: Path) -> None:
    """Draw in how many heads and layers a query sees a key, for the paper's pattern and those beyond it."""
    tokens, heads, layers = 64, 8, 4
    panels = {
        "the paper: pairs that never meet": "16/1 64/4",
        "rotated offsets": "16/1 64/4 rotate",
        "staggered segments": "16/1 64/4 stagger",
        "window first, keys once": "w8 64/4 rotate once",
        "window, summaries, keys once": "w8 64/8:1 once",
    }
    figure = Figure(figsize=(3 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, words) in zip(axes, panels.items(), strict=True):
        fields = parse_pattern(words)
        seen = [map_attention(heads=heads, tokens=tokens, layer=i, **fields) > 0 for i in range(layers)]
        share = torch.stack(seen).double().mean((0, 1))
        keys = Pattern.parse(words).count_work(tokens)
        # The root lets pairs that meet in one head be seen beside those that meet in all.
        axis.imshow(share.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"{title}\n{words}: {keys:.0f} keys", fontsize="medium")
        axis.set_xlabel("key")
    axes[0].set_ylabel("query")
    figure.savefig(path, dpi=110)


def find_page(texts: dict[Path, str], name: str) -> Path:
    """The one page that holds the name's markers."""
    pages = [page for page, text in texts.items() if f"<!-- results:{name} -->" in text]
    if len(pages) != 1:
        raise ValueError(f"{name}: {len(pages)} of the pages {[*map(str, texts)]} hold its markers; one must.")
    return pages[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, help="files that hold the markers")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of branches.png")
    args = parser.parse_args(arguments)
    draw_branches(args.docs / "branches.png")
    draw_patterns(args.docs / "patterns.png")
    newest: dict[str, dict[str, tuple[dict, Path]]] = {}  # by name and command
    for path in sorted(args.results.glob("*.json")):
        result = rebuild(path)
        print(f"Wrote {path.with_suffix('.md')} and .png")
        runs = newest.setdefault(result["name"], {})
        command = result["command"]
        if command not in runs or runs[command][0]["date"] <= result["date"]:
            runs[command] = (result, path)
    texts = {page: page.read_text() for page in args.pages}
    for name, files in EXAMPLES.items():
        if all((args.docs / file).exists() for file in files):
            page = find_page(texts, name)
            texts[page] = fill_markers(texts[page], name, tabulate_example([args.docs / file for file in files]))
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
