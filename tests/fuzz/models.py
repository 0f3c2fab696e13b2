"""Models of any config: batches padded and packed, losses, slides, images, and conversion, against each text alone.

The reference is the same model in float64 with `attn_implementation="eager"`, one text at a time.
"""

import tempfile
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from checks import assert_close
from torch import Tensor

from modeling_longnet import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetImageConfig,
    LongNetImageEncoder,
    LongNetModel,
    LongNetSlideConfig,
    LongNetSlideEncoder,
    convert_checkpoint,
    export_checkpoint,
)
from modeling_longnet.pattern import Pattern

from .attention import draw_branches, draw_pattern
from .engine import Draw, may_refuse

EXACT = 1e-9  # float64, through three layers
VOCABULARY = 31
FLOATS = (torch.float32, torch.float64, torch.bfloat16)
# What a foreign checkpoint does not tell.
LLAMA_ONLY = ("num_key_value_heads", "head_offsets", "rope_theta")
CONVERTED = (
    "segment_lengths", "dilation_rates", "num_attention_heads", "hidden_act", "is_causal", "position_embedding",
    "embedding_scale", "xpos_scale_base", "attend_zero_padding", *LLAMA_ONLY,
)  # fmt: skip
Row = tuple[int, int, int]  # a document: batch row, first column, last column plus one


def draw_fields(draw: Draw, **fixed) -> dict:
    """Fields of a small config that is allowed."""
    heads, lengths_and_rates = draw.choice([1, 2, 3, 4, 6]), draw_branches(draw)
    fields = {
        "hidden_size": heads * 2 * draw.integer(1, 4), "intermediate_size": draw.integer(1, 17),
        "num_hidden_layers": draw.integer(1, 3), "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([g for g in (1, 2, 3, 4, 6) if heads % g == 0]),
        "segment_lengths": lengths_and_rates[0], "dilation_rates": lengths_and_rates[1],
        "head_offsets": draw.choice(["interleaved", "blocked"]), "is_causal": not draw.flag(0.2),
        "position_embedding": draw.choice(["xpos", "rope", "none"]), "xpos_scale_base": draw.choice([512, 16, 4096]),
        "rope_theta": draw.choice([10000.0, 7.5]), "hidden_act": draw.choice(["gelu", "relu", "silu", "tanh"]),
        "final_layer_norm": not draw.flag(0.1), "embedding_scale": draw.choice([1.0, 2.5]), "dropout": 0.1,
        "drop_path_rate": 0.2, "vocab_size": VOCABULARY,
    }  # fmt: skip
    if draw.flag(0.4) and not {"segment_lengths", "head_offsets", "position_embedding"} & fixed.keys():
        pattern = draw_pattern(draw, fixed.get("is_causal", fields["is_causal"]), 60)
        layers = fixed.get("num_hidden_layers", fields["num_hidden_layers"])
        fields |= pattern._replace(branch_layer_period=min(pattern.branch_layer_period, layers))._asdict()
        fields["position_embedding"] = draw.choice(["rope", "none"])
    fields |= fixed
    is_paper = not Pattern.of(SimpleNamespace(**fields)).beyond
    fields["attend_zero_padding"] = not fields["is_causal"] and is_paper and draw.flag(0.3)
    return fields


