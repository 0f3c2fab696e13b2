"""The benchmarks' arithmetic against counting by hand, and one small run from measuring to README."""

import json
import shlex
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checks import assert_close

from benchmarks import cluster, figures, length, op, peers, run, summary
from benchmarks.measure import peak_bytes, spread, time_alternately
from examples.drawing import Line, Panel, draw_panels, format_count, scale_seconds
from modeling_longnet import LongNetConfig
from modeling_longnet.reference import count_branches
from modeling_longnet.testing import Pattern


@pytest.mark.parametrize(
    ("length", "pattern"),
    [(64, "16/1 32/4"), (53, "16/1 32/4"), (37, "7/3 11/5 90/2"), (5, "16/8")],
)
def test_flops_count_the_pairs_that_see_each_other(length, pattern):
    case = op.Case(length, 3, 16, "float32", "forward", 1)
    pairs = 0
    for w, r in zip(*op.parse_pattern(pattern), strict=True):
        for head in range(case.heads):
            rows = [p for p in range(length) if (p % w) % r == head % r]
            pairs += sum(q // w == k // w for q in rows for k in rows if k <= q)
    assert op.count_flops(case, pattern) == pairs * 4 * case.head_dim


def test_dense_flops():
    case = op.Case(6, 2, 16, "float32", "forward+backward", 1)
    assert op.count_flops(case, None) == 2 * 21 * 14 * 16


@pytest.mark.parametrize("text", ["", "512", "512/1 x/2", "512/1/2"])
def test_bad_pattern_is_refused(text):
    with pytest.raises(ValueError, match="LENGTH/RATE"):
        op.parse_pattern(text)


@pytest.mark.parametrize(("count", "unit"), [(5, 1 << 20), (17, 3 << 20), (3, 20 << 20)])
def test_kernel_calls_cover_every_attention_once(count, unit):
    sizes = op._call_sizes(count, unit, "cpu")
    assert sum(sizes) == count
    assert all(size == 1 or size * unit <= op.KERNEL_BYTES_PER_CALL for size in sizes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", op.MODES)
def test_the_strided_kernel_computes_what_ours_computes(mode, dtype):
    """The recorded calls cover each kept token of each head once, and hold views, not copies."""
    case, pattern = op.Case(1000, 6, 8, dtype, mode, 1), "440/1 600/4"
    recorded = op.record_calls(case, pattern)
    groups = {"forward": [calls[:3] for calls in recorded.forward_calls]}
    groups["backward"] = [calls[1:4] for calls in recorded.backward_calls]
    assert bool(groups["backward"]) == case.backward
    for calls in filter(None, groups.values()):
        kept = sum((Counter({q.shape[2]: q.shape[0] * q.shape[1]}) for q, _, _ in calls), Counter())
        assert kept == sum(op.count_kept(case.length, case.heads, pattern), Counter())
        assert {x.untyped_storage().nbytes() for views in calls for x in views} == {
            case.length * case.heads * case.head_dim * calls[0][0].element_size()
        }
    op.prepare(op.STRIDED, case, pattern)()


def test_contestants_alternate():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = time_alternately(calls, seconds=0, least=4)
    first, *rounds = ("".join(order[i : i + 3]) for i in range(0, len(order), 3))
    assert first == "abc"  # unmeasured
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1  # in more than one order
    assert {len(seconds) for seconds in samples.values()} == {4}


def test_spread():
    assert spread([3.0, 1.0, 7.0]) == (3.0, 1.0, 7.0)


def _allocate(mib):
    return lambda: torch.ones(mib << 18).sum()


def test_peak_memory_is_what_a_call_allocates():
    peak = peak_bytes(_allocate, 96)
    if peak is None:
        pytest.skip("needs Linux's resettable high-water mark")
    # Linux adds a process's pages up in batches, so its own count is off by less than a MiB.
    assert peak == pytest.approx(96 << 20, abs=1 << 20)


def test_small_run_reaches_the_readme(tmp_path):
    path, readme = tmp_path / "results" / "op-test.json", tmp_path / "README.md"
    readme.write_text("before\n<!-- results:op -->\nold\n<!-- end:op -->\nafter\n")
    options = (
        "op --lengths 64 96 --patterns '16/1 48/3' --dtypes float32 --rounds 2 --seconds 0 "
        "--error-length 48 --heads 3 --head-dim 16 --threads 1 --no-memory --output"
    )
    run.main([*shlex.split(options), str(path)])
    result = json.loads(path.read_text())
    summary = op.summarize(result)
    assert [(s["length"], s["mode"]) for s in summary] == [(length, mode) for mode in op.MODES for length in (64, 96)]
    assert summary[0]["ideal_speedup"] < summary[1]["ideal_speedup"]
    assert all(s["error"] < 1e-5 for s in summary)
    old = {new: name for name, new in op.RENAMED.items()}
    older = result | {"rows": [row | {"who": old.get(row["who"], row["who"])} for row in result["rows"]]}
    assert {"floor", "rows", "result"} < {row["who"] for row in older["rows"]}
    assert op.tables(older) == op.tables(result)
    figures.main(["--results", str(path.parent), "--pages", str(readme), "--docs", str(tmp_path)])
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 96 |" in text
    assert "| 64 |" not in text
    assert f"{summary[1]['seconds'] * 1e3:.1f}" in text
    for made in (path.with_suffix(".md"), path.with_suffix(".png"), tmp_path / "branches.png"):
        assert made.stat().st_size > 0


SMALL = {
    "length": "--lengths 64 128 256 --pattern '16/1 64/3' --heads 3 --head-dim 16 --rounds 1 --modes forward+backward",
    "backends": "--length 96 --shapes 3x16 --dtypes float32 --pattern '16/1 48/3' --error-length 50 --seconds 0",
    "train": "--lengths 64 96 --dense-most 64 --rounds 1 --seconds 0",
    "memory": "--lengths 64 96 --plain-most 64 --dtypes float32",
    "stream": "--tokens 3000 --chunk-size 500",
    "revisions": "--base HEAD --cases op --length 64 --rounds 1",
    "decode": "--contexts 40 90 --dense-contexts 40 90 --batch 2 --steps 16 --stream-tokens 20000",
}


@pytest.mark.parametrize("name", SMALL)
def test_small_runs_fill_their_part(name, tmp_path):
    path, readme = tmp_path / "results" / f"{name}-test.json", tmp_path / "README.md"
    readme.write_text(f"<!-- results:{name} -->\n<!-- end:{name} -->\n")
    run.main([name, *shlex.split(SMALL[name]), "--threads", "1", "--output", str(path)])
    figures.main(["--results", str(path.parent), "--pages", str(readme), "--docs", str(tmp_path)])
    assert len(readme.read_text().splitlines()) > 8
    assert path.with_suffix(".png").stat().st_size > 0


CLUSTERS = {
    "the paper's": "6/1 20/3 90/4",
    "window and summaries": "w5 12/4:1 48/8:1 once",
    "rotated": "8/1 32/4 rotate",
}


@pytest.mark.parametrize("words", CLUSTERS.values(), ids=CLUSTERS)
@pytest.mark.parametrize("length", [96, 83])
def test_a_cluster_computes_and_exchanges_what_its_queries_see(words, length):
    """Pairs and keys against the dense count, and keys that several devices of a node need counted once."""
    devices, heads, node = 7, 6, 3
    pattern = Pattern.parse(words)
    load = cluster.count_load(length, devices, pattern, heads, heads, node)
    branches = pattern.branches(heads)
    positions = torch.arange(length)[None]
    # (branches, heads, query, key)
    seen = torch.stack([count_branches((b,), positions, positions, None, None, True)[0] for b in branches])
    owner = torch.repeat_interleave(torch.arange(devices), torch.tensor(load.tokens))
    assert len(owner) == length
    pairs = torch.zeros(devices, devices, dtype=torch.int64)
    for i in range(devices):
        for j in range(devices):
            pairs[i, j] = seen[:, :, owner == i][..., owner == j].sum()
    assert load.own.tolist() == pairs.diagonal().tolist()
    assert load.halo.tolist() == (pairs.sum(1) - pairs.diagonal()).tolist()
    for index in range(3):
        inside = torch.arange(devices) // node == index
        needed = seen[:, :, inside[owner]].any(2)  # by some query of the node
        needed[..., inside[owner]] = False
        wanted = [int(needed[..., owner == j].sum()) for j in range(devices)]
        # The exchange also carries keys of the segment that no query of the shard sees.
        assert all(a >= b for a, b in zip(load.node_keys[index], wanted, strict=True))
        assert sum(load.node_keys[index]) <= load.keys[inside].sum()
        if "once" not in words and "rotate" not in words and length == 96:
            assert load.node_keys[index].tolist() == wanted
    own = torch.eye(devices, dtype=torch.bool)
    needed = torch.stack([seen[:, :, owner == i].any(2) for i in range(devices)])
    wanted = torch.stack([needed[..., owner == j].flatten(1).sum(1) for j in range(devices)], 1).masked_fill(own, 0)
    assert (torch.tensor(load.keys) >= wanted).all()


SIZES = cluster.Sizes(layers=3, head_dim=4, key_bytes=2, block=0, head=0, total=10)
ALONE = cluster.Device(forward=1.0, backward=1.0, rest=1.0, node=2, inside=10.0, between=1.0, latency=0.0)


def _load(own, halo, keys, node_keys):
    tokens = np.zeros(len(own))
    return cluster.Load(tokens, *(np.array(x) for x in (own, halo, keys, node_keys)))


def test_a_simulated_step_by_hand():
    """Device 2 of two nodes receives 100 keys of 2 bytes from another node, in 200 seconds at 1 byte per second."""
    keys = np.zeros((4, 4), dtype=int)
    keys[2, 0] = keys[3, 0] = 100
    keys[1, 0] = 50
    load = _load([10, 10, 10, 10], [0, 5, 5, 5], keys, [[0, 0, 0, 0], [100, 0, 0, 0]])
    direct, steps = cluster.exchange_seconds(load, 2, ALONE)
    # Device 0 sends 200 keys to the other node; no receiver is done before it is. Inside it sends 50, at 10 bytes/s.
    assert direct.tolist() == [400, 400, 400, 400]
    # Each key goes once to device 2, its counterpart, which forwards it to device 3.
    assert steps.tolist() == [200 + 10, 200 + 10, 200, 200 + 20]
    clock, computing = cluster.simulate(load, SIZES, ALONE, checkpointing=False)
    forward, backward = 4 * 4, 4 * 10  # seconds per pair
    assert computing.tolist() == [3 * 10 * (forward + backward), *[3 * 15 * (forward + backward)] * 3]
    # Each layer waits for its exchange where that takes longer than its own attention: forward 400 to 160 seconds,
    # backward 400 to 400; then comes the attention to what was received, before the exchange in backward.
    assert clock.max() == 3 * (400 + 5 * forward) + 3 * (5 * backward + 400)
    hidden = cluster.simulate(load, SIZES, ALONE._replace(inside=1e9, between=1e9), checkpointing=False)[0]
    assert hidden.max() == computing.max()
    in_turn = cluster.simulate(load, SIZES, ALONE, checkpointing=False, overlap=False)[0]
    # In the backward pass device 0 waits for the others' attention once, then all continue together.
    assert in_turn.max() == 3 * (400 + 15 * forward) + 5 * backward + 3 * (400 + 10 * backward)
    again = cluster.simulate(load, SIZES, ALONE, checkpointing=True)[0]
    assert again.max() == clock.max() + 3 * (400 + 5 * forward)
    reduced = cluster.simulate(load, SIZES, ALONE, checkpointing=False, reduce=8)[0]
    assert reduced.max() == clock.max() + 2 * 3 / 4 * 8


def test_a_cluster_is_planned(tmp_path, monkeypatch):
    """From stored runs, checks and plans to a page, with the processes' share faked by one process."""
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "segment_lengths": [64, 512], "dilation_rates": [1, 4]}
    LongNetConfig(**sizes, **heads, position_embedding="rope").save_pretrained(tmp_path)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        samples = [cluster._time_steps(1, 48, words, 2) for words in cluster.MEASURED_PATTERNS]
    finally:
        dist.destroy_process_group()
    assert all(len(x) == 2 and min(x) > 0 for steps in samples for x in steps.values())
    monkeypatch.setattr(
        cluster, "spawn", lambda f, given, nprocs: Path(given[-1], "result.json").write_text(json.dumps(samples))
    )
    path, page = tmp_path / "results" / "cluster-test.json", tmp_path / "README.md"
    options = f"--config {tmp_path}/config.json --devices 2 4 --tokens 40000 --short 3000 --node 2 --effort 400"
    run.main(
        ["cluster", *options.split(), "--processes", "2", "--shard", "48", "--threads", "1", "--output", str(path)]
    )
    page.write_text("<!-- results:cluster -->\n<!-- end:cluster -->\n")
    figures.main(["--results", str(path.parent), "--pages", str(page), "--docs", str(tmp_path)])
    result = json.loads(path.read_text())
    assert result["patterns"]["the paper's"] == "64/1 512/4"
    assert result["patterns"]["window and summaries"].startswith("w")
    assert [(x["tokens"], x["devices"]) for x in result["rows"][::2]] == [(40000, 2), (40000, 4), (3000, 2)]
    step = next(x for x in result["checks"] if x["what"] == "training step, 32,768 tokens")
    assert step["predicted"] == pytest.approx(step["measured"], rel=0.1)  # an H100 that 131,072 tokens calibrated
    # A border at 20,032 tokens lies 64 tokens into a segment of 512, of which six heads keep every fourth.
    assert result["rows"][0]["received"] == 6 * 16 * 2 * 4 * 2
    assert "Memory is the first limit" in page.read_text()
    assert path.with_suffix(".png").stat().st_size > 0
    run.main(["cluster", "--devices", "--processes", "2", "--shard", "48", "--threads", "1", "--output", str(path)])
    figures.main(["--results", str(path.parent), "--pages", str(page), "--docs", str(tmp_path)])
    assert page.read_text().count("| 2 | 256/1 4096/2 |") == 1
    assert "Memory limits" not in page.read_text()
    with pytest.raises(ValueError, match="holds no run of `length`"):
        cluster.calibrate("abacus", {})


def test_messages_take_their_latency():
    keys = np.ones((3, 3), dtype=int) - np.eye(3, dtype=int)
    load = _load([1, 1, 1], [1, 1, 1], keys, [[0, 0, 0]])
    device = ALONE._replace(node=3, inside=1e12, latency=7.0)
    assert cluster.exchange_seconds(load, 2, device)[0] == pytest.approx([14, 14, 14])


def test_least_devices_fit_the_memory():
    row = {"tokens": 1000, "shard": 100, "memory": {"activations": 400.0, "weights": 10, "keys": 5, "ids": 25}}
    assert cluster.least_devices(row, 80) == 100  # 4 a token, 40 left
    assert cluster.least_devices(row, 80, ids=False) == 62
    assert cluster.least_devices(row, 40) is None


@pytest.mark.parametrize(
    ("memory", "text"),
    [
        (80, "at least 100 devices"),
        (30, "no number of devices suffices, as the ids, labels and targets of the whole sequence take 24 KB on each"),
        (12, "no number of devices suffices: weights and keys"),
    ],
)
def test_the_summary_says_whether_devices_suffice(memory, text):
    row = {"tokens": 1000, "shard": 100, "memory": {"activations": 400.0, "weights": 10, "keys": 5, "ids": 25}}
    row |= {"pattern": "the paper's", "devices": 2}
    result = {"rows": [row], "memory_gb": memory / 1e9, "parameters": 10}
    assert text in cluster.summary(result)


def test_where_an_all_gather_pays():
    row = {"tokens": 9, "devices": 2, "pattern": "p", "seconds": [2.0, 1.99]}
    assert "would shorten none" in cluster._where_it_pays([row])
    assert "9 tokens on 2 devices, p: 25%" in cluster._where_it_pays([row, row | {"seconds": [2.0, 1.5]}])


RELEASED = """
from torch import nn
from . import multihead_attention

class DilatedAttention(nn.Module):
    def __init__(self, args, embed_dim, num_heads, self_attention):
        super().__init__()
        self.heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(4))

    def forward(self, query, key, value, is_causal):
        query, key, value = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        query, key, value = (x.unflatten(2, (self.heads, -1)) for x in (query, key, value))
        out, lse = multihead_attention.flash_attn_func(query, key, value, 0.0, None, None, is_causal)
        assert not lse.requires_grad and lse.shape == (query.shape[0], self.heads, query.shape[1])
        return self.out_proj(out.flatten(2)), None
"""


@pytest.mark.parametrize("length", [450, 600], ids=["a call cut in two", "one call"])
def test_the_kernel_of_peers_is_attention(length):
    """In the layout that the kernel itself writes, so that the rival is not handicapped."""
    inputs = [torch.randn(2, length, 3, 8, requires_grad=True) for _ in range(3)]
    grad_out = torch.randn(2, length, 3, 8)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    query, key, value = (x.transpose(1, 2) for x in exact)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    out, _ = peers._Kernel.apply(*inputs, True)
    assert out.is_contiguous()
    assert_close("out", out, expected, 3e-6)
    grads = torch.autograd.grad(out, inputs, grad_out), torch.autograd.grad(expected, exact, grad_out.double())
    for actual, grad in zip(*grads, strict=True):
        assert_close("gradient", actual, grad, 3e-6)


def test_peers_run_a_folder_of_torchscale(tmp_path):
    """A stand-in with one branch: both are the exact attention, gradients too."""
    folder = tmp_path / "torchscale" / "component"
    folder.mkdir(parents=True)
    for file in (folder.parent / "__init__.py", folder / "__init__.py"):
        file.touch()
    (folder / "multihead_attention.py").write_text("flash_attn_func = None\n")
    (folder / "dilated_attention.py").write_text(RELEASED)
    with pytest.raises(ValueError, match=r"no torchscale/component/dilated_attention\.py"):
        run.main(["peers", "--torchscale", str(folder), "--output", str(tmp_path / "none.json")])
    path = tmp_path / "results" / "peers-test.json"
    sizes = "--lengths 64 --dtypes float32 --heads 3 --head-dim 16 --rounds 1 --seconds 0 --error-length 90 --threads 1"
    command = ["peers", "--torchscale", str(tmp_path), *sizes.split(), "--output", str(path), "--pattern"]
    try:
        with pytest.raises(ValueError, match="must divide its length"):
            run.main([*command, "96/1 256/6"])
        run.main([*command, "96/1"])
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchscale"]:
            del sys.modules[name]
    errors = json.loads(path.read_text())["errors"]["float32"]
    assert all(error < 1e-5 for whose in errors.values() for error in whose.values())
    pages = [tmp_path / "README.md", path.parent / "README.md"]
    arguments = ["--results", str(path.parent), "--docs", str(tmp_path), "--pages", *map(str, pages)]
    pages[0].write_text("no markers\n")
    pages[1].write_text("<!-- results:peers -->\n<!-- end:peers -->\n")
    figures.main(arguments)
    assert pages[0].read_text() == "no markers\n"
    assert "TorchScale / ours" in pages[1].read_text()
    assert "(peers-test.md)" in pages[1].read_text()
    pages[0].write_text(pages[1].read_text())
    with pytest.raises(ValueError, match="2 of the pages"):
        figures.main(arguments)


def test_what_examples_wrote_reaches_its_page(tmp_path):
    """One file of several models, and two files of one model each, read with branches of its own and others."""
    scores = {"contexts": [32, 64], "perplexity": [9.06, 7.0], "perplexity_error": [0.5, 0.25]}
    scores |= {"tokens": 4096, "bytes": 9000, "blocks": 2, "documents": 1}
    machine = {"machine": "m", "torch": "2", "transformers": "5", "date": "2026-01-02"}
    two = machine | {
        "settings": {"length": 32},
        "results": {"dense": scores, "dilated": scores | {"perplexity": [8.04, 6.0]}},
    }
    (tmp_path / "extend_llama.json").write_text(json.dumps(two))
    (tmp_path / "same_segments.json").write_text(json.dumps(machine | scores))
    longer = machine | scores | {"segment_lengths": [2, 4], "dilation_rates": [1, 2]}
    (tmp_path / "longer_segments.json").write_text(json.dumps(longer))
    page = tmp_path / "README.md"
    names = ("extend_llama", "segments")
    page.write_text("".join(f"<!-- results:{name} -->\n<!-- end:{name} -->\n" for name in names))
    figures.main(["--results", str(tmp_path / "none"), "--pages", str(page), "--docs", str(tmp_path)])
    text = page.read_text()
    assert "| dilated | 8.0 +- 0.5 | 6.0 +- 0.2 |" in text
    assert "| its own branches | 9.1 +- 0.5 | 7.0 +- 0.2 |" in text
    assert "| (2, 1), (4, 2) | 9.1 +- 0.5 | 7.0 +- 0.2 |" in text
    assert (tmp_path / "extend_llama.png").stat().st_size > 0
    assert text.count("4,096 held-out targets") == text.count("2026-01-02") == 2


def test_a_picture_of_one_point_is_not_drawn(tmp_path):
    """One left from before is deleted."""
    point, line = Line([64], [1.0], "one"), Line([64, 128], [1.0, 2.0], "two", band=([0.5, 1.5], [1.5, 2.5]))
    file = tmp_path / "picture.png"
    draw_panels([Panel("a", [point], scale_seconds), Panel("b", [point, line], scale_seconds)], file)
    assert file.stat().st_size > 0
    draw_panels([Panel("a", [point, point], scale_seconds)], file)
    assert not file.exists()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (512, "512"),
        (2048, "2K"),
        (65536, "64K"),
        (1 << 20, "1M"),
        (10_000, "10K"),
        (1_500_000, "1.5M"),
        (1 << 30, "1B"),
    ],
)
def test_tokens_are_written_short(number, text):
    assert format_count(number) == text


