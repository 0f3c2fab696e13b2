"""Run the paper's comparison at small size: train what is missing, keep every result, resume where it stopped.

    python -m examples.paper.run                  # hours on 2 cores; stop and restart it at will
    python -m examples.paper.run --part recall --hours 1
    python -m examples.paper.run --quick          # every step at toy size, in a minute or two
    python -m examples.paper.figures              # tables and plots of the results so far

Each cell is trained in its own process and leaves one JSON file in `--results` when it is done.
"""

if not __package__:
    raise SystemExit("Run this as a module from the repository's root: python -m examples.paper.run")

import argparse
import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partial
from itertools import chain, product
from pathlib import Path

import torch

from benchmarks.measure import describe_run

from ..evaluate_perplexity import write_whole
from .cells import Text, load_documents, run_base_cell, run_text_cell, sweep_score, weights_fit
from .patterns import LONGER, RIVALS, file_name
from .recall import run_recall_cell

RESULTS = Path(__file__).parent / "results"
FULL = {
    "name": "full",
    "text": "python",
    "threads": 1,
    "jobs": 2,
    "bfloat16": True,
    "branches": [[512, 2048, 8192, 32768], [1, 2, 4, 8]],
    "sizes": {
        "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 8, "position_embedding": "rope", "tie_word_embeddings": True,
    },
    "base_length": 512,
    "base_tokens": 1 << 21,
    "base_sweep_tokens": 3 << 17,
    "base_held_out": 128,
    "lengths": [2048, 8192, 16384],
    "contexts": [512, 2048, 8192, 16384, 32768],
    "seeds": {"table": [0, 1], "time": [0, 1], "recall": [0, 1], "far": [0]},
    "tokens": 3 << 17,
    "sweep_tokens": 1 << 17,
    "base_rates": [1e-3, 2e-3, 4e-3, 8e-3],
    "rates": [2.5e-4, 5e-4, 1e-3, 2e-3],
    "targets": 2048,
    "blocks": 6,
    "held_out": 4,
    "recall_branches": [[128, 512, 2048], [1, 2, 4]],
    "recall_sizes": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "position_embedding": "rope", "tie_word_embeddings": True,
    },
    "recall_base": {"length": 128, "batch": 16, "tokens": 3 << 20, "rate": 2e-3, "least": 16},
    "recall": {"length": 2048, "tokens": 1 << 20, "least": 32},
    "recall_rates": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3],
    "recall_sweep_tokens": 1 << 19,
    # Variants: other offsets; other work (one far branch, a longer first one, a rate above the number of heads); about
    # equal work with a longer first segment ((256, 1) and (2048, 4) is for_context(2048, effort=192, paper=True) for
    # 4 heads) or with more branches.
    "recall_variants": {
        "blocked": {"head_offsets": "blocked"},
        "128,2048 by 1,4": {"branches": [[128, 2048], [1, 4]]},
        "512,2048 by 1,4": {"branches": [[512, 2048], [1, 4]]},
        "128,2048 by 1,16": {"branches": [[128, 2048], [1, 16]]},
        "256,2048 by 1,4": {"branches": [[256, 2048], [1, 4]]},
        "352,2048 by 1,8": {"branches": [[352, 2048], [1, 8]]},
        "64,256,1024,2048 by 1,2,4,4": {"branches": [[64, 256, 1024, 2048], [1, 2, 4, 4]]},
    },
    "far": {"length": 8192, "tokens": 1 << 21, "least": 32},
    "far_branches": [[128, 512, 2048, 8192], [1, 2, 4, 4]],
    "recall_texts": 32,
    "passkey_texts": 96,
    # Patterns beyond the paper, and windows of other sizes, as `parse_pattern` reads them, at the rates below.
    "written_seeds": [0, 1, 2],
    "written_recall": [
        "w128 2048/16:1 once", "w96 2048/12:1 once", "w64 2048/8:1 once", "w96 512/4:1 2048/16:1 once",
        "w64 512/2 2048/4 rotate stagger once", "w136 2048/8:1 once every2",
    ],
    # The same with more training: recall beyond the window was still growing.
    "long_recall": {
        "tokens": 1 << 22,
        "patterns": ["w136 2048/8:1 once every2", "w64 2048/8:1 once", "w136 2048/16:1 once", *RIVALS[1:]],
    },
    # Other models of about that size, one seed.
    "recall_models": {
        "4 layers": {
            "sizes": {"num_hidden_layers": 4},
            "patterns": ["w64 2048/8:1 once", "w136 2048/8:1 once every2", "w136 2048/4:1 once every4"],
        },
        "8 heads": {
            "sizes": {"num_attention_heads": 8}, "patterns": ["w64 2048/8:1 once", "w136 2048/8:1 once every2"],
        },
    },
    "written_text": {
        "2048": ["w256 2048/8:1 once", "w256", "w512", "w256 2048/2 8192/4 32768/8 rotate stagger once"],
        "8192": ["w256 2048/8:1 8192/32:1 once", "w256"],
        "16384": ["w256 2048/8:1 8192/32:1 32768/128:1 once", "w256"],
    },
    "written_rates": {"recall": 1e-3, "text": 1e-3},
    # One stage at full length: these models see far keys from the first step, unlike those after a short first stage.
    "full_text": {
        "2048": [
            "w256 2048/8:1 once", "w136 2048/16:1 once", "w192", "w256", "w384", "512/1 2048/2 8192/4 32768/8",
            "w256 2048/2 8192/4 32768/8 rotate stagger once", "1048576/1",
        ],
    },
    "full_tokens": 3 << 19,
    # The same with 4 times the training, of patterns of equal work.
    "long_text": {
        "2048": ["w176 2048/16:1 once every4", "w192", "w136 2048/8:1 once every2", "w136 2048/16:1 once", "w128"],
    },
    "long_tokens": 3 << 21,
    # Longer texts after that: by trained length, a pattern and the one of the first stage.
    "extended_text": {
        "8192": {"w136 2048/8:1 8192/32:1 once every2": "w136 2048/8:1 once every2", "w192": "w192", "w256": "w192"},
        "16384": {"w136 2048/8:1 16384/64:1 once every2": "w136 2048/8:1 once every2", "w192": "w192", "w256": "w192"},
    },
    "extended_tokens": 3 << 18,
    "extended_contexts": [512, 2048, 8192, 16384],
    # A pattern, and a cheaper one that is also trained for as much time.
    "timed": ["w136 2048/8:1 once every2", "w192"],
}  # fmt: skip
QUICK = FULL | {
    "name": "quick",
    "text": str(Path(__file__).resolve().parent.parent.parent / "modeling_longnet"),
    "jobs": 1,
    "bfloat16": False,
    "branches": [[32, 64, 128], [1, 2, 4]],
    "sizes": FULL["sizes"] | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "base_length": 16,
    "base_tokens": 1 << 8,
    "base_sweep_tokens": 1 << 7,
    "base_held_out": 2,
    "lengths": [64, 128],
    "contexts": [32, 64, 128, 256],
    "seeds": {"table": [0], "time": [0], "recall": [0], "far": [0]},
    "tokens": 1 << 9,
    "sweep_tokens": 1 << 8,
    "base_rates": [2e-3, 4e-3],
    "rates": [1e-3, 2e-3],
    "targets": 64,
    "blocks": 2,
    "held_out": 2,
    "recall_branches": [[32, 64], [1, 4]],
    "recall_sizes": FULL["recall_sizes"] | {"hidden_size": 32, "intermediate_size": 64},
    "recall_base": FULL["recall_base"] | {"length": 32, "batch": 2, "tokens": 1 << 8, "least": 8},
    "recall": FULL["recall"] | {"length": 128, "tokens": 1 << 9, "least": 16},
    "recall_rates": [1e-3, 2e-3],
    "recall_sweep_tokens": 1 << 8,
    "recall_variants": {"blocked": {"head_offsets": "blocked"}, "16,64 by 1,4": {"branches": [[16, 64], [1, 4]]}},
    "far": FULL["far"] | {"length": 256, "tokens": 1 << 9, "least": 16},
    "far_branches": [[32, 64, 256], [1, 4, 4]],
    "recall_texts": 2,
    "passkey_texts": 2,
    "written_seeds": [0],
    "written_recall": ["w16 64/4:1 once"],
    "long_recall": {"tokens": 1 << 10, "patterns": ["w16 64/4:1 once", "window"]},
    "recall_models": {"4 layers": {"sizes": {"num_hidden_layers": 4}, "patterns": ["w16 64/4:1 once"]}},
    "written_text": {"64": ["w16 64/4:1 once"], "128": ["w24"]},
    "full_text": {"64": ["w16 64/4:1 once", "w16"]},
    "full_tokens": 1 << 9,
    "long_text": {"64": ["w16 64/4:1 once", "w16"]},
    "long_tokens": 1 << 10,
    "extended_text": {"128": {"w16 64/4:1 128/8:1 once": "w16 64/4:1 once", "w16": "w16"}},
    "extended_tokens": 1 << 9,
    "extended_contexts": [32, 128],
    "timed": ["w16 64/4:1 once", "w16"],
}

