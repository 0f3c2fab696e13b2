"""The bounded cache: any cut into chunks and steps gives what one forward gives, in bounded memory.

Letters: B batch, L tokens, G key/value heads, P slots.
"""

import copy
import math

import pytest
import torch
from checks import assert_close, make_config, make_model, refused
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from modeling_longnet import LongNetCache, LongNetForCausalLM, LongNetModel, cache_longnet
from modeling_longnet.branches import count_kept
from modeling_longnet.testing import CACHE

EXACT = 1e-10  # float64, through two layers


@st.composite
def models(draw):
    """A model in float64 with any branches, fewer heads than a rate now and then."""
    heads = draw(st.sampled_from([1, 2, 3, 6]))
    if draw(st.booleans()):
        base = draw(st.integers(2, 5))
        lengths, rates = [base, 2 * base, 4 * base], [1, 2, 4]
    else:
        lengths = sorted(draw(st.lists(st.integers(1, 23), min_size=1, max_size=3, unique=True)))
        rates = [draw(st.integers(1, w)) for w in lengths]
    return make_model(
        LongNetModel, implementation=draw(st.sampled_from(["sdpa", "sdpa", "eager"])), segment_lengths=lengths,
        dilation_rates=rates, num_attention_heads=heads, hidden_size=4 * heads, intermediate_size=7,
        num_key_value_heads=draw(st.sampled_from([g for g in (1, 2, 3, 6) if heads % g == 0])),
        head_offsets=draw(st.sampled_from(["interleaved", "blocked"])),
        position_embedding=draw(st.sampled_from(["xpos", "rope"])),
    )  # fmt: skip


def hidden(model, ids, cache=None, **kwargs):
    return model(ids, use_cache=cache is not None, **{CACHE: cache}, **kwargs).last_hidden_state


def most_rows(config, length):
    """sum_i ceil(min(w_i, t) / r_i)."""
    pairs = zip(config.segment_lengths, config.dilation_rates, strict=True)
    return sum(math.ceil(min(w, length) / r) for w, r in pairs)


def held_keys(layer):
    """Per batch row, the keys that later tokens can see, for the head that holds most (all branches)."""
    heads = range(layer.keys.shape[1])
    return [
        max(sum(count_kept(t % b.w, b.offsets[g], b.r) for b in layer.branches) for g in heads) for t in layer.lengths
    ]


@given(models(), st.data())
def test_chunks_and_steps_equal_one_forward(model, data):
    """Ragged rows padded on the left, cut anywhere, with and without gradients; held rows within the formula."""
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    width = max(lengths)
    ids = torch.randint(0, 29, (len(lengths), width))
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths])
    expected = [hidden(model, ids[i : i + 1, width - n :])[0] for i, n in enumerate(lengths)]
    cache, begin, parts = LongNetCache(model.config, data.draw(st.sampled_from([None, 9, 200]))), 0, []
    while begin < width:
        end = min(width, begin + data.draw(st.sampled_from([1, 1, 1, 2, 5, 16, 31])))
        explicit = len(set(lengths)) > 1 or data.draw(st.booleans())
        with torch.set_grad_enabled(data.draw(st.booleans())):
            parts.append(hidden(
                model, ids[:, begin:end], cache, attention_mask=mask[:, :end] if explicit else None,
            ).detach())  # fmt: skip
        begin = end
        for layer in cache.layers:
            for held, n in zip(held_keys(layer), lengths, strict=True):
                assert held <= most_rows(model.config, max(0, n - (width - end)))
            assert layer.keys.shape[2] == most_rows(model.config, layer.capacity)
            assert layer.keys.shape[2] <= most_rows(model.config, 1 << 40)
    out = torch.cat(parts, 1)
    for i, n in enumerate(lengths):
        assert_close(f"row {i}", out[i, width - n :], expected[i].detach(), EXACT)


