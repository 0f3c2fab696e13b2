"""Patterns side by side: the op, a decoding step and a training step, as ratios to the first pattern.

A pattern is written as `parse_pattern` reads it: "w256 2048/8:1 once" is a window of 256 tokens and a branch of which
all queries see every eighth key; no key counts twice. `flex 256` is FlexAttention's window of 256 tokens (on a CPU
forward only).
The op is timed as two layers, an even and an odd one, which may differ in offsets, borders and branches.
"""

import argparse

import torch
from tqdm import tqdm

from examples.drawing import Line, Panel, draw_panels, name_pattern, scale_seconds
from modeling_longnet import LongNetCache, LongNetConfig, LongNetForCausalLM, dilated_attention, parse_pattern
from modeling_longnet.testing import Pattern

from . import length as lengths_benchmark
from . import op
from .decode import SIZES, make_step, read_tokens
from .measure import DTYPES, Call, spread, time_alternately
from .train import training_step

PATTERNS = (
    "512/1 2048/2 8192/4 32768/8",
    "w256 2048/2 8192/4 32768/8 rotate stagger once",
    "w256 2048/8:1 8192/32:1 32768/128:1 once",
    "w256 2048/4:1 8192/16:1 32768/64:1 once every2",
    "w256",
)
OP, DECODE, TRAIN = "op", "decoding step", "training step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark; the defaults are the published run."""
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32_768, 65_536], help="of the op")
    parser.add_argument("--train-lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 32_768], help="tokens before decoding steps")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=3, help="least number of rounds")
    parser.add_argument("--seconds", type=float, default=5.0, help="start no new round after so many seconds")


def prepare(pattern: str, case: op.Case) -> Call | None:
    """Return the op's call for a pattern; None if a rival cannot run it."""
    if pattern.startswith("flex "):
        window = int(pattern.split()[1])
        if lengths_benchmark.why_no_window(case) is not None:
            return None
        call = lengths_benchmark.prepare("window", case, f"{2 * window}/1")
        return lambda: [call(), call()]
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    inputs = [case.tensor(1, case.length, case.heads, case.head_dim).transpose(1, 2) for _ in range(3)]
    fields = parse_pattern(pattern)
    calls = [
        op.differentiated(case, lambda *x, i=i: dilated_attention(*x, **fields, layer=i), inputs) for i in range(2)
    ]
    return lambda: [call() for call in calls]


def make_model(pattern: str) -> LongNetForCausalLM:
    """Return the small model of the other benchmarks with this pattern."""
    torch.manual_seed(0)
    sizes = SIZES | {"intermediate_size": 4 * SIZES["hidden_size"], "position_embedding": "rope"}
    return LongNetForCausalLM(LongNetConfig(**sizes, **parse_pattern(pattern)))


def _decoding_step(model: LongNetForCausalLM, context: int) -> Call:
    cache = LongNetCache(model.config)
    read_tokens(model.eval(), cache, context, 8192)
    return make_step(model, cache)


def run(args: argparse.Namespace) -> dict:
    """Time every contestant of a size in turn."""
    rows = []
    ours = [pattern for pattern in args.patterns if not pattern.startswith("flex ")]

    def measure(what: str, length: int, calls: dict[str, Call | None], **fields) -> None:
        able = {name: call for name, call in calls.items() if call is not None}
        samples = time_alternately(able, seconds=args.seconds, least=args.rounds)
        for name, seconds in samples.items():
            rows.append({"what": what, "pattern": name, "length": length, "seconds": seconds, **fields})

    cases = [(n, dtype, mode) for dtype in args.dtypes for n in args.lengths for mode in op.MODES]
    for length, dtype, mode in tqdm(cases, desc="op"):
        case = op.Case(length, args.heads, args.head_dim, dtype, mode, args.threads, args.device)
        measure(OP, length, {p: prepare(p, case) for p in args.patterns}, dtype=dtype, mode=mode)
    for context in tqdm(args.contexts, desc="decode"):
        measure(DECODE, context, {p: _decoding_step(make_model(p), context) for p in ours})
    for length in tqdm(args.train_lengths, desc="train"):
        measure(TRAIN, length, {p: training_step(make_model(p).train(), length) for p in ours})
    keys = {pattern: [Pattern.parse(pattern).count_work(n) for n in args.lengths] for pattern in ours}
    return {"patterns": list(args.patterns), "lengths": args.lengths, "keys": keys, "rows": rows}


def _times(result: dict) -> dict[tuple, dict[str, list[float]]]:
    groups = {}
    for row in result["rows"]:
        key = row["what"], row.get("dtype", "float32"), row.get("mode", ""), row["length"]
        groups.setdefault(key, {})[row["pattern"]] = row["seconds"]
    return groups


def tables(result: dict) -> str:
    """Tabulate the time of each pattern divided by that of the first, round by round: median (least to most)."""
    patterns = result["patterns"]
    lines = ["| what | dtype | tokens | " + " | ".join(f"`{p}`" for p in patterns) + " |"]
    lines.append("| --- | --- | ---: |" + " ---: |" * len(patterns))
    for (what, dtype, mode, length), times in _times(result).items():
        base, cells = times[patterns[0]], []
        for pattern in patterns:
            if pattern not in times:
                cells.append("")
                continue
            ratio = spread([a / b for a, b in zip(times[pattern], base, strict=True)])
            cells.append(f"{ratio.median:.2f} ({ratio.least:.2f} to {ratio.most:.2f})")
        cells[0] = f"{spread(base).median * 1e3:,.1f} ms"
        lines.append(f"| {what}{', ' + mode if mode else ''} | {dtype} | {length:,} | " + " | ".join(cells) + " |")
    keys = [f"`{p}` {', '.join(f'{k:,.0f}' for k in row)}" for p, row in result["keys"].items()]
    counted = f"Keys that a query sees on average at {', '.join(f'{n:,}' for n in result['lengths'])} tokens: "
    return "\n".join(lines) + "\n\n" + counted + "; ".join(keys) + "."


def headline(result: dict) -> str:
    """The same table."""
    return tables(result)


def plot(result: dict, path: str) -> None:
    """Draw the time of the op against length, one line for each pattern."""
    panels = []
    for mode in op.MODES:
        lines = []
        for number, pattern in enumerate(result["patterns"]):
            times = {k[3]: v[pattern] for k, v in _times(result).items() if k[2] == mode and pattern in v}
            medians = [spread(x).median for x in times.values()]
            lines.append(Line(list(times), medians, name_pattern(pattern), f"C{number}"))
        panels.append(Panel(f"two layers' attention, {mode}", [x for x in lines if x.x], scale_seconds))
    draw_panels(panels, path, height=4)
