"""The op: any shapes, branches, layouts and dtypes, cut into chunks, packed and sharded, against the dense reference.

Letters: B batch, L tokens, H query heads, G key/value heads, D head dimension, P slots.
"""

import threading
from itertools import pairwise

import torch
from torch import Tensor

from modeling_longnet import dilated_attention
from modeling_longnet.attention_autograd import AttentionPlan, HaloKV, attend_chunks
from modeling_longnet.backends import BACKENDS
from modeling_longnet.branches import Branch, Chunk, prefix_lengths
from modeling_longnet.pattern import Pattern
from modeling_longnet.reference import count_branches, count_zero_padding, dense_attention
from modeling_longnet.sharding import attend_sharded
from modeling_longnet.sharding_plan import Exchange, Shard, plan_exchange, shard_borders

from .engine import Draw

LAYOUTS = ("contiguous", "transposed", "fused", "columns", "expanded", "stepped", "overlapping")
DTYPES = (torch.float64,) * 5 + (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("out", "dq", "dk", "dv")


def draw_branches(draw: Draw, length: int = 0) -> tuple[list[int], list[int]]:
    """Segment lengths and rates: nested with equal growth, as in the paper, or any; longer in a long text."""
    if draw.flag():
        base, count = draw.integer(1, 8 if length < 100 else 256), draw.integer(1, 4)
        return [base << i for i in range(count)], [min(1 << i, base << i) for i in range(count)]
    count = draw.integer(1, 4) if not draw.flag(0.05) else draw.integer(5, 30)
    lengths = sorted({draw.integer(1, max(45, length + 10)) for _ in range(count)})
    return lengths, [draw.integer(1, min(w, draw.choice([3, w]))) for w in lengths]


def draw_pattern(draw: Draw, is_causal: bool, length: int) -> Pattern:
    """The paper's pattern, or one with any of the fields beyond it."""
    lengths, rates = draw_branches(draw, length)
    if draw.flag():
        return Pattern(tuple(lengths), tuple(rates), draw.choice(["interleaved", "blocked"]))
    window = draw.integer(1, min(lengths)) if draw.flag() else None
    if window and draw.flag(0.1):
        return Pattern((), (), window_size=window)
    query_rates = tuple(draw.choice([a for a in range(1, r + 1) if r % a == 0]) for r in rates) if draw.flag() else None
    is_nested = all(b % a == 0 for a, b in pairwise(lengths))
    beyond = draw.flag(), draw.flag(), is_causal and is_nested and draw.flag(0.7)
    period = draw.choice([1, 1, 2, 3]) if window else 1
    return Pattern(tuple(lengths), tuple(rates), "interleaved", window, query_rates, *beyond, period)


def draw_length(draw: Draw, usual: int = 60) -> int:
    """A few tokens, now and then several blocks of a kernel."""
    return draw.integer(1, usual) if not draw.flag(0.04) else draw.integer(370, 620)


def draw_tensor(draw: Draw, layout: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Tensor:
    """A (B, heads, L, D) tensor in one of the layouts that users have."""
    batch, heads, length, dim = shape

    def random(*sizes: int) -> Tensor:  # cast before it is viewed: a cast makes most views contiguous
        return torch.randn(sizes).to(dtype)

    if layout == "transposed":
        return random(batch, length, heads, dim).transpose(1, 2)
    if layout == "columns":
        return random(batch, heads, dim, length).mT
    if layout == "expanded":
        return random(1, heads, length, dim).expand(shape)
    if layout == "stepped":
        return random(batch, heads, 2 * length, 3 * dim)[:, :, ::2, 1::3]
    if layout == "fused":
        return random(batch, length, heads + 2, dim).transpose(1, 2)[:, 1:-1]
    if layout == "overlapping":
        strides = [draw.integer(0, 2 * dim) for _ in range(3)] + [draw.integer(1, 2)]
        return random(1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))).as_strided(shape, strides)
    return random(*shape)


def draw_inputs(
    draw: Draw, dtype: torch.dtype, batch: int, heads: int, groups: int, length: int, dim: int
) -> list[Tensor]:
    """q (B, H, L, D), k, v (B, G, L, D) and the gradient of out; sometimes small, large or all equal."""
    layout, values = draw.choice(LAYOUTS), draw.choice(["normal"] * 6 + ["small", "large", "equal keys", "zero"])
    draw.note("layout, values", (layout, values))
    inputs = [draw_tensor(draw, layout, dtype, (batch, n, length, dim)) for n in (heads, groups, groups, heads)]
    if values == "zero":
        inputs[:3] = [torch.zeros_like(x) for x in inputs[:3]]
    elif values == "equal keys":
        inputs[1] = inputs[1][:, :, :1].expand_as(inputs[1])
    elif values != "normal" and layout != "overlapping":
        for x in inputs[:2] if layout != "expanded" else ():
            x.mul_(1e-3 if values == "small" else 4.0)
    return inputs