# Settings that shape results but are in no cell: if they change, results must be computed again.
SHAPING = {
    "recall": ("recall_sizes", "recall_texts", "passkey_texts"),
    "text": ("sizes", "branches", "targets", "blocks", "held_out", "base_held_out"),
}


def common(settings: dict, **fields) -> dict:
    """Return a cell with the fields that all share; warmup is in steps or, below 1, a share of the training."""
    shared = {"bfloat16": settings["bfloat16"], "warmup": 20 if settings["name"] == "full" else 1}
    return shared | ({} if fields["kind"] == "recall" else {"digest": settings["digest"]}) | fields


def base_of(pattern: str) -> str:
    """Return the pattern of the first stage, in which window and sparse equal dense attention."""
    return "longnet" if pattern == "longnet" else "dense"


def base_sweep_cells(settings: dict) -> dict[str, dict]:
    """List cells of the first stage, shorter, at every learning rate."""
    return {
        f"sweep-base-{pattern}-{rate:g}": common(
            settings, kind="base", pattern=pattern, length=settings["base_length"], seed=0, rate=rate,
            tokens=settings["base_sweep_tokens"],
        )
        for rate, pattern in product(settings["base_rates"], ("dense", "longnet"))
    }  # fmt: skip


def base_cells(settings: dict, folder: Path, seed: int) -> dict[str, dict]:
    """List cells of the first stage at its best learning rate."""
    return {
        f"base-{pattern}-{seed}": common(
            settings, kind="base", pattern=pattern, length=settings["base_length"], seed=seed,
            rate=best_rate(f"sweep-base-{pattern}", settings["base_rates"], folder),
            tokens=settings["base_tokens"], weights=f"base-{pattern}-{seed}.safetensors",
        )
        for pattern in dict.fromkeys(map(base_of, RIVALS))
    }  # fmt: skip


