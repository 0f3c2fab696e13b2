"""Draw an attention pattern as text and as a picture: what is seen, what it costs, and what the cache holds.

    python -m examples.draw_pattern "w256 2048/8:1 once"
    python -m examples.draw_pattern "2048/1 4096/2 8192/4" --heads 12 --layers 2 --output pattern.png

A pattern is written as `parse_pattern` reads it: a window (w256), branches (segment/rate, or segment/rate:query_rate),
and options (rotate, stagger, once, every2).
"""

if not __package__:
    raise SystemExit('Run this as a module from the repository\'s root: python -m examples.draw_pattern "2048/1"')

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.ticker import FixedLocator, FuncFormatter
from torch import Tensor

from modeling_longnet import LongNetCache, LongNetConfig, parse_pattern
from modeling_longnet.testing import Pattern, count_branches

from .drawing import draw_line, format_count, make_figure, name_lines, scale_log, scale_share, scale_tokens, styled

SHADES = " .:-=+*#%@"
CELLS = 64  # along each side of the map
QUERIES, KEYS = 4, 128  # drawn at random in each cell of the map, at most
DISTANCE_QUERIES = 64  # drawn at random


class Drawing(NamedTuple):
    """What a pattern shows, costs and holds.

    Attributes:
        words: the pattern as written.
        length: tokens of the map.
        seen: (cells, cells), the share of pairs of a query (row) and a key (column) that the query sees, mean over
            heads and layers; causal.
        distances, shares: the share of tokens at each distance before a query that it sees, mean over heads and layers.
        lengths, keys, slots: for each length of a text, the keys that a query sees and the keys that the cache then
            holds, both per head and mean over layers.
    """

    words: str
    length: int
    seen: Tensor
    distances: list[int]
    shares: list[float]
    lengths: list[int]
    keys: list[float]
    slots: list[float]


def _layers(pattern: Pattern, heads: int, layers: int) -> list[tuple]:
    return [pattern.branches(heads, heads, layer) for layer in range(layers)]


