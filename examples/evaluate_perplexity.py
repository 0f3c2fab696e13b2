"""Perplexity of any causal language model on the same targets under several context lengths.

    python -m examples.evaluate_perplexity --model out/model --trust_remote_code True \\
        --text python --contexts 256 1024 4096 16384 65536

For a context of c tokens a window of c tokens slides over a document by half its length, and the
second half of each window is scored: every target sees at least c / 2 and fewer than c tokens. The
scored blocks, `targets` tokens long, are the same for all c; a window longer than two blocks ends
where its block ends. Writes `perplexity.json` and `perplexity.png`.
"""

if not __package__:
    raise SystemExit("Run this as a module from the repository's root: python -m examples.evaluate_perplexity")

import io
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import evaluate
import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .corpus import TextArguments, join_documents, load_text, read_tokenizer, tokenize
from .drawing import draw_line, make_figure, mark, name_lines, scale_tokens, styled

METRIC = Path(__file__).parent / "perplexity_by_context"
BATCH_TOKENS = 8_192  # tokens of short windows in a forward pass: enough to be efficient
READ_TOKENS = 32_768  # a longer context is read in pieces, with the model's cache
TUNED = ", fine-tuned"  # suffix of a model's name
BYTES_MARGIN = 8  # tokens before a block on which the decoding of its first characters depends


