"""The cost of splitting a sequence over devices: bytes sent, balance of work, memory.

- measured: gloo processes with a fixed number of tokens each, so that the sequence grows with them. The bytes of each
  collective are counted from its own arguments and must equal the plan's.
- simulated: the same plans for up to 1,024 devices and 10^9 tokens, in integers only.

Two other methods are counted beside ours: gathering the kept tokens of every branch over the whole group (TorchScale),
and ring attention, where all keys and values visit every device. Bytes are those that a device receives in one layer's
forward pass.

Letters: w, r segment length and dilation rate, G key/value heads, D head dimension, n tokens of a shard.
"""

import argparse
import json
import math
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn
from tqdm import tqdm

from examples.drawing import Line, Panel, draw_panels, scale_log
from modeling_longnet import LongNetConfig, LongNetModel
from modeling_longnet.testing import Shard, count_received, halo_slices, make_branches, shard_borders, whole_batch

HEADS, HEAD_DIM, VOCABULARY = 12, 64, 97
# A key and a value in bfloat16.
ROW_BYTES = 2 * HEAD_DIM * 2
MEASURED = ((512, 1024, 2048), (1, 2, 4))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--tokens-per-process", type=int, default=512)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 32, 128, 512, 1024])
    parser.add_argument("--tokens", type=int, default=10**9, help="least length of the sequence on the most devices")
    parser.add_argument("--config", type=Path, default=Path("configuration/longnet-billion.json"))


def whole_group_rows(branches: tuple, n: int, devices: int) -> int:
    """Count the rows a device would receive if each branch longer than a shard were gathered over the whole group."""
    return sum((devices - 1) * math.ceil(n / b.r) * len(b.offsets) for b in branches if b.w > n)


def ring_rows(n: int, devices: int) -> int:
    """Count the rows that a device receives in ring attention."""
    return (devices - 1) * n * HEADS


class _Carried:
    """Counts the bytes that `all_to_all_single` receives from other processes, from its arguments."""

    def __init__(self, rank: int):
        self.rank, self.received, self._call = rank, [], dist.all_to_all_single

    def __call__(self, output, rows, output_counts, *args, **kwargs):
        others = sum(count for rank, count in enumerate(output_counts) if rank != self.rank)
        self.received.append(others * output[0].numel() * output.element_size() if len(output) else 0)
        return self._call(output, rows, output_counts, *args, **kwargs)


def _measure(rank: int, processes: int, n: int, folder: str) -> None:
    """Run one layer forward and backward in one process; rank 0 writes the bytes that each rank received."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    torch.manual_seed(0)
    config = LongNetConfig(
        vocab_size=VOCABULARY, hidden_size=HEADS * HEAD_DIM, intermediate_size=HEAD_DIM, num_hidden_layers=1,
        num_attention_heads=HEADS, segment_lengths=MEASURED[0], dilation_rates=MEASURED[1],
    )  # fmt: skip
    model = LongNetModel(config).bfloat16()
    model.set_sequence_group(dist.group.WORLD)
    tokens = torch.randint(VOCABULARY, (1, n * processes))
    carried = dist.all_to_all_single = _Carried(rank)
    model(tokens, use_cache=False).last_hidden_state.float().square().sum().backward()
    results = [None] * processes
    dist.all_gather_object(results, carried.received)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def measure(processes: int, n: int) -> dict:
    """Return the bytes that each rank received, and what the other methods would send.

    Raises:
        RuntimeError: the collectives sent another number of bytes than the plan counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_measure, (processes, n, folder), nprocs=processes)
        forward, backward = zip(*json.loads(Path(folder, "result.json").read_text()), strict=True)
    branches = make_branches(*MEASURED, HEADS, "interleaved")
    borders = shard_borders(n * processes, processes, branches[0].w)
    counted = ROW_BYTES * np.array([count_rows(borders, branches, rank) for rank in range(processes)])
    if (counted.sum(1).tolist(), counted.sum(0).tolist()) != (list(forward), list(backward)):
        raise RuntimeError(
            f"{processes} processes: the plan counts {counted.tolist()} bytes, but {forward} were received forward and "
            f"{backward} backward."
        )
    return {
        "processes": processes,
        "tokens": processes * n,
        "received": forward,
        "returned": backward,
        "whole_group": whole_group_rows(branches, n, processes) * ROW_BYTES,
        "ring": ring_rows(n, processes) * ROW_BYTES,
    }


