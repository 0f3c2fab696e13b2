"""The backend "flash_attn": the flash-attn package (2.8 or later), an optional extra."""

import torch
from torch import Tensor

from .backend import Grads
from .backend_strided import Part, StridedBackend
from .compat import flash_attn_backward, flash_attn_forward, flash_attn_missing

_NO_WINDOW = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}


class FlashAttentionBackend(StridedBackend):
    """The flash-attn package on CUDA, in half precision."""

    def unavailable(self, query: Tensor) -> str | None:
        if flash_attn_missing:
            return (
                f"the flash-attn package cannot be imported ({flash_attn_missing}); pip install flash-attn, or use "
                "'torch'"
            )
        if query.device.type != "cuda":
            return f"flash-attn runs on CUDA devices, not on {query.device.type!r}; use 'torch'"
        if query.dtype not in (torch.float16, torch.bfloat16):
            return f"flash-attn computes in float16 and bfloat16, not in {query.dtype}; use 'torch'"
        if query.shape[-1] % 8 or query.shape[-1] > 256:
            return f"flash-attn needs a head dimension divisible by 8, up to 256, not {query.shape[-1]}; use 'auto'"
        return None

    def forward(self, query, key, value, is_causal, scale) -> list[Part]:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, L, H, D)
        options = {"causal": is_causal, "return_softmax": False} | _NO_WINDOW
        out, lse, *_ = flash_attn_forward(query, key, value, 0.0, scale, **options)
        return [(slice(None), out.transpose(1, 2), lse)]

    def backward(self, grad_out, query, key, value, out, lse, is_causal, scale) -> Grads:
        grad_out, query, key, value, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
        inputs = (grad_out, query, key, value, out, lse.contiguous(), *grads, 0.0, scale)
        # Otherwise dq is summed by atomics, in no fixed order.
        deterministic = torch.are_deterministic_algorithms_enabled()
        flash_attn_backward(*inputs, causal=is_causal, deterministic=deterministic, **_NO_WINDOW)
        return tuple(x.transpose(1, 2) for x in grads)
