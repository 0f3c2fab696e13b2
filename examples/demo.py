"""The whole workflow from training to a loaded model: `make demo`.

Trains a small LongNet on Python source code, measures and draws the perplexity of held-out packages
under growing context, saves the model, and loads the saved folder in a process that cannot import
our package. `output` then holds

    model/            the saved folder: safetensors, tokenizer, configuration and the code that loads it
    perplexity.json   the table and what was trained; perplexity.png plots it beside stored results of other models
    sample.txt        what the loaded model wrote

    python -m examples.demo --text my_folder --steps 1000 --output my_demo
    python -m examples.demo --quick True
"""

if not __package__:
    raise SystemExit("Run this as a module from the repository's root: python -m examples.demo")

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments

from modeling_longnet import parse_pattern

from .compare import BASELINES, ROOT, plot, read_baselines
from .corpus import TextArguments, join_documents, load_text, tokenize
from .evaluate_perplexity import EvaluationArguments, evaluate_contexts, write_results
from .finetune import ModelArguments, make_trainer, run
from .model_card import fill_card

CONFIGURATION = ROOT / "configuration"
LOADER = Path(__file__).with_name("load_remote.py")
CHECKED_TOKENS = 1024  # the loading process must reproduce their logits
DOCUMENTS = 4  # to evaluate at least, if there are as many: the standard error of fewer means little
# Every step of the demo in half a minute.
QUICK = {"text": "stdlib", "document_bytes": 100_000, "sequence_length": 1024, "max_steps": 8}
QUICK_EVALUATION = {"contexts": [128, 256, 512, 1024], "targets": 512, "blocks": 4}


@dataclass
class DemoArguments:
    """Changes to the settings of the demo, `configuration/demo-training.json`."""

    text: str | None = field(default=None, metadata={"help": "As in finetune.py: 'stdlib', 'python', a folder, ..."})
    config: str = field(
        default=str(CONFIGURATION / "longnet-demo.json"),
        metadata={"help": "JSON file of the new model's LongNetConfig."},
    )
    steps: int | None = field(default=None, metadata={"help": "Training steps."})
    longest_context: int | None = field(
        default=None,
        metadata={"help": "Skip longer contexts, on which dense attention is slow. The targets stay the same."},
    )
    output: str = field(default="output", metadata={"help": "Folder for the model and the figures."})
    tokenizer: str | None = field(default=None, metadata={"help": "'bpe' or 'bytes' (ByT5's)."})
    baselines: list[str] = field(
        default_factory=lambda: [str(path) for path in BASELINES],
        metadata={"help": "perplexity.json of other runs of the demo, drawn beside this one."},
    )
    quick: bool = field(default=False, metadata={"help": "Run every step in half a minute; the model is useless."})


def read_settings(
    arguments: DemoArguments,
) -> tuple[ModelArguments, TextArguments, TrainingArguments]:
    """Read the demo's settings and apply the changes that the command line makes."""
    settings = json.loads((CONFIGURATION / "demo-training.json").read_text())
    if arguments.quick:
        settings |= QUICK
    changes = {
        "text": arguments.text,
        "config": arguments.config,
        "max_steps": arguments.steps,
        "tokenizer": arguments.tokenizer,
        "output_dir": str(Path(arguments.output) / "model"),
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": bfloat16_pays(),
    }
    settings |= {name: value for name, value in changes.items() if value is not None}
    parser = HfArgumentParser((ModelArguments, TextArguments, TrainingArguments))
    return parser.parse_dict(settings)


def bfloat16_pays() -> bool:
    """Return whether a matrix product is faster in bfloat16; it is not on a CPU without instructions for it."""
    if torch.accelerator.is_available():
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(1024, 1024, dtype=dtype)
        matrix @ matrix
        began = time.perf_counter()
        for _ in range(5):
            matrix @ matrix
        seconds[dtype] = time.perf_counter() - began
    return seconds[torch.bfloat16] < seconds[torch.float32]


