"""xPos and rotary positions, modulo the period over which tokens can meet.

Angles and scales are computed in float64 and applied in at least float32, whatever the model's dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_longnet import FLOAT16_SCALE, LongNetConfig

# Positions per step: the float64 intermediates of a long sequence would take more memory than its keys.
_POSITIONS_PER_STEP = 1 << 16


class Rotary(NamedTuple):
    """scale * (cos + i sin) of each pair (2i, 2i+1), for queries and keys: (B or 1, L, 1, D/2), complex64 or 128.

    In a compiled graph the factors are real, (B or 1, L, 1, D/2, 2): Inductor and ONNX have no complex numbers.
    Elsewhere one complex product is faster.
    """

    query: Tensor
    key: Tensor


def make_rotary(config: LongNetConfig, positions: Tensor, dtype: torch.dtype) -> Rotary | None:
    """Return zeta_i ** (n / base) * exp(1j * n * theta_i) for queries and, with the inverse scale, for keys.

    n is the position modulo `config.position_period`. xPos centres it in the period, which keeps its scales small; only
    differences of n matter, and tokens that meet share a period. Rotation alone is not centred: around the middle of a
    very long period, angles would lose digits. theta_i = rope_theta ** (-2i / D) and
    zeta_i = (2i + 0.4 D) / (1.4 D) (xPos, section 3).

    Args:
        positions: (B or 1, L) integers on the device of the attention, each token's position in its document.
        dtype: of the attention.

    Returns:
        None for position_embedding "none". Raises ValueError if float16 attention cannot hold the scales.
    """
    if config.position_embedding == "none":
        return None
    if config.position_embedding == "xpos" and dtype == torch.float16:
        smallest = config.smallest_xpos_scale_base(FLOAT16_SCALE)
        if smallest > config.xpos_scale_base:
            raise ValueError(
                f"float16 cannot hold xPos over {config.position_period} tokens with xpos_scale_base="
                f"{config.xpos_scale_base} (the smallest that fits is {smallest}); use bfloat16, whose range is that "
                "of float32."
            )
    period = min(config.position_period, 1 << 62)
    n = (positions.cpu() if positions.device.type == "mps" else positions) % period  # MPS has no float64
    if config.position_embedding == "xpos":
        n = n - period // 2
    parts = [_rotary(config, part, dtype) for part in n.double().split(_POSITIONS_PER_STEP, dim=1)]
    whole = (torch.cat(x, 1) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
    return Rotary(*(x.to(positions.device) for x in whole))


def _rotary(config: LongNetConfig, n: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the query's and the key's factors for float64 positions n (B or 1, L)."""
    i = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=n.device)
    angle = n[..., None, None] * config.rope_theta ** (-i / config.head_dim)
    out = torch.promote_types(dtype, torch.float32)
    if config.position_embedding == "rope":
        rotation = _polar(torch.ones_like(angle), angle, out)
        return rotation, rotation
    zeta = (i + 0.4 * config.head_dim) / (1.4 * config.head_dim)
    scale = zeta ** (n[..., None, None] / config.xpos_scale_base)
    return _polar(scale, angle, out), _polar(1 / scale, angle, out)


def _polar(scale: Tensor, angle: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.stack([scale * angle.cos(), scale * angle.sin()], -1).to(dtype)
    return torch.polar(scale, angle).to(dtype.to_complex())


def apply_rotary(x: Tensor, factors: Tensor) -> Tensor:
    """Rotate and scale interleaved pairs: y[2i] + 1j y[2i+1] = factor_i * (x[2i] + 1j x[2i+1]).

    Args:
        x: (B, L, heads, D), any floating dtype. factors: of `Rotary`.

    Returns:
        (B, L, heads, D) in x's dtype, computed in the precision of the factors.
    """
    pairs = x.to(factors.real.dtype).unflatten(-1, (-1, 2))
    if factors.is_complex():
        return torch.view_as_real(torch.view_as_complex(pairs) * factors).flatten(-2).to(x.dtype)
    (a, b), (cos, sin) = pairs.unbind(-1), factors.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
