"""Dense dilated attention from one mask function of (head, query, key), against which every fast path is tested.

Letters: B batch, L queries, S keys, H query heads, G key/value heads, D head dimension.
"""

import torch
from torch import Tensor

from .branches import Branch


def count_branches(
    branches: tuple[Branch, ...],
    query_positions: Tensor,
    key_positions: Tensor,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    is_causal: bool = True,
) -> Tensor:
    """Count the branches in which each query sees each key (LongNet, Eq. 4-8 and 13-15, and beyond the paper).

    In branch (w, r, phase) position p stands at place (p + phase) mod w of a segment. Query i sees key j if
    - they share a segment; in a window: |i - j| < w;
    - the head keeps both: the query's place modulo query_rate and the key's modulo r are the head's offsets;
    - if causal, j <= i;
    - the key lies in no region that `after_window` or `after_segment` leaves out.

    Args:
        query_positions, key_positions: (B, L) and (B, S) integers, each token's position in its own document.
        query_documents, key_documents: (B, L) and (B, S) integers; tokens of different documents do not
            attend to each other, and a negative number marks padding. None: one document per batch row.

    Returns:
        (B, G, L, S) int64 counts; (B, H, L, S) if query heads that share keys have offsets of their own.
    """
    i, j = query_positions[:, None, :, None], key_positions[:, None, None, :]  # (B, 1, L, 1), (B, 1, 1, S)
    allowed = (j <= i) if is_causal else torch.ones_like(j <= i)
    if query_documents is not None:
        doc_i, doc_j = query_documents[:, None, :, None], key_documents[:, None, None, :]
        allowed = allowed & (doc_i == doc_j) & (doc_i >= 0)
    heads = max(len(branch.query_offsets or branch.offsets) for branch in branches)
    counts = torch.zeros_like(allowed, dtype=torch.int64).repeat(1, heads, 1, 1)
    for branch in branches:
        counts += _sees(branch, i, j, heads) & allowed
    return counts


def _sees(branch: Branch, i: Tensor, j: Tensor, heads: int) -> Tensor:
    """Return (B, heads, L, S) bool: what `count_branches` says of one branch, without documents and causality."""

    def of_heads(offsets):  # (heads, 1, 1)
        return torch.tensor(offsets, device=i.device).repeat_interleave(heads // len(offsets))[:, None, None]

    if branch.is_window:
        return ((i - j).abs() < branch.w).expand(-1, heads, -1, -1)
    w, r, offsets = branch[:3]
    p, q = i + branch.phase, j + branch.phase
    sees = (p // w == q // w) & ((q % w) % r == of_heads(offsets))
    sees = sees & ((p % w) % (branch.query_rate or r) == of_heads(branch.query_offsets or offsets))
    if branch.after_window:
        sees = sees & ((i - j).abs() >= branch.after_window)
    if branch.after_segment:
        p, q = (x + branch.after_phase for x in (i, j))
        sees = sees & (p // branch.after_segment != q // branch.after_segment)
    return sees


def count_zero_padding(branches: tuple[Branch, ...], length: int) -> Tensor:
    """Count the zero keys that each query of a bidirectional document attends to in the released implementation.

    TorchScale pads a document to whole segments of min(w, length), and those to multiples of r, with zero keys and
    values that it does not mask.

    Returns:
        (G, length) int64 counts over all branches that keep the query.
    """
    p = torch.arange(length)
    counts = torch.zeros(len(branches[0].offsets), length, dtype=torch.int64)
    for w, r, offsets, *_ in branches:
        is_kept = (p % w) % r == torch.tensor(offsets)[:, None]  # (G, length)
        real = torch.zeros_like(counts).index_add_(1, p // w, is_kept.long())  # in each segment
        counts += torch.where(is_kept, -(-min(w, length) // r) - real[:, p // w], 0)
    return counts


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, scale: float, zero_padding: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one softmax over the multiset of keys of all branches (Eq. 9-10); a key in two branches counts twice.

    Args:
        query: (B, H, L, D); key, value: (B, G, S, D), any floating dtype. Scores are computed in at least float32.
        counts: (B or 1, heads, L, S) with H, G or 1 heads, how often a key counts for a query.
        zero_padding: (B or 1, G, L), number of further keys with score 0 and value 0.

    Returns:
        out (B, H, L, D) and attention weights (B, H, L, S) in the query's dtype; lse (B, H, L), the logarithm of the
        denominator. A query that sees no key gets out 0, weights 0 and lse -inf.
    """
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    counts = counts.repeat_interleave(query.shape[1] // counts.shape[1] if counts.shape[1] > 1 else 1, 1)
    precise = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(precise) @ key.to(precise).transpose(-1, -2) * scale
    scores = scores.masked_fill(counts == 0, -torch.inf)
    largest = scores.detach().amax(-1, keepdim=True)
    # With a finite shift, a query that sees no key has only zeros here, and no NaN in its gradient either.
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    if zero_padding is not None:
        largest = largest.clamp_min(0.0)
    weights = counts * (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    if zero_padding is not None:
        total = total + zero_padding.repeat_interleave(repeat, 1)[..., None] * (-largest).exp()
    weights = (weights / total.masked_fill(total == 0, 1.0)).to(query.dtype)
    return weights @ value, weights, (largest + total.log())[..., 0]
