"""Private APIs of other libraries are there, or their absence degrades as `compat` documents."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from modeling_longnet import backend_torch, compat

PACKAGE = Path(__file__).parent.parent / "modeling_longnet"


@pytest.mark.parametrize("name", [name for name in vars(compat) if name.startswith(("cpu_", "cuda_"))])
def test_pytorch_has_the_attention_kernels(name):
    assert getattr(compat, name) is not None, (
        f"PyTorch {torch.__version__} no longer has the operator behind compat.{name}; without it backend 'torch' is "
        "unavailable. Find what replaced it in torch.nn.functional.scaled_dot_product_attention."
    )


def test_without_the_kernels_the_backend_is_unavailable(monkeypatch):
    monkeypatch.setitem(backend_torch._KERNELS, "cpu", (None, compat.cpu_flash_backward))
    reason = backend_torch.TorchBackend().unavailable(torch.zeros(1, 1, 1, 8))
    assert torch.__version__ in reason
    assert "'eager'" in reason


def test_transformers_has_what_models_record_outputs_with():
    for module, name in (("generic", "merge_with_config_defaults"), ("output_capturing", "capture_outputs")):
        found = getattr(importlib.import_module(f"transformers.utils.{module}"), name, None)
        ours = getattr(compat, name, None), getattr(compat, f"_{name}", None)
        assert found in [x for x in ours if x is not None], (
            f"transformers.utils.{module}.{name} is gone from {transformers.__version__}: a config's use_cache and "
            "recorded hidden states need what replaced it; see modeling_llama.py there."
        )


@pytest.mark.parametrize(("owner", "name"), [
    (transformers.PreTrainedModel, "_upload_modified_files"),
    (transformers.PreTrainedModel, "prepare_distribute_model"),
    (transformers.GenerationMixin, "_prepare_cache_for_generation"),
])  # fmt: skip
def test_transformers_still_calls_what_is_overridden(owner, name):
    assert callable(getattr(owner, name, None)), f"{owner.__name__}.{name} is gone: our override is never called"
    call, modules = re.compile(rf"(self|cls)\.{name}\("), {base.__module__ for base in owner.__mro__[:-1]}
    assert any(call.search(inspect.getsource(sys.modules[module])) for module in modules), (
        f"nothing in Transformers {transformers.__version__} calls {name} any more"
    )


def test_accelerate_has_its_shared_state():
    from accelerate.state import AcceleratorState

    assert isinstance(getattr(AcceleratorState, "_shared_state", None), dict), (
        "AcceleratorState._shared_state is gone; compat.accelerator_state falls back to the slower constructor."
    )
    assert callable(getattr(compat.ParallelismConfig, "_validate_accelerator", None)), (
        "ParallelismConfig._validate_accelerator is gone; see what refuses sizes above 1 on a CPU now."
    )


def test_without_the_shared_state_there_is_none_before_an_accelerator(monkeypatch):
    monkeypatch.setattr(compat, "AcceleratorState", type("AcceleratorState", (), {}))
    monkeypatch.setattr(compat, "accelerator_is_initialized", lambda: False)
    assert compat.accelerator_state() == {}


MISSING = """
import sys
sys.modules["triton"] = sys.modules["flash_attn"] = None  # their import then fails
import transformers.modeling_utils
from transformers.utils import generic, output_capturing
del generic.merge_with_config_defaults, output_capturing.capture_outputs
import torch
from modeling_longnet import LongNetConfig, LongNetForCausalLM
sizes = dict(vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
model, ids = LongNetForCausalLM(LongNetConfig(**sizes)), torch.zeros(1, 3, dtype=torch.int64)
print(model(ids).logits.shape)
try:
    model(ids, output_hidden_states=True)
except ValueError as error:
    print(error)
"""


def test_the_package_works_without_optional_packages_and_private_names():
    """Models load and run; outputs that can then not be recorded are refused."""
    done = subprocess.run([sys.executable, "-c", MISSING], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 3, 7])" in done.stdout
    assert "no capture_outputs" in done.stdout


def test_private_names_stand_in_compat_alone():
    """Underscored names of other libraries appear in no other file of the package."""
    private = re.compile(r"torch\._[a-zC]|ops\.aten|transformers\._|triton\.(knobs|language\.extra)|_shared_state")
    others = (path for path in PACKAGE.glob("*.py") if path.name != "compat.py")
    found = [f"{path.name}: {match[0]}" for path in others for match in private.finditer(path.read_text())]
    assert not found
