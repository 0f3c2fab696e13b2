"""Dilated attention over all branches: a chunk of a sequence with the rows that come before (and after) it.

Letters: B batch, L columns, H query heads, G key/value heads, D head dimension, n segments, h heads of one view.
Tensors are (B, L, H, D) here: in this layout the rows of a branch are strided views of q, k, v, out and gradients.

The gradient is that of the joint softmax over all branches (LongNet, Eq. 9-10): each branch's backward is given
the merged out and the merged lse, so that its share is exact and nothing needs to be kept per branch.
"""

import inspect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .attend import BACKENDS, choose_backend, merge_
from .attend_torch import cuts_rows
from .attend_triton import backward_ as triton_backward_
from .attend_triton import forward_ as triton_forward_
from .attend_triton import sum_products
from .branches import Branch, Chunk, Rows, chunk_rows, make_branches, prefix_lengths
from .reference import count_branches, dense_attention

# Kernel results above this size come from fresh pages that the system must fill with zeros each time.
_CPU_BYTES_PER_CALL = 2 << 20
# Asked once: a graph of torch.compile cannot ask.
_AUTOCAST_DEVICES = {name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name)}
# CUDA kernels put the batch into a grid dimension of at most 65,535.
_CUDA_BATCH_PER_CALL = 32768


class Plan(NamedTuple):
    """What to compute: the chunks of the tensors' rows, the branches, and how."""

    chunks: tuple[Chunk, ...]
    branches: tuple[Branch, ...]
    is_causal: bool
    scale: float
    backend: str
    zero_padding: bool


class Outside(NamedTuple):
    """Rows of each branch that lie outside the chunk, in the segment that it cuts.

    keys, values: a (B, G, P, D) tensor a branch. Slot j of head g holds its j-th row of that segment (`before`
    the chunk), or its j-th row behind the chunk (`after`); slots that a head does not have are never read.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def rows_view(x: Tensor, chunk: Chunk, branch: Branch, rows: Rows, heads_per_group: int = 1) -> Tensor:
    """The rows of one piece in a (B, L, heads, ...) tensor: (B, n, h, rows, ...), strided."""
    batch, token, head = x.stride()[:3]
    offset = (
        x.storage_offset()
        + chunk.row_begin * batch
        + (chunk.column_begin + rows.begin + rows.row) * token
        + rows.head * heads_per_group * head
    )
    head_stride = head if heads_per_group > 1 else rows.head_step * head + rows.row_step * token
    size = (chunk.row_end - chunk.row_begin, rows.segments, rows.heads * heads_per_group, rows.rows)
    stride = (batch, branch.w * token, head_stride, branch.r * token)
    return x.as_strided(size + x.shape[3:], stride + x.stride()[3:], offset)


def _outside_view(x: Tensor, chunk: Chunk, rows: Rows, count: int) -> Tensor:
    """The first `count` slots of the piece's heads in a (B, G, P, D) tensor: (B, h, count, D)."""
    heads = slice(rows.head, rows.head + (rows.heads - 1) * rows.head_step + 1, rows.head_step)
    return x[chunk.row_begin : chunk.row_end, heads, :count]


