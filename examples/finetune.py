"""Trains a causal language model on long packed sequences with the stock Trainer.

    python -m examples.finetune --config configuration/longnet-demo.json --text stdlib \\
        --output_dir out --max_steps 500 --learning_rate 2e-3
    python -m examples.finetune --model_name_or_path out --text my_folder --output_dir more
    python -m examples.finetune settings.json
    accelerate launch --config_file configuration/accelerate/ddp.yaml -m examples.finetune ...

Every option of `TrainingArguments` works: `--bf16`, `--gradient_accumulation_steps`,
`--resume_from_checkpoint last`, `--push_to_hub`. `output_dir` holds the model, its tokenizer and,
for a LongNet, the code that loads it without this package.
"""

if not __package__:
    raise SystemExit("Run this as a module from the repository's root: python -m examples.finetune")

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import DatasetDict
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from modeling_longnet import LongNetConfig, LongNetForCausalLM, SequenceSharding

from .corpus import TextArguments, join_documents, load_text, load_tokenizer, pack, tokenize
from .optimizer import MuonAndAdamW


@dataclass
class ModelArguments:
    """Which model to train: exactly one of `model_name_or_path` and `config`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a causal model to continue from."}
    )
    config: str | None = field(default=None, metadata={"help": "JSON file of a LongNetConfig for a new model."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "'bpe' (trained on the text; the default for a new model), 'bytes' (ByT5's), "
            "or a folder or Hub name (by default the model's)."
        },
    )
    vocab_size: int = field(default=2048, metadata={"help": "Tokens of a new BPE."})
    sequence_length: int = field(default=8192, metadata={"help": "Tokens of a training sequence."})
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Train the blocks' matrices by Muon at this rate, say 0.02, and the rest by AdamW."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the folder's own code."})


def load_model(arguments: ModelArguments, text: DatasetDict) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model to continue from, or makes a new one for its tokenizer's vocabulary."""
    if (arguments.model_name_or_path is None) == (arguments.config is None):
        raise ValueError(
            f"model_name_or_path is {arguments.model_name_or_path!r} and config is "
            f"{arguments.config!r}: give one of them, a model to continue from or a new one's config."
        )
    if arguments.config is not None and not Path(arguments.config).exists():
        raise FileNotFoundError(
            f"config: no file {arguments.config!r} here ({Path.cwd()}). The ready-made ones are in configuration/."
        )
    name = arguments.tokenizer or arguments.model_name_or_path or "bpe"
    tokenizer = load_tokenizer(
        name,
        text["train"],
        vocab_size=arguments.vocab_size,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.model_name_or_path is not None:
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model_name_or_path,
            dtype="float32",  # weights to train; --bf16 computes in bfloat16
            trust_remote_code=arguments.trust_remote_code,
        )
        return model, tokenizer
    config = LongNetConfig.from_pretrained(
        arguments.config,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.model_max_length = config.max_position_embeddings  # other tools truncate texts to it
    return LongNetForCausalLM(config), tokenizer


def make_trainer(arguments: ModelArguments, training_arguments: TrainingArguments, text: DatasetDict) -> Trainer:
    """Makes the model and packs the text into sequences, ready to train.

    Args:
        text: `train`, and `evaluation` if `training_arguments.do_eval` is set.
    """
    set_seed(training_arguments.seed)
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        training_arguments.parallelism_config = SequenceSharding()  # sizes from the launch configuration
    model, tokenizer = load_model(arguments, text)
    model.logits_with_labels = False  # the evaluation reads the loss alone
    optimizer = None
    if arguments.muon_learning_rate is not None:
        optimizer = MuonAndAdamW(
            model.to(training_arguments.device),
            learning_rate=training_arguments.learning_rate,
            muon_learning_rate=arguments.muon_learning_rate,
            betas=(training_arguments.adam_beta1, training_arguments.adam_beta2),
            weight_decay=training_arguments.weight_decay,
        )
    parts = ["train", "evaluation"] if training_arguments.do_eval else ["train"]
    sequences = {
        part: pack(join_documents(tokenize(text[part], tokenizer)), arguments.sequence_length) for part in parts
    }
    print(
        f"{model.num_parameters():,} parameters, {len(tokenizer):,} kinds of tokens, "
        f"{len(sequences['train']):,} sequences of {arguments.sequence_length:,} tokens"
    )
    return Trainer(
        model=model,
        args=training_arguments,
        train_dataset=sequences["train"],
        eval_dataset=sequences.get("evaluation"),
        data_collator=default_data_collator,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )


def run(trainer: Trainer) -> PreTrainedModel:
    """Trains, saves the model and its tokenizer in `output_dir`, and pushes them if asked.

    Returns:
        The trained model, without the autocast in which Trainer wraps its forward pass.
    """
    trainer.train(resume_from_checkpoint=find_checkpoint(trainer.args))
    trainer.model.config.use_cache = True  # Trainer turned it off
    trainer.save_model()
    trainer.save_state()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def find_checkpoint(arguments: TrainingArguments) -> str | None:
    """Returns the checkpoint to resume from: a path as given, or the `last` complete one in `output_dir`."""
    if arguments.resume_from_checkpoint != "last":
        return arguments.resume_from_checkpoint
    folders = [path for path in Path(arguments.output_dir).glob("checkpoint-*") if path.name[11:].isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name[11:]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text("utf-8"))  # Trainer writes it last
            return str(folder)
        except (OSError, ValueError):
            print(f"{folder} is skipped: it was not written completely")
    raise ValueError(f"{arguments.output_dir!r} holds no checkpoint to resume from: omit --resume_from_checkpoint.")


def main() -> None:
    """Trains with the options of the command line, or of the one JSON file that it names."""
    parser = HfArgumentParser((ModelArguments, TextArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model, text, training = parser.parse_json_file(sys.argv[1])
    else:
        model, text, training = parser.parse_args_into_dataclasses()
    run(make_trainer(model, training, load_text(text)))


if __name__ == "__main__":
    main()
