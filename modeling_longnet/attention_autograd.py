"""Dilated attention over all branches as a differentiable operator: a chunk of a sequence with its halo.

The gradient is that of the joint softmax over all branches (LongNet, Eq. 9-10): the backward of each branch takes the
merged out and lse, so its share is exact and nothing is stored per branch.

Letters: B batch, L columns, H query heads, G key/value heads, D head dimension, P halo slots of all branches. Tensors
are (B, L, H, D).
"""

import inspect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import BranchCall, Grads
from .backends import BACKENDS
from .branches import Branch, Chunk, prefix_lengths


class AttentionPlan(NamedTuple):
    """What the op computes: which chunks of the tensors' rows, over which branches, and how.

    `zero_padding` attends to the zero keys of the released implementation (bidirectional only). Tokens in no chunk get
    out 0.
    """

    chunks: tuple[Chunk, ...]
    branches: tuple[Branch, ...]
    is_causal: bool
    scale: float
    backend: str
    zero_padding: bool = False

    def flatten(self) -> tuple:
        """Return the plan as the operators' schema takes it."""
        return (
            [number for chunk in self.chunks for number in chunk],
            [b.w for b in self.branches],
            [b.r for b in self.branches],
            [o for b in self.branches for o in b.offsets],
            *self[2:],
        )

    @classmethod
    def unflatten(cls, chunks: list[int], w: list[int], r: list[int], offsets: list[int], *others) -> "AttentionPlan":
        """Return the plan from what `flatten` made of it."""
        heads = len(offsets) // len(w)
        each = (tuple(offsets[i : i + heads]) for i in range(0, len(offsets), heads))
        branches = tuple(map(Branch, w, r, each))
        return cls(tuple(Chunk(*chunks[i : i + 6]) for i in range(0, len(chunks), 6)), branches, *others)


