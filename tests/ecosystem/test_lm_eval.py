"""lm-evaluation-harness: likelihoods and generation through its `hf` model."""

import pytest
import torch
from checks import make_model

from modeling_longnet import LongNetForCausalLM

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

LIBRARY = "lm_eval"
TEXT = "user: what is two plus three? assistant: it is five. user: is two five? assistant: what?"


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A model with segments of up to 16 tokens and its tokenizer."""
    make_model(
        LongNetForCausalLM, torch.float32, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(tmp_path)  # fmt: skip
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def load(folder, **options):
    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=2, trust_remote_code=True, **options)


def requests(kind, *arguments):
    return [Instance(kind, {}, x, i, ("task", i, 1)) for i, x in enumerate(arguments)]


def test_reach(folder):
    """texts are cut at the longest segment, or at the length given"""
    assert load(folder).max_length == 16
    assert load(folder, max_length=64).max_length == 64


def test_likelihoods(folder, tokenizer):
    """log-likelihoods of continuations are the model's own"""
    lm, model = load(folder, max_length=64), LongNetForCausalLM.from_pretrained(folder)
    pairs = [("user: what is two", " plus three?"), ("it is", " five."), ("is two five?", " what?")]
    for (context, rest), (found, _) in zip(pairs, lm.loglikelihood(requests("loglikelihood", *pairs)), strict=True):
        ids, begin = tokenizer(context + rest)["input_ids"], len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(scores[i - 1, ids[i]] for i in range(begin, len(ids)))
        assert found == pytest.approx(expected.item(), abs=1e-3)


def test_rolling(folder):
    """rolling log-likelihood of a text beyond the longest segment"""
    [found] = load(folder).loglikelihood_rolling(requests("loglikelihood_rolling", (TEXT,)))
    assert found < 0


def test_generation(folder):
    """generate_until, in a padded batch as alone"""
    lm = load(folder, max_length=64)
    options = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    prompts = [("user: what is two", options), ("it is", options)]
    together = lm.generate_until(requests("generate_until", *prompts))
    alone = [lm.generate_until(requests("generate_until", x))[0] for x in prompts]
    assert together == alone
