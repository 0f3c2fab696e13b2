"""A text read chunk by chunk: the same numbers as one forward, bounded memory, resumable, never half saved."""

import copy
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

from examples import stream as stream_example
from modeling_longnet import LongNetCache, LongNetConfig, LongNetForCausalLM, Scored, cache_file, stream
from modeling_longnet.testing import CACHE

VOCABULARY = 97


def make_model(**overrides):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 3, "segment_lengths": [8, 24, 48],
        "dilation_rates": [1, 3, 5],
    }  # fmt: skip
    return LongNetForCausalLM(LongNetConfig(**(sizes | overrides))).double().eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def make_tokens(length=307):
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokens():
    return make_tokens()


@pytest.fixture(scope="module")
def expected(model, tokens):
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]


@pytest.mark.parametrize("chunk_size", [1, 13, 48, 1000])
def test_equals_one_forward_for_every_chunk_size(model, tokens, expected, chunk_size):
    scored = list(stream(model, tokens, chunk_size=chunk_size, progress=False))
    torch.testing.assert_close(torch.cat([s.log_probs for s in scored]), expected.float(), rtol=0, atol=1e-5)
    assert scored[-1].count == len(tokens) - 1
    assert scored[-1].total == pytest.approx(float(expected.sum()), rel=1e-6)
    assert [s.start for s in scored[1:]] == [s.stop for s in scored[:-1]]


@pytest.mark.parametrize("resumed", [False, True])
def test_generate_continues_from_the_cache_that_was_read_into(model, tokens, tmp_path, resumed):
    """The same tokens as from the whole text, also where the cache came from a state file in the middle."""
    cache, state = LongNetCache(model.config), tmp_path / "state.safetensors"
    if resumed:
        reader = stream(model, tokens, chunk_size=50, state_file=state, save_seconds=0, progress=False)
        next(reader), next(reader)
        reader.close()
    assert list(stream(model, tokens, chunk_size=50, state_file=state, cache=cache, progress=False))
    assert cache.get_seq_length() == len(tokens) - 1
    given = {"max_new_tokens": 9, "do_sample": False}
    assert model.generate(tokens[None], **{CACHE: cache}, **given).tolist() == (
        model.generate(tokens[None], **given).tolist()
    )
    with pytest.raises(ValueError, match=r"cache holds \d+ tokens"):
        stream(model, tokens, cache=cache)


def test_goes_on_from_the_state_after_a_stop(model, tokens, expected, tmp_path):
    state = tmp_path / "state.safetensors"
    reader = stream(model, tokens, chunk_size=50, state_file=state, save_seconds=0, progress=False)
    for scored in reader:
        if scored.stop > 150:
            break
    reader.close()
    rest = list(stream(model, tokens, chunk_size=29, state_file=state, progress=False))
    assert 1 < rest[0].start <= scored.stop
    torch.testing.assert_close(
        torch.cat([s.log_probs for s in rest]), expected[rest[0].start - 1 :].float(), rtol=0, atol=1e-5
    )
    assert rest[-1].total == pytest.approx(float(expected.sum()), rel=1e-6)
    assert list(stream(model, tokens, state_file=state, progress=False)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_state_file_may_be_a_symbolic_link(exists, model, tokens, tmp_path):
    for name in ("links", "real"):
        (tmp_path / name).mkdir()
    link, real = tmp_path / "links" / "state", tmp_path / "real" / "state"
    if exists:
        next(stream(model, tokens, chunk_size=50, state_file=real, save_seconds=0, progress=False))
    link.symlink_to("../real/state")
    finished_state(model, tokens, link)
    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["state"]
    assert Scored.from_state_file(real).count == len(tokens) - 1


def test_a_link_to_a_missing_folder_is_refused_at_once(model, tokens, tmp_path):
    (tmp_path / "link").symlink_to("missing/state")
    with pytest.raises(ValueError, match="must be a file in a folder that exists"):
        stream(model, tokens, state_file=tmp_path / "link")


def finished_state(model, tokens, path):
    for _ in stream(model, tokens, state_file=path, progress=False):
        pass
    return path


def test_refuses_states_of_other_texts(model, tmp_path):
    """Another first token, thousands of tokens before the state's position, is another text."""
    tokens = make_tokens(5_000)
    path = finished_state(model, tokens, tmp_path / "state.safetensors")
    other = tokens.clone()
    other[0] = (other[0] + 1) % VOCABULARY
    for text in (other, tokens[:100], tokens.flip(0)):
        with pytest.raises(ValueError, match="another text"):
            stream(model, text, state_file=path)
    assert list(stream(model, tokens.to(torch.int16), state_file=path, progress=False)) == []


def test_a_state_saved_by_68edab1_resumes(tmp_path):
    """It holds the scores of tokens 1 to 26."""
    folder = Path(__file__).parent / "fixtures" / "saved_by_68edab1"
    saved = load_file(folder / "language_model.safetensors")
    model = LongNetForCausalLM.from_pretrained(folder / "language_model").eval()
    state = shutil.copy(folder / "stream_state.safetensors", tmp_path)
    rest = next(stream(model, saved["tokens"], state_file=state, progress=False))
    assert (rest.start, rest.stop) == (27, 60)
    torch.testing.assert_close(rest.log_probs, saved["log_probs"][26:], rtol=0, atol=1e-5)
    assert rest.total == pytest.approx(float(saved["log_probs"].double().sum()), rel=1e-6)
    before = Scored.from_state_file(state)
    assert (before.start, before.stop, before.count, len(before.log_probs)) == (27, 27, 26, 0)
    assert before.total == pytest.approx(float(saved["log_probs"][:26].double().sum()), rel=1e-6)


def test_the_perplexity_of_a_finished_text_comes_from_its_state(model, tokens, tmp_path):
    path = tmp_path / "state.safetensors"
    last = list(stream(model, tokens, state_file=path, progress=False))[-1]
    scored = Scored.from_state_file(path)
    assert (scored.stop, scored.total, scored.count, scored.perplexity) == (last.stop, *last[3:], last.perplexity)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged"):
        Scored.from_state_file(path)


def swapped_weights(model):
    """Of the same sum."""
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    return model


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (swapped_weights, "weights"),
        (lambda model: model.float(), "dtype"),
        (lambda model: make_model(rope_theta=500.0), "rope_theta"),
        (lambda model: make_model(position_embedding="rope"), "position_embedding"),
        (lambda model: make_model(dilation_rates=[1, 2, 5]), "dilation_rates"),
    ],
    ids=["weights", "dtype", "theta", "positions", "branches"],
)
def test_refuses_states_of_other_models(model, tokens, tmp_path, change, field):
    path = finished_state(model, tokens, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=f"another model: its {field} is"):
        stream(change(copy.deepcopy(model)), tokens, state_file=path)


