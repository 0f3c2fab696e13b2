"""Dilated attention as Triton kernels: FlashAttention-2 (arXiv 2307.08691) on the kept tokens of one branch, in place.

A program takes one block of one head in one segment. It reads kept tokens by pointer arithmetic, attends, and merges
the result into the running (out, lse), so nothing is stored per branch. Sums are taken in float32. No two programs
add to the same address, so results are deterministic.

Symbols:
    w, r, offset          segment length and dilation rate of the branch, offset of a head (LongNet, Eq. 4-8, 13)
    phase, ghost          place of the chunk's first token in its segment; leading places of the first segment that lie
                          before the sequence. A window is one segment: its prefix, the chunk and its suffix
    RESIDUES              places modulo r at which a head keeps queries; one program takes queries of one of them
    out, lse              output and logsumexp of a query, merged over branches (LongNet, Eq. 9-10)
    m_i, l_i, acc         running max, running sum and unnormalized output of a query (FlashAttention-2, Algorithm 1)
    p, dp, ds, delta      P, dP, dS and D of FlashAttention-2, Algorithm 2; dq, dk, dv, do: gradients of q, k, v, out
    BLOCK_M, BLOCK_N      queries and keys of a block; start_m, start_n: its first, offs_m, offs_n: all of them
    BLOCK_D               head dimension D rounded up to a power of 2
    KEYS                  "chunk" for the chunk's own keys, "prefix" or "suffix" for those before or after it
    VISIBLE               which of a segment's keys a query sees: "all"; "causal": up to its own; "shifted": at least
                          `gap` tokens before it; "segments": of those, the keys before its inner segment of `span`
                          tokens; "window": from span - 1 to `gap` tokens before it (gap below 0: after it)
    query, key            token of a segment's first query and first key, counted from the start of the chunk
    diagonal, lower       query i of a segment sees keys i + lower (in a window) to i + diagonal, by row
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
    "stride_lb num_blocks num_segments first_segment w phase ghost length remaining gap span span_shift batch_begin "
    "column_begin padded_seqlen count"
)
_kernel = partial(_jit, do_not_specialize=_NUMBERS.split())


@_jit
def _program(num_blocks, rows, num_segments, first_segment, batch_begin):
    """Return what a program works on: block, head or residue of a head (one of `rows`), segment, batch row.

    Neighbouring programs take the blocks of one head, then those of the next head of the segment.
    """
    block, rest = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    row, rest = rest % rows, rest // rows
    return block, row, first_segment + rest % num_segments, batch_begin + tl.cast(rest // num_segments, tl.int64)


@_jit
def _kept_tokens(offsets_ptr, row, segment, w, r, phase, ghost, length, remaining):
    """Return the first of a head's kept tokens in the chunk, and their numbers in the chunk, before it and after it.

    Tokens, `length` and `remaining` count from the start of the chunk: to a token, its end and that of the sequence.
    """
    offset = 0
    if offsets_ptr is not None:
        offset = tl.load(offsets_ptr + row)
    begin = tl.cast(segment, tl.int64) * w - phase
    missing = (tl.where(segment == 0, ghost, 0) - offset + r - 1) // r
    first = (tl.maximum(-begin, 0) - offset + r - 1) // r
    end = (tl.minimum(w, length - begin) - offset + r - 1) // r
    last = (tl.minimum(w, remaining - begin) - offset + r - 1) // r
    seqlen, prefix, suffix = end - first, first - missing, last - end
    return begin + offset + first * r, seqlen.to(tl.int32), prefix.to(tl.int32), suffix.to(tl.int32)


@_jit
def _first_key(token, seqlen, prefix, r, KEYS: tl.constexpr):
    """Return the first key's token, given that of the first one in the chunk."""
    if KEYS == "prefix":
        token -= tl.cast(prefix, tl.int64) * r
    if KEYS == "suffix":
        token += tl.cast(seqlen, tl.int64) * r
    return token


@_jit
def _rows_between(tokens, r):
    """Return floor(tokens / r), clamped to +-2^30, as int32."""
    rows = (tokens - (tokens % r + r) % r) // r
    return tl.minimum(tl.maximum(rows, -(1 << 30)), 1 << 30).to(tl.int32)


