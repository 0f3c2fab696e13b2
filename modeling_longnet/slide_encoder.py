"""Prov-GigaPath's slide encoder (Xu et al., Nature 630, 2024): the tiles of a whole slide in, its embedding out.

Letters: B slides, T tiles of the largest, L = 1 + T tokens (CLS first), E hidden size, H heads, N layers, Q queries.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .attention_context import config_branches, count_zero_keys, make_context
from .configuration_longnet import LongNetConfig
from .modeling_longnet import LongNetBackbone, LongNetBlock
from .packing import pack
from .reference import count_branches, dense_attention

POOLING = ("cls", "mean")
# 16 bits hold no pixels: int16 ends at 32,767, and float16 and bfloat16 skip whole tiles far from the origin.
COORDINATES = (torch.int32, torch.int64, torch.float32, torch.float64)


@strict
class LongNetSlideConfig(LongNetConfig):
    r"""A bidirectional LongNet over tiles. The defaults are the published `gigapath_slide_enc12l768d`.

    Args:
        tile_features: features of a tile, as the tile encoder gives them.
        tile_size: pixels of a tile's side, the unit of the coordinates' grid.
        grid_size: tiles of the grid's side; coordinates lie in [0, grid_size * tile_size).
        pooling: the slide's embedding is that of the CLS token ("cls"), or the mean over the tiles ("mean").
        pooling_norm_eps: epsilon of the LayerNorm of pooled embeddings.
        Others: as in `LongNetConfig`.

    Raises:
        StrictDataclassError or ValueError: says the field, the value and what is allowed.
    """

    model_type = "longnet_slide"
    auto_classes = {
        "AutoConfig": "slide_encoder.LongNetSlideConfig",
        "AutoModel": "slide_encoder.LongNetSlideEncoder",
    }

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
        """Sizes of the grid, and that every token sees the whole slide."""
        for name in ("tile_features", "tile_size", "grid_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        self._check_name("pooling", POOLING)
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of 4: sine and cosine of two axes.")
        if self.is_causal or self.position_embedding != "none" or self.vocab_size is not None:
            raise ValueError(
                f"is_causal={self.is_causal}, position_embedding={self.position_embedding!r}, "
                f"vocab_size={self.vocab_size}: a slide encoder is bidirectional, knows its tiles' places by their "
                'coordinates and has no vocabulary; leave them at False, "none", None.'
            )


@dataclass
class SlideEncoderOutput(ModelOutput):
    """What `LongNetSlideEncoder` returns.

    Args:
        pooler_output: (B, E), the slides' embeddings.
        last_hidden_state: (B, L, E), CLS and every tile after the encoder's final norm; 0 for tiles left out.
        layer_embeddings: (N + 1, B, E), the input and every layer's output pooled as the slide's embedding is,
            but without the encoder's final norm (Prov-GigaPath's `all_layer_embed`).
        attention_maps: (N, B, H, Q, L), where asked for.
        hidden_states: where asked for, N + 1 times (B, L, E): the input, then every layer's output, the last one
            after the final norm; 0 for tiles left out. Where some were asked for by index, the others are None.
        attentions: where asked for, N times (B, H, L, L), the maps of every token.
    """

    pooler_output: Tensor | None = None
    last_hidden_state: Tensor | None = None
    layer_embeddings: Tensor | None = None
    attention_maps: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class _Layout(NamedTuple):
    """Slides without the tiles that were left out: those that remain, side by side, T' columns for the largest."""

    tiles: Tensor  # (B, T'), a column's tile; padding names a tile that was left out
    real: Tensor  # (B, T') bool, False for padding
    count: int  # T

    @property
    def tokens(self) -> Tensor:
        """(B, 1 + T'), a column's token, CLS in front."""
        return nn.functional.pad(self.tiles + 1, (1, 0))


class _Queries(NamedTuple):
    """Queries whose attention is asked for."""

    columns: Tensor  # (B, Q)
    counts: Tensor  # (B, G, Q, L), how often they see a key
    padding: Tensor | None  # (B, G, Q), zero keys


