"""A sequence over many devices: each holds a part, and gets the rows of its first and last segment from the others.

This is the paper's distributed algorithm (LongNet, section 3.1-3.2, Fig. 4): a shard is a chunk of the sequence,
and the rows it needs from other shards are the same `Outside` that a cache hands to the op. Who needs which rows
is arithmetic that every rank does alike; keys and values travel in one all-to-all a layer, and their gradients in
one back, where the owner adds them up. (An all-gather within sub-groups would carry twice as much in causal layers;
it would only save traffic between nodes, see benchmarks/README.md.) What a device gets is bounded by
sum_i w_i / r_i rows a head.

Letters: B batch, L tokens of the whole sequence, n of a shard, C shards, H query heads, G key/value heads, D head
dimension, S rows sent, R rows received.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .branches import Branch, Chunk, chunk_rows
from .dilated_attention import Outside, Plan, backward_chunks, backward_outside, forward_chunks, forward_outside
from .packing import Packing, pack

try:
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState
except ImportError as error:
    _missing = error
    AcceleratorState = None

    class ParallelismConfig:
        """Stands for Accelerate's class where that package is missing."""

        def __init__(self, *args, **kwargs):
            raise ImportError("SequenceSharding needs the accelerate package: pip install accelerate") from _missing


class SequenceSharding(ParallelismConfig):
    """Tells Accelerate to hold each sequence on `cp_size` devices, of which LongNet computes a part each.

    Goes into `Accelerator(parallelism_config=...)` or the stock `TrainingArguments(parallelism_config=...)`; the
    model finds it there. Sizes left out come from the launch configuration; the processes beyond `cp_size` are
    data parallel (`dp_shard_size`, which also serves DDP).

    Accelerate's own context parallelism must not run (it cuts batches head-tail, drops masks and patches SDPA), so
    `cp_enabled` is False, while the mesh, the dataloader and FSDP2 still see the dimension "cp".

    Raises:
        ValueError: tensor or Ulysses parallelism besides, or sizes that do not make the number of processes.

    Example:
        >>> accelerator = Accelerator(parallelism_config=SequenceSharding(cp_size=8))
    """

    def __post_init__(self):
        super().__post_init__()
        if self.tp_size > 1 or self.sp_size > 1:
            raise ValueError(
                f"SequenceSharding(tp_size={self.tp_size}, sp_size={self.sp_size}): LongNet shards sequences (cp_size) "
                "and batches (dp_shard_size, dp_replicate_size); leave the other sizes at 1."
            )

    @property
    def cp_enabled(self) -> bool:
        """False: torch's context parallelism is not wanted."""
        return False

    def _with_cp(self, names: list[str]) -> list[str]:
        return [*names, "cp"] if self.cp_size > 1 else names

    @property
    def non_dp_dim_names(self) -> list[str]:
        """Mesh dimensions along which the batch is the same."""
        return self._with_cp(super().non_dp_dim_names)

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """Mesh dimensions over which FSDP2 shards the parameters."""
        return self._with_cp(super().dp_shard_cp_dim_names)

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """Mesh dimensions over which gradients are averaged."""
        return self._with_cp(super().dp_cp_dim_names)

    def build_device_mesh(self, device_type: str):
        """The mesh of all processes, cp innermost."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if self.data_parallel_size == 1 and world % self.cp_size == 0:
            self._set_size("dp_shard", world // self.cp_size)
        self._check_world(world)
        return super().build_device_mesh(device_type)

    def _check_world(self, world: int) -> None:
        if self.total_size != world:
            raise ValueError(
                f"SequenceSharding(cp_size={self.cp_size}, dp_shard_size={self.dp_shard_size}, "
                f"dp_replicate_size={self.dp_replicate_size}) needs {self.total_size} processes, there are {world}. "
                "Launch as many, or choose a cp_size that divides them and leave the dp sizes out."
            )

    def _validate_accelerator(self, accelerator) -> None:
        self._check_world(accelerator.num_processes)


class Shard(NamedTuple):
    """The part of each sequence that this rank of the group holds: rank i has [borders[i], borders[i + 1])."""

    group: "dist.ProcessGroup | None"
    rank: int
    borders: tuple[int, ...]

    @property
    def begin(self) -> int:
        return self.borders[self.rank]

    @property
    def end(self) -> int:
        return self.borders[self.rank + 1]

    @property
    def total(self) -> int:
        return self.borders[-1]

    def cut(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (B, n, ...)."""
        return x[:, self.begin : self.end]

    def cut_chunks(self, chunks: tuple[Chunk, ...], rank: int) -> tuple[Chunk, ...]:
        """The chunks of whole sequences as a rank holds them, columns counted from its first."""
        begin, end = self.borders[rank : rank + 2]
        parts = []
        for c in chunks:
            low, high = max(begin, c.column_begin), min(end, c.column_end)
            if low < high:
                start = c.start + low - c.column_begin
                parts.append(Chunk(c.row_begin, c.row_end, low - begin, high - begin, start, c.total))
        return tuple(parts)


