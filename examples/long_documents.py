"""Long documents, before and after: fine-tune a model on long documents, score it on others, let it continue them.

    make demo                                      # once: the model to start from, output/model
    python -m examples.long_documents
    python -m examples.long_documents --text my_books --sequence-lengths 16384

By default a document is the folder of one of Transformers' models, file after file: names that its configuration
sets are used in its modeling code, and its classes resemble each other. The same model is fine-tuned on the documents
cut into sequences of each length, always on the same number of tokens, so the table says what longer sequences gain.
The folder `output` then holds

    LENGTH/            a fine-tuned model
    perplexity.json    the same held-out targets under growing context, before and after, and perplexity.png
    samples.md         how each model continues held-out documents
"""

if not __package__:
    raise SystemExit("Run this as a module from the repository's root: python -m examples.long_documents")

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import DatasetDict
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from .corpus import TextArguments, join_documents, load_text, read_tokenizer, tokenize
from .demo import bfloat16_pays
from .evaluate_perplexity import evaluate_contexts, format_comparison, write_comparison, write_whole
from .finetune import ModelArguments, make_trainer, run

SHOWN_TOKENS = 80  # of a prompt, in samples.md


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="output/model", help="folder or Hub name of the model to start from")
    parser.add_argument(
        "--text", help="as in examples.finetune; text that the model was trained on makes 'before' too good"
    )
    parser.add_argument("--split-seed", type=int, default=0, help="another seed holds out other documents")
    parser.add_argument(
        "--output", type=Path, default=Path("output/long_documents"), help="folder for all that is written"
    )
    parser.add_argument("--trained", type=int, default=2048, help="tokens of the model's own training sequences")
    parser.add_argument("--sequence-lengths", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--steps", type=int, default=96, help="of a fine-tuning")
    parser.add_argument("--step-tokens", type=int, default=16384, help="tokens per step; a multiple of each length")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW; Muon's is ten times that")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256 << i for i in range(8)])
    parser.add_argument("--targets", type=int, default=2048, help="scored tokens of a block")
    parser.add_argument("--blocks", type=int, default=12, help="number of scored blocks of text")
    parser.add_argument("--samples", type=int, default=3, help="documents to be continued")
    parser.add_argument("--sample-tokens", type=int, default=160, help="length of a continuation")
    arguments = parser.parse_args()
    for length in arguments.sequence_lengths:
        if length < 1 or arguments.step_tokens % length:
            parser.error(f"--sequence-lengths {length} does not divide --step-tokens {arguments.step_tokens}")
    if len(set(arguments.sequence_lengths)) < len(arguments.sequence_lengths):
        parser.error(f"--sequence-lengths {arguments.sequence_lengths}: give each length once")
    return arguments


def tune(arguments: argparse.Namespace, text: DatasetDict, length: int, bfloat16: bool) -> PreTrainedModel:
    """Fine-tune by `finetune.py`, as `python -m examples.finetune --sequence_length LENGTH ...` would."""
    model = ModelArguments(
        model_name_or_path=arguments.model, sequence_length=length, muon_learning_rate=10 * arguments.learning_rate
    )
    training = TrainingArguments(
        output_dir=str(arguments.output / str(length)), max_steps=arguments.steps,
        per_device_train_batch_size=arguments.step_tokens // length, learning_rate=arguments.learning_rate,
        adam_beta2=0.98, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=max(1, arguments.steps // 20),
        logging_steps=max(1, arguments.steps // 10), bf16=bfloat16,
        use_cpu=not torch.accelerator.is_available(), save_strategy="no", report_to="none", seed=0,
    )  # fmt: skip
    return run(make_trainer(model, training, text))


def cut_prompts(
    documents: dict[str, np.ndarray], tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> dict[str, tuple[np.ndarray, str]]:
    """Return the longest documents by name: token ids up to the end of a line, and the text that follows.

    Raises:
        ValueError: If in one of them no line ends before its last `arguments.sample_tokens` tokens.
    """
    longest = sorted(documents, key=lambda name: len(documents[name]), reverse=True)[: arguments.samples]
    prompts = {}
    for name in longest:
        ids = documents[name][: max(arguments.contexts)]
        places = range(len(ids) - arguments.sample_tokens - 1, 0, -1)  # from the last one down to one that ends a line
        end = next((i for i in places if "\n" in tokenizer.decode(ids[i - 1])), None)
        if end is None:
            raise ValueError(
                f"Document {name!r} has {len(ids)} tokens and no line ends before its last {arguments.sample_tokens}, "
                "so there is nothing to continue. Give longer text, or smaller --samples or --sample-tokens."
            )
        prompts[name] = ids[:end], tokenizer.decode(ids[end : end + arguments.sample_tokens])
    return prompts


@torch.inference_mode()
def go_on(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: np.ndarray, count: int) -> str:
    """Return at most `count` tokens of continuation, drawn with a fixed seed, up to where the model ends the file."""
    set_seed(0)
    ids = torch.from_numpy(prompt[None]).long().to(model.device)
    written = model.eval().generate(ids, max_new_tokens=count, do_sample=True, temperature=0.5, top_k=50)
    return tokenizer.decode(written[0, ids.shape[1] :])


def main() -> None:
    """Score and sample the model, then fine-tune, score and sample it at each sequence length."""
    arguments = parse()
    default = Path(transformers.__file__).parent / "models"
    text = load_text(TextArguments(text=arguments.text or str(default), split_seed=arguments.split_seed))
    tokenizer = read_tokenizer(arguments.model)
    documents = join_documents(tokenize(text["evaluation"], tokenizer))
    prompts = cut_prompts(documents, tokenizer, arguments)
    bfloat16 = bfloat16_pays()
    settings = vars(arguments) | {"bfloat16": bfloat16, "text": arguments.text or "transformers/models"}
    del settings["output"]
    ends = {name: tokenizer.decode(prompt[-SHOWN_TOKENS:]) for name, (prompt, _) in prompts.items()}
    results, written = {}, {name: {"the document": end} for name, (_, end) in prompts.items()}
    for length in (None, *arguments.sequence_lengths):
        if length is None:
            label, model = "before", AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
            model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        else:
            label, model = f"after, sequences of {length:,}", tune(arguments, text, length, bfloat16)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
            results[label] = evaluate_contexts(
                model, tokenizer, documents,
                contexts=arguments.contexts, targets=arguments.targets, blocks=arguments.blocks,
            )  # fmt: skip
        for document, (prompt, _) in prompts.items():
            written[document][label] = go_on(model, tokenizer, prompt, arguments.sample_tokens)
        write_comparison(results, arguments.output, settings, trained=arguments.trained)  # all that is known so far
        write_whole(arguments.output / "samples.md", format_samples(ends, written).encode())
    print(f"Perplexity +- standard error of {results['before']['tokens']:,} held-out tokens")
    print(format_comparison(results))
    print(f"Written: {arguments.output}")


def format_samples(ends: dict[str, str], written: dict[str, dict[str, str]]) -> str:
    """Format as Markdown the end of each prompt, then every model's continuation."""
    parts = []
    for name, end in ends.items():
        parts.append(f"## {name}\n\nThe last lines that were read:\n\n````text\n{end.rstrip()}\n````")
        for model, sample in written[name].items():
            parts.append(f"{model}:\n\n````text\n{sample.rstrip()}\n````")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
