"""Run a slide encoder on generated tiles: batches of ragged slides, embeddings, and a picture of where CLS looks.

    python -m examples.slide_encoder [--model FOLDER] [--output slide.png]

Without --model it builds an untrained encoder of a small size: the picture then shows how the branches spread
attention, not what a trained model looks for. With Prov-GigaPath's own weights, first convert them:

    python -m modeling_longnet.conversion slide_encoder.pth gigapath-slide --attend-zero-padding
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from modeling_longnet import LongNetSlideConfig, LongNetSlideEncoder


def make_slide(side: int, features: int, tile_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make a square of tiles, row by row, with a round piece of tissue and a spot in it whose tiles differ.

    Returns:
        tiles (T, features), coordinates (T, 2) in pixels, tissue (T,) bool, False for background.
    """
    generator = torch.Generator().manual_seed(seed)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    middle, spot = torch.rand(2, 2, generator=generator) * side / 4 + side * 3 / 8
    tissue = (places - middle).square().sum(1) < (0.42 * side) ** 2
    tiles = torch.randn(side**2, features, generator=generator)
    tiles[(places - spot).square().sum(1) < (0.12 * side) ** 2] += 3
    return tiles, places * tile_size, tissue


def stack_slides(slides: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """Pad slides of different size to one batch; the mask is False for padding, as for background."""
    return [torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) for parts in zip(*slides, strict=True)]


def draw_attention(maps: torch.Tensor, coordinates: torch.Tensor, tissue: torch.Tensor, tile_size: int, file: Path):
    """Draw the CLS token's weight on every tile of one slide, mean over heads, for some layers.

    Args:
        maps: (layers, heads, 1 + T); coordinates: (T, 2); tissue: (T,) bool.
    """
    layers = sorted({0, len(maps) // 2, len(maps) - 1})
    places = coordinates // tile_size
    figure = Figure(figsize=(4 * len(layers), 4), layout="constrained")
    for axis, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        picture = torch.full((int(places[:, 0].max()) + 1, int(places[:, 1].max()) + 1), torch.nan)
        kept = places[tissue]
        picture[kept[:, 0], kept[:, 1]] = maps[layer, :, 1:].mean(0)[tissue]
        image = axis.imshow(picture, cmap="viridis")
        axis.set_title(f"layer {layer + 1}, mean of {maps.shape[1]} heads")
        axis.set_axis_off()
        figure.colorbar(image, ax=axis, shrink=0.8)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a LongNetSlideEncoder")
    parser.add_argument("--output", type=Path, default=Path("slide.png"))
    parser.add_argument("--sides", type=int, nargs="+", default=[40, 25], help="tiles along the side of each slide")
    arguments = parser.parse_args()
    if arguments.model:
        encoder = LongNetSlideEncoder.from_pretrained(arguments.model).eval()
    else:
        torch.manual_seed(0)
        branches = {"segment_lengths": [64, 256, 1024], "dilation_rates": [1, 2, 4]}
        sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "tile_features": 64}
        encoder = LongNetSlideEncoder(LongNetSlideConfig(**sizes, **branches)).eval()
    config = encoder.config
    slides = [make_slide(n, config.tile_features, config.tile_size, seed) for seed, n in enumerate(arguments.sides)]
    tiles, coordinates, tissue = stack_slides(slides)
    with torch.no_grad():
        out = encoder(tiles, coordinates, tissue, attention_queries=[0])
    for row, (_, _, kept) in enumerate(slides):
        weights = out.attention_maps[-1, row, :, 0, 1 : 1 + len(kept)]  # (heads, T)
        print(
            f"slide {row}: {int(kept.sum()):,} of {len(kept):,} tiles are tissue, embedding of "
            f"{out.pooler_output.shape[1]} features; tiles to which CLS gives weight in the last layer, by head: "
            f"{weights.count_nonzero(1).tolist()}"
        )
    count = len(slides[0][2])
    draw_attention(
        out.attention_maps[:, 0, :, 0, : 1 + count], coordinates[0, :count], slides[0][2], config.tile_size,
        arguments.output,
    )  # fmt: skip
    print(f"Written: {arguments.output}")


if __name__ == "__main__":
    main()
