"""The bounded cache: of each branch's current segment the rows so far, which is all that later tokens can see.

After t tokens a layer holds at most `sum_i ceil(min(w_i, t) / r_i)` keys and values a head, not t. Its memory grows
in doubling steps from 64 tokens on: at most twice that, and never above `sum_i ceil(w_i / r_i)`. A branch's row at
position p has slot `(p mod w) // r`; when p begins a new segment, the branch's slots are free again.

Letters: B batch, L new columns, G key/value heads, D head dimension, P slots of all branches.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .branches import Branch, Chunk, chunk_rows, count_rows, make_branches
from .cache_file import cache_to_tensors, load_cache_tensors
from .configuration_longnet import LongNetConfig
from .dilated_attention import Outside, rows_view


class _Undo(NamedTuple):
    """What a layer was, and every update since: enough to take back any of their columns."""

    keys: Tensor
    values: Tensor
    lengths: list[int]
    columns: int
    capacity: int
    ends_in_padding: bool
    updates: list[tuple[Tensor, Tensor, Tensor]]  # keys, values and chunks, as `update` takes them


class Slots(NamedTuple):
    """What each of the P slots is for, int64: its branch, that one's w and r, its number j, its heads' o."""

    branch: Tensor  # (P,)
    w: Tensor  # (P,)
    r: Tensor  # (P,)
    number: Tensor  # (P,)
    offset: Tensor  # (G, P)


class Step(NamedTuple):
    """One decoding step, the same for every layer: which slots are written, and which are seen."""

    written: tuple[Tensor, Tensor, Tensor]  # batch row, head and slot of each new row
    mask: Tensor  # (B, H, 1, S) of the first S slots, after which none is seen: 0 for those seen, else -inf
    covered: Tensor | None  # (B, H, 1, 1) bool, None where a branch of rate 1 covers every token


class LongNetCacheLayer(CacheLayerMixin):
    """One layer's slots: keys and values (B, G, P, D), branch after branch, the least dilated first."""

    is_croppable = True

    def __init__(self, branches: tuple[Branch, ...], max_length: int | None = None, offloading: bool = False):
        super().__init__()
        self.branches = branches
        self.max_length = max_length
        self.offloading = offloading  # do the slots wait on the CPU?
        self.lengths: list[int] = []  # real tokens of each row
        self.columns = 0  # columns fed, padding counted; -1 while slots are being written
        self.capacity = 0  # tokens that the slots are allocated for
        self.is_recording = False
        self.ends_in_padding = False  # have columns of padding followed a row's tokens?
        self._undo: _Undo | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch, heads, dtype and device from the first (B, L, G, D) keys and values."""
        batch, _, heads, dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        with torch.inference_mode(False):  # a later call may write outside of inference mode
            self.keys, self.values = (x.new_zeros(batch, heads, 0, dim) for x in (key_states, value_states))
        self.lengths = [0] * batch
        self.is_initialized = True
        if self.max_length:
            self.reserve(self.max_length)

    def slots(self, capacity: int) -> list[int]:
        """Slots of each branch for a text of `capacity` tokens: ceil(min(w, capacity) / r)."""
        return [-(-min(b.w, capacity) // b.r) for b in self.branches]

    def held_rows(self) -> list[int]:
        """Rows that can still be seen, for each batch row, of the head that holds most (all branches)."""
        return [
            max(sum(count_rows(t % b.w, b.offsets[g], b.r) for b in self.branches) for g in range(self.keys.shape[1]))
            for t in self.lengths
        ]

    def reserve(self, tokens: int) -> None:
        """Make room for texts of `tokens` tokens; sizes double, so that a text is copied a constant number of times."""
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
        # Together, so that memory that runs out leaves the layer as it was.
        self.keys, self.values, self.capacity = keys, values, capacity

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.slots(self.capacity), 2)

    def before(self, key_states: Tensor) -> Outside | None:
        """Each branch's keys and values before the next tokens, as the op takes them; None when there are none.

        Raises:
            ValueError: the next tokens' (B, L, G, D) keys do not fit those held.
        """
        if not self.is_initialized or not any(self.lengths):
            return None
        self.prefetch()
        self._check(key_states)
        return Outside(self._parts(self.keys), self._parts(self.values))

    def update(self, key_states: Tensor, value_states: Tensor, chunks: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        """Take in the new rows that can still be seen after them.

        Args:
            key_states, value_states: (B, L, G, D), positions applied.
            chunks: (N, 6), where the rows' real tokens lie in the L columns, from `packing.pack`.

        Returns:
            The arguments: a bounded cache has no (B, G, all tokens, D) to give.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()
        self._check(key_states)
        is_new_record = self.is_recording and self._record(key_states, value_states, chunks)
        chunk_list = [Chunk(*row) for row in chunks.tolist()]
        self.reserve(max((c.total for c in chunk_list), default=0))
        if is_new_record or torch.is_grad_enabled():
            # The old slots may be needed to step back, or by a backward pass: leave them as they are.
            self.keys, self.values = self.copy_slots()
        columns, self.columns = self.columns + key_states.shape[1], -1
        self.lengths = list(self.lengths)
        for chunk in chunk_list:
            self._store(chunk, key_states.detach(), value_states.detach())
            self.lengths[chunk.row_begin : chunk.row_end] = [chunk.total] * (chunk.row_end - chunk.row_begin)
        at_end = sum(c.row_end - c.row_begin for c in chunk_list if c.column_end == key_states.shape[1])
        self.ends_in_padding |= at_end + self.lengths.count(0) < len(self.lengths)
        self.columns = columns
        if self.offloading:
            self.offload()
        return key_states, value_states

    def _record(self, key_states: Tensor, value_states: Tensor, chunks: Tensor) -> bool:
        """Note an update; one of several columns, a prompt or a verified draft, begins the record anew.

        Returns:
            Whether it is the record's first, before which the slots must stay as they are.
        """
        update = key_states.detach(), value_states.detach(), chunks
        if self._undo is not None and key_states.shape[1] == 1:
            self._undo.updates.append(update)
            return False
        self._undo = _Undo(
            self.keys, self.values, self.lengths, self.columns, self.capacity, self.ends_in_padding, [update]
        )
        return True

    def _store(self, chunk: Chunk, key_states: Tensor, value_states: Tensor) -> None:
        """Copy the rows of the segment that the chunk ends in, unless it ends with it."""
        batch = slice(chunk.row_begin, chunk.row_end)
        slots = zip(self._parts(self.keys), self._parts(self.values), strict=True)
        for branch, (keys, values) in zip(self.branches, slots, strict=True):
            last_begin = chunk.length - min(chunk.length, chunk.total % branch.w)
            for rows in chunk_rows(chunk, branch, False):
                if rows.begin != last_begin:
                    continue
                heads = slice(rows.head, rows.head + (rows.heads - 1) * rows.head_step + 1, rows.head_step)
                places = slice(rows.before, rows.before + rows.rows)
                keys[batch, heads, places] = rows_view(key_states, chunk, branch, rows)[:, 0]
                values[batch, heads, places] = rows_view(value_states, chunk, branch, rows)[:, 0]

    def check_whole(self) -> None:
        """Raise ValueError where writing was interrupted: some slots then hold other tokens than the lengths say."""
        if self.columns < 0:
            raise ValueError("an earlier forward was interrupted while it wrote the cache; start a new one.")

    def _check(self, key_states: Tensor) -> None:
        self.check_whole()
        batch, _, heads, dim = key_states.shape
        given = (batch, heads, dim, key_states.dtype, key_states.device)
        held = (
            self.keys.shape[0],
            self.keys.shape[1],
            self.keys.shape[3],
            self.keys.dtype,
            self.keys.device,
        )
        if given != held:
            raise ValueError(
                "the cache was filled with (batch, key/value heads, head dimension, dtype, device) = "
                f"{held}, the new tokens have {given}; start a new LongNetCache for another batch, model or dtype."
            )

    def get_seq_length(self) -> int:
        """Columns fed, padding counted."""
        return self.columns

    def get_max_length(self) -> int:
        """-1: a text has no longest length."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def reset(self) -> None:
        """Empty the cache, keeping its memory."""
        super().reset()
        self.lengths = [0] * len(self.lengths)
        self.columns = 0
        self.ends_in_padding = False
        self._undo = None

    def activate_past_recording(self) -> None:
        """From now on `crop` can take back the last update of several columns and all steps since it, or since a crop.

        Their keys and values are kept until then.
        """
        self.is_recording = True

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` columns; negative, take that many back (0: none, as Transformers counts).

        Raises:
            ValueError: rows of those columns were given up, at the end of their segment.
        """
        self.check_whole()
        target = int(max_length)
        back = max(0, self.columns - target) if target > 0 else -target
        if back > self.columns:
            raise ValueError(f"crop({max_length}): the cache holds only {self.columns} columns.")
        kept = self.columns - back
        if self._undo is not None and self._undo.columns <= kept:
            self._redo(self._undo, kept)
        elif back:
            self._go_back(back, max_length)
        self._undo = None

    def _go_back(self, back: int, max_length: int) -> None:
        """Forget the last columns where none of the rows before them was given up since."""
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

    def _redo(self, undo: _Undo, kept: int) -> None:
        """Go back to the record's beginning and take in again what leaves `kept` columns."""
        if kept == self.columns:
            return
        is_recording, self.is_recording = self.is_recording, False
        *held, updates = undo
        self.keys, self.values, self.lengths, self.columns, self.capacity, self.ends_in_padding = held
        for keys, values, chunks in updates:
            columns = min(kept - self.columns, keys.shape[1])
            if columns:
                chunks = chunks.clone()
                removed = (chunks[:, 3] - columns).clamp(min=0)
                chunks[:, 3] -= removed
                chunks[:, 5] -= removed
                self.update(keys[:, :columns], values[:, :columns], chunks[chunks[:, 3] > chunks[:, 2]])
        self.is_recording = is_recording

    def step(self, query: Tensor, key_states: Tensor, value_states: Tensor, step: Step, scale: float) -> Tensor:
        """One token: write its rows, then one softmax over every slot its heads see (the multiset of Eq. 9-10).

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
        out = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), *(x[:, :, : step.mask.shape[-1]] for x in (self.keys, self.values)),
            attn_mask=step.mask, scale=scale, enable_gqa=query.shape[2] > key_states.shape[2],
        )  # fmt: skip
        if self.offloading:
            self.offload()
        if step.covered is not None:
            out = out.masked_fill(~step.covered, 0.0)
        return out.transpose(1, 2)

    def prefetch(self) -> None:
        """Bring the slots to the device of the model's keys."""
        if self.is_initialized and self.keys.device != self.device:
            self._move(self.device)

    def offload(self) -> None:
        """Bring the slots to the CPU."""
        if self.is_initialized:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        # Waits for the copy, unlike Transformers': beams are reordered on the CPU at once.
        with torch.inference_mode(False):
            self.keys, self.values = self.keys.to(device), self.values.to(device)

    def copy_slots(self) -> tuple[Tensor, Tensor]:
        """Copies of keys and values that any mode may write."""
        with torch.inference_mode(False):
            return self.keys.clone(), self.values.clone()

    def _select(self, rows: list[int]) -> None:
        """Batch row i becomes a copy of the old row `rows[i]`."""
        index = torch.tensor(rows, device=self.keys.device)
        with torch.inference_mode(False):
            self.keys, self.values = (x.index_select(0, index) for x in (self.keys, self.values))
        self.lengths = [self.lengths[row] for row in rows]
        self._undo = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues what row `beam_idx[i]` was."""
        if self.is_initialized:
            self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        if self.is_initialized:
            self._select([row for row in range(len(self.lengths)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        if self.is_initialized:
            self._select(torch.arange(len(self.lengths))[indices.cpu()].tolist())


class LongNetCache(Cache):
    """A Transformers cache whose size stops growing with the text; `generate` and `forward` make it by themselves.

    Args:
        config: of the model.
        max_length: tokens to make room for at once; None lets the memory grow with the text, up to its bound.
        offloading: keep the layers' slots on the CPU, and on the model's device those of one layer at a time. A
            bounded cache is mostly small enough to stay; each step then waits for all of it to be copied twice.

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
        """Raise ValueError unless a model of this config can go on with a batch of this size."""
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
        """Raise ValueError where an earlier forward was interrupted, and left a layer half written or behind."""
        for layer in self.layers:
            layer.check_whole()
        if len({(layer.columns, layer.capacity) for layer in self.layers}) > 1:
            raise ValueError("an earlier forward was interrupted and left the cache's layers unequal; start a new one.")

    @property
    def lengths(self) -> list[int]:
        """Real tokens seen of each row; empty before the first."""
        return self.layers[0].lengths

    def slots(self) -> Slots:
        """The slots' table, as the layers are allocated now."""
        layer = self.layers[0]
        if self._slots is None or self._slots.w.device != layer.device or len(self._slots.w) != layer.keys.shape[2]:
            sizes = torch.tensor(layer.slots(layer.capacity), device="cpu")
            number = torch.cat([torch.arange(size, device="cpu") for size in sizes.tolist()])
            branch = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
            w, r, offset = (x[..., branch] for x in self._branches)
            self._slots = Slots(*(x.to(layer.device) for x in (branch, w, r, number, offset)))
        return self._slots

    def seen_slots(self, positions: Tensor) -> Tensor:
        """Which slots the queries at these positions see: those of their segment's earlier rows, if rows themselves.

        Args:
            positions: (B, L), each at least its row's length.

        Returns:
            (B, G, L, P) bool.
        """
        slots = self.slots()
        start = torch.tensor(self.lengths, device=positions.device)[:, None]  # (B, 1)
        filled = (start % slots.w)[:, None, None]  # (B, 1, 1, P)
        p = positions[:, None, :, None]  # (B, 1, L, 1)
        offset = slots.offset[:, None]  # (G, 1, P)
        is_row = (p % slots.w) % slots.r == offset
        same_segment = p // slots.w == (start // slots.w)[:, None, None]
        return is_row & same_segment & (slots.number * slots.r + offset < filled)

    def step(self, num_heads: int) -> Step:
        """Prepare a decoding step of one token a row, for `num_heads` query heads.

        Counted by branch, on the CPU. Where rates pass the number of heads, most tokens are no row of the more dilated
        branches, whose slots are then left alone.
        """
        first = self.layers[0]
        for layer in self.layers:
            layer.reserve(max(self.lengths) + 1)
        slots, (w, r, offset) = self.slots(), self._branches
        place = torch.tensor(self.lengths, device="cpu")[:, None] % w  # (B, n), in the segment
        number = place // r
        is_row = (place % r)[:, None] == offset  # (B, G, n)
        counts = torch.where(is_row, number[:, None] + 1, 0)  # a head that has this row sees those before it
        sizes = torch.tensor(first.slots(first.capacity), device="cpu")
        batch, head, branch = is_row.nonzero(as_tuple=True)
        slot = (number + sizes.cumsum(0) - sizes)[batch, branch]
        end = int(slot.max()) + 1 if len(slot) else 1
        seen = slots.number[:end] < counts.to(first.device)[:, :, slots.branch[:end]]  # (B, G, S)
        seen = seen[:, :, None].repeat_interleave(num_heads // len(offset), 1)
        mask = torch.zeros(seen.shape, dtype=first.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        covered = None if any(b.r == 1 for b in first.branches) else seen.any(-1, keepdim=True)
        return Step(tuple(x.to(first.device) for x in (batch, head, slot)), mask, covered)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return a copy of everything the cache holds, for `safetensors.torch.save_file`; see `load_tensors`."""
        return cache_to_tensors(self)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Become a copy of the cache that `to_tensors` saved, of the same config; if it does not fit, stay as it is.

        Raises:
            ValueError: tensors are missing, damaged, or belong to another config.
        """
        load_cache_tensors(self, tensors)

    def can_step(self, chunks: Tensor, length: int) -> bool:
        """Is this a decoding step: one real token in every row, no gradient to keep and no state to go back to?"""
        rows = int((chunks[:, 1] - chunks[:, 0]).sum())
        first = self.layers[0]
        return (
            length == 1
            and first.is_initialized
            and rows == len(first.lengths)
            and not torch.is_grad_enabled()
            and not first.is_recording
        )


def cache_pattern(config: LongNetConfig) -> tuple:
    """What two configs must share to share a cache."""
    lists = tuple(config.segment_lengths), tuple(config.dilation_rates)
    return (*lists, config.num_key_value_heads, config.head_offsets)
