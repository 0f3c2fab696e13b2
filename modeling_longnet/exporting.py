"""A decoding step that a program can hold: for torch.export, ONNX and CUDA graphs.

`LongNetCache` counts tokens in Python numbers, which a traced program would freeze. Here the cache is tensors that go
in and come out, each branch at its full size, so that no shape ever changes.

Letters: B batch, H query heads, G key/value heads, D head dimension, P slots of a layer, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .cache_longnet import LongNetCache, SlotCounts
from .dilated_attention import autocast_dtype
from .modeling_longnet import LongNetForCausalLM, check_shape
from .positions import Rotary, make_rotary


class ExportableDecoder(nn.Module):
    """One token per batch row and the state before it -> the next token's logits and the state after it.

    A state is the tokens seen by each row, (B,) int64, then the keys and the values of each layer, (B, G, P, D). Its
    size is the cache's bound, `P = sum_i ceil(w_i / r_i)`, from the first token on, and enough for any number of them.

    Args:
        model: in eval mode, on the device where the program will run.

    Example:
        >>> decode = ExportableDecoder(model)
        >>> state = decode.state(cache=model(prompt, use_cache=True).past_key_values)  # or decode.state(batch_size=1)
        >>> program = torch.export.export(decode, (token, *state)).module()  # token: (B, 1)
        >>> logits, *state = program(token, *state)
    """

    def __init__(self, model: LongNetForCausalLM):
        super().__init__()
        self.model = model
        self.train(model.training)
        self.cache = LongNetCache(model.config)  # stays empty: it knows the branches of each layer
        kinds = dict.fromkeys(layer.branches for layer in self.cache.layers)
        self.slots = {branches: _Slots(branches, model.config.num_attention_heads, model.device) for branches in kinds}

    def state(self, batch_size: int = 1, cache: LongNetCache | None = None) -> tuple[Tensor, ...]:
        """Return the state before the first token, or a copy of what a cache holds; ValueError if it does not fit."""
        config, weight = self.model.config, self.model.lm_head.weight
        if cache is None or not cache.lengths:
            shape = batch_size, config.num_key_value_heads, config.head_dim
            keys = [weight.new_zeros(*shape[:2], slots.count, shape[2]) for slots in self._layers() for _ in range(2)]
            return torch.zeros(batch_size, dtype=torch.int64, device=weight.device), *keys
        cache.check(config, len(cache.lengths))
        state = [torch.tensor(cache.lengths, device=weight.device)]
        for layer, slots in zip(cache.layers, self._layers(), strict=True):
            sizes = layer.slots(layer.capacity)
            for x in (layer.keys, layer.values):
                whole = x.new_zeros(*x.shape[:2], slots.count, x.shape[3])
                for part, place in zip(x.split(sizes, 2), whole.split(slots.sizes, 2), strict=True):
                    place[:, :, : part.shape[2]] = part
                state.append(whole.to(weight.device))
        return tuple(state)

    def _layers(self):
        return [self.slots[layer.branches] for layer in self.cache.layers]

    def forward(self, input_ids: Tensor, lengths: Tensor, *slots: Tensor) -> tuple[Tensor, ...]:
        """Return the (B, 1, V) logits after one more token (B, 1) of each row, and the next state."""
        check_shape("input_ids", input_ids, len(lengths), 1)
        backbone, config = self.model.model, self.model.config
        embeds = backbone.embed(input_ids)
        rotary = make_rotary(config, lengths[:, None], autocast_dtype(embeds))
        steps = {branches: slots.step(lengths) for branches, slots in self.slots.items()}
        context = _StepContext(rotary, [steps[layer.branches] for layer in self.cache.layers], list(slots))
        logits = self.model.lm_head(backbone.encode(embeds, context))
        return logits, lengths + 1, *context.slots


class _Slots:
    """The slots of a layer's branches at their full size."""

    def __init__(self, branches, num_heads: int, device: torch.device):
        self.counts = SlotCounts(branches, num_heads, device)
        self.sizes = [-(-b.w // b.r) for b in branches]
        self.count = sum(self.sizes)
        self.branch = torch.arange(len(branches)).repeat_interleave(torch.tensor(self.sizes)).to(device)
        self.number = torch.cat([torch.arange(n, device=device) for n in self.sizes])

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
