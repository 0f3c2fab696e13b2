"""Dilated attention over all branches as a differentiable operator: a chunk of a sequence with its halo.

The gradient is that of the joint softmax over all branches (LongNet, Eq. 9-10): the backward of each branch takes the
merged out and lse, so its share is exact and nothing is stored per branch.

Letters: B batch, L columns, H query heads, G key/value heads, D head dimension, P halo slots of all branches. Tensors
are (B, L, H, D).
"""

import inspect
from collections.abc import Callable, Iterator
from itertools import accumulate, chain, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import BranchCall, Grads
from .backends import BACKENDS
from .branches import Branch, Chunk, flatten_branch, prefix_lengths, unflatten_branches


class AttentionPlan(NamedTuple):
    """The chunks, the branches and the options of one call of the op. Tokens in no chunk get out 0.

    With `zero_padding`, queries also attend to the zero keys of the released implementation (bidirectional only). In a
    compiled graph with a mask or position ids, `chunks` is a tensor with one row per chunk (`packing.find_chunks`).
    """

    chunks: tuple[Chunk, ...] | Tensor
    branches: tuple[Branch, ...]
    is_causal: bool
    scale: float
    backend: str
    zero_padding: bool = False

    def flatten(self) -> tuple:
        """Return the plan as arguments of the operators' schema."""
        chunks = () if isinstance(self.chunks, Tensor) else self.chunks
        return [*chain(*chunks)], [*chain(*map(flatten_branch, self.branches))], *self[2:]

    @classmethod
    def unflatten(cls, table: Tensor | None, chunks: list[int], branches: list[int], *others) -> "AttentionPlan":
        """Rebuild the plan from the values of `flatten`; `table` holds the chunks if they are a tensor."""
        size = len(Chunk._fields)
        chunks = chunks if table is None else table[table[:, 0] < table[:, 1]].flatten().tolist()
        chunks = tuple(Chunk(*chunks[i : i + size]) for i in range(0, len(chunks), size))
        return cls(chunks, unflatten_branches(tuple(branches)), *others)


class HaloKV(NamedTuple):
    """Halo: the keys and values outside the chunks that their queries see, in the segments that chunk borders cut.

    A prefix is before the chunks, in a cache or on other devices; a suffix is after them, on other devices.

    Attributes:
        key, value: (B, G, P, D). The P slots are those of each branch in turn; within a branch, slot j of head g holds
            its j-th kept token of the segment before (after) the chunk. Slots that a head lacks are never read.
        slots: number of slots of each branch.
    """

    key: Tensor
    value: Tensor
    slots: tuple[int, ...]

    def split(self) -> list[tuple[Tensor, Tensor]]:
        """Return the (B, slots, G, D) views of key and value for each branch."""
        key, value, ends = self.key.transpose(1, 2), self.value.transpose(1, 2), accumulate(self.slots)
        parts = [slice(end - size, end) for size, end in zip(self.slots, ends, strict=True)]
        return [(key[:, part], value[:, part]) for part in parts]


def _branch_calls(plan: AttentionPlan, keys: str = "chunk") -> Iterator[tuple[int, BranchCall]]:
    """Yield the branch's index and the backend's call for each chunk and branch.

    The first branch, the least dilated, overwrites. The others go from most to least dilated: a branch of few programs
    leaves multiprocessors idle, which the next launch fills.
    """
    order = (0, *range(len(plan.branches) - 1, 0, -1))
    is_own, overlaps = keys == "chunk", False
    zero_padding = plan.zero_padding and is_own
    for chunk in plan.chunks:
        for index in order if chunk.length else ():
            branch = plan.branches[index]
            is_first = is_own and index == 0 and branch.covers_all
            yield index, BranchCall(chunk, branch, keys, plan.is_causal, plan.scale, zero_padding, is_first, overlaps)
            overlaps = is_own


def _accumulator(x: Tensor, plan: AttentionPlan) -> Tensor:
    """Return a tensor like x for the sum over branches: zero, unless the first branch writes every token once.

    Its dtype is x's own if a token is in at most one branch after the first, on average (about one more rounding, but
    no float32 copy), else at least float32.
    """
    first, *others = plan.branches
    costs_one_rounding = first.covers_all and sum(1 / (branch.query_rate or branch.r) for branch in others) <= 1
    dtype = x.dtype if costs_one_rounding else torch.promote_types(x.dtype, torch.float32)
    is_covered = first.covers_all and sum(c.batch * c.length for c in plan.chunks) == x.shape[0] * x.shape[1]
    make = torch.empty if is_covered else torch.zeros
    return make(x.shape, dtype=dtype, device=x.device)


