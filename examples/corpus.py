"""Text for the examples: documents read offline, a split that leaks no file, packed sequences.

A row of a corpus is one file; rows of one `document` are adjacent. A document is a whole package,
because its files resemble each other: this is where a long context helps.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets import Sequence as SequenceFeature
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

COLUMNS = Features({"document": Value("string"), "path": Value("string"), "text": Value("string")})
TOKENS = SequenceFeature(Value("int32"))

# Tests repeat one another, and vendored packages are copies of other packages.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "_vendor", "vendor", "site-packages"}
SKIPPED_FOLDERS |= {"dist-packages", "__pycache__", ".git", "node_modules"}
# This package's own files change from day to day; with them a seed would not fix the text.
SKIPPED_PACKAGES = {"modeling_longnet"}
# Installed for the tests, on Linux only. Leaving it out keeps the text the same elsewhere.
SKIPPED_PACKAGES |= {"triton"}
DATA_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

LONGEST_FILE = 1_000_000  # bytes; a longer file is a table, not text that somebody wrote
TOKENIZER_TEXT = 8_000_000  # characters that a tokenizer is trained on: more would change few merges
COPIED_LINE = 24  # characters; shorter lines may agree by chance
COPY_LINES, COPY_SHARE = 20, 0.5  # a copy shares at least this many lines and this share of a file's lines


@dataclass
class TextArguments:
    """Which text to read, and which part of it to hold out of the training."""

    text: str = field(
        default="python",
        metadata={
            "help": "'stdlib' (Python's standard library), 'python' (that and the installed libraries), a "
            "folder, a file, or a dataset: a data file, a saved one, or its name on the Hub."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column of a dataset that holds the text."})
    document_bytes: int = field(default=1_000_000, metadata={"help": "Documents with more bytes are cut."})
    held_out: float = field(default=0.1, metadata={"help": "Share of the text, in whole documents, for evaluation."})
    split_seed: int = field(default=0, metadata={"help": "Another seed holds out other documents."})


def load_text(arguments: TextArguments) -> DatasetDict:
    """Return the text as `train` and `evaluation`; no file of one is in the other."""
    corpus = read_documents(
        arguments.text,
        document_bytes=arguments.document_bytes,
        text_column=arguments.text_column,
    )
    return split_documents(corpus, held_out=arguments.held_out, seed=arguments.split_seed)


def read_documents(source: str, *, document_bytes: int, text_column: str = "text") -> Dataset:
    """Reads a corpus in an order that depends on the files alone.

    Args:
        source: `"stdlib"`, this Python's standard library; `"python"`, that and every
            installed library; a folder (each entry is a document, a sub-folder with all its
            files), a file, a data file (json, jsonl, csv, parquet) or a dataset saved by
            `save_to_disk` (each row is a document); or the name of a dataset on the Hub.
        document_bytes: How many bytes of a document to read at most, in whole files, so that no
            package outweighs all others.
        text_column: The column that holds the text of a dataset's rows.

    Returns:
        Rows of `document`, `path` and `text`, one per file.

    Raises:
        ValueError: If the source holds no text or no such column.
    """
    path = Path(source)
    if source in ("python", "stdlib"):
        entries = python_packages(libraries=source == "python")
    elif path.is_dir() and not (path / "state.json").exists():
        entries = sorted(path.iterdir())
    elif path.is_file() and path.suffix not in DATA_FORMATS:
        entries = [path]
    else:
        return rows_as_documents(source, text_column)
    code_only = source in ("python", "stdlib")
    pattern = "*.py" if code_only else "*"
    rows = [
        row
        for entry in tqdm(entries, desc="Reading documents", unit="document")
        for row in read_document(entry, pattern, document_bytes)
    ]
    if not rows:
        raise ValueError(f"{source!r} holds no text. Give a folder, file or dataset with UTF-8 text.")
    return Dataset.from_list(rows, features=COLUMNS)


def python_packages(*, libraries: bool) -> list[Path]:
    """Top-level modules and packages of the standard library and of the installed libraries."""
    roots = [sysconfig.get_path("stdlib")]
    if libraries:
        roots += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    packages = {}  # the first of two roots wins, as in an import
    for root in map(Path, roots):
        for entry in sorted(root.iterdir()):
            if entry.is_dir() or entry.suffix == ".py":
                packages.setdefault(entry.stem, entry)
    return [packages[name] for name in sorted(packages.keys() - SKIPPED_PACKAGES)]


def read_document(entry: Path, pattern: str, document_bytes: int) -> Iterator[dict[str, str]]:
    """Yields the files of a module or folder; files of one folder are adjacent."""
    if entry.name in SKIPPED_FOLDERS:
        return
    files = sorted(entry.rglob(pattern)) if entry.is_dir() else [entry]
    left = document_bytes
    for file in files:
        inner = file.relative_to(entry.parent)
        if SKIPPED_FOLDERS.intersection(inner.parts) or not file.is_file():
            continue
        text = read_text(file, limit=LONGEST_FILE if entry.is_dir() else document_bytes)
        left -= len(text.encode())
        if text and left < 0 and len(files) > 1:
            return
        if text:
            yield {"document": entry.name, "path": inner.as_posix(), "text": text}


def read_text(file: Path, *, limit: int) -> str:
    """Returns a file's text; an empty string if it is not UTF-8 or has more than `limit` bytes."""
    if file.stat().st_size > limit:
        return ""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text else text


