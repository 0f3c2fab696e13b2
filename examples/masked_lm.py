"""Trains a masked language model, a bidirectional LongNet, with the stock Trainer and masking collator.

    python -m examples.masked_lm --text stdlib --output_dir out --max_steps 500 --learning_rate 1e-3

Prints the loss of held-out masked tokens before and after, and how the model fills a mask. Every option of
`TrainingArguments` works. `output_dir` holds the model, its tokenizer and its code. `AutoModelForMaskedLM` loads it;
`AutoModelForTokenClassification` and others take the encoder and add a head.
"""

if not __package__:
    raise SystemExit("Run this as a module from the repository's root: python -m examples.masked_lm")

from dataclasses import dataclass, field

from transformers import (
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from modeling_longnet import LongNetConfig, LongNetForMaskedLM

from .corpus import TextArguments, join_documents, load_text, load_tokenizer, pack, tokenize

MASK = "<|mask|>"


@dataclass
class ModelArguments:
    """A new encoder."""

    vocab_size: int = field(default=2048, metadata={"help": "Tokens of the new BPE tokenizer, without the mask."})
    sequence_length: int = field(default=2048, metadata={"help": "Tokens of a training sequence."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Number of blocks."})
    evaluation_sequences: int = field(default=32, metadata={"help": "Held-out sequences to score, at most."})
    mask_share: float = field(default=0.3, metadata={"help": "Share of the tokens to mask."})
    sample: str = field(
        default=f"for i in{MASK}(len(values)):", metadata={"help": f"Text to show at the end, with one {MASK}."}
    )


def make_trainer(arguments: ModelArguments, training_arguments: TrainingArguments, text) -> Trainer:
    """Makes the model and its tokenizer, and packs the text into sequences."""
    set_seed(training_arguments.seed)
    tokenizer = load_tokenizer("bpe", text["train"], vocab_size=arguments.vocab_size)
    tokenizer.add_special_tokens({"mask_token": MASK})
    config = LongNetConfig.for_context(
        arguments.sequence_length,
        effort=max(64, arguments.sequence_length // 2),
        num_attention_heads=arguments.hidden_size // 64 or 1,
        hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        is_causal=False,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.model_max_length = config.max_position_embeddings  # other tools truncate texts to it
    model = LongNetForMaskedLM(config)
    model.logits_with_labels = False  # the evaluation reads the loss alone
    sequences = {
        part: pack(join_documents(tokenize(text[part], tokenizer)), arguments.sequence_length).remove_columns("labels")
        for part in ("train", "evaluation")
    }
    return Trainer(
        model=model,
        args=training_arguments,
        train_dataset=sequences["train"],
        eval_dataset=sequences["evaluation"].take(min(len(sequences["evaluation"]), arguments.evaluation_sequences)),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=arguments.mask_share, seed=0),
        processing_class=tokenizer,
    )


def run(trainer: Trainer, sample: str) -> list[float]:
    """Trains and saves; returns the loss of masked tokens before and after."""
    losses = [trainer.evaluate()["eval_loss"]]
    trainer.train()
    losses.append(trainer.evaluate()["eval_loss"])
    trainer.save_model()
    print(f"loss of held-out masked tokens: {losses[0]:.3f} before, {losses[1]:.3f} after")
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    for guess in pipeline("fill-mask", model=model, tokenizer=trainer.processing_class)(sample):
        print(f"{guess['score']:.2f}  {guess['sequence']}")
    return losses


def main() -> None:
    """Trains with the options of the command line."""
    parser = HfArgumentParser((ModelArguments, TextArguments, TrainingArguments))
    model, text, training = parser.parse_args_into_dataclasses()
    run(make_trainer(model, training, load_text(text)), model.sample)


if __name__ == "__main__":
    main()
