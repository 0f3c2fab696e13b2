"""A decoding step that a program can hold: for torch.export, ONNX and CUDA graphs.

`LongNetCache` counts tokens in Python numbers, which a traced program would freeze. Here the cache is tensors that go
in and come out, each branch at its full size, so that no shape ever changes.

Letters: B batch, H query heads, G key/value heads, D head dimension, P slots of a layer, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .cache_longnet import LongNetCache, LongNetCacheLayer, SlotCounts, tabulate_slots
from .dilated_attention import autocast_dtype
from .modeling_longnet import LongNetForCausalLM, check_shape
from .positions import Rotary, make_rotary


class ExportableDecoder(nn.Module):
    """One token per batch row and the state before it -> the next token's logits and the state after it.

    A state is the tokens seen by each row, (B,) int64, then the keys and the values of each layer, (B, G, P, D). Its
    size is the cache's bound, `P = sum_i ceil(w_i / r_i)`, from the first token on, and enough for any number of them.

    Args:
        model: in eval mode.

    Raises:
        ValueError: not a causal language model, or one that is training.

    Example:
        >>> decode = ExportableDecoder(model)
        >>> state = decode.state(cache=model(prompt, use_cache=True).past_key_values)  # or decode.state(batch_size=1)
        >>> program = torch.export.export(decode, (token, *state)).module()  # token: (B, 1)
        >>> logits, *state = program(token, *state)
    """

    def __init__(self, model: LongNetForCausalLM):
        super().__init__()
        # Compared by name: remote code has a class of its own.
        names = {base.__name__ for base in type(model).__mro__}
        if "LongNetForCausalLM" not in names or not model.config.is_causal or model.training:
            raise ValueError(
                f"an exportable decoder needs a LongNetForCausalLM with is_causal=True, in eval mode; got a "
                f"{type(model).__name__}{' that is training' if model.training else ''}."
            )
        self.model = model
        self.eval()
        self.layers = LongNetCache(model.config).layers  # which stay empty: they know the branches
        self._count_slots()

    def _count_slots(self) -> None:
        heads, device = self.model.config.num_attention_heads, self.model.device
        kinds = {layer.branches: layer for layer in self.layers}
        self.slots = {branches: _Slots(layer, heads, device) for branches, layer in kinds.items()}

    def _apply(self, *args, **kwargs):
        """Follow the model to another device."""
        super()._apply(*args, **kwargs)
        self._count_slots()
        return self

    def state(self, batch_size: int | None = None, cache: LongNetCache | None = None) -> tuple[Tensor, ...]:
        """Return the state before the first token of `batch_size` rows (1), or a copy of what a cache holds.

        Raises:
            ValueError: the cache does not fit the model.
        """
        config, weight = self.model.config, self.model.lm_head.weight
        if cache is not None:
            self.model.model.check_cache(cache, batch_size or len(getattr(cache, "lengths", ())))
        if cache is None or not cache.lengths:
            shapes = [(batch_size or 1, config.num_key_value_heads, n, config.head_dim) for n in self._sizes()]
            return torch.zeros(batch_size or 1, dtype=torch.int64, device=weight.device), *map(weight.new_zeros, shapes)
        state = [torch.tensor(cache.lengths, device=weight.device)]
        for layer in cache.layers:
            sizes = layer.slots(layer.capacity), self.slots[layer.branches].sizes
            for x in (layer.keys, layer.values):
                whole = x.new_zeros(*x.shape[:2], sum(sizes[1]), x.shape[3])
                for part, place in zip(*(y.split(n, 2) for y, n in zip((x, whole), sizes, strict=True)), strict=True):
                    place[:, :, : part.shape[2]] = part
                state.append(whole.to(weight.device))
        return tuple(state)

    def _sizes(self) -> list[int]:
        """Return P of the keys and the values of each layer."""
        return [sum(self.slots[layer.branches].sizes) for layer in self.layers for _ in range(2)]

    def forward(self, input_ids: Tensor, lengths: Tensor, *slots: Tensor) -> tuple[Tensor, ...]:
        """Return the (B, 1, V) logits after one more token (B, 1) of each row, and the next state.

        Raises:
            ValueError: tensors that are no state of this model and batch.
        """
        config, batch = self.model.config, lengths.shape[0]
        check_shape("input_ids", input_ids, batch, 1)
        expected = self._sizes()
        if len(slots) != len(expected):
            raise ValueError(f"a state has {1 + len(expected)} tensors; got {1 + len(slots)}.")
        for number, (x, size) in enumerate(zip(slots, expected, strict=True), 1):
            check_shape(f"state[{number}]", x, batch, config.num_key_value_heads, size, config.head_dim)
        backbone = self.model.model
        embeds = backbone.embed(input_ids)
        rotary = make_rotary(config, lengths[:, None], autocast_dtype(embeds))
        steps = {branches: slots.step(lengths) for branches, slots in self.slots.items()}
        context = _StepContext(rotary, [steps[layer.branches] for layer in self.layers], list(slots))
        logits = self.model.lm_head(backbone.encode(embeds, context))
        return logits, lengths + 1, *context.slots


class _Slots:
    """The slots of a layer's branches at their full size."""

    def __init__(self, layer: LongNetCacheLayer, num_heads: int, device: torch.device):
        self.counts = SlotCounts(layer.branches, num_heads, device)
        self.sizes = layer.slots(layer.longest)
        _, self.branch, self.number = tabulate_slots(self.sizes, device)

    def step(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return which slots the next token of each row writes, (B, G, P, 1), and sees, (B, H, 1, P)."""
        positions = lengths[:, None]
        own, (_, last) = self.counts.own_slot(positions), self.counts.seen(positions, positions + 1)
        written = own[..., self.branch] == self.number
        return written.transpose(2, 3), self.number < last[..., self.branch]


@dataclass(eq=False)
class _StepContext:
    """What attention layers read of an `AttentionContext`, in one decoding step."""

    rotary: Rotary | None
    steps: list[tuple[Tensor, Tensor]]
    slots: list[Tensor]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, None]:
        """Store one token and attend to it and the slots its heads see: (B, 1, heads, D) -> (B, 1, H, D)."""
        written, seen = self.steps[layer_idx]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        for i, new in enumerate((key, value), 2 * layer_idx):
            self.slots[i] = torch.where(written, new, self.slots[i])
        keys, values = self.slots[2 * layer_idx : 2 * layer_idx + 2]
        shares_heads = query.shape[1] > keys.shape[1]
        scale = query.shape[-1] ** -0.5
        out = scaled_dot_product_attention(query, keys, values, seen, scale=scale, enable_gqa=shares_heads)
        return out.masked_fill(~seen.any(-1, keepdim=True), 0.0).transpose(1, 2), None