def test_held_keys_at_every_step():
    model = make_model(LongNetModel, segment_lengths=[4, 6, 20], dilation_rates=[1, 4, 7])
    cache = LongNetCache(model.config)
    with torch.no_grad():
        for t in range(1, 121):
            model(torch.randint(0, 29, (2, 1)), **{CACHE: cache})
            for layer in cache.layers:
                assert max(held_keys(layer)) <= most_rows(model.config, t)
                # Counted where they lie (no slot is zero by chance): head 0 begins every segment, and has all of them.
                written = (layer.keys != 0).any(-1).sum(-1)  # (B, G)
                assert written.max() == written[0, 0] == most_rows(model.config, t)
                # Room is made ahead, in doubling steps from 64 tokens on, but never beyond the bound.
                assert layer.keys.shape[2] <= most_rows(model.config, max(64, 2 * t))
            assert cache.get_seq_length() == t
            assert cache.lengths == [t, t]


@pytest.mark.parametrize("length", [None, 100])
def test_memory_stops_growing(length):
    model = make_model(LongNetModel, torch.float32)
    cache = LongNetCache(model.config, max_length=length)
    sizes = set()
    with torch.no_grad():
        for _ in range(60):
            model(torch.randint(0, 29, (1, 37)), **{CACHE: cache})
            sizes.add((cache.layers[0].keys.shape[2], cache.layers[0].values.untyped_storage().nbytes()))
    assert len(sizes) == 1
    assert sizes.pop()[0] == most_rows(model.config, 60 * 37) == 12


@pytest.mark.parametrize(("branches", "count"), [
    pytest.param({}, 2000, id="nested"),
    pytest.param({"segment_lengths": [6, 10], "dilation_rates": [2, 3]}, 300, id="uncovered"),
])  # fmt: skip
def test_greedy_generation_is_the_argmax_of_one_forward(branches, count):
    """Over hundreds of segment borders, each token is the argmax of what one forward says there."""
    model = make_model(LongNetForCausalLM, position_embedding="rope", **branches)
    prompt = torch.randint(0, 29, (1, 5))
    tokens = model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None)
    assert tokens.shape == (1, 5 + count)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    assert torch.equal(logits[0, 4:-1].argmax(-1), tokens[0, 5:])


def test_the_next_chunk_may_need_a_gradient():
    """A training loop that carries the cache: each chunk has its own gradient, whatever was written to it since."""
    model = make_model(LongNetModel)
    ids = torch.randint(0, 29, (2, 30))
    cache, losses = LongNetCache(model.config), []
    for part in ids.split(7, 1):
        losses.append(hidden(model, part, cache).square().sum())
    sum(losses).backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    cache = LongNetCache(model.config)
    for part in ids.split(7, 1):
        hidden(model, part, cache).square().sum().backward()
    for grad, p in zip(together, model.parameters(), strict=True):
        assert_close("gradient", grad, p.grad, EXACT)


def test_the_loss_of_a_text_in_chunks_is_that_of_the_whole():
    """labels and shift_labels for each chunk, one sum of losses."""
    model = make_model(LongNetForCausalLM)
    ids = torch.randint(0, 29, (1, 61))
    shifted = torch.cat([ids[:, 1:], torch.tensor([[-100]])], 1)
    cache, total = LongNetCache(model.config), 0
    with torch.no_grad():
        for begin in range(0, 61, 13):
            part = slice(begin, begin + 13)
            outputs = model(ids[:, part], shift_labels=shifted[:, part], num_items_in_batch=1, **{CACHE: cache})
            total += outputs.loss
        expected = model(ids, labels=ids).loss * 60
    assert_close("loss", total, expected, EXACT)


