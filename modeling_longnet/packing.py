"""Convert padding masks and position ids to chunks: where each document is in the batch. No later step sees padding.

Letters: B batch, L new columns, S columns seen so far including the new ones (S = L without a cache).
"""

from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_autograd import register_operator
from .branches import Chunk, whole_batch

# Columns between which the documents of a batch row lie: n + 1 for n documents, none for a row of padding.
Borders = list[int]


class Packing(NamedTuple):
    """Where the tokens of a batch belong.

    Attributes:
        chunks: one for each document and group of equal batch rows; padding is in none. In a compiled graph a tensor.
        positions: (B or 1, L) int64, each token's position in its document (0 for padding).
        documents: (B or 1, L) int64, the number of a token's chunk, -1 for padding; None if all is one document.
    """

    chunks: tuple[Chunk, ...] | Tensor
    positions: Tensor
    documents: Tensor | None


def pack(
    batch: int,
    length: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    starts: list[int] | None = None,
    columns: int = 0,
) -> Packing:
    """Find the documents of a batch.

    Args:
        attention_mask: (B, S), nonzero for real tokens, which must be contiguous in a batch row.
        position_ids: (B or 1, L); a new document begins where they restart at 0.
        starts: tokens of each batch row that a cache has seen. None without a cache: then a compiled graph finds the
            chunks by an operator, as a tensor.
        columns: columns that the cache has seen, padding included.

    Raises:
        ValueError: a mask of the wrong shape or with holes; position ids that jump; either one contradicts the cache.
    """
    if attention_mask is None and position_ids is None and columns == 0:
        return lay_out(whole_batch(batch, length), batch, length, device)
    if starts is None and torch.compiler.is_compiling():
        return _pack_in_graph(batch, length, device, attention_mask, position_ids)
    starts = starts if columns else [0] * batch
    rows = [[0, length]] * batch
    if attention_mask is not None:
        rows = _mask_borders(attention_mask, length, starts, columns)
    if position_ids is not None:
        rows = _document_borders(position_ids, rows, length, starts, columns)
    chunks, row = [], 0
    for (borders, start), equal in groupby(zip(rows, starts, strict=True)):
        last = row + len(list(equal))
        chunks += [Chunk(row, last, begin, end, start, start + end - begin) for begin, end in pairwise(borders)]
        row = last
    return lay_out(tuple(chunks), batch, length, device)


def _pack_in_graph(batch, length, device, mask: Tensor | None, position_ids: Tensor | None) -> Packing:
    """As `pack`, in a compiled graph, which cannot read values: an operator checks the inputs and finds the chunks."""
    shape = batch, length
    real = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.to(device) != 0
    begins, positions = real.clone(), real.cumsum(1) - 1
    begins[:, 1:] &= ~real[:, :-1]
    if position_ids is not None:
        ids = position_ids.to(device).long().expand(shape)
        begins[:, 1:] |= real[:, 1:] & (ids[:, 1:] != ids[:, :-1] + 1)
    numbers = begins.cumsum(1)  # of the documents in each row, from 1
    if position_ids is not None:  # the first document's ids may count columns
        positions = ids - (numbers == 1) * ids.gather(1, real.int().argmax(1, keepdim=True))
    documents = numbers + length * torch.arange(batch, device=device)[:, None]
    chunks = find_chunks(mask, position_ids, batch, length)
    return Packing(chunks, positions.where(real, 0), documents.where(real, -1))


def _find_chunks(mask: Tensor | None, position_ids: Tensor | None, batch: int, length: int) -> Tensor:
    """Return the chunks of `pack`, (chunks, 6) on the CPU, with rows of zeros after the last one."""
    chunks = pack(batch, length, torch.device("cpu"), mask, position_ids, [0] * batch).chunks
    table = _fake_chunks(mask, position_ids, batch, length).zero_()
    table[: len(chunks)] = torch.tensor(chunks, dtype=torch.int64).view(-1, len(Chunk._fields))
    return table


def _fake_chunks(mask, position_ids, batch, length) -> Tensor:
    most = batch if position_ids is None else batch * length
    return torch.empty(most, len(Chunk._fields), dtype=torch.int64, device="cpu")


find_chunks = register_operator(
    "find_chunks(Tensor? mask, Tensor? position_ids, SymInt batch, SymInt length) -> Tensor",
    _find_chunks,
    _fake_chunks,
    reads_values=True,
)


