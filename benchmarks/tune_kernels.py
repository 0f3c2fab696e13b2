"""Candidates to replace the attention kernels of `modeling_longnet/triton_kernels.py`; `tune` times both.

Arguments, results and symbols are those of the kernels that they would replace. The choices:
    TMA             load rows by tensor descriptors (Hopper's bulk copies, no address arithmetic, 0 past the end)
    LOOPS           2: full blocks first, then masked ones (in use); 1: one loop, whose pipeline fills once
    SPECIALIZED     Triton gives loads to one group of warps and products to two others, which each take half the rows;
                    it requires 4 warps, all rows by descriptors, one loop, no early return, no `if` in the loop
    KEYS_ARE_ROWS   compute the transposed scores, so that p and ds are operands in registers, not in shared memory
"""

import sys

import triton
import triton.language as tl

from modeling_longnet.testing import TritonBackend

_kernels = sys.modules[TritonBackend.__module__.replace("backend_triton", "triton_kernels")]
_LOG2_E, _kernel, gdc_launch_dependents = _kernels._LOG2_E, _kernels._kernel, _kernels.gdc_launch_dependents
gdc_wait, _program, _kept_tokens = _kernels.gdc_wait, _kernels._program, _kernels._kept_tokens
_key_pointers = _kernels._key_pointers
_load_block, _add_block = _kernels._load_block, _kernels._add_block


@triton.jit
def _program_tokens(
    num_blocks, heads, heads_per_kv, num_segments, first_segment, key_offsets_ptr, w, r, phase, ghost, length,
    remaining, batch_begin, column_begin,
):  # fmt: skip
    """Return which tokens a program of the paper's pattern handles: the column of the first, and their numbers."""
    block, head, segment, batch = _program(num_blocks, heads, num_segments, first_segment, batch_begin)
    kv_head = head // heads_per_kv
    token, seqlen, prefix, suffix = _kept_tokens(
        key_offsets_ptr, kv_head, segment, w, r, phase, ghost, length, remaining
    )  # fmt: skip
    return block, head, kv_head, batch, column_begin + token, seqlen, prefix, suffix


