"""Attention and loss of a sequence that is sharded over a process group.

Each layer exchanges halo keys and values in one all-to-all. The backward pass returns their gradients in another, and
the owner sums them. All-gathers within sub-groups would send twice as much in causal layers and reduce only inter-node
traffic (benchmarks/README.md). Per batch row and head a device receives fewer than sum_i ceil(w_i / r_i) keys if
causal, twice that if bidirectional.

Letters: B batch, L tokens of the whole sequence, n of a shard, C shards, H query heads, G key/value heads, D head
dimension, S keys sent, R keys received.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .attention_autograd import AttentionPlan, backward_chunks, backward_halo, forward_chunks, forward_halo
from .backends import BACKENDS
from .sharding_plan import Exchange


class GroupExchange(NamedTuple):
    """The exchange and the process group that performs it."""

    group: dist.ProcessGroup
    exchange: Exchange

    def all_to_all(self, x: Tensor, is_backward: bool = False) -> tuple[Tensor, Callable[[], object]]:
        """Send (S, ...), return the received (R, ...) and a function that waits for it; the reverse in backward."""
        counts = self.exchange.receive_counts, self.exchange.send_counts
        received_counts, sent_counts = counts[::-1] if is_backward else counts
        received = x.new_empty(sum(received_counts), *x.shape[1:])
        if not self.exchange.is_needed:
            return received, lambda: None
        work = dist.all_to_all_single(received, x, received_counts, sent_counts, group=self.group, async_op=True)
        return received, work.wait


class _ShardedAttention(torch.autograd.Function):
    """The attention output of a shard's tokens over all branches.

    The exchange overlaps with attention within the shard, in forward and in backward. The backward of each part takes
    the merged out and lse, as in `attention_autograd`.
    """

    @staticmethod
    def forward(ctx, query, key, value, plan, sharded):
        ctx.plan, ctx.sharded, exchange = plan, sharded, sharded.exchange
        sent = torch.stack([x.flatten(0, 2).index_select(0, exchange.send) for x in (key, value)], 1)  # (S, 2, D)
        received, wait = sharded.all_to_all(sent)
        out, lse = forward_chunks(query, key, value, plan)
        wait()
        slots = received.new_empty(sum(exchange.side_slots()), *received.shape[1:])  # the others are never read
        slots.index_copy_(0, exchange.slots, received)
        for side, halo in exchange.split(slots):
            forward_halo(query, out, lse, halo, plan, side)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, slots)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        query, key, value, out, lse, slots = ctx.saved_tensors
        plan, sharded, exchange = ctx.plan, ctx.sharded, ctx.sharded.exchange
        grad_out = grad_out.contiguous()
        saved = BACKENDS[plan.backend].prepare_backward(out, grad_out)
        grad_query = torch.zeros_like(out, dtype=lse.dtype)
        parts = []
        for side, halo in exchange.split(slots):
            grads = backward_halo(grad_out, query, saved, lse, halo, grad_query, plan, side)
            parts.append(torch.stack(grads, -2).flatten(0, 2))  # (B * G * P, 2, D)
        # Nothing is lost in the keys' dtype: a halo key's gradient comes from one kernel call, already in that dtype.
        sent = torch.cat(parts).index_select(0, exchange.slots).to(key.dtype)
        received, wait = sharded.all_to_all(sent, is_backward=True)
        own_query, *shared = backward_chunks(grad_out, query, key, value, saved, lse, plan)
        grad_query += own_query
        wait()
        for i, grad in enumerate(shared):
            total = grad.to(lse.dtype).flatten(0, 2)  # many ranks may add to one key
            total.index_add_(0, exchange.send, received[:, i].to(total.dtype))
            shared[i] = total.view(key.shape).to(key.dtype)
        return grad_query.to(query.dtype), *shared, None, None


@torch.compiler.disable
def attend_sharded(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, sharded: GroupExchange) -> Tensor:
    """Compute dilated attention of this rank's part of a sequence. Every rank must call it, and run its backward.

    Args:
        query: (B, n, H, D). key, value: (B, n, G, D), same dtype, positions already applied; n may be 0.
        plan: its chunks are this rank's, with `total` the length of the whole sequence.

    Returns:
        (B, n, H, D) in the query's dtype. Differentiable once; the gradients of key and value include the
        contributions of other ranks, which are summed in at least float32.
    """
    query, key, value = (x.contiguous() for x in (query, key, value))
    return _ShardedAttention.apply(query, key, value, plan, sharded)


def group_loss(total: Tensor, count: Tensor, num_items: Tensor | int | None, group) -> Tensor:
    """Return the loss of the group's sequences, on every rank.

    With S and T the group's sum of losses and number of targets, the value is S / T, or S / (C * num_items) for
    Trainer, which multiplies by the number of processes. The gradient is scaled so that its average over the ranks
    (DDP, FSDP2) equals the gradient of one process.

    Args:
        total, count: scalars, this rank's sum of losses (differentiable) and number of targets.
    """
    size = dist.get_world_size(group)
    summed = torch.stack([total.detach().double(), count.double()])
    dist.all_reduce(summed, group=group)
    if num_items is None:
        own, value = total * (size / summed[1]).to(total.dtype), summed[0] / summed[1]
    else:
        num_items = num_items.to(total.device) if isinstance(num_items, Tensor) else num_items
        own, value = total / num_items, summed[0] / (size * num_items)
    # The value is the group's loss, the gradient that of `own`.
    return own + (value.to(total.dtype) - own).detach()


def gather_sequence(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Concatenate logits or hidden states: (B, n, ...) of each rank -> (B, L, ...) on every rank, detached.

    Every rank of the group must call it.
    """
    sizes = [int(n) for n in _all_gather(torch.tensor(x.shape[1], device=x.device), group)]
    padded = x.new_zeros(x.shape[0], max(sizes), *x.shape[2:])
    padded[:, : x.shape[1]] = x.detach()
    return torch.cat([part[:, :n] for part, n in zip(_all_gather(padded, group), sizes, strict=True)], 1)


