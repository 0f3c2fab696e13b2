"""Dilated attention as Triton kernels: FlashAttention-2 (arXiv 2307.08691) on the kept tokens of one branch, in place.

A program takes one block of one head in one segment. It reads kept tokens by pointer arithmetic, attends, and merges
the result into the running (out, lse), so nothing is stored per branch. Sums are taken in float32. No two programs
add to the same address, so results are deterministic.

Symbols:
    w, r, offset          segment length and dilation rate of the branch, offset of a head (LongNet, Eq. 4-8, 13)
    phase                 position of the chunk's first token in its segment
    out, lse              output and logsumexp of a query, merged over branches (LongNet, Eq. 9-10)
    m_i, l_i, acc         running max, running sum and unnormalized output of a query (FlashAttention-2, Algorithm 1)
    p, dp, ds, delta      P, dP, dS and D of FlashAttention-2, Algorithm 2; dq, dk, dv, do: gradients of q, k, v, out
    BLOCK_M, BLOCK_N      queries and keys of a block; start_m, start_n: its first, offs_m, offs_n: all of them
    BLOCK_D               head dimension D rounded up to a power of 2
    KEYS                  "chunk" for the chunk's own keys, "prefix" or "suffix" for those before or after it
    seqlen_q, seqlen_k    kept tokens of a head in a segment: queries in the chunk, keys that they attend to
    stride_qb, _qt, _qh   strides of q's batch rows, tokens and heads; likewise of k, v, dk (and dv); stride_lb of lse's
                          batch rows (lse, delta, out and do are contiguous)
    token_stride          tokens from one kept token of the chunk to the next: r, in 64 bits if WIDE
    stride_kn, stride_vn  strides of kept keys and values: token_stride tokens in the chunk, one slot outside it
    base, offs_lse        index in lse of a segment's first query, and of a block's queries
    scale_log2            scale * log2(e): the softmax is computed with exp2
    OVERLAPS              programmatic dependent launch: start before the previous launch ends, then wait for it
"""

import math
from functools import partial
from types import SimpleNamespace

from .compat import gdc_launch_dependents, gdc_wait

try:
    import triton
    import triton.language as tl
except ImportError as error:
    TRITON_ERROR, tl = str(error), SimpleNamespace(constexpr=float)  # `tl` as used outside of function bodies

    def _jit(function, **options):
        return function
else:
    TRITON_ERROR = None
    _jit = triton.jit

_LOG2_E = tl.constexpr(math.log2(math.e))
# Arguments that differ between sequences: Triton compiles no variants for values of 1 or multiples of 16.
_NUMBERS = (
    "stride_lb num_blocks num_segments first_segment w heads_per_offset phase length remaining batch_begin "
    "column_begin padded_seqlen count"
)
_kernel = partial(_jit, do_not_specialize=_NUMBERS.split())


