"""The paper's comparison, small: trains what is missing, keeps every result, goes on where it stopped.

    python examples/paper/run.py                  # hours on 2 cores; stop it and start it again at will
    python examples/paper/run.py --part recall --hours 1
    python examples/paper/run.py --quick          # every step at toy size, in a minute or two
    python examples/paper/figures.py              # tables and plots of what there is

Each cell is trained in a process of its own and leaves one JSON file in `--results` when it is done.
"""

import argparse
import json
import multiprocessing
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the other examples

from cells import load_documents, run_text_cell
from evaluate_perplexity import write_whole
from patterns import PATTERNS
from recall import run_recall_cell

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.measure import describe_run, highest_resident_bytes  # noqa: E402

RESULTS = Path(__file__).parent / "results"
FULL = {
    "name": "full",
    "text": "python",
    "threads": 2,
    "bfloat16": True,
    "branches": [[512, 2048, 8192, 32768], [1, 2, 4, 8]],
    "sizes": {
        "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 8, "position_embedding": "rope", "tie_word_embeddings": True,
    },
    "lengths": [2048, 8192, 16384],
    "contexts": [256, 512, 1024, 2048, 4096, 8192, 16384, 32768],
    "seeds": [0, 1],
    "tokens": 1 << 20,
    "sweep_tokens": 1 << 18,
    "rates": [1e-3, 2e-3, 4e-3],
    "targets": 1024,
    "blocks": 12,
    "held_out": 8,
    "recall_branches": [[256, 512, 1024, 2048], [1, 2, 4, 8]],
    "recall_sizes": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
        "position_embedding": "rope", "tie_word_embeddings": True,
    },
    "recall_length": 2048,
    "recall_tokens": 3 << 20,
    "recall_texts": 32,
    "pairs": 32,
    "least": 64,
}  # fmt: skip
QUICK = FULL | {
    "name": "quick",
    "text": str(Path(__file__).resolve().parent.parent.parent / "modeling_longnet"),
    "threads": 1,
    "bfloat16": False,
    "branches": [[32, 64, 128], [1, 2, 4]],
    "sizes": FULL["sizes"] | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "lengths": [64, 128],
    "contexts": [32, 64, 128, 256],
    "seeds": [0],
    "tokens": 1 << 9,
    "sweep_tokens": 1 << 8,
    "rates": [2e-3, 4e-3],
    "targets": 64,
    "blocks": 2,
    "held_out": 2,
    "recall_branches": [[16, 64], [1, 4]],
    "recall_sizes": FULL["recall_sizes"] | {"hidden_size": 32, "intermediate_size": 64},
    "recall_length": 128,
    "recall_tokens": 1 << 9,
    "recall_texts": 2,
    "pairs": 4,
    "least": 16,
}
# Other branches for the recall task: fewer, and more rate than heads.
RECALL_VARIANTS = {
    "blocked": {"head_offsets": "blocked"},
    "one step": {"branches": [[256, 2048], [1, 8]]},
    "steep": {"branches": [[256, 1024, 2048], [1, 4, 16]]},
}


def common(settings: dict) -> dict:
    return {"bfloat16": settings["bfloat16"], "warmup": 50 if settings["name"] == "full" else 1}


def sweep_cells(settings: dict) -> dict[str, dict]:
    """The same small sweep of learning rates for every pattern, at the shortest length."""
    return {
        f"sweep-{pattern}-{rate:g}": common(settings) | {
            "kind": "text", "pattern": pattern, "length": settings["lengths"][0], "seed": 0, "rate": rate,
            "tokens": settings["sweep_tokens"], "contexts": settings["contexts"][:4],
        }
        for rate, pattern in product(settings["rates"], PATTERNS)
    }  # fmt: skip


def best_rate(pattern: str, settings: dict, folder: Path) -> float:
    """The rate with the least perplexity under the longest context of the sweep."""
    scores = {}
    for rate in settings["rates"]:
        result = read(folder / f"sweep-{pattern}-{rate:g}.json")
        if result is not None:
            scores[rate] = result["scores"]["perplexity"][-1]
    return min(scores, key=scores.get)


