"""Prov-GigaPath's slide encoder (Xu et al., Nature 630, 2024): embeds whole slides from the features of their tiles.

Letters: B slides, T tiles, L = 1 + T tokens (CLS first), K tokens that remain once tiles are left out (in the slide
with most), E hidden size, H heads, G key/value heads, N layers, Q queries.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.utils import ModelOutput, can_return_tuple

from .attention_context import count_zero_keys, make_context, plan_branches
from .configuration_longnet import LongNetConfig
from .modeling_longnet import LongNetBackbone, LongNetBlock, check_shape
from .packing import pack
from .reference import count_branches, dense_attention

POOLING = ("cls", "mean")
# 16 bits are too few: int16 ends at 32,767, and float16 and bfloat16 skip whole tiles far from the origin.
COORDINATES = (torch.int32, torch.int64, torch.float32, torch.float64)


@strict
class LongNetSlideConfig(LongNetConfig):
    r"""A bidirectional LongNet over tiles. The defaults are the published `gigapath_slide_enc12l768d`.

    Args:
        tile_features: features of a tile, as the tile encoder returns them.
        tile_size: side of a tile in pixels.
        grid_size: side of the grid in tiles; coordinates are in [0, grid_size * tile_size).
        pooling: a slide's embedding is that of the CLS token ("cls") or the mean over its tiles ("mean").
        pooling_norm_eps: epsilon of the LayerNorm of pooled embeddings.
        Others: as in `LongNetConfig`.

    Raises:
        StrictDataclassError or ValueError: names the field, the value and what is allowed.
    """

    model_type = "longnet_slide"
    auto_classes = {"AutoConfig": "slide_encoder.LongNetSlideConfig", "AutoModel": "slide_encoder.LongNetSlideEncoder"}

    vocab_size: int | None = None
    num_attention_heads: int = 16
    segment_lengths: list[int] | tuple[int, ...] = (1024, 5792, 32768, 185363, 1048576)
    dilation_rates: list[int] | tuple[int, ...] = (1, 2, 4, 8, 16)
    head_offsets: str = "blocked"
    is_causal: bool = False
    position_embedding: str = "none"
    dropout: float | int = 0.25
    drop_path_rate: float | int = 0.1
    tile_features: int = 1536
    tile_size: int = 256
    grid_size: int = 1000
    pooling: str = "cls"
    pooling_norm_eps: float = 1e-6

    def validate_slide(self):
        """Check the grid, and that the model is bidirectional, with no positions of its own and no vocabulary."""
        sizes = "tile_features", "tile_size", "grid_size"
        self._check_numbers(sizes, lambda size: size >= 1, "must be at least 1")
        self._check_name("pooling", POOLING)
        self._check_numbers(["pooling_norm_eps"], lambda eps: 0 < eps < math.inf, "must be above 0 and finite")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of 4: sine and cosine of two axes.")
        if self.is_causal or self.position_embedding != "none" or self.vocab_size is not None:
            raise ValueError(
                f"is_causal={self.is_causal}, position_embedding={self.position_embedding!r}, "
                f"vocab_size={self.vocab_size}: a slide encoder is bidirectional, takes positions from the tiles' "
                'coordinates and has no vocabulary; leave them at False, "none", None.'
            )


@dataclass
class SlideEncoderOutput(ModelOutput):
    """Output of `LongNetSlideEncoder`. Tokens of tiles left out are 0.

    Args:
        pooler_output: (B, E), the slides' embeddings.
        last_hidden_state: (B, L, E), after the encoder's final norm.
        layer_embeddings: (N + 1, B, E), the input and every layer's output, pooled like the slide's embedding but
            without the encoder's final norm (Prov-GigaPath's `all_layer_embed`).
        attention_maps: (N, B, H, Q, L), if requested.
        hidden_states: N + 1 times (B, L, E), if requested: the input, then every layer's output, the last one after the
            final norm; 0 for tiles left out. If only some are requested, by index, the others are None.
        attentions: N times (B, H, L, L), if requested: the attention maps of every token.
    """

    pooler_output: Tensor | None = None
    last_hidden_state: Tensor | None = None
    layer_embeddings: Tensor | None = None
    attention_maps: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class _Layout(NamedTuple):
    """Slides without the tiles left out: the remaining tokens in their order, then padding."""

    tokens: Tensor  # (B, K), token numbers 0 .. L - 1; padding has those of tiles left out
    real: Tensor  # (B, K) bool, False for padding
    total: int  # L

    def select(self, x: Tensor) -> Tensor:
        """(B, T, features) -> (B, K - 1, features). Padding is 0: tiles left out may hold NaN."""
        return _gather_columns(x, self.tokens[:, 1:] - 1).masked_fill(~self.real[:, 1:, None], 0)


def _make_layout(attention_mask: Tensor | None) -> _Layout | None:
    """Return the layout, None if no tile is left out."""
    if attention_mask is None or (attention_mask != 0).all():
        return None
    real = nn.functional.pad(attention_mask != 0, (1, 0), value=True)
    tokens = (~real).int().argsort(dim=1, stable=True)[:, : int(real.sum(1).max())]
    return _Layout(tokens, real.gather(1, tokens), real.shape[1])


def _gather_columns(x: Tensor, columns: Tensor) -> Tensor:
    """(B, columns, features), (B, Q) -> (B, Q, features)."""
    return x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))


def _restore(x: Tensor, layout: _Layout | None) -> Tensor:
    """(B, K, ...) -> (B, L, ...), 0 for tiles left out."""
    if layout is None:
        return x
    rows, columns = layout.real.nonzero(as_tuple=True)
    whole = x.new_zeros(len(x), layout.total, *x.shape[2:])
    whole[rows, layout.tokens[rows, columns]] = x[rows, columns]
    return whole


def _restore_keys(weights: Tensor, layout: _Layout | None) -> Tensor:
    """(B, H, Q, K) -> (B, H, Q, L), 0 for tiles left out."""
    return _restore(weights.movedim(-1, 1), layout).movedim(1, -1)


def _selected(wanted: bool | int | list[int] | None, count: int) -> set[int]:
    """Return which of `count` hidden states are requested: all, or some by index, as in Transformers 5.24."""
    if not wanted or wanted is True:
        return set(range(count)) if wanted else set()
    return {i % count for i in ([wanted] if isinstance(wanted, int) else wanted) if -count <= i < count}


def place_features(size: int, dim: int) -> Tensor:
    """Return the sines, then cosines, of the places 0 .. size - 1 on one axis: (size, dim) float32.

    omega_k = 10000 ** (-k / (dim / 2)); computed in float64, then rounded, as in the released table.
    """
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = torch.arange(size, dtype=torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], 1).float()


class LongNetSlideEncoder(LongNetBackbone):
    """Embed slides from the features and coordinates of their tiles; Prov-GigaPath's `LongNetViT`.

    Example:
        >>> encoder = LongNetSlideEncoder(LongNetSlideConfig(num_hidden_layers=2)).eval()
        >>> tiles, coordinates = torch.randn(1, 100, 1536), torch.randint(0, 256_000, (1, 100, 2))
        >>> encoder(tiles, coordinates, attention_queries=[0]).attention_maps.shape
        torch.Size([2, 1, 16, 1, 101])
    """

    config: LongNetSlideConfig
    config_class = LongNetSlideConfig
    main_input_name = "tiles"
    _can_record_outputs = {}
    _input_embed_layer = "tile_embed"

    def __init__(self, config: LongNetSlideConfig):
        super().__init__(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.tile_embed = nn.Linear(config.tile_features, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.pooling_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        tiles: Tensor,
        coordinates: Tensor,
        attention_mask: Tensor | None = None,
        attention_queries: Tensor | list[int] | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> SlideEncoderOutput:
        """Embed slides.

        Args:
            tiles: (B, T, tile_features), any floating dtype.
            coordinates: (B, T, 2), pixels of the tiles' corners at the level where a tile has `tile_size`; integers or
                floats of at least 32 bits.
            attention_mask: (B, T), zero for tiles to leave out, background and padding alike, at any place. The result
                is that of the other tiles alone, in their order.
            attention_queries: token numbers, 0 for CLS, i + 1 for tile i. Their attention maps hold the weight that
                each of them gives to every token, over all branches. A row sums to 1 (less with `attend_zero_padding`)
                and is 0 for a tile left out. Memory grows with H * Q * L.
            output_hidden_states, output_attentions, return_dict: as in Transformers; the config's if not given.
                Attention weights are computed beside the layers, with any attn_implementation.

        Raises:
            ValueError: shapes or dtypes that do not fit, a slide without tiles, a tile outside the grid.
        """
        if self.sequence_group() is not None:
            raise ValueError("slides cannot be sharded; turn sequence sharding off, give each process its own slides.")
        self._check_slides(tiles, coordinates, attention_mask)
        layout, length = _make_layout(attention_mask), 1 + tiles.shape[1]
        if layout is not None:
            tiles, coordinates = layout.select(tiles), layout.select(coordinates)
        hidden_states = self.dropout(self._embed_tiles(tiles, coordinates))
        record = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        states, weights = (getattr(self.config, name) if value is None else value for name, value in record.items())
        tokens = attention_queries, range(length) if weights else None
        queries = [None if x is None else self._make_queries(x, hidden_states, layout) for x in tokens]
        return self._encode_tiles(hidden_states, layout, *queries, _selected(states, 1 + len(self.layers)))

    def _encode_tiles(self, hidden_states: Tensor, layout, queries, every, kept: set[int]) -> SlideEncoderOutput:
        """Run the layers on (B, K, E); return the maps of `queries` and of `every` token, and the states `kept`.

        It records states itself: hooks (`capture_outputs`) would record columns without the tiles left out, and a
        compiled encoder would lose what they record.
        """
        real = None if layout is None else layout.real
        context = make_context(self.config, hidden_states, self.backend(hidden_states), real)
        pooled, maps, weights = [self._pool(hidden_states, real)], [], []
        states = [_restore(hidden_states, layout) if 0 in kept else None]
        for layer in self.layers:
            for requested, found in ((queries, maps), (every, weights)):
                if requested is not None:
                    found.append(_restore_keys(self._attention_map(layer, hidden_states, *requested), layout))
            hidden_states = layer(hidden_states, context)
            pooled.append(self._pool(hidden_states, real))
            states.append(_restore(hidden_states, layout) if len(states) in kept else None)
        hidden_states = self.layer_norm(hidden_states)
        whole = _restore(hidden_states, layout)
        states[-1] = None if states[-1] is None else whole
        return SlideEncoderOutput(
            pooler_output=self._pool(hidden_states, real),
            last_hidden_state=whole,
            layer_embeddings=torch.stack(pooled),
            attention_maps=torch.stack(maps) if maps else None,
            hidden_states=tuple(states) if kept else None,
            attentions=tuple(weights) if weights else None,
        )

    def _check_slides(self, tiles: Tensor, coordinates: Tensor, attention_mask: Tensor | None) -> None:
        check_shape("tiles", tiles, "slides", "tiles", self.config.tile_features)
        check_shape("coordinates", coordinates, *tiles.shape[:2], 2)
        if attention_mask is not None and attention_mask.shape != tiles.shape[:2]:
            given, expected = tuple(attention_mask.shape), tuple(tiles.shape[:2])
            raise ValueError(f"attention_mask has shape {given}; expected {expected}, as the CLS token has no entry.")
        if coordinates.dtype not in COORDINATES:
            allowed = ", ".join(map(str, COORDINATES))
            raise ValueError(f"coordinates has dtype {coordinates.dtype}, which skips pixels; give one of {allowed}.")
        has_tiles = [] if attention_mask is None else (attention_mask != 0).any(1).tolist()
        if not all(has_tiles):
            empty = has_tiles.index(False)
            raise ValueError(f"attention_mask leaves slide {empty} without any tile; leave the slide out of the batch.")

    def _embed_tiles(self, tiles: Tensor, coordinates: Tensor) -> Tensor:
        """(B, K - 1, features), (B, K - 1, 2) -> (B, K, E): the CLS token, then projected tiles with their places."""
        places = torch.div(coordinates, self.config.tile_size, rounding_mode="floor").long()
        outside = (places < 0) | (places >= self.config.grid_size)
        if outside.any():
            slide, tile, _ = outside.nonzero()[0].tolist()
            raise ValueError(
                f"tile {tile} of slide {slide} is at {coordinates[slide, tile].tolist()} pixels; expected at least 0, "
                f"below grid_size * tile_size = {self.config.grid_size * self.config.tile_size}. Shift the slide to "
                "the origin, give the coordinates of the level with such tiles, or make the config's grid_size larger."
            )
        embeds = self.tile_embed(tiles.to(self.tile_embed.weight.dtype))
        size = self.config.grid_size if places.is_meta else 1 + int(places.max())
        table = place_features(size, self.config.hidden_size // 2).to(embeds)
        # The first half of the features encodes the second coordinate, as in the released table.
        embeds = embeds + torch.cat([table[places[..., 1]], table[places[..., 0]]], -1)
        return torch.cat([self.cls_token.expand(len(embeds), -1, -1).to(embeds.dtype), embeds], 1)

    def _pool(self, hidden_states: Tensor, real: Tensor | None) -> Tensor:
        """(B, K, E) -> (B, E)."""
        if self.config.pooling == "cls":
            return self.norm(hidden_states[:, 0])
        if real is None:
            return self.norm(hidden_states[:, 1:].mean(1))
        weights = real[:, 1:] / real[:, 1:].sum(1, keepdim=True)
        return self.norm((weights.to(hidden_states.dtype)[:, None] @ hidden_states[:, 1:])[:, 0])

    def _make_queries(self, tokens, hidden_states: Tensor, layout: _Layout | None) -> tuple:
        """Return what `_attention_map` takes for these tokens.

        Returns:
            (B, Q) columns; the (B, G or H, Q, K) counts of what they see, one per layer or one for all; and the
            (B, G, Q) zero keys, or None.
        """
        batch, length, _ = hidden_states.shape
        columns = torch.arange(length, device=hidden_states.device).expand(batch, -1)
        if layout is None:
            layout = _Layout(columns, torch.ones_like(columns, dtype=torch.bool), length)
        tokens = torch.as_tensor(tokens, device=hidden_states.device)
        numbers = tokens.tolist()
        if tokens.dim() != 1 or not numbers or not all(type(n) is int and 0 <= n < layout.total for n in numbers):
            raise ValueError(
                f"attention_queries={numbers}: expected a list of whole token numbers, 0 (CLS) to {layout.total - 1}."
            )
        match = (layout.tokens[:, None] == tokens[:, None]) & layout.real[:, None]  # (B, Q, K)
        found, of_queries = match.int().max(-1)  # 1 and its column, or 0 for a tile left out
        # Documents: 0, or -1 for padding and for queries left out, which see nothing.
        given = of_queries, columns, found - 1, layout.real.int() - 1
        counts = tuple(count_branches(x, *given, is_causal=False) for x in plan_branches(self.config))
        zero_keys = None
        if self.config.attend_zero_padding:
            packing = pack(batch, length, hidden_states.device, layout.real)
            zero_keys = count_zero_keys(self.config, packing, hidden_states)  # (B, G, K)
            zero_keys = zero_keys.gather(2, of_queries[:, None].expand(-1, zero_keys.shape[1], -1))
        return of_queries, counts, zero_keys

    def _attention_map(self, layer: LongNetBlock, hidden_states: Tensor, columns, counts, zero_keys) -> Tensor:
        """Return the (B, H, Q, K) weights of a layer's dense attention, for the requested queries only."""
        attention, scale = layer.self_attn, self.config.head_dim**-0.5
        hidden_states = layer.self_attn_layer_norm(hidden_states)
        query = attention.project(_gather_columns(hidden_states, columns), attention.q_proj).transpose(1, 2)
        key = attention.project(hidden_states, attention.k_proj).transpose(1, 2)
        counts = counts[attention.layer_idx if len(counts) > 1 else 0]
        return dense_attention(query, key, key[..., :0], counts, scale, zero_keys)[1]


LongNetSlideConfig.register_for_auto_class()
LongNetSlideEncoder.register_for_auto_class("AutoModel")

__all__ = ["LongNetSlideConfig", "LongNetSlideEncoder", "SlideEncoderOutput"]
