"""Every test runs on one thread, and fresh memory starts as NaN: what reads a value that nothing wrote then fails."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels' module is imported

# The same cases in every run, so that a failure here is a failure everywhere.
settings.register_profile(
    "longnet", max_examples=200, deadline=None, derandomize=True, database=None, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)  # fmt: skip
settings.load_profile("longnet")


@pytest.fixture(autouse=True)
def _scratch_memory_is_nan():
    """PyTorch's own switch, which fills torch.empty and the like; only with deterministic algorithms on."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
