"""Slides in a batch equal each alone; background is left out; maps are those of the dense reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import assert_close, refused
from transformers import AutoModel

from modeling_longnet import LongNetImageConfig, LongNetImageEncoder, LongNetSlideConfig, LongNetSlideEncoder
from modeling_longnet.slide_encoder import place_features

FEATURES = 5


def make_encoder(**overrides) -> LongNetSlideEncoder:
    """A small one whose segments end often, in float64; every weight random, so that all of them matter."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6,
        "segment_lengths": [4, 7, 16], "dilation_rates": [1, 2, 4], "tile_features": FEATURES, "grid_size": 11,
    }  # fmt: skip
    encoder = LongNetSlideEncoder(LongNetSlideConfig(**(sizes | overrides))).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return encoder


def make_slides(*counts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tiles, coordinates and mask of ragged slides; what stands in the padding is NaN and off the grid."""
    tiles = torch.randn(len(counts), max(counts), FEATURES, dtype=torch.float64)
    coordinates = torch.randint(0, 11 * 256, (len(counts), max(counts), 2))
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return tiles.masked_fill(~mask[..., None], torch.nan), coordinates.masked_fill(~mask[..., None], -999), mask


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [False, True], ids=["exact", "zero-padding"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_ragged_slides_equal_each_alone(pooling, padding, implementation):
    counts = (13, 1, 29, 18)
    encoder = make_encoder(pooling=pooling, attend_zero_padding=padding)
    encoder.set_attn_implementation(implementation)
    tiles, coordinates, mask = make_slides(*counts)
    with torch.no_grad():
        batch = encoder(tiles, coordinates, mask, attention_queries=[0, 1])
        for row, count in enumerate(counts):
            alone = encoder(tiles[row : row + 1, :count], coordinates[row : row + 1, :count], attention_queries=[0, 1])
            assert_close("pooler_output", batch.pooler_output[row], alone.pooler_output[0])
            assert_close("layer_embeddings", batch.layer_embeddings[:, row], alone.layer_embeddings[:, 0])
            assert_close("last_hidden_state", batch.last_hidden_state[row, : 1 + count], alone.last_hidden_state[0])
            assert_close("maps", batch.attention_maps[:, row, ..., : 1 + count], alone.attention_maps[:, 0])
            assert batch.last_hidden_state[row, 1 + count :].count_nonzero() == 0
            assert batch.attention_maps[:, row, ..., 1 + count :].count_nonzero() == 0


def test_background_tiles_are_as_if_they_were_not_there():
    encoder = make_encoder()
    tiles, coordinates, _ = make_slides(23)
    tissue = torch.rand(1, 23) < 0.6
    assert 0 < tissue.sum() < 23
    kept = tissue[0].nonzero().flatten()
    tiles[~tissue] = torch.nan
    queries = [0, int(kept[3]) + 1, int((~tissue[0]).nonzero()[0]) + 1]
    with torch.no_grad():
        whole = encoder(tiles, coordinates, tissue, attention_queries=queries)
        alone = encoder(tiles[:, kept], coordinates[:, kept], attention_queries=[0, 4])
    tokens = torch.cat([torch.zeros(1, dtype=torch.int64), kept + 1])
    assert_close("pooler_output", whole.pooler_output, alone.pooler_output)
    assert_close("last_hidden_state", whole.last_hidden_state[:, tokens], alone.last_hidden_state)
    assert_close("maps", whole.attention_maps[..., :2, :][..., tokens], alone.attention_maps)
    assert whole.attention_maps[..., 2, :].count_nonzero() == 0, "a tile left out attends to nothing"


def test_gradients_do_not_know_of_padding():
    encoder = make_encoder(pooling="mean")
    tiles, coordinates, mask = make_slides(9, 14)
    names = [name for name, _ in encoder.named_parameters()]
    parameters = list(encoder.parameters())
    batch = torch.autograd.grad(encoder(tiles, coordinates, mask).pooler_output.sum(), parameters, allow_unused=True)
    alone = torch.autograd.grad(
        sum(
            encoder(tiles[i : i + 1, :n], coordinates[i : i + 1, :n]).pooler_output.sum() for i, n in enumerate((9, 14))
        ),
        parameters,
        allow_unused=True,
    )
    for name, a, b in zip(names, batch, alone, strict=True):
        # Adding a constant to every key changes no weight: that gradient is rounding alone.
        if b is not None and "k_proj.bias" not in name:
            assert_close(name, a, b, 1e-11)


@pytest.mark.parametrize("padding", [False, True], ids=["exact", "zero-padding"])
def test_maps_are_those_of_the_dense_reference(padding):
    encoder = make_encoder(attend_zero_padding=padding)
    tiles, coordinates, _ = make_slides(21)
    with torch.no_grad():
        maps = encoder(tiles, coordinates, attention_queries=[0, 5, 21]).attention_maps
        encoder.set_attn_implementation("eager")
        dense = []
        for layer in encoder.layers:
            layer.self_attn.register_forward_hook(lambda module, inputs, output: dense.append(output[1]))
        encoder(tiles, coordinates)
    assert_close("maps", maps, torch.stack(dense)[..., [0, 5, 21], :])
    if not padding:
        assert_close("sums", maps.sum(-1), torch.ones(3, 1, 6, 3, dtype=torch.float64))


def test_a_far_tile_keeps_its_place():
    """The last pixel before a border, at a place that float32 would round up."""
    encoder = make_encoder(grid_size=100_001)
    tiles = torch.zeros(1, 2, FEATURES, dtype=torch.float64)
    coordinates = torch.tensor([[[256 * 100_000 - 1, 0], [256 * 99_999, 0]]])
    _, first, second = encoder._embed_tiles(tiles, coordinates)[0]
    assert torch.equal(first, second)


def test_place_features_tell_all_places_apart():
    """The table of 1000 places: sines, then cosines, of fast to slow angles."""
    table = place_features(1000, 8)
    torch.testing.assert_close(table[3, 0], torch.tensor(3.0).sin())
    torch.testing.assert_close(table[3, 7], torch.tensor(3 * 10000 ** (-3 / 4)).cos())
    assert len(table.unique(dim=0)) == 1000


def test_a_grid_of_any_size_costs_nothing():
    """Features of the places that tiles have, not of all places that the config allows."""
    tiles, coordinates, _ = make_slides(9)
    with torch.no_grad():
        found, expected = (make_encoder(**x)(tiles, coordinates).pooler_output for x in ({"grid_size": 1 << 40}, {}))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("eps", [0.0, float("nan"), float("inf"), -1e-6])
def test_the_pooling_norm_needs_an_epsilon(eps):
    with refused("pooling_norm_eps", "above 0"):
        make_encoder(pooling_norm_eps=eps)


def test_training_drops_paths_and_evaluation_does_not():
    encoder = make_encoder(dropout=0.0, drop_path_rate=0.9)
    tiles, coordinates, _ = make_slides(6)
    with torch.no_grad():
        quiet = [encoder(tiles, coordinates).pooler_output for _ in range(2)]
        torch.testing.assert_close(*quiet, rtol=0, atol=0)
        encoder.train()
        states = [encoder(tiles, coordinates).layer_embeddings for _ in range(16)]
    branch = torch.ones(4000, 1, 1)
    dropped = encoder.layers[1]._drop(branch)  # p = 0.45
    torch.testing.assert_close(dropped.unique(), torch.tensor([0, 1 / 0.55]))
    torch.testing.assert_close(dropped.mean(), torch.tensor(1.0), rtol=0, atol=0.06)  # four standard errors
    # The first block never drops, the last one loses both branches in 4 of 5 passes.
    unchanged = [[bool((s[n + 1] == s[n]).all()) for s in states] for n in range(3)]
    assert not any(unchanged[0])
    assert any(unchanged[2])
    assert not all(unchanged[2])


def test_half_precision_tiles_enter_a_float32_model():
    encoder = make_encoder().float()
    tiles, coordinates, _ = make_slides(6)
    with torch.no_grad():
        assert encoder(tiles.half(), coordinates).pooler_output.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c, m: (t[..., :3], c, m, None), ["tiles has shape", "5"]),
        (lambda t, c, m: (t[:, :0], c[:, :0], m[:, :0], None), ["tiles has shape"]),
        (lambda t, c, m: (t, c[:, 1:], m, None), ["coordinates has shape", "(2, 9, 2)"]),
        (lambda t, c, m: (t, c, m[:, 1:], None), ["attention_mask has shape", "CLS"]),
        (lambda t, c, m: (t, c, m & torch.tensor([[True], [False]]), None), ["slide 1 without any tile"]),
        (lambda t, c, m: (t, c + 11 * 256, m, None), ["tile 0 of slide 0", "grid_size * tile_size = 2816"]),
        (lambda t, c, m: (t, c, m, [10]), ["attention_queries=[10]", "9"]),
        (lambda t, c, m: (t, c, m, []), ["attention_queries=[]"]),
        (lambda t, c, m: (t, c, m, [0.0, 1.0]), ["attention_queries=[0.0, 1.0]", "whole"]),
        (lambda t, c, m: (t, c, m, [True, False]), ["attention_queries=[True, False]", "whole"]),
        (lambda t, c, m: (t, c.half(), m), ["torch.float16", "torch.float32"]),
        (lambda t, c, m: (t, c.bfloat16(), m), ["torch.bfloat16", "torch.int64"]),
        (lambda t, c, m: (t, c.short(), m), ["torch.int16", "torch.int32"]),
    ],
    ids=[
        "features",
        "no-tiles",
        "coordinates",
        "mask",
        "empty-slide",
        "grid",
        "query",
        "no-query",
        "half-query",
        "bool-query",
        "float16-places",
        "bfloat16-places",
        "int16-places",
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, words):
    with refused(*words):
        make_encoder()(*change(*make_slides(9, 4)))


def test_hidden_states_and_tuples():
    encoder = make_encoder()
    tiles, coordinates, mask = make_slides(13, 8)
    with torch.no_grad():
        out = encoder(tiles, coordinates, mask, output_hidden_states=True)
        plain = encoder(tiles, coordinates, mask, return_dict=False)
        encoder.config.output_hidden_states = True
        again = encoder(tiles, coordinates, mask)
    assert plain[0] is not None
    assert isinstance(plain, tuple)
    assert_close("pooler_output", plain[0], out.pooler_output, 0)
    assert len(out.hidden_states) == len(again.hidden_states) == 4
    for state, pooled in zip(out.hidden_states[:-1], out.layer_embeddings[:-1], strict=True):
        assert state[1, 9:].count_nonzero() == 0
        assert_close("pooled", encoder.norm(state[:, 0]), pooled, 0)
    assert_close("last", out.hidden_states[-1], out.last_hidden_state, 0)


@pytest.mark.parametrize("by", ["the class", "from_config"])
@pytest.mark.parametrize(
    ("encoder_class", "config", "name"),
    [
        (
            LongNetSlideEncoder,
            LongNetSlideConfig(hidden_size=1024, intermediate_size=8, num_hidden_layers=1),
            "cls_token",
        ),
        (LongNetImageEncoder, LongNetImageConfig(image_size=64, patch_size=8, num_hidden_layers=1), "position_embed"),
    ],
    ids=["slide", "image"],
)
def test_a_new_encoder_draws_its_cls_token_or_positions(encoder_class, config, name, by):
    """N(0, 0.02), as in the released code."""
    torch.manual_seed(0)
    encoder = encoder_class(config) if by == "the class" else AutoModel.from_config(config)
    x = getattr(encoder, name)
    four_standard_errors = 4 * 0.02 / x.numel() ** 0.5
    assert abs(x.mean()) < four_standard_errors
    assert abs(x.std() - 0.02) < four_standard_errors


def test_the_input_embeddings_are_the_projections():
    slides, images = make_encoder(), LongNetImageEncoder(LongNetImageConfig(num_hidden_layers=1))
    for encoder, projection in ((slides, slides.tile_embed), (images, images.patch_embed)):
        assert encoder.get_input_embeddings() is projection
    other = torch.nn.Linear(FEATURES, 24).double()
    slides.set_input_embeddings(other)
    assert slides.tile_embed is other
    slides.enable_input_require_grads()
    assert slides.requires_grad_(False)(*make_slides(9)[:2]).last_hidden_state.requires_grad


@pytest.mark.parametrize(
    ("wanted", "kept"), [([0], [0]), ([1, -1], [1, 3]), (-2, [2]), ([7], []), (False, [])], ids=str
)
def test_some_hidden_states(wanted, kept):
    encoder, slides = make_encoder(), make_slides(13, 8)
    with torch.no_grad():
        every = encoder(*slides, output_hidden_states=True).hidden_states
        some = encoder(*slides, output_hidden_states=wanted).hidden_states
    assert (some is None) == (not kept)
    for i, state in enumerate(some or ()):
        assert torch.equal(state, every[i]) if i in kept else state is None


def test_a_compiled_encoder_returns_its_states_and_weights():
    """They are taken without forward hooks, which a graph may drop."""
    encoder, slides = make_encoder(), make_slides(7, 5)
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected, found = (call(*slides, **options) for call in (encoder, torch.compile(encoder, backend="eager")))
    for name in ("hidden_states", "attentions"):
        assert len(found[name]) == len(expected[name]) > 1
        for x, y in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_weights_of_every_tile(implementation):
    """What the layers of the dense reference attend with; 0 for tiles left out."""
    encoder, slides = make_encoder(), make_slides(13, 8)
    encoder.set_attn_implementation(implementation)
    with torch.no_grad():
        out = encoder(*slides, attention_queries=[0, 3], output_attentions=True)
        if implementation == "eager":
            encoder.config.output_attentions = True  # which Transformers refuses for others
        again = encoder(*slides)
    weights = torch.stack(out.attentions)
    assert weights.shape == (3, 2, 6, 14, 14)
    assert (again.attentions is not None) == (implementation == "eager")
    for given, expected in zip(again.attentions or (), weights, strict=False):
        assert_close("from the config", given, expected, 0)
    assert_close("queries", weights[..., [0, 3], :], out.attention_maps)
    assert again.attention_maps is None
    assert weights[:, 1, :, 9:].count_nonzero() == weights[:, 1, ..., 9:].count_nonzero() == 0
    assert_close("sums", weights[:, 1, :, :9].sum(-1), torch.ones(3, 6, 9, dtype=torch.float64))


def test_an_image_encoder_takes_images_alone():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4, "num_classes": 3}
    encoder = LongNetImageEncoder(LongNetImageConfig(segment_lengths=[4], dilation_rates=[1], **sizes)).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        state, logits = encoder(images, return_dict=False)
        out = encoder(images, output_hidden_states=True)
    assert_close("last_hidden_state", state, out.last_hidden_state, 0)
    assert_close("logits", logits, out.logits, 0)
    assert len(out.hidden_states) == 2
    with refused("pixel_values", "['inputs_embeds']"):
        encoder(inputs_embeds=torch.zeros(2, 4, 32))
    with refused("pixel_values", "['attention_mask']"):
        encoder(images, attention_mask=torch.ones(2, 4))


def test_the_example_draws_a_slide(tmp_path):
    root = Path(__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-m", "examples.slide_encoder", "--sides", "7", "5", "--output", "slide.png"],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, cwd=tmp_path, check=True, text=True,
        capture_output=True,
    )  # fmt: skip
    assert "of 49 tiles are tissue" in ran.stdout
    assert "of 25 tiles are tissue" in ran.stdout
    assert (tmp_path / "slide.png").read_bytes().startswith(b"\x89PNG")


def test_slides_and_images_are_not_shared_among_processes():
    encoder = make_encoder()
    encoder._sequence_group = object()
    with refused("slides cannot be sharded"):
        encoder(*make_slides(9))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4, "segment_lengths": [4]}
    images = LongNetImageEncoder(LongNetImageConfig(dilation_rates=[1], **sizes))
    images._sequence_group = object()
    with refused("images cannot be sharded"):
        images(torch.zeros(1, 3, 8, 8))
    images._sequence_group = None
    with refused("pixel_values has shape (1, 3, 8, 4)", "(images, 3, 8, 8)"):
        images(torch.zeros(1, 3, 8, 4))


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ({"grid_size": 0}, "grid_size"),
        ({"pooling": "max"}, "pooling"),
        ({"is_causal": True}, "bidirectional"),
        ({"position_embedding": "xpos"}, "coordinates"),
        ({"hidden_size": 18}, "multiple of 4"),
        ({"tile_feature": 3}, "tile_features"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_configs_that_do_not_fit_are_refused(override, word):
    with refused(word):
        make_encoder(**override)