class HaloKV(NamedTuple):
    """Keys and values outside the chunks that their queries see: those of the segments that a chunk cuts.

    The prefix lies before the chunks (in a cache, or on other devices), the suffix after them (on other devices).

    Attributes:
        key, value: (B, G, P, D). The P slots are the branches' slots one after another; in each, slot j of head g holds
            its j-th kept token of that segment before (after) the chunk. Slots that a head lacks are never read.
        slots: number of slots of each branch.
    """

    key: Tensor
    value: Tensor
    slots: tuple[int, ...]

    def split(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the (B, slots, G, D) views of key and value for each branch."""
        begin = 0
        for size in self.slots:
            yield tuple(x[:, :, begin : begin + size].transpose(1, 2) for x in self[:2])
            begin += size


def _branch_calls(plan: AttentionPlan, keys: str = "chunk") -> Iterator[tuple[int, BranchCall]]:
    """Yield the branch's index and the backend's call for each chunk and branch.

    The first branch writes. Of the others the longest come first: on a GPU their few programs end late, beside those of
    the next branch.
    """
    order = (0, *range(len(plan.branches) - 1, 0, -1))
    overlaps = False
    for chunk in plan.chunks:
        for index in order if chunk.length else ():
            branch, is_own = plan.branches[index], keys == "chunk"
            is_first = is_own and index == 0 and branch.r == 1
            zeros = is_own and plan.zero_padding
            yield (
                index,
                BranchCall(
                    chunk, branch, keys, plan.is_causal and is_own, plan.scale, zeros, is_first, overlaps and is_own
                ),
            )
            overlaps = True


def _covers_all(x: Tensor, plan: AttentionPlan) -> bool:
    """Return True if the first branch writes every token once, so that no memory needs to be cleared."""
    return plan.branches[0].r == 1 and sum(c.batch * c.length for c in plan.chunks) == x.shape[0] * x.shape[1]


def _sum_dtype(x: Tensor, plan: AttentionPlan) -> torch.dtype:
    """Return the dtype of a token's sum over branches: at least float32, or half precision if that costs one rounding.

    It does if a token is in at most one branch after the first, on average. A float32 copy would be larger.
    """
    first, *others = plan.branches
    if first.r == 1 and sum(1 / branch.r for branch in others) <= 1:
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def _accumulator(x: Tensor, plan: AttentionPlan) -> Tensor:
    """Return a tensor like x in the dtype of the sum, zero unless the first branch writes everywhere."""
    make = torch.empty if _covers_all(x, plan) else torch.zeros
    return make(x.shape, dtype=_sum_dtype(x, plan), device=x.device)


def forward_chunks(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """Attend within the chunks.

    Args:
        query: (B, L, H, D). key, value: (B, L, G, D), same dtype.

    Returns:
        out (B, L, H, D) in the dtype of the sum (`_sum_dtype`) and lse (B, L, H) in at least float32; 0 and -inf for a
        query that sees no key.
    """
    out = _accumulator(query, plan)
    precise = torch.promote_types(query.dtype, torch.float32)
    lse = torch.full(out.shape[:3], -torch.inf, dtype=precise, device=out.device)
    for _, call in _branch_calls(plan):
        out, lse = BACKENDS[plan.backend].forward_branch(call, query, key, value, out, lse)
    return out, lse


def forward_halo(query: Tensor, out: Tensor, lse: Tensor, halo: HaloKV, plan: AttentionPlan, side: str) -> None:
    """Merge attention to the "prefix" or "suffix" into `out` and `lse` of `forward_chunks`, in place."""
    parts = list(halo.split())
    for index, call in _branch_calls(plan, side):
        BACKENDS[plan.backend].forward_branch(call, query, *parts[index], out, lse)


def backward_chunks(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: Tensor, lse: Tensor, plan: AttentionPlan
) -> Grads:
    """Return the gradients of `forward_chunks` for query, key and value, in the dtype of the sum.

    Args:
        grad_out: (B, L, H, D), contiguous. lse: the merged one.
        saved: the backend's `prepare_backward` of the merged out, in the query's dtype.
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
    """Return the gradients of the halo's key and value in `forward_halo`; add the query's to `grad_query`."""
    new = {"dtype": grad_query.dtype, "device": grad_query.device}
    grads = halo._replace(key=torch.zeros(halo.key.shape, **new), value=torch.zeros(halo.value.shape, **new))
    parts = list(zip(halo.split(), grads.split(), strict=True))
    for index, call in _branch_calls(plan, side):
        (key, value), (dk, dv) = parts[index]
        sums = (grad_query, dk, dv)
        BACKENDS[plan.backend].backward_branch(call, grad_out, query, key, value, saved, lse, sums)
    return grads[:2]


# torch.compile treats these operators as opaque, which avoids a graph break. A second copy of this file in one process
# (remote code beside the installed package) may be another version, so it registers them under a name of its own.
_namespace = next(
    name
    for name in ("longnet", *(f"longnet_{i}" for i in range(2, 1000)))
    if not hasattr(getattr(torch.ops, name), "dilated_attention")
)
_library = torch.library.Library(_namespace, "FRAGMENT")
_PLAN = "SymInt[] chunks, int[] w, int[] r, int[] offsets, bool is_causal, float scale, str backend, bool zero_padding"
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? halo_key, Tensor? halo_value"
_library.define(f"dilated_attention({_INPUTS}, SymInt[] slots, {_PLAN}) -> (Tensor, Tensor)")
_library.define(
    f"dilated_attention_backward(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, SymInt[] slots, {_PLAN}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_ops = getattr(torch.ops, _namespace)


def _check_prefix(plan: AttentionPlan, prefix: HaloKV | None) -> None:
    """Raise ValueError unless each branch has a slot for every token before the chunks: kernels would read beyond."""
    needed = [max(x) for x in zip(*(prefix_lengths(plan.branches, c.start) for c in plan.chunks), strict=True)]
    if prefix is None and any(needed):
        raise ValueError("a chunk that begins inside a segment needs the keys before it; give `prefix`.")
    for branch, least, given in zip(plan.branches, needed, () if prefix is None else prefix.slots, strict=False):
        if given < least:
            raise ValueError(
                f"branch ({branch.w}, {branch.r}) has {given} slots in `prefix`; the chunks need {least}. The order is "
                "that of `make_branches`."
            )


def _forward(query, key, value, halo_key, halo_value, slots, *plan):
    plan = AttentionPlan.unflatten(*plan)
    prefix = None if halo_key is None else HaloKV(halo_key, halo_value, slots)
    _check_prefix(plan, prefix)
    out, lse = forward_chunks(query, key, value, plan)
    if prefix is not None:
        forward_halo(query, out, lse, prefix, plan, "prefix")
    return out.to(query.dtype), lse


def _backward(grad_out, query, key, value, halo_key, halo_value, out, lse, slots, *plan):
    plan = AttentionPlan.unflatten(*plan)
    grad_out, out, lse = (x.contiguous() for x in (grad_out, out, lse))  # under vmap they may be expanded
    saved = BACKENDS[plan.backend].prepare_backward(out, grad_out)
    dq, dk, dv = backward_chunks(grad_out, query, key, value, saved, lse, plan)
    halo_grads = query.new_empty(0), query.new_empty(0)
    if halo_key is not None:
        halo = HaloKV(halo_key, halo_value, slots)
        halo_grads = backward_halo(grad_out, query, saved, lse, halo, dq, plan, "prefix")
    return tuple(x.to(query.dtype) for x in (dq, dk, dv, *halo_grads))


def _fake_forward(query, *others):
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(query.shape), lse


def _fake_backward(grad_out, query, key, value, halo_key, halo_value, *others):
    halo = [query.new_empty(0 if x is None else x.shape) for x in (halo_key, halo_value)]
    return *(x.new_empty(x.shape) for x in (query, key, value)), *halo


for _name, _run, _fake in (
    ("dilated_attention", _forward, _fake_forward),
    ("dilated_attention_backward", _backward, _fake_backward),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_namespace}::{_name}", _fake, lib=_library)


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Move vmap's dimension in front of the batch and merge both: (size * B, ...)."""
    if x is None:
        return None
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _fold_plan(plan: tuple, batch: int, size: int) -> tuple:
    """Repeat the chunks of a batch for each of the `size` batches that `_fold` merged."""
    chunks = [number + (i * batch if place % 6 < 2 else 0) for i in range(size) for place, number in enumerate(plan[0])]
    return chunks, *plan[1:]


class _DilatedAttention(torch.autograd.Function):
    """The out and lse of the chunks and their prefix; lse is not differentiable."""

    @staticmethod
    def forward(query, key, value, halo_key, halo_value, slots, plan):
        return _ops.dilated_attention(query, key, value, halo_key, halo_value, slots, *plan)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.slots, ctx.plan = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad_out, _):
        # A compiled graph is never differentiated again.
        function = _DilatedAttentionBackward
        run = function.forward if torch.compiler.is_compiling() else function.apply
        grads = run(grad_out.contiguous(), *ctx.saved_tensors, ctx.slots, ctx.plan)
        needed = ctx.needs_input_grad
        return *(x if needed[i] else None for i, x in enumerate(grads)), None, None

    @staticmethod
    def vmap(info, dims, *inputs):
        *tensors, slots, plan = inputs
        size = info.batch_size
        tensors = [_fold(x, d, size) for x, d in zip(tensors, dims, strict=False)]
        plan = _fold_plan(plan, tensors[0].shape[0] // size, size)
        outputs = _DilatedAttention.apply(*tensors, slots, plan)
        return tuple(x.unflatten(0, (size, -1)) for x in outputs), (0, 0)


class _DilatedAttentionBackward(torch.autograd.Function):
    """The gradients as a function of their own, so that a second derivative is refused by name."""

    @staticmethod
    def forward(grad_out, query, key, value, halo_key, halo_value, out, lse, slots, plan):
        return _ops.dilated_attention_backward(
            grad_out, query, key, value, halo_key, halo_value, out, lse, slots, *plan
        )

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
        *tensors, slots, plan = inputs
        size = info.batch_size
        tensors = [_fold(x, d, size) for x, d in zip(tensors, dims, strict=False)]
        plan = _fold_plan(plan, tensors[0].shape[0] // size, size)
        grads = _DilatedAttentionBackward.apply(*tensors, slots, plan)
        # Without a halo its gradients are empty and have no batch.
        dims = tuple(None if x.dim() == 1 else 0 for x in grads)
        return tuple(x if x.dim() == 1 else x.unflatten(0, (size, -1)) for x in grads), dims


# PyTorch reads the signature in every call, and inspecting it takes longer than launching a kernel.
for _function in (_DilatedAttention, _DilatedAttentionBackward):
    _function.forward.__signature__ = inspect.signature(_function.forward)


def attend_chunks(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, prefix: HaloKV | None = None
) -> Tensor:
    """Dilated attention of chunks with their prefixes by a fast backend: training, prefill and packed documents.

    Args:
        query: (B, L, H, D). key, value: (B, L, G, D), same dtype, positions already applied.
        prefix: keys and values before the chunks, at least `prefix_lengths` slots for every chunk's start. Required if
            a chunk begins inside a segment.

    Returns:
        (B, L, H, D) in the query's dtype. Differentiable in q, k, v and the prefix, once.
    """
    key_value = (None, None) if prefix is None else prefix[:2]
    tensors = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, *key_value)]
    return _DilatedAttention.apply(*tensors, [] if prefix is None else prefix.slots, plan.flatten())[0]
