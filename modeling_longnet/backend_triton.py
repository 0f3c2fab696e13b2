"""The Triton backend: one kernel launch per branch forward; delta once, then two launches per branch backward.

A launch takes a whole branch, in place. `TRITON_INTERPRET=1` runs the kernels on a CPU, slowly; the tests use it.
Letters: B batch, L tokens, H query heads, G key/value heads, D head dimension, P slots. Tensors are (B, L, H, D).
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import Backend, BranchCall, Grads
from .branches import Branch, Chunk
from .compat import HAS_TRITON_GDC, TRITON_IS_INTERPRETED
from .triton_kernels import TRITON_ERROR, backward_dkdv_kernel, backward_dq_kernel, delta_kernel, forward_kernel

_MIN_SHARED_MEMORY = 160 << 10  # bytes per block, as on an A100 and larger: the block sizes below need it
_LARGEST_BLOCK = 128  # tokens
_INT32_ELEMENTS = 1 << 31
_DELTA_BLOCK = 32
_KERNELS = {"forward": forward_kernel, "dkdv": backward_dkdv_kernel, "dq": backward_dq_kernel}
# Queries and keys of a block, warps and pipeline stages, by element size, for head dimensions up to 64, 128 and 256.
# The fastest measured on an H100 (benchmarks/README.md); float16, and float32 with D > 128, follow their neighbours.
_BLOCK_SIZES = {
    ("forward", 2): ((64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2)),
    ("forward", 4): ((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)),
    ("dkdv", 2): ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 1)),
    ("dkdv", 4): ((32, 64, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)),
    ("dq", 2): ((64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    ("dq", 4): ((64, 64, 4, 1), (32, 32, 4, 2), (16, 32, 4, 1)),
}


def block_sizes(kernel: str, dtype: torch.dtype, dim: int) -> tuple[int, int, int, int]:
    """Return BLOCK_M, BLOCK_N, warps and pipeline stages of a kernel ("forward", "dkdv" or "dq")."""
    return _BLOCK_SIZES[kernel, dtype.itemsize][(dim > 64) + (dim > 128)]


class _Layout(NamedTuple):
    """Everything about the tensors of a launch except their addresses."""

    device: torch.device
    dtype: torch.dtype
    length: int
    heads: int
    kv_heads: int
    dim: int
    query: tuple[int, ...]  # strides
    key: tuple[int, ...]
    value: tuple[int, ...]
    grad_key: tuple[int, ...]  # and of grad_value

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, grad_key: Tensor | None = None):
        _, length, heads, dim = query.shape
        strides = query.stride(), key.stride(), value.stride(), () if grad_key is None else grad_key.stride()
        return cls(query.device, query.dtype, length, heads, key.shape[2], dim, *strides)

    def is_wide(self, r: int, seqlen: int) -> bool:
        """Return whether offsets within a block of kept tokens overflow 32 bits."""
        token = max(self.query[1], self.key[1], self.value[1], self.heads * self.dim)
        return min(seqlen, _LARGEST_BLOCK) * r * token >= _INT32_ELEMENTS


class _Launch(NamedTuple):
    """A kernel with its grid and all its arguments except tensors."""

    kernel: Callable
    programs: int
    arguments: dict[str, object]
    device: torch.device

    def run(self, *tensors: Tensor) -> None:
        """Launch on the tensors' device: Triton itself launches on the current one."""
        is_current = self.device.type != "cuda" or self.device.index == torch.cuda.current_device()
        with nullcontext() if is_current else torch.cuda.device(self.device):
            # Explicit, since enable_fp_fusion is on by default only up to Triton 3.9.
            self.kernel[self.programs, 1, 1](*tensors, **self.arguments, enable_fp_fusion=True)


@torch.compiler.assume_constant_result
def _shared_memory(device: torch.device) -> int:
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)  # not on ROCm


