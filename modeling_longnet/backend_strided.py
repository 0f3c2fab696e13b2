"""The loop shared by kernels that take strided (batch, heads, seqlen, D) views: PyTorch's and flash-attn's.

A branch is cut into products (see `products`). Each is one or a few kernel calls on views of the tensors, and the
results are merged into views of the running out and lse.

Letters: B batch, L tokens, H query heads, G key/value heads, D head dimension, P halo slots, n segments, h heads of a
view. Tensors are (B, L, H, D), which makes every view a strided one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .backend import Backend, BranchCall, Grads
from .branches import Chunk
from .products import Product, View, branch_products

# A larger result is allocated with mmap, and the system zeroes its pages in every call.
_CPU_BYTES_PER_CALL = 2 << 20
# CUDA kernels put the batch into a grid dimension of at most 65,535.
_CUDA_BATCH_PER_CALL = 32768

# A kernel's result for some of the queries: which ones, out (batch, heads, seqlen, D) and lse (batch, heads, seqlen).
Part = tuple[slice, Tensor, Tensor]


def merge_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Merge another softmax into `out` and `lse` in place: the result is over both multisets of keys (Eq. 9-10).

    Args:
        out: (..., D), 0 where lse is -inf. lse: (...), -inf where no key was seen yet.
        other_out, other_lse: the same for the other keys; each query has seen at least one.
    """
    weight = torch.sigmoid(other_lse - lse)  # the other's share of both denominators
    other = other_out.to(weight.dtype)
    if out.dtype == weight.dtype:
        out.lerp_(other, weight[..., None])
    else:  # half precision: one float32 temporary
        out.add_(other.sub_(out).mul_(weight[..., None]))
    torch.logaddexp(lse, other_lse, out=lse)


def strided_view(x: Tensor, view: View, chunk: Chunk, column: int) -> Tensor:
    """Return the tokens that `view` shows of x, (B, L, heads, ...), as a strided (B, n, h, seqlen, ...) tensor.

    `column` is the column of the chunk's first token, or 0 in a halo.
    """
    batch_stride, token_stride, head_stride, *dim_strides = x.stride()
    first = (column + view.first) * token_stride + view.head * head_stride + chunk.batch_begin * batch_stride
    step = view.head_step * head_stride + view.token_step * token_stride
    size = (chunk.batch, view.segments, view.heads, view.seqlen, *x.shape[3:])
    stride = (batch_stride, view.segment_step * token_stride, step, view.rate * token_stride, *dim_strides)
    return x.as_strided(size, stride, x.storage_offset() + first)


def _product_calls(call: BranchCall, product: Product, of_queries: list[Tensor], of_keys: list[Tensor]):
    """Yield the (batch, h, seqlen, ...) views of each kernel call that computes a product, and whether it is causal.

    `of_queries` are (B, L, H, ...) tensors, `of_keys` (B, L, G, ...), or (B, P, G, ...) for a halo.
    """
    chunk, key_column = call.chunk, call.chunk.column_begin if call.keys == "chunk" else 0
    queries = [strided_view(x, product.queries, chunk, chunk.column_begin) for x in of_queries]
    keys = [strided_view(x, product.keys, chunk, key_column) for x in of_keys]
    for rows, columns, is_causal in product.steps():
        if product.is_reversed:
            rows, columns = _reversed(rows, product.queries.seqlen), _reversed(columns, product.keys.seqlen)
        views = [x[:, :, :, rows] for x in queries] + [x[:, :, :, columns] for x in keys]
        for parts in _kernel_calls(*views):
            yield parts, is_causal


def _whole_views(call: BranchCall, product: Product, *tensors: Tensor, keys: tuple[int, ...]) -> list[Tensor]:
    """Return the (batch, h, seqlen, ...) views of a product for one kernel call; `keys` are indices of key tensors."""
    views = (product.keys if i in keys else product.queries for i in range(len(tensors)))
    column = call.chunk.column_begin
    return [strided_view(x, view, call.chunk, column).flatten(0, 1) for x, view in zip(tensors, views, strict=True)]


def _reversed(rows: slice, seqlen: int) -> slice:
    """Return the slice of the rows that `rows` selects when counted from the last row."""
    begin, end, _ = rows.indices(seqlen)
    return slice(seqlen - end, seqlen - begin)