@_jit
def _diagonals(query, key, r, gap, span, VISIBLE: tl.constexpr):
    """Return diagonal and lower."""
    if VISIBLE == "all" or VISIBLE == "causal":
        return 0, 0
    lower = 0
    if VISIBLE == "window":
        lower = _rows_between(query - key - span + 1, r)
    return _rows_between(query - key - gap, r), lower


@_jit
def _last_keys(rows, diagonal, query, key, r, span, span_shift, VISIBLE: tl.constexpr):
    """Return the last key that each query of `rows` sees; it may be negative or lie beyond the last one."""
    last = rows + diagonal
    if VISIBLE == "segments":
        token = query + tl.cast(rows, tl.int64) * r
        border = token - (token + span_shift) % span
        last = tl.minimum(last, (tl.maximum(border - key, 0) + r - 1) // r - 1).to(tl.int32)
    return last


@_jit
def _first_queries(rows, diagonal, query, key, r, span, span_shift, VISIBLE: tl.constexpr):
    """Return the first query that sees each key of `rows`; it may be negative or lie beyond the last one."""
    first = rows - diagonal
    if VISIBLE == "segments":
        token = key + tl.cast(rows, tl.int64) * r
        border = token - (token + span_shift) % span + span
        distance = (tl.maximum(border - query, 0) + r - 1) // r
        first = tl.maximum(first, tl.minimum(distance, 1 << 30).to(tl.int32))
    return first


@_jit
def _key_range(
    start_m, seqlen_q, seqlen_k, diagonal, lower, query, key, r, span, span_shift,
    VISIBLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return begin_n, end_n, full_n and all_n. A block of queries sees no key outside [begin_n, end_n).

    Each of its queries sees all keys in [full_n, all_n). All but end_n are multiples of BLOCK_N.
    """
    if VISIBLE == "all":
        return 0, seqlen_k, 0, seqlen_k // BLOCK_N * BLOCK_N
    if VISIBLE == "causal":
        return 0, tl.minimum(seqlen_k, start_m + BLOCK_M), 0, tl.minimum(seqlen_k, start_m) // BLOCK_N * BLOCK_N
    last_m = start_m + BLOCK_M - 1
    if VISIBLE == "segments":
        last_m = tl.minimum(last_m, seqlen_q - 1)
    all_n = tl.minimum(seqlen_k, _last_keys(start_m, diagonal, query, key, r, span, span_shift, VISIBLE) + 1)
    end_n = tl.minimum(seqlen_k, _last_keys(last_m, diagonal, query, key, r, span, span_shift, VISIBLE) + 1)
    all_n = tl.maximum(all_n, 0) // BLOCK_N * BLOCK_N
    if VISIBLE != "window":
        return 0, end_n, 0, all_n
    begin_n = tl.maximum(start_m + lower, 0) // BLOCK_N * BLOCK_N
    all_n = tl.maximum(all_n, begin_n)
    full_n = (tl.maximum(last_m + lower, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    return begin_n, end_n, tl.minimum(full_n, all_n), all_n


@_jit
def _is_seen(offs_m, offs_n, seqlen_k, last_n, lower, VISIBLE: tl.constexpr):
    """Return which keys of a block each query sees, as (BLOCK_M, BLOCK_N)."""
    mask = (offs_n < seqlen_k)[None, :]
    if VISIBLE != "all":
        mask = mask & (offs_n[None, :] <= last_n[:, None])
    if VISIBLE == "window":
        mask = mask & (offs_n[None, :] >= (offs_m + lower)[:, None])
    return mask


@_jit
def _key_pointers(
    k_ptr, stride_kb, stride_kt, stride_kh, v_ptr, stride_vb, stride_vt, stride_vh,
    batch, kv_head, token, token_stride, seqlen, prefix, suffix, KEYS: tl.constexpr,
):  # fmt: skip
    """Return pointers to the first key and value that a segment's queries attend to, their strides, and seqlen_k.

    `token` is the column of the first key in the chunk, where there are `seqlen`.
    """
    k_ptr += batch * stride_kb + tl.cast(kv_head, tl.int64) * stride_kh
    if KEYS == "chunk":
        k_ptr, stride_kt = k_ptr + token * stride_kt, stride_kt * token_stride
    v_ptr += batch * stride_vb + tl.cast(kv_head, tl.int64) * stride_vh
    if KEYS == "chunk":
        v_ptr, stride_vt = v_ptr + token * stride_vt, stride_vt * token_stride
    seqlen_k = seqlen if KEYS == "chunk" else prefix if KEYS == "prefix" else suffix
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
    heads, heads_per_kv, num_blocks, num_segments, first_segment, key_offsets_ptr, query_offsets_ptr, w, r, phase,
    ghost, length, remaining, gap, span, span_shift, batch_begin, column_begin, padded_seqlen, scale_log2,
    KEYS: tl.constexpr, VISIBLE: tl.constexpr, RESIDUES: tl.constexpr, IS_FIRST: tl.constexpr,
    ZERO_PADDING: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attend with a block of queries of one head and segment, and merge into out and lse (LongNet, Eq. 9-10)."""
    MAY_SEE_NONE: tl.constexpr = VISIBLE != "all" and VISIBLE != "causal"
    token_stride = tl.cast(r, tl.int64) if WIDE else r
    if OVERLAPS:
        gdc_launch_dependents()  # the next branch may start on multiprocessors that this one leaves idle
    block, row, segment, batch = _program(num_blocks, heads * RESIDUES, num_segments, first_segment, batch_begin)
    start_m = (num_blocks - 1 - block) * BLOCK_M  # the last queries attend to most keys and start first
    head, kv_head = row // RESIDUES, row // RESIDUES // heads_per_kv
    key, own, prefix, suffix = _kept_tokens(
        key_offsets_ptr, kv_head, segment, w, r, phase, ghost, length, remaining
    )  # fmt: skip
    query, seqlen_q = key, own
    if query_offsets_ptr is not None:
        query, seqlen_q, _, _ = _kept_tokens(
            query_offsets_ptr, row, segment, w, r, phase, ghost, length, remaining
        )  # fmt: skip
    offs_m = start_m + tl.arange(0, BLOCK_M)
    k_ptr, stride_kn, v_ptr, stride_vn, seqlen_k = _key_pointers(
        k_ptr, stride_kb, stride_kt, stride_kh, v_ptr, stride_vb, stride_vt, stride_vh,
        batch, kv_head, column_begin + key, token_stride, own, prefix, suffix, KEYS,
    )  # fmt: skip
    key = _first_key(key, own, prefix, r, KEYS)
    diagonal, lower = _diagonals(query, key, r, gap, span, VISIBLE)
    is_idle = (start_m >= seqlen_q) | (seqlen_k <= 0)
    if MAY_SEE_NONE:
        seen_n, stop_n, _, _ = _key_range(
            start_m, seqlen_q, seqlen_k, diagonal, lower, query, key, r, span, span_shift, VISIBLE, BLOCK_M, BLOCK_N
        )  # fmt: skip
        is_idle = is_idle | (seen_n >= stop_n)
    if is_idle:
        if OVERLAPS:
            gdc_wait()  # wait even with no work: the next launch waits only for this one
        return
    # After the return: the compiler then knows that the diagonal is one block.
    begin_n, end_n, full_n, all_n = _key_range(
        start_m, seqlen_q, seqlen_k, diagonal, lower, query, key, r, span, span_shift, VISIBLE, BLOCK_M, BLOCK_N
    )  # fmt: skip
    token = column_begin + query
    q_ptr += batch * stride_qb + token * stride_qt + tl.cast(head, tl.int64) * stride_qh
    q = _load_block(q_ptr, start_m, seqlen_q, stride_qt * token_stride, BLOCK_M, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i, m_i = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], -float("inf"), tl.float32)
    last_n = _last_keys(offs_m, diagonal, query, key, r, span, span_shift, VISIBLE)
    # Causal: blocks without a mask first, then the diagonal, which is one block. Others: one loop, since with a second
    # one ptxas serializes the products (C7515).
    for MASKED in tl.static_range(0 if VISIBLE == "causal" else 1, 2):
        first_n = all_n if VISIBLE == "causal" and MASKED else begin_n
        for start_n in range(first_n, end_n if MASKED else all_n, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = _load_block(k_ptr, start_n, seqlen_k, stride_kn, BLOCK_N, D, BLOCK_D, MASKED)
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if MASKED:
                if VISIBLE == "causal":
                    mask = _is_seen(offs_m, offs_n, seqlen_k, last_n, lower, VISIBLE)
                    qk = tl.where(mask, qk, -float("inf"))
                elif (start_n < full_n) | (start_n >= all_n):
                    mask = _is_seen(offs_m, offs_n, seqlen_k, last_n, lower, VISIBLE)
                    qk = tl.where(mask, qk, -float("inf"))
            m_new = tl.maximum(m_i, tl.max(qk, 1) * scale_log2)
            shift = m_new
            if MAY_SEE_NONE:
                shift = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key yet: p and alpha are 0, not NaN
            p = tl.exp2(qk * scale_log2 - shift[:, None])
            alpha = tl.exp2(m_i - shift)
            l_i = l_i * alpha + tl.sum(p, 1)
            v = _load_block(v_ptr, start_n, seqlen_k, stride_vn, BLOCK_N, D, BLOCK_D, MASKED)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
            m_i = m_new
    if ZERO_PADDING:
        num_zeros = padded_seqlen - own - prefix - suffix  # keys with score 0 and value 0
        m_new = tl.where(num_zeros > 0, tl.maximum(m_i, 0.0), m_i)
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + num_zeros * tl.exp2(-tl.maximum(m_new, 0.0))
        acc, m_i = acc * alpha[:, None], m_new
    is_query = offs_m < seqlen_q
    if MAY_SEE_NONE:  # out stays 0 and lse -inf, or what other branches made of them
        is_query = is_query & (l_i > 0)
        l_i = tl.where(l_i > 0, l_i, 1.0)
    out = acc / l_i[:, None]
    lse = (m_i + tl.log2(l_i)) / _LOG2_E
    offs_d = tl.arange(0, BLOCK_D)
    offs_lse = batch * stride_lb + token * heads + head + offs_m.to(tl.int64) * (token_stride * heads)
    out_ptrs = out_ptr + offs_lse[:, None] * D + offs_d[None, :]
    mask = is_query[:, None] & (offs_d < D)[None, :]
    if OVERLAPS:
        gdc_wait()  # for the previous branch: its out and lse are merged with these
    if not IS_FIRST:
        old_lse = tl.load(lse_ptr + offs_lse, mask=is_query, other=0.0)
        old_out = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
        out = old_out + (out - old_out) / (1 + tl.exp(old_lse - lse))[:, None]
        m = tl.maximum(lse, old_lse)
        lse = m + tl.log(tl.exp(lse - m) + tl.exp(old_lse - m))
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + offs_lse, lse, mask=is_query)


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
    stride_dkb, stride_dkt, stride_dkh, heads, num_blocks, num_segments, first_segment, key_offsets_ptr,
    query_offsets_ptr, w, r, phase, ghost, length, remaining, gap, span, span_shift, batch_begin, column_begin,
    scale_log2,
    KEYS: tl.constexpr, VISIBLE: tl.constexpr, RESIDUES: tl.constexpr, IS_FIRST: tl.constexpr,
    HEADS_PER_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add the gradients of a block of keys and values of one head and segment: exact given the merged lse and delta."""
    token_stride = tl.cast(r, tl.int64) if WIDE else r
    if OVERLAPS:
        gdc_launch_dependents()
    # Unlike queries, the first keys start first: most queries attend to them.
    block, kv_head, segment, batch = _program(
        num_blocks, heads // HEADS_PER_KV, num_segments, first_segment, batch_begin
    )  # fmt: skip
    start_n = block * BLOCK_N
    own_key, own, prefix, suffix = _kept_tokens(
        key_offsets_ptr, kv_head, segment, w, r, phase, ghost, length, remaining
    )  # fmt: skip
    k_ptr, stride_kn, v_ptr, stride_vn, seqlen_k = _key_pointers(
        k_ptr, stride_kb, stride_kt, stride_kh, v_ptr, stride_vb, stride_vt, stride_vh,
        batch, kv_head, column_begin + own_key, token_stride, own, prefix, suffix, KEYS,
    )  # fmt: skip
    key = _first_key(own_key, own, prefix, r, KEYS)
    is_idle = start_n >= seqlen_k
    if query_offsets_ptr is None:
        is_idle = is_idle | (own <= 0)
    if VISIBLE == "shifted" or VISIBLE == "segments":  # the last token of the segment may see none of these keys
        token = tl.minimum(tl.cast(segment, tl.int64) * w - phase + w, length) - 1
        seen = token - gap
        if VISIBLE == "segments":
            seen = tl.minimum(seen, token - (token + span_shift) % span - 1)
        is_idle = is_idle | (key + tl.cast(start_n, tl.int64) * r > seen)
    if is_idle:
        if OVERLAPS:
            gdc_wait()
        return
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = _load_block(k_ptr, start_n, seqlen_k, stride_kn, BLOCK_N, D, BLOCK_D, True)
    v = _load_block(v_ptr, start_n, seqlen_k, stride_vn, BLOCK_N, D, BLOCK_D, True)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # One loop, masked throughout: with a second loop for the diagonal, ptxas serializes the products (C7515).
    for n in range(HEADS_PER_KV * RESIDUES):
        head = kv_head * HEADS_PER_KV + n // RESIDUES
        if query_offsets_ptr is None:
            query, seqlen_q = own_key, own
        else:
            row = kv_head * (HEADS_PER_KV * RESIDUES) + n
            query, seqlen_q, _, _ = _kept_tokens(
                query_offsets_ptr, row, segment, w, r, phase, ghost, length, remaining
            )  # fmt: skip
        diagonal, lower = _diagonals(query, key, r, gap, span, VISIBLE)
        begin_m, end_m = 0, seqlen_q
        if VISIBLE != "all":
            first_m = _first_queries(offs_n, diagonal, query, key, r, span, span_shift, VISIBLE)
            begin_m = _first_queries(start_n, diagonal, query, key, r, span, span_shift, VISIBLE)
            all_m = _first_queries(start_n + BLOCK_N, diagonal, query, key, r, span, span_shift, VISIBLE)
            begin_m = (begin_m if VISIBLE == "causal" else tl.maximum(begin_m, 0)) // BLOCK_M * BLOCK_M
        if VISIBLE == "window":
            end_m = tl.minimum(seqlen_q, start_n + BLOCK_N - lower)
        if VISIBLE != "all" and VISIBLE != "causal":
            end_m = tl.maximum(end_m, begin_m + 1)
            tl.assume(begin_m < end_m)  # if the loop might never run, ptxas serializes the products (C7515)
        token = column_begin + query
        head_ptr = q_ptr + batch * stride_qb + token * stride_qt + tl.cast(head, tl.int64) * stride_qh
        base = batch * stride_lb + token * heads + head
        for start_m in range(begin_m, end_m, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            q = _load_block(head_ptr, start_m, seqlen_q, stride_qt * token_stride, BLOCK_M, D, BLOCK_D, True)
            do = _load_block(do_ptr + base * D, start_m, seqlen_q, token_stride * heads * D, BLOCK_M, D, BLOCK_D, True)
            offs_lse = base + tl.cast(start_m, tl.int64) * (token_stride * heads)
            offs_lse += tl.arange(0, BLOCK_M) * (token_stride * heads)
            lse = tl.load(lse_ptr + offs_lse, mask=offs_m < seqlen_q, other=float("inf")) * _LOG2_E
            delta = tl.load(delta_ptr + offs_lse, mask=offs_m < seqlen_q, other=0.0)
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = tl.exp2(qk * scale_log2 - lse[:, None])
            if VISIBLE == "window":
                if (start_m < all_m) | (start_m + BLOCK_M - 1 + lower > start_n):
                    is_seen = (first_m[None, :] <= offs_m[:, None]) & (offs_n[None, :] >= (offs_m + lower)[:, None])
                    p = tl.where(is_seen, p, 0.0)
            elif VISIBLE != "all":
                if start_m < all_m:
                    p = tl.where(first_m[None, :] <= offs_m[:, None], p, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    dk *= scale_log2 / _LOG2_E
    dk_ptr, stride_dkn, dv_ptr, _, _ = _key_pointers(
        dk_ptr, stride_dkb, stride_dkt, stride_dkh, dv_ptr, stride_dkb, stride_dkt, stride_dkh,
        batch, kv_head, column_begin + own_key, token_stride, own, prefix, suffix, KEYS,
    )  # fmt: skip
    if OVERLAPS:
        gdc_wait()
    _add_block(dk_ptr, dk, offs_n, seqlen_k, stride_dkn, IS_FIRST, D, BLOCK_D)
    _add_block(dv_ptr, dv, offs_n, seqlen_k, stride_dkn, IS_FIRST, D, BLOCK_D)


@_kernel
def backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_lb,
    heads, heads_per_kv, num_blocks, num_segments, first_segment, key_offsets_ptr, query_offsets_ptr, w, r, phase,
    ghost, length, remaining, gap, span, span_shift, batch_begin, column_begin, scale_log2,
    KEYS: tl.constexpr, VISIBLE: tl.constexpr, RESIDUES: tl.constexpr, IS_FIRST: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add the gradients of a block of queries of one head and segment."""
    MAY_SEE_NONE: tl.constexpr = VISIBLE != "all" and VISIBLE != "causal"
    token_stride = tl.cast(r, tl.int64) if WIDE else r
    if OVERLAPS:
        gdc_launch_dependents()
    block, row, segment, batch = _program(num_blocks, heads * RESIDUES, num_segments, first_segment, batch_begin)
    start_m = (num_blocks - 1 - block) * BLOCK_M  # the last queries attend to most keys and start first
    head, kv_head = row // RESIDUES, row // RESIDUES // heads_per_kv
    key, own, prefix, suffix = _kept_tokens(
        key_offsets_ptr, kv_head, segment, w, r, phase, ghost, length, remaining
    )  # fmt: skip
    query, seqlen_q = key, own
    if query_offsets_ptr is not None:
        query, seqlen_q, _, _ = _kept_tokens(
            query_offsets_ptr, row, segment, w, r, phase, ghost, length, remaining
        )  # fmt: skip
    k_ptr, stride_kn, v_ptr, stride_vn, seqlen_k = _key_pointers(
        k_ptr, stride_kb, stride_kt, stride_kh, v_ptr, stride_vb, stride_vt, stride_vh,
        batch, kv_head, column_begin + key, token_stride, own, prefix, suffix, KEYS,
    )  # fmt: skip
    key = _first_key(key, own, prefix, r, KEYS)
    diagonal, lower = _diagonals(query, key, r, gap, span, VISIBLE)
    is_idle = (start_m >= seqlen_q) | (seqlen_k <= 0)
    if MAY_SEE_NONE:
        seen_n, stop_n, _, _ = _key_range(
            start_m, seqlen_q, seqlen_k, diagonal, lower, query, key, r, span, span_shift, VISIBLE, BLOCK_M, BLOCK_N
        )  # fmt: skip
        is_idle = is_idle | (seen_n >= stop_n)
    if is_idle:
        if OVERLAPS:
            gdc_wait()
        return
    begin_n, end_n, full_n, all_n = _key_range(
        start_m, seqlen_q, seqlen_k, diagonal, lower, query, key, r, span, span_shift, VISIBLE, BLOCK_M, BLOCK_N
    )  # fmt: skip
    offs_m = start_m + tl.arange(0, BLOCK_M)
    token = column_begin + query
    base = batch * stride_lb + token * heads + head
    q_ptr += batch * stride_qb + token * stride_qt + tl.cast(head, tl.int64) * stride_qh
    q = _load_block(q_ptr, start_m, seqlen_q, stride_qt * token_stride, BLOCK_M, D, BLOCK_D, True)
    do = _load_block(do_ptr + base * D, start_m, seqlen_q, token_stride * heads * D, BLOCK_M, D, BLOCK_D, True)
    offs_lse = base + offs_m.to(tl.int64) * (token_stride * heads)
    lse = tl.load(lse_ptr + offs_lse, mask=offs_m < seqlen_q, other=float("inf")) * _LOG2_E
    delta = tl.load(delta_ptr + offs_lse, mask=offs_m < seqlen_q, other=0.0)
    last_n = _last_keys(offs_m, diagonal, query, key, r, span, span_shift, VISIBLE)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(0 if VISIBLE == "causal" else 1, 2):  # as in the forward kernel
        first_n = all_n if VISIBLE == "causal" and MASKED else begin_n
        for start_n in range(first_n, end_n if MASKED else all_n, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = _load_block(k_ptr, start_n, seqlen_k, stride_kn, BLOCK_N, D, BLOCK_D, MASKED)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
            if MASKED:
                if VISIBLE == "causal":
                    p = tl.where(_is_seen(offs_m, offs_n, seqlen_k, last_n, lower, VISIBLE), p, 0.0)
                elif (start_n < full_n) | (start_n >= all_n):
                    p = tl.where(_is_seen(offs_m, offs_n, seqlen_k, last_n, lower, VISIBLE), p, 0.0)
            v = _load_block(v_ptr, start_n, seqlen_k, stride_vn, BLOCK_N, D, BLOCK_D, MASKED)
            ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq *= scale_log2 / _LOG2_E
    if OVERLAPS:
        gdc_wait()
    _add_block(dq_ptr + base * D, dq, offs_m, seqlen_q, token_stride * heads * D, IS_FIRST, D, BLOCK_D)
