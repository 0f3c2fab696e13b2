"""The op against the released implementation, TorchScale's, from a folder that holds its repository.

    git clone https://github.com/microsoft/torchscale /tmp/torchscale && pip install einops
    python -m benchmarks.run peers --torchscale /tmp/torchscale

TorchScale's `DilatedAttention` runs as released, causal, with its projections replaced by the identity. Where it finds
no flash-attention package, as on every CPU, it gets the kernel that ours calls. Both take q, k, v in the layout of the
projections. They differ in how kept tokens reach the kernel and results return, in the size of the calls, and in the
backward pass. Errors are relative to the dense reference in float64 with TorchScale's head offsets ("blocked"), in the
Euclidean norm.
"""

import argparse
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.drawing import Line, Panel, draw_panels, scale_seconds
from modeling_longnet import dilated_attention
from modeling_longnet.testing import TorchBackend, join_tokens

from . import op
from .measure import DTYPES, Call, git, package_version, peak_bytes, spread, time_alternately

PEERS = ("ours", "torchscale")
KERNEL = TorchBackend()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark; the defaults, with a folder, are the published run."""
    parser.add_argument("--torchscale", type=Path, required=True, help="folder of TorchScale's repository")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], help="tokens")
    parser.add_argument("--pattern", default=op.PATTERNS[1], help="'LENGTH/RATE ...', each rate dividing its length")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="least number of rounds")
    parser.add_argument("--seconds", type=float, default=5.0, help="start no new round after so many seconds")
    parser.add_argument("--error-length", type=int, default=3000, help="tokens of the run that measures the error")


class _Kernel(torch.autograd.Function):
    """Stands in for flash-attention's function: (B, L, H, D) in and out, the lse (B, H, L) not differentiated."""

    @staticmethod
    def forward(ctx, query, key, value, is_causal):
        inputs = [x.transpose(1, 2) for x in (query, key, value)]
        ctx.is_causal, ctx.scale = is_causal, query.shape[-1] ** -0.5
        _, outs, lses = zip(*KERNEL.forward(*inputs, is_causal, ctx.scale), strict=True)
        out, lse = join_tokens(*outs), torch.cat(lses, 2)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.mark_non_differentiable(lse)
        return out.transpose(1, 2), lse

    @staticmethod
    def backward(ctx, grad_out, _):
        grad_out = grad_out.transpose(1, 2)
        grads = KERNEL.backward(grad_out, *ctx.saved_tensors, ctx.is_causal, ctx.scale)
        return *(x.transpose(1, 2) for x in grads), None


def load_torchscale(folder: Path) -> tuple[type[nn.Module], bool]:
    """Return TorchScale's `DilatedAttention`, and whether our kernel stands in for a missing flash-attention package.

    Raises:
        ValueError: if the folder does not hold it, or a package that it imports is missing.
    """
    if not (folder / "torchscale" / "component" / "dilated_attention.py").is_file():
        raise ValueError(f"--torchscale {folder}: no torchscale/component/dilated_attention.py in it; give a clone.")
    sys.path.insert(0, str(folder))
    try:
        attention = importlib.import_module("torchscale.component.dilated_attention")
        heads = importlib.import_module("torchscale.component.multihead_attention")
    except ModuleNotFoundError as error:
        raise ValueError(f"TorchScale needs {error.name!r}: pip install {error.name}.") from error
    finally:
        sys.path.remove(str(folder))
    if heads.flash_attn_func is None:
        heads.flash_attn_func = _stand_in
    return attention.DilatedAttention, heads.flash_attn_func is _stand_in


def _stand_in(query, key, value, dropout, bias, scale, is_causal):
    return _Kernel.apply(query, key, value, is_causal)


def torchscale_attention(folder: Path, heads: int, head_dim: int, pattern: str):
    """Return a function of (B, H, L, D) query, key and value: the released forward with identity projections."""
    w, r = op.parse_pattern(pattern)
    settings = SimpleNamespace(
        flash_attention=True, multiway=False, xpos_rel_pos=False, layernorm_eps=1e-5, seq_parallel=False,
        segment_length=w, dilated_ratio=r,
    )  # fmt: skip
    module = load_torchscale(folder)[0](settings, heads * head_dim, heads, self_attention=True)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(module, name, nn.Identity())

    def attend(*inputs: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2).flatten(2) for x in inputs)
        out, _ = module(query, key, value, is_causal=True)
        return out.unflatten(2, (heads, head_dim)).transpose(1, 2)

    return attend


