"""A training step of one sequence on many devices, simulated: memory, bytes, seconds, and what limits it.

- The load of every device is counted from the plans that sharding itself uses: pairs of query and key, keys received
  from every other device. Memory is counted as in `memory`, plus what a device holds of the whole sequence.
- The speed of one device comes from stored runs of `length` and `train` on an H100. The links are options: the defaults
  are the nominal speeds of a node of 8 H100, with one NVLink and one 400 Gb/s port per device.
- A simulator then runs the step layer by layer: an exchange starts when all devices that take part have reached it, and
  overlaps with the attention within the shard.

Both are checked: one device against H100 runs that did not calibrate it, several against gloo processes on this
machine. Left out: launching (with under 32K tokens per device a step is CPU-bound), the optimizer, copies around an
exchange.

`direct` is the exchange of the package: each device receives its keys from their owners. `two steps` is not built: a
node receives every key once, spread over its devices by their place in the node, then gathers within the node.

Letters: C devices, L tokens, n tokens of a shard, H query heads, G key/value heads, D head dimension.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.axis import Axis
from torch.multiprocessing import spawn
from tqdm import tqdm

from examples.drawing import (
    Line,
    Panel,
    draw_panels,
    format_count,
    format_number,
    make_figure,
    scale_log,
    scale_seconds,
    styled,
)
from modeling_longnet import LongNetConfig, LongNetForCausalLM, dilated_attention
from modeling_longnet.testing import (
    Branch,
    Chunk,
    Pattern,
    Shard,
    branch_products,
    count_received,
    halo_slices,
    plan_exchange,
    shard_borders,
    whole_batch,
)

from .measure import ROOT, spread
from .memory import count_bytes

FOLDER = ROOT / "benchmarks" / "results"
CONFIGURATION = ROOT / "configuration"
FORWARD, BACKWARD = 4, 10  # operations per pair and dimension: two products forward, five backward
ID_BYTES = 24  # per token: ids, labels and shifted targets in int64, which every device holds of the whole sequence
STATE_BYTES = 16  # per parameter: weight and gradient in bfloat16, AdamW's two moments and weight in float32
# Model of the gloo run: attention and keys are most of its step, so errors of the simulator show.
MEASURED = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "position_embedding": "rope",
}
MEASURED_PATTERNS = ("256/1 4096/2", "w64 4096/8:1 once")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark; the defaults are the published run."""
    parser.add_argument("--config", type=Path, default=CONFIGURATION / "longnet-billion.json", help="the paper's model")
    parser.add_argument("--effort", type=int, default=1024, help="effort of for_context, whose pattern is also planned")
    parser.add_argument("--devices", type=int, nargs="*", default=[256, 1024, 1536], help="none: no plan")
    parser.add_argument("--tokens", type=int, default=10**9)
    parser.add_argument("--short", type=int, nargs="*", default=[10**8, 10**7], help="tokens, on the fewest devices")
    parser.add_argument("--node", type=int, default=8, help="devices of a node")
    parser.add_argument("--inside", type=float, default=450, help="GB/s, one direction of a device's link in its node")
    parser.add_argument("--between", type=float, default=50, help="GB/s, one direction of a device's network port")
    parser.add_argument("--latency", type=float, default=5, help="microseconds per message, one after another")
    parser.add_argument("--memory", type=float, default=80, help="GB of a device")
    parser.add_argument("--speed", default="nvidia-h100-80gb-hbm3", help="machine of the stored runs to calibrate by")
    parser.add_argument("--processes", type=int, nargs="*", default=[], help="of the check by gloo")
    parser.add_argument("--shard", type=int, default=1024, help="tokens of a gloo process")
    parser.add_argument("--rounds", type=int, default=3, help="of the check by gloo")


class Device(NamedTuple):
    """The speed of a device in operations per second, and its links."""

    forward: float  # attention
    backward: float
    rest: float  # everything else, counted as the products with the weights
    node: int  # devices of a node
    inside: float  # bytes per second
    between: float
    latency: float  # seconds per message


class Load(NamedTuple):
    """What each device of a group computes and exchanges in one layer."""

    tokens: np.ndarray  # (C,)
    own: np.ndarray  # (C,) pairs of a query and a key in the device's shard, all heads
    halo: np.ndarray  # (C,) pairs of a query and a received key
    keys: np.ndarray  # (C, C) keys that a device (row) receives from another
    node_keys: np.ndarray  # (nodes, C) keys that some device of a node needs from a device outside, each counted once


