"""Arguments that do not fit: refused by a clear error, or the result is finite and of the right shape."""

import contextlib
import io
import math

import numpy as np
import torch

from modeling_longnet import LongNetCache, LongNetConfig, LongNetForCausalLM, dilated_attention
from modeling_longnet.testing import CACHE

from .engine import Draw, may_refuse

NUMBERS = (
    0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, 10**30, True, 0.0, 1.0, 2.5, -0.5, 1e300, 1e-300, math.nan, math.inf, -math.inf
)  # fmt: skip
OTHERS = (None, "", "auto", "4", "torch", b"4", [], {}, (), [4], [4, 8], object(), np.int64(4), np.float32(2), [None])
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int16, torch.uint8, torch.uint32,
    torch.bool, torch.complex64,
)  # fmt: skip


def odd_value(draw: Draw, usual: object) -> object:
    """The usual value, or one that is not."""
    kind = draw.integer(0, 3)
    return usual if kind == 0 else draw.choice(NUMBERS if kind < 3 else OTHERS)


def odd_list(draw: Draw, usual: list) -> object:
    """The list with an odd element, too long or too short; or no list."""
    kind = draw.integer(0, 5)
    if kind == 5:
        return odd_value(draw, usual)
    values = [*usual]
    values[draw.integer(0, len(values) - 1)] = odd_value(draw, values[0])
    return (values * 2)[: draw.integer(0, 5)] if kind == 4 else draw.choice([list, tuple])(values)