def real_tokens(mask: Tensor) -> Tensor:
    """Return the mask as bool, True for real tokens. Raises ValueError for one that is to be added to scores."""
    if mask.is_floating_point() and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask has values other than 0 and 1; expected 1 for real tokens, 0 for padding.")
    return mask != 0


def _mask_borders(mask: Tensor, length: int, starts: list[int], columns: int) -> list[Borders]:
    """Return where the real tokens of each batch row begin and end within the new columns."""
    shape = len(starts), columns + length
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {shape}: (batch, columns), nonzero for real "
            "tokens, the columns in the cache included. Masks of (query, key) pairs are not supported."
        )
    real = real_tokens(mask).cpu().int()
    counts, first, last = real.sum(1), real.argmax(1), shape[1] - real.flip(1).argmax(1)
    holes = (counts > 0) & (last - first != counts)
    if holes.any():
        row = int(holes.nonzero()[0])
        left = 'on the left, as new tokens follow (tokenizer.padding_side = "left")'
        sides = left if columns else "on the left or right only"
        raise ValueError(
            f"attention_mask row {row} has holes: its {int(counts[row])} real tokens lie between columns "
            f"{int(first[row])} and {int(last[row])}. They must lie side by side; pad {sides}, or pack documents with "
            "position_ids that start again at 0."
        )
    seen = real[:, :columns].sum(1).tolist()
    if seen != starts:
        raise ValueError(
            f"attention_mask contradicts the cache: it marks {seen} real tokens among the {columns} columns already "
            f"seen, the cache holds {starts}."
        )
    pairs = zip((first - columns).clamp(min=0).tolist(), (first + counts - columns).tolist(), strict=True)
    return [[begin, end] if begin < end else [] for begin, end in pairs]


def _document_borders(
    position_ids: Tensor, rows: list[Borders], length: int, starts: list[int], columns: int
) -> list[Borders]:
    """Cut each batch row where its position ids restart at 0."""
    batch = len(rows)
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; expected ({batch} or 1, {length}).")
    ids = position_ids.expand(batch, length).cpu()
    ids = ids if ids.is_floating_point() else ids.long()  # small and unsigned types overflow
    named = enumerate(zip(ids, rows, starts, strict=True))
    return [_cut_row(row, x, *borders, start, columns) if borders else [] for row, (x, borders, start) in named]


def _cut_row(row: int, ids: Tensor, begin: int, end: int, start: int, columns: int) -> Borders:
    """Return the borders of the documents in columns [begin, end) of a batch row, with its position ids (L,)."""
    jumps = ids[begin + 1 : end] != ids[begin : end - 1] + 1
    inner = (jumps.nonzero().flatten() + begin + 1).tolist()
    for border in inner:
        if ids[border] != 0 or columns:
            raise ValueError(
                f"position_ids row {row} jump at column {border} from {int(ids[border - 1])} to {int(ids[border])}: "
                "they must grow by 1, or start again at 0 for the next packed document (which a cache cannot hold: "
                "pass packed documents without one)."
            )
    # Position ids may count columns instead, as in Transformers' models for padded batches.
    if ids[begin] not in (start, columns + begin):
        raise ValueError(
            f"position_ids row {row} begin at {int(ids[begin])}; after {start} tokens in the cache they must begin "
            f"at {start}. Packed documents, and positions with gaps, cannot continue from a cache."
        )
    return [begin, *inner, end]


def lay_out(chunks: tuple[Chunk, ...], batch: int, length: int, device: torch.device) -> Packing:
    """Return the positions and documents of the chunks of a batch."""
    if len(chunks) == 1 and chunks[0][:4] == (0, batch, 0, length):
        start = chunks[0].start
        return Packing(chunks, torch.arange(start, start + length, device=device)[None], None)
    positions = torch.zeros(batch, length, dtype=torch.int64)
    documents = torch.full((batch, length), -1)
    for number, (first, last, begin, end, start, _) in enumerate(chunks):
        positions[first:last, begin:end] = torch.arange(start, start + end - begin)
        documents[first:last, begin:end] = number
    return Packing(chunks, positions.to(device), documents.to(device))


def cut_chunks(chunks: tuple[Chunk, ...], begin: int, end: int) -> tuple[Chunk, ...]:
    """Return the parts of the chunks that lie in columns [begin, end), with columns counted from `begin`."""
    parts = []
    for c in chunks:
        low, high = max(begin, c.column_begin), min(end, c.column_end)
        if low < high:
            start = c.start + low - c.column_begin
            parts.append(Chunk(c.batch_begin, c.batch_end, low - begin, high - begin, start, c.total))
    return tuple(parts)
