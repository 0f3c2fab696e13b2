"""Padding masks and position ids become chunks: where each document lies, and nothing later sees padding.

Letters: B batch, L columns of the tensor at hand, S columns seen so far with it (S = L without a cache).
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the tokens of a batch belong.

    chunks: (N, 6) int64 on the CPU, the fields of `branches.Chunk`, by row and column; padding is in none.
    positions: (B or 1, L) int64, each token's place in its document (0 for padding).
    documents: (B or 1, L) int64, the number of a token's chunk, -1 for padding; None where all is one document.
    """

    chunks: Tensor
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
        attention_mask: (B, S), nonzero for real tokens, which must lie side by side in a row.
        position_ids: (B or 1, L); a new document begins where they start again at 0.
        starts: tokens of each row that a cache has seen, None without a cache.
        columns: columns that the cache has seen, padding counted.

    Raises:
        ValueError: a mask of another shape or with holes; position ids that jump; either against the cache.
    """
    if starts is not None and columns == 0:
        starts = None
    if attention_mask is None:
        rows = [[(0, length)]] * batch
    else:
        rows = _mask_spans(attention_mask, batch, length, starts, columns)
    if position_ids is not None:
        rows = _document_spans(position_ids, rows, batch, length, starts)
    return _assemble(rows, starts or [0] * batch, length, device)


def _mask_spans(mask, batch, length, starts, columns) -> list[list[tuple[int, int]]]:
    """First and last-plus-one real column of each row within the new columns; no span in a row without any."""
    if mask.dim() != 2 or tuple(mask.shape) != (batch, columns + length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {(batch, columns + length)}: (batch, columns), "
            "nonzero for real tokens, the columns in the cache included. Masks of pairs are not supported."
        )
    real = (mask != 0).cpu()
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
    if starts is not None:
        seen = real[:, :columns].sum(1).tolist()
        if seen != list(starts):
            raise ValueError(
                f"attention_mask contradicts the cache: it marks {seen} real tokens among the {columns} columns "
                f"already seen, the cache holds {list(starts)}."
            )
    spans = []
    for row in range(batch):
        new = real[row, columns:].nonzero().flatten()
        spans.append([(int(new[0]), int(new[-1]) + 1)] if len(new) else [])
    return spans


def _document_spans(position_ids, rows, batch, length, starts):
    """Cut each row's span where its position ids start again at 0."""
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; expected ({batch} or 1, {length}).")
    ids = position_ids.expand(batch, length).cpu()
    breaks = (ids[:, 1:] != ids[:, :-1] + 1).nonzero().tolist()
    cuts = [[] for _ in range(batch)]
    for row, column in breaks:
        cuts[row].append(column + 1)
    result = []
    for row, spans in enumerate(rows):
        if not spans:
            result.append([])
            continue
        begin, end = spans[0]
        borders = [begin, *(c for c in cuts[row] if begin < c < end), end]
        for border in borders[1:-1]:
            if ids[row, border] != 0 or starts is not None:
                raise ValueError(
                    f"position_ids row {row} jump at column {border} from {int(ids[row, border - 1])} to "
                    f"{int(ids[row, border])}: they must grow by 1, or start again at 0 for the next packed document "
                    "(which a cache cannot hold: pass packed documents without one)."
                )
        at, seen = int(ids[row, begin]), 0 if starts is None else starts[row]
        # Without a cache also columns may be counted, as Transformers' models do for padded rows.
        if at != seen and (seen or (starts is None and at != begin)):
            raise ValueError(
                f"position_ids row {row} begin at {at}, but the cache holds {seen} tokens: they must begin at {seen}."
            )
        result.append(list(pairwise(borders)))
    return result


def _assemble(rows, starts, length, device) -> Packing:
    """Chunks of equal neighbouring rows together, and the tensors of positions and documents."""
    chunks = []
    row = 0
    while row < len(rows):
        last = row + 1
        while last < len(rows) and rows[last] == rows[row] and starts[last] == starts[row]:
            last += 1
        for begin, end in rows[row]:
            chunks.append([row, last, begin, end, starts[row], starts[row] + end - begin])
        row = last
    table = torch.tensor(chunks, dtype=torch.int64).reshape(-1, 6)
    if len(chunks) == 1 and chunks[0][:4] == [0, len(rows), 0, length]:
        start = chunks[0][4]
        return Packing(table, torch.arange(start, start + length, device=device)[None], None)
    positions = torch.zeros(len(rows), length, dtype=torch.int64)
    documents = torch.full((len(rows), length), -1)
    for number, (first, last, begin, end, start, total) in enumerate(chunks):
        positions[first:last, begin:end] = torch.arange(start, total)
        documents[first:last, begin:end] = number
    return Packing(table, positions.to(device), documents.to(device))
