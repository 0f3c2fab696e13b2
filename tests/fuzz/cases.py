"""All kinds of cases, and how many of each in two hundred or so."""

from collections.abc import Callable

from . import arguments, attention, caches, files, models

CASES = attention.CASES | models.CASES | caches.CASES | arguments.CASES | files.CASES
WEIGHTS = {
    "triton": 1, "op": 20, "packed": 8, "sharded": 8, "chunked": 8, "model": 6, "loss": 4, "slide": 3, "image": 2,
    "round trip": 3, "cache": 12, "generation": 2, "reading": 3, "switched": 4, "op arguments": 12,
    "batch arguments": 8, "config arguments": 12, "config file": 12, "weights file": 6, "state file": 10,
    "cache tensors": 10, "conversion source": 8, "tokenizer folder": 4, "model card": 2,
}  # fmt: skip


def all_cases() -> dict[str, Callable]:
    """The function of each kind."""
    return CASES
