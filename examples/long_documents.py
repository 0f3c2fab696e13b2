"""Long documents, before and after: fine-tune a model on whole documents, score it on others, let it continue them.

    make demo                                      # once: the model to start from, output/model
    python examples/long_documents.py
    python examples/long_documents.py --text my_books --sequence-lengths 16384

By default a document is the folder of one of Transformers' models, file after file: names that its configuration
sets are used in its modeling code, and its classes resemble each other. The same model is fine-tuned on sequences of
each length, always on the same number of tokens, so the table says what longer sequences bring. The folder `output`
then holds

    LENGTH/            a fine-tuned model
    perplexity.json    the same held-out targets under growing context, before and after, and perplexity.png
    samples.md         how each model goes on where a held-out document is cut
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from corpus import TextArguments, join_documents, load_text, tokenize
from demo import bfloat16_pays
from evaluate_perplexity import (
    describe_machine,
    evaluate_contexts,
    for_json,
    format_comparison,
    plot_comparison,
    write_whole,
)
from finetune import ModelArguments, make_trainer, run
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

SHOWN_LINES = 6  # of a prompt, in samples.md


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="output/model", help="folder or Hub name of the model to start from")
    parser.add_argument(
        "--text", default=str(Path(transformers.__file__).parent / "models"), help="as in examples/finetune.py"
    )
    parser.add_argument("--output", type=Path, default=Path("long_documents"), help="folder for all that is written")
    parser.add_argument("--trained", type=int, default=2048, help="tokens of the model's own training sequences")
    parser.add_argument("--sequence-lengths", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--steps", type=int, default=96, help="of a fine-tuning")
    parser.add_argument("--step-tokens", type=int, default=16384, help="a step; the sequence lengths divide it")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW; Muon's is ten times that")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256 << i for i in range(8)])
    parser.add_argument("--targets", type=int, default=2048, help="scored tokens of a block")
    parser.add_argument("--blocks", type=int, default=12, help="scored stretches of text")
    parser.add_argument("--samples", type=int, default=3, help="documents to be continued")
    parser.add_argument("--sample-tokens", type=int, default=160, help="length of a continuation")
    arguments = parser.parse_args()
    for length in arguments.sequence_lengths:
        if length < 1 or arguments.step_tokens % length:
            parser.error(f"--sequence-lengths {length} does not divide --step-tokens {arguments.step_tokens}")
    return arguments


def tune(arguments: argparse.Namespace, text: dict, length: int) -> PreTrainedModel:
    """Fine-tune by `finetune.py`, as `python examples/finetune.py --sequence_length LENGTH ...` would."""
    model = ModelArguments(
        model_name_or_path=arguments.model, sequence_length=length, muon_learning_rate=10 * arguments.learning_rate
    )
    training = TrainingArguments(
        output_dir=str(arguments.output / str(length)), max_steps=arguments.steps,
        per_device_train_batch_size=arguments.step_tokens // length, learning_rate=arguments.learning_rate,
        adam_beta2=0.98, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=max(1, arguments.steps // 20),
        logging_steps=max(1, arguments.steps // 10), bf16=bfloat16_pays(),
        use_cpu=not torch.accelerator.is_available(), save_strategy="no", report_to="none", seed=0,
    )  # fmt: skip
    return run(make_trainer(model, training, text))


def cut_prompts(
    documents: dict[str, np.ndarray], tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> dict[str, tuple[str, str]]:
    """The longest documents by name: each up to the end of a line, and how it really goes on."""
    longest = sorted(documents, key=lambda name: len(documents[name]), reverse=True)[: arguments.samples]
    prompts = {}
    for name in longest:
        ids = documents[name][: max(arguments.contexts)]
        text = tokenizer.decode(ids[: -arguments.sample_tokens])
        prompt = text[: text.rfind("\n") + 1] or text
        prompts[name] = prompt, tokenizer.decode(ids)[len(prompt) :]
    return prompts


@torch.inference_mode()
def go_on(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, count: int) -> str:
    """A continuation of `count` tokens, drawn with a fixed seed."""
    set_seed(0)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids.to(model.device)
    written = model.eval().generate(ids, max_new_tokens=count, do_sample=True, temperature=0.5, top_k=50)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Score and sample the model, then fine-tune, score and sample it at each sequence length."""
    arguments = parse()
    text = load_text(TextArguments(text=arguments.text))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    documents = join_documents(tokenize(text["evaluation"], tokenizer))
    prompts = cut_prompts(documents, tokenizer, arguments)
    results, written = {}, {name: {"the document": end} for name, (_, end) in prompts.items()}
    for name in ("before", *arguments.sequence_lengths):
        if name == "before":
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
        else:
            model, name = tune(arguments, text, name), f"after, sequences of {name:,}"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16_pays()):
            results[name] = evaluate_contexts(
                model, tokenizer, documents,
                contexts=arguments.contexts, targets=arguments.targets, blocks=arguments.blocks,
            )  # fmt: skip
        for document, (prompt, _) in prompts.items():
            written[document][name] = go_on(model, tokenizer, prompt, arguments.sample_tokens)
        write(results, prompts, written, arguments)
    print(f"Perplexity +- standard error of {results['before']['tokens']:,} held-out tokens")
    print(format_comparison(results))
    print(f"Written: {arguments.output}")


def write(results: dict[str, dict], prompts: dict, written: dict, arguments: argparse.Namespace) -> None:
    """All that is known so far."""
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "text", "model")}
    scores = {name: for_json(result) for name, result in results.items()}
    report = (
        json.dumps(describe_machine() | {"settings": settings, "results": scores}, indent=2, allow_nan=False) + "\n"
    )
    write_whole(arguments.output / "perplexity.json", report.encode())
    plot_comparison(results, arguments.output / "perplexity.png", trained=arguments.trained)
    write_whole(arguments.output / "samples.md", format_samples(prompts, written).encode())


def format_samples(prompts: dict[str, tuple[str, str]], written: dict[str, dict[str, str]]) -> str:
    """Markdown: the end of each prompt, then every model's continuation."""
    parts = []
    for name, (prompt, _) in prompts.items():
        end = "\n".join(prompt.rstrip("\n").split("\n")[-SHOWN_LINES:])
        parts.append(f"## {name}\n\nThe last of {prompt.count(chr(10)):,} lines that were read:")
        parts.append(f"````text\n{end}\n````")
        for model, sample in written[name].items():
            parts.append(f"{model}:\n\n````text\n{sample.rstrip()}\n````")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
