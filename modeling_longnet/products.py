"""Split a branch of a chunk into pairs of strided views, queries and keys, that a kernel without masks can compute.

A **view** shows kept tokens of some heads. A **product** is a view of queries and one of keys, with a staircase that
says how many of the keys each query sees.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from .branches import Branch, Chunk, Part, View, count_kept, cut_at_borders, even_runs, head_strides

# Queries of a product with a band. On a CPU, more would compute more keys that no query sees; fewer would use vectors
# badly (benchmarks/README.md).
_BAND_ROWS = 64


class Product(NamedTuple):
    """Query row i sees the first `diagonal + i` of the keys, or all of them if `diagonal` is None.

    Attributes:
        band: if above 0, query row i sees keys i to i + band - 1 instead.
        is_reversed: rows are counted backwards, from the last query and the last key.
        padding: zero keys of the released implementation that each query also attends to.
        is_first: no product of the branch before it has these queries and, outside of a window, these keys.
    """

    queries: View
    keys: View
    diagonal: int | None
    is_reversed: bool = False
    padding: int = 0
    is_first: bool = True
    band: int = 0

    def mask(self) -> dict[str, int]:
        """Return the band, if any, as the keyword argument of a `StridedBackend` that takes it."""
        return {"band": self.band} if self.band else {}

    def steps(self) -> Iterator[tuple[slice, slice, bool]]:
        """Yield rows, keys and whether row i of these rows sees these keys up to the i-th only (True) or all of them.

        Together they are the staircase, in at most three rectangles and triangles.
        """
        rows, keys = self.queries.seqlen, self.keys.seqlen
        if not keys:
            return
        if self.diagonal is None or self.band:
            yield slice(rows), slice(keys), False
            return
        begin = min(max(0, 1 - self.diagonal), rows)  # the first row that sees a key
        end = min(max(begin, keys - self.diagonal + 1), rows)  # from here on rows see all keys
        before = self.diagonal + begin - 1  # keys that all rows from `begin` to `end` see
        if begin < end:
            yield slice(begin, end), slice(before, before + end - begin), True
            if before:
                yield slice(begin, end), slice(before), False
        if end < rows:
            yield slice(end, rows), slice(keys), False


@lru_cache(maxsize=4096)
def branch_products(
    chunk: Chunk, branch: Branch, heads: int, is_causal: bool, keys: str, bands: bool = False
) -> tuple[Product, ...]:
    """Return the products that make up a branch in a chunk, for `heads` query heads.

    Args:
        keys: "chunk" for the chunk's own keys, "prefix" or "suffix" for the halo before or after it (see `HaloKV`).
        bands: a causal window may take products with a `band`, which compute fewer keys that no query sees.
    """
    if branch.is_window and bands and is_causal and keys == "chunk" and chunk.length > branch.w:
        products = _band_products(chunk, branch, heads)
    elif branch.is_window:
        products = _window_products(chunk, branch, heads, is_causal, keys)
    else:
        rows = (_QueryRows(*part, chunk, branch, heads, is_causal, keys) for part in _query_parts(chunk, branch))
        products = (product for part in rows for product in part.products())
    return tuple(x for x in products if x.queries.segments * x.queries.seqlen and (x.keys.seqlen or x.padding))


def _query_parts(chunk: Chunk, branch: Branch) -> Iterator[tuple[Part, int, int, int | None]]:
    """Yield parts of the chunk, the place and length of the queries, and the place in the segment where keys end.

    Queries that leave out their segment of an inner branch are cut at its borders. None: keys end with the segment.
    """
    for part in cut_at_borders(chunk, branch):
        inner, place, end = branch.after_segment, part.place, part.place + part.length
        while place < end:
            into = (chunk.start + part.begin + place - part.place + branch.after_phase) % inner if inner else 0
            length = min(inner - into, end - place) if inner else part.length
            yield part, place, length, place - into if inner else None
            place += length


class _QueryRows(NamedTuple):
    """Queries at places [place, place + length) of a part's segments, and the keys of those segments up to `end`."""

    part: Part
    place: int
    length: int
    end: int | None
    chunk: Chunk
    branch: Branch
    heads: int
    is_causal: bool
    keys: str

    def products(self) -> Iterator[Product]:
        """Group the heads, and the offsets of a head's queries, into as few products as strides allow."""
        branch, groups = self.branch, len(self.branch.offsets)
        r, repeat = branch.r, self.heads // groups
        if not branch.query_offsets or (repeat == 1 and branch.query_rate == r):
            # One offset per key/value head. Query heads that share one are adjacent: their keys must not be spaced.
            specs = [self._spec(g, o) for g, o in enumerate(branch.query_offsets or branch.offsets)]
            strides, largest = ([1], 0) if repeat > 1 else (head_strides(groups, r), r)
            stride, runs = even_runs(specs, strides, largest)
            for g, count, step, key_step in runs:
                head_step = 1 if repeat > 1 else stride
                of_queries = g * repeat, count * repeat, head_step, step
                yield self._product(specs[g], of_queries, (g, count, stride, key_step))
            return
        for g in range(groups):
            heads = range(g * repeat, (g + 1) * repeat)
            if branch.query_rate < r:
                for head in heads:
                    for spec, count in self._offset_runs(g, head):
                        yield self._product(spec, (head, count, 0, branch.query_rate), (g, 1, 1, 0))
                continue
            specs = sorted((h, *self._spec(g, branch.query_offsets[h])) for h in heads)
            _, runs = even_runs(specs, [1], r)
            for i, count, head_step, step in runs:
                head, *spec = specs[i]
                yield self._product(tuple(spec), (head, count, head_step, step), (g, 1, 1, 0))

    def _offset_runs(self, group: int, head: int) -> list[tuple[tuple, int]]:
        """Group a head's query offsets with equal counts: return the first offset's spec and the size of each group.

        The counts change at two offsets only, where there is one query fewer or one key more. A head may have thousands
        of offsets, so only these two are computed.
        """
        branch, r, rate = self.branch, self.branch.r, self.branch.query_rate
        begin, runs = (branch.query_offsets[head] - self.place) % rate, []
        cuts = sorted({0, self.length % r, (branch.after_window + branch.offsets[group] - self.place) % r, r})
        for low, high in pairwise(cuts):
            firsts = range(begin + -(-(low - begin) // rate) * rate, high, rate)
            if not firsts:
                continue
            spec = self._spec(group, (self.place + firsts[0]) % r)
            if runs and runs[-1][0][2:] == spec[2:]:
                runs[-1] = runs[-1][0], runs[-1][1] + len(firsts)
            else:
                runs.append((spec, len(firsts)))
        return runs

    def _spec(self, group: int, offset: int) -> tuple:
        """Describe the product of the queries at this offset with a key/value head.

        Returns the tokens of the first query and of the first key in the chunk, the number of queries, the number of
        keys, and the diagonal and padding of `Product`.
        """
        part, branch, r, o = self.part, self.branch, self.branch.r, self.branch.offsets[group]
        seqlen = count_kept(self.place + self.length, offset, r) - count_kept(self.place, offset, r)
        first = (offset - self.place) % r
        before, own, all_keys = part.counts(self.chunk, branch, o)
        seen = all_keys if self.end is None else part.count(self.end, o, r)
        diagonal = None
        if self.is_causal and (self.end is None or branch.after_window):
            origin = o + count_kept(part.ghost, o, r) * r  # the place of the segment's first key
            diagonal = (self.place + first - branch.after_window - origin) // r + 1
        key_first, padding = part.begin + (o - part.place) % r, -(-min(branch.w, self.chunk.total) // r) - all_keys
        if self.keys == "chunk":
            keys, diagonal = max(0, min(seen, own) - before), None if diagonal is None else diagonal - before
        elif self.keys == "prefix":
            keys, key_first, padding = min(before, seen), 0, 0
        else:
            keys, key_first, padding = all_keys - own, 0, 0
        return part.begin + self.place - part.place + first, key_first, seqlen, keys, diagonal, padding

    def _product(self, spec: tuple, of_queries: tuple[int, ...], of_keys: tuple[int, ...]) -> Product:
        first, key_first, seqlen, keys, diagonal, padding = spec
        segments, w, r = self.part.segments, self.branch.w, self.branch.r
        queries = View(first, segments, w, *of_queries, seqlen, r)
        if self.keys == "chunk":
            view = View(key_first, segments, w, *of_keys, keys, r)
        else:  # the halo belongs to the one segment that the chunk's border cuts
            view = View(0, 1, 0, *of_keys[:3], 0, keys, 1)
        return Product(queries, view, diagonal, padding=padding)


def _band_products(chunk: Chunk, branch: Branch, heads: int) -> Iterator[Product]:
    """Yield a causal window's products: the first w tokens see all before them, blocks of later ones a band of keys."""
    w, groups, size = branch.w, len(branch.offsets), min(branch.w, _BAND_ROWS)

    def product(begin, rows, segments, keys):
        queries = View(begin, segments, size, 0, heads, 1, 0, rows, 1)
        return queries, View(begin + rows - keys, segments, size, 0, groups, 1, 0, keys, 1)

    blocks, rest = divmod(chunk.length - w, size)
    yield Product(*product(0, w, 1, w), 1)
    yield Product(*product(w, size, blocks, size + w - 1), None, band=w)
    yield Product(*product(w + blocks * size, rest, 1, rest + w - 1), None, band=w)


def _window_products(chunk: Chunk, branch: Branch, heads: int, is_causal: bool, keys: str) -> Iterator[Product]:
    """Yield a window's products: blocks of w queries with their own block, the one before and, bidirectional, after."""
    w, length, groups = branch.w, chunk.length, len(branch.offsets)

    def product(begin, rows, segments, key_begin, key_rows, diagonal, is_reversed=False):
        queries = View(begin, segments, w, 0, heads, 1, 0, rows, 1)
        view = View(key_begin, segments, w, 0, groups, 1, 0, key_rows, 1)
        return Product(queries, view, diagonal, is_reversed, is_first=keys == "chunk" and begin == key_begin)

    if keys == "prefix":  # a query d tokens behind the border sees the last w - 1 - d tokens before it
        rows, count = min(w - 1, length), min(w - 1, chunk.start)
        yield product(0, rows, 1, 0, count, w - rows, True)
        return
    if keys == "suffix":
        rows, count = min(w - 1, length), min(w - 1, chunk.total - chunk.start - length)
        yield product(length - rows, rows, 1, 0, count, w - rows)
        return
    blocks, rest = divmod(length, w)
    own = 1 if is_causal else None
    yield product(0, w, blocks, 0, w, own)
    yield product(blocks * w, rest, 1, blocks * w, rest, own)
    # Counted backwards, a query sees one key fewer of the block before than the query before it.
    yield product(w, w, max(0, blocks - 1), 0, w, 0, True)
    if blocks:
        yield product(blocks * w, rest, 1, (blocks - 1) * w, w, w - rest, True)
    if not is_causal:
        yield product(0, w, max(0, blocks - 1), w, w, 0)
        if blocks:
            yield product((blocks - 1) * w, w, 1, blocks * w, rest, 0)
