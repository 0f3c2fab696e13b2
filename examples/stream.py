"""Read a text of any length with a LongNet in constant memory: perplexity so far, throughput, resumable.

    python examples/stream.py MODEL_FOLDER TEXT_FILE --state reading.safetensors

Stop it at any time (Ctrl-C, a kill) and start it again with the same command: it goes on from the last saved state.
"""

import argparse
from collections import deque
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_longnet import stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a LongNetForCausalLM and its tokenizer")
    parser.add_argument("text", type=Path, help="UTF-8 text file")
    parser.add_argument("--chunk-size", type=int, default=4096, help="tokens a forward")
    parser.add_argument("--state", type=Path, help="safetensors file to save to and to go on from")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.text.read_text("utf-8", errors="replace")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    chunks = stream(model, tokens, chunk_size=arguments.chunk_size, state_file=arguments.state)
    last = deque(chunks, maxlen=1)
    if last:
        print(f"{last[0].stop:,} tokens, perplexity {last[0].perplexity:.3f}")
    else:
        print("nothing left to read: the state file already stands at the end of the text")


if __name__ == "__main__":
    main()