def odd_tensor(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of another shape, dtype, layout, device or range."""
    sizes, kind = list(shape), draw.integer(0, 7)
    if kind in (0, 1):
        sizes[draw.integer(0, len(sizes) - 1)] = draw.choice([0, 1, 2, 5])
    elif kind == 2:
        sizes = sizes[:-1] if draw.flag() else [*sizes, 1]
    x = (torch.randn(sizes) * draw.choice([1, 0, 10, 1e4])).to(dtype)
    if kind in (3, 4):
        return x.to(draw.choice(DTYPES if dtype == torch.int64 else [*DTYPES, torch.float8_e4m3fn]))
    if kind == 5:
        values = [-(2**31), 2**31, 2**62] if dtype == torch.int64 else [math.nan, math.inf, 1e38]
        return torch.full_like(x, draw.choice(values))
    return x


def op(draw: Draw) -> None:
    """`dilated_attention`; one or two of its arguments are odd."""
    shape, heads = (2, 5, 8), (4, 2, 2)
    tensors = [torch.randn(shape[0], n, *shape[1:]) for n in heads]
    lists, options = [[4, 8], [1, 2]], {}
    for _ in range(draw.integer(1, 2)):
        kind = draw.integer(0, 8)
        if kind < 3:
            tensors[kind] = odd_tensor(draw, (shape[0], heads[kind], *shape[1:]))
        elif kind == 3:
            tensors = [x.to(draw.choice(DTYPES)) for x in tensors]
        elif kind == 4:
            tensors = [x.to("meta") if draw.flag(0.7) else x for x in tensors]
        elif kind == 5:
            chosen = [draw.flag(0.7) and x.dtype == torch.float32 and not x.is_meta for x in tensors]
            tensors = [x.to_sparse() if is_sparse else x for x, is_sparse in zip(tensors, chosen, strict=True)]
        elif kind == 6:
            place = draw.integer(0, 1)
            lists[place] = odd_list(draw, ([4, 8], [1, 2])[place])
        else:
            name, usual = draw.choice([("scale", 0.3), ("head_offsets", "blocked"), ("backend", "auto")])
            options[name] = odd_value(draw, usual)
    scale = options.get("scale", 1)
    is_number = scale is None or isinstance(scale, int | float | np.number)
    draw.note("tensors", [(tuple(x.shape), x.dtype, x.device.type, x.layout) for x in tensors])
    draw.note("arguments", (lists, options))
    with may_refuse(*([] if is_number else [TypeError])):
        out = dilated_attention(*tensors, *lists, **options)
    assert out.shape == tensors[0].shape
    is_finite = all(x.is_meta or x.double().abs().max() < 1e6 for x in tensors) and (scale is None or scale < 1e6)
    assert out.is_meta or torch.isfinite(out).all() or not is_finite


def batch(draw: Draw) -> None:
    """A language model's inputs, with and without a cache, which a refusal leaves as it was."""
    config = LongNetConfig(
        vocab_size=29, hidden_size=12, intermediate_size=5, num_hidden_layers=1, num_attention_heads=3,
        segment_lengths=[4, 8], dilation_rates=[1, 2], pad_token_id=draw.choice([None, 0]),
    )  # fmt: skip
    net = LongNetForCausalLM(config).eval()
    seen = draw.choice([0, 0, 5])
    cache = LongNetCache(config) if seen or draw.flag(0.3) else None
    ids = torch.randint(29, (2, seen + 6))
    if seen:
        net(ids[:, :seen], **{CACHE: cache})
    inputs = {"input_ids": ids[:, seen:]}
    if draw.flag(0.2):
        inputs["input_ids"] = odd_tensor(draw, (2, 6), torch.int64)
    elif draw.flag(0.05):
        inputs["input_ids"] = inputs["input_ids"].to("meta")
    if draw.flag(0.4):
        mask = torch.ones(2, seen + 6, dtype=torch.int64)
        mask[draw.integer(0, 1), draw.integer(0, seen + 5)] = 0
        inputs["attention_mask"] = mask if draw.flag() else odd_tensor(draw, (2, seen + 6), torch.int64)
    if draw.flag(0.3):
        ramp = torch.arange(seen, seen + 6)[None] + draw.choice([0, 1, -1, 10**12])
        inputs["position_ids"] = ramp if draw.flag() else odd_tensor(draw, (2, 6), torch.int64)
    if draw.flag(0.3):
        given = ids[:, seen:] if draw.flag() else odd_tensor(draw, (2, 6), torch.int64)
        inputs[draw.choice(["labels", "shift_labels"])] = given
    if draw.flag(0.1):
        inputs["inputs_embeds"] = odd_tensor(draw, (2, 6, 12))
        inputs = inputs if draw.flag(0.2) else {k: x for k, x in inputs.items() if k != "input_ids"}
    if draw.flag(0.2):
        inputs["logits_to_keep"] = draw.choice([0, 1, 6, 7, -1, torch.tensor([0, 5])])
    draw.note("inputs", {k: (getattr(x, "shape", x), getattr(x, "dtype", "")) for k, x in inputs.items()})
    draw.note("cache", (cache is not None, seen))
    embeds, targets = inputs.get("inputs_embeds"), inputs.get("labels", inputs.get("shift_labels"))
    others = [] if embeds is None or embeds.dtype == torch.float32 else [RuntimeError]  # PyTorch's, of mixed dtypes
    try:
        with may_refuse(*others):
            output = net(**inputs, **{CACHE: cache})
    finally:
        if seen and cache.get_seq_length() == seen:
            new = torch.randint(29, (2, 3))
            expected = net(torch.cat([ids[:, :seen], new], 1)).logits[:, seen:]
            torch.testing.assert_close(net(new, **{CACHE: cache}).logits, expected, rtol=0, atol=1e-4)
    is_finite = embeds is None or embeds.double().abs().max() < 1e6
    has_targets = targets is not None and (targets[:, 1:] != -100).any()
    for x in (output.logits, output.loss if has_targets else None):
        assert x is None or torch.isfinite(x).all() or not is_finite


def config(draw: Draw) -> None:
    """Fields of the config and of `for_context`."""
    heads = draw.choice([1, 4, 3])
    if draw.flag(0.3):
        arguments = {"length": odd_value(draw, 100), "effort": odd_value(draw, 64), "num_attention_heads": heads}
        if draw.flag():
            name = draw.choice(["num_hidden_layers", "branch_layer_period"])
            arguments[name] = odd_value(draw, draw.choice([1, 2, 3]))
        draw.note("for_context", arguments)
        is_number = all(type(arguments[name]) is int for name in ("length", "effort"))
        with contextlib.redirect_stdout(io.StringIO()), may_refuse(*([] if is_number else [TypeError])):
            made = LongNetConfig.for_context(arguments.pop("length"), hidden_size=8 * heads, **arguments)
        assert made.segment_lengths[-1] >= 1
        return
    usual = LongNetConfig(hidden_size=16 * heads, num_attention_heads=heads)
    names = sorted(set(LongNetConfig.auto_classes) ^ {f for f in usual.to_dict() if hasattr(LongNetConfig, f)})
    fields = {"hidden_size": 16 * heads, "num_attention_heads": heads}
    for _ in range(draw.integer(1, 3)):
        name = draw.choice([x for x in names if not x.startswith("Auto")])
        value = getattr(usual, name)
        fields[name] = odd_list(draw, value) if isinstance(value, list) else odd_value(draw, value)
    draw.note("fields", fields)
    with may_refuse():
        made = LongNetConfig(**fields)
    made.validate()
    assert made.head_dim >= 1
    assert made.position_period >= max(made.segment_lengths)


CASES = {"op arguments": op, "batch arguments": batch, "config arguments": config}