def _lay_out(attention_mask: Tensor | None) -> _Layout | None:
    """None where nothing is left out."""
    if attention_mask is None or (attention_mask != 0).all():
        return None
    real = attention_mask != 0
    tiles = (~real).int().argsort(dim=1, stable=True)[:, : int(real.sum(1).max())]
    return _Layout(tiles, real.gather(1, tiles), attention_mask.shape[1])


def _take(x: Tensor, columns: Tensor) -> Tensor:
    """(B, L, features), (B, Q) -> (B, Q, features)."""
    return x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))


def _put_back(x: Tensor, layout: _Layout | None) -> Tensor:
    """(B, 1 + T', ...) -> (B, L, ...), 0 for tiles that were left out."""
    if layout is None:
        return x
    shape = (len(x), -1, *(1,) * (x.dim() - 2))
    real = nn.functional.pad(layout.real, (1, 0), value=True)
    whole = x.new_zeros(len(x), 1 + layout.count, *x.shape[2:])
    return whole.scatter(1, layout.tokens.view(shape).expand_as(x), x.masked_fill(~real.view(shape), 0))


def _selected(wanted: bool | int | list[int] | None, count: int) -> set[int]:
    """Return which of `count` hidden states are wanted: all, or some by index, as in Transformers 5.24."""
    if not wanted or wanted is True:
        return set(range(count)) if wanted else set()
    return {i % count for i in ([wanted] if isinstance(wanted, int) else wanted) if -count <= i < count}


def place_features(size: int, dim: int) -> Tensor:
    """Sines, then cosines, of the places 0 .. size - 1 of one axis: (size, dim) float32.

    omega_k = 10000 ** (-k / (dim / 2)); computed in float64, then rounded, as in the released table.
    """
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = torch.arange(size, dtype=torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], 1).float()


