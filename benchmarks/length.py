"""How time, memory and operations grow with the length: the paper's Fig. 5 and Table 1 on one device.

`ours` against dense attention and against a causal sliding window of equal work (FlexAttention, compiled; on a CPU
forward only, as PyTorch has no backward of it there). A rival is dropped at the length where one call would take longer
than `--limit` seconds. The growth is the exponent b of a fit cost = a * tokens ** b, over lengths from the longest
segment on for ours and the window, and over all lengths for dense attention.
"""

import argparse
import math

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm

from examples.drawing import Line, Panel, draw_panels, format_count, scale_log, scale_seconds
from modeling_longnet.testing import count_work

from . import op
from .measure import DTYPES, Call, peak_bytes, seconds_of, spread

PATTERN = "2048/1 4096/2 8192/4 16384/6 32768/12"  # the paper's
LENGTHS = [1 << n for n in range(11, 21)]
WINDOW_BLOCK = 128  # FlexAttention's
WINDOW_MASK_BYTES = 1 << 29  # most bytes for FlexAttention's table of all pairs of blocks, few of which are used


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark; the defaults are the published run."""
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    parser.add_argument("--pattern", default=PATTERN, help="'LENGTH/RATE ...'")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--modes", nargs="+", default=op.MODES, choices=op.MODES)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="times that each length is measured, in turn")
    parser.add_argument("--rivals", nargs="*", default=["sdpa", "window"], choices=["sdpa", "window"])
    parser.add_argument("--limit", type=float, default=15, help="longest call, seconds")


def window_of(pattern: str) -> int:
    """Return the window of equal work, in whole blocks: it holds the mean number of keys that a query sees."""
    keys = count_work(*op.parse_pattern(pattern), length=1 << 60)
    return max(1, round(keys / WINDOW_BLOCK)) * WINDOW_BLOCK


def count_flops(who: str, case: op.Case, pattern: str) -> int:
    """Count the operations of the attention's products from what is seen: 2 products forward, 5 backward."""
    if who != "window":
        return op.count_flops(case, pattern if who == "ours" else None)
    window = min(window_of(pattern), case.length)
    pairs = window * (window + 1) // 2 + (case.length - window) * window
    return case.heads * pairs * 2 * case.head_dim * (7 if case.backward else 2)