def kernel_calls(*views: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Show (B, n, h, rows, ...) views as (batch, h, rows, ...), in as few kernel calls as strides allow."""
    batch, segments = views[0].shape[:2]
    if segments == 1:
        views = [x[:, 0] for x in views]
    elif batch == 1:
        views = [x[0] for x in views]
    elif all(x.stride(0) == segments * x.stride(1) for x in views):
        views = [x.flatten(0, 1) for x in views]
    elif all(x.shape[2] == 1 for x in views):
        views = [x[:, :, 0] for x in views]
    else:
        for dim in range(batch) if batch < segments else range(segments):
            yield from _slabs([x[dim] if batch < segments else x[:, dim] for x in views])
        return
    yield from _slabs(views)


def _slabs(views: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Cut a call's batch so that its results stay in memory that is reused, on CUDA within the grid's limit."""
    query = views[0]
    if query.device.type == "cpu":
        most = max(1, _CPU_BYTES_PER_CALL // max(1, query[0].numel() * query.element_size()))
    else:
        most = _CUDA_BATCH_PER_CALL
    for begin in range(0, query.shape[0], most):
        yield tuple(x[begin : begin + most] for x in views)


def _each_branch(plan: Plan) -> Iterator[tuple[Chunk, int, Branch]]:
    """Every chunk with every branch (and its number): what one Triton launch takes.

    After the first branch, which writes, the longest come first: their few programs end late, beside those of the next.
    """
    order = (0, *range(len(plan.branches) - 1, 0, -1))
    for chunk in plan.chunks:
        for index in order if chunk.length else ():
            yield chunk, index, plan.branches[index]


def each_piece(plan: Plan, heads_per_group: int) -> Iterator[tuple[Chunk, int, Branch, Rows]]:
    """Every chunk's pieces, branch by branch (with its number): what one strided view can show."""
    for chunk in plan.chunks:
        for index, branch in enumerate(plan.branches):
            for rows in chunk_rows(chunk, branch, heads_per_group > 1):
                yield chunk, index, branch, rows


def _covers_all(x: Tensor, plan: Plan) -> bool:
    """Does the first branch write every token of every row once, so that no memory needs to be cleared?"""
    area = sum((c.row_end - c.row_begin) * c.length for c in plan.chunks)
    return plan.branches[0].r == 1 and area == x.shape[0] * x.shape[1]


def _sum_dtype(x: Tensor, plan: Plan) -> torch.dtype:
    """The dtype that holds a token's sum over branches: at least float32, or half precision itself where that costs
    about one more rounding (a token is in at most one branch after the first, on average) and saves a larger copy."""
    first, *others = plan.branches
    if first.r == 1 and sum(1 / branch.r for branch in others) <= 1:
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def _accumulator(x: Tensor, plan: Plan) -> Tensor:
    """A tensor like x in the dtype of the sum, zero where no branch will write first."""
    make = torch.empty if _covers_all(x, plan) else torch.zeros
    return make(x.shape, dtype=_sum_dtype(x, plan), device=x.device)


def shows_all(piece: tuple[Chunk, int, Branch, Rows], query: Tensor, key: Tensor, is_causal: bool) -> bool:
    """Is this piece every head and token, in the order of memory, so that one call gives a whole result?"""
    chunk, _, branch, rows = piece
    batch, length, heads = key.shape[:3]
    return (
        chunk.row_end - chunk.row_begin == batch
        and rows.heads == heads
        and branch.r == 1
        and rows.segments * rows.rows == length
        and all(x.stride(0) == length * x.stride(1) or batch == 1 for x in (query, key))
        and not (is_causal and cuts_rows(rows.rows, query.device))
        and query.dtype in (torch.float32, torch.float64)  # bfloat16 loses by it, see benchmarks/README.md
        and (query.device.type == "cpu" or batch * rows.segments <= _CUDA_BATCH_PER_CALL)
    )


def _as_tokens(x: Tensor, like: Tensor) -> Tensor:
    """A kernel's (B * n, h, rows, ...) result as (B, L, h, ...): a view where the kernel wrote it so."""
    return x.transpose(1, 2).reshape(like.shape[: x.dim()])


def forward_chunks(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Attention of the chunks' own tokens among themselves.

    Args:
        query: (B, L, H, D). key, value: (B, L, G, D), same dtype.

    Returns:
        out (B, L, H, D) in the dtype of the sum (`_sum_dtype`) and lse (B, L, H) in at least float32; 0 and -inf
        where a query sees no key.
    """
    out = _accumulator(query, plan)
    precise = torch.promote_types(query.dtype, torch.float32)
    lse = torch.full(out.shape[:3], -torch.inf, dtype=precise, device=out.device)
    if plan.backend == "triton":
        for number, (chunk, index, branch) in enumerate(_each_branch(plan)):
            triton_forward_(
                out, lse, query, key, value, chunk, branch, is_first=index == 0 and branch.r == 1, scale=plan.scale,
                is_causal=plan.is_causal, zero_padding=plan.zero_padding, overlaps=number > 0,
            )  # fmt: skip
        return out, lse
    run, repeat = BACKENDS[plan.backend].forward, query.shape[2] // key.shape[2]
    for piece in each_piece(plan, repeat):
        chunk, index, branch, rows = piece
        views = [rows_view(x, chunk, branch, rows, repeat) for x in (query, out, lse)]
        shared = [rows_view(x, chunk, branch, rows) for x in (key, value)]
        if index == 0 and not rows.padding and shows_all(piece, query, key, plan.is_causal):
            # The first result becomes the accumulator: no copy, and no second set of fresh pages.
            inputs = (x.flatten(0, 1) for x in (views[0], *shared))
            [(_, new_out, new_lse)] = run(*inputs, plan.is_causal, plan.scale)
            out, lse = _as_tokens(new_out, query), _as_tokens(new_lse, query)
            continue
        for q, o, s, k, v in kernel_calls(*views, *shared):
            for queries, new_out, new_lse in run(q, k, v, plan.is_causal, plan.scale):
                if index == 0 and branch.r == 1:
                    o[:, :, queries].copy_(new_out)
                    s[:, :, queries].copy_(new_lse)
                else:
                    merge_(o[:, :, queries], s[:, :, queries], new_out, new_lse)
            if plan.zero_padding and rows.padding:
                zeros = torch.full_like(s, rows.padding).log_()
                merge_(o, s, torch.zeros_like(o), zeros)
    return out, lse


def _each_outside(
    plan: Plan, outside: Outside, after: bool, heads_per_group: int
) -> Iterator[tuple[Chunk, Branch, Rows, Tensor, Tensor]]:
    """Pieces whose segment goes on outside the chunk, with the (B, h, count, D) keys and values there."""
    for chunk, index, branch, rows in each_piece(plan, heads_per_group):
        count = rows.after if after else rows.before
        if count:
            yield (
                chunk,
                branch,
                rows,
                *(_outside_view(x[index], chunk, rows, count) for x in outside),
            )


def forward_outside(query: Tensor, out: Tensor, lse: Tensor, outside: Outside, plan: Plan, after: bool = False) -> None:
    """Merge the rows before the chunks (or after them) into `out` and `lse` of `forward_chunks`, in place."""
    if plan.backend == "triton":
        for chunk, index, branch in _each_branch(plan):
            key, value = (x[index].transpose(1, 2) for x in outside)
            triton_forward_(
                out, lse, query, key, value, chunk, branch, which="after" if after else "before", is_causal=False,
                scale=plan.scale,
            )  # fmt: skip
        return
    run, repeat = BACKENDS[plan.backend].forward, query.shape[2] // outside.keys[0].shape[1]
    for chunk, branch, rows, k, v in _each_outside(plan, outside, after, repeat):
        q, o, s = (rows_view(x, chunk, branch, rows, repeat)[:, 0] for x in (query, out, lse))
        [(_, new_out, new_lse)] = run(q, k, v, False, plan.scale)
        merge_(o, s, new_out, new_lse)


def backward_chunks(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward_chunks`, given the merged out (in the query's dtype) and lse; in the dtype of the sum."""
    grads = [_accumulator(x, plan) for x in (query, key, value)]
    if plan.backend == "triton":
        delta = sum_products(out, grad_out)
        for number, (chunk, index, branch) in enumerate(_each_branch(plan)):
            triton_backward_(
                grads, grad_out, query, key, value, lse, delta, chunk, branch, scale=plan.scale,
                is_causal=plan.is_causal, is_first=index == 0 and branch.r == 1, overlaps=number > 0,
            )  # fmt: skip
        return tuple(grads)
    run, repeat = BACKENDS[plan.backend].backward, query.shape[2] // key.shape[2]
    for piece in each_piece(plan, repeat):
        chunk, index, branch, rows = piece
        views = [rows_view(x, chunk, branch, rows, repeat) for x in (query, grad_out, out, lse, grads[0])]
        shared = [rows_view(x, chunk, branch, rows) for x in (key, value, *grads[1:])]
        if index == 0 and shows_all(piece, query, key, plan.is_causal):
            q, g, o, s, k, v = (x.flatten(0, 1) for x in (*views[:4], *shared[:2]))
            parts = run(g, q, k, v, o, s, plan.is_causal, plan.scale)
            grads = [_as_tokens(part, x) for part, x in zip(parts, (query, key, value), strict=True)]
            continue
        for q, g, o, s, dq, k, v, dk, dv in kernel_calls(*views, *shared):
            new = run(g, q, k, v, o, s, plan.is_causal, plan.scale)
            for total, part in zip((dq, dk, dv), new, strict=True):
                if index == 0 and branch.r == 1:
                    total.copy_(part)
                else:
                    total.add_(part)
    return tuple(grads)


def backward_outside(
    grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, outside: Outside, grad_query: Tensor, plan: Plan,
    after: bool = False,
) -> Outside:  # fmt: skip
    """Gradients of `forward_outside`: adds the queries' to `grad_query`, returns those of the rows outside."""
    new = {"dtype": grad_query.dtype, "device": grad_query.device}
    grads = Outside(*(tuple(torch.zeros(x.shape, **new) for x in pair) for pair in outside))
    if plan.backend == "triton":
        delta = sum_products(out, grad_out)
        for chunk, index, branch in _each_branch(plan):
            key, value, dk, dv = (x[index].transpose(1, 2) for x in (*outside, *grads))
            triton_backward_(
                (grad_query, dk, dv), grad_out, query, key, value, lse, delta, chunk, branch,
                which="after" if after else "before", is_causal=False, scale=plan.scale,
            )  # fmt: skip
        return grads
    run, repeat = BACKENDS[plan.backend].backward, query.shape[2] // outside.keys[0].shape[1]
    found = zip(
        _each_outside(plan, outside, after, repeat),
        _each_outside(plan, grads, after, repeat),
        strict=True,
    )
    for (chunk, branch, rows, k, v), (*_, dk, dv) in found:
        q, g, o, s, dq = (
            rows_view(x, chunk, branch, rows, repeat)[:, 0] for x in (query, grad_out, out, lse, grad_query)
        )
        for total, part in zip((dq, dk, dv), run(g, q, k, v, o, s, False, plan.scale), strict=True):
            total.add_(part)
    return grads


# The operators below are opaque to torch.compile, which so keeps one graph. A second copy of this file in one
# process (remote code beside the installed package) may be another version, so it gets a name of its own.
_namespace = next(
    name for name in ("longnet", *(f"longnet_{i}" for i in range(2, 1000)))
    if not hasattr(getattr(torch.ops, name), "dilated_attention")
)  # fmt: skip
_library = torch.library.Library(_namespace, "FRAGMENT")
_PLAN = "Tensor chunks, int[] w, int[] r, int[] offsets, bool is_causal, float scale, str backend, bool zero_padding"
_library.define(
    f"dilated_attention(Tensor query, Tensor key, Tensor value, Tensor[] before, {_PLAN}) -> (Tensor, Tensor)"
)
_library.define(
    "dilated_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor[] before, "
    f"Tensor out, Tensor lse, {_PLAN}) -> (Tensor, Tensor, Tensor, Tensor[])"
)
_ops = getattr(torch.ops, _namespace)


def _plan(chunks: Tensor, w, r, offsets, is_causal: bool, scale: float, backend: str, zero_padding: bool) -> Plan:
    heads = len(offsets) // len(w)
    branches = tuple(Branch(w[i], r[i], tuple(offsets[i * heads : (i + 1) * heads])) for i in range(len(w)))
    return Plan(
        tuple(Chunk(*row) for row in chunks.tolist()),
        branches,
        is_causal,
        scale,
        backend,
        zero_padding,
    )


def _split(before: list[Tensor]) -> Outside:
    half = len(before) // 2
    return Outside(tuple(before[:half]), tuple(before[half:]))


def _check_before(plan: Plan, before: Outside) -> None:
    """Raise ValueError unless each branch has a slot for every row before the chunks: kernels would read beyond."""
    needed = [max(x) for x in zip(*(prefix_lengths(plan.branches, c.start) for c in plan.chunks), strict=True)]
    for branch, least, keys, values in zip(plan.branches, needed, *before, strict=False):
        if min(keys.shape[2], values.shape[2]) < least:
            raise ValueError(
                f"branch ({branch.w}, {branch.r}) has {min(keys.shape[2], values.shape[2])} slots in `before`; the "
                f"chunks need {least}. The order is that of `make_branches`."
            )


def _forward(query, key, value, before, *plan):
    plan = _plan(*plan)
    if not before and any(c.start % b.w for c in plan.chunks for b in plan.branches):
        raise ValueError("a chunk that begins inside a segment needs the rows before it; give `before`.")
    _check_before(plan, _split(before))
    out, lse = forward_chunks(query, key, value, plan)
    if before:
        forward_outside(query, out, lse, _split(before), plan)
    return out.to(query.dtype), lse


def _backward(grad_out, query, key, value, before, out, lse, *plan):
    plan = _plan(*plan)
    grad_out, out, lse = (x.contiguous() for x in (grad_out, out, lse))  # under vmap they may be one, shown for many
    dq, dk, dv = backward_chunks(grad_out, query, key, value, out, lse, plan)
    grads = ()
    if before:
        outside = backward_outside(grad_out, query, out, lse, _split(before), dq, plan)
        grads = outside.keys + outside.values
    grads = [grad.to(x.dtype) for grad, x in zip(grads, before, strict=True)]
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), grads


def _fake_forward(query, key, value, before, *plan):
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(query.shape), lse


def _fake_backward(grad_out, query, key, value, before, out, lse, *plan):
    new = [x.new_empty(x.shape) for x in (query, key, value, *before)]
    return new[0], new[1], new[2], new[3:]


for _name, _run, _fake in (
    ("dilated_attention", _forward, _fake_forward),
    ("dilated_attention_backward", _backward, _fake_backward),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_namespace}::{_name}", _fake, lib=_library)


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """vmap's dimension in front of the batch, (size * B, ...)."""
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _fold_chunks(chunks: Tensor, batch: int, size: int) -> Tensor:
    shift = torch.zeros(size, 1, chunks.shape[1], dtype=chunks.dtype)
    shift[:, 0, :2] = torch.arange(size)[:, None] * batch
    return (chunks + shift).flatten(0, 1)


def _may_be_transformed() -> bool:
    """Is a derivative of the gradient wanted, of either mode, or a batch of gradients? (A graph is no such place.)"""
    return (
        torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )  # fmt: skip


class _DilatedAttention(torch.autograd.Function):
    """out of the chunks and the rows before them. Arguments: q, k, v, chunks, plan, *before (keys, then values)."""

    @staticmethod
    def forward(query, key, value, chunks, plan, *before):
        return _ops.dilated_attention(query, key, value, list(before), chunks, *plan)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, chunks, ctx.plan, *before = inputs
        ctx.save_for_backward(query, key, value, chunks, *output, *before)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad_out, _):
        query, key, value, chunks, out, lse, *before = ctx.saved_tensors
        is_plain = torch.compiler.is_compiling() or not _may_be_transformed()
        run = _DilatedAttentionBackward.forward if is_plain else _DilatedAttentionBackward.apply
        dq, dk, dv, *grads = run(grad_out.contiguous(), query, key, value, out, lse, chunks, ctx.plan, *before)
        return dq, dk, dv, None, None, *grads

    @staticmethod
    def vmap(info, dims, query, key, value, chunks, plan, *before):
        size = info.batch_size
        folded = [_fold(x, d, size) for x, d in zip((query, key, value), dims[:3], strict=True)]
        before = [_fold(x, d, size) for x, d in zip(before, dims[5:], strict=True)]
        chunks = _fold_chunks(chunks, folded[0].shape[0] // size, size)
        out, lse = _DilatedAttention.apply(*folded, chunks, plan, *before)
        return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1))), (0, 0)


