"""A model trained on texts of a million tokens by the stock Trainer: loss, speed and peak memory, step by step.

    python -m examples.paper.search --text FILE --prepare          # tokens of the installed packages, once
    python -m benchmarks.million --text FILE --device cuda --output million.json
    python -m benchmarks.million --text FILE --length 4096 --steps 2 --config configuration/longnet-demo.json   # CPU

The documents, concatenated in the order of their names, are cut into sequences of `--length` tokens. Weights
and activations are in `--dtype`, with gradient checkpointing.
"""

if not __package__:
    raise SystemExit("Run this as a module from the repository's root: python -m benchmarks.million")

import argparse
import json
import math
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from modeling_longnet import LongNetConfig, LongNetForCausalLM

from .measure import DTYPES, ROOT, describe_run, write_json


class Sequences(torch.utils.data.Dataset):
    """Sequences of one length from a file of `examples.paper.search --prepare`."""

    def __init__(self, file: Path, length: int):
        arrays = np.load(file)
        self.vocab_size = int(arrays["vocab_size"])
        tokens = np.concatenate([arrays[name] for name in sorted(arrays.files) if name.startswith("train/")])
        if len(tokens) < length:
            raise ValueError(f"--text {file} holds {len(tokens):,} tokens, fewer than --length {length:,}.")
        self.rows = tokens[: len(tokens) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class Recorder(TrainerCallback):
    """Records time, loss and peak memory of each step."""

    def __init__(self, length: int):
        self.length, self.steps, self.began = length, [], 0.0

    def on_step_begin(self, arguments, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, arguments, state, control, **kwargs):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        self.steps.append({"seconds": seconds, "tokens_a_second": self.length / seconds})
        if torch.cuda.is_initialized():
            self.steps[-1]["peak_bytes"] = torch.cuda.max_memory_allocated()

    def on_log(self, arguments, state, control, logs=None, **kwargs):
        if "loss" in logs and self.steps:
            self.steps[-1]["loss"] = float(logs["loss"])
            print(f"step {len(self.steps)}: {json.dumps(self.steps[-1])}", flush=True)


def train(args: argparse.Namespace) -> list[dict]:
    """Train, and return what was recorded of each step."""
    set_seed(0)
    sequences = Sequences(args.text, args.length)
    config = LongNetConfig.from_pretrained(args.config, vocab_size=sequences.vocab_size)
    with torch.device(args.device):
        model = LongNetForCausalLM(config).to(getattr(torch, args.dtype))
    recorder = Recorder(args.length)
    settings = TrainingArguments(
        output_dir=tempfile.gettempdir(), max_steps=args.steps, per_device_train_batch_size=1, learning_rate=args.rate,
        warmup_steps=2, lr_scheduler_type="cosine", logging_steps=1, save_strategy="no", report_to="none",
        gradient_checkpointing=True, use_cpu=args.device == "cpu", dataloader_num_workers=0, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=settings, train_dataset=sequences, callbacks=[recorder]).train()
    return recorder.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="file of tokens")
    parser.add_argument("--length", type=int, default=1 << 20, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=6e-4, help="learning rate of AdamW")
    parser.add_argument("--config", type=Path, default=ROOT / "configuration" / "longnet-125m.json")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    steps = train(args)
    losses = [step["loss"] for step in steps if "loss" in step]
    if not losses or not all(map(math.isfinite, losses)):
        raise SystemExit(f"training failed: its losses are {losses}.")
    command = {"command": shlex.join(["python", "-m", "benchmarks.million", *sys.argv[1:]])}
    result = {"name": "million", "length": args.length, "steps": steps} | describe_run(args.device) | command
    if args.output:
        write_json(args.output, result)
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {np.median([s['tokens_a_second'] for s in steps]):,.0f} tokens/s")


if __name__ == "__main__":
    main()
