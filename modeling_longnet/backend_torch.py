"""The backend "torch": PyTorch's own flash and memory-efficient kernels, called so that they return the log-sum-exp."""

from functools import lru_cache

import torch
from torch import Tensor

from .backend import Grads
from .backend_strided import Part, StridedBackend
from .compat import (
    cpu_flash,
    cpu_flash_backward,
    cuda_efficient,
    cuda_efficient_backward,
    cuda_flash,
    cuda_flash_backward,
)

# A causal call that is split: the first _SPLIT queries are one causal call, the others a second call with a mask.
_SPLIT = 256
# From so many queries on, the CPU kernel's gradient takes them 256 at a time, not 32 or 64.
_QUERIES = 768
# Larger windows take blocks of whole windows: the keys of bands overlap, which costs copies and memory
# (docs/tried.md).
_BAND, _HALF_BAND = 512, 256
# With fewer keys than a vector register holds, the CPU kernel returns out 0 and lse 0 where all scores are NaN.
_VECTOR = 16
_KERNELS = {
    "cpu": (cpu_flash, cpu_flash_backward),
    "cuda": (cuda_flash, cuda_flash_backward, cuda_efficient, cuda_efficient_backward),
}


class TorchBackend(StridedBackend):
    """PyTorch's kernels on CPU and CUDA.

    Args:
        split_seqlens: causal attention over this many tokens takes two CPU calls. The CPU kernel computes whole blocks
            of 512 keys, so one call costs as much as attention without a mask (benchmarks/README.md).
        gathered_bytes: up to this size, half-precision slices are made contiguous before a CPU kernel, which is faster
            copies included (benchmarks/README.md); larger copies would cost memory.
        float32_size: half-precision gradients are computed in float32 on a CPU, whose kernel takes long for small
            products (benchmarks/README.md), below so many keys times D and 768 queries; also if D < 64 or in float16.
    """

    def __init__(
        self, split_seqlens: range = range(384, 513), gathered_bytes: int = 4 << 20, float32_size: int = 24_576
    ):
        self.split_seqlens, self.gathered_bytes, self.float32_size = split_seqlens, gathered_bytes, float32_size

    def unavailable(self, query: Tensor) -> str | None:
        device = query.device.type
        if device not in _KERNELS:
            return f"PyTorch has no attention kernel with a log-sum-exp on device {device!r}; use 'eager'"
        if None in _KERNELS[device]:
            return f"PyTorch {torch.__version__} has no attention kernel that returns its log-sum-exp; use 'eager'"
        if not query.is_floating_point():
            return f"dtype {query.dtype} is not a floating-point dtype"
        if device == "cuda" and query.dtype == torch.float64:
            return "PyTorch's CUDA kernels have no float64; use float32, or 'eager'"
        if device == "cuda" and query.shape[-1] % 8:
            return f"PyTorch's CUDA kernels need a head dimension divisible by 8, not {query.shape[-1]}; use 'eager'"
        return None

    def splits_queries(self, query, seqlen):
        return query.device.type == "cpu" and seqlen in self.split_seqlens

    def takes_bands(self, query, window):
        return query.device.type == "cpu" and window <= (_HALF_BAND if query.itemsize == 2 else _BAND)

    def forward(self, query, key, value, is_causal, scale, band=0) -> list[Part]:
        if query.device.type != "cpu":
            return [(slice(None), *_cuda_forward(query, key, value, is_causal, scale))]
        query, key, value = self._gather(query, key, value)
        if band:
            mask = _band_mask(query.shape[-2], band, query.dtype)
            return [(slice(None), *_cpu_forward(query, key, value, False, scale, mask))]
        if not (is_causal and self.splits_queries(query, query.shape[-2])):
            return [(slice(None), *_cpu_forward(query, key, value, is_causal, scale))]
        first, others = slice(_SPLIT), slice(_SPLIT, None)
        q, k, v = (x[..., first, :] for x in (query, key, value))
        mask = _causal_mask(query.shape[-2], query.dtype)
        return [
            (first, *cpu_flash(q, k, v, 0.0, True, scale=scale)),
            (others, *cpu_flash(query[..., others, :], key, value, attn_mask=mask, scale=scale)),
        ]

    def backward(self, grad_out, query, key, value, out, lse, is_causal, scale, band=0) -> Grads:
        if query.device.type != "cpu":
            return _cuda_backward(grad_out, query, key, value, out, lse, is_causal, scale)
        if self._takes_float32(query, key):
            grad_out, query, key, value, out = (x.float() for x in (grad_out, query, key, value, out))
        if not (is_causal and self.splits_queries(query, query.shape[-2])):
            tensors = self._gather(grad_out, query, key, value, out)
            mask = _band_mask(query.shape[-2], band, query.dtype) if band else None
            return cpu_flash_backward(*tensors, lse, 0.0, is_causal, attn_mask=mask, scale=scale)
        first, others = slice(_SPLIT), slice(_SPLIT, None)
        g, q, o = (x[..., others, :] for x in (grad_out, query, out))
        mask = _causal_mask(query.shape[-2], query.dtype)
        dq, dk, dv = cpu_flash_backward(g, q, key, value, o, lse[..., others], 0.0, False, attn_mask=mask, scale=scale)
        g, q, k, v, o = (x[..., first, :] for x in (grad_out, query, key, value, out))
        dq_first, *dkv_first = cpu_flash_backward(g, q, k, v, o, lse[..., first], 0.0, True, scale=scale)
        for total, part in zip((dk, dv), dkv_first, strict=True):
            total[..., first, :] += part
        return join_tokens(dq_first, dq), dk, dv

    def _takes_float32(self, query: Tensor, key: Tensor) -> bool:
        (queries, size), keys = query.shape[-2:], key.shape[-2]
        pays = query.dtype == torch.float16 or size < 64 or (queries < _QUERIES and keys * size < self.float32_size)
        return pays and query.itemsize == 2 and self.float32_size > 0

    def _gather(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Make half-precision slices contiguous unless they are large."""
        if tensors[0].itemsize > 2 or tensors[0].nbytes > self.gathered_bytes:
            return tensors
        return tuple([x.contiguous() for x in tensors])


def _cpu_forward(query, key, value, is_causal, scale, mask=None) -> tuple[Tensor, Tensor]:
    out, lse = cpu_flash(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
    if key.shape[-2] < _VECTOR:
        queries, keys = ((0 * x.detach()).sum(-1) for x in (query, key))  # NaN or 0; 0 * inf is NaN
        if mask is not None:
            keys = torch.where(mask == 0, keys[..., None, :], 0).sum(-1)
        else:
            keys = keys.cumsum(-1) if is_causal else keys.sum(-1, keepdim=True)
        nan = queries + keys.repeat_interleave(query.shape[1] // key.shape[1], 1)
        out += nan[..., None]
        lse += nan
    return out, lse


@lru_cache(maxsize=8)
def _band_mask(queries: int, band: int, dtype: torch.dtype) -> Tensor:
    """Return the mask of queries that see keys i to i + band - 1: (queries, queries + band - 1), 0 and -inf."""
    keys = torch.arange(queries + band - 1, device="cpu") - torch.arange(queries, device="cpu")[:, None]
    outside = (keys < 0) | (keys >= band)
    return torch.zeros(keys.shape, dtype=dtype, device="cpu").masked_fill_(outside, -torch.inf)


@lru_cache(maxsize=8)
def _causal_mask(seqlen: int, dtype: torch.dtype) -> Tensor:
    """Return the causal mask of the queries from _SPLIT on: (seqlen - _SPLIT, seqlen), 0 and -inf."""
    return torch.full((seqlen - _SPLIT, seqlen), -torch.inf, dtype=dtype, device="cpu").triu_(_SPLIT + 1)


def join_tokens(*parts: Tensor) -> Tensor:
    """Concatenate (B, H, L, D) parts along L in the kernel's own layout, (B, L, H, D); return one part as it is."""
    return parts[0] if len(parts) == 1 else torch.cat([x.transpose(1, 2) for x in parts], 1).transpose(1, 2)


def _uses_flash(query: Tensor) -> bool:
    """Return True if flash runs: half precision, D a multiple of 8 up to 256, a GPU of Ampere or newer."""
    fits = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0 <= query.shape[-1] <= 256
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _cuda_forward(query, key, value, is_causal, scale) -> tuple[Tensor, Tensor]:
    if _uses_flash(query):
        out, lse, *_ = cuda_flash(query, key, value, 0.0, is_causal, False, scale=scale)
        return out, lse
    key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
    out, lse, *_ = cuda_efficient(query, key, value, None, True, 0.0, is_causal, scale=scale)
    return out, lse[..., : query.shape[2]]  # the kernel pads lse to a multiple of 32 queries


def _cuda_backward(grad_out, query, key, value, out, lse, is_causal, scale) -> Grads:
    seed = torch.zeros((), dtype=torch.int64, device=query.device)  # read with dropout only
    if _uses_flash(query):
        inputs = (grad_out, query, key, value, out, lse.contiguous(), None, None, query.shape[2], key.shape[2])
        return cuda_flash_backward(*inputs, 0.0, is_causal, seed, seed, scale=scale)
    groups = key.shape[1]
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf).contiguous()
    key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
    inputs = (grad_out, query, key, value, None, out, padded, seed, seed, 0.0, (True, True, True, False), is_causal)
    dq, dk, dv, _ = cuda_efficient_backward(*inputs, scale=scale)
    dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Return (B, G, L, D) as (B, heads, L, D), copied only if heads > G."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
