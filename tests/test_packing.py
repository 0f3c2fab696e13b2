"""Padding and packing: every document gives exactly what it gives alone."""

import pytest
import torch
from checks import assert_close, make_model, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_longnet import LongNetForCausalLM, LongNetModel
from modeling_longnet.packing import pack

BRANCHES = [
    pytest.param({"segment_lengths": [4, 8, 16], "dilation_rates": [1, 2, 4]}, id="nested"),
    pytest.param(
        {"segment_lengths": [6, 10], "dilation_rates": [2, 3], "num_key_value_heads": 3}, id="uncovered, shared"
    ),
]
KINDS = [
    pytest.param({"is_causal": True}, id="causal"),
    pytest.param({"is_causal": False}, id="bidirectional"),
    pytest.param({"is_causal": False, "attend_zero_padding": True}, id="zero padding"),
]
IMPLEMENTATIONS = ["sdpa", "eager"]


def random_texts(lengths):
    return [torch.randint(0, 29, (n,)) for n in lengths]


def hidden(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).last_hidden_state


def pad(texts, side, width):
    """ids and mask (B, width), each text on the left or the right, padding of random tokens."""
    ids, mask = torch.randint(0, 29, (len(texts), width)), torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        begin = {"left": width - len(text), "right": 0, "both": (width - len(text)) // 2}[side]
        ids[row, begin : begin + len(text)] = text
        mask[row, begin : begin + len(text)] = 1
    return ids, mask


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_texts_equal_each_alone(side, branches, kind, implementation):
    model = make_model(LongNetModel, implementation=implementation, **branches, **kind)
    texts = random_texts([19, 37, 1, 37, 8])
    ids, mask = pad(texts, side, 41)
    out = hidden(model, ids, attention_mask=mask)
    assert torch.isfinite(out).all()
    for row, text in enumerate(texts):
        assert_close(f"row {row}", out[row, mask[row].bool()], hidden(model, text[None])[0], 1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("branches", BRANCHES)
def test_packed_documents_equal_each_alone(branches, kind, implementation):
    model = make_model(LongNetModel, implementation=implementation, **branches, **kind)
    lengths = [[5, 17, 1, 18], [41]]
    texts = [random_texts(row) for row in lengths]
    ids = torch.stack([torch.cat(row) for row in texts])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    out = hidden(model, ids, position_ids=positions)
    for row in range(2):
        for text, part in zip(texts[row], out[row].split(lengths[row]), strict=True):
            assert_close("document", part, hidden(model, text[None])[0], 1e-11)


@given(st.data())
@settings(max_examples=60)
def test_packed_and_padded(data):
    """Any documents, with padding on either side, positions that run on through it as generate gives them."""
    model = make_model(LongNetModel, is_causal=data.draw(st.booleans()), segment_lengths=[4, 9], dilation_rates=[1, 3])
    batch = data.draw(st.integers(1, 3))
    rows = [data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=3)) for _ in range(batch)]
    width = max(map(sum, rows)) + data.draw(st.integers(0, 4))
    ids, mask, positions = torch.randint(0, 29, (batch, width)), torch.zeros(batch, width), torch.zeros(batch, width)
    begins = [data.draw(st.integers(0, width - sum(row))) for row in rows]
    for i, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        end = begin + sum(row)
        mask[i, begin:end] = 1
        positions[i, begin:end] = torch.cat([torch.arange(n) for n in row])
        positions[i, end:] = data.draw(st.sampled_from([0, 1, positions[i, end - 1].item()]))
    out = hidden(model, ids, attention_mask=mask, position_ids=positions.long())
    assert torch.isfinite(out).all()
    for i, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        for n in row:
            assert_close(
                "document", out[i, begin : begin + n], hidden(model, ids[i : i + 1, begin : begin + n])[0], 1e-11
            )
            begin += n


def test_gradients_of_packed_documents_are_the_sum_of_each():
    """Nothing leaks through the backward pass, nor through the loss: the collator marks first labels with -100."""
    model = make_model(LongNetForCausalLM)
    lengths = [5, 17, 19]
    texts = random_texts(lengths)
    ids = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.clone()
    labels[positions == 0] = -100
    model(ids, position_ids=positions, labels=labels, num_items_in_batch=7).loss.backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for text in texts:
        model(text[None], labels=text[None], num_items_in_batch=7).loss.backward()
    for (name, p), grad in zip(model.named_parameters(), packed, strict=True):
        assert_close(name, grad, p.grad, 1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_gets_no_gradient(implementation):
    model = make_model(LongNetModel, implementation=implementation)
    embeds = torch.randn(2, 11, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0] * 4 + [1] * 7, [1] * 9 + [0] * 2])
    out = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    (grad,) = torch.autograd.grad(out[mask.bool()].square().sum(), embeds)
    assert (grad[mask == 0] == 0).all()
    assert (grad[mask == 1] != 0).any(-1).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_of_padding_alone_disturbs_no_other(implementation):
    model = make_model(LongNetModel, implementation=implementation)
    ids = torch.randint(0, 29, (2, 11))
    out = hidden(model, ids, attention_mask=torch.tensor([[0] * 11, [1] * 11]))
    assert torch.isfinite(out).all()
    assert_close("row 1", out[1], hidden(model, ids[1:])[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.int32])