def sweep_cells(settings: dict) -> dict[str, dict]:
    """List cells of the second stage, shorter, at every learning rate and the shortest length, for every pattern."""
    return {
        f"sweep-{pattern}-{rate:g}": common(
            settings, kind="text", pattern=pattern, length=settings["lengths"][0], seed=0, rate=rate,
            tokens=settings["sweep_tokens"], contexts=settings["contexts"][:2],
            base=f"base-{base_of(pattern)}-0.safetensors",
        )
        for rate, pattern in product(settings["rates"], RIVALS)
    }  # fmt: skip


def best_rate(prefix: str, rates: list[float], folder: Path) -> float:
    """Return the rate with the lowest `sweep_score`."""
    return min(rates, key=lambda rate: sweep_score(read(folder / f"{prefix}-{rate:g}.json")))


def read(path: Path) -> dict:
    """Return the results of a cell that others depend on."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: run --part table first, or all parts in order by omitting --part.")
    return json.loads(path.read_text())


def table_cells(settings: dict, folder: Path, seed: int) -> dict[str, dict]:
    """List the cells of the counterpart of the paper's Table 2: every pattern and length, with equal tokens."""
    return {
        f"tokens-{pattern}-{length}-{seed}": common(
            settings, kind="text", pattern=pattern, length=length, seed=seed, warmup=0.1, by_position=True,
            rate=best_rate(f"sweep-{pattern}", settings["rates"], folder), tokens=settings["tokens"],
            contexts=settings["contexts"], base=f"base-{base_of(pattern)}-{seed}.safetensors",
        )
        for length, pattern in product(settings["lengths"], RIVALS)
    }  # fmt: skip