def grads_of(out: Tensor, inputs: list[Tensor], grad_out: Tensor) -> dict[str, Tensor]:
    """Out and the gradients by name; None for inputs that need none."""
    wanted = [x for x in inputs if x.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, grad_out) if wanted else ())
    found = [next(grads) if x.requires_grad else None for x in inputs]
    return dict(zip(NAMES, (out.detach(), *found), strict=True))


def rounding_terms(
    inputs: list[Tensor], counts: Tensor, scale: float, dtype: torch.dtype, zeros: Tensor | None = None
) -> dict[str, Tensor]:
    """The sums behind out and its gradients with every term positive, so that nothing cancels.

    One rounding step of a term is one of its own size, and of the weight exp(score - lse) one of the score's and of
    the lse's, which are float32 at least. Inputs, with the gradient of out last, are (B, heads, L, D), float64.
    """
    query, key, value, grad_out = inputs
    out, weights, lse = dense_attention(query, key, value, counts, scale, zeros)
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    exponents = (query @ key.mT * scale).abs() + lse.masked_fill(lse == -torch.inf, 0).abs()[..., None]
    weights = weights * (1 + exponents * min(1.0, torch.finfo(torch.float32).eps / torch.finfo(dtype).eps))
    query, key, value, out, grad = (x.abs() for x in (query, key, value, out, grad_out))
    scores = weights * (grad @ value.mT + (grad * out).sum(-1, keepdim=True)) * scale
    of_keys = (x.unflatten(1, (-1, repeat)).sum(2) for x in (scores.mT @ query, weights.mT @ grad))
    return dict(zip(NAMES, (weights @ value, scores @ key, *of_keys), strict=True))


def compare(dtype: torch.dtype, actual: dict, dense: dict, exact: dict, terms: dict) -> None:
    """Float64 to rounding; other dtypes at most twice the dense reference's own error plus one rounding step."""
    for name, x in actual.items():
        if x is None:
            continue
        assert x.dtype == dtype, f"{name} is {x.dtype}, not {dtype}"
        assert x.shape == exact[name].shape, f"{name} has shape {tuple(x.shape)}, not {tuple(exact[name].shape)}"
        assert torch.isfinite(x).all(), f"{name} is not finite"
        own, error = ((y.double() - exact[name]).norm().item() for y in (dense[name], x))
        step = torch.finfo(dtype).eps * terms[name].norm().item()
        allowed = 2 * own + step * (16 if dtype == torch.float64 else 1)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}; the dense reference's {own:.3g}"


def op(draw: Draw) -> None:
    """`dilated_attention` of any backend that runs here."""
    groups, repeat = draw.integer(1, 5), draw.integer(1, 3)
    batch, length = draw.integer(1, 4), draw_length(draw)
    dim = draw.integer(1, 9) if draw.flag(0.8) else draw.choice([16, 24, 33, 64, 128])
    is_causal, layer = draw.flag(), draw.integer(0, 3)
    pattern = draw_pattern(draw, is_causal, length)
    lengths, rates, *_ = pattern
    options = pattern._asdict() | {"is_causal": is_causal, "scale": draw.choice([None, None, 0.3, 1.7]), "layer": layer}
    del options["segment_lengths"], options["dilation_rates"]
    dtype, backend = draw.choice(DTYPES), draw.choice(["torch", "auto"])
    draw.note("case", (batch, groups * repeat, groups, length, dim, lengths, rates, options, dtype, backend))
    low = draw_inputs(draw, dtype, batch, groups * repeat, groups, length, dim)
    needed = [not draw.flag(0.2) for _ in range(3)]
    low[3] = low[3] if not draw.flag(0.2) else low[3][:1, :1, :1, :1].expand_as(low[3])

    def run(inputs, backend):
        *leaves, grad_out = inputs
        leaves = [x.detach().requires_grad_(n) for x, n in zip(leaves, needed, strict=True)]
        return grads_of(dilated_attention(*leaves, lengths, rates, backend=backend, **options), leaves, grad_out)

    high = [x.double() for x in low]
    positions = torch.arange(length)[None]
    branches = pattern.branches(groups, groups * repeat, layer)
    counts = count_branches(branches, positions, positions, is_causal=is_causal)
    terms = rounding_terms(high, counts, options["scale"] or dim**-0.5, dtype)
    compare(dtype, run(low, backend), run(low, "eager"), run(high, "eager"), terms)