@_jit
def _program_tokens(
    num_blocks, heads, heads_per_kv, num_segments, first_segment, w, r, heads_per_offset, phase, length, remaining,
    batch_begin, column_begin,
):  # fmt: skip
    """Return what a program works on: block, head, key/value head, batch row, and the head's tokens in the segment.

    These are the column of the first kept token in the chunk, and the numbers of kept tokens in the chunk, before it
    and after it. `length` and `remaining` count from the start of the chunk to its end and to that of the sequence.
    Neighbouring programs take the blocks of one head, then those of the next head of the segment.
    """
    block, rest = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    head, rest = rest % heads, rest // heads
    segment, batch = first_segment + rest % num_segments, batch_begin + tl.cast(rest // num_segments, tl.int64)
    kv_head = head // heads_per_kv
    offset = (kv_head // heads_per_offset) % r
    begin = tl.cast(segment, tl.int64) * w - phase
    first = (tl.maximum(-begin, 0) - offset + r - 1) // r
    end = (tl.minimum(w, length - begin) - offset + r - 1) // r
    last = (tl.minimum(w, remaining - begin) - offset + r - 1) // r
    seqlen, prefix, suffix = end - first, first, last - end
    token = column_begin + begin + offset + first * r
    return block, head, kv_head, batch, token, seqlen.to(tl.int32), prefix.to(tl.int32), suffix.to(tl.int32)


@_jit
def _key_pointers(
    k_ptr, stride_kb, stride_kt, stride_kh, v_ptr, stride_vb, stride_vt, stride_vh,
    batch, kv_head, token, token_stride, seqlen_q, prefix, suffix, KEYS: tl.constexpr,
):  # fmt: skip
    """Return pointers to the first key and value that a segment's queries attend to, their strides, and seqlen_k."""
    k_ptr += batch * stride_kb + tl.cast(kv_head, tl.int64) * stride_kh
    if KEYS == "chunk":
        k_ptr, stride_kt = k_ptr + token * stride_kt, stride_kt * token_stride
    v_ptr += batch * stride_vb + tl.cast(kv_head, tl.int64) * stride_vh
    if KEYS == "chunk":
        v_ptr, stride_vt = v_ptr + token * stride_vt, stride_vt * token_stride
    seqlen_k = seqlen_q if KEYS == "chunk" else prefix if KEYS == "prefix" else suffix
    return k_ptr, stride_kt, v_ptr, stride_vt, seqlen_k


@_jit
def _load_block(
    ptr, start, seqlen, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Load tokens start to start + BLOCK - 1 as (BLOCK, BLOCK_D); 0 from `seqlen` (if MASKED) and from D on."""
    offs, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    # 32-bit offsets within a block take half the registers; `stride` has 64 bits if they overflow (WIDE).
    ptrs = (ptr + tl.cast(start, tl.int64) * stride) + (offs[:, None] * stride + offs_d[None, :])
    if MASKED:
        if D < BLOCK_D:
            return tl.load(ptrs, mask=(offs < seqlen - start)[:, None] & (offs_d < D)[None, :], other=0.0)
        return tl.load(ptrs, mask=(offs < seqlen - start)[:, None], other=0.0)
    if D < BLOCK_D:
        return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    return tl.load(ptrs)


@_jit
def _add_block(ptr, x, offs, seqlen, stride, IS_FIRST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add a (BLOCK, BLOCK_D) gradient to memory; write it if IS_FIRST."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs[:, None].to(tl.int64) * stride + offs_d[None, :]
    mask = (offs < seqlen)[:, None] & (offs_d < D)[None, :]
    if not IS_FIRST:
        x += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@_kernel
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_lb,
    heads, heads_per_kv, num_blocks, num_segments, first_segment, w, r, heads_per_offset, phase, length, remaining,
    batch_begin, column_begin, padded_seqlen, scale_log2,
    KEYS: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_FIRST: tl.constexpr, ZERO_PADDING: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attend with a block of queries of one head and segment, and merge into out and lse (LongNet, Eq. 9-10)."""
    token_stride = tl.cast(r, tl.int64) if WIDE else r
    if OVERLAPS:
        gdc_launch_dependents()  # the next branch may start on multiprocessors that this one leaves idle
    block, head, kv_head, batch, token, seqlen_q, prefix, suffix = _program_tokens(
        num_blocks, heads, heads_per_kv, num_segments, first_segment, w, r, heads_per_offset, phase, length,
        remaining, batch_begin, column_begin,
    )  # fmt: skip
    block = num_blocks - 1 - block  # the last queries attend to most keys and start first
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k_ptr, stride_kn, v_ptr, stride_vn, seqlen_k = _key_pointers(
        k_ptr, stride_kb, stride_kt, stride_kh, v_ptr, stride_vb, stride_vt, stride_vh,
        batch, kv_head, token, token_stride, seqlen_q, prefix, suffix, KEYS,
    )  # fmt: skip
    if (block * BLOCK_M >= seqlen_q) | (seqlen_k == 0):
        if OVERLAPS:
            gdc_wait()  # wait even with no work: the next launch waits only for this one
        return
    q_ptr += batch * stride_qb + token * stride_qt + tl.cast(head, tl.int64) * stride_qh
    q = _load_block(q_ptr, block * BLOCK_M, seqlen_q, stride_qt * token_stride, BLOCK_M, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i, m_i = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], -float("inf"), tl.float32)
    end_n = tl.minimum(seqlen_k, (block + 1) * BLOCK_M) if IS_CAUSAL else seqlen_k
    unmasked_n = (tl.minimum(seqlen_k, block * BLOCK_M) if IS_CAUSAL else seqlen_k) // BLOCK_N * BLOCK_N
    # Blocks without a mask first, then the diagonal and the last block.
    for MASKED in tl.static_range(2):
        for start_n in range(unmasked_n if MASKED else 0, end_n if MASKED else unmasked_n, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = _load_block(k_ptr, start_n, seqlen_k, stride_kn, BLOCK_N, D, BLOCK_D, MASKED)
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if MASKED:
                mask = (offs_n < seqlen_k)[None, :]
                if IS_CAUSAL:
                    mask = mask & (offs_n[None, :] <= offs_m[:, None])
                qk = tl.where(mask, qk, -float("inf"))
            m_new = tl.maximum(m_i, tl.max(qk, 1) * scale_log2)
            p = tl.exp2(qk * scale_log2 - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(p, 1)
            v = _load_block(v_ptr, start_n, seqlen_k, stride_vn, BLOCK_N, D, BLOCK_D, MASKED)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
            m_i = m_new
    if ZERO_PADDING:
        num_zeros = padded_seqlen - seqlen_q - prefix - suffix  # keys with score 0 and value 0
        m_new = tl.where(num_zeros > 0, tl.maximum(m_i, 0.0), m_i)
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + num_zeros * tl.exp2(-tl.maximum(m_new, 0.0))
        acc, m_i = acc * alpha[:, None], m_new
    out = acc / l_i[:, None]
    lse = (m_i + tl.log2(l_i)) / _LOG2_E
    offs_d = tl.arange(0, BLOCK_D)
    offs_lse = batch * stride_lb + token * heads + head + offs_m.to(tl.int64) * (token_stride * heads)
    out_ptrs = out_ptr + offs_lse[:, None] * D + offs_d[None, :]
    mask = (offs_m < seqlen_q)[:, None] & (offs_d < D)[None, :]
    if OVERLAPS:
        gdc_wait()  # for the previous branch: its out and lse are merged with these
    if not IS_FIRST:
        old_lse = tl.load(lse_ptr + offs_lse, mask=offs_m < seqlen_q, other=0.0)
        old_out = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
        out = old_out + (out - old_out) / (1 + tl.exp(old_lse - lse))[:, None]
        m = tl.maximum(lse, old_lse)
        lse = m + tl.log(tl.exp(lse - m) + tl.exp(old_lse - m))
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + offs_lse, lse, mask=offs_m < seqlen_q)


@_kernel
def delta_kernel(out_ptr, do_ptr, delta_ptr, count, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Compute delta = rowsum(out * do) of `count` contiguous rows of D elements."""
    start_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    out = _load_block(out_ptr, start_m, count, D, BLOCK_M, D, BLOCK_D, True).to(tl.float32)
    do = _load_block(do_ptr, start_m, count, D, BLOCK_M, D, BLOCK_D, True).to(tl.float32)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + offs_m, tl.sum(out * do, 1), mask=offs_m < count)


@_kernel
def backward_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_lb,
    stride_dkb, stride_dkt, stride_dkh, heads, num_blocks, num_segments, first_segment, w, r, heads_per_offset, phase,
    length, remaining, batch_begin, column_begin, scale_log2,
    KEYS: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_FIRST: tl.constexpr, HEADS_PER_KV: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add the gradients of a block of keys and values of one head and segment: exact given the merged lse and delta."""
    token_stride = tl.cast(r, tl.int64) if WIDE else r
    if OVERLAPS:
        gdc_launch_dependents()
    # Unlike queries, the first keys start first: most queries attend to them.
    block, kv_head, _, batch, token, seqlen_q, prefix, suffix = _program_tokens(
        num_blocks, heads // HEADS_PER_KV, 1, num_segments, first_segment, w, r, heads_per_offset, phase, length,
        remaining, batch_begin, column_begin,
    )  # fmt: skip
    k_ptr, stride_kn, v_ptr, stride_vn, seqlen_k = _key_pointers(
        k_ptr, stride_kb, stride_kt, stride_kh, v_ptr, stride_vb, stride_vt, stride_vh,
        batch, kv_head, token, token_stride, seqlen_q, prefix, suffix, KEYS,
    )  # fmt: skip
    if (block * BLOCK_N >= seqlen_k) | (seqlen_q == 0):
        if OVERLAPS:
            gdc_wait()
        return
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _load_block(k_ptr, block * BLOCK_N, seqlen_k, stride_kn, BLOCK_N, D, BLOCK_D, True)
    v = _load_block(v_ptr, block * BLOCK_N, seqlen_k, stride_vn, BLOCK_N, D, BLOCK_D, True)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # One loop, masked throughout: with a second loop for the diagonal, ptxas serializes the products (C7515).
    begin_m = block * BLOCK_N // BLOCK_M * BLOCK_M if IS_CAUSAL else 0
    for n in range(HEADS_PER_KV):
        head = kv_head * HEADS_PER_KV + n
        head_ptr = q_ptr + batch * stride_qb + token * stride_qt + tl.cast(head, tl.int64) * stride_qh
        base = batch * stride_lb + token * heads + head
        for start_m in range(begin_m, seqlen_q, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            q = _load_block(head_ptr, start_m, seqlen_q, stride_qt * token_stride, BLOCK_M, D, BLOCK_D, True)
            do = _load_block(do_ptr + base * D, start_m, seqlen_q, token_stride * heads * D, BLOCK_M, D, BLOCK_D, True)
            offs_lse = base + tl.cast(start_m, tl.int64) * (token_stride * heads)
            offs_lse += tl.arange(0, BLOCK_M) * (token_stride * heads)
            lse = tl.load(lse_ptr + offs_lse, mask=offs_m < seqlen_q, other=float("inf")) * _LOG2_E
            delta = tl.load(delta_ptr + offs_lse, mask=offs_m < seqlen_q, other=0.0)
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = tl.exp2(qk * scale_log2 - lse[:, None])
            if IS_CAUSAL:
                if start_m < (block + 1) * BLOCK_N:
                    p = tl.where(offs_n[None, :] <= offs_m[:, None], p, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    dk *= scale_log2 / _LOG2_E
    dk_ptr, stride_dkn, dv_ptr, _, _ = _key_pointers(
        dk_ptr, stride_dkb, stride_dkt, stride_dkh, dv_ptr, stride_dkb, stride_dkt, stride_dkh,
        batch, kv_head, token, token_stride, seqlen_q, prefix, suffix, KEYS,
    )  # fmt: skip
    if OVERLAPS:
        gdc_wait()
    _add_block(dk_ptr, dk, offs_n, seqlen_k, stride_dkn, IS_FIRST, D, BLOCK_D)
    _add_block(dv_ptr, dv, offs_n, seqlen_k, stride_dkn, IS_FIRST, D, BLOCK_D)


@_kernel
def backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_lb,
    heads, heads_per_kv, num_blocks, num_segments, first_segment, w, r, heads_per_offset, phase, length, remaining,
    batch_begin, column_begin, scale_log2,
    KEYS: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_FIRST: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add the gradients of a block of queries of one head and segment."""
    token_stride = tl.cast(r, tl.int64) if WIDE else r
    if OVERLAPS:
        gdc_launch_dependents()
    block, head, kv_head, batch, token, seqlen_q, prefix, suffix = _program_tokens(
        num_blocks, heads, heads_per_kv, num_segments, first_segment, w, r, heads_per_offset, phase, length,
        remaining, batch_begin, column_begin,
    )  # fmt: skip
    block = num_blocks - 1 - block  # the last queries attend to most keys and start first
    k_ptr, stride_kn, v_ptr, stride_vn, seqlen_k = _key_pointers(
        k_ptr, stride_kb, stride_kt, stride_kh, v_ptr, stride_vb, stride_vt, stride_vh,
        batch, kv_head, token, token_stride, seqlen_q, prefix, suffix, KEYS,
    )  # fmt: skip
    if (block * BLOCK_M >= seqlen_q) | (seqlen_k == 0):
        if OVERLAPS:
            gdc_wait()
        return
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    base = batch * stride_lb + token * heads + head
    q_ptr += batch * stride_qb + token * stride_qt + tl.cast(head, tl.int64) * stride_qh
    q = _load_block(q_ptr, block * BLOCK_M, seqlen_q, stride_qt * token_stride, BLOCK_M, D, BLOCK_D, True)
    do = _load_block(do_ptr + base * D, block * BLOCK_M, seqlen_q, token_stride * heads * D, BLOCK_M, D, BLOCK_D, True)
    offs_lse = base + offs_m.to(tl.int64) * (token_stride * heads)
    lse = tl.load(lse_ptr + offs_lse, mask=offs_m < seqlen_q, other=float("inf")) * _LOG2_E
    delta = tl.load(delta_ptr + offs_lse, mask=offs_m < seqlen_q, other=0.0)
    end_n = tl.minimum(seqlen_k, (block + 1) * BLOCK_M) if IS_CAUSAL else seqlen_k
    unmasked_n = (tl.minimum(seqlen_k, block * BLOCK_M) if IS_CAUSAL else seqlen_k) // BLOCK_N * BLOCK_N
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(2):
        for start_n in range(unmasked_n if MASKED else 0, end_n if MASKED else unmasked_n, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = _load_block(k_ptr, start_n, seqlen_k, stride_kn, BLOCK_N, D, BLOCK_D, MASKED)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
            if MASKED:
                mask = (offs_n < seqlen_k)[None, :]
                if IS_CAUSAL:
                    mask = mask & (offs_n[None, :] <= offs_m[:, None])
                p = tl.where(mask, p, 0.0)
            v = _load_block(v_ptr, start_n, seqlen_k, stride_vn, BLOCK_N, D, BLOCK_D, MASKED)
            ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq *= scale_log2 / _LOG2_E
    if OVERLAPS:
        gdc_wait()
    _add_block(dq_ptr + base * D, dq, offs_m, seqlen_q, token_stride * heads * D, IS_FIRST, D, BLOCK_D)
