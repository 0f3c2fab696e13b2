"""Time and peak memory of a slide encoder of the published size (12 layers, 768, 16 heads; random weights) on a slide.

The rival is the same encoder with dense attention (one branch as long as the slide), for up to `--dense-most` tiles.
Every measurement is one forward pass in its own process, in turn. Its peak counts all resident memory, including the
libraries, the weights and the tiles.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from tqdm import tqdm

from examples.drawing import Line, Panel, draw_panels, scale_linear, scale_seconds
from modeling_longnet import LongNetSlideConfig, LongNetSlideEncoder

from .measure import highest_resident_bytes, spread

WARM_UP = 300  # tiles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiles", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--dense-most", type=int, default=10_000, help="most tiles for dense attention")
    parser.add_argument("--rounds", type=int, default=1, help="how often everything is measured, in turn")
    parser.add_argument("--layers", type=int, default=12, help="fewer for a short run")
    parser.add_argument("--map", action="store_true", help="also compute the CLS token's attention maps")


def make_encoder(who: str, tiles: int, layers: int) -> LongNetSlideEncoder:
    """Return an encoder of the published size with random weights; dense attention is one branch over all tokens."""
    torch.manual_seed(0)
    branches = {"segment_lengths": [tiles + 1], "dilation_rates": [1]} if who == "dense" else {}
    return LongNetSlideEncoder(LongNetSlideConfig(num_hidden_layers=layers, **branches)).eval()


def make_slide(tiles: int, config: LongNetSlideConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Make random features, and coordinates of tiles in the rows of a square."""
    side = max(1, round(tiles**0.5))
    number = torch.arange(tiles)
    coordinates = torch.stack([number // side, number % side], -1)[None] * config.tile_size
    return torch.randn(1, tiles, config.tile_features), coordinates


@torch.no_grad()
def _measure(who: str, tiles: int, args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    encoder = make_encoder(who, tiles, args.layers)
    queries = [0] if args.map else None
    encoder(*make_slide(WARM_UP, encoder.config), attention_queries=queries)
    slide = make_slide(tiles, encoder.config)
    begin = time.perf_counter()
    out = encoder(*slide, attention_queries=queries)
    seconds = time.perf_counter() - begin
    if not out.pooler_output.isfinite().all():
        raise ValueError(f"{who}, {tiles} tiles: the embedding is not finite.")
    return {"who": who, "tiles": tiles, "seconds": seconds, "peak_bytes": highest_resident_bytes()}


def run(args: argparse.Namespace) -> dict:
    cases = [(who, tiles) for tiles in args.tiles for who in ("longnet", "dense") if _wanted(who, tiles, args)]
    context = multiprocessing.get_context("spawn")
    samples = []
    for number in range(args.rounds):
        for who, tiles in tqdm(cases[:: -1 if number % 2 else 1], desc=f"Round {number + 1}", unit="slide"):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                samples.append(pool.submit(_measure, who, tiles, args).result())
    return {"layers": args.layers, "map": args.map, "samples": samples}


def _wanted(who: str, tiles: int, args: argparse.Namespace) -> bool:
    return who == "longnet" or tiles <= args.dense_most


def _of(result: dict, who: str, tiles: int, field: str) -> list[float]:
    return [s[field] for s in result["samples"] if (s["who"], s["tiles"]) == (who, tiles)]


def tables(result: dict) -> str:
    """Format seconds, tiles per second and peak memory of every size."""
    lines = [
        "| tiles | attention | s, median (least to most) | tiles/s | peak GiB |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for who, tiles in dict.fromkeys((s["who"], s["tiles"]) for s in result["samples"]):
        s = spread(_of(result, who, tiles, "seconds"))
        peak = max(_of(result, who, tiles, "peak_bytes")) / 2**30
        name = "dilated" if who == "longnet" else who
        lines.append(
            f"| {tiles:,} | {name} | {s.median:.1f} ({s.least:.1f} to {s.most:.1f}) | {tiles / s.median:,.0f} "
            f"| {peak:.1f} |"
        )
    maps = ", with the CLS token's attention maps" if result["map"] else ""
    return "\n".join(lines) + f"\n\n{result['layers']} layers, E 768, 16 heads, float32, batch 1{maps}."


headline = tables


def plot(result: dict, path: str) -> None:
    """Draw time and peak memory against the number of tiles."""
    seconds, memory = [], []
    for who, name in (("dense", "dense"), ("longnet", "LongNet")):
        sizes = sorted({s["tiles"] for s in result["samples"] if s["who"] == who})
        seconds.append(Line(sizes, [spread(_of(result, who, n, "seconds")).median for n in sizes], name, who))
        memory.append(Line(sizes, [max(_of(result, who, n, "peak_bytes")) / 2**30 for n in sizes], name, who))
    tiles = "tiles of a slide"
    panels = [Panel("Time to encode a slide", seconds, scale_seconds, tiles)]
    draw_panels([*panels, Panel("Peak memory (GiB)", memory, scale_linear, tiles)], path)
