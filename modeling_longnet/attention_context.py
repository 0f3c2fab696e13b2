"""What the attention of every layer needs to know about a batch, computed once per forward pass.

Letters: B batch, L tokens, H query heads, G key/value heads, D head dimension, P cached slots (0 without a cache).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_autograd import AttentionPlan, HaloKV, attend_chunks
from .branches import Branch
from .cache_longnet import DecodingStep, LongNetCache, cache_pattern
from .configuration_longnet import LongNetConfig
from .dilated_attention import autocast_dtype
from .packing import Packing, pack
from .pattern import layer_branches
from .positions import Rotary, make_rotary
from .reference import count_branches, count_zero_padding, dense_attention
from .sharding import GroupExchange, attend_sharded
from .sharding_plan import Shard, pack_shard, plan_exchange


@dataclass(eq=False)
class AttentionContext:
    """One forward pass as its attention layers see it.

    Attributes:
        plans: chunks, branches and backend of the op in each layer; one plan if all layers have the same.
        rotary: factors of queries and keys; None if the model applies positions itself, or has none.
        cache: the bounded cache to read and extend.
        steps: one per layer in a decoding step of one token per batch row, else empty.
        sharded: one per plan if other processes hold parts of the same sequences, else empty.
        counts: one per plan, (B or 1, G or H, L, P + L), the number of branches in which a query sees each cached
            slot and each key of the batch; dense reference only.
        zero_keys: (B, G, L), the number of zero keys of the released implementation per query; dense reference only.
    """

    plans: tuple[AttentionPlan, ...]
    rotary: Rotary | None = None
    cache: LongNetCache | None = None
    steps: tuple[DecodingStep, ...] = ()
    sharded: tuple[GroupExchange, ...] = ()
    counts: tuple[Tensor, ...] = ()
    zero_keys: Tensor | None = None

    def of_layer(self, of_plans: tuple, layer_idx: int):
        """Return a layer's entry of a tuple that has one entry per plan."""
        return of_plans[layer_idx if len(of_plans) > 1 else 0]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor | None]:
        """Attend in one layer, and extend its cache.

        Args:
            query: (B, L, H, D). key, value: (B, L, G, D), positions applied.

        Returns:
            (B, L, H, D), and the (B, H, L, P + L) attention weights under the dense reference, else None.
        """
        layer = None if self.cache is None else self.cache.layers[layer_idx]
        plan = self.of_layer(self.plans, layer_idx)
        if self.steps:
            return layer.decode(query, key, value, self.steps[layer_idx], plan.scale), None
        if self.sharded:
            return attend_sharded(query, key, value, plan, self.of_layer(self.sharded, layer_idx)), None
        prefix = None if layer is None else layer.prefix(key)
        if plan.backend == "eager":
            counts = self.of_layer(self.counts, layer_idx)
            out, weights = self._attend_dense(query, key, value, prefix, counts, plan.scale)
        else:
            out, weights = attend_chunks(query, key, value, plan, prefix), None
        if layer is not None:
            layer.update(key, value, plan.chunks)
        return out, weights

    def _attend_dense(self, query, key, value, prefix: HaloKV | None, counts: Tensor, scale: float):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if prefix is not None:
            key, value = torch.cat([prefix.key, key], 2), torch.cat([prefix.value, value], 2)
        out, weights, _ = dense_attention(query, key, value, counts, scale, self.zero_keys)
        return out.transpose(1, 2), weights


def plan_branches(config: LongNetConfig) -> tuple[tuple[Branch, ...], ...]:
    """Return the branches of each layer of a model of this config; one entry if all layers have the same."""
    layers = layer_branches(*cache_pattern(config), config.num_hidden_layers)
    return layers if len(set(layers)) > 1 else layers[:1]


