"""The drawing of a pattern against what the operator attends to, and what it writes."""

import pytest
import torch

from examples import draw_pattern
from modeling_longnet import LongNetCache, LongNetConfig, LongNetForCausalLM, dilated_attention, parse_pattern
from modeling_longnet.testing import Pattern

PATTERNS = ["8/1 32/4", "8/1 32/4 rotate stagger", "w4 32/8:1 once", "w4 32/8:1 once every2", "w8"]


def attended(words: str, heads: int, tokens: int, layer: int) -> torch.Tensor:
    """Where the op gives weight, (heads, tokens, tokens): with the identity as values its output is the weights."""
    scores = torch.zeros(1, heads, tokens, tokens)
    values = torch.eye(tokens).expand(1, heads, -1, -1)
    return dilated_attention(scores, scores, values, **parse_pattern(words), backend="eager", layer=layer)[0] > 0


@pytest.mark.parametrize("words", PATTERNS)
def test_the_map_is_what_the_op_attends_to(words):
    pattern, heads, layers, tokens = Pattern.parse(words), 4, 3, 32
    seen = torch.stack([attended(words, heads, tokens, layer) for layer in range(layers)]).float().mean((0, 1))
    torch.testing.assert_close(draw_pattern.map_seen(pattern, heads, layers, tokens), seen)


def test_cells_hold_the_share_of_their_pairs(monkeypatch):
    monkeypatch.setattr(draw_pattern, "CELLS", 4)
    seen = attended("8/1 32/4", 4, 32, 0).float().mean(0)
    expected = seen.view(4, 8, 4, 8).mean((1, 3))
    torch.testing.assert_close(draw_pattern.map_seen(Pattern.parse("8/1 32/4"), 4, 1, 32), expected)


def test_shares_by_distance():
    """A window of 8 shows distances 0 to 7, and summaries of 4 with offset 3 a quarter of the rest of the segment."""
    shares = draw_pattern.share_by_distance(Pattern.parse("w8 4096/4:1 once"), 2, 1, [1, 4, 8, 16, 4096])
    assert shares[:2] == [1, 1]
    assert 0.2 < shares[2] < 0.3
    assert shares[4] == 0


def test_cost_and_cache(monkeypatch):
    """Keys a query sees against the map, and keys held against what a model's cache allocates."""
    words, heads = "w4 32/8:1 once", 4
    drawing = draw_pattern.describe_pattern(words, heads, 2, [32, 128])
    seen = attended(words, heads, 32, 0).sum(-1).float().mean().item()
    assert drawing.keys[0] == pytest.approx(seen, abs=1)  # half a key a branch
    fields = {name: x for name, x in parse_pattern(words).items() if x is not None}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": heads}
    config = LongNetConfig(vocab_size=11, position_embedding="rope", **sizes, **fields)
    cache = LongNetCache(config)
    LongNetForCausalLM(config).eval()(torch.zeros(1, 128, dtype=torch.int64), past_key_values=cache)
    assert drawing.slots[1] == sum(cache.layers[0].slots(128)) == cache.layers[0].keys.shape[2] == 4 + 32 // 8


def test_it_writes_text_and_a_picture(tmp_path, capsys):
    file = tmp_path / "pattern.png"
    draw_pattern.main(
        ["w8 64/8:1 once", "--heads", "2", "--layers", "1", "--lengths", "64", "1000000", "--output", str(file)]
    )
    text = capsys.readouterr().out
    assert file.read_bytes()[:4] == b"\x89PNG"
    rows = [line for line in text.splitlines() if line.startswith("  |")]
    assert len(rows) == 32
    assert rows[0].startswith("  |%%  ") or rows[0].startswith("  |@@  ")
    assert rows[-1].endswith("@@|") or rows[-1].endswith("%%|")
    assert "last 8 tokens" in text
    assert next(line for line in text.splitlines() if "1,000,000" in line).split()[3] == "16"


@pytest.mark.parametrize(
    ("words", "message"), [("8/1 x", "'x' must be"), ("8/16", "larger than"), ("", "at least one")]
)
def test_a_wrong_pattern_is_named(words, message, capsys):
    with pytest.raises(SystemExit):
        draw_pattern.main([words])
    assert message in capsys.readouterr().err