@pytest.mark.parametrize("power", [1, 2])
def test_growth_is_the_fitted_exponent(power):
    rows = [{"length": n, "flops": 7 * n**power} for n in (1, 10, 100, 1000)]
    assert length.growth(rows, "flops", least=10) == pytest.approx(power)
    assert length.growth(rows, "flops", least=100) is None


def test_the_window_does_equal_work():
    """Beyond the longest segment: every query of the window sees as many keys as the pattern's do on average."""
    case = op.Case(1 << 16, 4, 16, "float32", "forward", 1)
    ours, window = (length.count_flops(who, case, "1024/1 4096/2") for who in ("ours", "window"))
    assert window == pytest.approx(ours, rel=0.02)


def test_long_dense_call_is_skipped_and_said_so(tmp_path):
    path = tmp_path / "op.json"
    options = (
        "op --lengths 64 --patterns 16/1 --dtypes float32 --modes forward --rounds 1 --seconds 0 "
        "--error-length 16 --threads 1 --no-memory --dense-limit 0 --output"
    )
    run.main([*options.split(), str(path)])
    result = json.loads(path.read_text())
    assert "skipped at 64 tokens" in op.tables(result)
    assert op.headline(result) == "No length was timed against dense attention."


@pytest.mark.parametrize("text", ["nothing", "<!-- results:op -->", "<!-- end:op --> x"])
def test_missing_markers_are_refused(text):
    with pytest.raises(ValueError, match="exactly one"):
        figures.fill_markers(text, "op", "table")


def test_speed_table_takes_the_latest_result_that_holds_a_row():
    def of(date, threads, steps, gpu=None):
        return {"name": "decode", "date": date, "gpu": gpu, "machine": {"threads": threads}, "step_seconds": steps}

    steps = {"longnet 16000": [1e-3, 2e-3, 4e-3], "dense 16000": [5e-3, 8e-3, 16e-3]}
    results = [
        of("2026-02-02", 5, {"longnet 1000": [1e-3], "dense 1000": [1e-3]}),
        of("2026-02-01", 3, steps),
        of("2026-01-01", 7, {name: [1.0] for name in steps}),
        of("2026-02-03", 9, steps, "NVIDIA H100 80GB HBM3"),
    ]
    (row,) = summary.tabulate_speed(results).splitlines()[2:]
    assert [cell.strip() for cell in row.split("|")[2:7]] == ["CPU, 3 cores", "16,000", "2 ms", "8 ms", "4.0"]


@pytest.mark.parametrize(
    ("gpu", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_a_gpu_is_named_short(gpu, short):
    assert summary._machine({"gpu": gpu}) == short