def forward_chunks(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """Attend within the chunks.

    Args:
        query: (B, L, H, D). key, value: (B, L, G, D), same dtype.

    Returns:
        out (B, L, H, D) in the dtype of the sum (`_accumulator`) and lse (B, L, H) in at least float32; 0 and -inf for
        a query that sees no key.
    """
    out = _accumulator(query, plan)
    precise = torch.promote_types(query.dtype, torch.float32)
    lse = torch.full(out.shape[:3], -torch.inf, dtype=precise, device=out.device)
    for _, call in _branch_calls(plan):
        out, lse = BACKENDS[plan.backend].forward_branch(call, query, key, value, out, lse)
    return out, lse


def forward_halo(query: Tensor, out: Tensor, lse: Tensor, halo: HaloKV, plan: AttentionPlan, side: str) -> None:
    """Merge attention to the "prefix" or "suffix" into `out` and `lse` of `forward_chunks`, in place."""
    parts = halo.split()
    for index, call in _branch_calls(plan, side):
        BACKENDS[plan.backend].forward_branch(call, query, *parts[index], out, lse)


def backward_chunks(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: Tensor, lse: Tensor, plan: AttentionPlan
) -> Grads:
    """Return the gradients of `forward_chunks` for query, key and value, in the dtype of the sum.

    `grad_out` is contiguous. `lse` is merged over all branches, `saved` is `prepare_backward` of the merged out.
    """
    grads = tuple(_accumulator(x, plan) for x in (query, key, value))
    for _, call in _branch_calls(plan):
        grads = BACKENDS[plan.backend].backward_branch(call, grad_out, query, key, value, saved, lse, grads)
    return grads


def backward_halo(
    grad_out: Tensor,
    query: Tensor,
    saved: Tensor,
    lse: Tensor,
    halo: HaloKV,
    grad_query: Tensor,
    plan: AttentionPlan,
    side: str,
) -> tuple[Tensor, Tensor]:
    """Return dK and dV of the halo in `forward_halo`; add dQ to `grad_query`."""
    zeros = (torch.zeros(x.shape, dtype=grad_query.dtype, device=x.device) for x in halo[:2])
    grads = HaloKV(*zeros, halo.slots)
    parts, sums = halo.split(), grads.split()
    for index, call in _branch_calls(plan, side):
        inputs, totals = (grad_out, query, *parts[index], saved, lse), (grad_query, *sums[index])
        BACKENDS[plan.backend].backward_branch(call, *inputs, totals)
    return grads[:2]


# torch.compile treats these operators as opaque, which avoids a graph break. A second copy of this file in one process
# (remote code beside the installed package) may be another version, so it registers them under a name of its own.
_names = ("longnet", *(f"longnet_{i}" for i in range(2, 1000)))
_namespace = next(name for name in _names if not hasattr(getattr(torch.ops, name), "dilated_attention"))
_library = torch.library.Library(_namespace, "FRAGMENT")
_PLAN = "Tensor? table, SymInt[] chunks, int[] branches, bool is_causal, float scale, str backend, bool zero_padding"
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? halo_key, Tensor? halo_value"


def register_operator(schema: str, function: Callable, fake: Callable, reads_values: bool = False) -> Callable:
    """Register an operator and return it. `fake` returns empty results, whose shapes and dtypes a compiler reads.

    Set `reads_values` if it reads its inputs' values: that waits for the GPU, which a CUDA graph cannot capture.
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.cudagraph_unsafe,) if reads_values else ())
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_namespace}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, _namespace), name)


def _check_prefix(plan: AttentionPlan, slots: list[int]) -> None:
    """Raise ValueError if a branch has fewer prefix slots than the kernels read."""
    needed = prefix_lengths(plan.branches, *(chunk.start for chunk in plan.chunks))
    for branch, least, given in zip(plan.branches, needed, slots or repeat(0), strict=False):
        if given < least:
            raise ValueError(
                f"branch ({branch.w}, {branch.r}) has {given} slots in `prefix`; the chunks begin inside a segment and "
                f"need {least}. List the branches in the order of `make_branches`."
            )


def _forward(query, key, value, halo_key, halo_value, slots, *plan):
    plan = AttentionPlan.unflatten(*plan)
    _check_prefix(plan, slots)
    out, lse = forward_chunks(query, key, value, plan)
    if halo_key is not None:
        forward_halo(query, out, lse, HaloKV(halo_key, halo_value, slots), plan, "prefix")
    return out.to(query.dtype), lse


def _backward(grad_out, query, key, value, halo_key, halo_value, out, lse, slots, *plan):
    plan = AttentionPlan.unflatten(*plan)
    grad_out, out, lse = (x.contiguous() for x in (grad_out, out, lse))  # under vmap they may be expanded
    saved = BACKENDS[plan.backend].prepare_backward(out, grad_out)
    dq, dk, dv = backward_chunks(grad_out, query, key, value, saved, lse, plan)
    halo_grads = query.new_empty(len(query), 0), query.new_empty(len(query), 0)
    if halo_key is not None:
        halo = HaloKV(halo_key, halo_value, slots)
        halo_grads = backward_halo(grad_out, query, saved, lse, halo, dq, plan, "prefix")
    return tuple(x.to(query.dtype) for x in (dq, dk, dv, *halo_grads))


def _fake_forward(query, *others):
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(query.shape), lse


def _fake_backward(grad_out, query, key, value, halo_key, halo_value, *others):
    halo = [query.new_empty((query.shape[0], 0) if x is None else x.shape) for x in (halo_key, halo_value)]
    return *(x.new_empty(x.shape) for x in (query, key, value)), *halo


_attend = register_operator(
    f"dilated_attention({_INPUTS}, SymInt[] slots, {_PLAN}) -> (Tensor, Tensor)", _forward, _fake_forward
)
_attend_backward = register_operator(
    f"dilated_attention_backward(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, SymInt[] slots, {_PLAN}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _vmap(function, info, dims, *inputs):
    """Apply one of the functions below under vmap: the mapped dimension joins the batch; the chunks are repeated."""
    *tensors, slots, plan = inputs
    size, plan = info.batch_size, AttentionPlan.unflatten(None, *plan)
    for i, (x, dim) in enumerate(zip(tensors, dims, strict=False)):
        if x is not None:
            tensors[i] = (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
    rows = len(tensors[0])
    chunks = tuple(
        chunk._replace(batch_begin=row + chunk.batch_begin, batch_end=row + chunk.batch_end)
        for row in range(0, rows, rows // size)
        for chunk in plan.chunks
    )
    outputs = function.apply(*tensors, slots, plan._replace(chunks=chunks).flatten())
    return tuple(x.unflatten(0, (size, -1)) for x in outputs), (0,) * len(outputs)


class _DilatedAttention(torch.autograd.Function):
    """The out and lse of the chunks and their prefix; lse is not differentiable."""

    @staticmethod
    def forward(query, key, value, halo_key, halo_value, table, slots, plan):
        return _attend(query, key, value, halo_key, halo_value, slots, table, *plan)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, table, ctx.slots, ctx.plan = inputs
        ctx.save_for_backward(*tensors, *output, table)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad_out, _):
        # A compiled graph is never differentiated twice.
        run = _DilatedAttentionBackward.forward if torch.compiler.is_compiling() else _DilatedAttentionBackward.apply
        grads = run(grad_out.contiguous(), *ctx.saved_tensors, ctx.slots, ctx.plan)
        return *(x if needed else None for x, needed in zip(grads, ctx.needs_input_grad, strict=False)), *[None] * 3

    @staticmethod
    def vmap(info, dims, *inputs):
        return _vmap(_DilatedAttention, info, dims, *inputs)


class _DilatedAttentionBackward(torch.autograd.Function):
    """The gradients as a function of their own: differentiating it raises NotImplementedError."""

    @staticmethod
    def forward(*inputs):
        *tensors, table, slots, plan = inputs
        return _attend_backward(*tensors, slots, table, *plan)

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
        return _vmap(_DilatedAttentionBackward, info, dims, *inputs)


# PyTorch reads the signature in every call. Set it once: inspecting it takes longer than launching a kernel.
for _function in (_DilatedAttention, _DilatedAttentionBackward):
    _function.forward.__signature__ = inspect.signature(_function.forward)


def _strided(x: Tensor) -> Tensor:
    """Return x, copied unless its last dimension alone has stride 1, as the kernels require.

    With two such dimensions (`Tensor.unfold`), PyTorch's CPU kernel lays its result out wrongly and returns garbage.
    """
    return x if x.stride(-1) == 1 and x.stride().count(1) == 1 else x.contiguous()


def attend_chunks(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, prefix: HaloKV | None = None
) -> Tensor:
    """Compute dilated attention of chunks and their prefixes on a fast backend: training, prefill, packed documents.

    Args:
        query: (B, L, H, D). key, value: (B, L, G, D), same dtype, positions already applied.
        prefix: keys and values before the chunks, at least `prefix_lengths` slots for every chunk's start. Required if
            a chunk begins inside a segment.

    Returns:
        (B, L, H, D) in the query's dtype. Differentiable once, in query, key, value and prefix.
    """
    *halo, slots = prefix or (None, None, ())
    tensors = [None if x is None else _strided(x) for x in (query, key, value, *halo)]
    table = plan.chunks if isinstance(plan.chunks, Tensor) else None
    return _DilatedAttention.apply(*tensors, table, slots, plan.flatten())[0]