def time_cells(settings: dict, folder: Path, seed: int) -> dict[str, dict]:
    """List the same cells with the time that LongNet took in the second stage instead of equal tokens.

    Each pattern gets the steps that it takes in that time, at its speed with equal tokens. The longest context is not
    scored: dense attention takes minutes there.
    """
    cells = {}
    for name, cell in table_cells(settings, folder, seed).items():
        if cell["pattern"] != "longnet":
            names = (f"tokens-{pattern}-{cell['length']}-{seed}.json" for pattern in (cell["pattern"], "longnet"))
            own, longnet = (read(folder / file) for file in names)
            cell = train_as_long(cell, own, longnet) | {"contexts": cell["contexts"][:-1]}
            cells[name.replace("tokens", "time", 1)] = cell
    return cells


def train_as_long(cell: dict, own: dict, other: dict) -> dict:
    """Return the cell with the steps that fit into the time of the result `other`, at the speed of its result `own`."""
    steps = max(1, round(other["seconds"] / own["seconds"] * own["tokens"] / cell["length"]))
    return cell | {"tokens": steps * cell["length"]}


def recall_base_cells(settings: dict, seed: int) -> dict[str, dict]:
    """List first stages of recall, on short texts: dense attention, and LongNet's, which counts keys twice."""
    base = common(settings, kind="recall", seed=seed, **settings["recall_base"]) | {"head_offsets": "interleaved"}
    cells = {
        f"recall_base-{seed}": base | {"pattern": "dense", "branches": None},
        f"recall_base_longnet-{seed}": base | {"pattern": "longnet", "branches": settings["recall_branches"]},
    }
    return {name: cell | {"weights": f"{name}.safetensors"} for name, cell in cells.items()}


def recall_sweep_cells(settings: dict) -> dict[str, dict]:
    """List cells of recall in long texts, shorter, at every learning rate for every pattern, on separate test texts."""
    sweep = {"tokens": settings["recall_sweep_tokens"], "held_out_seed": 2 * 10**6}
    return {
        f"sweep_recall-{pattern}-{rate:g}": recall_cell(settings, "recall", pattern, 0, rate) | sweep
        for rate, pattern in product(settings["recall_rates"], RIVALS)
    }


def recall_cells(settings: dict, folder: Path, seed: int) -> dict[str, dict]:
    """List cells of recall in long texts for every pattern, then with other branches and offsets of LongNet's."""
    made = partial(best_recall_cell, settings, folder, seed, "recall")
    cells = {f"recall-{pattern}-{seed}": made(pattern) for pattern in RIVALS}
    variants = settings["recall_variants"] | {"own first stage": {"base": f"recall_base_longnet-{seed}.safetensors"}}
    return cells | {f"recall-longnet {name}-{seed}": made("longnet") | x for name, x in variants.items()}


def written_recall_cells(settings: dict, seed: int) -> dict[str, dict]:
    """List cells of recall for patterns beyond the paper, and for the rivals if `recall_cells` lacks the seed."""
    rate = settings["written_rates"]["recall"]
    patterns = [*settings["written_recall"], *(() if seed in settings["seeds"]["recall"] else RIVALS[1:])]
    return {f"recall-{file_name(name)}-{seed}": recall_cell(settings, "recall", name, seed, rate) for name in patterns}


def long_recall_cells(settings: dict, seed: int) -> dict[str, dict]:
    """List cells of recall with more training, for written patterns and the rivals."""
    rate, longer = settings["written_rates"]["recall"], settings["long_recall"]
    return {
        f"recall-{file_name(name)}{LONGER}-{seed}": recall_cell(settings, "recall", name, seed, rate)
        | {"tokens": longer["tokens"]}
        for name in longer["patterns"]
    }


