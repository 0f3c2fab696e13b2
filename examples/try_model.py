"""Try a trained model at once: `make try`, or `make try FILE=my_text.py`.

`pretrained/` holds the weights, configuration and tokenizer of a model that the demo trained. With this package's code
added, a folder of it is written to `output/try/model`. A process that cannot import the package loads this folder by
its own code and lets the model write. Then the file's perplexity is measured under growing context. `output` holds

    model/            the folder, ready to upload
    sample.txt        what the loaded model wrote
    perplexity.json   the table, and perplexity.png the plot

    python -m examples.try_model --file my_text.py --output my_try
    python -m examples.try_model --store output    # the model of `make demo` becomes pretrained/ and docs/demo.json
"""

if not __package__:
    raise SystemExit("Run this as a module from the repository's root: python -m examples.try_model")

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import HfArgumentParser

from modeling_longnet import LongNetForCausalLM

from .compare import ROOT
from .corpus import COLUMNS, join_documents, read_document, read_tokenizer, tokenize
from .demo import bfloat16_pays, check_loading, fit_evaluation
from .evaluate_perplexity import EvaluationArguments, evaluate_contexts, load_model, write_results

PRETRAINED = ROOT / "pretrained"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CARD = ROOT / "model_card.md"
FILE_BYTES = 1_000_000  # read of the file, at most
# Half a minute on two cores.
EVALUATION = {"contexts": [32, 128, 512, 2048, 8192], "targets": 2048, "blocks": 8}
SPEEDS = ("seconds", "tokens_per_second")  # of one machine: not stored with a result


@dataclass
class TryArguments:
    """What to measure, or what to store."""

    file: str = field(
        default=str(ROOT / "modeling_longnet"),
        metadata={"help": "A text file, or a folder whose files are read as one text. By default the package's code."},
    )
    output: str = field(default="output/try", metadata={"help": "Folder for the model, the sample and the figures."})
    store: str | None = field(
        default=None, metadata={"help": "Output folder of the demo, whose model and results are to be stored instead."}
    )


def store(source: Path, pretrained: Path = PRETRAINED, results: Path = ROOT / "docs" / "demo.json") -> None:
    """Write the demo's model in bfloat16 to `pretrained`, and its scores to `results`."""
    model = LongNetForCausalLM.from_pretrained(source / "model", dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        read_tokenizer(str(source / "model")).save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        config.pop("auto_map")  # the folder holds no code
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        pretrained.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(Path(folder) / name, pretrained / name)
    store_results(source / "perplexity.json", results)


def store_results(source: Path, target: Path) -> None:
    """Copy the demo's results without the times, which depend on the machine."""
    report = {name: value for name, value in json.loads(source.read_text()).items() if name not in SPEEDS}
    report["training"] = {name: value for name, value in report["training"].items() if name not in SPEEDS}
    target.write_text(json.dumps(report, indent=2) + "\n")


def assemble(folder: Path, pretrained: Path = PRETRAINED) -> LongNetForCausalLM:
    """Write the model with the package's code, in float32, which is faster on many CPUs; return the model."""
    model = LongNetForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    model.save_pretrained(folder)
    for name in FILES:
        if name.startswith("tokenizer"):
            shutil.copyfile(pretrained / name, folder / name)
    shutil.copyfile(CARD, folder / "README.md")
    return model


def read_file(file: Path) -> Dataset:
    """Read the file, or all files of the folder, as one document."""
    rows = list(read_document(file.resolve(), "*", FILE_BYTES))
    if not rows:
        raise ValueError(f"{file} holds no UTF-8 text of at most {FILE_BYTES:,} bytes.")
    return Dataset.from_list(rows, features=COLUMNS)


def measure(folder: Path, text: Dataset, output: Path) -> None:
    """Load the folder by its own code, and write the perplexity of the text under growing context."""
    tokenizer = read_tokenizer(str(folder))
    documents = join_documents(tokenize(text, tokenizer))
    evaluation = EvaluationArguments(model=str(folder), trust_remote_code=True, **EVALUATION)
    evaluation = fit_evaluation(documents, evaluation)
    with torch.autocast("cpu", torch.bfloat16, enabled=not torch.cuda.is_available() and bfloat16_pays()):
        results = evaluate_contexts(
            load_model(evaluation).to(evaluation.device),
            tokenizer,
            documents,
            contexts=evaluation.contexts,
            targets=evaluation.targets,
            blocks=evaluation.blocks,
        )
    write_results({"text": next(iter(documents)), **results}, output)


def main() -> None:
    """Try the model, or store another one."""
    (arguments,) = HfArgumentParser(TryArguments).parse_args_into_dataclasses()
    if arguments.store is not None:
        store(Path(arguments.store))
        print(f"Stored in {PRETRAINED}. `make figures` draws and tabulates its results and fills model_card.md.")
        return
    text, output = read_file(Path(arguments.file)), Path(arguments.output)
    model = assemble(output / "model")
    print(f"{model.num_parameters():,} parameters, loaded from {output / 'model'} by its own code. It writes:\n")
    tokens = join_documents(tokenize(text, read_tokenizer(str(PRETRAINED))))
    check_loading(model, next(iter(tokens.values())), output)
    measure(output / "model", text, output)


if __name__ == "__main__":
    main()
