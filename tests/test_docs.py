"""The README and the documentation: code blocks run and print what is shown, commands exist, the site builds."""

import ast
import contextlib
import dataclasses
import inspect
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

import modeling_longnet
from benchmarks.figures import NAMES
from benchmarks.run import RESULTS
from benchmarks.summary import tabulate_speed
from examples.paper.figures import FULL, load, quality_table
from modeling_longnet import LongNetConfig, LongNetForCausalLM

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
# An optional reason not to run it, a block of Python, and what it prints if the next block says that.
BLOCK = re.compile(
    r"(?:^<!-- test: skip, (?P<reason>[^>]+) -->\n)?"
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the model folders that the pages name."""
    config = LongNetConfig(vocab_size=259, segment_lengths=[64, 256], dilation_rates=[1, 2], eos_token_id=1, **SIZES)
    LongNetForCausalLM(config).save_pretrained(tmp_path / "runs" / "mine")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "runs" / "mine")
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=97, max_position_embeddings=32_768, **SIZES))
    llama.save_pretrained(tmp_path / "my-llama")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if "```python" in text])
def test_code_blocks_run(page, folder):
    """Those of a page run in one namespace, as a reader who follows it would run them."""
    namespace, blocks = {}, list(BLOCK.finditer(TEXTS[page]))
    assert len(blocks) == TEXTS[page].count("```python")
    for number, block in enumerate(blocks):
        if block["reason"]:
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block["code"], f"{page}, block {number}", "exec"), namespace)
        if block["output"] is not None:
            lines = [line.rstrip() for line in printed.getvalue().splitlines()]
            assert lines == [line.rstrip() for line in block["output"].splitlines()], f"{page}, block {number}"


def commands() -> list[tuple[str, str]]:
    """Every line of the pages' bash blocks and every `python -m ...` in backticks: (page, command)."""
    found = []
    for page, text in TEXTS.items():
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += [" ".join(span.split()) for span in re.findall(r"`(python -m [^`]+|make [a-z][^`]*)`", text)]
        found += [(page, line.partition("  #")[0].strip()) for line in lines]
    return found


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_commands_exist(page, command):
    """Targets of make, modules, their options, and files of the repository that a command names."""
    if target := re.match(r"make ([a-z-]+)", command):
        assert re.search(rf"^{target[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    module = re.search(r"-m ((?:examples|benchmarks|modeling_longnet|tests)\.[a-z_.]+)\b", command)
    if module:
        path = ROOT / Path(*module[1].split("."))
        sources = [path.with_suffix(".py")] if path.with_suffix(".py").exists() else []
        assert sources, f"{page}: no {module[1]}"
        known = options_of(sources[0])
        # After the module's name; a list of options that stands in quotes is another command's.
        for option in re.findall(r"(?<=\s)--([\w-]+)", re.sub(r"'[^']*'", "", command[module.end() :])):
            assert option.replace("-", "_") in known, f"{page}: {module[1]} has no --{option}"
    for path in re.findall(r"(?<=\s)(configuration/[\w./-]+|examples/[\w./-]+\.py)", command):
        assert (ROOT / path).exists(), f"{page}: no {path}"


def options_of(source: Path) -> set[str]:
    """Names of the options of a script: those of its parsers, and the fields of its own and Transformers' arguments."""
    texts = [path.read_text() for path in read_by(source)]
    found = {name.replace("-", "_") for text in texts for name in re.findall(r"\"--([\w-]+)\"", text)}
    found |= {name for text in texts for node in ast.walk(ast.parse(text)) for name in _fields(node)}
    if any("TrainingArguments" in text for text in texts):
        found |= {field.name for field in dataclasses.fields(TrainingArguments)}
    if source.name == "conversion.py":
        found |= set(modeling_longnet.conversion.FIELDS)
    return found


def read_by(source: Path) -> list[Path]:
    """Return a script and those that it imports from its own folder; `benchmarks.run` starts all of its folder."""
    if source.parent.name == "benchmarks":
        return sorted(source.parent.glob("*.py"))
    imported = [node.module for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.ImportFrom)]
    paths = [source.parent / f"{name}.py" for name in imported if name and "." not in name]
    return [source, *(path for path in paths if path.exists())]


def _fields(node: ast.AST) -> list[str]:
    if not isinstance(node, ast.ClassDef):
        return []
    return [part.target.id for part in node.body if isinstance(part, ast.AnnAssign)]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="mkdocstrings for Python 3.10 needs an older pymdown-extensions")
def test_site_builds_offline(tmp_path):
    """No broken link, no page that the navigation lacks, and nothing that a browser would load from another host."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    loaded = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//|<link\b[^>]*\bhref=\"?(?:https?:)?//"
    )
    assert not [page.name for page in pages if loaded.search(page.read_text())]
    assert "dilation_rates" in (tmp_path / "site" / "api" / "attention.html").read_text()


def test_reference_names_every_public_name():
    reference = "\n".join(text for page, text in TEXTS.items() if page.startswith("docs/api/"))
    named = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)", reference, re.MULTILINE)}
    assert not set(modeling_longnet.__all__) - named


def documented() -> list:
    """Public functions and classes with their methods that have a section of arguments."""
    found = []
    for name in modeling_longnet.__all__:
        public = getattr(modeling_longnet, name)
        methods = [x for x in vars(public).values() if inspect.isfunction(x)] if inspect.isclass(public) else []
        found += [x for x in (public, *methods) if x.__doc__ and "Args:\n" in x.__doc__]
    return found


@pytest.mark.parametrize("public", documented(), ids=lambda x: x.__qualname__)
def test_documented_arguments_exist(public):
    """An argument that the docstring explains is one of the signature, or a field of the configuration."""
    section = re.split(r"\n\S|\n\n", inspect.cleandoc(public.__doc__).partition("Args:\n")[2])[0]
    names = [name for line in re.findall(r"^    (\w[\w, *]*):", section, re.MULTILINE) for name in line.split(", ")]
    known = {*inspect.signature(public).parameters, "Others"}
    if inspect.isclass(public):
        known |= {name for base in public.__mro__ for name in inspect.get_annotations(base)}
        known |= {"max_position_embeddings"}  # accepted by keyword, and saved
    elif module := inspect.getmodule(public):  # what a decorator of Transformers adds
        known |= {"output_hidden_states", "output_attentions", "return_dict"} & set(
            re.findall(r"\w+", inspect.getsource(module))
        )
    assert names
    assert not set(names) - known


def test_readme_is_short_and_its_tables_are_current():
    readme = TEXTS["README.md"]
    assert len(readme.splitlines()) <= 180
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    for name, table in {"speed": tabulate_speed(results), "quality": quality_table(load(FULL))}.items():
        rows = [line for line in table.splitlines() if line.startswith("|")][2:]
        assert 3 <= len(rows) <= 6
        assert f"<!-- results:{name} -->\n{table}\n<!-- end:{name} -->" in readme, "run `make figures`"


def test_every_marker_is_filled_by_make_figures():
    marked = {page for page, text in TEXTS.items() if "<!-- results:" in text}
    assert marked == {*NAMES, "docs/paper.md"}


def test_guides_are_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w/]+\.md)", TEXTS["README.md"]))
    assert {"docs/install.md", "docs/patterns.md", "docs/speed.md", "docs/paper.md"} <= linked
    assert len({page for page in linked if page.startswith("docs/guides/")}) >= 5
