"""Damage to files: to their bytes, and to what they say in JSON, safetensors headers and pickles."""

import json
import struct
from collections import OrderedDict

import torch

from .engine import Draw

# Text that stands in a JSON file for a value.
RAW = (
    "1e999", "-1e999", "NaN", "9" * 5000, "[" * 100_000, '{"a":' * 20_000, "1" + "0" * 40, '"\\ud800"', "'a'", "tru"
)  # fmt: skip
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**53 + 1, 2**63, -(2**63), 10**30, 0.0, 1.5, -0.5, 1e-320, 1e308, "",
    "a", "float32", "nn", "../../etc/passwd", "\0", "ä" * 300, [], [1], [[]], [None], [0], [2**62], ["a"], {}, {"a": 1},
    {"": None}, float("nan"), float("inf"), list(range(2000)),
)  # fmt: skip

OTHER_KEYS = ("dtype", "id2label", "model_type", "quantization_config", "layer_types", "rope_parameters")


def damage(draw: Draw, content: bytes) -> bytes:
    """Return the content with one to three places changed."""
    for _ in range(draw.integer(1, 3)):
        size = len(content)
        kind, begin = draw.integer(0, 9), draw.integer(0, max(0, size - 1))
        count = draw.integer(1, max(1, min(size, draw.choice([1, 8, 200]))))
        end = min(size, begin + count)
        if kind < 3 and size:  # one bit
            content = content[:begin] + bytes([content[begin] ^ (1 << draw.integer(0, 7))]) + content[begin + 1 :]
        elif kind == 3:
            content = content[:begin]
        elif kind == 4:
            content = content[:begin] + content[end:]
        elif kind == 5:
            content = content[:begin] + content[begin:end] * 2 + content[end:]
        elif kind == 6:
            content = content[:begin] + draw.data(count) + content[begin:]
        elif kind == 7:
            content = content[:begin] + draw.data(end - begin) + content[end:]
        elif kind == 8:
            content = content[:begin] + bytes(end - begin) + content[end:]
        else:
            content = draw.choice([b"", b"\0" * 64, draw.data(draw.choice([1, 9, 300])), content + draw.data(64)])
    return content


def damage_json(draw: Draw, content: bytes) -> bytes:
    """Return JSON with one to three values changed, added or removed, or with damaged bytes."""
    if draw.flag(0.25):
        return damage(draw, content)
    value, raw = json.loads(content), []
    for _ in range(draw.integer(1, 3)):
        value = _damage_value(draw, value, raw)
    text = json.dumps(value, indent=draw.choice([None, 2]))
    for number, words in enumerate(raw):
        text = text.replace(f'"@{number}@"', words)
    return text.encode("utf-8", errors="surrogatepass")


def _damage_value(draw: Draw, value: object, raw: list[str]) -> object:
    """Return the value with one place changed."""
    inner = isinstance(value, dict | list) and len(value) and not draw.flag(0.02)
    if not inner:
        if draw.flag(0.15):
            raw.append(draw.choice(RAW))
            return f"@{len(raw) - 1}@"
        return draw.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, kind, copied = draw.choice(keys), draw.integer(0, 7), value.copy()
    if kind == 0:
        del copied[key]
    elif kind == 1 and isinstance(value, dict):
        copied[draw.choice([key + "s", key[1:], *OTHER_KEYS])] = draw.choice(VALUES)
    elif kind == 2 and isinstance(value, list):
        copied.insert(key, draw.choice(VALUES))
    else:
        copied[key] = _damage_value(draw, value[key], raw)
    return copied


def damage_safetensors(draw: Draw, content: bytes) -> bytes:
    """Return a safetensors file with damaged bytes, or with another header of the right length."""
    if draw.flag(0.4):
        return damage(draw, content)
    (size,) = struct.unpack("<Q", content[:8])
    header = damage_json(draw, content[8 : 8 + size])
    length = draw.choice([len(header)] * 5 + [0, 1, size, 2**31, 2**63 - 1])
    return struct.pack("<Q", length) + header + content[8 + size :]


def damage_tensor(draw: Draw, x: torch.Tensor) -> torch.Tensor:
    """Return another tensor in place of x: dtype, shape, layout or values."""
    kind = draw.integer(0, 9)
    if kind == 0:
        dtypes = [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8]
        return x.to(draw.choice(dtypes if x.dtype != torch.float8_e4m3fn else [torch.float32]))
    if kind == 1:
        return x.flatten() if draw.flag() else x[None]
    if kind == 2:
        return x[: draw.integer(0, len(x))] if x.dim() else x[None].expand(draw.integer(0, 9))
    if kind == 3:
        return torch.zeros(draw.choice([(), (0,), (1,), (3, 0), (2, 3, 4, 5, 6)]), dtype=x.dtype)
    if kind == 4:
        return x.mT if x.dim() > 1 else x.flip(0) if x.dim() else x + 1
    if kind == 5:
        return torch.full_like(x, draw.choice([0, 1, -1, 127]))
    if kind == 6 and x.is_floating_point():
        return torch.full_like(x, draw.choice([float("nan"), float("inf"), 1e38]))
    if kind == 7:
        return x + draw.choice([1, -1, 100])
    return torch.cat([x, x]) if x.dim() else x


def damage_state(draw: Draw, state: dict) -> object:
    """Return a state dict with other tensors, names or values in it; or something else."""
    state = dict(state)
    for _ in range(draw.integer(1, 3)):
        name, kind = draw.choice(sorted(state, key=str)), draw.integer(0, 8)
        if kind < 4 and isinstance(state[name], torch.Tensor):
            state[name] = damage_tensor(draw, state[name])
        elif kind == 4:
            del state[name]
        elif kind == 5:
            others = ["layers.9.self_attn.q_proj.weight", "layers.99999999.ffn.fc1.bias", f"{name}x", f"a.{name}", ""]
            state[draw.choice(others)] = state[name]
        elif kind == 6:
            state[name] = draw.choice([None, 3, "x", [1], {"a": 1}, torch.float32, OrderedDict(), b"x"])
        elif kind == 7:
            state[draw.choice([3, None, True, 1.5])] = state[name]
        else:
            inner = {"model": state}
            return draw.choice([state, [state], inner, {"state_dict": inner}, inner | {"x": 1}])
        if not state:
            break
    return state


def odd_tensors(draw: Draw, x: torch.Tensor) -> torch.Tensor:
    """Return a tensor that only a pickle can hold: sparse, on meta, or of absurd size by strides of 0."""
    kind = draw.integer(0, 3)
    if kind == 0 and x.is_floating_point():
        return x.to_sparse() if x.dim() else x
    if kind == 1:
        return x.to("meta")
    size = 1 << draw.choice([20, 31, 40])
    shape = [size, *x.shape[1:]] if kind == 2 else [*x.shape[:-1], size]
    return x.flatten()[:1].expand(shape) if x.numel() else x
