"""Random inputs against the dense reference, and damaged files: `make fuzz`."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels' module is imported
