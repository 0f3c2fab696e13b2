"""Attention on the rows of one branch by PyTorch's own kernels, which return the log-sum-exp and take strides.

`forward` and `backward` have the same signature in every backend module. All tensors are (B, H, L, D) views of
any strides with D contiguous, key and value may have fewer heads (G divides H), lse is (B, H, L).
"""

from functools import lru_cache

import torch
from torch import Tensor

# Attention of some of the rows as queries: which ones, out, lse.
Part = tuple[slice, Tensor, Tensor]

_aten = torch.ops.aten
# The CPU kernel computes blocks of 512 keys whole, so causal attention on up to 512 rows costs as much as attention to
# all of them. Queries from this one on are a call of their own, under a mask: the others then need no keys behind it.
_CUT = 256
_CUT_ROWS = range(384, 513)  # where a second call costs less than it saves (benchmarks/README.md)
# In half precision the CPU's kernels rearrange rows first, faster where these lie next to each other, copies included
# (benchmarks/README.md). Larger calls are left as they are: copies would cost memory.
_GATHERED_BYTES = 4 << 20


def unavailable(query: Tensor) -> str | None:
    """Why this backend cannot serve such a query tensor, None if it can."""
    if query.device.type not in ("cpu", "cuda"):
        return f"PyTorch has no attention kernel with a log-sum-exp on device {query.device.type!r}; use 'eager'"
    if not query.is_floating_point():
        return f"dtype {query.dtype} is no floating-point type"
    if query.device.type == "cuda" and query.dtype == torch.float64:
        return "PyTorch's CUDA kernels have no float64; use float32, or 'eager'"
    if query.device.type == "cuda" and query.shape[-1] % 8:
        return f"PyTorch's CUDA kernels take head dimensions of a multiple of 8, not {query.shape[-1]}; use 'eager'"
    return None


def forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> list[Part]:
    """softmax(q k^T * scale) v and its lse, in parts; causal means key index <= query index (both start together)."""
    if query.device.type == "cpu":
        query, key, value = _gather(query, key, value)
        if is_causal and cuts_rows(query.shape[-2], query.device):
            return _cut_forward(query, key, value, scale)
        run = _aten._scaled_dot_product_flash_attention_for_cpu
        return [(slice(None), *run(query, key, value, 0.0, is_causal, scale=scale))]
    return [(slice(None), *_cuda_forward(query, key, value, is_causal, scale))]


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
    if query.device.type == "cpu":
        if is_causal and cuts_rows(query.shape[-2], query.device):
            return _cut_backward(grad_out, query, key, value, out, lse, scale)
        grad_out, query, key, value, out = _gather(grad_out, query, key, value, out)
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, lse, 0.0, is_causal, scale=scale
        )
    return _cuda_backward(grad_out, query, key, value, out, lse, is_causal, scale)


def _gather(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Half precision's rows next to each other, unless there are many of them."""
    bytes_per_number = tensors[0].element_size()
    if bytes_per_number > 2 or tensors[0].numel() * bytes_per_number > _GATHERED_BYTES:
        return tensors
    return tuple([x.contiguous() for x in tensors])


def cuts_rows(rows: int, device: torch.device) -> bool:
    """Is causal attention on so many rows cheaper in two calls?"""
    return device.type == "cpu" and rows in _CUT_ROWS


@lru_cache(maxsize=8)
def _cut_mask(rows: int, dtype: torch.dtype) -> Tensor:
    """What the queries from `_CUT` on do not see: (rows - _CUT, rows), 0 and -inf."""
    return torch.full((rows - _CUT, rows), -torch.inf, dtype=dtype, device="cpu").triu_(_CUT + 1)


def _cut_forward(query, key, value, scale) -> list[Part]:
    run, mask = _aten._scaled_dot_product_flash_attention_for_cpu, _cut_mask(query.shape[-2], query.dtype)
    first, others = slice(_CUT), slice(_CUT, None)
    return [
        (first, *run(*(x[..., first, :] for x in (query, key, value)), 0.0, True, scale=scale)),
        (others, *run(query[..., others, :], key, value, attn_mask=mask, scale=scale)),
    ]


def _cut_backward(grad_out, query, key, value, out, lse, scale):
    run = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    mask = _cut_mask(query.shape[-2], query.dtype)
    g, q, o = (x[..., _CUT:, :] for x in (grad_out, query, out))
    dq, dk, dv = run(g, q, key, value, o, lse[..., _CUT:], 0.0, False, attn_mask=mask, scale=scale)
    g, q, k, v, o = (x[..., :_CUT, :] for x in (grad_out, query, key, value, out))
    first, *others = run(g, q, k, v, o, lse[..., :_CUT], 0.0, True, scale=scale)
    for total, part in zip((dk, dv), others, strict=True):
        total[..., :_CUT, :] += part
    return join_rows(first, dq), dk, dv


def join_rows(*parts: Tensor) -> Tensor:
    """Rows behind rows, (B, H, L, D), in memory as the kernel lays them out: (B, L, H, D); a single part as it is."""
    return parts[0] if len(parts) == 1 else torch.cat([x.transpose(1, 2) for x in parts], 1).transpose(1, 2)


def _uses_flash(query: Tensor) -> bool:
    """Flash takes half precision, head dimensions that are multiples of 8 up to 256, and Ampere or newer."""
    fits = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0 <= query.shape[-1] <= 256
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _cuda_forward(query, key, value, is_causal, scale):
    repeat = query.shape[1] // key.shape[1]
    if _uses_flash(query):
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)
        return out, lse
    key, value = (_share_heads(x, repeat) for x in (key, value))
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scale
    )
    return out, lse[..., : query.shape[2]]  # the kernel pads lse to a multiple of 32 queries


def _cuda_backward(grad_out, query, key, value, out, lse, is_causal, scale):
    groups, repeat = key.shape[1], query.shape[1] // key.shape[1]
    seeds = torch.zeros((), dtype=torch.int64, device=query.device)  # read with dropout only
    if _uses_flash(query):
        return _aten._scaled_dot_product_flash_attention_backward(
            grad_out, query, key, value, out, lse.contiguous(), None, None, query.shape[2], key.shape[2],
            0.0, is_causal, seeds, seeds, scale=scale,
        )  # fmt: skip
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf).contiguous()
    key, value = (_share_heads(x, repeat) for x in (key, value))
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad_out, query, key, value, None, out, padded, seeds, seeds, 0.0, (True, True, True, False), is_causal,
        scale=scale,
    )  # fmt: skip
    dk, dv = (x.unflatten(1, (groups, repeat)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _share_heads(x: Tensor, repeat: int) -> Tensor:
    """(B, G, L, D) shown as (B, G * repeat, L, D); a copy only where the kernel needs repeated heads."""
    return x if repeat == 1 else x.repeat_interleave(repeat, 1)
