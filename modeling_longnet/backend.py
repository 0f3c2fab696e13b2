"""The protocol of an attention backend: one branch of one chunk at a time, merged into a running (out, lse).

Letters: B batch, L tokens, H query heads, G key/value heads, D head dimension, P slots. Tensors are (B, L, H, D).
"""

from typing import Literal, NamedTuple

from torch import Tensor

from .branches import Branch, Chunk

Grads = tuple[Tensor, Tensor, Tensor]


class BranchCall(NamedTuple):
    """What one call of a backend computes: the queries of a chunk against some of the keys of one branch.

    Attributes:
        keys: "chunk" for the chunk's own keys, "prefix" or "suffix" for those of the first or last segment that lie
            before or after the chunk.
        is_causal: a query sees no later key. In the paper's pattern a query of the first (last) segment sees all of its
            head's prefix (suffix), and other queries see none of it. For other patterns see `Branch`.
        scale: factor of the scores, above 0.
        zero_padding: also attend to the zero keys of the released implementation (with keys="chunk" only).
        is_first: this call covers every token of the chunk and none was written yet: overwrite instead of merging.
        overlaps: the previous call wrote none of query, key and value, so a GPU kernel may start before that call ends
            and wait for it only before reading or writing results (programmatic dependent launch).
    """

    chunk: Chunk
    branch: Branch
    keys: Literal["chunk", "prefix", "suffix"]
    is_causal: bool
    scale: float
    zero_padding: bool = False
    is_first: bool = False
    overlaps: bool = False


class Backend:
    """Base class of the attention backends: a backend is one file with a subclass, and one line in `BACKENDS`."""

    def unavailable(self, query: Tensor) -> str | None:
        """Return why the backend cannot serve a query of this dtype, device and head dimension; None if it can."""
        raise NotImplementedError

    def forward_branch(
        self, call: BranchCall, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Merge one branch into the running softmax (Eq. 9-10); return out and lse, changed in place (new if is_first).

        Args:
            query: (B, L, H, D). key, value: (B, L, G, D) with keys="chunk", else (B, P, G, D), where slot j of head g
                is its j-th kept token of the segment before (after) the chunk; other slots are never read.
            out: (B, L, H, D), contiguous, 0 where lse is -inf. lse: (B, L, H), contiguous, at least float32.
        """
        raise NotImplementedError

    def prepare_backward(self, out: Tensor, grad_out: Tensor) -> Tensor:
        """Return `saved` for all branches: out, or delta = rowsum(out * grad_out) (FlashAttention-2, Algorithm 2)."""
        return out

    def backward_branch(
        self,
        call: BranchCall,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        saved: Tensor,
        lse: Tensor,
        grads: Grads,
    ) -> Grads:
        """Add the gradients of one branch; return the sums, changed in place (new if is_first).

        The share of a branch is exact: `lse` and the out in `saved` are those of the softmax merged over all branches.

        Args:
            grad_out: (B, L, H, D), contiguous. saved: the result of `prepare_backward`.
            grads: running sums of the gradients of query, key and value, of their shapes.
        """
        raise NotImplementedError
