"""Whole models as one graph: torch.compile(fullgraph=True) in training, torch.export. Numbers are the eager model's."""

import copy

import pytest
import torch
from checks import assert_close, make_model, refused
from transformers import DynamicCache

from modeling_longnet import (
    ExportableDecoder,
    LongNetCache,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    chunked_loss,
    parse_pattern,
)
from modeling_longnet.compat import CACHE

RAGGED = torch.ones(3, 21, dtype=torch.int64)
RAGGED[0, :4] = RAGGED[1, -5:] = 0
PACKED = torch.cat([torch.arange(9), torch.arange(12)])[None]
# The first row is padded on the left and its ids count columns; the others hold two documents.
BOTH = torch.cat([torch.arange(21)[None], PACKED, PACKED])


def make(model_class, *args, **fields):
    return make_model(model_class, *args, num_hidden_layers=1, **fields)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def make_ids(batch=3, length=21):
    return torch.randint(0, 29, (batch, length), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model, call, **inputs):
    model.zero_grad()
    loss = call(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("inputs", "fields"), [
    pytest.param({"num_items_in_batch": torch.tensor(7)}, {"tie_word_embeddings": True}, id="items, tied"),
    pytest.param({"position_ids": PACKED}, {"position_embedding": "rope"}, id="packed"),
    pytest.param({"attention_mask": RAGGED, "position_ids": BOTH}, {}, id="mask, packed"),
    pytest.param({"attention_mask": RAGGED}, {"is_causal": False}, id="masked language model"),
])  # fmt: skip
def test_training_is_one_graph(inputs, fields):
    model = make(LongNetForMaskedLM if fields.get("is_causal") is False else LongNetForCausalLM, **fields).train()
    inputs = inputs | {"input_ids": make_ids(), "labels": make_ids()}
    inputs["labels"][:, :6] = -100
    expected = loss_and_gradients(model, model, **inputs)
    actual = loss_and_gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True), **inputs)
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert_close(name, actual[name], x, 1e-11)


def test_a_graph_trains_what_requires_gradients():
    """No gradient of a frozen head is computed, none at all without gradients; autocast is the eager model's."""
    model, ids = make(LongNetForCausalLM, torch.float32).train(), make_ids()
    model.lm_head.requires_grad_(False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (loss_and_gradients(model, x, input_ids=ids, labels=ids) for x in (model, compiled))
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert_close(name, actual[name], x, 2**-8)
    model.eval().logits_with_labels = False
    with torch.no_grad():
        assert_close("loss", compiled(ids, labels=ids).loss, model(ids, labels=ids).loss, 1e-6)


def test_a_graph_never_holds_all_logits():
    """The loss of a linear head is one operator, which computes the logits of a chunk of tokens at a time."""
    model, ids, graphs = make(LongNetForCausalLM).train(), make_ids(), []
    torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)(ids, labels=ids)
    [graph] = graphs
    nodes = [node for module in graph.modules() if hasattr(module, "graph") for node in module.graph.nodes]
    assert [node for node in nodes if "linear_cross_entropy" in str(node.target)]
    shapes = [node.meta["example_value"].shape for node in nodes if hasattr(node.meta.get("example_value"), "shape")]
    assert (3, 21, 24) in shapes
    assert max(shape.numel() for shape in shapes if 29 in shape) == 24 * 29  # the head's weight


@pytest.mark.parametrize("needed", [[True, True, True], [False, True, False], [False, False, False]], ids=str)
def test_the_linear_loss_in_chunks(needed):
    """The operator's gradients are autograd's, whatever the chunk; ignored tokens count for nothing."""
    inputs = [torch.randn(17, 5), torch.randn(7, 5), torch.randn(7)]
    inputs = [x.double().requires_grad_() for x in inputs]
    targets = torch.arange(17) % 7
    targets[3:9] = -100
    logits = torch.nn.functional.linear(*inputs)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    gradients = torch.autograd.grad(expected, inputs)
    with torch.no_grad():
        for size in (1, 4, 11, 50):
            loss, *found = chunked_loss._linear_loss(inputs[0], targets, *inputs[1:], size, needed)
            assert_close("loss", loss, expected)
            for name, x, gradient, is_needed in zip("hwb", found, gradients, needed, strict=True):
                assert_close(name, x, gradient if is_needed else x.new_empty(0))


def test_a_compiled_model_fills_its_cache_under_a_mask():
    """The graph may break there: the cache needs numbers."""
    model, ids = make(LongNetForCausalLM, segment_lengths=[4], dilation_rates=[1]), make_ids(2, 9)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected, actual = (f(ids, attention_mask=RAGGED[1:, -9:].flip(0)) for f in (model, compiled))
        assert_close("logits", actual.logits[0], expected.logits[0])
        caches = [getattr(x, CACHE) for x in (expected, actual)]
        assert caches[0].lengths == caches[1].lengths == [9, 4]
        for name, x in caches[0].to_tensors().items():
            assert_close(name, caches[1].to_tensors()[name].double(), x.double())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_compiled_model_checks_the_mask(implementation):
    model, holes = make(LongNetForCausalLM, implementation=implementation), torch.ones(3, 21)
    holes[1, 4] = 0
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="row 1 has holes"):
        compiled(make_ids(), attention_mask=holes, use_cache=False)
    with pytest.raises(ValueError, match="jump at column 1"):
        compiled(make_ids(), position_ids=2 * torch.arange(21)[None], use_cache=False)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("is_masked", [False, True], ids=["no mask", "mask"])