def fit_evaluation(documents: dict[str, np.ndarray], evaluation: EvaluationArguments) -> EvaluationArguments:
    """Leave out contexts and shorten the scored blocks for which the documents are too short.

    At least `DOCUMENTS` documents, or all if there are fewer, are long enough for what is left.
    """
    lengths = sorted(map(len, documents.values()), reverse=True)
    room = lengths[min(DOCUMENTS, len(lengths)) - 1]
    targets = evaluation.targets
    while targets > 1 and targets + min(evaluation.contexts) // 2 > room:
        targets //= 2
    contexts = [c for c in evaluation.contexts if c + max(0, targets - c // 2) <= room]
    if not contexts:
        raise ValueError(
            f"The {DOCUMENTS} longest held-out documents, or all if there are fewer, have only {room} tokens or more, "
            f"too few for a context of {min(evaluation.contexts)}. Give longer text."
        )
    evaluation.contexts, evaluation.targets = contexts, targets
    return evaluation


def describe_training(
    trainer: Trainer, documents: dict[str, np.ndarray], text: TextArguments, model: ModelArguments
) -> dict:
    """Return what the model is and what it was trained on, for comparisons and for its card.

    `text_digest` covers all tokens: two models with equal digests were trained and scored on the same text.
    """
    digest = hashlib.sha256()
    for column in (trainer.train_dataset.with_format("numpy")[:]["input_ids"], *documents.values()):
        digest.update(np.ascontiguousarray(column, np.int32).data)
    config, state = trainer.model.config, trainer.state
    arguments, length, losses = (
        trainer.args,
        model.sequence_length,
        [log["loss"] for log in state.log_history if "loss" in log],
    )
    sequences = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["position_embedding", *parse_pattern("w1")]  # and every field of a pattern
    return {
        "text_digest": digest.hexdigest(),
        "model": {"parameters": trainer.model.num_parameters()} | {name: getattr(config, name) for name in names},
        "training": {
            "text": text.text,
            "documents_held_out": len(documents),
            "steps": state.global_step,
            "sequence_length": length,
            "tokens": state.global_step * length * sequences,
            "text_tokens": len(trainer.train_dataset) * length,
            "loss": float(np.mean(losses[-5:])) if losses else None,
            "bfloat16": arguments.bf16,
            "muon_learning_rate": model.muon_learning_rate,
            "learning_rate": arguments.learning_rate,
            "warmup_steps": arguments.warmup_steps,
            "seed": arguments.seed,
        },
    }


def check_loading(model: PreTrainedModel, tokens: np.ndarray, output: Path) -> None:
    """Load the saved folder in another process, without our package, and compare the logits."""
    model = model.to("cpu", torch.float32).eval()
    input_ids = torch.from_numpy(tokens[None, :CHECKED_TOKENS]).long()
    with torch.inference_mode():
        logits = model(input_ids, use_cache=False).logits
    with tempfile.TemporaryDirectory() as folder:
        expected = str(Path(folder) / "expected.safetensors")
        save_file({"input_ids": input_ids, "logits": logits.contiguous()}, expected)
        files = [str(output / "model"), expected, str(output / "sample.txt")]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": folder}
        subprocess.run([sys.executable, str(LOADER), *files], env=environment, check=True)


def main() -> None:
    """Run the demo; a text too short for the evaluation is refused before the training."""
    began = time.perf_counter()
    (arguments,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    output = Path(arguments.output)
    model_arguments, text_arguments, training_arguments = read_settings(arguments)
    text = load_text(text_arguments)
    trainer = make_trainer(model_arguments, training_arguments, text)
    tokenizer = trainer.processing_class
    documents = join_documents(tokenize(text["evaluation"], tokenizer))
    settings = QUICK_EVALUATION if arguments.quick else {}
    evaluation = fit_evaluation(documents, EvaluationArguments(model=str(output), **settings))
    longest = arguments.longest_context or max(evaluation.contexts)
    contexts = [context for context in evaluation.contexts if context <= longest]
    model = run(trainer)

    with torch.autocast(model.device.type, torch.bfloat16, enabled=training_arguments.bf16):
        results = evaluate_contexts(
            model,
            tokenizer,
            documents,
            contexts=contexts,
            targets=evaluation.targets,
            blocks=evaluation.blocks,
            longest=max(evaluation.contexts),
        )
    results |= describe_training(trainer, documents, text_arguments, model_arguments)
    baselines = read_baselines(results, [Path(file) for file in arguments.baselines])
    report = write_results(results, output, draw=lambda report, file: plot(report, baselines, file))
    if text_arguments.text in ("python", "stdlib"):  # the card describes no other text
        fill_card(report, baselines).save(output / "model" / "README.md")
    check_loading(model, max(documents.values(), key=len), output)
    print(f"Done in {(time.perf_counter() - began) / 60:.1f} minutes: {output}")


if __name__ == "__main__":
    main()
