"""Sharding a sequence over processes: what two of them can show in a minute. The rest is in sharding_matrix.py."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from hypothesis import given
from hypothesis import strategies as st
from sharding_worker import launch

from benchmarks import communication
from modeling_longnet import LongNetForCausalLM, SequenceSharding
from modeling_longnet.branches import Chunk
from modeling_longnet.pattern import make_branches
from modeling_longnet.reference import count_branches
from modeling_longnet.sharding import _checksum
from modeling_longnet.sharding_plan import Shard, count_received, halo_slices, plan_exchange, shard_borders

CONFIGURATIONS = sorted((Path(__file__).parent.parent / "configuration" / "accelerate").glob("*.yaml"))


@given(st.integers(1, 500), st.integers(1, 9), st.integers(1, 60))
def test_borders_are_equal_shards(length, size, shortest):
    borders = shard_borders(length, size, shortest)
    lengths = [b - a for a, b in pairwise(borders)]
    assert (borders[0], borders[-1], len(lengths)) == (0, length, size)
    n = lengths[0]
    assert n >= math.ceil(length / size)
    assert n == length or n <= shortest or n % shortest == 0
    full, rest = divmod(length, n)
    assert lengths == ([n] * full + [rest] + [0] * size)[:size]


@given(st.data())
def test_what_one_rank_sends_is_what_the_other_receives(data):
    """The plans of all ranks fit each other, and no rank receives its own rows."""
    length, size, heads = data.draw(st.integers(1, 61)), data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3))
    w = sorted(data.draw(st.lists(st.integers(1, 47), min_size=1, max_size=3, unique=True)))
    r = [data.draw(st.integers(1, x)) for x in w]
    is_causal = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, length), min_size=size - 1, max_size=size - 1)))
    branches = make_branches(tuple(w), tuple(r), heads, "interleaved")
    chunks = (Chunk(0, 2, 0, length, 0, length),)
    shards = [Shard(None, rank, (0, *cuts, length)) for rank in range(size)]
    plans = [plan_exchange(shard, chunks, branches, is_causal, 2, "cpu") for shard in shards]
    sent = np.array([plan.send_counts for plan in plans])
    assert (sent == np.array([plan.receive_counts for plan in plans]).T).all()
    assert not sent.diagonal().any()
    assert not is_causal or not np.tril(sent).any()
    for plan in plans:
        assert len(plan.send) == sum(plan.send_counts)
        assert len(set(plan.slots.tolist())) == len(plan.slots) == sum(plan.receive_counts)
        assert plan.is_needed == bool(sent.any())


@pytest.mark.parametrize("devices", [8, 64, 512])
def test_received_rows_stop_growing_with_the_sequence(devices):
    """At most the sum of w / r rows per head over the branches that a shard cuts, however many devices there are."""
    w, r = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)
    branches, length = make_branches(w, r, 12, "interleaved"), 2048 * devices
    borders = shard_borders(length, devices, w[0])
    rank = min(devices, 16) - 1
    shard = Shard(None, rank, borders)
    needs = list(halo_slices(shard, (Chunk(0, 1, 0, length, 0, length),), branches, True, rank))
    bound = 12 * sum(math.ceil(x / y) for x, y in zip(w[1:], r[1:], strict=True))
    assert 0 < count_received(shard, needs).sum() <= bound


def test_two_processes_work_as_one():
    """One start of processes for three functions of the worker: starting them takes the time."""
    models = ["ragged", "empty-shards", "bidirectional", "grouped-heads"]
    launch("op", 40, "+", "model", *models, "+", "refusals", processes=2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.float64], ids=str)
def test_checksum_tells_places_apart(dtype):
    """The same numbers at other places are another batch, also beyond the first piece; memory layout does not count."""
    x = torch.zeros(3, 2**20 + 7, dtype=dtype)
    sums = [_checksum(x).item()]
    for row, column in ((0, 0), (0, 1), (1, 0), (2, 2**20), (2, 2**20 + 6)):
        one = x.clone()
        one[row, column] = 1
        sums.append(_checksum(one).item())
        assert sums[-1] == _checksum(one.mT.contiguous().mT).item()
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize("devices", [1, 3, 4, 7])
def test_benchmark_counts_every_pair_once(devices):
    """The simulated devices' work adds up to the pairs of tokens that see each other."""
    branches = make_branches((6, 15), (1, 4), 2, "interleaved")
    positions = torch.arange(43)[None]
    pairs = int(count_branches(branches, positions, positions).sum())
    assert sum(communication.count_pairs(*x, branches) for x in pairwise(shard_borders(43, devices, 6))) == pairs


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_launch_configurations_are_accelerates(path):
    """Accelerate reads them and refuses unknown names; sizes multiply to the processes, and FSDP's class exists."""
    config = load_config_from_file(str(path))
    sizes = [size for name, size in config.parallelism_config.items() if name.endswith("_size")]
    assert not sizes or math.prod(sizes) == config.num_processes
    wrapped = config.fsdp_config.get("fsdp_transformer_layer_cls_to_wrap")
    assert wrapped in (None, *LongNetForCausalLM._no_split_modules)
    options = [name for section in (config.parallelism_config, config.fsdp_config) for name in section]
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    assert set(options) <= set(vars(arguments))


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"sp_size": 2}])
def test_other_parallelism_is_refused(sizes):
    with pytest.raises(ValueError, match="leave the other sizes at 1"):
        SequenceSharding(**sizes)


def test_too_few_processes_are_refused():
    with pytest.raises(ValueError, match="needs 4 processes, there are 1"):
        SequenceSharding(cp_size=4).build_device_mesh("cpu")