def other_base_cells(settings: dict, seed: int) -> dict[str, dict]:
    """List first stages of recall, with dense attention, in models of other sizes."""
    cell = recall_base_cells(settings, seed)[f"recall_base-{seed}"]
    return {
        f"recall_base-{name}-{seed}": cell | {"sizes": x["sizes"], "weights": f"recall_base-{name}-{seed}.safetensors"}
        for name, x in settings["recall_models"].items()
    }


def other_recall_cells(settings: dict, seed: int) -> dict[str, dict]:
    """List cells of recall in models of other sizes."""
    rate, cells = settings["written_rates"]["recall"], {}
    for model, x in settings["recall_models"].items():
        own = {"sizes": x["sizes"], "base": f"recall_base-{model}-{seed}.safetensors"}
        for name in x["patterns"]:
            cell = recall_cell(settings, "recall", name, seed, rate) | own
            cells[f"recall-{file_name(name)}, {model}-{seed}"] = cell
    return cells


def written_text_cells(settings: dict, seed: int) -> dict[str, dict]:
    """List cells of the second stage for patterns beyond the paper and windows of several sizes."""
    cells = {}
    for length, patterns in settings["written_text"].items():
        rivals = () if seed in settings["seeds"]["table"] else ("window",)
        for pattern in (*patterns, *rivals):
            cells[f"tokens-{file_name(pattern)}-{length}-{seed}"] = common(
                settings, kind="text", pattern=pattern, length=int(length), seed=seed, warmup=0.1, by_position=True,
                rate=settings["written_rates"]["text"], tokens=settings["tokens"], contexts=settings["contexts"],
                base=f"base-dense-{seed}.safetensors",
            )  # fmt: skip
    return cells


def full_cells(settings: dict, folder: Path, seed: int, part: str = "full") -> dict[str, dict]:
    """List cells of one stage at full length, from scratch, at the best learning rate of the dense first stage."""
    rate = best_rate("sweep-base-dense", settings["base_rates"], folder)
    cells = {
        f"{part}-{file_name(pattern)}-{length}-{seed}": common(
            settings, kind="base", pattern=pattern, length=int(length), seed=seed, rate=rate,
            tokens=settings[f"{part}_tokens"],
        )
        for length, patterns in settings[f"{part}_text"].items()
        for pattern in patterns
    }  # fmt: skip
    for name, cell in cells.items():
        if part == "long" and cell["pattern"] in settings["timed"]:  # other cells continue from it
            cell["weights"] = f"{name}.safetensors"
    return cells


def extended_cells(settings: dict, seed: int) -> dict[str, dict]:
    """List cells of longer texts, continued from the longer training."""
    cells, short = {}, settings["lengths"][0]
    for length, patterns in settings["extended_text"].items():
        for pattern, base in patterns.items():
            cells[f"extended-{file_name(pattern)}-{length}-{seed}"] = common(
                settings, kind="text", pattern=pattern, length=int(length), seed=seed, warmup=0.1,
                rate=settings["written_rates"]["text"], tokens=settings["extended_tokens"],
                contexts=settings["extended_contexts"], base=f"long-{file_name(base)}-{short}-{seed}.safetensors",
            )  # fmt: skip
    return cells


def equal_time_cells(settings: dict, folder: Path, seed: int) -> dict[str, dict]:
    """List the longer training of the cheaper of the `timed` patterns, for the time that the other took."""
    names = [f"long-{file_name(pattern)}-{settings['lengths'][0]}-{seed}" for pattern in settings["timed"]]
    theirs, own = (read(folder / f"{name}.json") for name in names)
    cell = train_as_long(full_cells(settings, folder, seed, "long")[names[1]], own, theirs)
    return {f"time_{names[1]}": cell | {"weights": f"time_{cell['weights']}"}}


