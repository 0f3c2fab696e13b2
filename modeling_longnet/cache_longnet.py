"""The bounded cache: it keeps the current segment of each branch, which is all that later tokens can see.

After t tokens a layer holds at most `sum_i ceil(min(w_i, t) / r_i)` keys and values per head, not t. Its memory doubles
from 64 tokens on: at most twice that, and never above `sum_i ceil(w_i / r_i)`. A branch keeps position p in slot
`(p mod w) // r`; when p starts a new segment, the branch's slots are free again.

Letters: B batch, L new columns, H query heads, G key/value heads, D head dimension, P slots of all
branches, n branches.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin

from .attention_autograd import HaloKV
from .backend_strided import slice_heads, slice_view
from .branches import Branch, Chunk, chunk_slices, count_kept, make_branches
from .cache_file import cache_to_tensors, load_cache_tensors
from .configuration_longnet import LongNetConfig


class _Record(NamedTuple):
    """A layer's state and every update since: enough to take back any of their columns."""

    keys: Tensor
    values: Tensor
    lengths: list[int]
    columns: int
    capacity: int
    ends_in_padding: bool
    updates: list[tuple[Tensor, Tensor, tuple[Chunk, ...]]]  # keys, values and chunks, as `update` takes them


class Slots(NamedTuple):
    """What each of the P slots holds, int64: a branch with its w and r, the slot's number in it, the heads' offsets."""

    branch: Tensor  # (P,)
    w: Tensor  # (P,)
    r: Tensor  # (P,)
    number: Tensor  # (P,)
    offset: Tensor  # (G, P)


class DecodingStep(NamedTuple):
    """One decoding step, the same for every layer: which slots it writes and which it attends to."""

    written: tuple[Tensor, Tensor, Tensor]  # batch row, head and slot of each new key
    mask: Tensor  # (B, H, 1, S), 0 or -inf, for the first S slots; no later one is seen
    covered: Tensor | None  # (B, H, 1, 1) bool, None if a branch of rate 1 covers every token