def filled(model, length, recording=False, piece=None, seed=0):
    """A cache after `length` tokens (fed in pieces), and those tokens."""
    cache = LongNetCache(model.config)
    if recording:
        for layer in cache.layers:
            layer.activate_past_recording()
    ids = torch.randint(0, 29, (2, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for part in ids.split(piece or length, 1):
            model(part, **{CACHE: cache})
    return cache, ids


def assert_goes_on_like(model, cache, ids):
    """The next tokens give the same after this cache as after these ids."""
    new = torch.randint(0, 29, (len(ids), 9))
    with torch.no_grad():
        expected = hidden(model, torch.cat([ids, new], 1))[:, ids.shape[1] :]
        parts = [hidden(model, part, cache) for part in new.split([1, 1, 7], 1)]
    assert_close("hidden", torch.cat(parts, 1), expected, EXACT)


@given(
    st.one_of(st.integers(1, 45), st.sampled_from([4, 8, 9, 12, 16, 18, 36])),
    st.one_of(st.integers(1, 4), st.integers(1, 45)),
    st.sampled_from([1, 3, 8, 45]),
    st.booleans(),
)
def test_crop_is_exact_or_refused(length, back, piece, recording):
    """Never silently wrong: after a crop that is not refused, the text goes on as if never fed."""
    model = make_model(LongNetModel, segment_lengths=[4, 9, 16], dilation_rates=[1, 3, 5], num_hidden_layers=1)
    cache, ids = filled(model, length, recording, piece)
    kept = length - back
    borders = [w for w in (4, 9, 16) if kept % w and length // w != kept // w]
    recorded = 0 if not recording else length if piece == 1 else (length - 1) % piece + 1
    if piece > 1 and recorded == 1:  # a step after a larger piece: both are in the record
        recorded = min(length, piece + 1)
    if back <= length and (not borders or back <= recorded):
        cache.crop(-back)
        assert cache.get_seq_length() == kept
        assert_goes_on_like(model, cache, ids[:, :kept])
    else:
        with refused(f"crop({-back})"):
            cache.crop(-back)
        assert_goes_on_like(model, cache, ids)  # nothing half-applied


def test_crop_to_a_length():
    model = make_model(LongNetModel)
    for target, left in ((22, 22), (torch.tensor(21), 21), (23, 23), (99, 23), (0, 23), (torch.tensor(-2), 21)):
        cache, ids = filled(model, 23)
        cache.crop(target)
        assert cache.get_seq_length() == left
        assert_goes_on_like(model, cache, ids[:, :left])


@pytest.mark.parametrize("is_padded", [False, True])
def test_many_steps_are_taken_back_over_a_border(is_padded):
    """What an assistant's drafts are: a short piece, twenty steps, and one crop; then the same again."""
    model = make_model(LongNetModel)
    cache, ids = filled(model, 13, recording=True)
    if is_padded:
        cache.reset()
        with torch.no_grad():
            model(torch.cat([ids[:, :1], ids], 1), attention_mask=torch.arange(14).expand(2, -1) > 0, **{CACHE: cache})
    for back in (21, 5, 0):
        drafts = torch.randint(0, 29, (2, 22))
        with torch.no_grad():
            for part in drafts.split([2, *[1] * 20], 1):
                model(part, **{CACHE: cache})
        kept = torch.cat([ids, drafts], 1).shape[1] - back
        ids = torch.cat([ids, drafts], 1)[:, :kept]
        cache.crop(-back)
        assert cache.lengths == [kept, kept]
        assert all(layer._record is None for layer in cache.layers)
    assert_goes_on_like(model, cache, ids)


def test_a_refused_crop_leaves_the_record():
    model = make_model(LongNetModel)
    cache, ids = filled(model, 18, recording=True, piece=15)
    assert cache.layers[0]._record.before["_record"] is None  # a record does not keep the one before
    with refused("crop(-99)", "18"):
        cache.crop(-99)
    with refused("crop(-4)", "discarded"):
        cache.crop(-4)
    cache.crop(-3)
    assert_goes_on_like(model, cache, ids[:, :15])


def test_crop_beyond_the_beginning_of_a_padded_row():
    model = make_model(LongNetModel)
    cache = LongNetCache(model.config)
    mask = torch.stack([torch.arange(19) >= 18, torch.arange(19) >= 0])
    with torch.no_grad():
        model(torch.randint(0, 29, (2, 19)), attention_mask=mask, **{CACHE: cache})
    with refused("crop(-2)", "[1, 19]", "fewer than the 2"):
        cache.crop(-2)


def test_crop_behind_right_padding():
    """The cache cannot know which of the last columns were a row's padding, unless it recorded them."""
    model = make_model(LongNetModel)
    ids, mask = torch.randint(0, 29, (2, 11)), torch.tensor([[1] * 11, [1] * 9 + [0] * 2])
    cache = LongNetCache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, **{CACHE: cache})
        with refused("crop(-1)", "padding"):
            cache.crop(-1)


def test_rows_are_reordered_repeated_and_selected():
    model = make_model(LongNetModel)
    texts = [torch.randint(0, 29, (n,)) for n in (13, 21, 18)]
    ids, mask = torch.zeros(3, 21, dtype=torch.int64), torch.zeros(3, 21)
    for row, text in enumerate(texts):
        ids[row, 21 - len(text) :], mask[row, 21 - len(text) :] = text, 1
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    ):
        cache = LongNetCache(model.config)
        new = torch.randint(0, 29, (len(rows), 5))
        with torch.no_grad():
            model(ids, attention_mask=mask, **{CACHE: cache})
            change(cache)
            assert cache.lengths == [len(texts[row]) for row in rows]
            parts = [hidden(model, part, cache) for part in new.split([1, 4], 1)]
            for i, row in enumerate(rows):
                alone = hidden(model, torch.cat([texts[row], new[i]])[None])[0, -5:]
                assert_close(f"row {i}", torch.cat(parts, 1)[i], alone, EXACT)


def test_reset_forgets():
    model = make_model(LongNetModel)
    cache, _ = filled(model, 23)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_goes_on_like(model, cache, torch.zeros(2, 0, dtype=torch.int64))


def test_inference_mode_and_no_grad_may_alternate():
    model = make_model(LongNetModel)
    ids = torch.randint(0, 29, (2, 12))
    cache = LongNetCache(model.config)
    with torch.inference_mode():
        model(ids[:, :6], **{CACHE: cache})
    with torch.no_grad():
        model(ids[:, 6:7], **{CACHE: cache})
        model(ids[:, 7:], **{CACHE: cache})
    assert_goes_on_like(model, cache, ids)


def test_eager_and_sdpa_share_a_cache():
    model = make_model(LongNetModel)
    cache, ids = filled(model, 23)
    model.set_attn_implementation("eager")
    assert_goes_on_like(model, cache, ids)


def test_steps_of_a_compiled_model():
    torch.compiler.reset()
    model = make_model(LongNetModel, num_hidden_layers=1)
    cache, ids = filled(model, 20)
    compiled, new = torch.compile(model, backend="eager"), torch.arange(4).view(2, 2)
    with torch.inference_mode():
        parts = [hidden(compiled, part, cache) for part in new.split(1, 1)]
        assert_close("hidden", torch.cat(parts, 1), hidden(model, torch.cat([ids, new], 1))[:, 20:], EXACT)


@pytest.mark.parametrize("length", [1, 5])
def test_attention_maps_with_a_cache(length):
    """(B, H, L, P + L): each query's weights over slots and new tokens sum to one."""
    model = make_model(LongNetModel, implementation="eager")
    cache, ids = filled(model, 23)
    slots = cache.layers[0].keys.shape[2]
    with torch.no_grad():
        maps = model(ids[:, :length], output_attentions=True, **{CACHE: cache}).attentions
    assert maps[0].shape == (2, 6, length, slots + length)
    assert_close("sum", maps[0].sum(-1), torch.ones(2, 6, length, dtype=torch.float64))


@pytest.mark.parametrize("length", [1, 40, 128, 200])
def test_a_step_reads_no_slots_after_the_last_one_seen(length):
    """With a rate above the number of heads, most tokens see no slot of that branch, and read none."""
    model = make_model(LongNetModel, segment_lengths=[16, 64, 256], dilation_rates=[1, 4, 16])
    cache = LongNetCache(model.config)
    hidden(model, torch.randint(model.config.vocab_size, (2, length)), cache)
    cache.layers[0].lengths[1] -= 1  # two rows of different length
    read = []
    for _ in range(40):
        mask = cache.steps()[0].mask
        assert (mask[..., -1] == 0).any()
        read.append(mask.shape[-1])
        cache.layers[0].lengths = [t + 1 for t in cache.lengths]
    assert min(read) < max(read)


def test_unread_slots_may_hold_anything():
    """Memory that no token wrote is NaN here: neither the steps nor the chunks read it."""
    model = make_model(LongNetModel)
    cache, ids = filled(model, 17)
    for layer in cache.layers:
        positions, (_, branch, number) = torch.arange(17), cache.layers[0].slot_table()
        w, r, offset = (torch.tensor([b[i] for b in layer.branches])[branch] for i in range(3))
        written = torch.zeros(layer.keys.shape[1:3], dtype=torch.bool)  # (G, P)
        for p in positions:
            if (p // w == 17 // w).any():
                same = p // w == 17 // w
                written |= same & (p % w == number * r + offset.T)
        layer.keys[:, ~written] = layer.values[:, ~written] = 1e6
    assert_goes_on_like(model, cache, ids)


# Refusals: each with what was given and what is allowed, nothing half-applied.


def test_a_cache_of_another_model_is_refused():
    model = make_model(LongNetModel)
    ids = torch.randint(0, 29, (2, 3))
    for other, words in (
        ({"segment_lengths": [4, 8, 32]}, ["another config", "32"]),
        ({"num_hidden_layers": 3}, ["another config", "3"]),
        ({"num_key_value_heads": 3}, ["another config"]),
        ({"head_offsets": "blocked"}, ["another config", "'blocked'"]),
    ):
        with refused(*words):
            model(ids, **{CACHE: LongNetCache(make_config(**other))})


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("grad", [False, True])
def test_misfits_are_refused_and_leave_the_cache_as_it_was(length, grad):
    model = make_model(LongNetModel)
    cache, ids = filled(model, 23)
    new = torch.randint(0, 29, (2, length))
    wide = torch.ones(2, 23 + length)
    contradicting = wide.clone()
    contradicting[0, :2] = 0
    single = copy.deepcopy(model).float()
    with torch.set_grad_enabled(grad):
        for call, words in (
            (lambda: model(new[:1], **{CACHE: cache}), ["2 rows", "1"]),
            (lambda: single(new, **{CACHE: cache}), ["float64", "float32"]),
            (lambda: model(new, attention_mask=wide[:, 1:], **{CACHE: cache}), ["attention_mask", str(23 + length)]),
            (lambda: model(new, attention_mask=contradicting, **{CACHE: cache}), ["contradicts", "[21, 23]"]),
            (
                lambda: model(new, position_ids=torch.arange(length)[None] + 5, **{CACHE: cache}),
                ["begin at 5", "23"],
            ),
            (lambda: model(new + 29, **{CACHE: cache}), ["0 to 28"]),
        ):
            with refused(*words):
                call()
    assert cache.lengths == [23, 23]
    assert_goes_on_like(model, cache, ids)


def test_packed_documents_and_holes_are_refused_with_a_cache():
    model = make_model(LongNetModel)
    cache, ids = filled(model, 23)
    new = torch.randint(0, 29, (2, 4))
    with refused("position_ids", "jump"):
        model(new, position_ids=torch.tensor([[23, 24, 0, 1]]), **{CACHE: cache})
    holes = torch.ones(2, 27)
    holes[1, 24] = 0
    with refused("row 1", "holes"):
        model(new, attention_mask=holes, **{CACHE: cache})
    assert_goes_on_like(model, cache, ids)


def test_an_interrupted_forward_is_noticed(monkeypatch):
    model = make_model(LongNetModel)
    cache, _ = filled(model, 5)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.layers[1].self_attn, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(torch.randint(0, 29, (2, 3)), **{CACHE: cache})
    with refused("interrupted", "start a new one"):
        model(torch.randint(0, 29, (2, 3)), **{CACHE: cache})


@pytest.mark.parametrize(("name", "call"), [("_store", 0), ("strided_view", 4)], ids=["all written", "half written"])
def test_an_interrupted_write_is_noticed(monkeypatch, name, call):
    """Also in a model of one layer, where no other layer shows it."""
    model = make_model(LongNetModel, num_hidden_layers=1)
    cache, ids = filled(model, 15)
    owner = cache.layers[0] if name == "_store" else cache_longnet
    real, calls = getattr(owner, name), iter(range(99))

    def interrupt(*args):
        result = real(*args)
        if next(calls) == call:
            raise KeyboardInterrupt
        return result

    new = torch.randint(0, 29, (2, 12))
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(new, **{CACHE: cache})
    for refuses in (lambda: model(new, **{CACHE: cache}), lambda: cache.crop(-1), cache.to_tensors):
        with refused("interrupted", "start a new one"):
            refuses()
    cache.reset()
    assert_goes_on_like(model, cache, ids[:, :0])


def test_memory_that_runs_out_leaves_the_cache_as_it_was(monkeypatch):
    model = make_model(LongNetModel, segment_lengths=[64, 512], dilation_rates=[1, 4], num_hidden_layers=1)
    cache, ids = filled(model, 60)
    real, calls = torch.cat, iter(range(99))

    def cat(*args, **kwargs):
        if next(calls) == 1:  # the values, after the keys
            raise MemoryError
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", cat)
        with pytest.raises(MemoryError):
            cache.layers[0].reserve(100)
    assert_goes_on_like(model, cache, ids)


def test_a_saved_cache_is_a_copy():
    """Both ways: neither the cache that was saved nor the one loaded writes into the tensors."""
    model = make_model(LongNetModel)
    cache, ids = filled(model, 19)
    tensors = cache.to_tensors()
    for source in (cache, LongNetCache(model.config)):
        source.load_tensors(tensors)
        assert_goes_on_like(model, source, ids)
    last = LongNetCache(model.config)
    last.load_tensors(tensors)
    assert_goes_on_like(model, last, ids)


def test_a_loaded_cache_refuses_what_the_saved_one_refuses():
    model = make_model(LongNetModel)
    cache = LongNetCache(model.config)
    mask = torch.tensor([[1] * 11, [1] * 9 + [0] * 2])
    with torch.no_grad():
        model(torch.randint(0, 29, (2, 11)), attention_mask=mask, **{CACHE: cache})
    loaded, _ = filled(model, 9, recording=True)
    loaded.load_tensors(cache.to_tensors())
    with refused("crop(-1)", "padding"):
        loaded.crop(-1)


@pytest.mark.parametrize(("name", "change"), [
    pytest.param("lengths", lambda x: x + 5, id="more tokens than columns"),
    pytest.param("lengths", lambda x: x - 20, id="negative"),
    pytest.param("capacity", lambda x: x * 0, id="no room"),
    pytest.param("1.keys", lambda x: x.float(), id="dtype"),
    pytest.param("1.values", lambda x: x[:, :2], id="shape"),
    pytest.param("branches", lambda x: x.flip(1), id="branches"),
    pytest.param("lengths", lambda x: x[0], id="one length"),
    pytest.param("lengths", lambda x: x[:0], id="no rows"),
    pytest.param("lengths", lambda x: x.double(), id="fractions"),
    pytest.param("columns", lambda x: x[None], id="a list of columns"),
    pytest.param("capacity", lambda x: x.float(), id="a fraction for capacity"),
    pytest.param("ends_in_padding", lambda x: x[None], id="a list of padding"),
    pytest.param("0.keys", lambda x: x[0, 0, 0, 0], id="a number for keys"),
])  # fmt: skip
def test_damaged_tensors_are_refused_and_leave_the_cache_as_it_was(name, change):
    model = make_model(LongNetModel)
    tensors = filled(model, 19)[0].to_tensors()
    cache, ids = filled(model, 7, seed=3)
    with refused("saved cache"):
        cache.load_tensors(tensors | {name: change(tensors[name])})
    with refused("saved cache"):
        cache.load_tensors({other: x for other, x in tensors.items() if other != name})
    assert_goes_on_like(model, cache, ids)


def test_tensors_of_another_pattern_are_refused():
    """The shapes are the same: only the stored metadata differ."""
    model = make_model(LongNetModel)
    tensors = filled(model, 19)[0].to_tensors()
    with refused("saved cache", "branches"):
        LongNetCache(make_config(head_offsets="blocked")).load_tensors(tensors)


def test_an_offloaded_cache_brings_one_layer_at_a_time(monkeypatch):
    """Slots that were sent away are NaN here until they are brought back, before each use in prompt and steps."""
    model = make_model(LongNetForCausalLM, num_hidden_layers=3)
    ids, away, most = torch.randint(0, 29, (2, 13)), {}, set()
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "num_beams": 1}
    expected = model.generate(ids, **options)

    def offload(layer):
        most.add(sum(x.is_initialized and id(x) not in away for x in layers))
        away[id(layer)] = layer.keys, layer.values
        layer.keys, layer.values = (torch.full_like(x, math.nan) for x in away[id(layer)])

    def prefetch(layer):
        if id(layer) in away:
            layer.keys, layer.values = away.pop(id(layer))

    monkeypatch.setattr(cache_longnet.LongNetCacheLayer, "offload", offload)
    monkeypatch.setattr(cache_longnet.LongNetCacheLayer, "prefetch", prefetch)
    cache = LongNetCache(model.config, max_length=64, offloading=True)
    layers = cache.layers
    assert torch.equal(model.generate(ids, **options, **{CACHE: cache}), expected)
    assert most == {1}
    assert len(away) == 3


def test_generate_makes_an_offloaded_cache():
    model = make_model(LongNetForCausalLM)
    ids = torch.randint(0, 29, (1, 13))
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "num_beams": 2}
    plain = model.generate(ids, **options)
    result = model.generate(ids, cache_implementation="offloaded", return_dict_in_generate=True, **options)
    assert torch.equal(result.sequences, plain)
    assert all(layer.offloading for layer in result[CACHE].layers)