def map_seen(pattern: Pattern, heads: int, layers: int, length: int) -> Tensor:
    """Return `Drawing.seen`, exact if a cell holds few tokens, else from tokens drawn at random."""
    cells = min(CELLS, length)
    borders = torch.linspace(0, length, cells + 1).long()
    generator = torch.Generator().manual_seed(0)

    def draw(cell: int, most: int) -> Tensor:
        tokens = torch.arange(borders[cell], borders[cell + 1]) if borders[cell + 1] - borders[cell] <= most else None
        if tokens is None:
            tokens = torch.randint(int(borders[cell]), int(borders[cell + 1]), (most,), generator=generator)
        return tokens

    keys = [draw(cell, KEYS) for cell in range(cells)]
    columns, sizes = torch.cat(keys), [len(x) for x in keys]
    seen = torch.zeros(cells, cells)
    for row in range(cells):
        queries = draw(row, max(QUERIES, KEYS // cells))
        for branches in _layers(pattern, heads, layers):
            shown = count_branches(branches, queries[None], columns[None]) > 0  # (1, heads, queries, keys)
            share = shown[0].float().mean((0, 1)).split(sizes)
            seen[row] += torch.stack([x.mean() for x in share]) / layers
    return seen


def share_by_distance(pattern: Pattern, heads: int, layers: int, distances: list[int]) -> list[float]:
    """Return `Drawing.shares`, from queries that have a token at every distance.

    A share is the mean over the keys from one distance to the next.
    """
    generator = torch.Generator().manual_seed(0)
    longest = max((*pattern.segment_lengths, pattern.window_size or 1))
    queries = torch.randint(longest, 2 * longest + distances[-1], (DISTANCE_QUERIES,), generator=generator)
    queries += distances[-1]
    shares = []
    for low, high in zip(distances, [*distances[1:], 2 * distances[-1]], strict=True):
        back = torch.arange(low, high) if high - low <= KEYS else torch.randint(low, high, (KEYS,), generator=generator)
        keys = (queries[:, None] - back).clamp(min=0)  # (queries, keys): each query a row of the batch
        shown = [
            count_branches(branches, queries[:, None], keys)[:, :, 0] > 0
            for branches in _layers(pattern, heads, layers)
        ]
        shares.append(torch.stack(shown).float().mean().item())
    return shares


def describe_pattern(words: str, heads: int, layers: int, lengths: list[int] | None = None) -> Drawing:
    """Return what is drawn of a pattern.

    Raises:
        ValueError: a word is no part of a pattern, parts do not fit each other, or there is no head or layer.
    """
    pattern, fields = Pattern.parse(words), parse_pattern(words)
    pattern.check()
    if heads < 1 or layers < 1:
        raise ValueError(f"heads={heads}, layers={layers}: give at least one of each.")
    longest = max((*pattern.segment_lengths, 4 * (pattern.window_size or 0)))
    if lengths is None:
        lengths = sorted({max(2, longest >> shift) for shift in (8, 6, 4, 2, 0)} | {4 * longest})
    config = LongNetConfig(
        hidden_size=2 * heads, num_attention_heads=heads, num_hidden_layers=layers, position_embedding="rope",
        **{name: x for name, x in fields.items() if x is not None},
    )  # fmt: skip
    held = LongNetCache(config).layers
    slots = [sum(sum(layer.slots(length)) for layer in held) / layers for length in lengths]
    distances = [1 << n for n in range(longest.bit_length())]
    return Drawing(
        words,
        longest,
        map_seen(pattern, heads, layers, longest),
        distances,
        share_by_distance(pattern, heads, layers, distances),
        lengths,
        [pattern.count_work(length) for length in lengths],
        slots,
    )


def _shade(share: float) -> str:
    """Return a character: blank for nothing, then one step darker for each factor of 3, up to all."""
    if share <= 0:
        return SHADES[0]
    return SHADES[max(1, min(len(SHADES) - 1, round(len(SHADES) - 1 + math.log(share, 3))))]


def format_drawing(drawing: Drawing, head_dim: int = 64) -> str:
    """Return the drawing as text: the sentence, the map, and a table by length."""
    lines = [Pattern.parse(drawing.words).describe(), ""]
    lines.append(f"Queries (down) and keys (across) of {drawing.length:,} tokens; darker: a larger share is seen.")
    pooled = drawing.seen[None, None]
    side = min(32, len(drawing.seen))
    pooled = torch.nn.functional.adaptive_avg_pool2d(pooled, side)[0, 0]
    lines += ["  |" + "".join(2 * _shade(float(x)) for x in row) + "|" for row in pooled]
    lines += ["", "Of the tokens so far back, a query sees (mean over heads and layers):"]
    for distance, share in zip(drawing.distances, drawing.shares, strict=True):
        lines.append(f"{distance:>16,}  {share:>8.2%}  {'#' * round(40 * share)}")
    lines += ["", f"{'tokens':>16}{'keys per query':>16}{'of dense':>10}{'cached keys':>13}{'cache':>15}"]
    for length, keys, slots in zip(drawing.lengths, drawing.keys, drawing.slots, strict=True):
        size = slots * 4 * head_dim / 1024  # a key and a value in bfloat16
        lines.append(f"{length:>16,}{keys:>16,.0f}{2 * keys / length:>10.1%}{slots:>13,.0f}{size:>11,.0f} KiB")
    lines.append(
        f"Per head; the cache in bfloat16 with {head_dim} dimensions. Dense: half of the tokens, and all of them."
    )
    return "\n".join(lines)


@styled
def draw(drawing: Drawing, file: Path) -> None:
    """Draw the map, the share seen by distance, the cost and the cache as a picture."""
    figure = make_figure(height=6.6)
    shown, near, cost, held = figure.subplots(2, 2).flat
    extent = (0, drawing.length, drawing.length, 0)
    # The square root makes what only one head in many sees visible.
    image = shown.imshow(
        drawing.seen.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest"
    )
    ticks = [0, 0.01, 0.1, 0.25, 0.5, 1]
    bar = figure.colorbar(image, ax=shown, ticks=[x**0.5 for x in ticks], shrink=0.8)
    bar.ax.set_yticklabels([f"{x:.0%}" for x in ticks])
    shown.set(title="Share of pairs that is seen", xlabel="key", ylabel="query")
    shown.grid(False)
    near.step(drawing.distances, drawing.shares, where="post")
    near.set(title="Share that is seen by distance", xlabel="tokens back")
    scale_share(near.yaxis)
    for axis, values, dense, title in (
        (cost, drawing.keys, [n / 2 for n in drawing.lengths], "Keys that a query sees, per head"),
        (held, drawing.slots, drawing.lengths, "Keys in the cache, per head"),
    ):
        draw_line(axis, drawing.lengths, values, "this pattern", "longnet")
        draw_line(axis, drawing.lengths, dense, "dense", "dense", mode="forward", marker="")
        axis.set(title=title, xlabel="tokens of the text")
        scale_log(axis.yaxis, format_count)
    for axis in (near, cost, held):
        scale_tokens(axis.xaxis)
    for axis in (shown.xaxis, shown.yaxis):
        axis.set_major_locator(FixedLocator([0, drawing.length // 2, drawing.length]))
        axis.set_major_formatter(FuncFormatter(lambda tokens, _: format_count(tokens)))
    figure.suptitle(drawing.words, x=0.01, ha="left", fontsize=11, fontweight="bold")
    for axis in (cost, held):
        name_lines(axis)
    figure.savefig(file)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", help='such as "w256 2048/8:1 once"')
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4, help="over which rotated offsets and staggered borders vary")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the texts in the table")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("pattern.png"))
    args = parser.parse_args(arguments)
    try:
        drawing = describe_pattern(args.pattern, args.heads, args.layers, args.lengths)
    except ValueError as error:
        parser.error(str(error))
    print(format_drawing(drawing, args.head_dim))
    draw(drawing, args.output)
    print(f"Written: {args.output}")


if __name__ == "__main__":
    main()
