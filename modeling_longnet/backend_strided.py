"""The loop shared by kernels that take strided (batch, heads, seqlen, D) views: PyTorch's and flash-attn's.

A branch is cut into slices (see `branches`). Each slice is one or a few kernel calls on views of the tensors, and the
results are merged into views of the running out and lse.

Letters: B batch, L tokens, H query heads, G key/value heads, D head dimension, P halo slots, n segments, h heads of a
slice. Tensors are (B, L, H, D), which makes every slice a strided view.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .backend import Backend, BranchCall, Grads
from .branches import Branch, Chunk, Slice, chunk_slices

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


def slice_view(x: Tensor, chunk: Chunk, branch: Branch, piece: Slice) -> Tensor:
    """Return a slice of a (B, L, H or G, ...) tensor as a strided (B, n, h, seqlen, ...) view."""
    batch_stride, token_stride, head_stride, *dim_strides = x.stride()
    _, _, heads, *dims = x.shape
    repeat = heads // len(branch.offsets)  # heads that share a key/value head
    first_token = chunk.column_begin + piece.begin + piece.first
    first = first_token * token_stride + piece.head * repeat * head_stride + chunk.batch_begin * batch_stride
    if repeat == 1:  # else the slice holds adjacent heads with equal offsets (`chunk_slices`)
        head_stride = piece.head_stride * head_stride + piece.first_stride * token_stride
    size = (chunk.batch, piece.segments, piece.heads * repeat, piece.seqlen, *dims)
    stride = (batch_stride, branch.w * token_stride, head_stride, branch.r * token_stride, *dim_strides)
    return x.as_strided(size, stride, x.storage_offset() + first)


def slice_heads(piece: Slice) -> slice:
    """Return the key/value heads of a slice as an index."""
    return slice(piece.head, piece.head + (piece.heads - 1) * piece.head_stride + 1, piece.head_stride)


def _branch_views(call: BranchCall, piece: Slice, of_queries: list[Tensor], of_keys: list[Tensor]) -> Iterator[tuple]:
    """Yield the (batch, h, seqlen, ...) views of each kernel call that computes a slice.

    `of_queries` are (B, L, H, ...) tensors, `of_keys` (B, L, G, ...), or (B, P, G, ...) for a halo.
    """
    views = [slice_view(x, call.chunk, call.branch, piece) for x in of_queries]
    if call.keys == "chunk":
        yield from _kernel_calls(*views, *(slice_view(x, call.chunk, call.branch, piece) for x in of_keys))
    elif count := piece.prefix if call.keys == "prefix" else piece.suffix:
        batch, heads = slice(call.chunk.batch_begin, call.chunk.batch_end), slice_heads(piece)
        # A slice with a prefix or suffix is a part of one segment.
        yield *(x[:, 0] for x in views), *(x[batch, :count, heads].transpose(1, 2) for x in of_keys)


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


def _whole_views(call: BranchCall, piece: Slice, *tensors: Tensor) -> list[Tensor]:
    """Return the (batch, h, seqlen, ...) views of a slice that one kernel call computes."""
    return [slice_view(x, call.chunk, call.branch, piece).flatten(0, 1) for x in tensors]


def _as_tokens(x: Tensor, like: Tensor) -> Tensor:
    """Reshape a kernel's (B * n, h, seqlen, ...) result to (B, L, h, ...): a view of what the kernel wrote."""
    return x.transpose(1, 2).reshape(like.shape[: x.dim()])


class StridedBackend(Backend):
    """A backend whose kernel takes (batch, heads, seqlen, D) views of any strides with D contiguous.

    Key and value may have fewer heads than the query. lse is (batch, heads, seqlen).
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> list[Part]:
        """Return softmax(q k^T * scale) v and its lse, in one or several parts of the queries.

        With is_causal, query and key have the same length and a query sees keys up to its own index.
        """
        raise NotImplementedError

    def backward(self, grad_out, query, key, value, out, lse, is_causal: bool, scale: float) -> Grads:
        """Return the gradients of query, key and value; `out` and `lse` may be of a softmax over more keys.

        All are tensors of the shapes that `forward` takes and returns.
        """
        raise NotImplementedError

    def splits_queries(self, query: Tensor, seqlen: int) -> bool:
        """Return True if causal attention over `seqlen` tokens takes several calls."""
        return False

    def forward_branch(self, call, query, key, value, out, lse):
        for piece in chunk_slices(call.chunk, call.branch, query.shape[2] > key.shape[2]):
            if self.is_whole(call, piece, query, key):
                # The slice is the whole branch, and the result becomes the running out: no copy, no second allocation.
                views = _whole_views(call, piece, query, key, value)
                [(_, out, lse)] = self.forward(*views, call.is_causal, call.scale)
                return _as_tokens(out, query), _as_tokens(lse, query)
            for q, o, s, k, v in _branch_views(call, piece, [query, out, lse], [key, value]):
                for queries, new_out, new_lse in self.forward(q, k, v, call.is_causal, call.scale):
                    _write(call.is_first, o[:, :, queries], s[:, :, queries], new_out, new_lse)
                if call.zero_padding and piece.padding:
                    # n zero keys have out 0 and lse ln(n). They are constants: backward, they act through lse alone.
                    merge_(o, s, torch.zeros_like(o), torch.full_like(s, piece.padding).log_())
        return out, lse

    def backward_branch(self, call, grad_out, query, key, value, saved, lse, grads):
        for piece in chunk_slices(call.chunk, call.branch, query.shape[2] > key.shape[2]):
            if self.is_whole(call, piece, query, key):
                views = _whole_views(call, piece, grad_out, query, key, value, saved, lse)
                parts = self.backward(*views, call.is_causal, call.scale)
                return tuple(_as_tokens(part, x) for part, x in zip(parts, (query, key, value), strict=True))
            of_queries, of_keys = [query, grad_out, saved, lse, grads[0]], [key, value, *grads[1:]]
            for q, g, o, s, dq, k, v, dk, dv in _branch_views(call, piece, of_queries, of_keys):
                parts = self.backward(g, q, k, v, o, s, call.is_causal, call.scale)
                for total, part in zip((dq, dk, dv), parts, strict=True):
                    total.copy_(part) if call.is_first else total.add_(part)
        return grads

    def is_whole(self, call: BranchCall, piece: Slice, query: Tensor, key: Tensor) -> bool:
        """Return True if one kernel call computes every head and token, in the order of memory.

        Not in half precision, which is slower this way (benchmarks/README.md).
        """
        batch, length, heads = key.shape[:3]
        return (
            call.is_first
            and not (call.zero_padding and piece.padding)
            and call.chunk.batch == batch
            and piece.heads == heads
            and piece.segments * piece.seqlen == length
            and all(x.stride(0) == length * x.stride(1) or batch == 1 for x in (query, key))
            and not (call.is_causal and self.splits_queries(query, piece.seqlen))
            and query.dtype in (torch.float32, torch.float64)
            and (query.device.type == "cpu" or batch * piece.segments <= _CUDA_BATCH_PER_CALL)
        )


def _write(is_first: bool, out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    if is_first:
        out.copy_(new_out)
        lse.copy_(new_lse)
    else:
        merge_(out, lse, new_out, new_lse)
