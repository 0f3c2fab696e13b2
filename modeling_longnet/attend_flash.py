"""Attention on the rows of one branch by the flash-attn package (version 2.8 or later), an optional extra.

The same two functions as in `attend_torch`; there the layout is explained.
"""

import torch
from torch import Tensor

from .attend_torch import Part

try:
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward
except ImportError as error:
    _missing = f"the flash-attn package cannot be imported ({error}); pip install flash-attn, or use 'torch'"
else:
    _missing = None


def unavailable(query: Tensor) -> str | None:
    """Why this backend cannot serve such a query tensor, None if it can."""
    if _missing:
        return _missing
    if query.device.type != "cuda":
        return f"flash-attn runs on CUDA devices, not on {query.device.type!r}; use 'torch'"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn computes in float16 and bfloat16, not in {query.dtype}; use 'torch'"
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        return f"flash-attn takes head dimensions that are multiples of 8 up to 256, not {query.shape[-1]}"
    return None


def forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> list[Part]:
    """softmax(q k^T * scale) v and its lse, in parts; causal means key index <= query index (both start together)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, L, H, D)
    out, lse, *_ = _flash_attn_forward(
        query, key, value, 0.0, scale, causal=is_causal, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return [(slice(None), out.transpose(1, 2), lse)]


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. `out` and `lse` may be those of a softmax over more keys than these (merged)."""
    grad_out, query, key, value, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    _flash_attn_backward(
        grad_out, query, key, value, out, lse.contiguous(), *grads, 0.0, scale, causal=is_causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False,
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in grads)