@lru_cache
def _can_overlap(device: torch.device) -> bool:
    """Return whether a kernel may start before the previous one ends (programmatic dependent launch)."""
    return HAS_TRITON_GDC and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _padded_dim(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


@lru_cache(maxsize=1024)
def _offset_tables(branch: Branch, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Return the offset of each key/value head, and those of each query head: int32 on the device; None if all are 0.

    For queries also None if they are kept at their keys' offsets. The query offsets of a head are adjacent.
    """
    if branch.r == 1:
        return None, None
    of_queries = [i for o in branch.query_offsets for i in range(o, branch.r, branch.query_rate)]
    tables = (torch.tensor(x, dtype=torch.int32, device=device) if x else None for x in (branch.offsets, of_queries))
    return tuple(tables)


class _Place(NamedTuple):
    """Where a chunk lies in the segments of a branch, as the kernel arguments of the same names.

    `prefix` and `suffix` are the tokens before and after the chunk in its first and its last segment.
    """

    w: int
    phase: int
    ghost: int
    num_segments: int
    prefix: int
    suffix: int

    @classmethod
    def of(cls, chunk: Chunk, branch: Branch) -> "_Place":
        w, after = branch.w, chunk.total - chunk.start - chunk.length
        if branch.is_window:
            prefix, suffix = min(chunk.start, w - 1), min(after, w - 1)
            return cls(prefix + chunk.length + suffix, prefix, 0, 1, prefix, suffix)
        phase = (chunk.start + branch.phase) % w
        prefix, suffix = min(chunk.start, phase), min(after, -(phase + chunk.length) % w)
        return cls(w, phase, phase - prefix, -(-(phase + chunk.length) // w), prefix, suffix)


def _visible(call: BranchCall) -> str:
    """Return which keys of its segment a query sees: see VISIBLE in `triton_kernels`."""
    branch = call.branch
    if branch.is_window:
        return "window"
    if branch.after_segment:
        return "segments"
    if branch.after_window or (call.is_causal and call.keys == "chunk" and branch.query_offsets):
        return "shifted"
    return "causal" if call.is_causal and call.keys == "chunk" else "all"


def _visibility(call: BranchCall, prefix: int) -> dict[str, object]:
    """Return the arguments that say which keys a query sees."""
    branch, start = call.branch, call.chunk.start
    gap, span, shift = branch.after_window, branch.after_segment, 0
    if branch.is_window:
        gap, span = 0 if call.is_causal else 1 - branch.w, branch.w
    elif span:  # keeps the kernels' remainders at 0 or above, from the first token of the prefix on
        shift = (start + branch.after_phase) % span + -(-prefix // span) * span
    return {"VISIBLE": _visible(call), "gap": gap, "span": span, "span_shift": shift}


def _most_tokens(call: BranchCall, place: _Place) -> tuple[int, int]:
    """Return the most queries and keys of a head in a segment of a launch."""
    length, r = min(place.w, call.chunk.length), call.branch.r
    if call.keys == "chunk":
        return -(-length // r), -(-length // r)
    if call.branch.is_window and call.keys == "prefix":
        length = min(length, call.branch.w - 1)  # later queries see none of it
    return -(-length // r), -(-(place.prefix if call.keys == "prefix" else place.suffix) // r)


def _strides(**tensors: tuple[int, ...]) -> dict[str, int]:
    """Return the arguments stride_qb, stride_qt and stride_qh for strides `q`, and so on."""
    return {f"stride_{name}{dim}": n for name, by in tensors.items() for dim, n in zip("bth", by, strict=False)}


def _shared_arguments(call: BranchCall, layout: _Layout, place: _Place) -> dict[str, object]:
    """Return the arguments that are the same for the three attention kernels."""
    chunk, branch, dim = call.chunk, call.branch, layout.dim
    precision = "tf32x3" if layout.dtype == torch.float32 else "tf32"  # ignored in half precision
    arguments = _strides(q=layout.query, k=layout.key, v=layout.value)
    arguments |= {"stride_lb": layout.length * layout.heads, "heads": layout.heads}
    arguments |= dict(zip(("key_offsets_ptr", "query_offsets_ptr"), _offset_tables(branch, layout.device), strict=True))
    arguments |= {"RESIDUES": branch.r // (branch.query_rate or branch.r)}
    arguments |= {"w": place.w, "r": branch.r, "phase": place.phase, "ghost": place.ghost}
    arguments |= {"length": chunk.length, "remaining": chunk.total - chunk.start}
    arguments |= {"batch_begin": chunk.batch_begin, "column_begin": chunk.column_begin}
    arguments |= {"scale_log2": call.scale * math.log2(math.e), "D": dim, "BLOCK_D": _padded_dim(dim)}
    arguments |= {"KEYS": call.keys, "IS_FIRST": call.is_first, **_visibility(call, place.prefix)}
    arguments |= {"num_segments": place.num_segments if call.keys == "chunk" else 1}
    arguments |= {"first_segment": place.num_segments - 1 if call.keys == "suffix" else 0}
    return arguments | {"PRECISION": precision, "OVERLAPS": _can_overlap(layout.device)}


@lru_cache(maxsize=4096)
def _launch(kernel: str, call: BranchCall, layout: _Layout) -> _Launch | None:
    """Return the launch of a kernel ("forward", "dkdv" or "dq"), None if there are no keys."""
    place = _Place.of(call.chunk, call.branch)
    seqlen_q, seqlen_k = _most_tokens(call, place)
    if not (seqlen_q and seqlen_k):
        return None
    branch, heads_per_kv = call.branch, layout.heads // layout.kv_heads
    block_m, block_n, num_warps, num_stages = block_sizes(kernel, layout.dtype, layout.dim)
    arguments = _shared_arguments(call, layout, place)
    if kernel == "dkdv":
        num_blocks, heads = -(-seqlen_k // block_n), layout.kv_heads
        arguments |= {"HEADS_PER_KV": heads_per_kv, **_strides(dk=layout.grad_key)}
    else:
        num_blocks, heads = -(-seqlen_q // block_m), layout.heads * arguments["RESIDUES"]
        arguments |= {"heads_per_kv": heads_per_kv}
    if kernel == "forward":
        zero_padding = call.zero_padding and call.keys == "chunk"
        padded_seqlen = -(-min(branch.w, call.chunk.total) // branch.r)
        arguments |= {"padded_seqlen": padded_seqlen, "ZERO_PADDING": zero_padding}
    if arguments["OVERLAPS"]:
        arguments["launch_pdl"] = call.overlaps or kernel == "dq"  # dq follows dk and dv, of the same inputs
    arguments |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "WIDE": layout.is_wide(branch.r, seqlen_q)}
    arguments |= {"num_blocks": num_blocks, "num_warps": num_warps, "num_stages": num_stages}
    programs = num_blocks * heads * arguments["num_segments"] * call.chunk.batch
    return _Launch(_KERNELS[kernel], programs, arguments, layout.device)


class TritonBackend(Backend):
    """Triton kernels for CUDA GPUs. `saved` is delta (B, L, H), float32.

    Keys and values may have any strides with a contiguous head dimension; their gradients have equal strides.
    """

    def unavailable(self, query: Tensor) -> str | None:
        device, dtype, dim = query.device, query.dtype, query.shape[-1]
        if TRITON_ERROR:
            return f"the triton package cannot be imported ({TRITON_ERROR}); pip install triton, or use 'torch'"
        if device.type != "cuda" and not (device.type == "cpu" and TRITON_IS_INTERPRETED):
            return f"the Triton kernels run on CUDA devices, not on {device.type!r}; use 'torch'"
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"the Triton kernels compute in float32, float16 and bfloat16, not in {dtype}; use 'eager'"
        if device.type == "cpu" and dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 as if it were integers; use 'torch'"
        if dim > 256:
            return f"the Triton kernels take head dimensions up to 256, not {dim}; use 'eager'"
        if device.type == "cuda" and (available := _shared_memory(device)) < _MIN_SHARED_MEMORY:
            needed = f"{_MIN_SHARED_MEMORY >> 10} KB of shared memory per block"
            return f"the Triton kernels need {needed}, and this GPU has {available >> 10} KB; use 'torch'"
        return None

    def forward_branch(
        self, call: BranchCall, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        if launch := _launch("forward", call, _Layout.of(query, key, value)):
            launch.run(query, key, value, out, lse)
        return out, lse

    def prepare_backward(self, out: Tensor, grad_out: Tensor) -> Tensor:
        dim, delta = out.shape[-1], torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
        arguments = {"count": delta.numel(), "D": dim, "BLOCK_D": _padded_dim(dim), "BLOCK_M": _DELTA_BLOCK}
        if delta.numel():
            programs = -(-delta.numel() // _DELTA_BLOCK)
            _Launch(delta_kernel, programs, arguments, out.device).run(out, grad_out, delta)
        return delta

    def backward_branch(
        self,
        call: BranchCall,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        saved: Tensor,
        lse: Tensor,
        grads: Grads,
    ) -> Grads:
        grad_query, grad_key, grad_value = grads
        inputs, layout = (query, key, value, grad_out, lse, saved), _Layout.of(query, key, value, grad_key)
        if dkdv := _launch("dkdv", call, layout):
            dkdv.run(*inputs, grad_key, grad_value)
            _launch("dq", call, layout).run(*inputs, grad_query)
        return grads