class LongNetSlideEncoder(LongNetBackbone):
    """Features and coordinates of tiles in, the slide's embedding out; Prov-GigaPath's `LongNetViT`.

    Example:
        >>> encoder = LongNetSlideEncoder(LongNetSlideConfig(num_hidden_layers=2)).eval()
        >>> tiles, coordinates = torch.randn(1, 100, 1536), torch.randint(0, 256_000, (1, 100, 2))
        >>> encoder(tiles, coordinates, attention_queries=[0]).attention_maps.shape
        torch.Size([2, 1, 16, 1, 101])
    """

    config: LongNetSlideConfig
    config_class = LongNetSlideConfig
    main_input_name = "tiles"
    _can_record_outputs = {}  # forward gives hidden states and attention weights itself, for left out tiles too

    def __init__(self, config: LongNetSlideConfig):
        super().__init__(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.tile_embed = nn.Linear(config.tile_features, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.pooling_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.normal_(self.cls_token, std=0.02)

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
            coordinates: (B, T, 2) pixels of the tiles' corners, on the level at which a tile has `tile_size`;
                integers or floats of at least 32 bits.
            attention_mask: (B, T), zero for tiles to leave out, background and padding alike, wherever they
                stand; the result is that of the other tiles alone, in their order.
            attention_queries: token numbers, 0 for CLS, i + 1 for tile i. The maps then say how much weight
                each of them gives to every token, over all branches; a row sums to 1 (less with
                `attend_zero_padding`), and is 0 for a tile that was left out. Memory grows with H * Q * L.
            output_hidden_states, output_attentions, return_dict: as in Transformers, from the config where left out;
                attention weights are computed beside the layers, whatever computes those.

        Raises:
            ValueError: shapes or dtypes that do not fit, a slide without tiles, a tile outside the grid.
        """
        if self.sequence_group() is not None:
            raise ValueError("processes that share sequences cannot share a slide; give each one its own slides.")
        self._check_slides(tiles, coordinates, attention_mask)
        layout, every = _lay_out(attention_mask), range(1 + tiles.shape[1])
        if layout is not None:
            # Zeros, as what stands in tiles left out may be NaN.
            tiles = _take(tiles, layout.tiles).masked_fill(~layout.real[..., None], 0.0)
            coordinates = _take(coordinates, layout.tiles).masked_fill(~layout.real[..., None], 0)
        hidden_states = self.dropout(self._embed_tiles(tiles, coordinates))
        record = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        states, weights = (getattr(self.config, name) if value is None else value for name, value in record.items())
        tokens = attention_queries, every if weights else None
        queries = [self._prepare_queries(x, hidden_states, layout) for x in tokens]
        return self._run_layers(hidden_states, layout, *queries, _selected(states, 1 + len(self.layers)))

    def _run_layers(self, hidden_states: Tensor, layout, queries, every, kept: set[int]) -> SlideEncoderOutput:
        """Encode (B, 1 + T', E), with the maps of `queries`, the weights of `every` and the states `kept`."""
        mask = None if layout is None else nn.functional.pad(layout.real, (1, 0), value=True)
        context = make_context(self.config, hidden_states, self.backend(hidden_states), mask)
        pooled, maps, weights = [self._pool(hidden_states, layout)], [], []
        states = [_put_back(hidden_states, layout) if 0 in kept else None]
        for layer in self.layers:
            if queries is not None:
                maps.append(self._map(layer, hidden_states, queries, layout))
            if every is not None:
                weights.append(self._map(layer, hidden_states, every, layout))
            hidden_states = layer(hidden_states, context)
            pooled.append(self._pool(hidden_states, layout))
            states.append(_put_back(hidden_states, layout) if len(states) in kept else None)
        hidden_states = self.layer_norm(hidden_states)
        whole = _put_back(hidden_states, layout)
        states[-1] = None if states[-1] is None else whole
        return SlideEncoderOutput(
            pooler_output=self._pool(hidden_states, layout),
            last_hidden_state=whole,
            layer_embeddings=torch.stack(pooled),
            attention_maps=torch.stack(maps) if maps else None,
            hidden_states=tuple(states) if kept else None,
            attentions=tuple(weights) if weights else None,
        )

    def _check_slides(self, tiles: Tensor, coordinates: Tensor, attention_mask: Tensor | None) -> None:
        features = self.config.tile_features
        if tiles.dim() != 3 or tiles.shape[-1] != features or 0 in tiles.shape:
            raise ValueError(f"tiles has shape {tuple(tiles.shape)}; expected (slides, tiles, {features}).")
        if tuple(coordinates.shape) != (*tiles.shape[:2], 2):
            raise ValueError(f"coordinates has shape {tuple(coordinates.shape)}; expected {(*tiles.shape[:2], 2)}.")
        if coordinates.dtype not in COORDINATES:
            raise ValueError(
                f"coordinates has dtype {coordinates.dtype}, which cannot tell every pixel; give "
                f"{', '.join(map(str, COORDINATES))}."
            )
        if attention_mask is None:
            return
        if attention_mask.shape != tiles.shape[:2]:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected {tuple(tiles.shape[:2])}: one "
                "entry for each tile, zero for those to leave out (the CLS token has none)."
            )
        if not (attention_mask != 0).any(1).all():
            empty = int((~(attention_mask != 0).any(1)).nonzero()[0])
            raise ValueError(f"attention_mask leaves slide {empty} without any tile; leave the slide out of the batch.")

    def _embed_tiles(self, tiles: Tensor, coordinates: Tensor) -> Tensor:
        """(B, T, features), (B, T, 2) -> (B, L, E): projected tiles with their places, behind the CLS token."""
        places = (coordinates / self.config.tile_size).floor().long()
        if ((places < 0) | (places >= self.config.grid_size)).any():
            row, tile, _ = ((places < 0) | (places >= self.config.grid_size)).nonzero()[0].tolist()
            raise ValueError(
                f"tile {tile} of slide {row} lies at {coordinates[row, tile].tolist()} pixels; expected at least 0 and "
                f"below grid_size * tile_size = {self.config.grid_size * self.config.tile_size}. Shift the slide to "
                "the origin, give the coordinates of the level with such tiles, or make the config's grid_size larger."
            )
        embeds = self.tile_embed(tiles.to(self.tile_embed.weight.dtype))
        table = place_features(self.config.grid_size, self.config.hidden_size // 2).to(embeds)
        # The first half of the features tells the second coordinate, as in the released table.
        embeds = embeds + torch.cat([table[places[..., 1]], table[places[..., 0]]], -1)
        return torch.cat([self.cls_token.expand(len(embeds), -1, -1).to(embeds.dtype), embeds], 1)

    def _pool(self, hidden_states: Tensor, layout: _Layout | None) -> Tensor:
        """(B, L, E) -> (B, E)."""
        if self.config.pooling == "cls":
            return self.norm(hidden_states[:, 0])
        if layout is None:
            return self.norm(hidden_states[:, 1:].mean(1))
        weights = layout.real / layout.real.sum(1, keepdim=True)  # (B, T)
        return self.norm((weights.to(hidden_states.dtype)[:, None] @ hidden_states[:, 1:])[:, 0])

    def _prepare_queries(self, tokens, hidden_states: Tensor, layout: _Layout | None) -> _Queries | None:
        """Find the chosen tokens in the columns, and how often each sees every column's token; None for no tokens."""
        if tokens is None:
            return None
        batch, length, _ = hidden_states.shape
        tokens = torch.as_tensor(tokens, device=hidden_states.device)
        total = length if layout is None else 1 + layout.count
        numbers = not (tokens.is_floating_point() or tokens.dtype == torch.bool)
        if not numbers or tokens.dim() != 1 or len(tokens) == 0 or (tokens < 0).any() or (tokens >= total).any():
            raise ValueError(
                f"attention_queries={tokens.tolist()}: expected a list of whole token numbers, 0 (CLS) to {total - 1} "
                "(the last tile)."
            )
        columns = tokens.expand(batch, -1)  # (B, Q)
        documents = torch.zeros(batch, length, dtype=torch.int64, device=tokens.device)
        if layout is not None:
            documents[:, 1:].masked_fill_(~layout.real, -1)
            # A tile left out stands in padding or in no column; column `length` has document -1 below.
            places = torch.full((batch, total), length, device=tokens.device)
            places.scatter_(1, layout.tokens, torch.arange(length, device=tokens.device).expand(batch, -1))
            columns = places[:, tokens]
        positions = torch.arange(length + 1, device=tokens.device).expand(batch, -1)
        with_outside = nn.functional.pad(documents, (0, 1), value=-1)
        of_queries = positions.gather(1, columns), with_outside.gather(1, columns)
        counts = count_branches(
            config_branches(self.config), of_queries[0], positions[:, :-1], of_queries[1], documents, is_causal=False
        )
        columns = columns.clamp(max=length - 1)
        padding = None
        if self.config.attend_zero_padding:
            packing = pack(batch, length, hidden_states.device, None if layout is None else documents >= 0)
            padding = count_zero_keys(self.config, packing, hidden_states)  # (B, G, L)
            padding = padding.gather(2, columns[:, None].expand(-1, padding.shape[1], -1))
        return _Queries(columns, counts, padding)

    def _map(self, layer: LongNetBlock, hidden_states: Tensor, queries: _Queries, layout: _Layout | None) -> Tensor:
        """What a layer's dense attention gives the chosen queries: (B, H, Q, L), without the others' rows."""
        attention, scale = layer.self_attn, self.config.head_dim**-0.5
        hidden_states = layer.self_attn_layer_norm(hidden_states)
        query = attention.project(_take(hidden_states, queries.columns), attention.q_proj).transpose(1, 2)
        key = attention.project(hidden_states, attention.k_proj).transpose(1, 2)
        weights = dense_attention(query, key, key[..., :0], queries.counts, scale, queries.padding)[1]
        return _put_back(weights.movedim(-1, 1), layout).movedim(1, -1)


LongNetSlideConfig.register_for_auto_class()
LongNetSlideEncoder.register_for_auto_class("AutoModel")

__all__ = ["LongNetSlideConfig", "LongNetSlideEncoder", "SlideEncoderOutput"]
