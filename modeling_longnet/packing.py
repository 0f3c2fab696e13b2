"""Padding masks and position ids become chunks: where each document is in the batch. No later step sees padding.

Letters: B batch, L new columns, S columns seen so far including the new ones (S = L without a cache).
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .branches import Chunk, whole_batch

# First and last-plus-one column of each document in a batch row.
Spans = list[tuple[int, int]]


class Packing(NamedTuple):
    """Where the tokens of a batch belong.

    Attributes:
        chunks: one for each document and group of equal batch rows; padding is in none.
        positions: (B or 1, L) int64, each token's position in its document (0 for padding).
        documents: (B or 1, L) int64, the number of a token's chunk, -1 for padding; None if all is one document.
    """

    chunks: tuple[Chunk, ...]
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
        starts: tokens of each batch row that a cache has seen, None without a cache.
        columns: columns that the cache has seen, padding included.

    Raises:
        ValueError: a mask of another shape or with holes; position ids that jump; either against the cache.
    """
    if starts is not None and columns == 0:
        starts = None
    if attention_mask is None and position_ids is None and starts is None:
        return Packing(whole_batch(batch, length), torch.arange(length, device=device)[None], None)
    rows = [[(0, length)]] * batch
    if attention_mask is not None:
        rows = _mask_spans(attention_mask, batch, length, starts, columns)
    if position_ids is not None:
        rows = _document_spans(position_ids, rows, batch, length, starts, columns)
    return _assemble(rows, starts or [0] * batch, length, device)


def _mask_spans(mask: Tensor, batch: int, length: int, starts: list[int] | None, columns: int) -> list[Spans]:
    """Return the real tokens of each batch row within the new columns; no span for a row without any."""
    if mask.dim() != 2 or tuple(mask.shape) != (batch, columns + length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {(batch, columns + length)}: (batch, columns), "
            "nonzero for real tokens, the columns in the cache included. Masks of pairs are not supported."
        )
    real = (mask != 0).cpu()
    _check_holes(real)
    if starts is not None:
        seen = real[:, :columns].sum(1).tolist()
        if seen != list(starts):
            raise ValueError(
                f"attention_mask contradicts the cache: it marks {seen} real tokens among the {columns} columns "
                f"already seen, the cache holds {list(starts)}."
            )
    columns_of = [row.nonzero().flatten() for row in real[:, columns:]]
    return [[(int(new[0]), int(new[-1]) + 1)] if len(new) else [] for new in columns_of]


def _check_holes(real: Tensor) -> None:
    counts = real.sum(1)
    first = real.int().argmax(1)
    last = real.shape[1] - real.flip(1).int().argmax(1)
    holes = (counts > 0) & (last - first != counts)
    if holes.any():
        row = int(holes.nonzero()[0])
        raise ValueError(
            f"attention_mask row {row} has holes: its {int(counts[row])} real tokens lie between columns "
            f"{int(first[row])} and {int(last[row])}. They must lie side by side; pad on the left or right only, "
            "or pack documents with position_ids that start again at 0."
        )


def _document_spans(
    position_ids: Tensor, rows: list[Spans], batch: int, length: int, starts: list[int] | None, columns: int
) -> list[Spans]:
    """Cut each batch row's span where its position ids restart at 0."""
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; expected ({batch} or 1, {length}).")
    ids = position_ids.expand(batch, length).cpu()
    cuts = [[] for _ in range(batch)]
    for row, column in (ids[:, 1:] != ids[:, :-1] + 1).nonzero().tolist():
        cuts[row].append(column + 1)
    result = []
    for row, spans in enumerate(rows):
        if spans:
            begin, end = spans[0]
            inner = [c for c in cuts[row] if begin < c < end]
            _check_positions(ids[row], row, begin, inner, None if starts is None else starts[row], columns)
            spans = list(pairwise([begin, *inner, end]))
        result.append(spans)
    return result


def _check_positions(ids: Tensor, row: int, begin: int, borders: list[int], seen: int | None, columns: int) -> None:
    """Raise ValueError unless positions restart at 0 at the borders, and begin where the cache ends (`seen`)."""
    for border in borders:
        if ids[border] != 0 or seen is not None:
            raise ValueError(
                f"position_ids row {row} jump at column {border} from {int(ids[border - 1])} to {int(ids[border])}: "
                "they must grow by 1, or start again at 0 for the next packed document (which a cache cannot hold: "
                "pass packed documents without one)."
            )
    # They may count columns instead, as in Transformers' models for padded batches.
    first = int(ids[begin])
    if first not in (seen or 0, columns + begin):
        raise ValueError(
            f"position_ids row {row} begin at {first}, but the cache holds {seen or 0} tokens: they must begin at "
            f"{seen or 0}. Packed documents, and positions with gaps, cannot go on from a cache."
        )


def _assemble(rows: list[Spans], starts: list[int], length: int, device: torch.device) -> Packing:
    """Join equal adjacent batch rows to chunks, and build the tensors of positions and documents."""
    chunks = []
    row = 0
    while row < len(rows):
        last = row + 1
        while last < len(rows) and rows[last] == rows[row] and starts[last] == starts[row]:
            last += 1
        start = starts[row]
        chunks += [Chunk(row, last, begin, end, start, start + end - begin) for begin, end in rows[row]]
        row = last
    if len(chunks) == 1 and chunks[0][:4] == (0, len(rows), 0, length):
        start = chunks[0].start
        return Packing(tuple(chunks), torch.arange(start, start + length, device=device)[None], None)
    positions = torch.zeros(len(rows), length, dtype=torch.int64)
    documents = torch.full((len(rows), length), -1)
    for number, (first, last, begin, end, start, total) in enumerate(chunks):
        positions[first:last, begin:end] = torch.arange(start, total)
        documents[first:last, begin:end] = number
    return Packing(tuple(chunks), positions.to(device), documents.to(device))
