"""Search for the best pattern by many small trainings.

    python -m examples.paper.search --text FILE --prepare        # tokenize the installed packages into FILE, once
    python -m examples.paper.search --text FILE --minutes 6 --jobs 6 --device cuda
    python -m examples.paper.search --quick                      # every step at toy size, on a CPU

A cell trains one pattern on one task with one seed and leaves one JSON file. Finished cells are not run again, and the
most valuable cells come first. All patterns of a task see the same tokens in the same order.

A pattern is written in one line, as `parse_pattern` reads it.
"""

if not __package__:
    raise SystemExit("Run this as a module from the repository's root: python -m examples.paper.search")

import argparse
import itertools
import json
import math
import multiprocessing
import queue
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch.nn.functional import cross_entropy

from benchmarks.measure import describe_run

from ..evaluate_perplexity import write_whole
from ..optimizer import MuonAndAdamW
from .cells import cut, load_documents
from .patterns import LONGEST, Pattern, count_keys, file_name, make_model, make_pattern
from .recall import VOCABULARY, distance_edges, make_texts, score
from .run import FULL

DENSE = f"{LONGEST}/1"
RECALL = {
    "sizes": FULL["recall_sizes"] | {"vocab_size": VOCABULARY}, "length": 2048, "least": 32, "tokens": 1 << 20,
    "batch": 1, "base": FULL["recall_base"], "texts": 64,
}  # fmt: skip
TEXT = {"sizes": FULL["sizes"], "tokens": 1 << 23, "step_tokens": 1 << 14, "held_out_tokens": 1 << 18}
LARGER = TEXT | {
    "sizes": TEXT["sizes"] | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8},
    "tokens": 3 << 23, "step_tokens": 1 << 16,
}  # fmt: skip
TASKS = {
    "recall": RECALL,
    "recall-long": RECALL | {"tokens": 1 << 22},
    "recall-8k": RECALL | {"length": 8192, "tokens": 1 << 21},
    "text-2k": TEXT | {"length": 2048},
    "text-8k": TEXT | {"length": 8192},
    "text-16k": TEXT | {"length": 16384},
    "larger-8k": LARGER | {"length": 8192},
    "larger-32k": LARGER | {"length": 32768},
}
PAPER = "512/1 2048/2 8192/4 32768/8"
PAPER_RECALL = "128/1 512/2 2048/4"
# Most valuable first: task, number of seeds, learning rates, patterns.
PLAN = [
    ("larger-8k", 1, (2e-3,), [
        PAPER, "w850", "w512", "w384 2048/8:1 8192/32:1 once every2", "w448 2048/8:1 8192/32:1 once every4",
        "w256 2048/8:1 8192/32:1 once", "w512 8192/16:1 once", DENSE, "sparse 800 50",
    ]),
    ("recall", 3, (1e-3, 2e-3), [
        PAPER_RECALL, "w204", "w136 2048/8:1 once every2", "w64 2048/8:1 once", "w128 2048/16:1 once",
        "w96 2048/12:1 once",
        "w96 512/4:1 2048/16:1 once", "w128 512/8:1 2048/32:1 once", "w64 512/2 2048/4 rotate stagger once",
        "w128 2048/16:1 rotate once", "w112 2048/14:1 once", "w64 512/4:1 2048/16:1 once", "sparse 192 22",
    ]),
    ("text-2k", 3, (2e-3,), [
        PAPER, "w718", "w512", "w256", "w240 2048/16:1 once every4", "w208 2048/8:1 once every2",
        "w256 2048/8:1 once", "w256 2048/16:1 once", "w128 2048/8:1 once",
        "w256 2048/2 8192/4 32768/8 rotate stagger once", DENSE,
    ]),
    ("text-8k", 3, (2e-3,), [
        PAPER, "w850", "w512", "w384 2048/8:1 8192/32:1 once every2",
        "w256 2048/8:1 8192/32:1 once", "w256 8192/32:1 once",
        "w256 2048/2 8192/4 32768/8 rotate stagger once", "w512 8192/16:1 once", DENSE,
    ]),
    ("recall-8k", 1, (1e-3,), [
        "128/1 512/2 2048/4 8192/4", "w256", "w128 1024/4:1 8192/32:1 once every2", "w96 2048/12:1 8192/48:1 once",
        "w128 8192/64:1 once",
    ]),
    ("text-16k", 3, (2e-3,), [PAPER, "w896", "w256", "w256 2048/8:1 8192/32:1 32768/128:1 once"]),
    ("larger-32k", 1, (2e-3,), [
        PAPER, "w950", "w512", "w384 2048/8:1 8192/32:1 32768/128:1 once every2",
        "w256 2048/8:1 8192/32:1 32768/128:1 once", DENSE,
    ]),
]  # fmt: skip


