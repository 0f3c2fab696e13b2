"""`python -m benchmarks.run NAME [options]`: measure, print, and keep the raw samples as JSON."""

import argparse
import os
from pathlib import Path

import torch

from . import (
    backends,
    cluster,
    communication,
    decode,
    length,
    memory,
    op,
    patterns,
    peers,
    revisions,
    slide,
    stream,
    train,
)
from .measure import ROOT, describe_run, machine_slug, write_json

# Each module has add_arguments, run, tables, headline and plot.
BENCHMARKS = {
    "op": op,
    "length": length,
    "backends": backends,
    "patterns": patterns,
    "peers": peers,
    "decode": decode,
    "train": train,
    "memory": memory,
    "slide": slide,
    "communication": communication,
    "cluster": cluster,
    "stream": stream,
    "revisions": revisions,
}
ON_GPU = ("op", "patterns", "length", "backends", "train", "memory", "peers", "stream")
RESULTS = ROOT / "benchmarks" / "results"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse `arguments`, by default the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True)
    for name, module in BENCHMARKS.items():
        chosen = names.add_parser(
            name,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        chosen.add_argument("--threads", type=int, default=os.cpu_count())
        devices = ["cpu", "cuda"] if name in ON_GPU else ["cpu"]
        chosen.add_argument("--device", default="cpu", choices=devices)
        chosen.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/...")
        module.add_arguments(chosen)
    return parser.parse_args(arguments)


def describe(result: dict) -> str:
    """Say in one paragraph where a result comes from."""
    machine, versions = result["machine"], result["versions"]
    changed = ", with uncommitted changes" if result["uncommitted_changes"] else ""
    gpu = f", {result['gpu']}" if result.get("gpu") else ""
    return (
        f"`{result['command']}` at commit {result['commit'][:10]}{changed}, {result['date']}, on "
        f"{machine['cpu']} ({machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['cpu_capability']}, {machine['memory_gib']} GiB){gpu}, PyTorch {versions['torch']}."
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    result = {"name": args.name} | describe_run(args.device)
    result |= BENCHMARKS[args.name].run(args)
    date = result["date"][:16].replace(":", "")
    path = args.output or RESULTS / f"{args.name}-{machine_slug(result)}-{date}.json"
    write_json(path, result)
    print(describe(result), BENCHMARKS[args.name].tables(result), f"Wrote {path}", sep="\n\n")


if __name__ == "__main__":
    main()
