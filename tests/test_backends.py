"""A new backend is one class and one entry in the registry: shown with a few lines of plain PyTorch."""

import pytest
import torch
from checks import assert_close, attend

from modeling_longnet import LongNetConfig
from modeling_longnet.testing import BACKENDS, StridedBackend, choose_backend, make_branches


class PlainBackend(StridedBackend):
    """Attention as written in a textbook, with the gradients of a softmax over more keys than these."""

    def unavailable(self, query):
        return None

    def _weights(self, query, key, lse, is_causal, scale):
        scores = query @ key.transpose(-1, -2) * scale
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        return scores if lse is None else (scores - lse[..., None]).exp()

    def forward(self, query, key, value, is_causal, scale):
        scores = self._weights(query, key, None, is_causal, scale)
        return [(slice(None), scores.softmax(-1) @ value, scores.logsumexp(-1))]

    def backward(self, grad_out, query, key, value, out, lse, is_causal, scale):
        weights = self._weights(query, key, lse, is_causal, scale)
        delta = (grad_out * out).sum(-1, keepdim=True)
        grad_scores = weights * (grad_out @ value.transpose(-1, -2) - delta) * scale
        return grad_scores @ key, grad_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad_out


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_new_backend_is_one_class_and_one_entry(monkeypatch, is_causal):
    monkeypatch.setitem(BACKENDS, "plain", PlainBackend())
    assert choose_backend("plain", torch.zeros(1, 8)) == "plain"
    assert LongNetConfig(attention_backend="plain").attention_backend == "plain"
    branches = make_branches((5, 12, 30), (1, 2, 4), 3, "interleaved")
    tensors = [torch.randn(2, 41, 3, 7, dtype=torch.float64) for _ in range(4)]
    results = []
    for backend in ("plain", "torch"):
        inputs = [x.clone().requires_grad_() for x in tensors[:3]]
        out = attend(*inputs, branches, is_causal=is_causal, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, tensors[3])])
    for name, plain, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_close(name, plain, expected)
