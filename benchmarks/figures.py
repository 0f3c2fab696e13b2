"""`python -m benchmarks.figures`: rebuild tables and plots from the JSON files of `benchmarks.run`.

Beside every `results/NAME-MACHINE-DATE.json` it writes a `.md` with all numbers and a `.png`, and
puts the newest headline of each NAME and command between NAME's two markers in the README or in `benchmarks/README.md`.
It also draws the README's picture of the branches.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from matplotlib.figure import Figure

from modeling_longnet import dilated_attention

from .measure import ROOT
from .run import BENCHMARKS, RESULTS, describe


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


def draw_branches(path: Path) -> None:
    """Draw who sees whom: each branch of a small pattern alone, then their mix, by the op itself.

    With zero scores every key a query sees weighs the same, and with the identity as values the
    output is the attention map.
    """
    tokens, pattern = 64, {16: 1, 32: 2, 64: 4}
    zeros = torch.zeros(1, 2, tokens, tokens)
    values = torch.eye(tokens).expand(1, 2, -1, -1)
    panels = {f"w={w}, r={r}": ([w], [r]) for w, r in pattern.items()}
    panels["all, mixed"] = (list(pattern), list(pattern.values()))
    figure = Figure(figsize=(2.4 * len(panels), 5))
    axes = figure.subplots(2, len(panels), sharex=True, sharey=True)
    for column, (title, branches) in enumerate(panels.items()):
        weights = dilated_attention(zeros, zeros, values, *branches, backend="eager")[0]
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
    parser.add_argument("--pages", type=Path, nargs="+", default=pages, help="files that hold the markers")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of branches.png")
    args = parser.parse_args(arguments)
    draw_branches(args.docs / "branches.png")
    newest: dict[str, dict[str, tuple[dict, Path]]] = {}  # by name and command
    for path in sorted(args.results.glob("*.json")):
        result = rebuild(path)
        print(f"Wrote {path.with_suffix('.md')} and .png")
        runs = newest.setdefault(result["name"], {})
        command = result["command"]
        if command not in runs or runs[command][0]["date"] <= result["date"]:
            runs[command] = (result, path)
    texts = {page: page.read_text() for page in args.pages}
    for name, runs in newest.items():
        pages = [page for page, text in texts.items() if f"<!-- results:{name} -->" in text]
        if len(pages) != 1:
            raise ValueError(f"{name}: {len(pages)} of the pages {[*map(str, texts)]} hold its markers; one must.")
        page = pages[0]
        parts = []
        for result, path in runs.values():
            where, parent = path.with_suffix(".md").resolve(), page.resolve().parent
            link = where.relative_to(parent) if where.is_relative_to(parent) else where
            parts += [describe(result), BENCHMARKS[name].headline(result), f"All of it: [{link}]({link})."]
        texts[page] = fill_markers(texts[page], name, "\n\n".join(parts))
    for page, text in texts.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
