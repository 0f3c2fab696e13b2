"""The bounded cache: it keeps the current segment of each branch, which is all that later tokens can see.

After t tokens a layer holds at most `sum_i ceil(min(w_i, t) / r_i)` keys and values per head, not t. Memory grows by
doubling, from 64 tokens on: it is at most twice that, and never above `sum_i ceil(w_i / r_i)`. A branch stores the j-th
kept token of the current segment in slot j; a new segment begins again at slot 0. A window of W tokens stores position
p in slot `p mod W`.

Letters: B batch, L new columns, H query heads, G key/value heads, D head dimension, P slots in all, n branches.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin

from .attention_autograd import HaloKV
from .backend_strided import strided_view
from .branches import Branch, Chunk, chunk_slices
from .cache_file import cache_to_tensors, load_cache_tensors
from .configuration_longnet import LongNetConfig
from .packing import cut_chunks
from .pattern import Pattern, layer_branches


class _Record(NamedTuple):
    """What `crop` needs to undo the last columns of some updates."""

    before: dict[str, object]  # the layer's attributes before the first of them
    updates: list[tuple[Tensor, Tensor, tuple[Chunk, ...]]]  # keys, values and chunks, as `update` takes them


class DecodingStep(NamedTuple):
    """One decoding step of a layer: which slots it writes and which it attends to."""

    written: tuple[Tensor, Tensor, Tensor]  # batch row, head and slot of each new key
    mask: Tensor  # (B, H, 1, S), 0 or -inf, for the first S slots; no later one is seen
    covered: Tensor | None  # (B, H, 1, 1) bool, None if a branch of rate 1 covers every token


class LongNetCacheLayer(CacheLayerMixin):
    """The slots of one layer: keys and values (B, G, P, D), branch after branch, the least dilated first."""

    is_croppable = True

    def __init__(self, branches: tuple[Branch, ...], max_length: int | None, offloading: bool, longest: int):
        super().__init__()
        self.branches = branches
        self.longest = longest  # segment or window of all layers
        self.max_length = max_length
        self.offloading = offloading  # keep the slots on the CPU between calls
        self.lengths: list[int] = []  # real tokens of each batch row
        self.columns = 0  # columns fed, padding included; -1 while slots are being written
        self.capacity = 0  # tokens that the slots are allocated for
        self.record_past = False  # Transformers' name: `generate` ends a recording by setting it
        self.ends_in_padding = False  # padding followed the tokens of some batch row
        self._record: _Record | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads, dtype and device of the first (B, L, G, D) keys and values."""
        batch, _, heads, dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        with torch.inference_mode(False):  # a later call may write outside of inference mode
            self.keys, self.values = (x.new_zeros(batch, heads, 0, dim) for x in (key_states, value_states))
        self.lengths = [0] * batch
        self.is_initialized = True
        if self.max_length:
            self.reserve(self.max_length)

    def slots(self, capacity: int) -> tuple[int, ...]:
        """Return the slots of each branch for `capacity` tokens: ceil(min(w, capacity) / r)."""
        return tuple(-(-min(b.w, capacity) // b.r) for b in self.branches)

    def slot_table(self) -> tuple[np.ndarray, Tensor, Tensor]:
        """Return the `tabulate_slots` of the current allocation."""
        return tabulate_slots(self.slots(self.capacity), self.device)

    def map_slots(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to keys and values. The results can be written in and outside of inference mode.

        If it raises, because memory is full for example, the layer is unchanged.
        """
        with torch.inference_mode(False):
            self.keys, self.values = function(self.keys), function(self.values)

    def reserve(self, tokens: int) -> None:
        """Allocate slots for `tokens` tokens. Sizes double, so each key is copied a constant number of times."""
        if tokens <= self.capacity or self.capacity >= self.longest:
            return
        capacity = min(self.longest, max(tokens, 2 * self.capacity, 64))
        old, new = self.slots(self.capacity), self.slots(capacity)
        added = [(0, 0, 0, n - o) for o, n in zip(old, new, strict=True)]
        self.map_slots(lambda x: torch.cat([pad(*pair) for pair in zip(x.split(old, 2), added, strict=True)], 2))
        self.capacity = capacity

    def prefix(self, key_states: Tensor) -> HaloKV | None:
        """Return the prefix of the next tokens, None if empty; ValueError if their (B, L, G, D) keys do not fit."""
        if not self.is_initialized or not any(self.lengths):
            return None
        self._prepare(key_states)
        return HaloKV(self._in_order(self.keys), self._in_order(self.values), self.slots(self.capacity))

    def _in_order(self, slots: Tensor) -> Tensor:
        """Return (B, G, P, D) slots; those of a window are sorted, from the oldest token that the next one sees."""
        window = self.branches[0].w
        if not self.branches[0].is_window or max(self.lengths) < window:
            return slots
        kept = torch.tensor(self.lengths, device=slots.device).clamp(max=window - 1)
        first = torch.tensor(self.lengths, device=slots.device) - kept
        ring = (first[:, None] + torch.arange(window, device=slots.device)) % window  # (B, W)
        index = ring[:, None, :, None].expand(-1, slots.shape[1], -1, slots.shape[3])
        return torch.cat([slots[:, :, :window].gather(2, index), slots[:, :, window:]], 2)

    def update(self, key_states: Tensor, value_states: Tensor, chunks: tuple[Chunk, ...], **kwargs):
        """Store the new keys and values that later tokens can see.

        Args:
            key_states, value_states: (B, L, G, D), positions applied.
            chunks: where the real tokens are in the L columns, from `packing.pack`.

        Returns:
            Its arguments, as a bounded cache does not hold the keys and values of all tokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._prepare(key_states)
        key, value = key_states.detach(), value_states.detach()
        # One column continues a record. Several, a prompt or a verified draft, start a new one.
        starts_record = self.record_past and (self._record is None or key.shape[1] > 1)
        if starts_record:
            self._record = _Record(vars(self) | {"_record": None}, [])
        if self.record_past:
            self._record.updates.append((key, value, chunks))
        self.reserve(max((c.total for c in chunks), default=0))
        if starts_record or torch.is_grad_enabled():
            # A crop or a backward pass may need the old slots: leave them unchanged.
            self.map_slots(torch.clone)
        columns, self.columns = self.columns + key.shape[1], -1
        self.lengths = list(self.lengths)  # the record keeps the old list
        for chunk in chunks:
            self._store(chunk, key, value)
            self.lengths[chunk.batch_begin : chunk.batch_end] = [chunk.total] * chunk.batch
        # A row with tokens but without a chunk in the last column ends in padding.
        at_end = sum(c.batch for c in chunks if c.column_end == key.shape[1])
        self.ends_in_padding |= at_end + self.lengths.count(0) < len(self.lengths)
        self.columns = columns
        if self.offloading:
            self.offload()
        return key_states, value_states

    def _store(self, chunk: Chunk, key_states: Tensor, value_states: Tensor) -> None:
        """Copy the last tokens of a window, and the kept tokens of a segment that continues after the chunk."""
        batch, sizes = slice(chunk.batch_begin, chunk.batch_end), self.slots(self.capacity)
        slots = zip(self.keys.split(sizes, 2), self.values.split(sizes, 2), strict=True)
        for branch, (keys, values) in zip(self.branches, slots, strict=True):
            if branch.is_window:
                new = min(chunk.length, branch.w)
                ring = torch.arange(chunk.total - new, chunk.total, device=keys.device) % branch.w
                columns = slice(chunk.column_end - new, chunk.column_end)
                keys[batch, :, ring] = key_states[batch, columns].transpose(1, 2)
                values[batch, :, ring] = value_states[batch, columns].transpose(1, 2)
                continue
            last_begin = chunk.length - min(chunk.length, (chunk.total + branch.phase) % branch.w)
            for piece in chunk_slices(chunk, branch):
                if piece.begin != last_begin:
                    continue
                heads, numbers = piece.head_index(), slice(piece.prefix, piece.prefix + piece.seqlen)
                view = piece.view(branch)
                keys[batch, heads, numbers] = strided_view(key_states, view, chunk, chunk.column_begin)[:, 0]
                values[batch, heads, numbers] = strided_view(value_states, view, chunk, chunk.column_begin)[:, 0]

    def check_whole(self) -> None:
        """Raise ValueError if writing was interrupted: some slots then hold other tokens than the lengths claim."""
        if self.columns < 0:
            raise ValueError("an earlier forward pass was interrupted while it wrote this cache; start a new one.")

    def _prepare(self, key_states: Tensor) -> None:
        """Move the slots to the model's device; raise ValueError unless new (B, L, G, D) keys fit those held."""
        self.prefetch()
        self.check_whole()
        pairs = (key_states, 2), (self.keys, 1)  # a tensor and its dimension of heads
        given, held = ((len(x), x.shape[heads], x.shape[-1], x.dtype, x.device) for x, heads in pairs)
        if given != held:
            raise ValueError(
                "the cache was filled with (batch, key/value heads, head dimension, dtype, device) = "
                f"{held}, the new tokens have {given}; start a new LongNetCache for another batch, model or dtype."
            )

    def get_seq_length(self) -> int:
        """Return the columns fed, padding included."""
        return self.columns

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def reset(self) -> None:
        """Empty the cache, keeping its memory."""
        super().reset()
        self.lengths, self.columns = [0] * len(self.lengths), 0
        self.ends_in_padding, self._record = False, None

    def activate_past_recording(self) -> None:
        """Keep the last update of several columns and every step after it, so that `crop` can remove them.

        This costs memory for every step until the next crop.
        """
        self.record_past = True

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` columns; if negative, remove that many (0: none). Ends the record.

        Raises:
            ValueError: keys that the remaining tokens need are gone, or padding hides which to remove.
        """
        back = self.check_crop(max_length)
        if back and self._can_replay(back):
            self._replay(self._record, self.columns - back)
        else:
            self.lengths = [t - back for t in self.lengths]
            self.columns -= back
        self._record = None

    def check_crop(self, max_length: int) -> int:
        """Return how many columns `crop` removes; raise its ValueErrors."""
        self.check_whole()
        target = int(max_length)
        back = max(0, self.columns - target) if target > 0 else -target
        if back > self.columns:
            raise ValueError(f"crop({max_length}): the cache holds only {self.columns} columns.")
        if back and not self._can_replay(back):
            self._check_removal(back, max_length)
        return back

    def _can_replay(self, back: int) -> bool:
        return self._record is not None and self._record.before["columns"] <= self.columns - back

    def _check_removal(self, back: int, max_length: int) -> None:
        """Raise ValueError if a key before the last `back` columns was discarded since."""
        if self.ends_in_padding:
            raise ValueError(
                f"crop({max_length}): a row has padding after its tokens, and the cache does not know in which of the "
                f"last {back} columns; restore an earlier copy of the cache, or pad on the left."
            )
        if min(self.lengths) < back:
            raise ValueError(
                f"crop({max_length}): the rows hold {self.lengths} tokens, and some row has fewer than the {back} to "
                "remove; restore a copy of the cache from before that row began."
            )
        for t, b in product(self.lengths, self.branches):
            if _is_discarded(b, t - back, t):
                raise ValueError(
                    f"crop({max_length}): removing {back} of {t} tokens needs keys of a "
                    f"{'window' if b.is_window else 'segment'} of {b.w} tokens, which are already discarded; "
                    "restore an earlier copy of the cache, or feed the text again."
                )

    def _replay(self, record: _Record, kept: int) -> None:
        """Return to the start of the record, then repeat its updates up to `kept` columns."""
        record_past = self.record_past
        vars(self).update(record.before, record_past=False)
        for keys, values, chunks in record.updates:
            if columns := min(kept - self.columns, keys.shape[1]):
                parts = tuple(c._replace(total=c.start + c.length) for c in cut_chunks(chunks, 0, columns))
                self.update(keys[:, :columns], values[:, :columns], parts)
        self.record_past = record_past

    def decode(self, query: Tensor, key_states: Tensor, value_states: Tensor, step: DecodingStep, scale: float):
        """Store one token per row and attend: one softmax over all slots that a head sees (the multiset of Eq. 9-10).

        Args:
            query: (B, 1, H, D). key_states, value_states: (B, 1, G, D).

        Returns:
            (B, 1, H, D).
        """
        self._prepare(key_states)
        columns, self.columns = self.columns + 1, -1
        batch, head, _ = step.written
        self.keys[step.written] = key_states[batch, 0, head]
        self.values[step.written] = value_states[batch, 0, head]
        self.lengths = [t + 1 for t in self.lengths]
        self.columns = columns
        keys, values = (x[:, :, : step.mask.shape[-1]] for x in (self.keys, self.values))
        shares_heads = query.shape[2] > key_states.shape[2]
        out = scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, attn_mask=step.mask, scale=scale, enable_gqa=shares_heads
        )
        if self.offloading:
            self.offload()
        if step.covered is not None:
            out = out.masked_fill(~step.covered, 0.0)
        return out.transpose(1, 2)

    # Synchronous, unlike Transformers' own: `generate` reorders beams on the CPU right after.
    def prefetch(self) -> None:
        """Move the slots to the device of the model's keys."""
        if self.is_initialized and self.keys.device != self.device:
            self.map_slots(lambda x: x.to(self.device))

    def offload(self) -> None:
        """Move the slots to the CPU."""
        if self.is_initialized:
            self.map_slots(Tensor.cpu)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these batch rows, in this order; `indices` are row numbers or a mask."""
        if self.is_initialized:
            rows = torch.arange(len(self.lengths), device="cpu")[indices.cpu()]
            index = rows.to(self.keys.device)
            self.map_slots(lambda x: x.index_select(0, index))
            self.lengths = [self.lengths[row] for row in rows.tolist()]
            self._record = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let batch row i continue row `beam_idx[i]` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times, copies next to each other."""
        self.batch_select_indices(torch.arange(len(self.lengths)).repeat_interleave(repeats))


def _is_discarded(branch: Branch, length: int, now: int) -> bool:
    """Return whether keys that token number `length` sees were discarded when `now` tokens were stored."""
    if branch.is_window:
        return max(0, length - branch.w + 1) < now - branch.w
    place = (length + branch.phase) % branch.w
    return length > 0 and place > 0 and (now + branch.phase) // branch.w != (length + branch.phase) // branch.w


@lru_cache(maxsize=16)
def tabulate_slots(sizes: tuple[int, ...], device: torch.device) -> tuple[np.ndarray, Tensor, Tensor]:
    """Return where each branch's slots begin (n,), and each slot's branch and number in it (P,)."""
    begin = np.cumsum(sizes) - sizes
    branch = np.arange(len(sizes)).repeat(sizes)
    number = np.arange(len(branch)) - begin[branch]
    return begin, torch.from_numpy(branch).to(device), torch.from_numpy(number).to(device)


class SlotCounts:
    """How many slots of each branch queries see, as arrays over the n branches of a layer.

    They are NumPy's, which are fast at this size, or, given a device, tensors that a graph can trace.
    """

    def __init__(self, branches: tuple[Branch, ...], num_heads: int, device: torch.device | None = None):
        self.is_traceable = device is not None

        def array(values):
            return torch.tensor(np.array(values), device=device) if self.is_traceable else np.array(values)

        def column(values):  # (heads or 1, 1, n)
            return array(np.array(list(values)).T.reshape(-1, 1, len(branches)))

        self.w, self.r, self.phase, self.window = (
            column([getattr(b, name)] for b in branches) for name in ("w", "r", "phase", "is_window")
        )
        self.after_window = column([b.after_window] for b in branches)
        self.after_segment, self.after_phase = (
            column([getattr(b, name)] for b in branches) for name in ("after_segment", "after_phase")
        )
        self.offset = column(b.offsets for b in branches)
        self.query_rate = column([b.query_rate or b.r] for b in branches)
        self.query_offset = column(self._of_heads(b.query_offsets or b.offsets, num_heads) for b in branches)
        self.zero, self.one = column([0] for _ in branches), column([1] for _ in branches)
        self.kv_head = array(self._of_heads(range(self.offset.shape[0]), num_heads))  # of each query head

    @property
    def xp(self):
        """NumPy or PyTorch, whose functions used here agree."""
        return torch if self.is_traceable else np

    @staticmethod
    def _of_heads(values: Sequence[int], num_heads: int) -> np.ndarray:
        return np.repeat(values, num_heads // len(values))

    def rows(self, end, position):
        """Return how many kept keys of the segment of `position` lie before the position `end`; (B, G, L, n)."""
        begin = position - (position + self.phase) % self.w  # of the segment; the sequence begins at 0
        ends = end - begin, self.xp.maximum(-begin, self.zero)
        kept, ghosts = (self.xp.maximum(-((self.offset - n) // self.r), self.zero) for n in ends)
        return kept - ghosts

    def seen(self, positions, ends):
        """Return the first slot that queries see and the last one plus 1, counted within a branch: (B, H, L, n) each.

        `positions` is (B, L), `ends` (B, 1). The slots hold the tokens before `ends`; a window's are in order.
        """
        where, maximum, minimum = self.xp.where, self.xp.maximum, self.xp.minimum
        position, ends = positions[:, None, :, None], ends[:, None, :, None]
        limit = minimum(position - self.after_window + 1, ends)
        into = (position + self.after_phase) % maximum(self.after_segment, self.one)
        limit = where(self.after_segment > 0, minimum(limit, position - into), limit)
        last = maximum(self.rows(limit, position), self.zero)[:, self.kv_head]
        kept = ((position + self.phase) % self.w) % self.query_rate == self.query_offset
        held = minimum(ends, where(ends > position, self.w, self.w - 1))  # tokens of a window
        first = where(self.window, maximum(position - self.w + 1 - (ends - held), self.zero), self.zero)
        return first + 0 * last, where(self.window, held, where(kept, last, self.zero))

    def own_slot(self, positions):
        """Return the slot of each token (B, 1) in its branches, -1 where a head does not keep it: (B, G, 1, n)."""
        position = positions[:, None, :, None]
        place = (position + self.phase) % self.w
        row = self.xp.where(place % self.r == self.offset, self.rows(position + 1, position) - 1, -self.one)
        return self.xp.where(self.window, position % self.w, row)


@lru_cache(maxsize=64)
def _slot_counts(branches: tuple[Branch, ...], num_heads: int) -> SlotCounts:
    return SlotCounts(branches, num_heads)


class LongNetCache(Cache):
    """A Transformers cache whose size stops growing with the sequence; `generate` and `forward` create it.

    Args:
        config: of the model.
        max_length: tokens to allocate for at once; None lets memory grow with the sequence, up to its bound.
        offloading: keep the slots on the CPU, and those of one layer at a time on the model's device. A bounded cache
            rarely needs this; every step then copies all of it twice.

    Example:
        >>> cache = LongNetCache(model.config)
        >>> for piece in input_ids.split(4096, dim=1):
        ...     hidden = model(piece, cache=cache).last_hidden_state
    """

    def __init__(self, config: LongNetConfig, max_length: int | None = None, offloading: bool = False):
        self.pattern = cache_pattern(config)
        self.num_heads = config.num_attention_heads
        layers = layer_branches(*self.pattern, config.num_hidden_layers)
        longest = max(branch.w for branches in layers for branch in branches)
        super().__init__(layers=[LongNetCacheLayer(branches, max_length, offloading, longest) for branches in layers])

    def check(self, config: LongNetConfig, batch: int) -> None:
        """Raise ValueError unless a model of this config can continue with a batch of this size."""
        given, held = (cache_pattern(config), config.num_hidden_layers), (self.pattern, len(self.layers))
        if given != held:
            raise ValueError(
                f"the cache belongs to another config: its (pattern, key/value heads, query heads), layers are {held}, "
                f"the model has {given}; start a new cache."
            )
        if self.lengths and len(self.lengths) != batch:
            raise ValueError(f"the cache holds {len(self.lengths)} rows, the input has {batch}; start a new cache.")
        self.check_whole()

    def check_whole(self) -> None:
        """Raise ValueError if an interrupted forward left a layer half written or behind the others."""
        if len({(layer.columns, layer.capacity) for layer in self.layers}) > 1:
            raise ValueError("an earlier forward pass was interrupted and left this cache incomplete; start a new one.")
        self.layers[0].check_whole()

    def crop(self, max_length: int) -> None:
        """As `LongNetCacheLayer.crop`; if any layer raises, none is changed."""
        for layer in self.layers:  # layers differ in their segments (`stagger_segments`)
            layer.check_crop(max_length)
        super().crop(max_length)

    @property
    def lengths(self) -> list[int]:
        """Real tokens seen in each batch row; empty before the first forward pass."""
        return self.layers[0].lengths

    @torch.compiler.disable  # a graph would turn NumPy's arrays into tensors, and fail in inference mode
    def seen_slots(self, positions: Tensor, layer_idx: int) -> Tensor:
        """Return which slots of `LongNetCacheLayer.prefix` the queries at these positions see.

        Args:
            positions: (B, L), each at least the length of its batch row.

        Returns:
            (B, H, L, P) bool.
        """
        layer = self.layers[layer_idx]
        counts, (_, branch, number) = _slot_counts(layer.branches, self.num_heads), layer.slot_table()
        first, last = counts.seen(positions.cpu().numpy(), np.array(self.lengths)[:, None])
        first, last = (torch.from_numpy(x).to(number.device)[..., branch] for x in (first, last))
        return (first <= number) & (number < last)

    @torch.compiler.disable
    def steps(self) -> tuple[DecodingStep, ...]:
        """Prepare a decoding step of one token per batch row, for each layer.

        Only slots up to the last one that is seen are read: with rates above the number of heads, most tokens are not
        kept in the more dilated branches, whose slots come last.
        """
        for layer in self.layers:
            layer.reserve(max(self.lengths) + 1)
        steps = {branches: self._step(layer) for branches, layer in {x.branches: x for x in self.layers}.items()}
        return tuple(steps[layer.branches] for layer in self.layers)

    def _step(self, layer: LongNetCacheLayer) -> DecodingStep:
        begin, branch_of, number = layer.slot_table()
        counts, position = _slot_counts(layer.branches, self.num_heads), np.array(self.lengths)[:, None]
        own = counts.own_slot(position)  # (B, G, 1, n)
        batch, head, _, branch = (own >= 0).nonzero()
        written = batch, head, begin[branch] + own[batch, head, 0, branch]
        last = counts.seen(position, position + 1)[1]  # (B, H, 1, n)
        end = np.where(last > 0, begin + last, 0).max(initial=0)
        seen = number[:end] < torch.from_numpy(last).to(layer.device)[..., branch_of[:end]]  # (B, H, 1, S)
        mask = torch.zeros(seen.shape, dtype=layer.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        covered = None if layer.branches[0].covers_all else seen.any(-1, keepdim=True)
        return DecodingStep(tuple(torch.from_numpy(x).to(layer.device) for x in written), mask, covered)

    def can_step(self, chunks: tuple[Chunk, ...], length: int) -> bool:
        """Return True for a decoding step: one real token per batch row, no gradient and no record to keep."""
        first = self.layers[0]
        is_one_token = length == 1 and sum(c.batch for c in chunks) == len(first.lengths)
        return first.is_initialized and is_one_token and not torch.is_grad_enabled() and not first.record_past

    def to_tensors(self) -> dict[str, Tensor]:
        """Return a copy of what the cache holds, for `safetensors.torch.save_file` (see `cache_file`)."""
        return cache_to_tensors(self)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load a copy of what `to_tensors` returned; raise ValueError and change nothing if it does not fit."""
        load_cache_tensors(self, tensors)


def cache_pattern(config: LongNetConfig) -> tuple[Pattern, int, int]:
    """Return what two configs must have in common to share a cache: the pattern, key/value heads and query heads."""
    return Pattern.of(config), config.num_key_value_heads, config.num_attention_heads