@triton.jit
def _rows(ptr, seqlen, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """Return a descriptor of `seqlen` rows of D elements if TMA, else the pointer to the first."""
    if TMA:
        return tl.make_tensor_descriptor(
            ptr, [tl.maximum(seqlen, 1), D], [tl.cast(stride, tl.int64), 1], [BLOCK, BLOCK_D]
        )
    else:  # an else branch, because the two values have different types
        return ptr


@triton.jit
def _load(
    rows, start, seqlen, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Load rows start to start + BLOCK - 1 of what `_rows` returned; 0 from `seqlen` on (if MASKED or TMA)."""
    if TMA:
        return rows.load([tl.cast(start, tl.int32), 0])
    else:
        return _load_block(rows, start, seqlen, stride, BLOCK, D, BLOCK_D, MASKED)


@triton.jit
def _load_once(
    ptr, start, seqlen, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPECIALIZED: tl.constexpr
):  # fmt: skip
    """Load the rows that a program keeps for its whole loop; 0 from `seqlen` on."""
    if SPECIALIZED:
        rows = _rows(ptr, seqlen, stride, BLOCK, D, BLOCK_D, True)
        return rows.load([tl.cast(start, tl.int32), 0])
    else:
        return _load_block(ptr, start, seqlen, stride, BLOCK, D, BLOCK_D, True)


@triton.jit
def _wait(seqlen, SPECIALIZED: tl.constexpr):
    """Wait for the previous launch; return `seqlen`. If SPECIALIZED, all warps that use the result wait."""
    if SPECIALIZED:
        wait: tl.constexpr = "griddepcontrol.wait; mov.b32 $0, $1;"
        return tl.inline_asm_elementwise(wait, "=r,r", [seqlen], dtype=tl.int32, is_pure=False, pack=1)
    else:
        gdc_wait()
        return seqlen


@_kernel
def forward_candidate(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_lb,
    heads, heads_per_kv, num_blocks, num_segments, first_segment, key_offsets_ptr, query_offsets_ptr, w, r, phase,
    ghost, length, remaining, gap, span, span_shift, batch_begin, column_begin, padded_seqlen, scale_log2,
    KEYS: tl.constexpr, VISIBLE: tl.constexpr, RESIDUES: tl.constexpr, IS_FIRST: tl.constexpr,
    ZERO_PADDING: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAPS: tl.constexpr, WIDE: tl.constexpr,
    TMA: tl.constexpr, LOOPS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """`forward_kernel` with other loads and loops (no zero padding)."""
    IS_CAUSAL: tl.constexpr = VISIBLE == "causal"
    token_stride = tl.cast(r, tl.int64) if WIDE else r
    if OVERLAPS:
        gdc_launch_dependents()
    block, head, kv_head, batch, token, seqlen_q, prefix, suffix = _program_tokens(
        num_blocks, heads, heads_per_kv, num_segments, first_segment, key_offsets_ptr, w, r, phase, ghost, length,
        remaining, batch_begin, column_begin,
    )  # fmt: skip
    block = num_blocks - 1 - block
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k_ptr, stride_kn, v_ptr, stride_vn, seqlen_k = _key_pointers(
        k_ptr, stride_kb, stride_kt, stride_kh, v_ptr, stride_vb, stride_vt, stride_vh,
        batch, kv_head, token, token_stride, seqlen_q, prefix, suffix, KEYS,
    )  # fmt: skip
    has_work = (block * BLOCK_M < seqlen_q) & (seqlen_k > 0)
    if not SPECIALIZED:
        if not has_work:
            if OVERLAPS:
                gdc_wait()
            return
    keys = _rows(k_ptr, seqlen_k, stride_kn, BLOCK_N, D, BLOCK_D, TMA)
    values = _rows(v_ptr, seqlen_k, stride_vn, BLOCK_N, D, BLOCK_D, TMA)
    q_ptr += batch * stride_qb + token * stride_qt + tl.cast(head, tl.int64) * stride_qh
    q = _load_once(q_ptr, block * BLOCK_M, seqlen_q, stride_qt * token_stride, BLOCK_M, D, BLOCK_D, SPECIALIZED)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i, m_i = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], -float("inf"), tl.float32)
    end_n = tl.minimum(seqlen_k, (block + 1) * BLOCK_M) if IS_CAUSAL else seqlen_k
    if SPECIALIZED:
        end_n *= has_work.to(tl.int32)
    unmasked_n = (tl.minimum(seqlen_k, block * BLOCK_M) if IS_CAUSAL else seqlen_k) // BLOCK_N * BLOCK_N
    last_n = tl.minimum(offs_m, seqlen_k - 1) if IS_CAUSAL else tl.zeros([BLOCK_M], tl.int32) + (seqlen_k - 1)
    for LOOP in tl.static_range(LOOPS):
        begin, end = unmasked_n if LOOP else 0, end_n if LOOP == LOOPS - 1 else unmasked_n
        for start_n in tl.range(begin, end, BLOCK_N, warp_specialize=SPECIALIZED):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = _load(keys, start_n, seqlen_k, stride_kn, BLOCK_N, D, BLOCK_D, LOOP == LOOPS - 1, TMA)
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if SPECIALIZED:
                qk = tl.where(offs_n[None, :] <= last_n[:, None], qk, -float("inf"))
            elif LOOP == LOOPS - 1:
                if start_n >= unmasked_n:
                    qk = tl.where(offs_n[None, :] <= last_n[:, None], qk, -float("inf"))
            m_new = tl.maximum(m_i, tl.max(qk, 1) * scale_log2)
            p = tl.exp2(qk * scale_log2 - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(p, 1)
            v = _load(values, start_n, seqlen_k, stride_vn, BLOCK_N, D, BLOCK_D, LOOP == LOOPS - 1, TMA)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
            m_i = m_new
    out = acc / l_i[:, None]
    lse = (m_i + tl.log2(l_i)) / _LOG2_E
    offs_d = tl.arange(0, BLOCK_D)
    if OVERLAPS:
        seqlen_q = _wait(seqlen_q, SPECIALIZED)
    offs_lse = batch * stride_lb + token * heads + head + offs_m.to(tl.int64) * (token_stride * heads)
    out_ptrs = out_ptr + offs_lse[:, None] * D + offs_d[None, :]
    mask = (offs_m < seqlen_q)[:, None] & (offs_d < D)[None, :]
    if not IS_FIRST:
        old_lse = tl.load(lse_ptr + offs_lse, mask=offs_m < seqlen_q, other=0.0)
        old_out = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
        out = old_out + (out - old_out) / (1 + tl.exp(old_lse - lse))[:, None]
        m = tl.maximum(lse, old_lse)
        lse = m + tl.log(tl.exp(lse - m) + tl.exp(old_lse - m))
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + offs_lse, lse, mask=offs_m < seqlen_q)


@_kernel
def dkdv_candidate(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_lb,
    stride_dkb, stride_dkt, stride_dkh, heads, num_blocks, num_segments, first_segment, key_offsets_ptr,
    query_offsets_ptr, w, r, phase, ghost, length, remaining, gap, span, span_shift, batch_begin, column_begin,
    scale_log2,
    KEYS: tl.constexpr, VISIBLE: tl.constexpr, RESIDUES: tl.constexpr, IS_FIRST: tl.constexpr,
    HEADS_PER_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAPS: tl.constexpr, WIDE: tl.constexpr,
    TMA: tl.constexpr, KEYS_ARE_ROWS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """`backward_dkdv_kernel` with other loads, and either shape of the scores."""
    IS_CAUSAL: tl.constexpr = VISIBLE == "causal"
    token_stride = tl.cast(r, tl.int64) if WIDE else r
    if OVERLAPS:
        gdc_launch_dependents()
    block, kv_head, _, batch, token, seqlen_q, prefix, suffix = _program_tokens(
        num_blocks, heads // HEADS_PER_KV, 1, num_segments, first_segment, key_offsets_ptr, w, r, phase, ghost, length,
        remaining, batch_begin, column_begin,
    )  # fmt: skip
    k_ptr, stride_kn, v_ptr, stride_vn, seqlen_k = _key_pointers(
        k_ptr, stride_kb, stride_kt, stride_kh, v_ptr, stride_vb, stride_vt, stride_vh,
        batch, kv_head, token, token_stride, seqlen_q, prefix, suffix, KEYS,
    )  # fmt: skip
    has_work = (block * BLOCK_N < seqlen_k) & (seqlen_q > 0)
    if not SPECIALIZED:
        if not has_work:
            if OVERLAPS:
                gdc_wait()
            return
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _load_once(k_ptr, block * BLOCK_N, seqlen_k, stride_kn, BLOCK_N, D, BLOCK_D, SPECIALIZED)
    v = _load_once(v_ptr, block * BLOCK_N, seqlen_k, stride_vn, BLOCK_N, D, BLOCK_D, SPECIALIZED)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin_m = block * BLOCK_N // BLOCK_M * BLOCK_M if IS_CAUSAL else 0
    if SPECIALIZED:
        begin_m = tl.where(has_work, begin_m, seqlen_q)
    stride_qm, stride_om = stride_qt * token_stride, token_stride * heads * D
    for n in range(HEADS_PER_KV):
        head = kv_head * HEADS_PER_KV + n
        head_ptr = q_ptr + batch * stride_qb + token * stride_qt + tl.cast(head, tl.int64) * stride_qh
        base = batch * stride_lb + token * heads + head
        queries = _rows(head_ptr, seqlen_q, stride_qm, BLOCK_M, D, BLOCK_D, TMA)
        grads = _rows(do_ptr + base * D, seqlen_q, stride_om, BLOCK_M, D, BLOCK_D, TMA)
        for start_m in tl.range(begin_m, seqlen_q, BLOCK_M, warp_specialize=SPECIALIZED):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            q = _load(queries, start_m, seqlen_q, stride_qm, BLOCK_M, D, BLOCK_D, True, TMA)
            do = _load(grads, start_m, seqlen_q, stride_om, BLOCK_M, D, BLOCK_D, True, TMA)
            offs_lse = base + tl.cast(start_m, tl.int64) * (token_stride * heads)
            offs_lse += tl.arange(0, BLOCK_M) * (token_stride * heads)
            lse = tl.load(lse_ptr + offs_lse, mask=offs_m < seqlen_q, other=float("inf")) * _LOG2_E
            delta = tl.load(delta_ptr + offs_lse, mask=offs_m < seqlen_q, other=0.0)
            if KEYS_ARE_ROWS:
                p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])
                if IS_CAUSAL:
                    if SPECIALIZED:
                        p = tl.where(offs_n[:, None] <= offs_m[None, :], p, 0.0)
                    elif start_m < (block + 1) * BLOCK_N:
                        p = tl.where(offs_n[:, None] <= offs_m[None, :], p, 0.0)
                ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            else:
                p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
                if IS_CAUSAL:
                    if SPECIALIZED:
                        p = tl.where(offs_n[None, :] <= offs_m[:, None], p, 0.0)
                    elif start_m < (block + 1) * BLOCK_N:
                        p = tl.where(offs_n[None, :] <= offs_m[:, None], p, 0.0)
                ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
                dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
                dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    dk *= scale_log2 / _LOG2_E
    dk_ptr, stride_dkn, dv_ptr, _, _ = _key_pointers(
        dk_ptr, stride_dkb, stride_dkt, stride_dkh, dv_ptr, stride_dkb, stride_dkt, stride_dkh,
        batch, kv_head, token, token_stride, seqlen_q, prefix, suffix, KEYS,
    )  # fmt: skip
    if OVERLAPS:
        seqlen_k = _wait(seqlen_k, SPECIALIZED)
    _add_block(dk_ptr, dk, offs_n, seqlen_k, stride_dkn, IS_FIRST, D, BLOCK_D)
    _add_block(dv_ptr, dv, offs_n, seqlen_k, stride_dkn, IS_FIRST, D, BLOCK_D)


@_kernel
def dq_candidate(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_lb,
    heads, heads_per_kv, num_blocks, num_segments, first_segment, key_offsets_ptr, query_offsets_ptr, w, r, phase,
    ghost, length, remaining, gap, span, span_shift, batch_begin, column_begin, scale_log2,
    KEYS: tl.constexpr, VISIBLE: tl.constexpr, RESIDUES: tl.constexpr, IS_FIRST: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr, WIDE: tl.constexpr,
    TMA: tl.constexpr, LOOPS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """`backward_dq_kernel` with other loads and loops."""
    IS_CAUSAL: tl.constexpr = VISIBLE == "causal"
    token_stride = tl.cast(r, tl.int64) if WIDE else r
    if OVERLAPS:
        gdc_launch_dependents()
    block, head, kv_head, batch, token, seqlen_q, prefix, suffix = _program_tokens(
        num_blocks, heads, heads_per_kv, num_segments, first_segment, key_offsets_ptr, w, r, phase, ghost, length,
        remaining, batch_begin, column_begin,
    )  # fmt: skip
    block = num_blocks - 1 - block
    k_ptr, stride_kn, v_ptr, stride_vn, seqlen_k = _key_pointers(
        k_ptr, stride_kb, stride_kt, stride_kh, v_ptr, stride_vb, stride_vt, stride_vh,
        batch, kv_head, token, token_stride, seqlen_q, prefix, suffix, KEYS,
    )  # fmt: skip
    has_work = (block * BLOCK_M < seqlen_q) & (seqlen_k > 0)
    if not SPECIALIZED:
        if not has_work:
            if OVERLAPS:
                gdc_wait()
            return
    keys = _rows(k_ptr, seqlen_k, stride_kn, BLOCK_N, D, BLOCK_D, TMA)
    values = _rows(v_ptr, seqlen_k, stride_vn, BLOCK_N, D, BLOCK_D, TMA)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    base = batch * stride_lb + token * heads + head
    q_ptr += batch * stride_qb + token * stride_qt + tl.cast(head, tl.int64) * stride_qh
    q = _load_once(q_ptr, block * BLOCK_M, seqlen_q, stride_qt * token_stride, BLOCK_M, D, BLOCK_D, SPECIALIZED)
    do = _load_once(
        do_ptr + base * D, block * BLOCK_M, seqlen_q, token_stride * heads * D, BLOCK_M, D, BLOCK_D, SPECIALIZED
    )
    offs_lse = base + offs_m.to(tl.int64) * (token_stride * heads)
    lse = tl.load(lse_ptr + offs_lse, mask=offs_m < seqlen_q, other=float("inf")) * _LOG2_E
    delta = tl.load(delta_ptr + offs_lse, mask=offs_m < seqlen_q, other=0.0)
    end_n = tl.minimum(seqlen_k, (block + 1) * BLOCK_M) if IS_CAUSAL else seqlen_k
    if SPECIALIZED:
        end_n *= has_work.to(tl.int32)
    unmasked_n = (tl.minimum(seqlen_k, block * BLOCK_M) if IS_CAUSAL else seqlen_k) // BLOCK_N * BLOCK_N
    last_n = tl.minimum(offs_m, seqlen_k - 1) if IS_CAUSAL else tl.zeros([BLOCK_M], tl.int32) + (seqlen_k - 1)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for LOOP in tl.static_range(LOOPS):
        begin, end = unmasked_n if LOOP else 0, end_n if LOOP == LOOPS - 1 else unmasked_n
        for start_n in tl.range(begin, end, BLOCK_N, warp_specialize=SPECIALIZED):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = _load(keys, start_n, seqlen_k, stride_kn, BLOCK_N, D, BLOCK_D, LOOP == LOOPS - 1, TMA)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
            if SPECIALIZED:
                p = tl.where(offs_n[None, :] <= last_n[:, None], p, 0.0)
            elif LOOP == LOOPS - 1:
                if start_n >= unmasked_n:
                    p = tl.where(offs_n[None, :] <= last_n[:, None], p, 0.0)
            v = _load(values, start_n, seqlen_k, stride_vn, BLOCK_N, D, BLOCK_D, LOOP == LOOPS - 1, TMA)
            ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq *= scale_log2 / _LOG2_E
    if OVERLAPS:
        seqlen_q = _wait(seqlen_q, SPECIALIZED)
    _add_block(dq_ptr + base * D, dq, offs_m, seqlen_q, token_stride * heads * D, IS_FIRST, D, BLOCK_D)
