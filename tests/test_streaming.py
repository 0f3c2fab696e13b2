"""A text read chunk by chunk: the same numbers as one forward, bounded memory, resumable, never half saved."""

import resource

import pytest
import torch
from safetensors.torch import load_file

from modeling_longnet import LongNetCache, LongNetConfig, LongNetForCausalLM, stream

VOCABULARY = 97


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LongNetConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, segment_lengths=[8, 24, 48], dilation_rates=[1, 3, 5],
    )  # fmt: skip
    return LongNetForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(VOCABULARY, (307,), generator=torch.Generator().manual_seed(1))


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


def finished_state(model, tokens, path):
    for _ in stream(model, tokens, state_file=path, progress=False):
        pass
    return path


def test_refuses_states_of_other_texts_and_models_and_damaged_ones(model, tokens, tmp_path):
    path = finished_state(model, tokens, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="another text"):
        stream(model, tokens.flip(0), state_file=path)
    with pytest.raises(ValueError, match="another text"):
        stream(model, tokens[:100], state_file=path)
    torch.manual_seed(5)
    other = LongNetForCausalLM(model.config).double().eval()
    with pytest.raises(ValueError, match="another model"):
        stream(other, tokens, state_file=path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"nonsense", b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            stream(model, tokens, state_file=path)
        assert path.read_bytes() == damaged, "a refused file must be left as it is"


def test_cache_refuses_tensors_of_another_config_and_stays_as_it_was(model, tokens, tmp_path):
    tensors = load_file(finished_state(model, tokens, tmp_path / "state.safetensors"))
    cache = LongNetCache(model.config)
    cache.load_tensors(tensors)
    assert cache.lengths == [len(tokens) - 1]
    fresh = LongNetCache(model.config)
    with pytest.raises(ValueError, match="saved cache"):
        fresh.load_tensors({name: x for name, x in tensors.items() if name != "1.keys"})
    with pytest.raises(ValueError, match=r"1\.values has shape"):
        fresh.load_tensors(tensors | {"1.values": tensors["1.values"][:, :2]})
    assert fresh.get_seq_length() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(5)}, "integers"),
        ({"tokens": torch.zeros(1, 5, dtype=torch.int64)}, "shape"),
        ({"tokens": torch.zeros(1, dtype=torch.int64)}, "L >= 2"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
    ids=["float", "matrix", "one", "no chunk"],
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


def test_memory_stays_flat_over_a_hundred_thousand_tokens(model):
    tokens = torch.randint(VOCABULARY, (100_000,), generator=torch.Generator().manual_seed(2))
    early = peak = 0
    for scored in stream(model, tokens, chunk_size=2_000, progress=False):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
        if scored.stop <= 10_001:
            early = peak
    # Keeping all keys, values and hidden states would take 2 layers * 90,000 * (24 + 24) * 8 bytes = 67 MiB more.
    assert peak - early < 32 << 10
