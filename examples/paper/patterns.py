"""The attention patterns to compare, as data, and the two of them that do not consist of branches.

All run in the same model, `LongNetForCausalLM`; a pattern says which keys a query sees. Work is counted as keys that
a query sees on average, per head, at the training length; window and sparse get LongNet's.

- dense: every earlier token, one branch of rate 1.
- longnet: dilated branches.
- window: the last `size` tokens.
- a written pattern: the fields of `LongNetConfig` in one line, see `parse_pattern`.
- sparse: the fixed pattern of Child et al. 2019 (arXiv 1904.10509, section 4.3): all earlier tokens of the query's
  block, and of each earlier block the last `summary` tokens.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from modeling_longnet import LongNetConfig, LongNetForCausalLM, parse_pattern
from modeling_longnet.testing import Pattern as Branches
from modeling_longnet.testing import count_work

LONGEST = 1 << 20  # segment length of a branch that cuts no text here
RIVALS = ("dense", "longnet", "window", "sparse")
LONGER = " trained 4 times as long"  # suffix of the names of such recall cells


class Pattern(NamedTuple):
    """Branches, or the window (`size`) or block and summary of a pattern that does not consist of branches."""

    name: str
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    size: int = 0
    summary: int = 0


def file_name(words: str) -> str:
    """Return a written pattern as a part of a file's name."""
    return words.replace(" ", "_").replace("/", "-").replace(":", "q")


def make_pattern(name: str, branches: tuple[tuple[int, ...], tuple[int, ...]], length: int) -> Pattern:
    """Return a pattern of the same work as these branches in a text of `length` tokens; dense does more."""
    if name == "dense":
        return Pattern(name, (LONGEST,), (1,))
    if name == "longnet":
        return Pattern(name, *branches)
    work = count_work(*branches, length)
    if name == "window":
        # The first queries of a text see less than a window; L (1 - sqrt(1 - 2 work / L)) makes up for it.
        return Pattern(name, (LONGEST,), (1,), size=round(length * (1 - max(0, 1 - 2 * work / length) ** 0.5)))
    if name == "sparse":  # half of the work in the own block, half in the summaries of the blocks before it
        size = max(1, round(work))
        return Pattern(name, (LONGEST,), (1,), size, summary=max(1, round(work / max(1, length / size - 1))))
    if any(word[:1] == "w" or word[:1].isdigit() for word in name.split()):
        fields = parse_pattern(name)
        return Pattern(name, fields["segment_lengths"], fields["dilation_rates"])
    raise ValueError(
        f"pattern {name!r}: allowed are {', '.join(map(repr, RIVALS))}, and written ones such as 'w256 2048/8:1 once'."
    )


def count_keys(pattern: Pattern, length: int) -> float:
    """Return the mean number of keys that a query sees per head, without those that a kernel computes and masks."""
    if pattern.name == "window":
        return pattern.size * (1 - pattern.size / length / 2) if length > pattern.size else length / 2
    if pattern.name == "sparse":
        return min(pattern.size, length) / 2 + pattern.summary * max(0, length / pattern.size - 1) / 2
    if pattern.name not in RIVALS:
        return Branches.parse(pattern.name).count_work(length)
    return count_work(pattern.segment_lengths, pattern.dilation_rates, length)


def count_computed_keys(pattern: Pattern, length: int) -> float:
    """Return the mean number of keys computed per query: window and sparse mask much of what their blocks hold."""
    if pattern.name == "window":
        return 2 * pattern.size
    if pattern.name == "sparse":
        return pattern.size + min(pattern.summary, pattern.size) * math.ceil(length / pattern.size)
    return count_keys(pattern, length)


def make_model(pattern: Pattern, seed: int, **fields) -> LongNetForCausalLM:
    """Return a new model with this pattern; equal seeds give equal weights whatever the pattern."""
    torch.manual_seed(seed)
    if pattern.name in RIVALS:
        own = {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates}
    else:
        own = parse_pattern(pattern.name)
    config = LongNetConfig(**own, **fields)
    model = LongNetForCausalLM(config)
    attend = {"window": attend_window, "sparse": attend_sparse}.get(pattern.name)
    if attend is not None:
        for layer in model.model.layers:
            layer.self_attn.attend = partial(_attend, attend, pattern)
    return model


def _attend(attend, pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, context) -> tuple[Tensor, None]:
    """Replace LongNet's attention: attend over the whole text at once, (B, L, H, D)."""
    if context.cache is not None:
        raise ValueError(f"the {pattern.name} pattern has no cache here: call the model with use_cache=False.")
    out = attend(*(x.transpose(1, 2) for x in (query, key, value)), pattern)
    return out.transpose(1, 2), None


def _blocks(x: Tensor, size: int) -> Tensor:
    """Cut into blocks, (B, H, L, D) -> (B, n, H, size, D), and fill the last one up with zeros."""
    x = pad(x, (0, 0, 0, -x.shape[2] % size))
    return x.unflatten(2, (-1, size)).transpose(1, 2)


def _attend_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, length: int) -> Tensor:
    """Attend from each block's queries to its keys: (B, n, H, size, D) and a mask (n, size, keys) -> (B, H, L, D)."""
    batch = query.shape[0]
    mask = mask.repeat(batch, 1, 1)[:, None]
    out = scaled_dot_product_attention(*(x.flatten(0, 1) for x in (query, key, value)), attn_mask=mask)
    return out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def attend_window(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
    """Attend from every query to itself and the `size - 1` tokens before it, (B, H, L, D)."""
    size, length = pattern.size, query.shape[2]
    queries = _blocks(query, size)
    keys, values = (  # each block's own and those of the block before it
        torch.cat([pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), x], 3) for x in (_blocks(key, size), _blocks(value, size))
    )
    q, k = torch.arange(size)[:, None] + size, torch.arange(2 * size)
    seen = (k <= q) & (k > q - size)
    real = torch.arange(queries.shape[1])[:, None] * size + k - size >= 0  # no tokens before the first block
    return _attend_blocks(queries, keys, values, seen & real[:, None], length)


def attend_sparse(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
    """Attend from every query to its block's earlier tokens and to the ends of the blocks before, (B, H, L, D)."""
    size, length = pattern.size, query.shape[2]
    summary = min(pattern.summary, size)
    queries, keys, values = (_blocks(x, size) for x in (query, key, value))
    n = queries.shape[1]
    ends = [x[:, :, :, size - summary :].transpose(1, 2).flatten(2, 3) for x in (keys, values)]  # (B, H, n * c, D)
    keys, values = (
        torch.cat([own, end[:, None].expand(-1, n, -1, -1, -1)], 3)
        for own, end in zip((keys, values), ends, strict=True)
    )
    own = torch.ones(size, size, dtype=torch.bool).tril().expand(n, -1, -1)
    block = torch.arange(n)
    earlier = (block.repeat_interleave(summary) < block[:, None])[:, None].expand(-1, size, -1)
    return _attend_blocks(queries, keys, values, torch.cat([own, earlier], 2), length)
