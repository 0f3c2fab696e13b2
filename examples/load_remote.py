"""Loads a saved model folder by its own code, without our package, offline.

    python examples/load_remote.py FOLDER EXPECTED.safetensors SAMPLE.txt

This file imports none of the other examples, so it also runs where only it and the folder were copied.

Compares the logits with those saved beside `input_ids` when the folder was written, and lets the
model continue a prompt.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

PROMPT = "# example/shapes.py\nclass Shape:\n    def __init__(self, "


def main(folder: str, expected_file: str, sample_file: str) -> None:
    """Loads, compares, samples; raises an error if the logits differ from the saved ones."""
    # A module set to None in sys.modules cannot be imported, even if it is installed.
    sys.modules["modeling_longnet"] = None
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    expected = load_file(expected_file)
    with torch.inference_mode():
        logits = model(expected["input_ids"], use_cache=False).logits
    torch.testing.assert_close(logits, expected["logits"])
    print(f"{type(model).__module__}: the logits equal those of the model that was saved")
    set_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    how = {"do_sample": True, "temperature": 0.8, "top_k": 50, "repetition_penalty": 1.1}  # small models repeat words
    tokens = model.generate(prompt.input_ids, max_new_tokens=160, **how)
    sample = tokenizer.decode(tokens[0], skip_special_tokens=True)
    Path(sample_file).write_text(sample + "\n", encoding="utf-8")
    print(sample)


if __name__ == "__main__":
    main(*sys.argv[1:])
