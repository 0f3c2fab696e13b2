"""What switching a dense model to dilated attention costs, measured in minutes on a small Llama trained here.

    python -m examples.extend_llama [--text stdlib] [--output extended]

A Llama is trained on short sequences of real text. The same weights are then switched to each of several patterns, and
fine-tuned with it on longer sequences. The dense model gets the same fine-tuning, so the table also says what dense
attention would have reached. All are scored on the same held-out tokens under growing contexts.
"""

if not __package__:
    raise SystemExit("Run this as a module from the repository's root: python -m examples.extend_llama")

import argparse
import copy
import tempfile
from pathlib import Path

import numpy as np
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from modeling_longnet import parse_pattern, use_dilated_attention

from .corpus import TextArguments, join_documents, load_text, load_tokenizer, pack, tokenize
from .evaluate_perplexity import TUNED, evaluate_contexts, format_comparison, write_comparison
from .optimizer import MuonAndAdamW

SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
SIZES |= {"num_key_value_heads": 3, "tie_word_embeddings": True}
# One like the paper's, and windows with summaries, which do not change attention in texts of up to 256 tokens; in every
# second layer they can be twice as dense for the same work.
PATTERNS = ["256/1 1024/2 4096/4", "w256 4096/16:1 once", "w256 4096/8:1 once every2"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="stdlib", help="as in examples.finetune")
    parser.add_argument("--output", type=Path, default=Path("extended"), help="folder for the model, JSON and PNG")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence in the first training")
    parser.add_argument("--steps", type=int, default=300, help="steps of the first training, 8 sequences each")
    parser.add_argument("--long-length", type=int, default=4096, help="tokens of a sequence in the fine-tuning")
    parser.add_argument("--long-steps", type=int, default=100, help="steps of the fine-tuning, one sequence each")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="to switch to, as parse_pattern reads them")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--targets", type=int, default=1024, help="scored tokens of a block")
    parser.add_argument("--blocks", type=int, default=8, help="number of scored blocks of text")
    return parser.parse_args()


def train(model: PreTrainedModel, documents: dict[str, np.ndarray], length: int, steps: int, batch: int, rate: float):
    """Train on packed sequences of `length` tokens."""
    settings = TrainingArguments(
        output_dir=tempfile.gettempdir(), max_steps=steps, per_device_train_batch_size=batch, report_to="none",
        lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20), logging_steps=max(1, steps // 10),
        save_strategy="no",
    )  # fmt: skip
    optimizer = MuonAndAdamW(
        model.to(settings.device), learning_rate=rate, muon_learning_rate=10 * rate, weight_decay=0.1
    )
    Trainer(
        model=model, args=settings, train_dataset=pack(documents, length), data_collator=default_data_collator,
        optimizers=(optimizer, None),
    ).train()  # fmt: skip
    model.config.use_cache = True  # Trainer turned it off


def make_stages(
    tokenizer: PreTrainedTokenizerBase, documents: dict[str, np.ndarray], arguments: argparse.Namespace
) -> dict[str, PreTrainedModel]:
    """Return the models to compare, by name: dense and switched to each pattern, before and after fine-tuning."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=max(arguments.contexts), **SIZES,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    print(f"{model.num_parameters():,} parameters; training on sequences of {arguments.length:,} tokens")
    train(model, documents, arguments.length, arguments.steps, batch=8, rate=2e-3)
    stages = {"dense": model, f"dense{TUNED}": copy.deepcopy(model)}
    for pattern in arguments.patterns:
        for name in (pattern, f"{pattern}{TUNED}"):
            stages[name] = use_dilated_attention(copy.deepcopy(model), **parse_pattern(pattern))
    for name in filter(lambda name: name.endswith(TUNED), stages):
        print(f"{name}: {arguments.long_steps} steps on sequences of {arguments.long_length:,} tokens")
        train(stages[name], documents, arguments.long_length, arguments.long_steps, batch=1, rate=5e-4)
    return stages


def main() -> None:
    """Train, switch, fine-tune, score, and save the model of the last pattern."""
    arguments = parse()
    set_seed(0)
    text = load_text(TextArguments(text=arguments.text))
    tokenizer = load_tokenizer("bpe", text["train"], vocab_size=2048)
    documents = {part: join_documents(tokenize(text[part], tokenizer)) for part in ("train", "evaluation")}
    stages = make_stages(tokenizer, documents["train"], arguments)
    results = {}
    for name, model in stages.items():
        results[name] = evaluate_contexts(
            model, tokenizer, documents["evaluation"],
            contexts=arguments.contexts, targets=arguments.targets, blocks=arguments.blocks,
        )  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    stages[f"{arguments.patterns[-1]}{TUNED}"].save_pretrained(arguments.output / "model")
    tokenizer.save_pretrained(arguments.output / "model")
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    write_comparison(results, arguments.output, settings, trained=arguments.length)
    print(f"Perplexity +- standard error of {results['dense']['tokens']:,} held-out tokens")
    print(format_comparison(results))
    print(f"Written: {arguments.output}")


if __name__ == "__main__":
    main()
