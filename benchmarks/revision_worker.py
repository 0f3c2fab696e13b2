"""Run cases for `benchmarks.revisions` with the package of one revision, which PYTHONPATH names.

Reads one JSON request per line and prints one JSON answer: {"make": [case, arguments]} prepares and warms up a case,
{"run": true} times one call of it, in seconds.
"""

import json
import sys
import time

import torch

from modeling_longnet import LongNetCache, LongNetConfig, LongNetForCausalLM, dilated_attention


def op(lengths, rates, mode, dtype, length):
    """The op with 8 heads of 64, forward or forward+backward."""
    inputs = [torch.randn(1, length, 8, 64, dtype=getattr(torch, dtype)).transpose(1, 2) for _ in range(3)]
    if mode == "forward":
        return torch.no_grad()(lambda: dilated_attention(*inputs, lengths, rates))
    inputs, grad_out = [x.requires_grad_() for x in inputs], torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(dilated_attention(*inputs, lengths, rates), inputs, grad_out)


def decode(length, steps):
    """Decoding steps after `length` tokens: 6 layers, 8 heads of 32, the paper's branches."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = LongNetForCausalLM(LongNetConfig(vocab_size=256, **sizes)).eval()
    cache, token = LongNetCache(model.config), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        model(torch.randint(0, 256, (1, length)), cache=cache, past_key_values=cache)

    @torch.no_grad()
    def call():
        for _ in range(steps):
            model(token, cache=cache, past_key_values=cache)

    return call


def train(length):
    """One training step: 2 layers, 4 heads of 64, branches (512, 1) and (2048, 4)."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
    branches = {"segment_lengths": [512, 2048], "dilation_rates": [1, 4]}
    model = LongNetForCausalLM(LongNetConfig(vocab_size=1024, **sizes, **branches)).train()
    ids = torch.randint(0, 1024, (1, length))

    def call():
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return call


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    for line in sys.stdin:
        request = json.loads(line)
        if "make" in request:
            name, arguments = request["make"]
            call = {"op": op, "decode": decode, "train": train}[name](*arguments)
            call()
            answer = None
        else:
            begin = time.perf_counter()
            call()
            answer = time.perf_counter() - begin
        print(json.dumps(answer), flush=True)