class Sizes(NamedTuple):
    """Sizes of the model that a step depends on."""

    layers: int
    head_dim: int
    key_bytes: int  # a key and its value
    block: int  # parameters of all blocks
    head: int  # parameters of the output projection
    total: int


def sizes_of(config: LongNetConfig, element: int) -> Sizes:
    """Return the sizes of a model whose dtype takes `element` bytes."""
    with torch.device("meta"):
        model = LongNetForCausalLM(config)
    block = sum(x.numel() for x in model.model.layers.parameters() if x.dim() == 2)
    head = model.lm_head.weight.numel()
    total = sum(x.numel() for x in model.parameters())
    return Sizes(config.num_hidden_layers, config.head_dim, 2 * config.head_dim * element, block, head, total)


def count_pairs(chunk: Chunk, branches: tuple[Branch, ...], heads: int, keys: str) -> int:
    """Count pairs of a query of the chunk and a key that it sees, over all heads.

    `keys` is "chunk" for the chunk's own keys, "prefix" for those before it.
    """
    pairs = 0
    for branch in branches:
        # Dropping whole segments before the chunk changes no count, so many chunks become equal.
        start = chunk.start if branch.phase or branch.after_phase else chunk.start % branch.w
        start = min(chunk.start, branch.w) if branch.is_window else start
        pairs += _branch_pairs(chunk._replace(start=start, total=start + chunk.length), branch, heads, keys)
    return pairs


@lru_cache(maxsize=1 << 16)
def _branch_pairs(chunk: Chunk, branch: Branch, heads: int, keys: str) -> int:
    pairs = 0
    for product in branch_products(chunk, branch, heads, True, keys):
        seen = 0
        for rows, columns, is_triangle in product.steps():
            count = rows.stop - (rows.start or 0), columns.stop - (columns.start or 0)
            seen += count[0] * (count[0] + 1) // 2 if is_triangle else count[0] * count[1]
        pairs += product.queries.heads * product.queries.segments * seen
    return pairs


