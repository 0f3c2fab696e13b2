"""Fill the model card of a model that the demo trained: the template beside this file, with the demo's JSON.

python -m examples.model_card     # model_card.md of this repository, from docs/demo*.json
"""

if not __package__:
    raise SystemExit("Run this as a module from the repository's root: python -m examples.model_card")

import json
import math
from pathlib import Path
from string import Template

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .compare import BASELINES, ROOT, describe_pattern, is_same_text, name_reports, read_baselines

TEMPLATE = Path(__file__).with_name("model_card_template.md")
CARD = ROOT / "model_card.md"
DATASET = "installed-python-packages"
SHOWN = (512, 2048, 65_536)  # contexts of the results in the metadata


def fill_card(report: dict, baselines: list[dict]) -> ModelCard:
    """Return the card of the demo's model; all its numbers come from the reports, `perplexity.json` of the demo."""
    model, training = report["model"], report["training"]
    drawn = training.get("text_tokens")
    others = sorted({other["date"] for other in baselines if not is_same_text(other, report)})
    fields = {
        "parameters": f"{model['parameters']:,}",
        "parameters_short": f"{model['parameters'] / 1e6:.1f} million",
        "layers": model["num_hidden_layers"],
        "hidden_size": model["hidden_size"],
        "heads": model["num_attention_heads"],
        "vocab_size": f"{model['vocab_size']:,}",
        "pattern": describe_pattern(model),
        "positions": model["position_embedding"],
        "training_tokens": f"{training['tokens']:,}",
        "sequence_length": f"{training['sequence_length']:,}",
        "text": training["text"],
        "text_tokens": f" {drawn:,} tokens are left for training, of which one run reads a part." if drawn else "",
        "steps": f"{training['steps']:,}",
        "precision": "bfloat16" if training["bfloat16"] else "float32",
        "targets": f"{report['tokens']:,}",
        "blocks": report["blocks"],
        "documents": report["documents"],
        "other_text": (
            f" Those of {', '.join(others)} used slightly different text: that day's packages." if others else ""
        ),
        "table": tabulate(report, baselines),
        "findings": compare(report, baselines),
        "bibtex": cite(),
    }
    fields |= {name: report[name] for name in ("command", "machine", "torch", "transformers", "date")}
    fields |= {name: training[name] for name in ("muon_learning_rate", "learning_rate", "warmup_steps", "seed")}
    text = Template(TEMPLATE.read_text("utf-8")).substitute(fields)
    return ModelCard(f"---\n{describe_metadata(report).to_yaml()}\n---\n\n{text}")


def describe_metadata(report: dict) -> ModelCardData:
    """Return the metadata, with the evaluation as the Hub's model index."""
    held_out = f"held-out packages, {report['tokens']:,} tokens"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=DATASET,
            dataset_name=f"Python code of installed packages ({held_out})",
            dataset_split="evaluation",
            metric_type="perplexity",
            metric_name=f"perplexity, context of {context:,} tokens",
            metric_value=round(value, 2),
        )
        for context, value in zip(report["contexts"], report["perplexity"], strict=True)
        if context in SHOWN or len(report["contexts"]) < len(SHOWN)
    ]
    return ModelCardData(
        model_name="longnet-demo",
        language=["en", "code"],
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["longnet", "dilated-attention", "long-context", "custom_code", "code"],
        datasets=[DATASET],
        metrics=["perplexity"],
        eval_results=results or None,
    )


def tabulate(report: dict, baselines: list[dict]) -> str:
    """Return a line for each context and a column for each model."""
    models = name_reports([report, *baselines])
    lines = ["| context | " + " | ".join(models) + " |", "| ---: |" + " ---: |" * len(models)]
    for context in report["contexts"]:
        cells = []
        for scores in models.values():
            if context not in scores["contexts"]:
                cells.append("")
                continue
            place = scores["contexts"].index(context)
            error = scores["perplexity_error"][place]
            known = error is not None and not math.isnan(error)
            cells.append(f"{scores['perplexity'][place]:.1f}" + (f" +- {error:.1f}" if known else ""))
        lines.append(f"| {context:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(report: dict, baselines: list[dict]) -> str:
    """Say where the model's perplexity is lowest, and compare it with each other model's at the same contexts."""
    scores = dict(zip(report["contexts"], report["perplexity"], strict=True))
    best = min(scores, key=scores.get)
    sentences = [f"Its lowest perplexity is {scores[best]:.2f}, at a context of {best:,} tokens."]
    for name, other in list(name_reports([report, *baselines]).items())[1:]:
        theirs = dict(zip(other["contexts"], other["perplexity"], strict=True))
        shared = sorted(scores.keys() & theirs.keys())
        at = [n for n in dict.fromkeys((report["training"]["sequence_length"], shared[-1])) if n in shared]
        ratios = " and ".join(f"{scores[n] / theirs[n]:.3f} at {n:,}" for n in at)
        sentences.append(f"Its perplexity divided by that of the column *{name}* is {ratios}.")
        if name.endswith("repeated"):
            sentences.append(
                "That column is the same training run again: with another number of threads or other packages, runs "
                "differ by this much, so smaller differences between columns mean nothing."
            )
    return " ".join(sentences)


def cite() -> str:
    """Return the BibTeX entry of the paper, from CITATION.cff."""
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    return (
        f"@article{{ding2023longnet,\n  title   = {{{paper['title']}}},\n  author  = {{{names}}},\n"
        "  journal = {arXiv preprint arXiv:2307.02486},\n  year    = {2023}\n}"
    )


def make_repository_card(docs: Path = ROOT / "docs") -> ModelCard:
    """Return the card of the model in `pretrained/`, from the stored results."""
    report = json.loads((docs / "demo.json").read_text())
    return fill_card(report, read_baselines(report, [docs / path.name for path in BASELINES]))


if __name__ == "__main__":
    make_repository_card().save(CARD)
    print(f"Written: {CARD}")
