"""A table of what ran: library, version, what, result. `make test-ecosystem TABLE=FILE` also writes it to a file."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ROWS: dict[tuple[str, str], list[str]] = {}


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 300 tokens with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(["user: what is two plus three? assistant: it is five."] * 9, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[0], pad_token=special[1])
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    library = getattr(item.module, "LIBRARY", None)
    if library and (report.when == "call" or report.outcome != "passed"):
        what = (item.function.__doc__ or item.name).strip().splitlines()[0]
        ROWS.setdefault((library, what), []).append(report.outcome)


def table() -> str:
    """Return the results as Markdown."""
    lines = [
        "# Other libraries",
        "",
        "Written by `make test-ecosystem TABLE=docs/ecosystem.md`; the code is in `tests/ecosystem/`.",
        "",
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, Transformers {transformers.__version__}, "
        f"{platform.machine()}, CPU.",
        "",
        "| library | version | what ran | cases | result |",
        "| --- | --- | --- | ---: | --- |",
    ]
    for (library, what), outcomes in sorted(ROWS.items()):
        failed = len(outcomes) - outcomes.count("passed")
        result = "passed" if not failed else f"{failed} failed"
        lines.append(f"| {library} | {version(library)} | {what} | {len(outcomes)} | {result} |")
    return "\n".join(lines) + "\n"


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        terminalreporter.section("what ran")
        terminalreporter.write(table())
        if os.environ.get("TABLE"):
            Path(os.environ["TABLE"]).write_text(table())