def test_a_state_serves_the_model_saved_and_loaded(model, tokens, tmp_path):
    path = finished_state(model, tokens, tmp_path / "state.safetensors")
    model.save_pretrained(tmp_path / "model")
    loaded = LongNetForCausalLM.from_pretrained(tmp_path / "model", attention_backend="torch").eval()
    assert list(stream(loaded, tokens, state_file=path, progress=False)) == []


def flipped_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(content)


def rewrite(path, tensors, **changes):
    """Rewrite the file with a valid hash, so that only comparing its metadata can find the change."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | changes
    metadata = {name: value for name, value in metadata.items() if name != "sha256" and value is not None}
    metadata["sha256"] = cache_file._digest(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def changed_lengths(path):
    tensors = load_file(path)
    rewrite(path, tensors | {"lengths": tensors["lengths"] - 7})


def changed_metadata(**changes):
    return lambda path: rewrite(path, load_file(path), **changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:9000]), "damaged"),
        (lambda path: path.write_bytes(b"nonsense"), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (flipped_bit, "damaged"),
        (changed_lengths, "its position is 306"),
        (changed_metadata(position="0"), "damaged"),
        (changed_metadata(total="0x1p+2000"), "damaged"),
        (changed_metadata(text=None), "damaged"),
    ],
    ids=["half", "nonsense", "empty", "bit", "lengths", "position", "total", "no hash"],
)
def test_refuses_damaged_states_and_leaves_them(model, tokens, tmp_path, damage, message):
    path = finished_state(model, tokens, tmp_path / "state.safetensors")
    damage(path)
    damaged = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        stream(model, tokens, state_file=path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("name", ["save_file", "replace"])
def test_a_failed_save_leaves_the_state_before(model, tokens, expected, tmp_path, monkeypatch, name):
    """The disk is full within the second save, or its last step is refused."""
    path, owner = tmp_path / "state.safetensors", {"save_file": cache_file, "replace": os}[name]
    real, calls = getattr(owner, name), []

    def fail(first, target, **kwargs):
        calls.append(target)
        if len(calls) < 2:
            return real(first, target, **kwargs)
        if name == "save_file":
            Path(target).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        reader = stream(model, tokens, chunk_size=50, state_file=path, save_seconds=0, progress=False)
        with pytest.raises(OSError, match="no space"):
            list(reader)
    rest = list(stream(model, tokens, state_file=path, progress=False))
    assert rest[0].start == 51
    assert rest[-1].total == pytest.approx(float(expected.sum()), rel=1e-6)


def read_slowly(path):
    """What the killed process runs."""
    for _ in stream(make_model(), make_tokens(), chunk_size=1, state_file=path, save_seconds=0, progress=False):
        time.sleep(0.02)


def test_goes_on_after_a_kill(model, tokens, expected, tmp_path):
    path, code = tmp_path / "state.safetensors", "import sys, test_streaming as t; t.read_slowly(sys.argv[1])"
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    process = subprocess.Popen([sys.executable, "-c", code, path], env=os.environ | {"PYTHONPATH": folders})
    while not path.exists():
        assert process.poll() is None, "the reader ended without a state"
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    rest = list(stream(model, tokens, state_file=path, progress=False))
    start = rest[0].start
    assert 2 <= start < len(tokens)
    torch.testing.assert_close(rest[0].log_probs, expected[start - 1 :].float(), rtol=0, atol=1e-5)
    assert rest[-1].total == pytest.approx(float(expected.sum()), rel=1e-6)


def test_cache_refuses_tensors_of_another_config_and_stays_as_it_was(model, tokens, tmp_path):
    tensors = load_file(finished_state(model, tokens, tmp_path / "state.safetensors"))
    cache = LongNetCache(model.config)
    cache.load_tensors(tensors)
    assert cache.lengths == [len(tokens) - 1]
    fresh = LongNetCache(model.config)
    with pytest.raises(ValueError, match="saved cache"):
        fresh.load_tensors({name: x for name, x in tensors.items() if name != "1.keys"})
    with pytest.raises(ValueError, match=r"1\.values has .shape, dtype."):
        fresh.load_tensors(tensors | {"1.values": tensors["1.values"][:, :2]})
    assert fresh.get_seq_length() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(5)}, "integers"),
        ({"tokens": torch.zeros(1, 5, dtype=torch.int64)}, "shape"),
        ({"tokens": torch.zeros(5, dtype=torch.bool)}, "torch.bool"),
        ({"tokens": torch.zeros(5, dtype=torch.complex64)}, "torch.complex64"),
        ({"tokens": torch.zeros(1, dtype=torch.int64)}, "L >= 2"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"model": make_model(is_causal=False)}, "is_causal=False"),
        ({"model": make_model().model}, "LongNetModel"),
        ({"state_file": "no-such-folder/state.safetensors"}, "no-such-folder"),
        ({"state_file": Path(__file__).parent}, "must be a file"),
    ],
    ids=[
        "float",
        "matrix",
        "booleans",
        "complex",
        "one",
        "no chunk",
        "bidirectional",
        "no head",
        "no folder",
        "folder",
    ],
)
def test_refuses_bad_arguments_before_the_first_chunk(model, tokens, arguments, message):
    with pytest.raises(ValueError, match=message):
        stream(**({"model": model, "tokens": tokens} | arguments))


def test_refuses_a_model_in_training_mode(model, tokens):
    model.train()
    try:
        with pytest.raises(ValueError, match="training"):
            stream(model, tokens)
    finally:
        model.eval()


@pytest.mark.parametrize("wrong", [-100, -1, VOCABULARY])
def test_ids_that_are_not_in_the_vocabulary_are_refused_before_their_chunk(model, tokens, wrong):
    """The very last one too, which is a target only."""
    tokens = tokens.clone()
    tokens[-1] = wrong
    reader = stream(model, tokens, chunk_size=200, progress=False)
    assert next(reader).stop == 201
    with pytest.raises(ValueError, match=re.escape(f"tokens[306] is {wrong}; allowed are 0 to 96")):
        next(reader)


def test_a_perplexity_beyond_all_numbers_is_infinite(model, tokens):
    wild = copy.deepcopy(model)
    with torch.no_grad():
        wild.lm_head.weight.mul_(1e5)
    last = list(stream(wild, tokens))[-1]
    assert last.total < -800 * last.count
    assert last.perplexity == math.inf


def resident_kib():
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from Linux's /proc")
def test_memory_stays_flat_over_a_hundred_thousand_tokens(model):
    tokens = torch.randint(VOCABULARY, (100_000,), generator=torch.Generator().manual_seed(2))
    sizes = [resident_kib() for _ in stream(model, tokens, chunk_size=2_000, progress=False)]
    # Keeping all keys, values and hidden states would take 2 layers * 90,000 * (24 + 24) * 8 bytes = 67 MiB more.
    assert max(sizes[5:]) - sizes[4] < 32 << 10


def test_the_example_prints_the_perplexity_of_a_finished_text_too(tmp_path, monkeypatch, capsys):
    make_model(vocab_size=384).float().save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    text, state = tmp_path / "text", tmp_path / "state.safetensors"
    text.write_text("a text of a few words, read twice")
    monkeypatch.setattr(sys, "argv", ["stream.py", str(tmp_path), str(text), "--state", str(state)])
    stream_example.main()
    printed = capsys.readouterr().out
    assert re.fullmatch(r"33 tokens, perplexity \d+\.\d{3}\n", printed)
    stream_example.main()
    assert capsys.readouterr().out == printed


def test_the_example_tokenizes_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_example, "PIECE", 10)
    text = tmp_path / "text"
    text.write_text("one line\n\nanother, much longer than a piece\nänd thé last", "utf-8")
    tokenizer = ByT5Tokenizer()
    whole = tokenizer(text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    assert stream_example.tokenize(text, tokenizer, str(tmp_path)).tolist() == whole
    text.write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        stream_example.tokenize(text, tokenizer, str(tmp_path))