def shard_borders(length: int, size: int, shortest_segment: int) -> tuple[int, ...]:
    """Where `size` equal shards of a sequence begin and end; the last ones may be short or empty.

    Shards longer than the shortest segment are whole multiples of it, so that its branch stays on the device.
    """
    n = -(-length // size)
    if n > shortest_segment:
        n = -(-n // shortest_segment) * shortest_segment
    return tuple(min(i * n, length) for i in range(size + 1))


class OutsideRows(NamedTuple):
    """The rows of one head that a chunk needs from one side: columns first + j * step, j < count, for slot j."""

    after: bool
    branch: int
    head: int
    row_begin: int
    row_end: int
    first: int
    step: int
    count: int

    def between(self, low: int, high: int) -> np.ndarray:
        """The slots whose columns lie in [low, high)."""
        begin, end = (min(self.count, max(0, -(-(x - self.first) // self.step))) for x in (low, high))
        return np.arange(begin, end)


def outside_rows(shard: Shard, chunks: tuple[Chunk, ...], branches: tuple[Branch, ...], is_causal: bool, rank: int):
    """What a rank needs from the others, in the order in which senders and receivers list it.

    Args:
        chunks: those of the whole batch, as on one device.

    Yields:
        `OutsideRows`, with columns of the whole batch.
    """
    begin = shard.borders[rank]
    for chunk in shard.cut_chunks(chunks, rank):
        for index, branch in enumerate(branches):
            for rows in chunk_rows(chunk, branch, False):
                first = begin + chunk.column_begin + rows.begin + rows.row
                sides = (False, rows.before, first - rows.before * branch.r), (
                    True, 0 if is_causal else rows.after, first + rows.rows * branch.r,
                )  # fmt: skip
                for after, count, column in sides:
                    for i in range(rows.heads if count else 0):
                        yield OutsideRows(
                            after, index, rows.head + i * rows.head_step, chunk.row_begin, chunk.row_end,
                            column + i * rows.row_step, branch.r, count,
                        )  # fmt: skip


def count_received(shard: Shard, needs: list[OutsideRows]) -> np.ndarray:
    """Rows that a rank with these needs gets from each rank: (C,) int64."""
    borders = np.array(shard.borders)
    total = np.zeros(len(borders) - 1, dtype=np.int64)
    for need in needs:
        below = np.clip(-(-(borders - need.first) // need.step), 0, need.count)
        total += np.diff(below) * (need.row_end - need.row_begin)
    return total


class Exchange(NamedTuple):
    """One layer's all-to-all, the same for every layer of a forward pass.

    is_needed: does any rank of the group need rows of another?
    send: (S,) int64, rows of the flattened (B, n, G) keys in the order they are sent, `send_counts` to each rank.
    slots: (R,) int64, the slot of each received row; slots lie in blocks (B, G, P) of the P in `blocks`, those
        before the shard for each branch, then (unless causal) those after it.
    """

    is_needed: bool
    send: Tensor
    send_counts: list[int]
    slots: Tensor
    receive_counts: list[int]
    blocks: tuple[tuple[int, int, int], ...]


def _flat(need: OutsideRows, numbers: np.ndarray, row_size: int, step: int, first: int) -> np.ndarray:
    """first + numbers * step within each batch row of `row_size` places."""
    rows = np.arange(need.row_begin, need.row_end)[:, None] * row_size
    return (rows + first + numbers * step).ravel()


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _sent(shard: Shard, needs: list[OutsideRows], heads: int) -> np.ndarray:
    """Which of this rank's rows one with these needs gets: indices into the flattened (B, n, G) keys."""
    n = shard.end - shard.begin
    return _concatenate([
        _flat(need, need.between(shard.begin, shard.end), n * heads, need.step * heads,
              (need.first - shard.begin) * heads + need.head)
        for need in needs
    ])  # fmt: skip


def _received(shard: Shard, needs: list[OutsideRows], batch: int, heads: int, branches: int, is_causal: bool):
    """The slots of this rank's received rows, in the order in which they come, and the slots' blocks."""
    sizes = np.zeros(branches if is_causal else 2 * branches, dtype=np.int64)
    for need in needs:
        block = need.after * branches + need.branch
        sizes[block] = max(sizes[block], need.count)
    begins = np.cumsum(sizes * batch * heads) - sizes * batch * heads
    slots, owners = [], []
    for need in needs:
        block, numbers = need.after * branches + need.branch, np.arange(need.count)
        slots.append(_flat(need, numbers, heads * sizes[block], 1, begins[block] + need.head * sizes[block]))
        owner = np.searchsorted(shard.borders, need.first + numbers * need.step, side="right") - 1
        owners.append(np.tile(owner, need.row_end - need.row_begin))
    order = np.argsort(_concatenate(owners), kind="stable")
    return _concatenate(slots)[order], tuple((batch, heads, int(size)) for size in sizes)


@lru_cache(maxsize=16)
def plan_exchange(
    shard: Shard, chunks: tuple[Chunk, ...], branches: tuple[Branch, ...], is_causal: bool, batch: int,
    device: torch.device,
) -> Exchange:  # fmt: skip
    """Which rows this rank sends and receives.

    Args:
        chunks: those of the whole batch, as on one device.
    """
    heads, ranks = len(branches[0].offsets), range(len(shard.borders) - 1)
    needs = [list(outside_rows(shard, chunks, branches, is_causal, rank)) for rank in ranks]
    sent = [_sent(shard, needs[rank], heads) for rank in ranks]
    slots, blocks = _received(shard, needs[shard.rank], batch, heads, len(branches), is_causal)
    return Exchange(
        any(needs),
        torch.from_numpy(_concatenate(sent)).to(device),
        [len(x) for x in sent],
        torch.from_numpy(slots).to(device),
        count_received(shard, needs[shard.rank]).tolist(),
        blocks,
    )


def pack_shard(
    shard: Shard, batch: int, device: torch.device, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[tuple[Chunk, ...], Packing]:
    """The chunks of the whole batch, and the packing of this rank's part of it (see `packing.pack`)."""
    begin, end = shard.begin, shard.end
    if attention_mask is None and position_ids is None:
        chunks = (Chunk(0, batch, 0, shard.total, 0, shard.total),)
        positions, documents = torch.arange(begin, end, device=device)[None], None
    else:
        whole = pack(batch, shard.total, torch.device("cpu"), attention_mask, position_ids)
        chunks = tuple(Chunk(*row) for row in whole.chunks.tolist())
        positions = shard.cut(whole.positions).to(device)
        documents = None if whole.documents is None else shard.cut(whole.documents).to(device)
    own = torch.tensor(shard.cut_chunks(chunks, shard.rank), dtype=torch.int64).reshape(-1, 6)
    return chunks, Packing(own, positions, documents)


class ShardInputs(NamedTuple):
    """What every layer of a forward pass needs to know of this rank's part."""

    group: "dist.ProcessGroup"
    plan: Plan
    exchange: Exchange


def _all_to_all(rows: Tensor, inputs: ShardInputs, back: bool = False) -> tuple[Tensor, Callable[[], object]]:
    """Send (S, ...) rows and receive (R, ...), or back; the result is filled once the function beside it returned."""
    exchange = inputs.exchange
    counts = exchange.receive_counts, exchange.send_counts  # dist takes the receiver's first
    output, given = counts[::-1] if back else counts
    received = rows.new_empty(sum(output), *rows.shape[1:])
    if not exchange.is_needed:
        return received, lambda: None
    return received, dist.all_to_all_single(received, rows, output, given, group=inputs.group, async_op=True).wait


def _outsides(slots: Tensor, blocks: tuple[tuple[int, int, int], ...], branches: int) -> Iterator[tuple[Outside, bool]]:
    """(all slots, 2, D) keys and values as the op takes them: the rows before the chunks, then any after them."""
    parts = slots.split([batch * heads * size for batch, heads, size in blocks])
    parts = [x.view(*block, *x.shape[1:]) for x, block in zip(parts, blocks, strict=True)]  # (B, G, P, 2, D)
    keys, values = ([x[..., i, :] for x in parts] for i in range(2))
    for i in range(0, len(parts), branches):
        yield Outside(tuple(keys[i : i + branches]), tuple(values[i : i + branches])), i > 0


class _ShardedAttention(torch.autograd.Function):
    """out of a shard's tokens over all branches. Arguments: q, k, v, `ShardInputs`.

    The rows of other ranks travel while the shard's own attention runs, in forward and in backward. As in
    `dilated_attention`, each part's backward gets the merged out and lse.
    """

    @staticmethod
    def forward(ctx, query, key, value, inputs):
        _, plan, exchange = ctx.inputs = inputs
        rows = torch.stack([x.flatten(0, 2).index_select(0, exchange.send) for x in (key, value)], 1)  # (S, 2, D)
        received, wait = _all_to_all(rows, inputs)
        out, lse = forward_chunks(query, key, value, plan)
        wait()
        # Slots that no row fills are never read.
        slots = received.new_empty(sum(b * g * p for b, g, p in exchange.blocks), *received.shape[1:])
        slots.index_copy_(0, exchange.slots, received)
        for outside, after in _outsides(slots, exchange.blocks, len(plan.branches)):
            forward_outside(query, out, lse, outside, plan, after)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, slots)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        query, key, value, out, lse, slots = ctx.saved_tensors
        _, plan, exchange = ctx.inputs
        grad_out = grad_out.contiguous()
        grad_query = torch.zeros_like(out, dtype=lse.dtype)
        rows = _backward_slots(grad_out, query, out, lse, slots, grad_query, plan, exchange).to(key.dtype)
        received, wait = _all_to_all(rows, ctx.inputs, back=True)
        own_query, *shared = backward_chunks(grad_out, query, key, value, out, lse, plan)
        grad_query += own_query
        wait()
        for i, grad in enumerate(shared):
            rows = grad.to(lse.dtype).flatten(0, 2)  # many ranks may add to one row
            rows.index_add_(0, exchange.send, received[:, i].to(rows.dtype))
            shared[i] = rows.view(key.shape).to(key.dtype)
        return grad_query.to(query.dtype), *shared, None


def _backward_slots(grad_out, query, out, lse, slots, grad_query, plan: Plan, exchange: Exchange) -> Tensor:
    """The (R, 2, D) gradients of the received rows; adds the queries' part to `grad_query`.

    A row's gradient comes from one kernel call, which rounds it to the keys' dtype already: it can be sent so.
    """
    parts = []
    for outside, after in _outsides(slots, exchange.blocks, len(plan.branches)):
        grads = backward_outside(grad_out, query, out, lse, outside, grad_query, plan, after)
        parts += [torch.stack(pair, -2).flatten(0, 2) for pair in zip(*grads, strict=True)]
    return torch.cat(parts).index_select(0, exchange.slots)


def shard_inputs(
    shard: Shard, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, plan: Plan
) -> tuple[Packing, ShardInputs]:
    """The packing of this rank's part of a batch, and how its layers attend.

    Args:
        embeds: (B, n, E), cut. attention_mask, position_ids: of the whole batch, see `packing.pack`.
        plan: without chunks.

    Raises:
        ValueError: the dense reference was asked for.
    """
    if plan.backend == "eager":
        raise ValueError(
            'the dense reference, attn_implementation="eager" (or what backend "auto" fell back to), cannot share a '
            'sequence among processes; use attn_implementation="sdpa".'
        )
    batch, device = embeds.shape[0], embeds.device
    chunks, packing = pack_shard(shard, batch, device, attention_mask, position_ids)
    # A group in the cache of plans would outlive its destruction.
    exchange = plan_exchange(shard._replace(group=None), chunks, plan.branches, plan.is_causal, batch, device)
    return packing, ShardInputs(shard.group, plan._replace(chunks=shard.cut_chunks(chunks, shard.rank)), exchange)


@torch.compiler.disable
def attend_sharded(query: Tensor, key: Tensor, value: Tensor, inputs: ShardInputs) -> Tensor:
    """Dilated attention of this rank's part of a sequence; every rank of the group must call it, in backward too.

    Args:
        query: (B, n, H, D). key, value: (B, n, G, D), same dtype, positions already applied; n may be 0.
        inputs: the plan's chunks are this rank's, with `total` the whole sequences' lengths.

    Returns:
        (B, n, H, D) in the query's dtype. Differentiable in q, k, v, once; the gradients of k and v include what
        this rank's rows contributed on other ranks, which are added in at least float32.
    """
    query, key, value = (x.contiguous() for x in (query, key, value))
    return _ShardedAttention.apply(query, key, value, inputs)


def group_loss(total: Tensor, count: Tensor, num_items: Tensor | int | None, group) -> Tensor:
    """The loss of the group's sequences, on every rank, whose averaged gradient is that of one process.

    Its value is S / T, or S / (C * num_items) where Trainer, which counts num_items and multiplies by the number of
    processes, is to get the sum; S and T are the group's sum and number of targets. Its gradient is scaled so that
    the average over the ranks (DDP, FSDP2) equals one process's gradient.

    Args:
        total, count: scalars, this rank's sum of losses (differentiable) and its number of targets.
    """
    size = dist.get_world_size(group)
    summed = torch.stack([total.detach().double(), count.double()])
    dist.all_reduce(summed, group=group)
    if num_items is None:
        own, value = total * (size / summed[1]).to(total.dtype), summed[0] / summed[1]
    else:
        num_items = num_items.to(total.device) if isinstance(num_items, Tensor) else num_items
        own, value = total / num_items, summed[0] / (size * num_items)
    return own + (value.to(total.dtype) - own).detach()


def gather_sequence(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Join the shards of logits or hidden states: (B, n, ...) of each rank -> (B, L, ...) on every rank, detached.

    Every rank of the group must call it.
    """
    x = x.detach()
    sizes = [int(n) for n in _all_gather(torch.tensor(x.shape[1], device=x.device), group)]
    padded = x.new_zeros(x.shape[0], max(sizes), *x.shape[2:])
    padded[:, : x.shape[1]] = x
    return torch.cat([part[:, :n] for part, n in zip(_all_gather(padded, group), sizes, strict=True)], 1)


def _all_gather(x: Tensor, group) -> list[Tensor]:
    """The tensor, of one shape on all ranks, of every rank."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return parts


def _checksum(x: Tensor) -> Tensor:
    """() int64 of a tensor's numbers, or of their bits if they are real, in which every place has its own weight."""
    if x.is_floating_point():
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        x = x.detach().contiguous().view(bits)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for i, part in enumerate(x.flatten().split(2**20)):  # in pieces: weights and products take 8 bytes a number
        places = torch.arange(i * 2**20, i * 2**20 + len(part), device=x.device)
        weights = (places + 1) * -7046029254386353131  # 2^64 / golden ratio, as in SplitMix64
        # Mixed, so that changes in several places do not cancel; odd, so that no change in one is lost modulo 2^64.
        total += (part.long() * ((weights ^ (weights >> 32)) | 1)).sum()
    return total


def check_same_batch(group, **batch: Tensor | None) -> None:
    """Raise ValueError, on every rank, unless all ranks of the group were given the same tensors, in one collective.

    Args:
        batch: what `forward` was given, by name, of any shape; None for what was left out.
    """
    device = next(x.device for x in batch.values() if x is not None)
    own = torch.zeros(len(batch), 2, dtype=torch.int64, device=device)
    for row, x in zip(own, batch.values(), strict=True):
        if x is not None:
            row[0], row[1] = _checksum(torch.tensor([x.dim(), *x.shape])), _checksum(x)
    given = torch.stack(_all_gather(own, group))  # (C, tensors, 2)
    differs = (given != given[0]).any(2).any(0).tolist()
    names = [name for name, unlike in zip(batch, differs, strict=True) if unlike]
    if names:
        raise ValueError(
            f"the ranks of a sequence group were given different batches: they differ in {', '.join(names)} (shape or "
            "content, or only some were given it). All must get the same whole sequences, which the model cuts itself; "
            "with an IterableDataset set dispatch_batches=False (Trainer: accelerator_config)."
        )


def _accelerate_group():
    """The group that Accelerate's state holds for sequences, None without one."""
    state = {} if AcceleratorState is None else AcceleratorState._shared_state
    parallelism = state.get("parallelism_config")
    if parallelism is None or max(parallelism.cp_size, parallelism.sp_size) == 1:
        return None
    # By name: beside remote code there may be a second class of that name, of the same making.
    if type(parallelism).__name__ != "SequenceSharding":
        raise ValueError(
            f"a {type(parallelism).__name__} with cp_size={parallelism.cp_size}, sp_size={parallelism.sp_size} cuts "
            "sequences in a way that LongNet's segments cannot use; pass parallelism_config=SequenceSharding() "
            "(`from modeling_longnet import SequenceSharding`) to Accelerator or TrainingArguments, which takes its "
            "sizes from the launch configuration."
        )
    return state["device_mesh"]["cp"].get_group()


class SequenceSharded:
    """What every LongNet model can do when its sequences are shared by a group of processes."""

    _sequence_group = None

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_sequence_group"}

    def set_sequence_group(self, group: "dist.ProcessGroup | None") -> None:
        """Share each sequence among the processes of `group`, without Accelerate; None ends that.

        Every process of the group then gives `forward` the same whole batch, gets the outputs of its part
        (`gather_sequence` joins them) and the whole loss. Gradients must be averaged over the group, as
        DistributedDataParallel does. A copied or pickled model has no group.

        Raises:
            ValueError: this process is not in the group.
        """
        if group is not None and dist.get_rank(group) < 0:
            raise ValueError("this process is not in the sequence group given; give each process the group it is in.")
        for module in self.modules():
            if isinstance(module, SequenceSharded):
                module._sequence_group = group

    def sequence_group(self) -> "dist.ProcessGroup | None":
        """The group that shares each sequence: the one set here, else the one of `SequenceSharding` in Accelerate."""
        return self._sequence_group if self._sequence_group is not None else _accelerate_group()

    def gather_sequence(self, x: Tensor) -> Tensor:
        """Join this model's sharded outputs, (B, n, ...) on each rank -> (B, L, ...) on every one, detached."""
        group = self.sequence_group()
        return x if group is None else gather_sequence(x, group)

    def shard(self, batch: Tensor | None) -> Shard | None:
        """This process's part of a (B, L, ...) batch; None when sequences are not shared, or for no such batch."""
        group = self.sequence_group()
        if group is None or batch is None or batch.dim() < 2:
            return None
        borders = shard_borders(batch.shape[1], dist.get_world_size(group), min(self.config.segment_lengths))
        return Shard(group, dist.get_rank(group), borders)