def test_any_dtype_of_mask(dtype):
    model = make_model(LongNetModel)
    ids, mask = pad(random_texts([7, 11]), "left", 11)
    assert torch.equal(hidden(model, ids, attention_mask=mask.to(dtype)), hidden(model, ids, attention_mask=mask))


def test_a_mask_of_ones_and_plain_positions_change_nothing():
    model = make_model(LongNetModel)
    ids = torch.randint(0, 29, (2, 21))
    expected = hidden(model, ids)
    assert torch.equal(hidden(model, ids, attention_mask=torch.ones(2, 21)), expected)
    assert torch.equal(hidden(model, ids, position_ids=torch.arange(21)[None]), expected)


def test_positions_that_count_columns_change_nothing():
    """As the models of Transformers make them where none are given: padding counted."""
    model = make_model(LongNetModel)
    ids, mask = pad(random_texts([7, 11]), "left", 11)
    counted = hidden(model, ids, attention_mask=mask, position_ids=torch.arange(11)[None])
    assert torch.equal(counted, hidden(model, ids, attention_mask=mask))


def test_chunks_are_found():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0] * 6])
    positions = torch.tensor([[0, 0, 0, 1, 0, 1], [0, 0, 0, 1, 0, 1], [0, 1, 2, 0, 0, 0], [0] * 6])
    packing = pack(4, 6, torch.device("cpu"), mask, positions)
    assert packing.chunks == ((0, 2, 2, 4, 0, 2), (0, 2, 4, 6, 0, 2), (2, 3, 0, 3, 0, 3))
    assert packing.documents.tolist() == [
        [-1, -1, 0, 0, 1, 1], [-1, -1, 0, 0, 1, 1], [2, 2, 2, -1, -1, -1], [-1] * 6
    ]  # fmt: skip


@pytest.mark.parametrize(("kwargs", "words"), [
    pytest.param({"attention_mask": torch.tensor([[1, 1, 0, 1]] * 2)}, ["row 0", "holes", "side by side"], id="hole"),
    pytest.param({"attention_mask": torch.ones(2, 5)}, ["attention_mask", "(2, 5)", "(2, 4)"], id="too wide"),
    pytest.param({"attention_mask": torch.ones(2, 3)}, ["attention_mask", "(2, 3)", "(2, 4)"], id="too narrow"),
    pytest.param({"attention_mask": torch.ones(1, 4)}, ["attention_mask", "(1, 4)"], id="another batch"),
    pytest.param({"attention_mask": torch.ones(4)}, ["attention_mask", "(4,)"], id="1D"),
    pytest.param({"attention_mask": torch.ones(2, 1, 4, 4)}, ["(2, 1, 4, 4)", "pairs"], id="4D"),
    pytest.param({"position_ids": torch.tensor([[0, 1, 5, 6]])}, ["column 2", "from 1 to 5"], id="jump"),
    pytest.param({"position_ids": torch.tensor([[0, 1, 1, 2]])}, ["position_ids", "column 2"], id="restart at 1"),
    pytest.param({"position_ids": torch.tensor([[3, 4, 5, 6]])}, ["position_ids", "begin at 3"], id="late begin"),
    pytest.param({"position_ids": torch.arange(4)}, ["position_ids", "(4,)"], id="1D positions"),
    pytest.param({"position_ids": torch.arange(5)[None]}, ["position_ids", "(1, 5)", "4"], id="long positions"),
    pytest.param({"position_ids": torch.arange(4).expand(3, 4)}, ["position_ids", "(3, 4)"], id="positions' batch"),
])  # fmt: skip
def test_masks_and_positions_that_do_not_fit_are_refused(kwargs, words):
    model = make_model(LongNetModel)
    with refused(*words):
        model(torch.randint(0, 29, (2, 4)), **kwargs)


def test_a_mask_to_be_added_to_scores_is_refused():
    for drop in (-torch.inf, torch.nan, -10_000.0):
        mask = torch.tensor([[0.0, 0.0, drop, drop]])
        with refused("attention_mask has values other than 0 and 1"):
            pack(1, 4, mask.device, mask)