def make_context(
    config: LongNetConfig,
    embeds: Tensor,
    backend: str,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: LongNetCache | None = None,
) -> AttentionContext:
    """Return the context of a batch that one process computes.

    Args:
        embeds: (B, L, E), which gives the sizes, the dtype and the device.
        attention_mask, position_ids: see `packing.pack`.
        cache: a cache of this config, checked against the batch.
    """
    batch, length, _ = embeds.shape
    starts, columns = (None, 0) if cache is None else (cache.lengths or [0] * batch, cache.get_seq_length())
    packing = pack(batch, length, embeds.device, attention_mask, position_ids, starts, columns)
    if backend == "eager" and isinstance(packing.chunks, Tensor) and not torch.compiler.is_exporting():
        # Dense attention reads the documents only: make them depend on the operator, or a graph drops its checks.
        is_checked = packing.chunks.sum().to(embeds.device) >= 0
        packing = packing._replace(documents=packing.documents.where(is_checked, -1))
    rotary = make_rotary(config, packing.positions, autocast_dtype(embeds))
    context = AttentionContext(_plans(config, packing, backend), rotary, cache)
    if backend == "eager":
        context.counts = tuple(_count_keys(plan, packing, cache, i) for i, plan in enumerate(context.plans))
        context.zero_keys = count_zero_keys(config, packing, embeds) if config.attend_zero_padding else None
    elif cache is not None and cache.can_step(packing.chunks, length):
        context.steps = cache.steps()
    return context


def make_sharded_context(
    config: LongNetConfig,
    embeds: Tensor,
    backend: str,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    shard: Shard,
) -> AttentionContext:
    """Return the context of this rank's part of a batch; the dense reference raises ValueError.

    Args:
        embeds: (B, n, E), this rank's part. attention_mask, position_ids: of the whole batch, see `packing.pack`.
    """
    if backend == "eager":
        raise ValueError(
            'the dense reference (attn_implementation="eager", or "sdpa" where no fast backend runs) cannot shard a '
            'sequence; use attn_implementation="sdpa" and a dtype and device on which a fast backend runs.'
        )
    batch, device = embeds.shape[0], embeds.device
    chunks, packing = pack_shard(shard, batch, device, attention_mask, position_ids)
    plans, rotary = _plans(config, packing, backend), make_rotary(config, packing.positions, autocast_dtype(embeds))
    # `plan_exchange` caches its arguments: a process group among them would outlive its destruction.
    local = shard._replace(group=None)
    exchanges = (plan_exchange(local, chunks, x.branches, x.is_causal, batch, device) for x in plans)
    return AttentionContext(plans, rotary, sharded=tuple(GroupExchange(shard.group, x) for x in exchanges))


def _plans(config: LongNetConfig, packing: Packing, backend: str) -> tuple[AttentionPlan, ...]:
    options = config.is_causal, config.head_dim**-0.5, backend, config.attend_zero_padding
    return tuple(AttentionPlan(packing.chunks, branches, *options) for branches in plan_branches(config))


def _count_keys(plan: AttentionPlan, packing: Packing, cache: LongNetCache | None, layer_idx: int) -> Tensor:
    """Return a layer's `AttentionContext.counts`."""
    _, positions, documents = packing
    counts = count_branches(plan.branches, positions, positions, documents, documents, plan.is_causal)
    if cache is None or not any(cache.lengths):
        return counts
    seen = cache.seen_slots(positions.expand(len(cache.lengths), -1), layer_idx)
    counts = counts.repeat_interleave(seen.shape[1] // counts.shape[1], 1)
    if documents is not None:
        seen = seen & (documents >= 0)[:, None, :, None]
    return torch.cat([seen, counts.expand(len(seen), -1, -1, -1)], -1)


def count_zero_keys(config: LongNetConfig, packing: Packing, embeds: Tensor) -> Tensor:
    """Return (B, G, L): the zero keys of the released implementation that each query attends to."""
    result = torch.zeros(len(embeds), config.num_key_value_heads, embeds.shape[1], dtype=torch.int64)
    chunks = packing.chunks
    for first, last, begin, end, *_ in chunks.tolist() if isinstance(chunks, Tensor) else chunks:
        result[first:last, :, begin:end] = count_zero_padding(plan_branches(config)[0], end - begin)
    return result.to(embeds.device)
