"""What every layer's attention needs from a batch, made once in a forward pass.

Letters: B batch, L tokens, H query heads, G key/value heads, D head dimension, P cached slots (0 without a cache).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_autograd import AttentionPlan, HaloKV, attend_chunks
from .branches import Branch, make_branches
from .cache_longnet import DecodingStep, LongNetCache, cache_pattern
from .configuration_longnet import LongNetConfig
from .dilated_attention import autocast_dtype
from .packing import Packing, pack
from .positions import Rotary, make_rotary
from .reference import count_branches, count_zero_padding, dense_attention
from .sharding import GroupExchange, attend_sharded
from .sharding_plan import Shard, pack_shard, plan_exchange


@dataclass(eq=False)
class AttentionContext:
    """One forward pass as its attention layers see it.

    Attributes:
        plan: chunks, branches and backend of the op.
        rotary: factors of queries and keys; None if the model applies positions itself, or has none.
        cache: the bounded cache to read and extend.
        step: set in a decoding step of one token per batch row.
        sharded: set if other processes hold parts of the same sequences.
        counts: (B or 1, G, L, P + L), in how many branches a query sees each cached slot and each key of the batch;
            dense reference only.
        zero_keys: (B, G, L), the zero keys of the released implementation per query; dense reference only.
    """

    plan: AttentionPlan
    rotary: Rotary | None = None
    cache: LongNetCache | None = None
    step: DecodingStep | None = None
    sharded: GroupExchange | None = None
    counts: Tensor | None = None
    zero_keys: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor | None]:
        """Attend in one layer, and extend its cache.

        Args:
            query: (B, L, H, D). key, value: (B, L, G, D), positions applied.

        Returns:
            (B, L, H, D), and the (B, H, L, P + L) attention weights under the dense reference, else None.
        """
        layer = None if self.cache is None else self.cache.layers[layer_idx]
        if self.step is not None:
            return layer.decode(query, key, value, self.step, self.plan.scale), None
        if self.sharded is not None:
            return attend_sharded(query, key, value, self.plan, self.sharded), None
        prefix = None if layer is None else layer.prefix(key)
        if self.plan.backend == "eager":
            out, weights = self._attend_dense(query, key, value, prefix)
        else:
            out, weights = attend_chunks(query, key, value, self.plan, prefix), None
        if layer is not None:
            layer.update(key, value, self.plan.chunks)
        return out, weights

    def _attend_dense(self, query: Tensor, key: Tensor, value: Tensor, prefix: HaloKV | None) -> tuple[Tensor, Tensor]:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if prefix is not None:
            key, value = torch.cat([prefix.key, key], 2), torch.cat([prefix.value, value], 2)
        out, weights, _ = dense_attention(query, key, value, self.counts, self.plan.scale, self.zero_keys)
        return out.transpose(1, 2), weights


def config_branches(config: LongNetConfig) -> tuple[Branch, ...]:
    """Return the branches of a model of this config."""
    return make_branches(*cache_pattern(config))


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
    starts, columns = (None, 0) if cache is None else (cache.lengths or None, cache.get_seq_length())
    packing = pack(batch, length, embeds.device, attention_mask, position_ids, starts, columns)
    rotary = make_rotary(config, packing.positions, autocast_dtype(embeds))
    context = AttentionContext(_plan(config, packing, backend), rotary, cache)
    if backend == "eager":
        context.counts = _count_keys(context.plan, packing, cache)
        context.zero_keys = count_zero_keys(config, packing, embeds) if config.attend_zero_padding else None
    elif cache is not None and cache.can_step(packing.chunks, length):
        context.step = cache.step(config.num_attention_heads)
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
            'the dense reference, attn_implementation="eager" (or what backend "auto" fell back to), cannot share a '
            'sequence among processes; use attn_implementation="sdpa".'
        )
    batch, device = embeds.shape[0], embeds.device
    chunks, packing = pack_shard(shard, batch, device, attention_mask, position_ids)
    plan, rotary = _plan(config, packing, backend), make_rotary(config, packing.positions, autocast_dtype(embeds))
    # A group in the cache of `plan_exchange` would outlive its destruction.
    exchange = plan_exchange(shard._replace(group=None), chunks, plan.branches, plan.is_causal, batch, device)
    return AttentionContext(plan, rotary, sharded=GroupExchange(shard.group, exchange))


def _plan(config: LongNetConfig, packing: Packing, backend: str) -> AttentionPlan:
    options = config.is_causal, config.head_dim**-0.5, backend, config.attend_zero_padding
    return AttentionPlan(packing.chunks, config_branches(config), *options)


def _count_keys(plan: AttentionPlan, packing: Packing, cache: LongNetCache | None) -> Tensor:
    """Return `AttentionContext.counts`."""
    _, positions, documents = packing
    counts = count_branches(plan.branches, positions, positions, documents, documents, plan.is_causal)
    if cache is None or not any(cache.lengths):
        return counts
    seen = cache.seen_slots(positions.expand(len(cache.lengths), -1))
    if documents is not None:
        seen = seen & (documents >= 0)[:, None, :, None]
    return torch.cat([seen, counts.expand(len(seen), -1, -1, -1)], -1)


def count_zero_keys(config: LongNetConfig, packing: Packing, embeds: Tensor) -> Tensor:
    """Return (B, G, L): the zero keys of the released implementation that each query attends to."""
    result = torch.zeros(len(embeds), config.num_key_value_heads, embeds.shape[1], dtype=torch.int64)
    for first, last, begin, end, *_ in packing.chunks:
        result[first:last, :, begin:end] = count_zero_padding(config_branches(config), end - begin)
    return result.to(embeds.device)
