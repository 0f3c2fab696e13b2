"""Dilated attention as Triton kernels, optional: a launch takes a whole branch, in place.

A program reads a block of one head's rows where they lie, by pointer arithmetic, attends, and merges what it found into
the running (out, lse), so that nothing per branch is ever stored. FlashAttention-2's algorithm (arXiv 2307.08691);
sums are taken in float32, and no program adds to what another adds to, so results are the same in every run.

Letters: B batch, L columns, H query heads, G key/value heads, D head dimension. Tensors are (B, L, H, D) here.
`TRITON_INTERPRET=1` runs the kernels on a CPU, slowly: so the tests do.
"""

import math
from contextlib import nullcontext
from functools import cache, lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .branches import Branch, Chunk

try:
    import triton
    import triton.language as tl
    from triton.compiler import CompiledKernel
    from triton.knobs import runtime
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as error:
    _missing = f"the triton package cannot be imported ({error}); pip install triton, or use 'torch'"

    def _jit(function, **options):
        return function

    class tl:  # only named around the kernels
        constexpr = float
else:
    _missing = None
    _jit = triton.jit
    _IS_INTERPRETED = runtime.interpret

_LOG2_E = tl.constexpr(math.log2(math.e))
_LEAST_SHARED_MEMORY = 160 << 10  # bytes, as an A100 and larger have; the blocks below were chosen for that
_LARGEST_BLOCK = 128  # rows
_NARROW = 1 << 31  # what 32 bits count, elements
# Numbers that change from text to text: no kernel is compiled for special ones.
_NUMBERS = (
    "out_batch", "programs", "segments", "first_segment", "w", "heads_per_offset", "phase", "length", "left", "row",
    "column", "padded", "count",
)  # fmt: skip


def unavailable(query: Tensor) -> str | None:
    """Why this backend cannot serve such a query tensor, None if it can."""
    if _missing:
        return _missing
    if query.device.type != "cuda" and not (query.device.type == "cpu" and _IS_INTERPRETED):
        return f"the Triton kernels run on CUDA devices, not on {query.device.type!r}; use 'torch'"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernels compute in float32, float16 and bfloat16, not in {query.dtype}; use 'eager'"
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 as if it were integers; use 'torch'"
    if query.shape[-1] > 256:
        return f"the Triton kernels take head dimensions up to 256, not {query.shape[-1]}; use 'eager'"
    if query.device.type == "cuda" and _shared_memory(query.device) < _LEAST_SHARED_MEMORY:
        return (
            f"the Triton kernels' blocks need {_LEAST_SHARED_MEMORY >> 10} KB of shared memory a block, this GPU has "
            f"{_shared_memory(query.device) >> 10}; use 'torch'"
        )
    return None


@torch.compiler.assume_constant_result
def _shared_memory(device: torch.device) -> int:
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)  # not on ROCm


class Blocks(NamedTuple):
    """How much one program takes: rows of its own, rows of the other side at a time, warps, stages of loading."""

    own: int
    other: int
    warps: int
    stages: int


def forward_blocks(dtype: torch.dtype, dim: int) -> Blocks:
    """What was fastest on an H100 (benchmarks/README.md): bfloat16 with D of 64, 128 and 256, float32 with 64 and 128.
    Others are like their neighbours."""
    if dtype.itemsize > 2:
        return Blocks(64, 64, 4, 2) if dim <= 64 else Blocks(64, 32, 4, 2) if dim <= 128 else Blocks(32, 32, 4, 1)
    return Blocks(64, 64, 4, 3) if dim <= 128 else Blocks(128, 64, 8, 2)


def backward_blocks(dtype: torch.dtype, dim: int) -> tuple[Blocks, Blocks]:
    """Likewise, for the kernel of keys and that of queries."""
    if dtype.itemsize > 2:
        if dim <= 64:
            return Blocks(64, 32, 4, 1), Blocks(64, 64, 4, 1)
        return (Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 2)) if dim <= 128 else (Blocks(16, 32, 4, 1),) * 2
    if dim <= 64:
        return Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)
    if dim <= 128:
        return Blocks(64, 64, 4, 2), Blocks(128, 64, 8, 3)
    return Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 2)


