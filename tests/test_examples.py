"""The examples: a split that leaks nothing, an honest metric, training that resumes, the whole demo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
    pipeline,
)

from examples import compare, corpus, evaluate_perplexity, finetune, masked_lm, try_model
from examples.optimizer import MuonAndAdamW
from modeling_longnet import LongNetConfig, LongNetForCausalLM, parse_pattern, use_dilated_attention

ROOT = Path(__file__).parent.parent
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "segment_lengths": [16, 64],
    "dilation_rates": [1, 2],
    "position_embedding": "rope",
}
# A CUDA build of PyTorch on a machine without a GPU names a device that is not there, unless it is asked to check.
RUN_WITHOUT_ITS_GPU = """
import runpy, sys, torch
torch.accelerator.current_accelerator = lambda check_available=False: None if check_available else torch.device("cuda")
torch.accelerator.is_available = lambda: False
name, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


def source_file(name: str, lines: int) -> str:
    return "".join(f"def {name}_function_{n}(argument):\n    return argument + {n}\n" for n in range(lines))


@pytest.fixture
def packages(tmp_path):
    """A folder of six packages of two files; two of them also hold a copy of a file of another."""
    for number in range(6):
        package = tmp_path / "text" / f"package{number}"
        (package / "tests").mkdir(parents=True)
        for part in "ab":
            text = source_file(f"package{number}{part}", 40)
            (package / f"{part}.py").write_text(text)
        (package / "tests" / "test.py").write_text("never read")
        (package / "data.bin").write_bytes(b"\xff\xfe\0")
    original = tmp_path / "text" / "package0" / "a.py"
    for number in (1, 5):
        (tmp_path / "text" / f"package{number}" / "copy.py").write_text(original.read_text() + "# end\n")
    return tmp_path / "text"