def _all_gather(x: Tensor, group) -> list[Tensor]:
    """Return every rank's tensor; all have one shape."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return parts


def _checksum(x: Tensor) -> Tensor:
    """Return a () int64 checksum of a tensor's integers or float bits; each position has its own weight."""
    if x.is_floating_point():
        x = x.detach().contiguous().view(getattr(torch, f"int{8 * x.element_size()}"))
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for i, part in enumerate(x.flatten().split(2**20)):  # weights and products take 8 bytes per number
        places = torch.arange(i * 2**20, i * 2**20 + len(part), device=x.device)
        weights = (places + 1) * -7046029254386353131  # 2^64 / golden ratio, as in SplitMix64
        # Mixed: changes in several places do not cancel. Odd: no change in one place is lost modulo 2^64.
        total += (part.long() * ((weights ^ (weights >> 32)) | 1)).sum()
    return total


def check_same_batch(group, **batch: Tensor | None) -> None:
    """Raise ValueError on every rank unless all have the same arguments of `forward` (None: not given), by name."""
    device = next(x.device for x in batch.values() if x is not None)
    own = torch.zeros(len(batch), 2, dtype=torch.int64, device=device)
    for row, x in zip(own, batch.values(), strict=True):
        if x is not None:
            row[0], row[1] = _checksum(torch.tensor([x.dim(), *x.shape])), _checksum(x)
    given = torch.stack(_all_gather(own, group))  # (C, tensors, 2)
    differs = (given != given[0]).any(2).any(0).tolist()
    if names := [name for name, unlike in zip(batch, differs, strict=True) if unlike]:
        raise ValueError(
            f"the ranks of a sequence group were given different batches: they differ in {', '.join(names)} (shape or "
            "content, or only some were given it). All must get the same whole sequences, which the model cuts itself; "
            "with an IterableDataset set dispatch_batches=False (Trainer: accelerator_config)."
        )