def test_exported_for_any_size(implementation, is_masked):
    model, size = make(LongNetForCausalLM, implementation=implementation), torch.export.Dim.DYNAMIC

    def draw(batch, length):
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[0, :4] = mask[1, -5:] = 0
        return {"input_ids": make_ids(batch, length)} | ({"attention_mask": mask} if is_masked else {})

    inputs = draw(3, 21)
    shapes = {name: {0: size, 1: size} for name in inputs}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
        for inputs in (draw(3, 21), draw(2, 37)):
            actual, expected = program(**inputs), model(**inputs, use_cache=False)
            real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            assert_close("logits", actual.logits[real], expected.logits[real], 1e-11)


ROPE = {"position_embedding": "rope"}
PATTERNS = {
    "paper": {},
    "more rate than heads": {"segment_lengths": [4, 12], "dilation_rates": [3, 8], "num_key_value_heads": 2},
    "window and summaries": ROPE | parse_pattern("w3 6/2:1 12/4:1 once"),
    "some layers": ROPE | parse_pattern("w3 6/2:1 12/4:1 once every2") | {"num_hidden_layers": 2},
    "all remedies": ROPE | parse_pattern("w4 8/2 16/4 rotate stagger once") | {"num_hidden_layers": 2},
    "window alone": ROPE | parse_pattern("w5") | {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("fields", PATTERNS.values(), ids=PATTERNS)
def test_exported_decoding(fields):
    """A program continues a padded prompt, and begins anew, past every segment: the logits of the whole text."""
    model = make_model(LongNetForCausalLM, **{"num_hidden_layers": 1} | fields)
    ids, mask = make_ids(3, 40), torch.ones(3, 40, dtype=torch.int64)
    mask[0, :4] = 0
    decode = ExportableDecoder(model)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        state = decode.state(cache=getattr(model(ids[:, :7], attention_mask=mask[:, :7]), CACHE))
        program = torch.export.export(decode, (ids[:, :1], *state)).module()
        for column in range(7, 40):
            logits, *state = program(ids[:, column : column + 1], *state)
            assert_close(f"column {column}", logits[:, 0], expected[:, column], 1e-11)
        whole, state = model(ids).logits, decode.state(batch_size=3)
        for column in range(40):
            logits, *state = program(ids[:, column : column + 1], *state)
            assert_close(f"column {column}", logits[:, 0], whole[:, column], 1e-11)


def test_an_exported_decoder_takes_any_batch_and_is_copied():
    model = make(LongNetForCausalLM)
    decode, ids = copy.deepcopy(ExportableDecoder(model)), make_ids(5, 9)
    batch = torch.export.Dim("batch")
    inputs = (ids[:3, :1], *decode.state(batch_size=3))
    shapes = {"input_ids": {0: batch}, "lengths": {0: batch}, "slots": tuple({0: batch} for _ in inputs[2:])}
    with torch.no_grad():
        program, expected = torch.export.export(decode, inputs, dynamic_shapes=shapes).module(), model(ids).logits
        state = decode.state(batch_size=5)
        for column in range(9):
            logits, *state = program(ids[:, column : column + 1], *state)
            assert_close(f"column {column}", logits[:, 0], expected[:, column], 1e-11)
    moved = decode.to("meta")
    assert moved(ids[:, :1].to("meta"), *moved.state(batch_size=5))[0].shape == (5, 1, 29)


def test_an_exported_decoder_refuses_what_does_not_fit():
    model = make(LongNetForCausalLM)
    decode = ExportableDecoder(model)
    token, lengths, *slots = (make_ids(2, 1), *decode.state(2))
    for given, words in (
        ((make_ids(2, 2), lengths, *slots), ["input_ids has shape (2, 2)"]),
        ((token, lengths, *slots[1:]), ["a state has", "got"]),
        ((token, lengths, *(x[:1] for x in slots)), ["state[1] has shape (1, "]),
    ):
        with refused(*words):
            decode(*given)
    other, cache = make(LongNetForCausalLM, num_key_value_heads=2), getattr(model(make_ids()), CACHE)
    with refused("another config"):
        decode.state(cache=getattr(other(make_ids()), CACHE))
    with refused("3 rows", "has 7"):
        decode.state(batch_size=7, cache=cache)
    with refused("DynamicCache"):
        decode.state(cache=DynamicCache())
    with refused("LongNetForMaskedLM"):
        ExportableDecoder(make(LongNetForMaskedLM, is_causal=False))
    for wrong, words in ((make(LongNetForCausalLM, is_causal=False), "is_causal"), (other.train(), "training")):
        with refused(words):
            ExportableDecoder(wrong)


def test_a_cache_is_not_exported():
    model = make(LongNetForCausalLM)
    with pytest.raises(Exception, match="LongNetCache"):
        torch.export.export(model, (make_ids(),), {"past_key_values": LongNetCache(model.config)})