def prepare(who: str, case: op.Case, pattern: str, folder: Path) -> Call:
    """Return a contestant's call on (1, L, H, D) storage."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    if who == "ours":
        return op.ours(case, pattern, head_offsets="blocked")
    shape = (1, case.length, case.heads, case.head_dim)
    inputs = [case.tensor(*shape).transpose(1, 2) for _ in range(3)]
    return op.differentiated(case, torchscale_attention(folder, case.heads, case.head_dim, pattern), inputs)


def measure_error(case: op.Case, pattern: str, folder: Path) -> dict[str, dict[str, float]]:
    """Measure ||x - exact|| / ||exact|| of out, dq, dk and dv, for both."""
    torch.manual_seed(0)
    inputs = [case.tensor(1, case.heads, case.length, case.head_dim) for _ in range(4)]
    branches = op.parse_pattern(pattern)

    def results(attend, dtype: torch.dtype) -> list[Tensor]:
        query, key, value, grad_out = (x.to(dtype, copy=True) for x in inputs)
        leaves = [x.requires_grad_() for x in (query, key, value)]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    def blocked(backend: str):
        return lambda *x: dilated_attention(*x, *branches, head_offsets="blocked", backend=backend)

    exact = results(blocked("eager"), torch.float64)
    attends = {"ours": blocked("auto"), "torchscale": torchscale_attention(folder, case.heads, case.head_dim, pattern)}
    return {
        who: {
            name: ((x.double() - y).norm() / y.norm()).item()
            for name, x, y in zip(("out", "dq", "dk", "dv"), results(attend, inputs[0].dtype), exact, strict=True)
        }
        for who, attend in attends.items()
    }


def run(args: argparse.Namespace) -> dict:
    """Measure time, peak memory and error of both."""
    _, stands_in = load_torchscale(args.torchscale)
    if any(w % r for w, r in zip(*op.parse_pattern(args.pattern), strict=True)):
        raise ValueError(
            f"--pattern {args.pattern!r}: each rate must divide its length, or TorchScale's result is wrong."
        )
    rows = []
    cases = [
        op.Case(length, args.heads, args.head_dim, dtype, mode, args.threads, args.device)
        for dtype in args.dtypes
        for mode in op.MODES
        for length in args.lengths
    ]
    for case in tqdm(cases, desc="peers", unit="case"):
        calls = {who: prepare(who, case, args.pattern, args.torchscale) for who in PEERS}
        samples = time_alternately(calls, seconds=args.seconds, least=args.rounds)
        calls.clear()
        peaks = {who: peak_bytes(prepare, who, case, args.pattern, args.torchscale) for who in PEERS}
        rows.append({**case._asdict(), "seconds": samples, "peak_bytes": peaks})
    errors = {
        dtype: measure_error(cases[0]._replace(length=args.error_length, dtype=dtype), args.pattern, args.torchscale)
        for dtype in args.dtypes
    }
    return {
        "torchscale": git("-C", str(args.torchscale.resolve()), "rev-parse", "HEAD"),
        "einops": package_version("einops"), "stand_in": stands_in,
        "pattern": args.pattern, "error_length": args.error_length, "rows": rows, "errors": errors,
    }  # fmt: skip


def tables(result: dict) -> str:
    """Format one line per case, then the errors."""
    lines = ["| dtype | mode | tokens | ours ms | TorchScale / ours | ours peak MiB | TorchScale peak MiB |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in result["rows"]:
        ours, theirs = (row["seconds"][who] for who in PEERS)
        ratio = op.format_ratio(spread([a / b for a, b in zip(theirs, ours, strict=True)]))
        peaks = (row["peak_bytes"][who] for who in PEERS)
        memory = ("not measured" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks)
        lines.append(
            f"| {row['dtype']} | {row['mode']} | {row['length']:,} | {1e3 * spread(ours).median:.1f} | {ratio} | "
            + " | ".join(memory) + " |"
        )  # fmt: skip
    errors = ["| dtype | whose | error of out | dq | dk | dv |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for dtype, found in result["errors"].items():
        for who, values in found.items():
            errors.append(f"| {dtype} | {who} | " + " | ".join(f"{x:.1e}" for x in values.values()) + " |")
    return "\n\n".join(
        [
            f"TorchScale at commit {result['torchscale'][:10]}, with "
            + ("our kernel" if result["stand_in"] else "its own kernel")
            + f". Branches {result['pattern']}, causal.",
            "\n".join(lines),
            f"Relative to float64, at {result['error_length']:,} tokens (TorchScale treats each branch's share of the "
            "softmax as a constant in the backward pass, so its dq and dk are not the gradient):",
            "\n".join(errors),
        ]
    )


headline = tables


def plot(result: dict, path: str) -> None:
    """Draw the time of both against length, one panel for each dtype and mode."""
    panels = []
    for dtype, mode in dict.fromkeys((row["dtype"], row["mode"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["dtype"], row["mode"]) == (dtype, mode)]
        lengths = [row["length"] for row in rows]
        lines = [
            Line(lengths, [spread(row["seconds"][who]).median for row in rows], name, color)
            for who, name, color in (("ours", "this package", "longnet"), ("torchscale", "TorchScale", "other"))
        ]
        panels.append(Panel(f"{mode}, {dtype}", lines, scale_seconds))
    draw_panels(panels, path)