class LongNetCacheLayer(CacheLayerMixin):
    """The slots of one layer: keys and values (B, G, P, D), branch after branch, the least dilated first."""

    is_croppable = True

    def __init__(self, branches: tuple[Branch, ...], max_length: int | None = None, offloading: bool = False):
        super().__init__()
        self.branches = branches
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

    def slots(self, capacity: int) -> list[int]:
        """Return the slots of each branch for `capacity` tokens: ceil(min(w, capacity) / r)."""
        return [-(-min(b.w, capacity) // b.r) for b in self.branches]

    def held_keys(self) -> list[int]:
        """Return, per batch row, the keys that later tokens can see, for the head that holds most (all branches)."""
        return [
            max(sum(count_kept(t % b.w, b.offsets[g], b.r) for b in self.branches) for g in range(self.keys.shape[1]))
            for t in self.lengths
        ]

    def reserve(self, tokens: int) -> None:
        """Allocate slots for `tokens` tokens. Sizes double, so each key is copied a constant number of times."""
        longest = max(b.w for b in self.branches)
        if tokens <= self.capacity or self.capacity >= longest:
            return
        capacity = min(longest, max(tokens, 2 * self.capacity, 64))
        old, new = self.slots(self.capacity), self.slots(capacity)
        added = [(0, 0, 0, n - o) for o, n in zip(old, new, strict=True)]
        with torch.inference_mode(False):
            keys, values = (
                torch.cat([torch.nn.functional.pad(*pair) for pair in zip(x.split(old, 2), added, strict=True)], 2)
                for x in (self.keys, self.values)
            )
        # Assigned together: running out of memory above leaves the layer unchanged.
        self.keys, self.values, self.capacity = keys, values, capacity

    def prefix(self, key_states: Tensor) -> HaloKV | None:
        """Return the keys and values before the next tokens, None if there are none.

        Raises:
            ValueError: the next tokens' (B, L, G, D) keys do not fit those held.
        """
        if not self.is_initialized or not any(self.lengths):
            return None
        self.prefetch()
        self._check(key_states)
        return HaloKV(self.keys, self.values, tuple(self.slots(self.capacity)))

    def update(self, key_states: Tensor, value_states: Tensor, chunks: tuple[Chunk, ...], **kwargs):
        """Store the new keys and values that later tokens can see.

        Args:
            key_states, value_states: (B, L, G, D), positions applied.
            chunks: where the real tokens are in the L columns, from `packing.pack`.

        Returns:
            The arguments: a bounded cache has no (B, G, all tokens, D) to return.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()
        self._check(key_states)
        starts_record = self.record_past and self._append_record(key_states, value_states, chunks)
        self.reserve(max((c.total for c in chunks), default=0))
        if starts_record or torch.is_grad_enabled():
            # A crop or a backward pass may need the old slots: leave them unchanged.
            self.keys, self.values = self.copy_slots()
        columns, self.columns = self.columns + key_states.shape[1], -1
        self.lengths = list(self.lengths)
        for chunk in chunks:
            self._store(chunk, key_states.detach(), value_states.detach())
            self.lengths[chunk.batch_begin : chunk.batch_end] = [chunk.total] * chunk.batch
        at_end = sum(c.batch for c in chunks if c.column_end == key_states.shape[1])
        self.ends_in_padding |= at_end + self.lengths.count(0) < len(self.lengths)
        self.columns = columns
        if self.offloading:
            self.offload()
        return key_states, value_states

    def _append_record(self, key_states: Tensor, value_states: Tensor, chunks: tuple[Chunk, ...]) -> bool:
        """Record an update. One of several columns, a prompt or a verified draft, starts a new record.

        Returns:
            True if it starts one: the slots before it must stay unchanged.
        """
        update = key_states.detach(), value_states.detach(), chunks
        if self._record is not None and key_states.shape[1] == 1:
            self._record.updates.append(update)
            return False
        state = (self.keys, self.values, self.lengths, self.columns, self.capacity, self.ends_in_padding)
        self._record = _Record(*state, [update])
        return True

    def _store(self, chunk: Chunk, key_states: Tensor, value_states: Tensor) -> None:
        """Copy the kept tokens of the segment that the chunk ends in, unless it ends with that segment."""
        batch, sizes = slice(chunk.batch_begin, chunk.batch_end), self.slots(self.capacity)
        slots = zip(self.keys.split(sizes, 2), self.values.split(sizes, 2), strict=True)
        for branch, (keys, values) in zip(self.branches, slots, strict=True):
            last_begin = chunk.length - min(chunk.length, chunk.total % branch.w)
            for piece in chunk_slices(chunk, branch, False):
                if piece.begin != last_begin:
                    continue
                heads, numbers = slice_heads(piece), slice(piece.prefix, piece.prefix + piece.seqlen)
                keys[batch, heads, numbers] = slice_view(key_states, chunk, branch, piece)[:, 0]
                values[batch, heads, numbers] = slice_view(value_states, chunk, branch, piece)[:, 0]

    def check_whole(self) -> None:
        """Raise ValueError if writing was interrupted: some slots then hold other tokens than the lengths claim."""
        if self.columns < 0:
            raise ValueError("an earlier forward was interrupted while it wrote the cache; start a new one.")

    def _check(self, key_states: Tensor) -> None:
        self.check_whole()
        batch, _, heads, dim = key_states.shape
        given = (batch, heads, dim, key_states.dtype, key_states.device)
        batch, heads, _, dim = self.keys.shape
        held = (batch, heads, dim, self.keys.dtype, self.keys.device)
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
        self.lengths = [0] * len(self.lengths)
        self.columns = 0
        self.ends_in_padding = False
        self._record = None

    def activate_past_recording(self) -> None:
        """Let `crop` take back the last update of several columns and all steps since it, or since a crop.

        Their keys and values are kept until then.
        """
        self.record_past = True

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` columns; if negative, remove that many (0: none, as in Transformers).

        Raises:
            ValueError: keys before those columns were discarded at the end of their segment.
        """
        self.check_whole()
        target = int(max_length)
        back = max(0, self.columns - target) if target > 0 else -target
        if back > self.columns:
            raise ValueError(f"crop({max_length}): the cache holds only {self.columns} columns.")
        kept = self.columns - back
        if self._record is not None and self._record.columns <= kept:
            self._replay(self._record, kept)
        elif back:
            self._remove(back, max_length)
        self._record = None

    def _remove(self, back: int, max_length: int) -> None:
        """Remove the last columns, if no key before them was discarded since."""
        if self.ends_in_padding:
            raise ValueError(
                f"crop({max_length}): padding followed the tokens of a row, and in which of the last {back} columns "
                "is not kept; keep a copy of the cache from then, or pad on the left."
            )
        if min(self.lengths) < back:
            raise ValueError(
                f"crop({max_length}): the rows hold {self.lengths} tokens, one fewer than the {back} to take back; "
                "keep a copy of the cache from before that row began."
            )
        lengths = [t - back for t in self.lengths]
        for t, kept in zip(self.lengths, lengths, strict=True):
            for b in self.branches:
                if kept % b.w and t // b.w != kept // b.w:
                    raise ValueError(
                        f"crop({max_length}): going back {back} tokens from {t} needs rows of a segment of {b.w} "
                        "tokens that has ended; keep a copy of the cache from then, or feed the text again."
                    )
        self.lengths, self.columns = lengths, self.columns - back

    def _replay(self, record: _Record, kept: int) -> None:
        """Return to the start of the record and store again what leaves `kept` columns."""
        if kept == self.columns:
            return
        record_past, self.record_past = self.record_past, False
        *held, updates = record
        self.keys, self.values, self.lengths, self.columns, self.capacity, self.ends_in_padding = held
        for keys, values, chunks in updates:
            columns = min(kept - self.columns, keys.shape[1])
            if columns:
                cut = (min(c.column_end, columns) for c in chunks)
                chunks = [
                    c._replace(column_end=end, total=c.total - (c.column_end - end))
                    for c, end in zip(chunks, cut, strict=True)
                    if end > c.column_begin
                ]
                self.update(keys[:, :columns], values[:, :columns], tuple(chunks))
        self.record_past = record_past

    def decode(self, query: Tensor, key_states: Tensor, value_states: Tensor, step: DecodingStep, scale: float):
        """Store one token and attend: one softmax over every slot its heads see (the multiset of Eq. 9-10).

        Args:
            query: (B, 1, H, D). key_states, value_states: (B, 1, G, D).

        Returns:
            (B, 1, H, D).
        """
        self.prefetch()
        self._check(key_states)
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

    def prefetch(self) -> None:
        """Move the slots to the device of the model's keys."""
        if self.is_initialized and self.keys.device != self.device:
            self._move(self.device)

    def offload(self) -> None:
        """Move the slots to the CPU."""
        if self.is_initialized:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        # Synchronous, unlike Transformers': beams are reordered on the CPU at once.
        with torch.inference_mode(False):
            self.keys, self.values = self.keys.to(device), self.values.to(device)

    def copy_slots(self) -> tuple[Tensor, Tensor]:
        """Return copies of keys and values that may be written in and outside of inference mode."""
        with torch.inference_mode(False):
            return self.keys.clone(), self.values.clone()

    def _select(self, rows: list[int]) -> None:
        """Make batch row i a copy of the old row `rows[i]`."""
        index = torch.tensor(rows, device=self.keys.device)
        with torch.inference_mode(False):
            self.keys, self.values = (x.index_select(0, index) for x in (self.keys, self.values))
        self.lengths = [self.lengths[row] for row in rows]
        self._record = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let batch row i continue row `beam_idx[i]` (beam search)."""
        if self.is_initialized:
            self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times, side by side."""
        if self.is_initialized:
            self._select([row for row in range(len(self.lengths)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these batch rows only."""
        if self.is_initialized:
            self._select(torch.arange(len(self.lengths))[indices.cpu()].tolist())


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
        branches, layers = make_branches(*self.pattern), range(config.num_hidden_layers)
        super().__init__(layers=[LongNetCacheLayer(branches, max_length, offloading) for _ in layers])
        # w (n,), r (n,) and offset (G, n) of the n branches
        table = (torch.tensor([getattr(b, name) for b in branches], device="cpu") for name in ("w", "r", "offsets"))
        w, r, offset = table
        self._branches = w, r, offset.T
        self._slots: Slots | None = None

    def check(self, config: LongNetConfig, batch: int) -> None:
        """Raise ValueError unless a model of this config can continue with a batch of this size."""
        given = (cache_pattern(config), config.num_hidden_layers)
        if given != (self.pattern, len(self.layers)):
            raise ValueError(
                "the cache belongs to another config: its (segment_lengths, dilation_rates, key/value heads, "
                f"head_offsets), layers are {(self.pattern, len(self.layers))}, the model has {given}."
            )
        first = self.layers[0]
        if first.is_initialized and len(first.lengths) != batch:
            raise ValueError(f"the cache holds {len(first.lengths)} rows, the input has {batch}.")
        self.check_whole()

    def check_whole(self) -> None:
        """Raise ValueError if an interrupted forward left a layer half written or behind the others."""
        for layer in self.layers:
            layer.check_whole()
        if len({(layer.columns, layer.capacity) for layer in self.layers}) > 1:
            raise ValueError("an earlier forward was interrupted and left the cache's layers unequal; start a new one.")

    @property
    def lengths(self) -> list[int]:
        """Real tokens seen in each batch row; empty before the first."""
        return self.layers[0].lengths

    def slots(self) -> Slots:
        """Return the table of slots for the layers' current allocation."""
        layer = self.layers[0]
        if self._slots is None or self._slots.w.device != layer.device or len(self._slots.w) != layer.keys.shape[2]:
            sizes = torch.tensor(layer.slots(layer.capacity), device="cpu")
            number = torch.cat([torch.arange(size, device="cpu") for size in sizes.tolist()])
            branch = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
            w, r, offset = (x[..., branch] for x in self._branches)
            self._slots = Slots(*(x.to(layer.device) for x in (branch, w, r, number, offset)))
        return self._slots

    def seen_slots(self, positions: Tensor) -> Tensor:
        """Return which slots the queries at these positions see: the earlier kept tokens of their segment.

        Args:
            positions: (B, L), each at least the length of its batch row.

        Returns:
            (B, G, L, P) bool.
        """
        slots = self.slots()
        start = torch.tensor(self.lengths, device=positions.device)[:, None]  # (B, 1)
        filled = (start % slots.w)[:, None, None]  # (B, 1, 1, P)
        p = positions[:, None, :, None]  # (B, 1, L, 1)
        offset = slots.offset[:, None]  # (G, 1, P)
        is_kept = (p % slots.w) % slots.r == offset
        same_segment = p // slots.w == (start // slots.w)[:, None, None]
        return is_kept & same_segment & (slots.number * slots.r + offset < filled)

    def step(self, num_heads: int) -> DecodingStep:
        """Prepare a decoding step of one token per batch row, for `num_heads` query heads.

        Counted per branch on the CPU. If rates exceed the number of heads, most tokens are not kept in the more dilated
        branches, and those slots are not read.
        """
        first = self.layers[0]
        for layer in self.layers:
            layer.reserve(max(self.lengths) + 1)
        slots, (w, r, offset) = self.slots(), self._branches
        place = torch.tensor(self.lengths, device="cpu")[:, None] % w  # (B, n), in the segment
        number = place // r
        is_kept = (place % r)[:, None] == offset  # (B, G, n)
        counts = torch.where(is_kept, number[:, None] + 1, 0)  # a head that keeps the token sees those before it
        sizes = torch.tensor(first.slots(first.capacity), device="cpu")
        batch, head, branch = is_kept.nonzero(as_tuple=True)
        slot = (number + sizes.cumsum(0) - sizes)[batch, branch]
        end = int(slot.max()) + 1 if len(slot) else 1
        seen = slots.number[:end] < counts.to(first.device)[:, :, slots.branch[:end]]  # (B, G, S)
        seen = seen[:, :, None].repeat_interleave(num_heads // len(offset), 1)
        mask = torch.zeros(seen.shape, dtype=first.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        covered = None if any(b.r == 1 for b in first.branches) else seen.any(-1, keepdim=True)
        return DecodingStep(tuple(x.to(first.device) for x in (batch, head, slot)), mask, covered)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return a copy of what the cache holds, for `safetensors.torch.save_file` (see `cache_file`)."""
        return cache_to_tensors(self)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Become a copy of the cache that `to_tensors` saved, of the same config, or raise and stay unchanged.

        Raises:
            ValueError: tensors are missing, damaged, or of another config.
        """
        load_cache_tensors(self, tensors)

    def can_step(self, chunks: tuple[Chunk, ...], length: int) -> bool:
        """Return True for a decoding step: one real token per batch row, no gradient and no record to keep."""
        first = self.layers[0]
        return (
            length == 1
            and first.is_initialized
            and sum(c.batch for c in chunks) == len(first.lengths)
            and not torch.is_grad_enabled()
            and not first.record_past
        )


def cache_pattern(config: LongNetConfig) -> tuple:
    """Return what two configs must have in common to share a cache."""
    lists = tuple(config.segment_lengths), tuple(config.dilation_rates)
    return (*lists, config.num_key_value_heads, config.head_offsets)