def make_model(draw: Draw, model_class=LongNetModel, config_class=LongNetConfig, **fixed):
    """A float64 model in eval mode whose weights are all random and whose attention matters."""
    fields = draw_fields(draw, **fixed)
    smallest = config_class(**fields | {"position_embedding": "none"}).smallest_xpos_scale_base()
    if fields["position_embedding"] == "xpos" and smallest > fields["xpos_scale_base"]:
        fields["position_embedding"] = "rope"
    draw.note("config", fields)
    model = model_class(config_class(**fields)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            elif "q_proj" in name or "k_proj" in name:
                parameter.mul_(2)
    return model


@contextmanager
def reference(model):
    """The block computes with the dense reference, and positions that do not repeat within any text here."""
    before, period = model.config._attn_implementation, LongNetConfig.position_period
    model.set_attn_implementation("eager")
    LongNetConfig.position_period = property(lambda config: 512)
    yield
    LongNetConfig.position_period = period
    model.set_attn_implementation(before)


def draw_layout(draw: Draw) -> tuple[list[Row], dict[str, Tensor], int]:
    """The documents of a batch, the mask or position ids that say so, and its columns."""
    width, batch = draw.integer(1, 60), draw.integer(1, 3)
    if draw.flag(0.4):  # packed: the same cuts in all rows, or other ones in each
        rows, ids = [], torch.zeros(batch, width, dtype=torch.int64)
        for row in range(batch):
            cuts = sorted({0, width, *(draw.integer(0, width) for _ in range(draw.integer(0, 3)))})
            for a, b in pairwise(cuts):
                rows.append((row, a, b))
                ids[row, a:b] = torch.arange(b - a)
        return rows, {"position_ids": ids}, width
    rows, mask = [], torch.zeros(batch, width, dtype=draw.choice([torch.int64, torch.bool, torch.float32]))
    for row in range(batch):
        begin = draw.integer(0, width - 1) if draw.flag() else 0
        end = draw.integer(begin + 1, width) if draw.flag(0.3) else width
        rows.append((row, begin, end))
        mask[row, begin:end] = 1
    return rows, {} if mask.all() and draw.flag() else {"attention_mask": mask}, width


def model(draw: Draw) -> None:
    """Hidden states and every parameter's gradient of a padded or packed batch."""
    net = make_model(draw)
    rows, inputs, width = draw_layout(draw)
    batch = 1 + max(row for row, *_ in rows)
    draw.note("documents", rows)
    ids = torch.randint(VOCABULARY, (batch, width))
    weights = torch.randn(batch, width, net.config.hidden_size, dtype=torch.float64)
    if draw.flag(0.3):
        embeds = torch.randn(batch, width, net.config.hidden_size, dtype=torch.float64)
        whole, parts = {"inputs_embeds": embeds}, [{"inputs_embeds": embeds[r : r + 1, a:b]} for r, a, b in rows]
    else:
        whole, parts = {"input_ids": ids}, [{"input_ids": ids[r : r + 1, a:b]} for r, a, b in rows]
    hidden = net(**whole, **inputs).last_hidden_state
    loss = sum((hidden[r, a:b] * weights[r, a:b]).sum() for r, a, b in rows)
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    with reference(net):
        alone = [net(**part).last_hidden_state[0] for part in parts]
    for (row, a, b), expected in zip(rows, alone, strict=True):
        assert_close(f"row {row}, {a}:{b}", hidden[row, a:b], expected, EXACT)
    expected = sum((x * weights[r, a:b]).sum() for (r, a, b), x in zip(rows, alone, strict=True))
    _compare_grads(net, grads, torch.autograd.grad(expected, list(net.parameters()), allow_unused=True))
    if draw.flag(0.3):
        net.to(draw.choice([torch.float32, torch.bfloat16]))
        whole, *parts = (_cast(given, net.dtype) for given in (whole, *parts))
        with torch.no_grad(), reference(net):
            dense = [net(**part).last_hidden_state[0] for part in parts]
        with torch.no_grad():
            hidden = net(**whole, **inputs).last_hidden_state
        _compare_low_precision([hidden[r, a:b] for r, a, b in rows], dense, alone)


def _cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def _compare_low_precision(fast: list[Tensor], dense: list[Tensor], exact: list[Tensor]) -> None:
    """The error against float64 is near that of the dense reference; norms over few features make it vary."""
    fast, dense, exact = (torch.cat(x) for x in (fast, dense, exact))
    own, error = ((x.double() - exact).norm() for x in (dense, fast))
    step = torch.finfo(fast.dtype).eps * exact.norm()
    assert error <= 4 * own + 32 * step, f"{fast.dtype}: error {error:.3g}, the reference's {own:.3g}, step {step:.3g}"


def _compare_grads(net, grads, expected) -> None:
    for (name, _), grad, wanted in zip(net.named_parameters(), grads, expected, strict=True):
        assert (grad is None) == (wanted is None), f"gradient of {name}: {grad} and {wanted}"
        if wanted is not None:
            assert_close(f"gradient of {name}", grad, wanted, EXACT)


def loss(draw: Draw) -> None:
    """The loss of labels, chunked or of all logits, and its gradients: those of each document's logits alone."""
    net = make_model(draw, LongNetForCausalLM, is_causal=True, tie_word_embeddings=draw.flag())
    rows, inputs, width = draw_layout(draw)
    batch = 1 + max(row for row, *_ in rows)
    draw.note("documents", rows)
    ids = torch.randint(VOCABULARY, (batch, width))
    targets = torch.full((batch, width), -100)
    for row, a, b in rows:
        targets[row, a : b - 1] = ids[row, a + 1 : b]
    targets[torch.rand(batch, width) < draw.choice([0.0, 0.2])] = -100
    if not (targets != -100).any():
        return
    items = draw.choice([None, 7, torch.tensor(7)])
    net.logits_with_labels = draw.flag(0.3)
    found = net(ids, **inputs, shift_labels=targets, num_items_in_batch=items).loss
    grads = torch.autograd.grad(found, list(net.parameters()), allow_unused=True)
    total = 0
    with reference(net):
        for row, a, b in rows:
            logits = net(ids[row : row + 1, a:b]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, targets[row, a:b], reduction="sum")
    total = total / ((targets != -100).sum() if items is None else items)
    assert_close("loss", found, total, EXACT)
    _compare_grads(net, grads, torch.autograd.grad(total, list(net.parameters()), allow_unused=True))


def slide(draw: Draw) -> None:
    """Slides of any size in one batch, tiles left out, against each slide's own tiles alone; attention maps too."""
    net = make_model(
        draw, LongNetSlideEncoder, LongNetSlideConfig, is_causal=False, position_embedding="none", vocab_size=None,
        hidden_size=24, tile_features=5, tile_size=16, grid_size=9, pooling=draw.choice(["cls", "mean"]),
    )  # fmt: skip
    batch, count = draw.integer(1, 3), draw.integer(1, 40)
    tiles, places = torch.randn(batch, count, 5, dtype=torch.float64), torch.randint(0, 144, (batch, count, 2))
    mask = torch.rand(batch, count) < draw.choice([2.0, 0.7, 0.2])
    mask[:, draw.integer(0, count - 1)] = True
    tiles[~mask] = torch.nan
    queries = [draw.integer(0, count) for _ in range(3)]
    draw.note("slides", (batch, count, queries, mask.int().tolist()))
    given = mask if not mask.all() or draw.flag() else None
    output = net(tiles, places, attention_mask=given, attention_queries=queries)
    with reference(net):
        for row in range(batch):
            kept = mask[row]
            alone = net(tiles[row : row + 1, kept], places[row : row + 1, kept], attention_queries=[0])
            assert_close("pooled", output.pooler_output[row], alone.pooler_output[0], EXACT)
            assert_close("layers", output.layer_embeddings[:, row], alone.layer_embeddings[:, 0], EXACT)
            hidden = torch.zeros(1 + count, 24, dtype=torch.float64)
            columns = torch.cat([torch.tensor([True]), kept])
            hidden[columns] = alone.last_hidden_state[0]
            assert_close("hidden", output.last_hidden_state[row], hidden, EXACT)
            if queries[0] == 0:
                maps = output.attention_maps[:, row, :, 0]
                assert_close("map", maps[..., columns], alone.attention_maps[:, 0, :, 0], EXACT)
                assert (maps[..., ~columns] == 0).all()


def image(draw: Draw) -> None:
    """Images: the fast path against the dense reference, with gradients."""
    net = make_model(
        draw, LongNetImageEncoder, LongNetImageConfig, is_causal=False, vocab_size=None, patch_size=2,
        image_size=2 * draw.integer(1, 7), num_channels=draw.integer(1, 3), num_classes=draw.integer(0, 3),
    )  # fmt: skip
    size = net.config.image_size
    pixels = torch.randn(draw.integer(1, 3), net.config.num_channels, size, size, dtype=torch.float64)
    weights, results = torch.randn(size * size // 4, net.config.hidden_size, dtype=torch.float64), []
    for implementation in ("sdpa", "eager"):
        net.set_attn_implementation(implementation)
        output = net(pixels)
        value = (output.last_hidden_state * weights).sum()
        value = value if output.logits is None else value + output.logits.square().sum()
        results.append((output, torch.autograd.grad(value, list(net.parameters()), allow_unused=True)))
    (fast, grads), (dense, expected) = results
    assert_close("hidden", fast.last_hidden_state, dense.last_hidden_state.detach(), EXACT)
    _compare_grads(net, grads, expected)


def round_trip(draw: Draw) -> None:
    """A model in a foreign format and back, through a file; and saved and loaded. Weights and outputs are the same."""
    is_torchscale, theta = draw.flag(), draw.choice([10000.0] * 9 + [7.5])
    name = "torchscale" if is_torchscale else "llama_fused"
    fixed = {"head_offsets": "blocked", "num_key_value_heads": None} if is_torchscale else {"is_causal": True}
    fixed |= {"position_embedding": draw.choice(["none", "xpos" if is_torchscale else "rope"]), "rope_theta": theta}
    fixed |= {"hidden_act": draw.choice(["gelu", "relu", "silu"]), "embedding_scale": 1.0}
    net = make_model(draw, draw.choice([LongNetModel, LongNetForCausalLM]), **fixed).to(draw.choice(FLOATS))
    given = {key: getattr(net.config, key) for key in CONVERTED if not is_torchscale or key not in LLAMA_ONLY}
    ids = torch.randint(VOCABULARY, (2, draw.integer(1, 40)))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file, made, saved = (Path(folder, x) for x in (draw.choice(["a.pt", "a.safetensors"]), "made", "saved"))
        with may_refuse():
            export_checkpoint(net, name, file)
        found = [convert_checkpoint(file, made, ignore=["*xpos.scale"], **given)]
        net.save_pretrained(saved)
        found += [type(net).from_pretrained(path) for path in (made, saved)]
        expected = net(ids)[0]
        for other in found:
            assert type(other) is type(net)
            for (key, x), y in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
                assert torch.equal(x, y), key
            assert_close("output", other.eval()(ids)[0], expected, 64 * torch.finfo(expected.dtype).eps)


CASES = {"model": model, "loss": loss, "slide": slide, "image": image, "round trip": round_trip}