def _padded_dim(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


@_jit
def _piece(segment, head, w, r, heads_per_offset, phase, length, left, column):
    """Of a head in a segment: the column of its first row in the chunk, how many rows it has there, before, after.

    phase: where in its segment the chunk begins. length, left: tokens of the chunk, and from its begin to the end of
    the text. column: the chunk's first. A head's rows are those tokens of the segment whose place in it is the head's
    offset modulo r.
    """
    offset = (head // heads_per_offset) % r
    begin = tl.cast(segment, tl.int64) * w - phase
    first = (tl.maximum(-begin, 0) - offset + r - 1) // r
    end = (tl.minimum(w, length - begin) - offset + r - 1) // r
    last = (tl.minimum(w, left - begin) - offset + r - 1) // r
    rows, before, after = end - first, first, last - end
    token = column + begin + offset + first * r
    return token, rows.to(tl.int32), before.to(tl.int32), after.to(tl.int32)


@_jit
def _work(
    programs, heads, heads_per_group, segments, first_segment, w, r, heads_per_offset, phase, length, left, row, column
):  # fmt: skip
    """What this program does: number of the block, head, its group, batch row, and the `_piece`.

    Blocks of a head run side by side, then those of the next head of the segment.
    """
    block, rest = tl.program_id(0) % programs, tl.program_id(0) // programs
    head, rest = rest % heads, rest // heads
    segment, batch = first_segment + rest % segments, row + tl.cast(rest // segments, tl.int64)
    group = head // heads_per_group
    token, rows, before, after = _piece(segment, group, w, r, heads_per_offset, phase, length, left, column)
    return block, head, group, batch, token, rows, before, after


@_jit
def _keys(
    pointer, batch, group, token, batch_stride, token_stride, group_stride, rows, before, after, apart,
    WHICH: tl.constexpr,
):  # fmt: skip
    """The first key (or value) that a segment's queries see, how far apart these lie, and how many they are."""
    pointer += batch * batch_stride + tl.cast(group, tl.int64) * group_stride
    if WHICH == "own":
        return pointer + token * token_stride, token_stride * apart, rows
    return pointer, token_stride, before if WHICH == "before" else after


@_jit
def _load_rows(
    pointer, start, count, stride,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + N - 1, (N, BLOCK_D), of which those from `count` on, and elements from D on, are 0."""
    n, d = tl.arange(0, N), tl.arange(0, BLOCK_D)
    # Within a block 32 bits, which take half the registers, unless `stride` has more (WIDE).
    pointers = (pointer + tl.cast(start, tl.int64) * stride) + (n[:, None] * stride + d[None, :])
    if MASKED:
        if D < BLOCK_D:
            return tl.load(pointers, mask=(n < count - start)[:, None] & (d < D)[None, :], other=0.0)
        return tl.load(pointers, mask=(n < count - start)[:, None], other=0.0)
    if D < BLOCK_D:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    return tl.load(pointers)


@_jit
def _forward_keys(
    total, denominator, top, query, key, value, begin, end, i, keys, key_row, value_row, scale,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, OTHER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One softmax goes on over the keys [begin, end), a block at a time."""
    for start in range(begin, end, OTHER):
        j = start + tl.arange(0, OTHER)
        k = _load_rows(key, start, keys, key_row, OTHER, D, BLOCK_D, MASKED)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            seen = (j < keys)[None, :]
            if IS_CAUSAL:
                seen = seen & (j[None, :] <= i[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        denominator = denominator * shrink + tl.sum(weights, 1)
        v = _load_rows(value, start, keys, value_row, OTHER, D, BLOCK_D, MASKED)
        total = tl.dot(weights.to(v.dtype), v, total * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return total, denominator, top


@partial(_jit, do_not_specialize=_NUMBERS)
def _forward_kernel(
    query, key, value, out, lse,
    query_batch, query_token, query_head, key_batch, key_token, key_head, value_batch, value_token, value_head,
    out_batch,
    heads, heads_per_group, programs, segments, first_segment, w, r, heads_per_offset, phase, length, left, row, column,
    padded, scale,
    WHICH: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_FIRST: tl.constexpr, ZERO_PADDING: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of one head's queries in one segment: attend to WHICH keys, merge into out and lse (Eq. 9-10)."""
    apart = tl.cast(r, tl.int64) if WIDE else r
    if OVERLAPS:
        gdc_launch_dependents()  # the next branch may begin where this one leaves processors idle
    block, head, group, batch, token, rows, before, after = _work(
        programs, heads, heads_per_group, segments, first_segment, w, r, heads_per_offset, phase, length, left, row,
        column,
    )  # fmt: skip
    block = programs - 1 - block  # the last queries, which see most keys, begin first
    i = block * OWN + tl.arange(0, OWN)
    key, key_row, keys = _keys(
        key, batch, group, token, key_batch, key_token, key_head, rows, before, after, apart, WHICH
    )  # fmt: skip
    value, value_row, _ = _keys(
        value, batch, group, token, value_batch, value_token, value_head, rows, before, after, apart, WHICH
    )  # fmt: skip
    if (block * OWN >= rows) | (keys == 0):
        if OVERLAPS:
            gdc_wait()  # so that a kernel never ends before the one before it, which the next does not wait for
        return
    query += batch * query_batch + token * query_token + tl.cast(head, tl.int64) * query_head
    q = _load_rows(query, block * OWN, rows, query_token * apart, OWN, D, BLOCK_D, True)

    total = tl.zeros([OWN, BLOCK_D], tl.float32)
    denominator = tl.zeros([OWN], tl.float32)
    top = tl.full([OWN], -float("inf"), tl.float32)
    end = tl.minimum(keys, (block + 1) * OWN) if IS_CAUSAL else keys
    whole = (tl.minimum(keys, block * OWN) if IS_CAUSAL else keys) // OTHER * OTHER
    total, denominator, top = _forward_keys(
        total, denominator, top, q, key, value, 0, whole, i, keys, key_row, value_row, scale,
        False, IS_CAUSAL, D, BLOCK_D, OTHER, PRECISION,
    )  # fmt: skip
    total, denominator, top = _forward_keys(
        total, denominator, top, q, key, value, whole, end, i, keys, key_row, value_row, scale,
        True, IS_CAUSAL, D, BLOCK_D, OTHER, PRECISION,
    )  # fmt: skip
    if ZERO_PADDING:
        # So many keys with score and value 0 more.
        zeros = padded - rows - before - after
        new_top = tl.where(zeros > 0, tl.maximum(top, 0.0), top)
        shrink = tl.exp2(top - new_top)
        denominator = denominator * shrink + zeros * tl.exp2(-tl.maximum(new_top, 0.0))
        total, top = total * shrink[:, None], new_top

    new_out = total / denominator[:, None]
    new_lse = (top + tl.log2(denominator)) / _LOG2_E
    d = tl.arange(0, BLOCK_D)
    place = batch * out_batch + token * heads + head + i.to(tl.int64) * (apart * heads)
    out_pointers = out + place[:, None] * D + d[None, :]
    mask = (i < rows)[:, None] & (d < D)[None, :]
    if OVERLAPS:
        gdc_wait()  # for the branch before, whose results these are merged into
    if not IS_FIRST:
        old_lse = tl.load(lse + place, mask=i < rows, other=0.0)
        old_out = tl.load(out_pointers, mask=mask, other=0.0).to(tl.float32)
        new_out = old_out + (new_out - old_out) / (1 + tl.exp(old_lse - new_lse))[:, None]
        most = tl.maximum(new_lse, old_lse)
        new_lse = most + tl.log(tl.exp(new_lse - most) + tl.exp(old_lse - most))
    tl.store(out_pointers, new_out.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + place, new_lse, mask=i < rows)


@_jit
def _add_rows(pointer, x, row, count, stride, IS_FIRST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add rows (n, BLOCK_D) to those in memory, or write them."""
    d = tl.arange(0, BLOCK_D)
    pointers = pointer + row[:, None].to(tl.int64) * stride + d[None, :]
    mask = (row < count)[:, None] & (d < D)[None, :]
    if not IS_FIRST:
        x += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=mask)


@_jit
def _backward_of_queries(
    grad_query, q, g, top, own, key, value, begin, end, i, keys, key_row, value_row, scale,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, OTHER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum over the keys [begin, end)."""
    for start in range(begin, end, OTHER):
        j = start + tl.arange(0, OTHER)
        k = _load_rows(key, start, keys, key_row, OTHER, D, BLOCK_D, MASKED)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - top[:, None])
        if MASKED:
            seen = (j < keys)[None, :]
            if IS_CAUSAL:
                seen = seen & (j[None, :] <= i[:, None])
            weights = tl.where(seen, weights, 0.0)
        v = _load_rows(value, start, keys, value_row, OTHER, D, BLOCK_D, MASKED)
        grad_scores = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - own[:, None])
        grad_query = tl.dot(grad_scores.to(k.dtype), k, grad_query, input_precision=PRECISION)
    return grad_query


@partial(_jit, do_not_specialize=_NUMBERS)
def _backward_keys_kernel(
    query, key, value, grad_out, lse, delta, grad_key, grad_value,
    query_batch, query_token, query_head, key_batch, key_token, key_head, value_batch, value_token, value_head,
    out_batch, grad_key_batch, grad_key_token, grad_key_head,
    heads, programs, segments, first_segment, w, r, heads_per_offset, phase, length, left, row, column,
    scale,
    WHICH: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_FIRST: tl.constexpr, HEADS_PER_GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of one head's keys in one segment: add the gradients of keys and values, from WHICH queries see them.

    Given the merged lse, and delta = sum of out * grad_out of the merged out, they are the branch's exact share.
    """
    apart = tl.cast(r, tl.int64) if WIDE else r
    if OVERLAPS:
        gdc_launch_dependents()
    # The first keys, which most queries see, begin first.
    block, group, _, batch, token, rows, before, after = _work(
        programs, heads // HEADS_PER_GROUP, 1, segments, first_segment, w, r, heads_per_offset, phase, length, left,
        row, column,
    )  # fmt: skip
    key, key_row, keys = _keys(
        key, batch, group, token, key_batch, key_token, key_head, rows, before, after, apart, WHICH
    )  # fmt: skip
    value, value_row, _ = _keys(
        value, batch, group, token, value_batch, value_token, value_head, rows, before, after, apart, WHICH
    )  # fmt: skip
    if (block * OWN >= keys) | (rows == 0):
        if OVERLAPS:
            gdc_wait()
        return
    j = block * OWN + tl.arange(0, OWN)
    k = _load_rows(key, block * OWN, keys, key_row, OWN, D, BLOCK_D, True)
    v = _load_rows(value, block * OWN, keys, value_row, OWN, D, BLOCK_D, True)
    new_grad_key = tl.zeros([OWN, BLOCK_D], tl.float32)
    new_grad_value = tl.zeros([OWN, BLOCK_D], tl.float32)
    # One loop, masked throughout: with a second one, for the blocks on the diagonal, the compiler would wait for each
    # product by itself (ptxas C7515).
    begin = block * OWN // OTHER * OTHER if IS_CAUSAL else 0
    for n in range(HEADS_PER_GROUP):
        head = group * HEADS_PER_GROUP + n
        head_query = query + batch * query_batch + token * query_token + tl.cast(head, tl.int64) * query_head
        place = batch * out_batch + token * heads + head
        for start in range(begin, rows, OTHER):
            i = start + tl.arange(0, OTHER)
            q = _load_rows(head_query, start, rows, query_token * apart, OTHER, D, BLOCK_D, True)
            g = _load_rows(grad_out + place * D, start, rows, apart * heads * D, OTHER, D, BLOCK_D, True)
            places = place + tl.cast(start, tl.int64) * (apart * heads) + tl.arange(0, OTHER) * (apart * heads)
            top = tl.load(lse + places, mask=i < rows, other=float("inf")) * _LOG2_E
            own = tl.load(delta + places, mask=i < rows, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            weights = tl.exp2(scores * scale - top[:, None])
            if IS_CAUSAL:
                if start < (block + 1) * OWN:
                    weights = tl.where(j[None, :] <= i[:, None], weights, 0.0)
            grad_weights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            grad_scores = weights * (grad_weights - own[:, None])
            new_grad_value = tl.dot(
                tl.trans(weights.to(g.dtype)), g, new_grad_value, input_precision=PRECISION
            )  # fmt: skip
            new_grad_key = tl.dot(tl.trans(grad_scores.to(q.dtype)), q, new_grad_key, input_precision=PRECISION)
    new_grad_key *= scale / _LOG2_E
    grad_key, grad_key_row, _ = _keys(
        grad_key, batch, group, token, grad_key_batch, grad_key_token, grad_key_head, rows, before, after, apart, WHICH
    )  # fmt: skip
    grad_value, _, _ = _keys(
        grad_value, batch, group, token, grad_key_batch, grad_key_token, grad_key_head, rows, before, after, apart,
        WHICH,
    )  # fmt: skip
    if OVERLAPS:
        gdc_wait()
    _add_rows(grad_key, new_grad_key, j, keys, grad_key_row, IS_FIRST, D, BLOCK_D)
    _add_rows(grad_value, new_grad_value, j, keys, grad_key_row, IS_FIRST, D, BLOCK_D)


@partial(_jit, do_not_specialize=_NUMBERS)
def _backward_queries_kernel(
    query, key, value, grad_out, lse, delta, grad_query,
    query_batch, query_token, query_head, key_batch, key_token, key_head, value_batch, value_token, value_head,
    out_batch, heads, heads_per_group, programs, segments, first_segment, w, r, heads_per_offset, phase, length, left,
    row, column, scale,
    WHICH: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_FIRST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of one head's queries in one segment: add their gradients, from WHICH keys they see."""
    apart = tl.cast(r, tl.int64) if WIDE else r
    if OVERLAPS:
        gdc_launch_dependents()
    block, head, group, batch, token, rows, before, after = _work(
        programs, heads, heads_per_group, segments, first_segment, w, r, heads_per_offset, phase, length, left, row,
        column,
    )  # fmt: skip
    block = programs - 1 - block  # the last queries, which see most keys, begin first
    key, key_row, keys = _keys(
        key, batch, group, token, key_batch, key_token, key_head, rows, before, after, apart, WHICH
    )  # fmt: skip
    value, value_row, _ = _keys(
        value, batch, group, token, value_batch, value_token, value_head, rows, before, after, apart, WHICH
    )  # fmt: skip
    if (block * OWN >= rows) | (keys == 0):
        if OVERLAPS:
            gdc_wait()  # so that a kernel never ends before the one before it, which the next does not wait for
        return
    i = block * OWN + tl.arange(0, OWN)
    place = batch * out_batch + token * heads + head
    query += batch * query_batch + token * query_token + tl.cast(head, tl.int64) * query_head
    q = _load_rows(query, block * OWN, rows, query_token * apart, OWN, D, BLOCK_D, True)
    g = _load_rows(grad_out + place * D, block * OWN, rows, apart * heads * D, OWN, D, BLOCK_D, True)
    places = place + i.to(tl.int64) * (apart * heads)
    top = tl.load(lse + places, mask=i < rows, other=float("inf")) * _LOG2_E
    own = tl.load(delta + places, mask=i < rows, other=0.0)
    end = tl.minimum(keys, (block + 1) * OWN) if IS_CAUSAL else keys
    whole = (tl.minimum(keys, block * OWN) if IS_CAUSAL else keys) // OTHER * OTHER
    new_grad_query = tl.zeros([OWN, BLOCK_D], tl.float32)
    new_grad_query = _backward_of_queries(
        new_grad_query, q, g, top, own, key, value, 0, whole, i, keys, key_row, value_row, scale,
        False, IS_CAUSAL, D, BLOCK_D, OTHER, PRECISION,
    )  # fmt: skip
    new_grad_query = _backward_of_queries(
        new_grad_query, q, g, top, own, key, value, whole, end, i, keys, key_row, value_row, scale,
        True, IS_CAUSAL, D, BLOCK_D, OTHER, PRECISION,
    )  # fmt: skip
    new_grad_query *= scale / _LOG2_E
    if OVERLAPS:
        gdc_wait()
    _add_rows(grad_query + place * D, new_grad_query, i, rows, apart * heads * D, IS_FIRST, D, BLOCK_D)


@partial(_jit, do_not_specialize=_NUMBERS)
def _delta_kernel(out, grad_out, delta, count, D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr):
    """delta of rows that lie next to each other."""
    start = tl.program_id(0).to(tl.int64) * OWN
    o = _load_rows(out, start, count, D, OWN, D, BLOCK_D, True).to(tl.float32)
    g = _load_rows(grad_out, start, count, D, OWN, D, BLOCK_D, True).to(tl.float32)
    row = start + tl.arange(0, OWN)
    tl.store(delta + row, tl.sum(o * g, 1), mask=row < count)


def _slots(branch: Branch) -> int:
    """How many neighbouring heads have the same offset: head g has (g // n) % r."""
    n = next((g for g, offset in enumerate(branch.offsets) if offset), len(branch.offsets)) or 1
    if branch.offsets != tuple(g // n % branch.r for g in range(len(branch.offsets))):
        raise ValueError(f"head offsets {branch.offsets} at rate {branch.r} are neither interleaved nor blocked.")
    return n


def _segments(chunk: Chunk, branch: Branch, which: str) -> tuple[int, int, int, int]:
    """Segments that a launch works on: how many, the first; most rows of one in the chunk, most keys for them."""
    w, r, _ = branch
    phase = chunk.start % w
    count = -(-(phase + chunk.length) // w)
    rows = -(-min(w, chunk.length) // r)
    if which == "own":
        return count, 0, rows, rows
    if which == "before":
        return 1, 0, rows, -(-phase // r)
    end = chunk.start + chunk.length
    return 1, count - 1, rows, -(-(min(-(-end // w) * w, chunk.total) - end) // r)


def _geometry(chunk: Chunk, branch: Branch) -> tuple[int, ...]:
    """w, r, heads_per_offset, phase, length, left, row and column, as the kernels take them."""
    w, r, _ = branch
    place = chunk.start % w, chunk.length, chunk.total - chunk.start, chunk.row_begin, chunk.column_begin
    return w, r, _slots(branch), *place


def _on(device: torch.device):
    """Triton launches on the current device, which is changed where it is another."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@lru_cache
def _can_overlap(device: torch.device) -> bool:
    """Programmatic dependent launch: a kernel may begin before the one before it has ended, and wait within."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class _Layout(NamedTuple):
    """What a launch depends on of its tensors, but for where they begin."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    length: int
    heads: int
    groups: int
    dim: int
    query: tuple[int, ...]  # strides
    key: tuple[int, ...]
    value: tuple[int, ...]
    grad_key: tuple[int, ...]  # of grad_value too

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, *others: Tensor, grad_key: Tensor | None = None):
        _, length, heads, dim = query.shape
        strides = query.stride(), key.stride(), value.stride(), () if grad_key is None else grad_key.stride()
        dtypes = tuple([x.dtype for x in (query, key, value, *others)])
        return cls(query.device, dtypes, length, heads, key.shape[2], dim, *strides)

    def numbers(self) -> tuple[int, ...]:
        """Strides of q, k, v and of out's batch, as the kernels take them."""
        return *self.query[:3], *self.key[:3], *self.value[:3], self.length * self.heads

    def is_wide(self, branch: Branch, rows: int) -> bool:
        """Do the rows of a block lie further apart than 32 bits count?"""
        token = max(self.query[1], self.key[1], self.value[1], self.heads * self.dim)
        return min(rows, _LARGEST_BLOCK) * branch.r * token >= _NARROW

    def constants(self, blocks: Blocks, overlaps: bool) -> dict[str, object]:
        overlapping = _can_overlap(self.device)
        options = {"launch_pdl": overlaps} if overlapping else {}
        precision = "tf32x3" if self.dtypes[0] == torch.float32 else "tf32"  # the second is not read in half precision
        return options | {
            "D": self.dim,
            "BLOCK_D": _padded_dim(self.dim),
            "OWN": blocks.own,
            "OTHER": blocks.other,
            "PRECISION": precision,
            "OVERLAPS": overlapping,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }


@cache
def _kept(kernel, device: torch.device, dtypes: tuple, kinds: tuple, constants: tuple) -> list:
    """The place where launches for which Triton compiles one kernel keep it: the same list for all, empty at first."""
    return []


def _kind(name: str, number: int | float) -> object:
    """What Triton looks at in a number: its width and, unless it is one of `_NUMBERS`, whether it is 1, or k * 16."""
    if isinstance(number, float):
        return float
    width = number < _NARROW
    return width if name in _NUMBERS else (width, number == 1, number % 16 == 0)


class _Launch:
    """A kernel and all its arguments but the tensors.

    On its way to what it compiled, Triton looks at every argument anew, which takes longer than the launch. So the
    compiled kernel is kept, for tensors that all begin at multiples of 16 bytes; others take Triton's way each time.
    What Triton does on that way only (hooks before a run, its debugging switches) is not done for the rest.
    """

    def __init__(
        self, kernel, programs: int, numbers: tuple, constants: dict[str, object], device: torch.device, dtypes: tuple
    ):  # fmt: skip
        self.kernel, self.grid, self.numbers, self.device = kernel, (programs, 1, 1), numbers, device
        # a * b + c is rounded once: Triton's default up to 3.9 and not from 3.10 on (no environment variable is asked).
        self.constants = constants | {"enable_fp_fusion": True}
        names = kernel.arg_names[len(dtypes) :]
        kinds = tuple(map(_kind, names, numbers))
        self.constexprs = tuple([constants[name] for name in names[len(numbers) :]])
        self.kept = _kept(kernel, device, dtypes, kinds, tuple(self.constants.items()))

    def __call__(self, *tensors: Tensor) -> None:
        is_aligned = not any(x.data_ptr() % 16 for x in tensors)
        with _on(self.device):
            if is_aligned and self.kept:
                self.kept[0][self.grid](*tensors, *self.numbers, *self.constexprs)
                return
            compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        if is_aligned and isinstance(compiled, CompiledKernel):  # not from the interpreter
            self.kept.append(compiled)


@lru_cache(maxsize=4096)
def _forward_launch(
    layout: _Layout, chunk: Chunk, branch: Branch, which: str, is_causal: bool, is_first: bool, scale: float,
    zero_padding: bool, overlaps: bool,
) -> _Launch | None:  # fmt: skip
    batches, heads = chunk.row_end - chunk.row_begin, layout.heads
    segments, first, rows, keys = _segments(chunk, branch, which)
    if not keys:
        return None
    blocks, own = forward_blocks(layout.dtypes[0], layout.dim), which == "own"
    programs = -(-rows // blocks.own)
    numbers = (
        *layout.numbers(), heads, heads // layout.groups, programs, segments, first, *_geometry(chunk, branch),
        -(-min(branch.w, chunk.total) // branch.r), scale * math.log2(math.e),
    )  # fmt: skip
    constants = {
        "WHICH": which,
        "IS_CAUSAL": is_causal and own,
        "IS_FIRST": is_first,
        "ZERO_PADDING": zero_padding and own,
        "WIDE": layout.is_wide(branch, rows),
    } | layout.constants(blocks, overlaps)
    programs *= heads * segments * batches
    return _Launch(_forward_kernel, programs, numbers, constants, layout.device, layout.dtypes)


@lru_cache(maxsize=4096)
def _backward_launches(
    layout: _Layout, chunk: Chunk, branch: Branch, which: str, is_causal: bool, is_first: bool, scale: float,
    overlaps: bool,
) -> tuple[_Launch, _Launch] | None:  # fmt: skip
    batches, heads, groups = chunk.row_end - chunk.row_begin, layout.heads, layout.groups
    segments, first, rows, keys = _segments(chunk, branch, which)
    if not keys:
        return None
    *inputs, grad_query, grad_key, grad_value = layout.dtypes
    of_keys, of_queries = backward_blocks(layout.dtypes[0], layout.dim)
    place = segments, first, *_geometry(chunk, branch), scale * math.log2(math.e)
    constants = {
        "WHICH": which,
        "IS_CAUSAL": is_causal and which == "own",
        "IS_FIRST": is_first,
        "WIDE": layout.is_wide(branch, rows),
    }
    programs = -(-keys // of_keys.own)
    keys_launch = _Launch(
        _backward_keys_kernel, programs * groups * segments * batches,
        (*layout.numbers(), *layout.grad_key[:3], heads, programs, *place),
        constants | {"HEADS_PER_GROUP": heads // groups} | layout.constants(of_keys, overlaps), layout.device,
        (*inputs, grad_key, grad_value),
    )  # fmt: skip
    programs = -(-rows // of_queries.own)
    queries_launch = _Launch(
        _backward_queries_kernel, programs * heads * segments * batches,
        (*layout.numbers(), heads, heads // groups, programs, *place),
        constants | layout.constants(of_queries, True), layout.device,
        (*inputs, grad_query),
    )  # fmt: skip
    return keys_launch, queries_launch


@lru_cache(maxsize=4096)
def _delta_launch(device: torch.device, dtypes: tuple[torch.dtype, ...], count: int, dim: int) -> _Launch:
    constants = {"D": dim, "BLOCK_D": _padded_dim(dim), "OWN": 32}
    return _Launch(_delta_kernel, -(-count // 32), (count,), constants, device, dtypes)


def forward_(
    out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, branch: Branch, *,
    which: str = "own", is_causal: bool, is_first: bool = False, scale: float, zero_padding: bool = False,
    overlaps: bool = False,
) -> None:  # fmt: skip
    """Merge a chunk's attention in one branch into out and lse, in place.

    Args:
        out: (B, L, H, D), contiguous; 0 where lse is -inf. lse: (B, L, H) float32, contiguous.
        query: (B, L, H, D). key, value: (B, L, G, D) for `which` "own", (B, P, G, D) for the rows "before" or "after"
            the chunk in the segments that it cuts; any strides with D contiguous.
        is_first: write, as nothing was there before. zero_padding: as in `attend_chunks`.
        overlaps: the launch before on this stream was of these kernels, with the same query, key and value, which so
            are there already: this one may begin before that one ends.
    """
    tensors = query, key, value, out, lse
    layout = _Layout.of(*tensors)
    launch = _forward_launch(layout, chunk, branch, which, is_causal, is_first, scale, zero_padding, overlaps)
    if launch is not None:
        launch(*tensors)


def sum_products(out: Tensor, grad_out: Tensor) -> Tensor:
    """The sum of out * grad_out over a head's elements: (B, L, H, D) twice, contiguous -> (B, L, H) float32."""
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    if delta.numel():
        _delta_launch(out.device, (out.dtype, grad_out.dtype, delta.dtype), delta.numel(), out.shape[-1])(
            out, grad_out, delta
        )
    return delta


def backward_(
    grads: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor,
    delta: Tensor, chunk: Chunk, branch: Branch, *,
    which: str = "own", is_causal: bool, is_first: bool = False, scale: float, overlaps: bool = False,
) -> None:  # fmt: skip
    """Add the gradients of `forward_` to those of q, k, v, in place, or write them; exact with the merged lse.

    Args:
        grads: like query, key and value, contiguous, those of key and value with the same strides.
        grad_out: (B, L, H, D), contiguous. lse: the merged one. delta: `sum_products` of the merged out.
    """
    grad_query, grad_key, grad_value = grads
    inputs = query, key, value, grad_out, lse, delta
    layout = _Layout.of(*inputs, *grads, grad_key=grad_key)
    launches = _backward_launches(layout, chunk, branch, which, is_causal, is_first, scale, overlaps)
    if launches is not None:
        of_keys, of_queries = launches
        of_keys(*inputs, grad_key, grad_value)
        of_queries(*inputs, grad_query)