def prepare(who: str, case: op.Case, pattern: str) -> Call:
    """Make the inputs of a contestant, warm up, and return the call to measure."""
    if who != "window":
        return op.prepare(who, case, pattern if who == "ours" else None)
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    window, blocks = window_of(pattern), math.ceil(case.length / WINDOW_BLOCK)
    inputs = [case.tensor(1, case.heads, case.length, case.head_dim) for _ in range(3)]
    query = torch.arange(blocks, device=case.device)[:, None]
    indices = query - window // WINDOW_BLOCK + torch.arange(window // WINDOW_BLOCK + 1, device=case.device)
    counts = (indices >= 0).sum(1)
    first = torch.arange(indices.shape[1], device=case.device)
    indices = torch.where(first < counts[:, None], first + (query - window // WINDOW_BLOCK).clamp(min=0), 0)
    mask = BlockMask.from_kv_blocks(
        counts[None, None].int(),
        torch.nn.functional.pad(indices, (0, max(0, blocks - indices.shape[1])))[None, None, :, :blocks].int(),
        BLOCK_SIZE=WINDOW_BLOCK,
        mask_mod=lambda b, h, q, k: (q >= k) & (q - k < window),
        seq_lengths=(case.length, case.length),
    )
    compiled = torch.compile(flex_attention)
    return op.differentiated(case, lambda q, k, v: compiled(q, k, v, block_mask=mask), inputs)


def _measure(who: str, case: op.Case, pattern: str) -> dict:
    call = prepare(who, case, pattern)
    call()
    seconds = seconds_of(call)
    flops = count_flops(who, case, pattern)
    return {"who": who, **case._asdict(), "flops": flops, "seconds": [seconds]}


def why_no_window(case: op.Case) -> str | None:
    """Return why FlexAttention cannot serve as the window; None if it can."""
    if case.backward and case.device == "cpu":
        return "PyTorch has no backward of FlexAttention on a CPU"
    blocks = math.ceil(case.length / WINDOW_BLOCK)
    if blocks**2 * 4 > WINDOW_MASK_BYTES:
        return f"FlexAttention's table of blocks would take {blocks**2 * 4 / 2**30:.0f} GiB, and more while it is made"
    return None


def _estimate(who: str, case: op.Case, before: dict | None) -> float:
    """Estimate the seconds of a call from one at half the length, or a short one for dense attention; 0 if unknown."""
    if before:
        return before["seconds"][0] * (4 if who == "sdpa" else 2)
    return op.dense_estimate(case) if who == "sdpa" else 0.0


def run(args: argparse.Namespace) -> dict:
    """Measure every length, each contestant in turn; memory once, on a CPU in separate processes."""
    rows: dict[tuple, dict] = {}
    dropped: dict[tuple, str] = {}
    for number in range(args.rounds):
        order = [(length, mode) for length in args.lengths for mode in args.modes]
        for length, mode in tqdm(order, desc=f"Round {number + 1}", unit="case"):
            case = op.Case(length, args.heads, args.head_dim, args.dtype, mode, args.threads, args.device)
            for who in ("ours", *args.rivals):
                key = (who, mode, length)
                if (who, mode) in dropped and key not in rows:
                    continue
                if who == "window" and (reason := why_no_window(case)):
                    dropped[who, mode] = reason
                    continue
                if (estimate := _estimate(who, case, rows.get((who, mode, length // 2)))) > args.limit:
                    dropped[who, mode] = f"a call of {length:,} tokens would take about {estimate:.0f} s"
                    continue
                measured = _measure(who, case, args.pattern)
                if key in rows:
                    rows[key]["seconds"] += measured["seconds"]
                else:
                    rows[key] = measured
                    if who != "window":  # the compiler runs in the window's process and would be counted
                        pattern = args.pattern if who == "ours" else None
                        rows[key]["peak_bytes"] = peak_bytes(op.prepare, who, case, pattern)
    drops = [{"who": who, "mode": mode, "reason": reason} for (who, mode), reason in dropped.items()]
    return {"pattern": args.pattern, "window": window_of(args.pattern), "rows": list(rows.values()), "dropped": drops}


def growth(rows: list[dict], cost: str, least: int) -> float | None:
    """Fit the exponent b of cost = a * tokens ** b by least squares of logarithms; None for fewer than 3 lengths."""
    points = [
        (math.log(row["length"]), math.log(spread(row[cost]).median if cost == "seconds" else row[cost]))
        for row in rows
        if row["length"] >= least and row.get(cost)
    ]
    if len(points) < 3:
        return None
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def _groups(result: dict) -> list[tuple[str, str, list[dict], int]]:
    longest = max(op.parse_pattern(result["pattern"])[0])
    names = dict.fromkeys((row["who"], row["mode"]) for row in result["rows"])
    return [
        (
            who,
            mode,
            [row for row in result["rows"] if (row["who"], row["mode"]) == (who, mode)],
            1 if who == "sdpa" else longest,
        )
        for who, mode in names
    ]


def headline(result: dict) -> str:
    """Format the exponents, and how constant the time per token is."""
    lines = ["| | mode | operations | time | memory | us per token, longest text | / at longest segment | / at 64K |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for who, mode, rows, least in _groups(result):
        cells = [growth(rows, cost, least) for cost in ("flops", "seconds", "peak_bytes")]
        powers = ["" if b is None else f"L^{b:.2f}" for b in cells]
        times = {row["length"]: spread(row["seconds"]).median / row["length"] for row in rows}
        even = " | ".join(f"{times[max(times)] / times[n]:.2f}" if n in times else "" for n in (least, 1 << 16))
        name = {"sdpa": "dense", "window": f"window of {result['window']:,}"}.get(who, who)
        lines.append(f"| {name} | {mode} | {' | '.join(powers)} | {times[max(times)] * 1e6:.3g} | {even} |")
    longest = max(row["length"] for row in result["rows"] if row["who"] == "ours")
    text = f"Branches {result['pattern']}; cost = a * L^b, fitted up to {longest:,} tokens for ours."
    return text + "\n\n" + "\n".join(lines)


def tables(result: dict) -> str:
    """Format the headline and every measured length."""
    lines = [
        "| tokens | who | mode | ms, median (least to most) | GFLOP/s | peak MiB |",
        "| ---: | --- | --- " + "| ---: " * 3 + "|",
    ]
    for row in sorted(result["rows"], key=lambda row: (row["mode"], row["length"])):
        s = spread([1e3 * x for x in row["seconds"]])
        rate = row["flops"] / s.median / 1e6
        peak = row.get("peak_bytes")
        lines.append(
            f"| {row['length']:,} | {row['who']} | {row['mode']} | {s.median:.1f} ({s.least:.1f} to {s.most:.1f}) "
            f"| {rate:.0f} | {'' if peak is None else f'{peak / 2**20:.0f}'} |"
        )
    drops = [f"- {d['who']}, {d['mode']}: dropped, {d['reason']}." for d in result["dropped"]]
    return "\n\n".join([headline(result), "\n".join(lines), "\n".join(drops)])


def plot(result: dict, path: str) -> None:
    """Draw seconds and peak memory against tokens: forward and backward, and forward alone in dashes."""
    colors = {"ours": ("LongNet", "longnet"), "sdpa": ("dense", "dense"), "window": ("window", "window")}
    modes = {mode for _, mode, _, _ in _groups(result)}
    panels = []
    for title, cost, unit, scale in (
        ("Time", "seconds", 1, scale_seconds),
        ("Peak memory (GiB)", "peak_bytes", 2**30, scale_log),
    ):
        lines = []
        for who, mode, rows, _ in _groups(result):
            values = ((row["length"], row.get(cost)) for row in rows)
            points = [(n, (spread(x).median if cost == "seconds" else x) / unit) for n, x in sorted(values) if x]
            name, color = colors[who]
            is_named = mode == "forward+backward" or not any(w == who and m != mode for w, m, _, _ in _groups(result))
            if points:
                lines.append(Line(*zip(*points, strict=True), name if is_named else None, color, mode))
        panels.append(Panel(title, lines, scale))
    dashed = " (dashes: forward alone)" if len(modes) > 1 else ""
    draw_panels([panels[0]._replace(title=panels[0].title + dashed), *panels[1:]], path, title=_title(result))


def _title(result: dict) -> str:
    """Say what was timed, and how it compares with dense attention at the longest length that both ran."""
    row = result["rows"][0]
    branches = " with the paper's branches" if result["pattern"] == PATTERN else ""
    title = f"One layer's attention{branches}, {row['heads']} heads of {row['head_dim']}, {row['dtype']}"
    title += f", {result['gpu']}" if row["device"] == "cuda" else f", {row['threads']} CPU cores"
    times = {(r["who"], r["length"], r["mode"]): spread(r["seconds"]).median for r in result["rows"]}
    lengths = [n for who, n, mode in times if who == "sdpa" and ("ours", n, mode) in times]
    if lengths:
        longest = max(lengths)
        mode = "forward+backward" if ("sdpa", longest, "forward+backward") in times else "forward"
        ratio = times["sdpa", longest, mode] / times["ours", longest, mode]
        title += f":\n{ratio:.0f} times as fast as dense attention at {format_count(longest)} tokens ({mode})"
    return title