def count_pattern_keys(words: str, length: int) -> float:
    """Return the mean number of keys that a query sees per head."""
    return count_keys(_sparse(words) if words.startswith("sparse") else make_pattern(words, ((), ()), length), length)


def _sparse(words: str) -> Pattern:
    """Return Child et al.'s pattern, written "sparse BLOCK SUMMARY"."""
    _, size, summary = words.split()
    return Pattern("sparse", (LONGEST,), (1,), int(size), int(summary))


def build(words: str, seed: int, sizes: dict, device: str) -> torch.nn.Module:
    """Return a new model with this pattern; equal seeds give equal weights whatever the pattern."""
    if words.startswith("sparse"):
        return make_model(_sparse(words), seed, **sizes).to(device)
    return make_model(make_pattern(words, ((), ()), 1), seed, **sizes).to(device)


class Trainer:
    """Trains one model; on a GPU the forward and backward pass are one CUDA graph."""

    def __init__(self, model: torch.nn.Module, batch: int, length: int, rate: float):
        self.model, self.rate = model, rate
        self.optimizer = MuonAndAdamW(model, learning_rate=rate, muon_learning_rate=10 * rate)
        self.first = [group["lr"] for group in self.optimizer.param_groups]
        device = next(model.parameters()).device
        self.ids, self.labels = (torch.zeros(batch, length, dtype=torch.int64, device=device) for _ in range(2))
        self.graph = None
        if device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._pass()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = self._pass()

    def _pass(self) -> torch.Tensor:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        loss = token_losses(self.model, self.ids, self.labels)
        loss = loss.sum() / (self.labels != -100).sum()
        loss.backward()
        return loss.detach()

    def step(self, ids: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
        """Take one step, `share` of the way through training: the rate rises over the first 4 % and falls to 0."""
        self.ids.copy_(ids)
        self.labels.copy_(labels)
        if self.graph is None:
            self.loss = self._pass()
        else:
            self.graph.replay()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group, rate in zip(self.optimizer.param_groups, self.first, strict=True):
            group["lr"] = rate * min(1.0, (share + 1e-3) / 0.04) * (0.5 + 0.5 * math.cos(math.pi * share))
        self.optimizer.step()
        return self.loss


def token_losses(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return (B, L) losses in nats of the next tokens `labels`, 0 where a label is -100."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        embeds = model.get_input_embeddings()(ids)  # skips the model's check of ids, which would wait for the GPU
        logits = model.lm_head(model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state)
    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view(labels.shape)


def train(model, ids: np.ndarray, labels: np.ndarray, task: dict, rate: float, batch: int) -> dict:
    """Train on (N, L) tokens in their order, again from the start when they are used up."""
    device, length = next(model.parameters()).device, ids.shape[1]
    ids, labels = (torch.from_numpy(x.astype(np.int64)).to(device) for x in (ids, labels))
    model.train()
    steps, losses, trainer = max(1, task["tokens"] // (batch * length)), [], Trainer(model, batch, length, rate)
    began = time.perf_counter()
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch, device=device) % len(ids)
        losses.append(trainer.step(ids[rows], labels[rows], step / steps).clone())
    losses = torch.stack(losses).tolist()
    seconds = time.perf_counter() - began
    return {
        "steps": steps,
        "tokens": steps * batch * length,
        "seconds": seconds,
        "losses": losses[:: max(1, steps // 64)],
    }


def run_recall(cell: dict, folder: Path, device: str) -> dict:
    """Run the recall task of `recall.py`: a first stage on short texts with dense attention, then the pattern."""
    task, seed = TASKS[cell["task"]] | cell["changes"], cell["seed"]
    weights = folder / f"recall-base-{seed}.safetensors"
    if not weights.exists():
        base = build(DENSE, seed, task["sizes"], device)
        tokens, told = _recall_texts(task["base"]["tokens"], task["base"]["length"], task["base"]["least"], seed + 1)
        train(base, tokens, told, task["base"], task["base"]["rate"], task["base"]["batch"])
        save_model(base, part := weights.with_suffix(f".{cell['name']}.part"))
        part.replace(weights)
    model = build(cell["pattern"], seed, task["sizes"], device)
    load_model(model, weights, device=device)
    tokens, told = _recall_texts(task["tokens"], task["length"], task["least"], seed + 1)
    result = train(model, tokens, told, task, cell["rate"], task["batch"])
    return result | score_recall(model, task, device)


def _recall_texts(tokens: int, length: int, least: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    texts, distances = make_texts(max(1, tokens // length), length, least, seed)
    following = np.pad(texts, ((0, 0), (0, 1)))[:, 1:]
    return texts, np.where(distances > 0, following, -100)


def score_recall(model, task: dict, device: str) -> dict:
    """Return the share of the tokens asked for that the model predicts, by distance."""
    edges = distance_edges(task["least"], task["length"])
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        scored = score(model, *make_texts(task["texts"], task["length"], task["least"], 10**6), edges, device)
    shares = [right / max(1, asked) for right, asked in zip(scored["right"], scored["asked"], strict=True)]
    return {"edges": edges, "recall": shares}


def run_text(cell: dict, text: dict, device: str) -> dict:
    """Train from scratch at full length; score held-out sequences of that length by position."""
    task = TASKS[cell["task"]] | cell["changes"]
    length, batch = task["length"], max(1, task["step_tokens"] // task["length"])
    model = build(cell["pattern"], cell["seed"], task["sizes"] | {"vocab_size": text["vocab_size"]}, device)
    ids = cut(text["train"], length + 1, cell["seed"])
    result = train(model, ids[:, :-1], ids[:, 1:], task, cell["rate"], batch)
    held_out = cut(text["evaluation"], length + 1, 0)[: max(1, task["held_out_tokens"] // length)]
    model.eval()
    with torch.inference_mode():
        rows = torch.from_numpy(held_out.astype(np.int64)).to(device)
        sums = torch.stack([token_losses(model, row[None, :-1], row[None, 1:])[0] for row in rows]).mean(0)
    by_position = [part.mean().item() for part in sums.tensor_split(16)]
    loss = sums.mean().item()
    return result | {"loss": loss, "perplexity": math.exp(loss), "loss_by_position": by_position}


def list_cells(plan: list, changes: dict) -> list[dict]:
    """List the cells of a plan; within a task, seed by seed."""
    cells = []
    for task, seeds, rates, patterns in plan:
        for seed, rate, pattern in itertools.product(range(seeds), rates, patterns):
            name = f"{task}-{file_name(pattern)}-{rate:g}-{seed}"
            cell = {"name": name, "task": task, "pattern": pattern, "seed": seed, "rate": rate, "changes": changes}
            cells.append(cell | {"keys": count_pattern_keys(pattern, (TASKS[task] | changes)["length"])})
    return cells


def run_cell(cell: dict, folder: Path, text: dict | None, device: str) -> None:
    """Run a cell and write its file."""
    run = describe_run(device) if device != "cpu" else describe_run()
    result = run_recall(cell, folder, device) if "recall" in cell["task"] else run_text(cell, text, device)
    command = {"command": shlex.join(["python", "-m", "examples.paper.search", *sys.argv[1:]])}
    write_whole(folder / f"{cell['name']}.json", (json.dumps(run | command | {"cell": cell} | result) + "\n").encode())
    shown = result.get("perplexity") or " ".join(f"{x:.2f}" for x in result["recall"])
    print(f"{cell['name']}: {cell['keys']:.0f} keys, {result['seconds']:.1f} s, {shown}", flush=True)


def work(cells: "multiprocessing.Queue", folder: Path, text_file: Path | None, device: str, until: float) -> None:
    """Take cells from the queue in a worker process until there are none or the time is up."""
    text = read_text(text_file) if text_file else None
    while time.monotonic() < until:
        try:
            cell = cells.get(timeout=1)
        except queue.Empty:
            return
        try:
            run_cell(cell, folder, text, device)
        except Exception as error:  # other cells continue; the next run tries this one again
            print(f"{cell['name']}: {type(error).__name__}: {error}", flush=True)


def prepare_text(file: Path, settings: dict) -> None:
    """Tokenize the text of `run.py` into a file of one array per document."""
    text = load_documents(settings)
    arrays = {
        f"{part}/{name}": ids.astype(np.uint16) for part, docs in text.documents.items() for name, ids in docs.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, vocab_size=len(text.tokenizer), digest=text.digest, **arrays)
    print(f"{file}: {sum(x.size for x in arrays.values()):,} tokens, {file.stat().st_size / 2**20:.1f} MiB")


def read_text(file: Path) -> dict:
    """Return the documents of both parts and the size of the vocabulary."""
    arrays = np.load(file)
    parts = {part: {} for part in ("train", "evaluation")}
    for name in arrays.files:
        part, _, document = name.partition("/")
        if part in parts:
            parts[part][document] = arrays[name]
    return parts | {"vocab_size": int(arrays["vocab_size"])}


def summarize(folder: Path) -> str:
    """Tabulate mean and spread over the seeds of each pattern at its best rate, one table per task."""
    groups = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if "cell" in result:
            cell = result["cell"]
            groups.setdefault(cell["task"], {}).setdefault((cell["pattern"], cell["rate"]), []).append(result)
    lines = []
    for task, patterns in groups.items():
        is_text = "perplexity" in next(iter(patterns.values()))[0]
        score = (lambda r: -r["perplexity"]) if is_text else (lambda r: float(np.mean(r["recall"])))
        best = {}
        for (pattern, rate), results in patterns.items():
            entry = float(np.mean([score(r) for r in results])), rate, results
            best[pattern] = max(best.get(pattern, entry), entry, key=lambda x: (len(x[2]), x[0]))
        edges = [] if is_text else next(iter(patterns.values()))[0]["edges"]
        columns = ["perplexity, mean (least to most)"] if is_text else ["mean"] + [f"to {b:,}" for b in edges[1:]]
        head = ["pattern", "keys", "rate", "seeds", "seconds", *columns]
        lines += [f"\n{task}", "| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
        for pattern, (mean, rate, results) in sorted(best.items(), key=lambda x: -x[1][0]):
            values = [abs(score(r)) for r in results]
            shown = [f"{abs(mean):.3f} ({min(values):.3f} to {max(values):.3f})"]
            if not is_text:
                shown += [f"{x:.2f}" for x in np.mean([r["recall"] for r in results], 0)]
            seconds = np.mean([r["seconds"] for r in results])
            row = [
                pattern,
                f"{results[0]['cell']['keys']:.0f}",
                f"{rate:g}",
                str(len(results)),
                f"{seconds:.1f}",
                *shown,
            ]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


QUICK = {"length": 128, "least": 16, "tokens": 1 << 9, "step_tokens": 256, "held_out_tokens": 256, "texts": 2}
QUICK |= {"sizes": {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}}
QUICK["sizes"] |= {"num_attention_heads": 4, "position_embedding": "rope", "tie_word_embeddings": True}
QUICK["base"] = {"length": 64, "batch": 2, "tokens": 256, "rate": 2e-3, "least": 8}
QUICK_PLAN = [(task, 1, (1e-3,), ["16/1 64/4", "w8 64/4:1 once", "sparse 16 2"]) for task in ("recall", "text-2k")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="file of tokens made by --prepare; without it only recall is run")
    parser.add_argument("--prepare", action="store_true", help="write that file and end")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "search")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after so many minutes")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plan", type=json.loads, default=PLAN, help="[[task, seeds, [rates], [patterns]], ...]")
    parser.add_argument("--quick", action="store_true", help="toy size")
    arguments = parser.parse_args()
    if arguments.prepare:
        return prepare_text(arguments.text, FULL)
    if arguments.quick:
        arguments.plan = QUICK_PLAN
    arguments.output.mkdir(parents=True, exist_ok=True)
    cells = list_cells(arguments.plan, QUICK if arguments.quick else {})
    missing = [c for c in cells if not (arguments.output / f"{c['name']}.json").exists()]
    missing = [c for c in missing if arguments.text or "recall" in c["task"]]
    until = time.monotonic() + 60 * arguments.minutes
    print(f"{len(missing)} of {len(cells)} cells to run on {arguments.device}, {arguments.jobs} at once.", flush=True)
    context = multiprocessing.get_context("spawn")
    waiting = context.Queue()
    for cell in missing:
        waiting.put(cell)
    waiting.cancel_join_thread()  # otherwise cells left in the queue keep this process from ending
    options = (waiting, arguments.output, arguments.text, arguments.device, until)
    if arguments.jobs == 1:
        work(*options)
    else:
        processes = [context.Process(target=work, args=options) for _ in range(arguments.jobs)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    table = summarize(arguments.output)
    (arguments.output / "search.md").write_text(table.strip() + "\n")
    print(table)


if __name__ == "__main__":
    main()