def count_load(length: int, devices: int, pattern: Pattern, heads: int, groups: int, node: int) -> Load:
    """Count the load of each device from the plans. Layers are assumed to be alike: no staggered segments."""
    if pattern.branch_layer_period > 1:
        raise ValueError(f"pattern '{pattern.write()}': layers are counted as alike; leave branch_layer_period out.")
    branches = pattern.branches(groups, heads)
    borders = shard_borders(length, devices, min(pattern.segment_lengths, default=1))
    whole = whole_batch(1, length)
    keys = np.zeros((devices, devices), dtype=np.int64)
    node_keys = np.zeros((-(-devices // node), devices), dtype=np.int64)
    tokens, own, halo = np.diff(borders), np.zeros(devices, dtype=np.int64), np.zeros(devices, dtype=np.int64)
    unique = {}
    for rank in tqdm(range(devices), desc=f"{devices} devices", disable=devices < 64):
        shard = Shard(None, rank, borders)
        needs = list(halo_slices(shard, whole, branches, True, rank))
        keys[rank] = count_received(shard, needs)
        for chunk in shard.cut_chunks(whole, rank):
            own[rank] += count_pairs(chunk, branches, heads, "chunk")
            halo[rank] += count_pairs(chunk, branches, heads, "prefix")
        for need in needs:  # devices of one segment need the same keys from outside their node
            unique.setdefault((need.branch, need.head, need.first), need)
        if (rank + 1) % node == 0 or rank + 1 == devices:
            index = rank // node
            node_keys[index] = count_received(shard, list(unique.values()))
            node_keys[index, index * node : rank + 1] = 0
            unique = {}
    return Load(tokens, own, halo, keys, node_keys)


def exchange_seconds(load: Load, size: int, device: Device, is_backward: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds until each device (C,) has its keys, directly and in two steps, if all start together.

    A device's links carry both directions at once, and so do links inside and between nodes. A receiver waits until the
    owners of its keys have sent everything. The backward exchange is the reverse.
    """
    keys = load.keys.T if is_backward else load.keys
    count = len(keys)
    node = np.arange(count) // device.node
    same = node[:, None] == node
    inside, between = np.where(same, keys, 0), np.where(same, 0, keys)

    def seconds(inside_in, inside_out, between_in, between_out, messages):
        links = np.maximum(
            np.maximum(inside_in, inside_out) * size / device.inside,
            np.maximum(between_in, between_out) * size / device.between,
        )
        return links + messages * device.latency

    def settle(own: np.ndarray, sources: np.ndarray) -> np.ndarray:
        return np.maximum(own, np.where(sources, own, 0).max(1))

    messages = np.maximum((keys > 0).sum(1), (keys > 0).sum(0))
    direct = seconds(inside.sum(1), inside.sum(0), between.sum(1), between.sum(0), messages)
    # A device of each node takes what the devices at its own place in other nodes own.
    nodes, place = len(load.node_keys), np.arange(count) % device.node
    at_place = np.array([[load.node_keys[i, place == p].sum() for p in range(device.node)] for i in range(nodes)])
    partners = np.array([[(load.node_keys[i, place == p] > 0).sum() for p in range(device.node)] for i in range(nodes)])
    taken, sent = at_place[node, place], load.node_keys.sum(0)
    asked = np.maximum(partners[node, place], (load.node_keys > 0).sum(0))
    if is_backward:
        taken, sent = sent, taken
    first = seconds(0, 0, taken, sent, asked)
    union = load.node_keys.sum(1)[node]
    gathered = union - at_place[node, place]
    within = inside.sum(1), inside.sum(0)
    second = seconds(within[0] + gathered, within[1] + gathered, 0, 0, np.where(union > 0, device.node - 1, 0))
    second = np.where((gathered > 0) | (within[0] > 0) | (within[1] > 0), second, 0)
    whole = np.array([first[node == i].max() for i in range(nodes)])[node] + second
    return settle(direct, keys > 0), whole


def simulate(load: Load, sizes: Sizes, device: Device, *, checkpointing: bool, exchange=0, reduce=0, overlap=True):
    """Simulate one step over all devices, layer by layer.

    Args:
        exchange: 0 for the direct exchange, 1 for the one in two steps.
        reduce: bytes of gradients that an all-reduce then sums over the group.
        overlap: whether the exchange overlaps with the attention within the shard.

    Returns:
        Each device's clock when the step ends, and its seconds of computing.
    """
    operations = sizes.head_dim * FORWARD / device.forward, sizes.head_dim * BACKWARD / device.backward
    own, halo = (np.outer(operations, pairs) for pairs in (load.own, load.halo))  # (2, C)
    rest = 2 * sizes.block / sizes.layers * load.tokens / device.rest
    seconds = [exchange_seconds(load, sizes.key_bytes, device, is_backward)[exchange] for is_backward in (False, True)]
    sources = load.keys > 0, load.keys.T > 0
    clock = computing = np.zeros(len(load.tokens))

    def pass_exchange(ready: np.ndarray, is_backward: int) -> np.ndarray:
        begin = np.maximum(ready, np.where(sources[is_backward], ready, 0).max(1))
        arrived = begin + seconds[is_backward]
        return np.maximum(ready + own[is_backward], arrived) if overlap else arrived + own[is_backward]

    def forward(clock):
        return pass_exchange(clock, 0) + halo[0] + rest

    for _ in range(sizes.layers):
        clock, computing = forward(clock), computing + own[0] + halo[0] + rest
    head = 6 * sizes.head * load.tokens / device.rest
    clock, computing = clock + head, computing + head
    for _ in range(sizes.layers):
        if checkpointing:
            clock, computing = forward(clock), computing + own[0] + halo[0] + rest
        clock = pass_exchange(clock + 2 * rest + halo[1], 1)
        computing = computing + own[1] + halo[1] + 2 * rest
    count = len(clock)
    link = device.between if count > device.node else device.inside
    reduced = 2 * (count - 1) / count * reduce / link + (2 * np.log2(count) * device.latency if reduce else 0)
    return np.full(count, clock.max() + reduced) if reduce else clock, computing


def read_run(name: str, speed: str) -> dict:
    """Return the newest stored run of a benchmark on a machine.

    Raises:
        ValueError: there is none.
    """
    paths = sorted(FOLDER.glob(f"{name}-{speed}-*.json"))
    if not paths:
        raise ValueError(
            f"--speed {speed}: benchmarks/results holds no run of `{name}` on such a machine. Run that benchmark "
            "there first, or name another machine."
        )
    return json.loads(paths[-1].read_text())


def median_of(rows: list[dict], **fields) -> dict:
    """Return the one row with these fields, its seconds replaced by their median."""
    (row,) = (row for row in rows if all(row.get(name) == x for name, x in fields.items()))
    return row | {"median": statistics.median(row["seconds"])}


def calibrate(speed: str, links: dict) -> tuple[Device, list[dict]]:
    """Return the speed of one device, and what it predicts for other stored runs beside what they measured."""
    runs = {name: read_run(name, speed) for name in ("length", "train", "op", "memory")}
    attention = [
        median_of(runs["length"]["rows"], who="ours", mode=mode, length=1 << 20)
        for mode in ("forward", "forward+backward")
    ]
    flops, seconds = ([row[name] for row in attention] for name in ("flops", "median"))
    forward, backward = flops[0] / seconds[0], (flops[1] - flops[0]) / (seconds[1] - seconds[0])
    config = LongNetConfig.from_pretrained(CONFIGURATION / "longnet-125m.json")
    sizes, pattern = sizes_of(config, 2), Pattern.of(config)
    steps = {row["length"]: statistics.median(row["seconds"]["longnet"]) for row in runs["train"]["rows"]}

    def attended(length: int) -> float:
        pairs = count_load(length, 1, pattern, config.num_attention_heads, config.num_key_value_heads, 1).own[0]
        return sizes.layers * sizes.head_dim * pairs * (FORWARD / forward + BACKWARD / backward)

    longest = max(steps)
    rest = 6 * (sizes.block + sizes.head) * longest / (steps[longest] - attended(longest))
    device = Device(forward, backward, rest, **links)
    checks = []
    for length in sorted(steps)[-2::-1]:
        load = count_load(length, 1, pattern, config.num_attention_heads, config.num_key_value_heads, 1)
        predicted = simulate(load, sizes, device, checkpointing=False)[0].max()
        checks.append({"what": f"training step, {length:,} tokens", "predicted": predicted, "measured": steps[length]})
    rows = [row for row in runs["op"]["rows"] if row["who"] == "ours" and row["length"] == 131_072]
    for row in rows:
        predicted = row["flops"] / forward
        if row["mode"] != "forward":
            predicted = row["flops"] * (FORWARD / forward + BACKWARD / backward) / (FORWARD + BACKWARD)
        what = f"attention, {row['pattern']}, {row['mode']}, 131,072 tokens"
        checks.append({"what": what, "predicted": predicted, "measured": statistics.median(row["seconds"])})
    for row in runs["memory"]["rows"]:
        if row["checkpointing"]:
            what, length = f"memory of a step with checkpointing, {row['length']:,} tokens", row["length"]
            checks.append({"what": what, "predicted": row["counted"] * length, "measured": row["peak_bytes"]})
            checks[-1]["unit"] = "GB"
    return device, checks


def _time(call) -> float:
    dist.barrier()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _measure(rank: int, processes: int, n: int, rounds: int, folder: str) -> None:
    """Measure each pattern in one of the processes; rank 0 writes the results of all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    samples = [_time_steps(processes, n, words, rounds) for words in MEASURED_PATTERNS]
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(samples))
    dist.destroy_process_group()


def _time_steps(processes: int, n: int, words: str, rounds: int) -> dict[str, list[float]]:
    """Time, in turn, a step alone, its attention alone, messages, and the shared step; the slowest process counts."""
    torch.manual_seed(0)
    fields = _fields(Pattern.parse(words))
    model = LongNetForCausalLM(LongNetConfig(**MEASURED, **fields)).train()
    ids = torch.randint(97, (1, n * processes))
    heads = MEASURED["num_attention_heads"]
    query, key, value = (torch.randn(1, heads, n, 32, requires_grad=True) for _ in range(3))

    def step(group, tokens):
        model.set_sequence_group(group)
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad()

    def attend(backward):
        with torch.set_grad_enabled(backward):
            out = dilated_attention(query, key, value, **fields)
        if backward:
            out.sum().backward()

    def send(numbers):
        rows = torch.zeros(processes, numbers // processes)
        dist.all_to_all_single(torch.empty_like(rows), rows)

    calls = {
        "alone": lambda: step(None, ids[:, :n]),
        "forward": lambda: attend(False),
        "forward+backward": lambda: attend(True),
        "message": lambda: send(processes),
        "bytes": lambda: send(1 << 21),
        "shared": lambda: step(dist.group.WORLD, ids),
    }
    for call in calls.values():
        call()
    samples = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds = torch.tensor(_time(call))
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            samples[name].append(seconds.item())
    return samples


def _fields(pattern: Pattern) -> dict[str, object]:
    return {name: x for name, x in pattern._asdict().items() if x is not None}


def check_processes(processes: int, n: int, rounds: int) -> list[dict]:
    """Measure the shared step of gloo processes, and simulate it from what each takes alone; one result per pattern."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_measure, (processes, n, rounds, folder), nprocs=processes)
        found = json.loads(Path(folder, "result.json").read_text())
    return [_predict(processes, n, *pair) for pair in zip(MEASURED_PATTERNS, found, strict=True)]


def _predict(processes: int, n: int, words: str, samples: dict[str, list[float]]) -> dict:
    time_of = {name: statistics.median(x) for name, x in samples.items()}
    pattern, heads = Pattern.parse(words), MEASURED["num_attention_heads"]
    sizes = sizes_of(LongNetConfig(**MEASURED, **_fields(pattern)), 4)
    alone = count_load(n, 1, pattern, heads, heads, 1)
    operations = sizes.head_dim * int(alone.own[0])
    backward = time_of["forward+backward"] - time_of["forward"]
    rest = time_of["alone"] - sizes.layers * time_of["forward+backward"]
    device = Device(
        FORWARD * operations / time_of["forward"],
        BACKWARD * operations / max(backward, 1e-9),
        6 * (sizes.block + sizes.head) * n / max(rest, 1e-9),
        processes,
        (1 << 23) * (processes - 1) / processes / max(time_of["bytes"] - time_of["message"], 1e-9),
        1.0,
        time_of["message"] / max(1, processes - 1),
    )
    load = count_load(n * processes, processes, pattern, heads, heads, processes)
    clock, computing = simulate(load, sizes, device, checkpointing=False, overlap=False)
    received = int(load.keys.sum(1).max()) * sizes.key_bytes
    names = {"processes": processes, "shard": n, "pattern": words, "received": received}
    return names | {"samples": samples, "shared_cores": float(computing.mean()), "slowest": float(clock.max())}


def plan(tokens: int, devices: int, name: str, config: LongNetConfig, device: Device, counted: float) -> dict:
    """Return memory, bytes and seconds of a step of one sequence on `devices`, with gradient checkpointing."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    sizes, pattern = sizes_of(config, 2), Pattern.of(config)
    load = count_load(tokens, devices, pattern, heads, groups, device.node)
    node = np.arange(devices) // device.node
    between = np.where(node[:, None] == node, 0, load.keys)
    steps = [simulate(load, sizes, device, checkpointing=True, exchange=x, reduce=2 * sizes.total) for x in (0, 1)]
    exchanges = exchange_seconds(load, sizes.key_bytes, device)
    received = int(load.keys.sum(1).max()) * sizes.key_bytes
    seconds = [float(clock.max()) for clock, _ in steps]
    return {
        "pattern": name,
        "tokens": tokens,
        "devices": devices,
        "shard": int(load.tokens.max()),
        "memory": {
            "activations": counted * int(load.tokens.max()),
            "weights": STATE_BYTES * sizes.total,
            "keys": 3 * received,  # those sent, received, and placed in slots; one layer at a time
            "ids": ID_BYTES * tokens,
        },
        "received": received,
        "received_between": int(between.sum(1).max()) * sizes.key_bytes,
        "node_between": int(max(between[node == i].sum() for i in range(node[-1] + 1))) * sizes.key_bytes,
        "node_once": int(load.node_keys.sum(1).max()) * sizes.key_bytes,
        "step_bytes": 3 * sizes.layers * received,  # forward, forward again, backward
        "messages": int((load.keys > 0).sum(1).max()),
        "exchange": [float(x.max()) for x in exchanges],
        "own": float(sizes.head_dim * FORWARD * load.own.max() / device.forward),
        "seconds": seconds,
        "computing": float(steps[0][1].mean() / seconds[0]),
        "work_most_over_mean": float((load.own + load.halo).max() / (load.own + load.halo).mean()),
    }


def time_planning(tokens: int, devices: int, config: LongNetConfig) -> float:
    """Return the seconds that the last device's process takes to plan the exchange."""
    pattern = Pattern.of(config)
    branches = pattern.branches(config.num_key_value_heads, config.num_attention_heads)
    shard = Shard(None, devices - 1, shard_borders(tokens, devices, min(pattern.segment_lengths, default=1)))
    begin = time.perf_counter()
    plan_exchange(shard, whole_batch(1, tokens), branches, True, 1, torch.device("cpu"))
    return time.perf_counter() - begin


def count_activations(path: Path, sizes: dict, speed: str) -> float:
    """Return bytes per token at a step's peak with checkpointing: stored for the paper's 125M model, else counted."""
    stored = LongNetConfig.from_pretrained(CONFIGURATION / "longnet-125m.json")
    if all(getattr(stored, name) == x for name, x in sizes.items()):
        return read_run("memory", speed)["paper_bytes_a_token"]["True"]
    return count_bytes(path.resolve(), "bfloat16")[True]


def run(args: argparse.Namespace) -> dict:
    """Check with gloo processes if --processes names any, and plan if --devices names any."""
    measured = [row for count in args.processes for row in check_processes(count, args.shard, args.rounds)]
    return {"measured": measured} | (make_plans(args) if args.devices else {"rows": []})


def make_plans(args: argparse.Namespace) -> dict:
    """Calibrate and check one device, then plan each case for both patterns."""
    links = {"node": args.node, "inside": args.inside * 1e9, "between": args.between * 1e9}
    device, checks = calibrate(args.speed, links | {"latency": args.latency * 1e-6})
    paper = LongNetConfig.from_pretrained(args.config)
    sizes = {x: getattr(paper, x) for x in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    counted = count_activations(args.config, sizes, args.speed)
    heads = {"num_attention_heads": paper.num_attention_heads, "num_key_value_heads": paper.num_key_value_heads}
    cases = [(args.tokens, devices) for devices in args.devices]
    middle, rows, planning = sorted(args.devices)[len(args.devices) // 2], [], {}
    patterns = {}
    cases += [(tokens, min(args.devices)) for tokens in args.short]
    for tokens, devices in cases:
        # Layers are counted as alike.
        window = LongNetConfig.for_context(tokens, effort=args.effort, branch_layer_period=1, **sizes, **heads)
        for name, config in (("the paper's", paper), ("window and summaries", window)):
            rows.append(plan(tokens, devices, name, config, device, counted))
            if (tokens, devices) == (args.tokens, middle):
                planning[name] = time_planning(tokens, devices, config)
                patterns[name] = Pattern.of(config).write()
    return {
        "device": device._asdict(),
        "memory_gb": args.memory,
        "speed": args.speed,
        "sizes": sizes | heads,
        "parameters": sizes_of(paper, 2).total,
        "patterns": patterns,
        "counted_bytes_a_token": counted,
        "checks": checks,
        "planned": middle,
        "planning": planning,
        "rows": rows,
    }


def _size(count: float) -> str:
    unit = next(i for i in range(5) if count < 1000 ** (i + 1) or i == 4)
    return f"{count / 1000**unit:.3g} {['B', 'KB', 'MB', 'GB', 'TB'][unit]}"


def least_devices(row: dict, capacity: float, ids: bool = True) -> int | None:
    """Return the least number of devices whose memory holds a plan's tokens; None if none suffices."""
    fixed = row["memory"]["weights"] + row["memory"]["keys"] + (row["memory"]["ids"] if ids else 0)
    a_token = row["memory"]["activations"] / row["shard"]
    return None if fixed >= capacity else int(-(-row["tokens"] * a_token // (capacity - fixed)))


def summary(result: dict) -> str:
    """Say the main results: devices, seconds, and what limits them."""
    most = max(row["tokens"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["tokens"] == most]
    capacity = result["memory_gb"] * 1e9
    paper = [row for row in rows if row["pattern"] == "the paper's"]
    fits = next((row for row in paper if sum(row["memory"].values()) <= capacity), None)
    least, without = (least_devices(paper[-1], capacity, ids) for ids in (True, False))
    ids = f"the ids, labels and targets of the whole sequence take {_size(ID_BYTES * most)} on each"
    cut = "" if without is None else f" (if they were cut before they reach it, {without:,} devices would do)"
    if least is not None:
        limit = f"it takes at least {least:,} devices; {ids}{cut}."
    elif without is not None:
        limit = f"no number of devices suffices, as {ids}{cut}."
    else:
        limit = "no number of devices suffices: weights and keys alone fill the memory of each."
    lines = [
        f"{most:,} tokens, {result['parameters'] / 1e6:.0f}M parameters, bfloat16, gradient checkpointing, AdamW, "
        f"devices of {result['memory_gb']:.0f} GB. Memory is the first limit: {limit}"
    ]
    if fits:
        other = next(x for x in rows if x["devices"] == fits["devices"] and x is not fits)
        lines.append(
            f"On {fits['devices']:,} devices a step takes {fits['seconds'][0]:.1f} s with the paper's branches and "
            f"{other['seconds'][0]:.1f} s with a window and summaries "
            f"({fits['seconds'][0] * fits['devices'] / 3600:.1f} and "
            f"{other['seconds'][0] * fits['devices'] / 3600:.1f} device hours); a device receives "
            f"{_size(fits['received'])} and {_size(other['received'])} per layer, and computes "
            f"{fits['computing']:.0%} and {other['computing']:.0%} of the time."
        )
    return " ".join(lines)


# Columns of words; all other columns hold numbers.
_WORDS = ("pattern", "fits", "one device")


def _table(header: str, rows: Iterable[str]) -> str:
    """Return a Markdown table; cells are separated by " | "."""
    rule = " | ".join("---" if name in _WORDS else "---:" for name in header.split(" | "))
    return "\n".join(f"| {line} |" for line in (header, rule, *rows))


def _plan_table(rows: list[dict], capacity: float) -> str:
    lines = []
    for x in rows:
        memory = sum(x["memory"].values())
        lines.append(
            f"{x['tokens']:,} | {x['devices']:,} | {x['pattern']} | {x['shard']:,} | {memory / 1e9:.0f} | "
            f"{'yes' if memory <= capacity else 'no'} | {_size(x['received'])} ({_size(x['received_between'])}) | "
            f"{_size(x['step_bytes'])} | {x['messages']:,} | {x['exchange'][0] * 1e3:.2f} | {x['own'] * 1e3:.2f} | "
            f"{x['seconds'][0]:.2f} | {x['computing']:.0%}"
        )
    header = (
        "tokens | devices | pattern | tokens per device | GB per device | fits | received per layer (from other nodes) "
        "| per step | from devices | exchange, ms | own attention, ms | step, s | computing"
    )
    return _table(header, lines)


def _gather_table(rows: list[dict]) -> str:
    header = (
        "tokens | devices | pattern | a node receives | each key once | exchange, ms | in two steps, ms | step, s | "
        "with two steps, s"
    )
    lines = (
        f"{x['tokens']:,} | {x['devices']:,} | {x['pattern']} | {_size(x['node_between'])} | {_size(x['node_once'])} | "
        f"{x['exchange'][0] * 1e3:.2f} | {x['exchange'][1] * 1e3:.2f} | {x['seconds'][0]:.3f} | {x['seconds'][1]:.3f}"
        for x in rows
    )
    return _table(header, lines)


def _where_it_pays(rows: list[dict]) -> str:
    saved = [(x, 1 - x["seconds"][1] / x["seconds"][0]) for x in rows]
    cases = [
        f"{x['tokens']:,} tokens on {x['devices']:,} devices, {x['pattern']}: {share:.0%}"
        for x, share in saved
        if share > 0.01
    ]
    if not cases:
        return "Two steps would shorten none of these by 1 %: the exchange overlaps with attention."
    return f"Two steps would shorten the step by more than 1 % for {'; '.join(cases)}."


def _check_table(checks: list[dict]) -> str:
    lines = []
    for x in checks:
        cells = [f"{x[y] / 1e9:.1f} GB" if "unit" in x else f"{x[y] * 1e3:.1f} ms" for y in ("predicted", "measured")]
        lines.append(f"{x['what']} | {cells[0]} | {cells[1]} | {x['predicted'] / x['measured']:.2f}")
    return _table("one device | predicted | measured | predicted / measured", lines)


def _process_table(measured: list[dict]) -> str:
    lines = []
    for x in measured:
        shared, alone = (spread([1e3 * s for s in x["samples"][name]]) for name in ("shared", "alone"))
        mean, slowest = 1e3 * x["shared_cores"], 1e3 * x["slowest"]
        measured_ms = f"{shared.median:.0f} ({shared.least:.0f} to {shared.most:.0f})"
        lines.append(
            f"{x['processes']} | {x['pattern']} | {_size(x['received'])} | {alone.median:.0f} | {mean:.0f} | "
            f"{slowest:.0f} | {measured_ms} | {shared.median / mean:.2f}"
        )
    header = (
        "processes | pattern | received per layer | a shard alone, ms | predicted: mean of computing, ms | "
        "slowest process, ms | measured, median (least to most), ms | measured / mean"
    )
    return _table(header, lines)


def tables(result: dict) -> str:
    """Format all results: summary, plan, exchange in two steps, and both checks."""
    return "\n\n".join((_plan_parts(result) if result["rows"] else []) + _process_parts(result["measured"]))


def _process_parts(measured: list[dict]) -> list[str]:
    if not measured:
        return []
    return [
        f"A step of gloo processes with {measured[0]['shard']:,} tokens each, predicted from what each takes alone. "
        "They share the cores of one machine. The lower bound is the mean of their computing, reached if idle "
        "processes give up their cores. The upper bound is the slowest process with no overlap of its exchange.",
        _process_table(measured),
    ]


def _plan_parts(result: dict) -> list[str]:
    device, capacity = result["device"], result["memory_gb"] * 1e9
    tera = {name: f"{device[name] / 1e12:.0f}" for name in ("forward", "backward", "rest")}
    links = (
        f"Links: nodes of {device['node']}, a device sends and receives {device['inside'] / 1e9:.0f} GB/s inside and "
        f"{device['between'] / 1e9:.0f} GB/s between them, {device['latency'] * 1e6:.0f} us per message (assumed). One "
        f"device, from runs on {result['speed']}: attention {tera['forward']} TFLOP/s forward and {tera['backward']} "
        f"backward, everything else as products at {tera['rest']} TFLOP/s. Planning the exchange on this CPU, once "
        f"for each length, takes {' and '.join(f'{x:.1f} s' for x in result['planning'].values())} on "
        f"{result['planned']:,} devices ({', '.join(result['planning'])})."
    )
    parts = [summary(result), links, _plan_table(result["rows"], capacity)]
    parts += [
        "The exchange of a layer, directly and with an all-gather within each node:",
        _gather_table(result["rows"]),
    ]
    parts.append(_where_it_pays(result["rows"]))
    parts += ["Predictions of runs on one device that did not calibrate it:", _check_table(result["checks"])]
    return parts


headline = tables


def plot(result: dict, path: str) -> None:
    """Draw seconds per step and memory per device against devices; without plans, the processes' steps."""
    if result["rows"]:
        _plot_plans(result, Path(path))
    else:
        _plot_processes(result["measured"], Path(path))


@styled
def _plot_processes(measured: list[dict], path: Path) -> None:
    figure = make_figure()
    axis = figure.subplots()
    places = range(len(measured))
    for key, label in (("shared_cores", "predicted: mean of computing"), ("slowest", "predicted: slowest process")):
        axis.plot(places, [1e3 * x[key] for x in measured], "_", markersize=30, label=label)
    shared = [spread([1e3 * s for s in x["samples"]["shared"]]) for x in measured]
    errors = [[s.median - s.least for s in shared], [s.most - s.median for s in shared]]
    axis.errorbar(places, [s.median for s in shared], yerr=errors, fmt="o", capsize=4, label="measured")
    axis.set_xticks(places, [f"{x['processes']} processes\n{x['pattern']}" for x in measured])
    axis.set(title="Milliseconds of a step", ylim=(0, None))
    axis.legend()
    figure.savefig(path)


def _plot_plans(result: dict, path: Path) -> None:
    most = max(row["tokens"] for row in result["rows"])
    seconds, memory = [], []
    for name, color in (("the paper's", "paper"), ("window and summaries", "longnet")):
        rows = [row for row in result["rows"] if (row["pattern"], row["tokens"]) == (name, most)]
        devices, label = [row["devices"] for row in rows], name.replace(" and ", "\nand ")
        computing = [row["seconds"][0] * row["computing"] for row in rows]
        seconds.append(Line(devices, [row["seconds"][0] for row in rows], label, color))
        seconds.append(Line(devices, computing, None, color, "forward"))
        memory.append(Line(devices, [sum(row["memory"].values()) / 1e9 for row in rows], label, color))
    memory.append(Line(devices, [result["memory_gb"]] * len(devices), "what it has", "other", "forward"))
    panels = [
        Panel("Seconds of a step (dashed: computing)", seconds, scale_seconds, "devices", _scale_devices),
        Panel("Memory of a device", memory, _scale_gigabytes, "devices", _scale_devices),
    ]
    draw_panels(panels, path, title=f"{format_count(most)} tokens")


def _scale_devices(axis: Axis) -> None:
    scale_log(axis, format_number)


def _scale_gigabytes(axis: Axis) -> None:
    scale_log(axis, lambda value: f"{format_number(value)} GB")