class TestText:
    def test_reads_text_alone_in_order(self, packages):
        rows = corpus.read_documents(str(packages), document_bytes=10**6)
        assert rows["path"] == sorted(rows["path"])
        assert len(rows) == 14
        assert {path.split("/")[0] for path in rows["path"]} == set(rows["document"])

    @pytest.mark.parametrize("seed", range(8))
    def test_split_leaks_no_file(self, packages, seed):
        rows = corpus.read_documents(str(packages), document_bytes=10**6)
        split = corpus.split_documents(rows, held_out=0.3, seed=seed)
        assert not set(split["train"]["document"]) & set(split["evaluation"]["document"])
        held_out = {line for text in split["evaluation"]["text"] for line in corpus.telling_lines(text)}
        trained = {line for text in split["train"]["text"] for line in corpus.telling_lines(text)}
        assert held_out
        assert trained
        assert not held_out & trained  # the generated packages share lines by copies alone

    def test_copies_are_dropped_from_the_training(self, packages):
        rows = corpus.read_documents(str(packages), document_bytes=10**6)
        parts = [rows.filter(lambda row, held=held: (row["document"] == "package0") == held) for held in (False, True)]
        kept = corpus.drop_copies(*parts)
        assert set(parts[0]["path"]) - set(kept["path"]) == {"package1/copy.py", "package5/copy.py"}

    def test_single_document_is_cut_at_a_line(self, packages):
        file = packages / "package0" / "a.py"
        rows = corpus.read_documents(str(file), document_bytes=10**6)
        split = corpus.split_documents(rows, held_out=0.25, seed=0)
        parts = [split[name]["text"][0] for name in ("train", "evaluation")]
        assert "".join(parts) == file.read_text()
        assert parts[0].endswith("\n")

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet", "saved"])
    def test_datasets(self, tmp_path, suffix):
        rows = Dataset.from_dict({"body": ["first text", "second text"]})
        path = str(tmp_path / f"rows.{suffix}")
        {"jsonl": rows.to_json, "parquet": rows.to_parquet, "saved": rows.save_to_disk}[suffix](path)
        read = corpus.read_documents(path, document_bytes=10**6, text_column="body")
        assert read["text"][:] == ["first text", "second text"]
        with pytest.raises(ValueError, match="no column 'text'"):
            corpus.read_documents(path, document_bytes=10**6)

    def test_empty_folder_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="holds no text"):
            corpus.read_documents(str(tmp_path), document_bytes=10**6)

    def test_tokenizer_is_reproducible_and_lossless(self, packages):
        rows = corpus.read_documents(str(packages), document_bytes=10**6)
        first, second = (corpus.load_tokenizer("bpe", rows, vocab_size=300) for _ in range(2))
        assert first.get_vocab() == second.get_vocab()
        text = "naïve <|endoftext|>\n\tdef  f(x):  # ümlaut, 字\n"
        (ids,) = corpus.encode_texts([text], first)
        assert first.eos_token_id not in ids
        assert first.decode(ids) == text

    def test_bytes_are_those_of_byt5(self):
        text = "naïve\n\tdef f(x): # 字"
        tokenizer = corpus.load_tokenizer("bytes", None, vocab_size=0)
        (ids,) = corpus.encode_texts([text], tokenizer)
        assert ids.tolist() == ByT5Tokenizer()(text, add_special_tokens=False).input_ids

    @pytest.mark.parametrize("content", [
        "[1]", "{", '{"version": "1.0"}', "[" * 100_000,
        # The prefix is longer than the second part of a merge: the tokenizers library panics.
        json.dumps({"version": "1.0", "added_tokens": [], "model": {
            "type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]],
            "continuing_subword_prefix": "much longer than b",
        }}),
    ], ids=["list", "cut", "empty", "deep", "panic"])  # fmt: skip
    def test_a_damaged_tokenizer_is_a_clear_error(self, content, tmp_path):
        (tmp_path / "tokenizer.json").write_text(content)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=f"{tmp_path.name} holds no tokenizer that works"):
            corpus.read_tokenizer(str(tmp_path))

    def test_packing_keeps_documents_apart(self):
        documents = {"a": np.arange(10, 15, dtype=np.int32), "b": np.arange(20, 29, dtype=np.int32)}
        rows = corpus.pack(documents, 4)
        assert rows["input_ids"] == [[10, 11, 12, 13], [14, 20, 21, 22], [23, 24, 25, 26]]
        assert rows["position_ids"] == [[0, 1, 2, 3], [0, 0, 1, 2], [0, 1, 2, 3]]
        assert rows["labels"] == [[-100, 11, 12, 13], [-100, -100, 21, 22], [-100, 24, 25, 26]]
        with pytest.raises(ValueError, match="fewer than one sequence of 15"):
            corpus.pack(documents, 15)


@pytest.fixture
def metric():
    return evaluate.load(str(evaluate_perplexity.METRIC))


def rows_of_metric(losses_by_context: dict[int, list[list[float]]]) -> dict[str, list]:
    rows = {name: [] for name in ("contexts", "documents", "starts", "targets", "losses", "text_bytes")}
    for context, blocks in losses_by_context.items():
        for number, losses in enumerate(blocks):
            values = [context, f"document{number}", 7, list(range(len(losses))), losses, 5 + number]
            for name, value in zip(rows, values, strict=True):
                rows[name].append(value)
    return rows