def rows_as_documents(source: str, text_column: str) -> Dataset:
    """Returns a dataset's rows, each a document; of a dataset with splits, those of its training split."""
    path = Path(source)
    if path.is_dir():
        rows = load_from_disk(source)
    elif path.is_file():
        rows = load_dataset(DATA_FORMATS[path.suffix], data_files=source, split="train")
    else:
        rows = load_dataset(source, split="train")
    if text_column not in rows.column_names:
        raise ValueError(f"{source!r} has no column {text_column!r}, only {rows.column_names}: name its text.")
    names = [f"{source}/{number}" for number in range(len(rows))]
    texts = {"document": names, "path": names, "text": rows[text_column]}
    return Dataset.from_dict(texts, features=COLUMNS)


def split_documents(corpus: Dataset, *, held_out: float, seed: int) -> DatasetDict:
    """Splits whole documents into `train` and `evaluation`, and drops copies from `train`.

    Documents join the evaluation in the order of a hash of their name and `seed`, so adding or
    removing a document moves few others. A corpus of one document is cut instead.

    Args:
        corpus: As `read_documents` returns it.
        held_out: The share of the text, in characters, that the evaluation takes; 1 takes all.
        seed: Another seed holds out other documents.
    """
    if not 0 < held_out <= 1:
        raise ValueError(f"held_out is {held_out}; it must be above 0 and at most 1, say 0.1.")
    if held_out == 1:
        return DatasetDict(train=corpus.select([]), evaluation=corpus)
    names = corpus["document"]
    lengths = {name: 0 for name in names}
    for name, text in zip(names, corpus["text"], strict=True):
        lengths[name] += len(text)
    if len(lengths) == 1:
        return cut_document(corpus, held_out=held_out)
    order = sorted(lengths, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    wanted, chosen = held_out * sum(lengths.values()), set()
    for name in order[:-1]:  # at least one document stays for the training
        if wanted <= 0:
            break
        chosen.add(name)
        wanted -= lengths[name]
    evaluation = corpus.select([i for i, name in enumerate(names) if name in chosen])
    train = corpus.select([i for i, name in enumerate(names) if name not in chosen])
    return DatasetDict(train=drop_copies(train, evaluation), evaluation=evaluation)


def cut_document(corpus: Dataset, *, held_out: float) -> DatasetDict:
    """Holds out the last part of a single document, cut at the start of a line."""
    text = "".join(corpus["text"])
    cut = text.rfind("\n", 0, int(len(text) * (1 - held_out))) + 1
    if not 0 < cut < len(text):
        raise ValueError("The only document has too few lines to hold out a part. Give more text.")
    row = {"document": corpus[0]["document"], "path": corpus[0]["path"]}
    parts = {"train": text[:cut], "evaluation": text[cut:]}
    return DatasetDict(
        {name: Dataset.from_list([{**row, "text": part}], features=COLUMNS) for name, part in parts.items()}
    )


def drop_copies(train: Dataset, evaluation: Dataset) -> Dataset:
    """Drops the training files that are copies, or nearly, of a held-out file.

    Libraries carry copies of each other (setuptools has distutils). A file is a copy if at least
    `COPY_LINES` of its lines, and `COPY_SHARE` of its own or of the other's, are also in the other.
    """
    sizes, owners = [], {}
    for number, text in enumerate(evaluation["text"]):
        lines = telling_lines(text)
        sizes.append(len(lines))
        for line in lines:
            owners.setdefault(line, []).append(number)
    kept = []
    for number, text in enumerate(tqdm(train["text"], desc="Looking for copies", unit="file")):
        lines = telling_lines(text)
        others = chain.from_iterable(owners.get(line, ()) for line in lines)
        shared = np.bincount(np.fromiter(others, dtype=np.int64), minlength=len(sizes))
        copied = shared >= np.minimum(sizes, len(lines)) * COPY_SHARE
        if not np.any(copied & (shared >= COPY_LINES)):
            kept.append(number)
    return train.select(kept)


def telling_lines(text: str) -> set[str]:
    """Returns the lines so long that only copies share them. Comments are left out: they hold licences."""
    lines = (line.strip() for line in text.splitlines())
    return {line for line in lines if len(line) >= COPIED_LINE and not line.startswith("#")}


def load_tokenizer(
    tokenizer: str, train: Dataset, *, vocab_size: int, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Returns ByT5's bytes (`"bytes"`), a saved tokenizer (a path), or a new one (`"bpe"`).

    The new one is a byte-level BPE of `vocab_size` tokens, trained on a sample of `train`.
    """
    if tokenizer == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    if tokenizer != "bpe":
        return read_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(sample_texts(train), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<|padding|>",
        clean_up_tokenization_spaces=False,
    )


def read_tokenizer(source: str, **options) -> PreTrainedTokenizerBase:
    """Returns a saved tokenizer that has proved able to split a word.

    Raises:
        ValueError: If it cannot be read. On damaged files the libraries below raise anything, even Rust's panics.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        tokenizer("a word", add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        raise ValueError(f"{source} holds no tokenizer that works ({type(error).__name__}: {error}).") from error
    return tokenizer


def sample_texts(corpus: Dataset) -> Iterator[str]:
    """Yields texts of a corpus in random order, up to `TOKENIZER_TEXT` characters in all."""
    left = TOKENIZER_TEXT
    for text in corpus.shuffle(seed=0)["text"]:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)


def tokenize(corpus: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Adds `input_ids`: each file under a line with its path, closed by the end-of-text token."""

    def encode(rows: dict[str, list[str]]) -> dict[str, list]:
        texts = [f"# {path}\n{text}" for path, text in zip(rows["path"], rows["text"], strict=True)]
        end = [tokenizer.eos_token_id]
        return {"input_ids": [[*ids, *end] for ids in encode_texts(texts, tokenizer)]}

    features = Features({"document": Value("string"), "input_ids": TOKENS})
    return corpus.map(
        encode,
        batched=True,
        batch_size=256,
        remove_columns=["path", "text"],
        features=features,
        desc="Tokenizing",
    )


def encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list:
    """Returns token ids without special tokens; a special token spelled out in the text is plain text."""
    if isinstance(tokenizer, ByT5Tokenizer):  # its Python loop is 50 times slower
        offset = len(tokenizer.all_special_ids)
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + offset for text in texts]
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids


def join_documents(tokens: Dataset) -> dict[str, np.ndarray]:
    """Returns the tokens of each document, its files concatenated; int32."""
    names = tokens["document"]
    ids = tokens.with_format("numpy")["input_ids"]
    starts = [0, *(i for i in range(1, len(names)) if names[i] != names[i - 1]), len(names)]
    return {names[start]: np.concatenate(ids[start:stop]).astype(np.int32) for start, stop in pairwise(starts)}


def pack(documents: dict[str, np.ndarray], sequence_length: int) -> Dataset:
    """Concatenates the documents and cuts them into sequences of `sequence_length` tokens.

    `position_ids` restart at 0 with each document and each sequence; the model then keeps the
    documents apart. The first label of a document is -100, as no token before it predicts it.
    Tokens after the last whole sequence are left out.

    Returns:
        Rows of `input_ids`, `labels` (not shifted) and `position_ids`.
    """
    ids = np.concatenate(list(documents.values()))
    count = len(ids) // sequence_length
    if count == 0:
        raise ValueError(
            f"The text has {len(ids)} tokens, fewer than one sequence of {sequence_length}. "
            "Give more text or a smaller sequence_length."
        )
    lengths = [len(document) for document in documents.values()]
    starts = np.zeros(len(ids), dtype=bool)
    starts[np.cumsum([0, *lengths[:-1]])] = True
    starts[::sequence_length] = True
    places = np.arange(len(ids), dtype=np.int32)
    positions = places - np.maximum.accumulate(np.where(starts, places, 0))
    columns = {
        "input_ids": ids,
        "labels": np.where(positions == 0, np.int32(-100), ids),
        "position_ids": positions,
    }
    whole = count * sequence_length
    rows = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(column[:whole]), sequence_length)
        for name, column in columns.items()
    }
    return Dataset(pa.table(rows))  # 100 times faster than from nested lists