def count_pairs(begin: int, end: int, branches: tuple) -> int:
    """Count pairs of a query in [begin, end) and a key that it sees, causal, over all heads and branches."""
    pairs = 0
    for w, r, offsets, *_ in branches:
        starts = np.arange(begin - begin % w, end, w)
        for offset, heads in Counter(offsets).items():
            # Kept tokens of each segment before `begin` and before `end`.
            low, high = ((np.clip(x - starts, 0, w) - offset + r - 1).clip(0) // r for x in (begin, end))
            pairs += heads * int((high * (high + 1) - low * (low + 1)).sum()) // 2
    return pairs


def count_rows(borders: tuple[int, ...], branches: tuple, rank: int) -> np.ndarray:
    """Count from the plan the keys that a rank receives from each rank in one layer's forward pass: (devices,)."""
    shard = Shard(None, rank, borders)
    return count_received(shard, list(halo_slices(shard, whole_batch(1, borders[-1]), branches, True, rank)))


def simulate(devices: int, n: int, branches: tuple) -> dict:
    """Compute bytes, work and memory of every device of a group from the plans alone."""
    length = devices * n
    borders = shard_borders(length, devices, branches[0].w)
    received, sent = np.zeros(devices, dtype=np.int64), np.zeros(devices, dtype=np.int64)
    for rank in tqdm(range(devices), desc=f"{devices} devices", mininterval=1):
        counts = count_rows(borders, branches, rank)
        received[rank] = counts.sum()
        sent += counts
    work = np.array([count_pairs(*pair, branches) for pair in pairwise(borders)], dtype=float)
    shard_length = borders[1]
    return {
        "devices": devices,
        "tokens": length,
        "received_most": int(received.max()) * ROW_BYTES,
        "received_and_sent_most": int((received + sent).max()) * ROW_BYTES,
        "work_most_over_mean": float(work.max() / work.mean()),
        "own_bytes": shard_length * HEADS * ROW_BYTES,
        "whole_group": whole_group_rows(branches, shard_length, devices) * ROW_BYTES,
        "ring": ring_rows(shard_length, devices) * ROW_BYTES,
    }


def run(args: argparse.Namespace) -> dict:
    config = json.loads(args.config.read_text())
    pattern = config["segment_lengths"], config["dilation_rates"]
    branches = make_branches(*map(tuple, pattern), HEADS, "interleaved")
    shortest = branches[0].w
    n = math.ceil(args.tokens / max(args.devices) / shortest) * shortest
    return {
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "measured_pattern": MEASURED,
        "pattern": pattern,
        "measured": [measure(processes, args.tokens_per_process) for processes in args.processes],
        "simulated": [simulate(devices, n, branches) for devices in args.devices],
    }


def _size(count: float) -> str:
    unit = next(i for i in range(5) if count < 1000 * 1024**i or i == 4)
    return f"{count / 1024**unit:.3g} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][unit]}"


def headline(result: dict) -> str:
    """Describe the largest simulated group."""
    last = result["simulated"][-1]
    return (
        f"{last['tokens']:,} tokens on {last['devices']:,} devices, one layer's forward, {result['heads']} heads of "
        f"{result['head_dim']}, bfloat16: a device receives at most {_size(last['received_most'])}, where gathering "
        f"over the whole group brings {_size(last['whole_group'])} and ring attention {_size(last['ring'])}; its own "
        f"keys and values take {_size(last['own_bytes'])}. Work, most over mean: {last['work_most_over_mean']:.2f}."
    )


def tables(result: dict) -> str:
    """Format measured and simulated bytes."""
    lines = [
        headline(result),
        "Sent between gloo processes, counted from the arguments of collectives: the most that a device received.",
        "| processes | tokens | forward | backward | whole group | ring |\n| --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(
            f"| {x['processes']} | {x['tokens']:,} | {_size(max(x['received']))} | {_size(max(x['returned']))} | "
            f"{_size(x['whole_group'])} | {_size(x['ring'])} |"
            for x in result["measured"]
        ),
        "Simulated: the most of any device, in one layer's forward pass.",
        "| devices | tokens | received | received and sent | whole group | ring | own K and V | work, most / mean |"
        "\n| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(
            f"| {x['devices']:,} | {x['tokens']:,} | {_size(x['received_most'])} | "
            f"{_size(x['received_and_sent_most'])} | {_size(x['whole_group'])} | {_size(x['ring'])} | "
            f"{_size(x['own_bytes'])} | {x['work_most_over_mean']:.3f} |"
            for x in result["simulated"]
        ),
    ]
    return "\n\n".join(lines)


def plot(result: dict, path: str) -> None:
    """Draw bytes received by a device against the number of devices, measured and simulated."""
    measured = [x | {"devices": x["processes"], "received_most": max(x["received"])} for x in result["measured"]]
    whos = (("received_most", "LongNet", "longnet"), ("whole_group", "all-gather\nof the group", "window"))
    panels = []
    for title, rows in (("measured", measured), ("simulated", result["simulated"])):
        devices = [x["devices"] for x in rows]
        lines = [
            Line(devices, [x[key] / 2**20 for x in rows], name, color)
            for key, name, color in (*whos, ("ring", "ring attention", "dense"))
        ]
        panels.append(Panel(f"MiB received in a layer's forward,\n{title}", lines, scale_log, "devices"))
    draw_panels(panels, path)