class TestMetric:
    def test_equals_the_computation_by_hand(self, metric):
        losses = {8: [[1.0, 2.0], [3.0, 4.0, 5.0]], 4: [[2.0, 2.0], [4.0, 4.0, 6.0]]}
        result = metric.compute(**rows_of_metric(losses))
        assert result["contexts"] == [4, 8]
        assert (result["tokens"], result["bytes"], result["documents"]) == (5, 11, 2)
        np.testing.assert_allclose(result["perplexity"], np.exp([18 / 5, 15 / 5]))
        np.testing.assert_allclose(result["bits_per_byte"], np.array([18, 15]) / np.log(2) / 11)
        np.testing.assert_allclose(result["bits_saved_per_byte"], np.array([0, 3]) / np.log(2) / 11)
        # Context 8: the residuals from the mean 3 are 3 - 2 * 3 = -3 and 12 - 3 * 3 = 3, of two documents.
        error = np.sqrt(2 / 1 * (9 + 9)) / 5
        np.testing.assert_allclose(result["perplexity_error"][1], np.exp(3) * error)
        # Saved: 1 of 5 bytes and 2 of 6, against 3 / 11 a byte.
        residuals = np.array([1 - 5 * 3 / 11, 2 - 6 * 3 / 11]) / np.log(2)
        np.testing.assert_allclose(result["bits_saved_per_byte_error"][1], np.sqrt(2 * np.sum(residuals**2)) / 11)
        assert result["bits_saved_per_byte_error"][0] == 0

    def test_one_sample_has_no_error(self, metric):
        result = metric.compute(**rows_of_metric({4: [[1.0]]}))
        assert np.isnan(result["perplexity_error"]).all()

    def test_one_block_is_written_as_json(self, metric, tmp_path):
        results = metric.compute(**rows_of_metric({4: [[1.0]], 8: [[0.5]]}))
        evaluate_perplexity.write_results({**results, "targets": 1, "seconds": 0.1}, tmp_path)
        written = json.loads((tmp_path / "perplexity.json").read_text(), parse_constant=pytest.fail)
        assert written["perplexity_error"] == [None, None]

    @pytest.mark.parametrize(
        ("losses", "message"),
        [
            ({4: [[1.0], [1.0]], 8: [[1.0]]}, "same targets"),
            ({4: [[1.0]], 8: [[1.0, 2.0]]}, "same targets"),
            ({4: [[float("nan")]]}, "finite loss"),
        ],
        ids=["block missing", "other targets", "nan"],
    )
    def test_refuses_what_cannot_be_compared(self, metric, losses, message):
        with pytest.raises(ValueError, match=message):
            metric.compute(**rows_of_metric(losses))


def tiny_model(kind: str):
    torch.manual_seed(0)
    if kind == "longnet":
        return LongNetForCausalLM(LongNetConfig(vocab_size=259, **TINY)).double().eval()
    sizes = {name: TINY[name] for name in list(TINY)[:4]}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)).double().eval()