def equal_time_extended_cells(settings: dict, folder: Path, seed: int) -> dict[str, dict]:
    """List the cells of longer texts that continue from those, again with the time that the other pattern took."""
    cells, listed = {}, extended_cells(settings, seed)
    for length, patterns in settings["extended_text"].items():
        pattern, cheaper = (next(x for x, base in patterns.items() if base == first) for first in settings["timed"])
        names = [f"extended-{file_name(x)}-{length}-{seed}" for x in (pattern, cheaper)]
        theirs, own = (read(folder / f"{name}.json") for name in names)
        cell = train_as_long(listed[names[1]], own, theirs)
        cells[f"time_{names[1]}"] = cell | {"base": f"time_{cell['base']}"}
    return cells


def written_base_cells(settings: dict, folder: Path, seed: int) -> dict[str, dict]:
    """List the first stages, with dense attention, from which written patterns continue."""
    recall, text = recall_base_cells(settings, seed), base_cells(settings, folder, seed)
    return {name: (recall | text)[name] for name in (f"recall_base-{seed}", f"base-dense-{seed}")}


def far_cells(settings: dict, folder: Path, seed: int) -> dict[str, dict]:
    """List cells of recall in longer texts for every pattern."""
    return {f"far-{pattern}-{seed}": best_recall_cell(settings, folder, seed, "far", pattern) for pattern in RIVALS}


def best_recall_cell(settings: dict, folder: Path, seed: int, task: str, pattern: str) -> dict:
    """Return a cell of the task at the pattern's best learning rate in the sweep."""
    rate = best_rate(f"sweep_recall-{pattern}", settings["recall_rates"], folder)
    return recall_cell(settings, task, pattern, seed, rate)


def recall_cell(settings: dict, task: str, pattern: str, seed: int, rate: float) -> dict:
    """Return a cell of the task `recall` or `far`."""
    return common(
        settings, kind="recall", pattern=pattern, seed=seed, rate=rate, **settings[task],
        branches=settings["far_branches" if task == "far" else "recall_branches"], head_offsets="interleaved",
        base=f"recall_base-{seed}.safetensors",
    )  # fmt: skip


def run_cell(name: str, cell: dict, settings: dict, folder: Path, text: Text | None) -> float:
    """Run in the calling process and write the results; recall needs no text.

    Returns:
        Seconds of training.
    """
    torch.set_num_threads(settings["threads"])
    run = describe_run() | {"command": shlex.join(["python", "-m", "examples.paper.run", *sys.argv[1:]])}
    run_kind = {"base": run_base_cell, "text": run_text_cell, "recall": run_recall_cell}[cell["kind"]]
    result = run_kind(cell, settings, folder, *([] if cell["kind"] == "recall" else [text]))
    write_whole(
        folder / f"{name}.json", (json.dumps(run | {"cell": cell, "settings": settings} | result) + "\n").encode()
    )
    return result["seconds"]


def is_done(name: str, cell: dict, settings: dict, folder: Path) -> bool:
    """Return whether results of exactly this cell with the same settings are stored."""
    if not (folder / f"{name}.json").exists():
        return False
    result = json.loads((folder / f"{name}.json").read_text())
    shaping = SHAPING["recall" if cell["kind"] == "recall" else "text"]
    same = all(result["settings"].get(key) == json.loads(json.dumps(settings[key])) for key in shaping)
    return same and result["cell"] == json.loads(json.dumps(cell))