def draw_documents(draw: Draw, batch: int, length: int) -> tuple[Chunk, ...]:
    """The chunks of a batch: one document in all rows, or in each row several with padding between them."""
    if draw.flag(0.3):
        return (Chunk(0, batch, 0, length, 0, length),)
    chunks = []
    for row in range(batch):
        cuts = sorted({draw.integer(0, length) for _ in range(draw.integer(1, 4))})
        chunks += [Chunk(row, row + 1, a, b, 0, b - a) for a, b in pairwise(cuts) if not draw.flag(0.15)]
    return tuple(chunks)


def count_documents(
    chunks: tuple[Chunk, ...], branches: tuple[Branch, ...], batch: int, length: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """How often each key counts for a query, (B, G or H, L, L), and the zero keys of the released code, (B, G, L)."""
    positions, documents = torch.zeros(batch, length, dtype=torch.int64), torch.full((batch, length), -1)
    zeros = torch.zeros(batch, len(branches[0].offsets), length, dtype=torch.int64)
    for number, (first, last, begin, end, *_) in enumerate(chunks):
        positions[first:last, begin:end] = torch.arange(end - begin)
        documents[first:last, begin:end] = number
        if not any(branch.is_window for branch in branches):
            zeros[first:last, :, begin:end] = count_zero_padding(branches, end - begin)
    return count_branches(branches, positions, positions, documents, documents, is_causal), zeros


class _Packed:
    """Inputs of packed documents, and what the reference makes of them."""

    def __init__(self, draw: Draw, backend: str = "torch"):
        is_slow = backend == "triton"  # in its interpreter
        groups, repeat = draw.integer(1, 2 if is_slow else 4), draw.integer(1, 2)
        self.length = draw.integer(1, 20) if is_slow else draw_length(draw, 70)
        self.batch, dim = draw.integer(1, 3), draw.integer(1, 8)
        self.is_causal = not draw.flag()
        pattern = draw_pattern(draw, self.is_causal, self.length)
        self.branches = pattern.branches(groups, groups * repeat, draw.integer(0, 3))
        self.padding = not self.is_causal and pattern[3:] == Pattern((), ())[3:] and draw.flag(0.3)
        self.dtype = draw.choice([torch.float32, torch.float16] if is_slow else DTYPES)
        self.chunks = draw_documents(draw, self.batch, self.length)
        draw.note("case", (self.batch, self.length, groups * repeat, groups, dim, pattern, self.is_causal))
        draw.note("zero padding, dtype, chunks", (self.padding, self.dtype, self.chunks))
        inputs = draw_inputs(draw, self.dtype, self.batch, groups * repeat, groups, self.length, dim)
        *self.inputs, self.grad_out = (x.transpose(1, 2) for x in inputs)
        self.plan = AttentionPlan(self.chunks, self.branches, self.is_causal, dim**-0.5, backend, self.padding)

    def dense(self, dtype: torch.dtype, counts: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in self.inputs]
        out, *_ = dense_attention(*(x.transpose(1, 2) for x in leaves), counts, self.plan.scale, zeros)
        return grads_of(out.transpose(1, 2), leaves, self.grad_out.to(dtype))

    def compare(self, actual: dict[str, Tensor]) -> None:
        """Compare with the dense reference of the same documents; all tensors are (B, L, heads, D)."""
        counts, zeros = count_documents(self.chunks, self.branches, self.batch, self.length, self.is_causal)
        zeros = zeros if self.padding else None
        inputs = [x.transpose(1, 2).double() for x in (*self.inputs, self.grad_out)]
        terms = rounding_terms(inputs, counts, self.plan.scale, self.dtype, zeros)
        terms = {name: x.transpose(1, 2) for name, x in terms.items()}
        dense, exact = (self.dense(dtype, counts, zeros) for dtype in (self.dtype, torch.float64))
        compare(self.dtype, actual, dense, exact, terms)


def packed(draw: Draw, backend: str = "torch") -> None:
    """Packed documents with padding, in one call."""
    case = _Packed(draw, backend)
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    case.compare(grads_of(attend_chunks(*leaves, case.plan), leaves, case.grad_out))


class SimulatedGroup:
    """The exchanges of all ranks in one process: each rank is a thread, which waits for the others."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=50)
        self.sent: list[list[Tensor]] = [[] for _ in range(size)]
        self.errors: list[BaseException] = []

    def run(self, function) -> None:
        """Call `function(rank)` in a thread for each rank; raise the first error."""

        def guarded(rank: int) -> None:
            try:
                function(rank)
            except BaseException as error:
                self.errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(len(self.sent))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in sorted(self.errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error


class SimulatedExchange:
    """Stands in for `GroupExchange`: the same counts, checked, and the same order."""

    def __init__(self, group: SimulatedGroup, rank: int, exchange: Exchange):
        self.simulated, self.rank, self.exchange = group, rank, exchange

    def all_to_all(self, x: Tensor, is_backward: bool = False):
        counts = self.exchange.send_counts, self.exchange.receive_counts
        sent, received = counts[::-1] if is_backward else counts
        group = self.simulated
        group.sent[self.rank] = list(x.split(sent))
        group.barrier.wait()
        parts = [other[self.rank] for other in group.sent]
        assert [len(part) for part in parts] == received, "what is sent is not what is expected"
        result = torch.cat(parts)
        group.barrier.wait()
        return result, lambda: None


def sharded(draw: Draw) -> None:
    """The same documents on several ranks: out and gradients of each, halos exchanged by the plan."""
    case = _Packed(draw)
    size = draw.integer(1, 5)
    if draw.flag():
        borders = shard_borders(case.length, size, min(b.w for b in case.branches))
    else:
        borders = (0, *sorted(draw.integer(0, case.length) for _ in range(size - 1)), case.length)
    draw.note("borders", borders)
    shards = [Shard(None, rank, borders) for rank in range(size)]
    group, results = SimulatedGroup(size), [{} for _ in range(size)]

    def run(rank: int) -> None:
        shard = shards[rank]
        arguments = case.chunks, case.branches, case.is_causal, case.batch, torch.device("cpu")
        sharded = SimulatedExchange(group, rank, plan_exchange(shard, *arguments))
        leaves = [shard.cut(x).detach().requires_grad_() for x in case.inputs]
        plan = case.plan._replace(chunks=shard.cut_chunks(case.chunks, rank))
        out = attend_sharded(*leaves, plan, sharded)
        results[rank] = grads_of(out, leaves, shard.cut(case.grad_out))

    group.run(run)
    case.compare({name: torch.cat([result[name] for result in results], 1) for name in NAMES})


def make_prefix(x: Tensor, branches: tuple[Branch, ...], start: int, spare: int) -> tuple[Tensor, tuple[int, ...]]:
    """The (B, G, P, D) keys before `start`, by the rule, from (B, L, G, D); what no head keeps is NaN."""
    parts, slots = [], [count + spare for count in prefix_lengths(branches, start)]
    for branch, count in zip(branches, slots, strict=True):
        w, r, offsets = branch[:3]
        begin = max(0, start - w + 1) if branch.is_window else start - (start + branch.phase) % w
        of_heads = [[p for p in range(begin + o, start, r) if p >= 0] for o in offsets]
        place = torch.tensor([(x + [start] * count)[:count] for x in of_heads], dtype=torch.int64)  # (G, count)
        kept = place < start
        heads = torch.arange(len(offsets))[:, None].expand_as(place)
        keys = x[:, place.clamp(max=x.shape[1] - 1), heads]  # (B, G, count, D)
        parts.append(torch.where(kept[..., None], keys, torch.nan))
    return torch.cat(parts, 2), tuple(slots)


def chunked(draw: Draw) -> None:
    """One causal document read chunk by chunk, each with its prefix; gradients flow into the prefixes too."""
    case = _Packed(draw)
    whole = (Chunk(0, case.batch, 0, case.length, 0, case.length),)
    case.chunks, case.is_causal, case.padding = whole, True, False
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    cuts = sorted({0, case.length, *(draw.integer(0, case.length) for _ in range(draw.integer(1, 5)))})
    draw.note("cuts", cuts)
    parts = []
    for start, end in pairwise(cuts):
        total = draw.choice([end, case.length])
        plan = case.plan._replace(
            chunks=(Chunk(0, case.batch, 0, end - start, start, total),), is_causal=True, zero_padding=False
        )
        spare = draw.integer(0, 2)
        (key, slots), (value, _) = (make_prefix(x, case.branches, start, spare) for x in leaves[1:])
        prefix = HaloKV(key, value, slots) if sum(slots) else None
        parts.append(attend_chunks(*(x[:, start:end] for x in leaves), plan, prefix))
    case.compare(grads_of(torch.cat(parts, 1), leaves, case.grad_out))


def triton(draw: Draw) -> None:
    """The same by the Triton kernels: on a CPU in Triton's interpreter, a second for each case."""
    if BACKENDS["triton"].unavailable(torch.empty(1, 8)) is None:
        packed(draw, "triton")


CASES = {"triton": triton, "op": op, "packed": packed, "sharded": sharded, "chunked": chunked}
