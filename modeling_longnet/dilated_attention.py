"""The public op: dilated attention over all branches (LongNet, arXiv 2307.02486, section 2.2-2.3)."""

import torch
from torch import Tensor

from .attention_autograd import AttentionPlan, attend_chunks
from .backends import choose_backend
from .branches import whole_batch
from .pattern import Pattern
from .reference import count_branches, dense_attention

# Computed here, since a compiled graph cannot call is_autocast_available.
_AUTOCAST_DEVICES = {name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name)}

_FLOAT32 = torch.finfo(torch.float32)


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(f"{shapes}: expected query (B, H, L, D), key and value (B, G, L, D) alike.")
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(f"{shapes}: batch, length and head dimension of query and key must be equal.")
    if 0 in query.shape or 0 in key.shape:
        raise ValueError(f"{shapes}: every dimension, the length too, must be at least 1.")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{shapes}: the {key.shape[1]} key/value heads must divide the {query.shape[1]} query heads.")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: expected one floating-point dtype.")
    if any(x.layout != torch.strided for x in (query, key, value)):
        raise ValueError(f"layouts {query.layout}, {key.layout}, {value.layout}: query, key and value must be dense.")
    if not query.device == key.device == value.device:
        raise ValueError(f"devices {query.device}, {key.device}, {value.device}: all three must be on one device.")


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which attention runs: autocast's if enabled, as in PyTorch's own (float64 stays)."""
    device = x.device.type
    if x.dtype == torch.float64 or not x.is_floating_point() or device not in _AUTOCAST_DEVICES:
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: list[int] | tuple[int, ...],
    dilation_rates: list[int] | tuple[int, ...],
    *,
    is_causal: bool = True,
    scale: float | None = None,
    layer: int | None = None,
    backend: str = "auto",
    **pattern,
) -> Tensor:
    """Compute dilated attention (LongNet, arXiv 2307.02486, section 2.2-2.3).

    Branch (w, r) cuts the sequence into segments of w tokens, in which a head keeps the tokens at its offset modulo r.
    Branches are merged by their softmax denominators (Eq. 9-10): one softmax over the keys of all, in which a key in
    two branches counts twice. Any length, w and r are exact, without padding.

    Args:
        query: (B, H, L, D), floating point. (B, L, H, D) in memory, transposed, is fastest.
        key, value: (B, G, L, D), where G divides H.
        segment_lengths, dilation_rates: w and r of each branch, in tokens; 1 <= r <= w, w ascending.
        is_causal: a query sees no later key.
        scale: factor of the scores, above 0; 1 / sqrt(D) if None.
        layer: number of the layer, from 0, on which patterns beyond the paper may depend; with a period it is needed.
        backend: "eager" (dense reference, O(L^2), any device), "torch" (PyTorch's kernels), "flash_attn" (that
            package), "triton" (CUDA, D up to 256, no float64), or "auto": "triton" on a GPU, else "torch".
        pattern: head_offsets, "interleaved" (g mod r, the paper) or "blocked" (g // ceil(G / r), TorchScale); beyond
            the paper window_size, query_rates, rotate_offsets, stagger_segments, keys_once, branch_layer_period, see
            `LongNetConfig`.

    Returns:
        (B, H, L, D) in the query's dtype (autocast's under autocast), 0 for a query that no branch covers. Sums over
        keys and branches are taken in at least float32. In half precision the sum over branches is stored in that
        precision if the first branch has r = 1 and sum(1 / query rate) of the others is at most 1: one more rounding.

    Raises:
        ValueError: branches, shapes, dtypes or names that do not fit, or a named backend that cannot run.
        NotImplementedError: a second derivative on a fast path.

    Example:
        >>> q = k = v = torch.randn(1, 8, 4096, 64)
        >>> dilated_attention(q, k, v, segment_lengths=[512, 2048], dilation_rates=[1, 4]).shape
        torch.Size([1, 8, 4096, 64])
    """
    query, key, value = (x.to(autocast_dtype(x)) for x in (query, key, value))
    _check_inputs(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not _FLOAT32.tiny <= scale <= _FLOAT32.max:
        raise ValueError(f"scale={scale} must be above 0 in float32: kernels multiply masked scores, -inf, by it.")
    pattern = Pattern(segment_lengths, dilation_rates, **pattern)
    pattern.check(is_causal)
    branches, backend = pattern.branches(key.shape[1], query.shape[1], layer), choose_backend(backend, query)
    if backend == "eager":
        p = torch.arange(query.shape[2], device=query.device)[None]
        counts = count_branches(branches, p, p, is_causal=is_causal)
        return dense_attention(query, key, value, counts, scale)[0]
    plan = AttentionPlan(whole_batch(query.shape[0], query.shape[2]), branches, is_causal, scale, backend)
    return attend_chunks(*(x.transpose(1, 2) for x in (query, key, value)), plan).transpose(1, 2)
