"""Fuzz: random inputs against the dense reference, and damaged files.

    make fuzz MINUTES=30                         for so long, or CASES=20000
    make fuzz ARGS='--kinds cache "state file"'  of these kinds only
    make fuzz ARGS='--replay "cache@1234"'       one case again, in this process, with its notes and traceback

Prints the seed and, each minute, the cases so far by kind. A failure is shrunk and printed with the commands that
replay it. `--record FILE` stores command, date, commit, machine, versions, counts by kind and failures as JSON. Ends
with 1 if a case failed.
"""

import argparse
import json
import math
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import safetensors
import tokenizers
import torch
import transformers

from .cases import CASES, WEIGHTS, all_cases
from .engine import Draw, Outcome, Worker, prepare_process, run_case, shrink

ROOT = Path(__file__).resolve().parents[2]


def replay(token: str) -> int:
    """Run one case in this process: KIND@SEED, or KIND:CHOICES as a shrunk case is printed."""
    kind, at, rest = token.partition("@") if "@" in token else token.partition(":")
    if kind not in CASES:
        raise SystemExit(f"--replay {token}: no kind {kind!r}; there are {', '.join(CASES)}.")
    draw = Draw(int(rest)) if at == "@" else Draw(choices=[int(x) for x in rest.split(".") if x])
    prepare_process()
    outcome = run_case(CASES[kind], draw)
    print(*outcome.notes, outcome.trace, f"{token}: {outcome.status} {outcome.error}", sep="\n")
    return int(outcome.is_failure)


def describe(kind: str, seed: int, outcome: Outcome, small: Outcome) -> str:
    """Return what one needs to know of a failure."""
    choices = ".".join(map(str, small.choices))
    commands = [f"make fuzz ARGS='--replay \"{x}\"'" for x in (f"{kind}@{seed}", f"{kind}:{choices}")]
    notes = "\n".join(f"  {note}" for note in small.notes)
    return (
        f"FAILED {kind}: {outcome.error}\n  at {outcome.place}\n{notes}\n{small.trace}\n  replay: {commands[0]}\n"
        f"  shrunk from {len(outcome.choices)} to {len(small.choices)} choices: {commands[1]}\n"
    )


class Run:
    """The counts of a run, and its failures by signature."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.seed = arguments, arguments.seed
        self.worker = Worker(all_cases, arguments.case_seconds)
        self.statuses: dict[str, Counter] = {kind: Counter() for kind in arguments.kinds}
        self.seconds: Counter = Counter()
        self.failures: dict[tuple, dict] = {}
        self.began, self.date, self.commit = time.monotonic(), datetime.now(timezone.utc), _commit()

    @property
    def total(self) -> int:
        return sum(sum(counts.values()) for counts in self.statuses.values())

    def one(self) -> None:
        """Run the next case; its kind and choices follow from the seed of the run and the number of the case."""
        seed = self.seed + self.total
        kinds = self.arguments.kinds
        [kind] = random.Random(seed).choices(kinds, [WEIGHTS[kind] for kind in kinds])
        began = time.monotonic()
        outcome = self.worker.run(kind, seed)
        self.seconds[kind] += time.monotonic() - began
        self.statuses[kind][outcome.status] += 1
        if outcome.is_failure:
            self._report(kind, seed, outcome)

    def _report(self, kind: str, seed: int, outcome: Outcome) -> None:
        known = self.failures.setdefault((kind, *outcome.signature), {"kind": kind, "seeds": []})
        known["seeds"].append(seed)
        if "error" in known:
            return
        small = shrink(outcome, lambda x: self.worker.run(kind, choices=x), self.arguments.shrink_seconds)
        known |= {"error": outcome.error[:500], "place": outcome.place, "notes": [note[:300] for note in small.notes]}
        known["replay"] = f"{kind}:{'.'.join(map(str, small.choices))}"
        print(describe(kind, seed, outcome, small), flush=True)

    def table(self) -> str:
        """Return the counts of each kind."""
        lines = [f"{self.total:,} cases in {time.monotonic() - self.began:,.0f} s, seed {self.seed}"]
        for kind, counts in self.statuses.items():
            others = ", ".join(f"{count:,} {status}" for status, count in sorted(counts.items()))
            lines.append(f"  {kind:18} {sum(counts.values()):7,}  {others}")
        return "\n".join(lines)

    def write(self) -> None:
        """Write the counts and failures as JSON."""
        kinds = {
            kind: {"cases": sum(counts.values()), **counts, "seconds": round(self.seconds[kind], 1)}
            for kind, counts in self.statuses.items()
        }
        result = {
            "command": f"PYTHONPATH=tests python -m fuzz {shlex.join(sys.argv[1:])}",
            "date": self.date.isoformat(timespec="minutes"),
            "commit": self.commit,
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
            "versions": {"python": platform.python_version()}
            | {x.__name__: x.__version__ for x in (torch, transformers, safetensors, tokenizers)},
            "seed": self.seed,
            "seconds": round(time.monotonic() - self.began),
            "cases": self.total,
            "failed": sum(len(x["seeds"]) for x in self.failures.values()),
            "kinds": kinds,
            "failures": list(self.failures.values()),
        }
        path = self.arguments.record
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".part").replace(path)


def _commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return found.stdout.strip()


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__, formatter_class=raw)
    parser.add_argument("--minutes", type=float, help="by default 1, or as many as the cases take")
    parser.add_argument("--cases", type=int, help="end after so many")
    parser.add_argument("--kinds", nargs="+", choices=list(CASES), default=list(CASES), metavar="KIND")
    parser.add_argument("--seed", type=int, default=None, help="of the first case; at random if left out")
    parser.add_argument("--replay", metavar="KIND@SEED or KIND:CHOICES")
    parser.add_argument("--case-seconds", type=float, default=60.0, help="a case that takes longer hangs")
    parser.add_argument("--shrink-seconds", type=float, default=30.0)
    parser.add_argument("--record", "--output", type=Path, metavar="FILE", default=ROOT / "output" / "fuzz.json")
    arguments = parser.parse_args()
    if arguments.replay:
        return replay(arguments.replay)
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(1 << 32)
    minutes = arguments.minutes or (1.0 if arguments.cases is None else math.inf)
    run = Run(arguments)
    print(f"seed {run.seed}", flush=True)
    shown = time.monotonic()
    try:
        while time.monotonic() - run.began < 60 * minutes and run.total != arguments.cases:
            run.one()
            if time.monotonic() - shown > 60:
                print(run.table(), flush=True)
                run.write()
                shown = time.monotonic()
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        run.worker.close()
        run.write()
    print(run.table(), f"{len(run.failures)} distinct failures; counts in {arguments.record}", sep="\n")
    return int(bool(run.failures))


if __name__ == "__main__":
    sys.exit(main())
