"""Read a text of any length with a LongNet in constant memory: perplexity so far, throughput, resumable.

    python -m examples.stream MODEL_FOLDER TEXT_FILE --state reading.safetensors

Stop it at any time (Ctrl-C, a kill). The same command resumes from the last saved state.
"""

import argparse
import tempfile
from collections import deque
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from modeling_longnet import Scored, stream

from .corpus import read_tokenizer

PIECE = 1 << 20  # characters tokenized at once


def tokenize(text_file: Path, tokenizer: PreTrainedTokenizerBase, folder: str) -> torch.Tensor:
    """Tokenize a text, in pieces of whole lines, into a file in `folder`; return it memory-mapped, (n,) int32."""
    ids_file = Path(folder) / "ids"
    size = text_file.stat().st_size
    with (
        text_file.open(encoding="utf-8", errors="replace") as text,
        ids_file.open("wb") as ids,
        tqdm(desc="Tokenizing", total=size, unit="B", unit_scale=True) as progress,
    ):
        while piece := "".join(text.readlines(PIECE)):
            encoded = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            np.array(encoded, dtype=np.int32).tofile(ids)
            progress.update(len(piece.encode()))
    if ids_file.stat().st_size == 0:
        raise ValueError(f"{text_file} holds no text.")
    return torch.from_numpy(np.memmap(ids_file, dtype=np.int32, mode="r+"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a LongNetForCausalLM and its tokenizer")
    parser.add_argument("text", type=Path, help="UTF-8 text file")
    parser.add_argument("--chunk-size", type=int, default=4096, help="tokens per forward pass")
    parser.add_argument("--state", type=Path, help="safetensors file to save to and to resume from")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    tokenizer = read_tokenizer(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        tokens = tokenize(arguments.text, tokenizer, folder)
        chunks = stream(model, tokens, chunk_size=arguments.chunk_size, state_file=arguments.state)
        last = deque(chunks, maxlen=1)
    # If an earlier run finished the text, no chunk is left.
    scored = last[0] if last else Scored.from_state_file(arguments.state)
    print(f"{scored.stop:,} tokens, perplexity {scored.perplexity:.3f}")


if __name__ == "__main__":
    main()