def test_foreign_caches_are_refused():
    model = make_model(LongNetForCausalLM)
    ids = torch.randint(0, 29, (1, 3))
    with refused("DynamicCache", "LongNetCache"):
        model(ids, **{CACHE: DynamicCache()})
    with refused("DynamicCache", "LongNetCache"):
        model.generate(ids, max_new_tokens=2, **{CACHE: DynamicCache()})
    for name in ("static", "quantized", "dynamic"):
        with refused("cache_implementation", name):
            model.generate(ids, max_new_tokens=2, cache_implementation=name)


def test_a_bidirectional_model_has_no_cache():
    model = make_model(LongNetModel, is_causal=False)
    ids = torch.randint(0, 29, (1, 3))
    assert getattr(model(ids, use_cache=True), CACHE) is None
    with refused("is_causal=False"):
        model(ids, **{CACHE: LongNetCache(model.config)})


def test_both_names_of_the_cache_work():
    model = make_model(LongNetForCausalLM)
    ids = torch.randint(0, 29, (1, 13))
    expected = model(ids).logits[:, 6:]
    for name in ("cache", "past_key_values"):
        cache = LongNetCache(model.config)
        model(ids[:, :6], **{name: cache})
        assert_close("logits", model(ids[:, 6:], **{name: cache}).logits, expected, EXACT)
