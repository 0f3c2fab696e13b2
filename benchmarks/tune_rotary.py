"""Rotary and xPos positions in one kernel: a candidate for `modeling_longnet.positions.apply_rotary` on CUDA.

In half precision it moves 4 bytes per element, forward and backward alike, plus the factors of each token, which all
heads share. Letters: B batch, L tokens, H heads, D head dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_T = 16  # tokens per program, which computes all heads


@triton.jit(do_not_specialize=["length"])
def _rotary_kernel(
    x_ptr, factors_ptr, y_ptr, stride_xb, stride_xt, stride_xh, stride_fb, length, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, CONJUGATE: tl.constexpr,
):  # fmt: skip
    """Multiply pairs of elements by complex factors, or their conjugates; y is contiguous."""
    batch = tl.program_id(1).to(tl.int64)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_t < length)[:, None] & (offs_d < D)[None, :]
    factors = tl.load(factors_ptr + batch * stride_fb + offs_t[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    real, imaginary = tl.split(tl.reshape(factors, [BLOCK_T, BLOCK_D // 2, 2]))
    if CONJUGATE:
        imaginary = -imaginary
    x_ptrs = x_ptr + batch * stride_xb + offs_t[:, None] * stride_xt + offs_d[None, :]
    y_ptrs = y_ptr + (batch * length + offs_t[:, None]) * (heads * D) + offs_d[None, :]
    for head in range(heads):
        x = tl.load(x_ptrs + tl.cast(head, tl.int64) * stride_xh, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [BLOCK_T, BLOCK_D // 2, 2]))
        y = tl.join(a * real - b * imaginary, a * imaginary + b * real)
        tl.store(y_ptrs + head * D, tl.reshape(y, [BLOCK_T, BLOCK_D]).to(y_ptr.dtype.element_ty), mask=mask)


class _Rotate(torch.autograd.Function):
    """Multiply by factors. The gradient multiplies by their conjugates, so derivatives of any order exist."""

    @staticmethod
    def forward(ctx, x: Tensor, factors: Tensor, conjugate: bool) -> Tensor:
        ctx.factors, ctx.conjugate = factors, conjugate
        x = x if x.stride(-1) == 1 else x.contiguous()
        batch, length, heads, dim = x.shape
        y = x.new_empty(x.shape)
        numbers = torch.view_as_real(factors.contiguous())
        grid = -(-length // _BLOCK_T), batch, 1
        _rotary_kernel[grid](
            x, numbers, y, *x.stride()[:3], numbers.stride(0) if len(numbers) > 1 else 0, length, heads,
            D=dim, BLOCK_D=max(2, 1 << (dim - 1).bit_length()), BLOCK_T=_BLOCK_T, CONJUGATE=conjugate,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Rotate.apply(grad, ctx.factors, not ctx.conjugate), None, None


def apply_rotary(x: Tensor, factors: Tensor) -> Tensor:
    """Rotate and scale interleaved pairs: y[2i] + 1j y[2i+1] = factor_i * (x[2i] + 1j x[2i+1]).

    Args:
        x: (B, L, H, D), float32, float16 or bfloat16. factors: (B or 1, L, 1, D/2), complex64.

    Returns:
        (B, L, H, D) in x's dtype, contiguous, computed in float32.
    """
    return _Rotate.apply(x, factors, False)