def run_missing(cells: dict[str, dict], settings: dict, folder: Path, text: Text | None, until: float) -> bool:
    """Run the cells that have no results yet, `jobs` at once, until the time is up; return whether all are done."""
    missing = {name: cell for name, cell in cells.items() if not is_done(name, cell, settings, folder)}
    # Weights are not in the repository: a fresh clone first trains again those from which a missing cell continues.
    needed = [cell for cell in missing.values() if "base" in cell]
    bases = {Path(cell["base"]).stem for cell in needed if not weights_fit(folder / cell["base"], cell)}
    missing = {name: read(folder / f"{name}.json")["cell"] for name in sorted(bases)} or missing
    if not missing:
        return True
    waiting = [(name, cell, settings, folder, text) for name, cell in missing.items()]
    if settings["name"] == "quick":  # a process of its own takes longer than the cell
        for arguments in waiting:
            print(f"{arguments[0]}: done, {run_cell(*arguments):.0f} s of training")
        return run_missing(cells, settings, folder, text, until) if bases else True
    # Each cell has one fresh process with one thread, `jobs` in parallel: small models gain little from more threads.
    context = multiprocessing.get_context("spawn")
    fresh = {"max_tasks_per_child": 1} if sys.version_info >= (3, 11) else {}  # Python 3.10 uses its processes again
    with ProcessPoolExecutor(settings["jobs"], mp_context=context, **fresh) as pool:
        running = {}
        while waiting or running:
            while waiting and len(running) < settings["jobs"] and time.monotonic() < until:
                arguments = waiting.pop(0)
                print(f"{arguments[0]}: started, {len(waiting)} waiting", flush=True)
                running[pool.submit(run_cell, *arguments)] = arguments[0]
            if not running:
                print(f"Time is up; {len(waiting)} cells of this part are left. Run the command again to continue.")
                return False
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                print(f"{running.pop(done)}: done, {done.result():.0f} s of training", flush=True)
    return run_missing(cells, settings, folder, text, until) if bases else True


def list_parts(settings: dict, folder: Path) -> dict[str, list[Callable[[], dict[str, dict]]]]:
    """Return functions that list the cells of each part, to call in turn: later cells depend on earlier results."""
    seeds = settings["seeds"]
    parts = {"table": [partial(base_sweep_cells, settings)], "recall": [], "time": [], "written": []}
    for number, seed in enumerate(seeds["table"]):
        parts["table"] += [partial(base_cells, settings, folder, seed)]
        parts["table"] += [partial(sweep_cells, settings)] if number == 0 else []
        parts["table"] += [partial(table_cells, settings, folder, seed)]
    for number, seed in enumerate(seeds["recall"]):
        parts["recall"] += [partial(recall_base_cells, settings, seed)]
        parts["recall"] += [partial(recall_sweep_cells, settings)] if number == 0 else []
        parts["recall"] += [partial(recall_cells, settings, folder, seed)]
    parts["recall"] += [partial(far_cells, settings, folder, seed) for seed in seeds["far"]]
    for seed in settings["written_seeds"]:
        parts["written"] += [partial(written_base_cells, settings, folder, seed)]
        parts["written"] += [partial(written_recall_cells, settings, seed)]
        parts["written"] += [partial(long_recall_cells, settings, seed)]
        parts["written"] += [partial(full_cells, settings, folder, seed)]
        parts["written"] += [partial(written_text_cells, settings, seed)]
    parts["written"] += [partial(full_cells, settings, folder, seed, "long") for seed in settings["written_seeds"]]
    parts["written"] += [partial(extended_cells, settings, seed) for seed in settings["written_seeds"]]
    for list_cells in (equal_time_cells, equal_time_extended_cells):
        parts["written"] += [partial(list_cells, settings, folder, seed) for seed in settings["written_seeds"]]
    parts["written"] += [partial(other_base_cells, settings, 0), partial(other_recall_cells, settings, 0)]
    parts["time"] += [partial(time_cells, settings, folder, seed) for seed in seeds["time"]]
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["table", "recall", "time", "written", "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="toy size: shows that everything runs")
    parser.add_argument("--results", type=Path, help="folder of the JSON files; default results/full or /quick")
    parser.add_argument("--jobs", type=int, help="cells at once, one thread each; default 2")
    parser.add_argument("--hours", type=float, default=float("inf"), help="start no new cell after so long")
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else FULL
    settings["jobs"] = arguments.jobs or settings["jobs"]
    folder = arguments.results or RESULTS / settings["name"]
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 3600 * arguments.hours
    text = None
    if arguments.part != "recall":
        text = load_documents(settings)
        settings["digest"] = text.digest  # a cell with other text is another cell
    parts = list_parts(settings, folder)
    for make_cells in chain(*(parts[name] for name in ([arguments.part] if arguments.part != "all" else parts))):
        if not run_missing(make_cells(), settings, folder, text, until):  # needs the results of the parts before
            return
    print(f"Every cell has results in {folder}; for tables and plots run python -m examples.paper.figures.")


if __name__ == "__main__":
    main()