class TestEvaluation:
    @pytest.mark.parametrize("kind", ["longnet", "llama"])
    @pytest.mark.parametrize("context", [8, 32, 64, 100])
    @pytest.mark.parametrize("piece", [13, 1000], ids=["in pieces", "at once"])
    def test_losses_are_those_of_each_window_alone(self, kind, context, piece, monkeypatch):
        monkeypatch.setattr(evaluate_perplexity, "READ_TOKENS", piece)
        model, targets = tiny_model(kind), 16
        tokens = np.random.default_rng(1).integers(3, 259, 120).astype(np.int32)
        losses = [loss for part in evaluate_perplexity.score_block(model, tokens, context, targets) for loss in part]
        assert len(losses) == targets
        step = min(context // 2, targets)
        for place, loss in enumerate(losses):
            last = len(tokens) - targets + (place // step + 1) * step
            window = torch.from_numpy(tokens[last - context : last].astype(np.int64))
            target = context - step + place % step
            logits = model(window[None]).logits[0, target - 1]
            expected = -torch.log_softmax(logits.float(), -1)[window[target]]
            assert loss == pytest.approx(expected.item(), rel=1e-6)
            assert target >= context // 2

    def test_the_bar_counts_every_token_read(self, monkeypatch):
        """Windows of 8, 32 and 100 tokens over 16 targets: 4, 1 and 1 of each document's."""
        bars = []

        class Bar(evaluate_perplexity.tqdm):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                bars.append(self)

        monkeypatch.setattr(evaluate_perplexity, "tqdm", Bar)
        documents = {name: np.random.default_rng(1).integers(3, 259, 120).astype(np.int32) for name in "ab"}
        blocks = [evaluate_perplexity.Block(name, 120, 16) for name in documents]
        list(evaluate_perplexity.score_blocks(tiny_model("longnet"), documents, blocks, [8, 32, 100], 16))
        assert [bar.n for bar in bars] == [bar.total for bar in bars] == [2 * (4 * 8 + 32 + 100)]

    def test_targets_are_the_same_at_every_context(self):
        documents = {
            name: np.random.default_rng(len(name)).integers(3, 259, size).astype(np.int32)
            for name, size in {"a": 300, "bb": 150, "ccc": 50}.items()
        }
        tokenizer = ByT5Tokenizer(extra_ids=0)
        result = evaluate_perplexity.evaluate_contexts(
            tiny_model("longnet"), tokenizer, documents, contexts=[64, 8, 16, 128], targets=32, blocks=4
        )
        assert result["contexts"] == [8, 16, 64, 128]
        assert (result["documents"], result["blocks"], result["tokens"]) == (2, 3, 96)
        assert "128" in evaluate_perplexity.format_table(result)

    def test_bytes_are_those_of_the_targets(self):
        tokenizer = ByT5Tokenizer(extra_ids=0)
        ids = np.array(tokenizer("x = 'naïve' # plain", add_special_tokens=False).input_ids)
        assert evaluate_perplexity.count_bytes(ids, len(ids), 7, tokenizer) == 7

    @pytest.mark.parametrize(
        ("contexts", "message"), [([20], "must divide"), ([1], "Context 1"), ([4096], "No document has")]
    )
    def test_refuses_contexts_that_do_not_fit(self, contexts, message):
        documents = {"a": np.arange(3, 203, dtype=np.int32)}
        with pytest.raises(ValueError, match=message):
            evaluate_perplexity.evaluate_contexts(
                tiny_model("longnet"), ByT5Tokenizer(extra_ids=0), documents, contexts=contexts, targets=32, blocks=1
            )


class TestTraining:
    def train(self, packages, output, muon_learning_rate=None, **options):
        config = packages.parent / "config.json"
        config.write_text(json.dumps({"model_type": "longnet", **TINY}))
        arguments = finetune.ModelArguments(
            config=str(config), vocab_size=300, sequence_length=64, muon_learning_rate=muon_learning_rate
        )
        training = TrainingArguments(
            output_dir=str(output),
            use_cpu=True,
            max_steps=4,
            save_steps=2,
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        text = corpus.load_text(corpus.TextArguments(text=str(packages), held_out=0.3))
        return finetune.run(finetune.make_trainer(arguments, training, text))

    @pytest.mark.parametrize("muon_learning_rate", [None, 0.02], ids=["adamw", "muon"])
    def test_resumes_to_the_same_weights(self, packages, tmp_path, muon_learning_rate):
        whole = self.train(packages, tmp_path / "out", muon_learning_rate)
        (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "elsewhere")
        resumed = self.train(packages, tmp_path / "out", muon_learning_rate, resume_from_checkpoint="last")
        for (name, value), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
            torch.testing.assert_close(other, value, rtol=0, atol=0, msg=name)

    def test_muon_and_adamw_are_those_of_pytorch(self):
        torch.manual_seed(0)
        models = [LongNetForCausalLM(LongNetConfig(vocab_size=50, **TINY)) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        inner = [p for p in models[1].model.layers.parameters() if p.dim() == 2]
        outer = [p for p in models[1].parameters() if not any(p is q for q in inner)]
        rates = {"learning_rate": 1e-2, "muon_learning_rate": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.3}
        optimizers = [
            [MuonAndAdamW(models[0], **rates)],
            [
                torch.optim.Muon(inner, lr=0.1, weight_decay=0.3),
                torch.optim.AdamW(outer, lr=1e-2, betas=(0.9, 0.95), weight_decay=0),
            ],
        ]
        ids = torch.randint(50, (1, 40))
        for _ in range(3):
            for model, parts in zip(models, optimizers, strict=True):
                model(ids, labels=ids).loss.backward()
                for part in parts:
                    part.step()
                    part.zero_grad()
        for (name, value), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(value, other, rtol=0, atol=0, msg=name)

    def test_continues_from_its_own_folder(self, packages, tmp_path):
        self.train(packages, tmp_path / "out")
        text = corpus.load_text(corpus.TextArguments(text=str(packages), held_out=0.3))
        arguments = finetune.ModelArguments(model_name_or_path=str(tmp_path / "out"), trust_remote_code=True)
        model, tokenizer = finetune.load_model(arguments, text)
        assert model.config.use_cache
        assert model.get_input_embeddings().num_embeddings == len(tokenizer)

    def test_the_saved_tokenizer_suits_fine_tuning_and_other_tools(self, packages, tmp_path):
        """The stock collator pads so that no target follows padding; lm-eval and pipelines know the reach."""
        model = self.train(packages, tmp_path / "out").eval().double()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert tokenizer.model_max_length == max(TINY["segment_lengths"])
        rows = [tokenizer(text)["input_ids"] for text in ("import os", "def f(x):\n    return x + 1", "pass")]
        batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": row} for row in rows])
        counts = [len(row) - 1 for row in rows]
        losses = [model(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in rows]
        expected = np.average(losses, weights=counts)
        assert model(**batch).loss.item() == pytest.approx(expected, rel=1e-9)

    def test_nothing_to_resume_is_refused(self, packages, tmp_path):
        with pytest.raises(ValueError, match="holds no checkpoint"):
            self.train(packages, tmp_path / "out", resume_from_checkpoint="last")

    def test_needs_a_model_or_a_config(self, packages):
        with pytest.raises(ValueError, match="give one of them"):
            finetune.load_model(finetune.ModelArguments(), {})
        with pytest.raises(FileNotFoundError, match=r"no file 'longnet-dmo\.json' here"):
            finetune.load_model(finetune.ModelArguments(config="longnet-dmo.json"), {})


def test_a_masked_model_learns_and_loads(packages, tmp_path, capsys):
    arguments = masked_lm.ModelArguments(vocab_size=300, sequence_length=64, hidden_size=64, num_hidden_layers=1)
    training = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=12, report_to="none", disable_tqdm=True, learning_rate=5e-3
    )
    text = corpus.load_text(corpus.TextArguments(text=str(packages), held_out=0.3))
    before, after = masked_lm.run(masked_lm.make_trainer(arguments, training, text), arguments.sample)
    assert after < before
    assert "(len(values)):" in capsys.readouterr().out
    fill = pipeline("fill-mask", str(tmp_path))
    assert len(fill("for i in<|mask|>range")) == 5
    AutoModelForTokenClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "demo",
        "evaluate_perplexity",
        "extend_llama",
        "finetune",
        "long_documents",
        "masked_lm",
        "model_card",
        "try_model",
    ],
)
def test_run_by_path_names_the_command(name):
    done = subprocess.run([sys.executable, ROOT / "examples" / f"{name}.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"Run this as a module from the repository's root: python -m examples.{name}\n"


def test_extend_llama(packages, tmp_path):
    """Every model of the comparison, at toy size; the last pattern's is kept and loads."""
    sizes = "--steps 2 --long-steps 1 --length 64 --long-length 128 --contexts 32 128 --targets 32 --blocks 2".split()
    command = [sys.executable, "-m", "examples.extend_llama", "--text", packages, "--output", tmp_path / "out", *sizes]
    patterns = ["32/1 128/2", "w32 128/4:1 once"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--patterns", *patterns], env=environment, cwd=ROOT, check=True)
    (file,) = (tmp_path / "out").glob("*.json")
    results = json.loads(file.read_text())["results"]
    assert list(results) == [f"{name}{tuned}" for name in ("dense", *patterns) for tuned in ("", ", fine-tuned")]
    # Within the window's reach, a switched model is the dense one.
    assert results[patterns[1]]["perplexity"][0] == pytest.approx(results["dense"]["perplexity"][0], rel=1e-5)
    assert results[patterns[0]]["perplexity"] != results["dense"]["perplexity"]
    saved = use_dilated_attention(LlamaForCausalLM.from_pretrained(tmp_path / "out" / "model"))
    assert saved.config.dilated_attention["window_size"] == 32


def test_the_demo_draws_models_of_its_kind_beside_its_own(tmp_path, capsys):
    """Models of the same text are drawn without a note, of another day's packages with one, of other training never."""
    model = dict.fromkeys(("window_size", "query_rates")) | {"segment_lengths": [8], "dilation_rates": [1]}
    scores = {"contexts": [2, 4], "perplexity": [9.0, 8.0], "perplexity_error": [None, None]}
    scores |= {"tokens": 40, "bytes": 90}
    training = {"text": "python", "tokens": 300, "sequence_length": 4}
    own = scores | {"text_digest": "a", "model": model, "training": training, "date": "2026-01-01"}
    own |= {"command": "demo"}
    report = own | {"model": model | {"window_size": 4}, "command": "demo --config window"}
    others = {
        "own": own,
        "same": report,
        "repeated": own | {"text_digest": None, "perplexity": [9.0, 7.5]},
        "packages": report | {"text_digest": "b", "date": "2026-01-02", "perplexity": [9.0, 80.0]},
        "training": report | {"training": training | {"tokens": 600}},
        "targets": report | {"tokens": 41},
        "older": scores | {"date": "2026-01-03"},
    }
    files = [tmp_path / f"{name}.json" for name in [*others, "missing"]]
    for file, other in zip(files, others.values(), strict=False):
        file.write_text(json.dumps(other))
    baselines = compare.read_baselines(own, files)
    assert [baseline["text_digest"] for baseline in baselines] == ["a", None, "b"]
    left_out = capsys.readouterr().out
    assert [f"{name}.json" in left_out for name in others] == [False, False, False, False, True, True, True]
    assert compare.describe_baselines(own, baselines[:2]) == ""
    assert "2026-01-02" in compare.describe_baselines(own, baselines)
    assert list(compare.name_reports([own, *baselines])) == ["dense", "LongNet", "dense, repeated", "LongNet, repeated"]
    compare.plot(own, baselines, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "name"),
    [("64/1", "dense"), ("w8", "window of 8"), ("16/1 64/4", "the paper's\npattern"), ("w8 64/8:1 once", "LongNet")],
)
def test_a_figure_names_the_pattern(words, name):
    fields = {name: list(x) if isinstance(x, tuple) else x for name, x in parse_pattern(words).items()}
    assert compare.name_model(fields)[0] == name


def test_demo_then_long_documents(packages, tmp_path, monkeypatch):
    """The folder that the demo writes is loaded in a process without the package, stored, tried, and fine-tuned."""
    for number in range(6):
        (packages / f"package{number}" / "c.py").write_text(source_file(f"package{number}c", 200))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "longnet", **TINY}))
    output = tmp_path / "output"
    run_module = ["-c", RUN_WITHOUT_ITS_GPU] if not torch.cuda.is_available() else ["-m"]
    command = [sys.executable, *run_module, "examples.demo", "--quick", "True", "--text", packages, "--config", config]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "--steps", "2", "--output", output], env=environment, check=True, stdin=subprocess.DEVNULL
    )
    results = json.loads((output / "perplexity.json").read_text())
    assert results["command"].startswith("python -m examples.demo --quick True --text ")
    assert len(results["perplexity"]) == len(results["contexts"]) > 1
    assert results["training"] | {"loss": None} == {
        "text": str(packages), "documents_held_out": 1, "steps": 2, "sequence_length": 1024, "tokens": 2048,
        "text_tokens": results["training"]["text_tokens"], "loss": None, "bfloat16": results["training"]["bfloat16"],
        "learning_rate": 4e-3, "muon_learning_rate": 0.04, "warmup_steps": 50, "seed": 0,
    }  # fmt: skip
    assert results["model"]["segment_lengths"] == TINY["segment_lengths"]
    assert (output / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert "class Shape" in (output / "sample.txt").read_text()
    assert {"model.safetensors", "tokenizer.json", "modeling_longnet.py"} <= {
        file.name for file in (output / "model").iterdir()
    }

    stored, assembled = tmp_path / "pretrained", tmp_path / "assembled"
    try_model.store(output, stored, tmp_path / "demo.json")
    assert "seconds" in results
    assert "seconds" not in json.loads((tmp_path / "demo.json").read_text())
    assert {path.name for path in stored.iterdir()} == set(try_model.FILES)
    try_model.assemble(assembled, stored)
    code = list(assembled.glob("*.py"))
    assert "modeling_longnet.py" in {file.name for file in code}
    assert all(file.read_text() == (ROOT / "modeling_longnet" / file.name).read_text() for file in code)
    monkeypatch.setattr(try_model, "EVALUATION", {"contexts": [32, 1 << 20], "targets": 64, "blocks": 2})
    try_model.measure(assembled, try_model.read_file(packages / "package0"), tmp_path / "try")
    tried = json.loads((tmp_path / "try" / "perplexity.json").read_text())
    assert (tried["text"], tried["contexts"], tried["blocks"]) == ("package0", [32], 2)

    tuned = tmp_path / "tuned"
    sizes = "--steps 2 --step-tokens 512 --sequence-lengths 128 512 --contexts 64 128 --targets 64 --blocks 1"
    command = [sys.executable, *run_module, "examples.long_documents", "--model", output / "model", "--text", packages]
    command += ["--output", tuned, "--samples", "1", "--sample-tokens", "8", *sizes.split()]
    subprocess.run(command, env=environment, check=True, stdin=subprocess.DEVNULL)
    results = json.loads((tuned / "perplexity.json").read_text())["results"]
    names = ["before", "after, sequences of 128", "after, sequences of 512"]
    assert list(results) == names
    assert len({result["perplexity"][-1] for result in results.values()}) == 3
    assert all(f"\n{name}:\n" in (tuned / "samples.md").read_text() for name in ("the document", *names))
    for length in (128, 512):
        assert LongNetForCausalLM.from_pretrained(tuned / str(length)).config.use_cache


def test_one_block_has_no_error():
    assert evaluate_perplexity.format_error(3.14159, float("nan"), 2) == "3.14"
    assert evaluate_perplexity.format_error(3.14159, 0.5, 2) == "3.14 +- 0.50"


def test_serve_lets_the_server_find_the_class(monkeypatch):
    """Transformers' server loads the trained model of pretrained/ as the command line would."""
    manager = pytest.importorskip("transformers.cli.serving.model_manager")
    from examples import serve

    seen = []
    monkeypatch.setattr(sys, "argv", ["serve", "--device", "cpu"])
    monkeypatch.setattr(serve.command, "main", lambda: seen.extend(sys.argv))
    monkeypatch.setattr(manager.transformers, "LongNetForCausalLM", None, raising=False)
    serve.main()
    assert seen == ["serve", "serve", "--device", "cpu"]
    name = f"{ROOT / 'pretrained'}@main"
    model, tokenizer = manager.ModelManager(device="cpu").load_model_and_processor(name)
    ids = tokenizer("def main(", return_tensors="pt").input_ids
    assert type(model) is LongNetForCausalLM
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, ids.shape[1] + 3)