def _kernel_calls(*views: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Reshape (B, n, h, seqlen, ...) views to (batch, h, seqlen, ...), in as few kernel calls as strides allow."""
    batch, segments = views[0].shape[:2]
    dim, count = (0, batch) if batch < segments else (1, segments)
    if count > 1 and all(x.stride(0) == segments * x.stride(1) for x in views):
        yield from _split_batch([x.flatten(0, 1) for x in views])
    elif count > 1 and all(x.shape[2] == 1 for x in views):
        yield from _split_batch([x[:, :, 0] for x in views])
    else:
        for i in range(count):
            yield from _split_batch([x.select(dim, i) for x in views])


def _split_batch(views: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Split a call so that its results stay in reused memory (CPU) or its batch within the grid's limit (CUDA)."""
    query = views[0]
    most = _CUDA_BATCH_PER_CALL
    if query.device.type == "cpu":
        most = max(1, _CPU_BYTES_PER_CALL // max(1, query[0].numel() * query.element_size()))
    for begin in range(0, query.shape[0], most):
        yield tuple(x[begin : begin + most] for x in views)


def _as_tokens(x: Tensor, like: Tensor) -> Tensor:
    """Reshape a kernel's (B * n, h, seqlen, ...) result to (B, L, h, ...): a view of what the kernel wrote."""
    return x.transpose(1, 2).reshape(like.shape[: x.dim()])


class StridedBackend(Backend):
    """A backend whose kernel takes (batch, heads, seqlen, D) views of any strides with D contiguous.

    Key and value may have fewer heads than the query. lse is (batch, heads, seqlen).
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, band: int = 0
    ) -> list[Part]:
        """Return softmax(q k^T * scale) v and its lse, in one or several parts of the queries.

        With is_causal, query and key have the same length and a query sees keys up to its own index. With a band,
        which only a backend that `takes_bands` gets, query i sees keys i to i + band - 1.
        """
        raise NotImplementedError

    def backward(self, grad_out, query, key, value, out, lse, is_causal: bool, scale: float, band: int = 0) -> Grads:
        """Return the gradients of query, key and value; `out` and `lse` may be of a softmax over more keys.

        All are tensors of the shapes that `forward` takes and returns.
        """
        raise NotImplementedError

    def takes_bands(self, query: Tensor, window: int) -> bool:
        """Return True if `forward` and `backward` take a band for a window of this size."""
        return False

    def splits_queries(self, query: Tensor, seqlen: int) -> bool:
        """Return True if causal attention over `seqlen` tokens takes several calls."""
        return False

    def _products(self, call: BranchCall, query: Tensor) -> tuple[Product, ...]:
        bands = self.takes_bands(query, call.branch.w)
        return branch_products(call.chunk, call.branch, query.shape[2], call.is_causal, call.keys, bands)

    def forward_branch(self, call, query, key, value, out, lse):
        for product in self._products(call, query):
            if self.is_whole(call, product, query, key):
                # One call is the whole branch, and its result becomes the running out: no copy, no second allocation.
                views = _whole_views(call, product, query, key, value, keys=(1, 2))
                [(_, out, lse)] = self.forward(*views, call.is_causal, call.scale)
                return _as_tokens(out, query), _as_tokens(lse, query)
            calls = _product_calls(call, product, [query, out, lse], [key, value])
            is_first = call.is_first and product.is_first
            for (q, o, s, k, v), is_causal in calls:
                if product.is_reversed and is_causal:
                    q, k, v = (x.flip(2) for x in (q, k, v))
                for queries, new_out, new_lse in self.forward(q, k, v, is_causal, call.scale, **product.mask()):
                    if product.is_reversed and is_causal:
                        queries, new_out, new_lse = _reversed(queries, q.shape[2]), new_out.flip(2), new_lse.flip(2)
                    _write(is_first, o[:, :, queries], s[:, :, queries], new_out, new_lse)
            if call.zero_padding and product.padding:
                # n zero keys have out 0 and lse ln(n). They are constants: backward they act through lse only.
                o, s = (strided_view(x, product.queries, call.chunk, call.chunk.column_begin) for x in (out, lse))
                merge_(o, s, torch.zeros_like(o), torch.full_like(s, product.padding).log_())
        return out, lse

    def backward_branch(self, call, grad_out, query, key, value, saved, lse, grads):
        is_first_key = call.is_first and not call.branch.is_window
        if call.is_first and call.branch.is_window:  # its products share keys
            chunk = call.chunk
            rows, columns = slice(*chunk[:2]), slice(*chunk[2:4])
            for x in grads[1:]:
                x[rows, columns] = 0
        for product in self._products(call, query):
            if self.is_whole(call, product, query, key):
                views = _whole_views(call, product, grad_out, query, key, value, saved, lse, keys=(2, 3))
                parts = self.backward(*views, call.is_causal, call.scale)
                return tuple(_as_tokens(part, x) for part, x in zip(parts, (query, key, value), strict=True))
            of_queries, of_keys = [query, grad_out, saved, lse, grads[0]], [key, value, *grads[1:]]
            for views, is_causal in _product_calls(call, product, of_queries, of_keys):
                is_reversed = product.is_reversed and is_causal
                q, g, o, s, *_ = inputs = [x.flip(2) if is_reversed else x for x in views]
                parts = self.backward(g, q, *inputs[5:7], o, s, is_causal, call.scale, **product.mask())
                dq, dk, dv = (part.flip(2) if is_reversed else part for part in parts)
                _sum(views[4], dq, call.is_first and product.is_first)
                # Bands of keys overlap: each begins `step` keys after the one before. Add `step` keys at a time.
                step = product.queries.seqlen if product.band else dk.shape[2]
                for begin in range(0, dk.shape[2], step):
                    keys = slice(begin, begin + step)
                    _sum(views[7][:, :, keys], dk[:, :, keys], is_first_key)
                    _sum(views[8][:, :, keys], dv[:, :, keys], is_first_key)
        return grads

    def is_whole(self, call: BranchCall, product: Product, query: Tensor, key: Tensor) -> bool:
        """Return True if one kernel call computes every head and token, in the order of memory.

        Half precision is excluded: it is slower this way (benchmarks/README.md).
        """
        batch, length, heads = query.shape[:3]
        queries, keys = product.queries, product.keys
        return (
            call.is_first
            and not call.branch.is_window
            and not (call.zero_padding and product.padding)
            and call.chunk.batch == batch
            and queries.heads == heads
            and queries.segments * queries.seqlen == keys.segments * keys.seqlen == length
            and all(x.stride(0) == length * x.stride(1) or batch == 1 for x in (query, key))
            and not (call.is_causal and self.splits_queries(query, queries.seqlen))
            and query.dtype in (torch.float32, torch.float64)
            and (query.device.type == "cpu" or batch * queries.segments <= _CUDA_BATCH_PER_CALL)
        )


def _write(is_first: bool, out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    if is_first:
        out.copy_(new_out)
        lse.copy_(new_lse)
    else:
        merge_(out, lse, new_out, new_lse)


def _sum(total: Tensor, part: Tensor, is_first: bool) -> None:
    total.copy_(part) if is_first else total.add_(part)