def table_cells(settings: dict, folder: Path) -> dict[str, dict]:
    """Table 2: every pattern, length and seed with equal tokens, then all with the training time that LongNet took."""
    cells = {}
    for seed, length, pattern in product(settings["seeds"], settings["lengths"], PATTERNS):
        cells[f"tokens-{pattern}-{length}-{seed}"] = common(settings) | {
            "kind": "text", "pattern": pattern, "length": length, "seed": seed,
            "rate": best_rate(pattern, settings, folder), "tokens": settings["tokens"],
            "contexts": settings["contexts"],
        }  # fmt: skip
    for length, pattern in product(settings["lengths"], PATTERNS):
        ours = read(folder / f"tokens-longnet-{length}-0.json")
        cell = cells[f"tokens-{pattern}-{length}-0"]
        if pattern != "longnet" and ours is not None:
            without = {key: value for key, value in cell.items() if key != "tokens"}
            cells[f"time-{pattern}-{length}-0"] = without | {"seconds": ours["seconds"]}
    return cells


def recall_cells(settings: dict) -> dict[str, dict]:
    """Recall of every pattern, then of other branches and offsets of LongNet's."""
    base = common(settings) | {
        "kind": "recall", "length": settings["recall_length"], "rate": 2e-3, "tokens": settings["recall_tokens"],
        "pairs": settings["pairs"], "least": settings["least"],
    }  # fmt: skip
    cells = {}
    for seed in settings["seeds"]:
        for pattern in PATTERNS:
            cells[f"recall-{pattern}-{seed}"] = base | {"pattern": pattern, "seed": seed}
        for name, change in RECALL_VARIANTS.items() if settings["name"] == "full" else ():
            cells[f"recall-longnet {name}-{seed}"] = base | {"pattern": "longnet", "seed": seed} | change
    return cells


def read(path: Path) -> dict | None:
    """A cell's results, None where it has not been run."""
    return json.loads(path.read_text()) if path.exists() else None


def run_cell(cell: dict, settings: dict, text: tuple) -> dict:
    """Run in the calling process; `text` is what `cells.load_documents` gave, and empty for the recall task."""
    run = {"text": run_text_cell, "recall": run_recall_cell}[cell["kind"]]
    result = run(cell, settings, *text)
    return {"cell": cell, "settings": settings} | result | {"peak_bytes": highest_resident_bytes()}


def run_missing(cells: dict[str, dict], settings: dict, folder: Path, until: float) -> None:
    """Run the cells that have no file yet, each in a fresh process, until the time is up."""
    missing = {name: cell for name, cell in cells.items() if not (folder / f"{name}.json").exists()}
    context = multiprocessing.get_context("spawn")
    text = load_documents(settings) if any(cell["kind"] == "text" for cell in missing.values()) else ()
    for number, (name, cell) in enumerate(missing.items()):
        if time.monotonic() > until:
            print(f"Time is up; {len(missing) - number} cells are left. Start again to go on.")
            return
        print(f"[{number + 1}/{len(missing)}] {name}", flush=True)
        arguments = cell, settings, text if cell["kind"] == "text" else ()
        if settings["name"] == "quick":  # a process of its own, for the memory's peak, takes longer than the cell
            result = run_cell(*arguments)
        else:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                result = pool.submit(run_cell, *arguments).result()
        run = describe_run() | {"command": shlex.join(["python", "examples/paper/run.py", *sys.argv[1:]])}
        write_whole(folder / f"{name}.json", (json.dumps(run | result) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["table", "recall", "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="toy size: shows that everything runs")
    parser.add_argument("--results", type=Path, help="folder of the JSON files; default results/full or /quick")
    parser.add_argument("--hours", type=float, default=float("inf"), help="start no new cell after so long")
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else FULL
    folder = arguments.results or RESULTS / settings["name"]
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 3600 * arguments.hours
    if arguments.part in ("table", "all"):
        run_missing(sweep_cells(settings), settings, folder, until)
        if all((folder / f"{name}.json").exists() for name in sweep_cells(settings)):
            for _ in range(2):  # the second time LongNet's training times are known
                run_missing(table_cells(settings, folder), settings, folder, until)
    if arguments.part in ("recall", "all"):
        run_missing(recall_cells(settings), settings, folder, until)


if __name__ == "__main__":
    main()