class _DilatedAttentionBackward(torch.autograd.Function):
    """The gradients as a function of their own, so that a second derivative is refused by name."""

    @staticmethod
    def forward(grad_out, query, key, value, out, lse, chunks, plan, *before):
        *grads, others = _ops.dilated_attention_backward(
            grad_out, query, key, value, list(before), out, lse, chunks, *plan
        )
        return *grads, *others

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "dilated_attention has no second derivative on a fast path, as PyTorch's own flash attention has none; "
            'use backend="eager" (attn_implementation="eager" in a model), which can be differentiated twice.'
        )

    @staticmethod
    def vmap(info, dims, *inputs):
        tensors, chunks, plan, before = inputs[:6], inputs[6], inputs[7], inputs[8:]
        size = info.batch_size
        folded = [_fold(x, d, size) for x, d in zip(tensors, dims[:6], strict=True)]
        before = [_fold(x, d, size) for x, d in zip(before, dims[8:], strict=True)]
        chunks = _fold_chunks(chunks, folded[0].shape[0] // size, size)
        grads = _DilatedAttentionBackward.apply(*folded, chunks, plan, *before)
        return tuple(x.unflatten(0, (size, -1)) for x in grads), (0,) * len(grads)


# PyTorch asks for the signature in every call, and Python takes longer to find it than a kernel takes to launch.
for _function in (_DilatedAttention, _DilatedAttentionBackward):
    _function.forward.__signature__ = inspect.signature(_function.forward)


def whole_batch(batch: int, length: int, start: int = 0) -> Tensor:
    """The chunks of a batch without padding, all of whose rows hold tokens [start, start + length): (1, 6) int64."""
    return torch.tensor([[0, batch, 0, length, start, start + length]])


def attend_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    branches: tuple[Branch, ...],
    *,
    chunks: Tensor,
    before: Outside | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    backend: str = "torch",
    zero_padding: bool = False,
) -> Tensor:
    """Dilated attention of chunks with their prefixes by a fast backend: training, prefill and packed documents.

    Args:
        query: (B, L, H, D). key, value: (B, L, G, D), same dtype, positions already applied.
        chunks: (N, 6) int64 on the CPU, the fields of `Chunk`; tokens in none of them get out 0.
        before: for each branch the keys and values before the chunks, see `Outside`; P at least the branch's
            `prefix_lengths` for every chunk's start. Needed as soon as one chunk starts behind 0.
        scale: of the scores; 1 / sqrt(D) if None.
        zero_padding: show the zero keys of the released implementation (bidirectional only).

    Returns:
        (B, L, H, D) in the query's dtype. Differentiable in q, k, v and `before`, once.
    """
    plan = (
        [b.w for b in branches],
        [b.r for b in branches],
        [o for b in branches for o in b.offsets],
        is_causal,
        query.shape[-1] ** -0.5 if scale is None else scale,
        backend,
        zero_padding,
    )
    before = () if before is None else before.keys + before.values
    query, key, value, *before = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, *before))
    return _DilatedAttention.apply(query, key, value, chunks, plan, *before)[0]


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(f"{shapes}: expected query (B, H, L, D), key and value (B, G, L, D) alike.")
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(f"{shapes}: batch, length and head dimension of query and key must be equal.")
    if 0 in query.shape or 0 in key.shape:
        raise ValueError(f"{shapes}: every dimension, the length too, must be at least 1.")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{shapes}: the {key.shape[1]} key/value heads must divide the {query.shape[1]} query heads.")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(
            f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: query, key and value need one floating-point dtype."
        )
    if not query.device == key.device == value.device:
        raise ValueError(f"devices {query.device}, {key.device}, {value.device}: all three must be on one device.")


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which attention runs: autocast's where it is on, as PyTorch's own attention (float64 stays)."""
    device = x.device.type
    if x.dtype == torch.float64 or not x.is_floating_point() or device not in _AUTOCAST_DEVICES:
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: list[int] | tuple[int, ...],
    dilation_rates: list[int] | tuple[int, ...],
    *,
    is_causal: bool = True,
    scale: float | None = None,
    head_offsets: str = "interleaved",
    backend: str = "auto",
) -> Tensor:
    """Dilated attention (LongNet, arXiv 2307.02486, section 2.2-2.3).

    In branch (w, r) the sequence is cut into segments of w tokens; within a segment, key/value head g and its
    query heads keep the tokens whose place in the segment is its offset modulo r, and attend among those. The
    branches are mixed by their softmax denominators (Eq. 9-10), which is one softmax over all keys that all
    branches show; a key shown twice counts twice. Any length, w and r are exact: nothing is padded.

    Args:
        query: (B, H, L, D), floating point. The fastest layout is (B, L, H, D) in memory, transposed.
        key, value: (B, G, L, D), G dividing H; not repeated in memory, but by the dense reference and, with
            backend "torch", for PyTorch's memory-efficient CUDA kernel (float32).
        segment_lengths, dilation_rates: w and r of each branch, in tokens, 1 <= r <= w, w growing.
        is_causal: a query sees no later key.
        scale: of the scores, above 0; 1 / sqrt(D) if None.
        head_offsets: "interleaved" (g mod r, the paper) or "blocked" (g // ceil(G / r), TorchScale).
        backend: "eager" (dense reference, O(L^2), any device), "torch" (PyTorch's flash and memory-efficient
            kernels), "flash_attn" (that package), "triton" (kernels of our own, CUDA, D up to 256, no float64), or
            "auto", which takes "triton" on a GPU and "torch" elsewhere, where they run.

    Returns:
        (B, H, L, D), the query's dtype (autocast's under autocast); 0 for a query that no branch covers. The
        gradient is exact for the joint softmax. Sums over keys and the merging of branches are computed in at least
        float32. In half precision a token's sum over branches, and that of its gradients, is stored in that
        precision after each branch if the branches after the first hold a token at most once on average (sum of
        1 / r), which adds about one rounding; else it is stored in float32.

    Raises:
        ValueError: branches, shapes, dtypes or names that do not fit, or a named backend that cannot run here.
        NotImplementedError: when differentiated twice on a fast path.

    Example:
        >>> q = k = v = torch.randn(1, 8, 4096, 64)
        >>> dilated_attention(q, k, v, segment_lengths=[512, 2048], dilation_rates=[1, 4]).shape
        torch.Size([1, 8, 4096, 64])
    """
    query, key, value = (x.to(autocast_dtype(x)) for x in (query, key, value))
    _check_inputs(query, key, value)
    branches = make_branches(segment_lengths, dilation_rates, key.shape[1], head_offsets)
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale} must be above 0: fused kernels multiply masked scores, -inf, by it.")
    backend = choose_backend(backend, query)
    if backend == "eager":
        positions = torch.arange(query.shape[2], device=query.device)[None]
        counts = count_branches(branches, positions, positions, is_causal=is_causal)
        return dense_attention(query, key, value, counts, query.shape[-1] ** -0.5 if scale is None else scale)[0]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    chunks = whole_batch(query.shape[0], query.shape[1])
    out = attend_chunks(
        query,
        key,
        value,
        branches,
        chunks=chunks,
        is_causal=is_causal,
        scale=scale,
        backend=backend,
    )
    return out.transpose(1, 2)