@dataclass
class EvaluationArguments:
    """What to evaluate."""

    model: str = field(metadata={"help": "Folder or Hub name of a causal language model."})
    output: str = field(default="perplexity", metadata={"help": "Folder for the JSON and PNG."})
    contexts: list[int] = field(
        default_factory=lambda: [32 << i for i in range(12)],
        metadata={"help": "Context lengths in tokens."},
    )
    targets: int = field(default=4096, metadata={"help": "Scored tokens of a block."})
    blocks: int = field(default=12, metadata={"help": "Number of scored blocks of text."})
    segment_lengths: list[int] | None = field(
        default=None,
        metadata={
            "help": "Read the same weights with these branches; a Llama or the like is switched to dilated attention."
        },
    )
    dilation_rates: list[int] | None = field(default=None, metadata={"help": "One for each segment length."})
    pattern: str | None = field(
        default=None,
        metadata={"help": "The same with a whole pattern, as parse_pattern reads it: 'w256 4096/16:1 once'."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the folder's own code."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the weights: float32 or bfloat16."})
    device: str = field(
        default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu",
        metadata={"help": "Where the model runs."},
    )


@dataclass(frozen=True)
class Block:
    """Target tokens [stop - targets, stop) of a document; `text_bytes` is their length in UTF-8."""

    document: str
    stop: int
    text_bytes: int


def check_contexts(contexts: list[int], targets: int) -> list[int]:
    """Returns the context lengths in ascending order; raises ValueError if windows of one do not tile the targets."""
    for context in contexts:
        if context < 2 or targets < 1 or targets % min(context // 2, targets):
            raise ValueError(
                f"Context {context} does not fit {targets} targets: half the context (rounded down) must divide the "
                "number of targets, or exceed it. Powers of two fit."
            )
    return sorted(set(contexts))


def place_blocks(
    documents: dict[str, np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    targets: int,
    count: int,
) -> list[Block]:
    """Places `count` blocks in the documents that are long enough for `targets` and the longest context.

    Each document gets as many blocks as any other (one more or less), spread evenly between its
    first `longest` tokens and its end, as far as they fit without sharing a target.

    Raises:
        ValueError: If no document is long enough; it says how long they are.
    """
    needed = longest + max(0, targets - longest // 2)
    long = {name: ids for name, ids in documents.items() if len(ids) >= needed}
    if not long:
        most = max((len(ids) for ids in documents.values()), default=0)
        raise ValueError(
            f"No document has the {needed} tokens that {targets} targets under a context of "
            f"{longest} need; the longest one has {most}. Ask for a shorter context, or give longer "
            "text (--text, --document_bytes)."
        )
    share, rest = divmod(count, len(long))
    blocks = []
    for number, (name, ids) in enumerate(long.items()):
        places = min(share + (number < rest), 1 + (len(ids) - needed) // targets)
        for stop in np.linspace(len(ids), needed, places, dtype=int):
            blocks.append(Block(name, int(stop), count_bytes(ids, int(stop), targets, tokenizer)))
    return blocks


def count_bytes(ids: np.ndarray, stop: int, targets: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Counts the UTF-8 bytes of the text of tokens [stop - targets, stop), without special tokens."""
    start = stop - targets
    before = max(0, start - BYTES_MARGIN)
    lengths = [len(tokenizer.decode(ids[before:end], skip_special_tokens=True).encode()) for end in (start, stop)]
    return lengths[1] - lengths[0]


def read_context(model: PreTrainedModel, tokens: torch.Tensor) -> dict:
    """Feeds a long context in pieces of `READ_TOKENS`. Memory then grows only with the model's cache;
    LongNet's stops growing.

    Returns:
        The keyword argument under which the model takes its cache; empty if the context is short.
    """
    past = {}
    if tokens.shape[1] <= READ_TOKENS:
        return past
    for piece in tokens.split(READ_TOKENS, dim=1):
        outputs = model(piece, logits_to_keep=1, use_cache=True, **past)
        # Transformers 5.17 and 5.24 give the cache one of two names.
        name = "cache" if "cache" in outputs else "past_key_values"
        past = {name: outputs[name]}
    return past


@torch.inference_mode()
def score_windows(model: PreTrainedModel, windows: torch.Tensor, scored: int) -> torch.Tensor:
    """Returns the negative log-likelihood in nats of each window's last `scored` tokens.

    Args:
        model: A causal language model in evaluation mode.
        windows: (N, context) int64 token ids, on the model's device.
        scored: Fewer than `context`.

    Returns:
        (N, scored) float32. Only `scored + 1` rows of logits per window are held, not `context`.
    """
    past = read_context(model, windows[:, : -scored - 1])
    rest = windows[:, -scored - 1 :] if past else windows
    logits = model(rest, logits_to_keep=scored + 1, use_cache=bool(past), **past).logits
    logits = logits[:, -scored - 1 : -1].transpose(1, 2).float()  # (N, vocabulary, scored)
    return cross_entropy(logits, windows[:, -scored:], reduction="none")


def score_block(model: PreTrainedModel, tokens: np.ndarray, context: int, targets: int) -> Iterator[list[float]]:
    """Yields, window batch by window batch, the losses of the last `targets` tokens in order.

    Args:
        tokens: (n,) token ids of a document up to the last target.
    """
    scored = min(context // 2, targets)
    tokens = torch.from_numpy(tokens[-(context - scored + targets) :]).long().to(model.device)
    windows = tokens.unfold(0, context, scored)  # (targets / scored, context)
    for batch in windows.split(max(1, BATCH_TOKENS // context)):
        yield score_windows(model, batch, scored).flatten().tolist()


def score_blocks(
    model: PreTrainedModel,
    documents: dict[str, np.ndarray],
    blocks: list[Block],
    contexts: list[int],
    targets: int,
) -> Iterator[dict]:
    """Yields the metric's inputs for every block under every context length."""
    scored = {context: min(context // 2, targets) for context in contexts}
    read = sum(context * (targets // scored[context]) for context in contexts) * len(blocks)
    with tqdm(desc="Evaluating", total=read, unit="tok", unit_scale=True) as progress:
        for context in contexts:
            progress.set_postfix(context=context)
            for block in blocks:
                tokens = documents[block.document][: block.stop]
                losses = []
                for part in score_block(model, tokens, context, targets):
                    losses += part
                    progress.update(len(part) // scored[context] * context)
                yield {
                    "contexts": context,
                    "documents": block.document,
                    "starts": block.stop - targets,
                    "targets": tokens[-targets:].tolist(),
                    "losses": losses,
                    "text_bytes": block.text_bytes,
                }


def evaluate_contexts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: dict[str, np.ndarray],
    *,
    contexts: list[int],
    targets: int,
    blocks: int,
    longest: int | None = None,
) -> dict:
    """Scores the same targets under each context length.

    Args:
        documents: Token ids by document; those too short for the longest context are left out.
        contexts, targets, blocks: As in `EvaluationArguments`.
        longest: A context, longer than all that are scored, for which to place the targets. A model that skips the
            longest contexts then has the same targets as one that does not.

    Returns:
        The results of the metric `perplexity_by_context`, with `targets` and `seconds`.
    """
    contexts = check_contexts(contexts, targets)
    began = time.perf_counter()
    longest = max(longest or 0, contexts[-1])
    places = place_blocks(documents, tokenizer, longest=longest, targets=targets, count=blocks)
    metric = evaluate.load(str(METRIC))
    model.eval()
    for inputs in score_blocks(model, documents, places, contexts, targets):
        metric.add(**inputs)
    seconds = round(time.perf_counter() - began, 1)
    return {**metric.compute(), "targets": targets, "seconds": seconds}


def format_error(value: float, error: float, digits: int) -> str:
    """Formats a value +- its standard error; the error is left out if it is NaN, as for a single block."""
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" +- {error:.{digits}f}")


def format_table(results: dict) -> str:
    """Formats one line per context length; errors are one standard error."""
    lines = [
        f"The same {results['tokens']:,} targets ({results['blocks']} blocks of "
        f"{results['targets']:,} tokens in {results['documents']} documents), +- standard error",
        f"{'context':>8} {'perplexity':>18} {'bits per byte':>18} {'saved by context':>20}",
    ]
    for row, context in enumerate(results["contexts"]):
        cells = [
            format_error(results[name][row], results[name + "_error"][row], digits)
            for name, digits in (
                ("perplexity", 2),
                ("bits_per_byte", 4),
                ("bits_saved_per_byte", 4),
            )
        ]
        lines.append(f"{context:>8} {cells[0]:>18} {cells[1]:>18} {cells[2]:>20}")
    return "\n".join(lines)


@styled
def plot(results: dict, file: Path) -> None:
    """Draw perplexity and bits saved against the context; the bands are one standard error.

    Args:
        results: As `evaluate_contexts` returns them.
    """
    figure = make_figure()
    panels = {"perplexity": "Perplexity of the same text", "bits_saved_per_byte": "Bits per byte saved by context"}
    for axis, (name, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        value, error = np.array(results[name], float), np.array(results[f"{name}_error"], float)
        axis.fill_between(results["contexts"], value - error, value + error, alpha=0.15, linewidth=0)
        draw_line(axis, results["contexts"], value, None, "longnet")
        axis.set(title=title, xlabel="context (tokens)")
        scale_tokens(axis.xaxis)
    write_figure(figure, file)


def format_comparison(results: dict[str, dict]) -> str:
    """Formats perplexity and standard error, one line per context and one column per model."""
    names = list(results)
    width = max(22, *map(len, names)) + 2
    lines = ["context" + "".join(f"{name:>{width}}" for name in names)]
    for row, context in enumerate(results[names[0]]["contexts"]):
        cells = (format_error(r["perplexity"][row], r["perplexity_error"][row], 2) for r in results.values())
        lines.append(f"{context:>7}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


@styled
def plot_comparison(results: dict[str, dict], file: Path, *, trained: int) -> None:
    """Draw several models' perplexity against context, and mark the length of their first training.

    Args:
        results: By model, as `evaluate_contexts` returns them. Models named "..., fine-tuned" get a panel of their own,
            in the colours that they have without the word.
        trained: Tokens of a sequence in the first training.
    """
    first = {name: result for name, result in results.items() if not name.endswith(TUNED)}
    tuned = {name.removesuffix(TUNED): result for name, result in results.items() if name.endswith(TUNED)}
    panels = {"Perplexity of the same text": first} | ({"The same, fine-tuned": tuned} if tuned else {})
    figure = make_figure(height=4 * len(panels))
    axes = figure.subplots(len(panels), sharey=True, squeeze=False).flat
    colors = {name: f"C{number}" for number, name in enumerate(x for x in first if x != "dense")} | {"dense": "dense"}
    for axis, (title, models) in zip(axes, panels.items(), strict=True):
        for name, result in models.items():
            draw_line(axis, result["contexts"], result["perplexity"], name, colors.get(name, "other"))
        if trained is not None:
            mark(axis, trained, "length of the first training")
        scale_tokens(axis.xaxis)
        axis.set(xlabel="context (tokens)", title=title)
        name_lines(axis)
    write_figure(figure, file)


def write_comparison(results: dict[str, dict], folder: Path, settings: dict, *, trained: int) -> None:
    """Writes several models' results with the settings and the machine, and their plot; arguments as above."""
    scores = {name: for_json(result) for name, result in results.items()}
    report = json.dumps(describe_machine() | {"settings": settings, "results": scores}, indent=2, allow_nan=False)
    write_whole(folder / "perplexity.json", report.encode() + b"\n")
    plot_comparison(results, folder / "perplexity.png", trained=trained)


def write_figure(figure: Figure, file: Path) -> None:
    """Writes a PNG, whole or not at all."""
    png = io.BytesIO()
    figure.savefig(png)
    write_whole(file, png.getvalue())


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file at once, so that no reader sees half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(content)
    partial.replace(file)


def command_line() -> str:
    """Return the command that started this process, with the module's name instead of its file."""
    module = sys.modules["__main__"].__spec__
    started = ["-m", module.name] if module else sys.argv[:1]
    return shlex.join(["python", *started, *sys.argv[1:]])


def describe_machine() -> dict[str, str]:
    """Returns the command, machine, versions and date, for a result file."""
    return {
        "command": command_line(),
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {(n := torch.get_num_threads())} thread{'s' * (n > 1)}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def for_json(results: dict) -> dict:
    """Replaces NaN, the standard error of a single block, by None: JSON has no NaN."""
    return {
        name: [None if math.isnan(x) else x for x in value] if name.endswith("_error") else value
        for name, value in results.items()
    }


def write_results(results: dict, folder: Path, *, draw: Callable[[dict, Path], None] = plot) -> dict:
    """Print the table, write it with the machine it ran on, draw what was written, and return that."""
    print(format_table(results))
    report = {**for_json(results), **describe_machine()}
    write_whole(folder / "perplexity.json", json.dumps(report, indent=2, allow_nan=False).encode() + b"\n")
    draw(report, folder / "perplexity.png")
    print(f"Written: {folder / 'perplexity.json'} and {folder / 'perplexity.png'}")
    return report


def load_model(arguments: EvaluationArguments) -> PreTrainedModel:
    """Loads the model with the branches given: a LongNet's are replaced, another decoder is switched to them."""
    trust = {"trust_remote_code": arguments.trust_remote_code}
    given = {"segment_lengths": arguments.segment_lengths, "dilation_rates": arguments.dilation_rates}
    branches = {name: value for name, value in given.items() if value is not None}
    if arguments.pattern is not None:
        # Imported only here: an import above would replace the code of a LongNet's folder.
        from modeling_longnet import parse_pattern

        branches |= parse_pattern(arguments.pattern)
    config = AutoConfig.from_pretrained(arguments.model, **trust)
    if config.model_type == "longnet":
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype, **trust, **branches)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype, **trust)
    if branches or hasattr(config, "dilated_attention"):
        from modeling_longnet import use_dilated_attention

        use_dilated_attention(model, **branches)
    return model


def main() -> None:
    """Evaluates the model that the command line names."""
    parser = HfArgumentParser((EvaluationArguments, TextArguments))
    arguments, text_arguments = parser.parse_args_into_dataclasses()
    check_contexts(arguments.contexts, arguments.targets)
    tokenizer = read_tokenizer(arguments.model, trust_remote_code=arguments.trust_remote_code)
    model = load_model(arguments)
    text = load_text(text_arguments)["evaluation"]
    results = evaluate_contexts(
        model.to(arguments.device),
        tokenizer,
        join_documents(tokenize(text, tokenizer)),
        contexts=arguments.contexts,
        targets=arguments.targets,
        blocks=arguments.blocks,
    )
    branches = {"segment_lengths": arguments.segment_lengths, "dilation_rates": arguments.dilation_rates}
    branches |= {"pattern": arguments.pattern} if arguments.pattern is not None else {}
    write_results({"model": arguments.model, **branches, **results}, Path(arguments.output))


if __name__ == "__main__":
    main()
