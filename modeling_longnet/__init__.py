"""LongNet for Transformers: dilated attention whose cost grows linearly with the sequence (arXiv 2307.02486)."""

import sys

import transformers

from .cache_longnet import LongNetCache
from .configuration_longnet import LongNetConfig
from .dilate import DilatedCache, use_dilated_attention
from .dilated_attention import dilated_attention
from .image_encoder import LongNetImageConfig, LongNetImageEncoder
from .modeling_longnet import LongNetForCausalLM, LongNetModel, LongNetPreTrainedModel
from .sharding_accelerate import SequenceSharding
from .slide_encoder import LongNetSlideConfig, LongNetSlideEncoder
from .streaming import Scored, stream

for _config in (LongNetConfig, LongNetSlideConfig, LongNetImageConfig):
    transformers.AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto, _name in _config.auto_classes.items():
        if _auto != "AutoConfig":
            _module, _class = _name.split(".")
            _model = getattr(sys.modules[f"{__name__}.{_module}"], _class)
            getattr(transformers, _auto).register(_config, _model, exist_ok=True)


def __getattr__(name: str):
    """On demand, so that `python -m modeling_longnet.conversion` does not find itself imported already."""
    if name in ("convert_checkpoint", "export_checkpoint", "to_torchscale"):
        from .conversion import convert_checkpoint, export_checkpoint, to_torchscale

        return {x.__name__: x for x in (convert_checkpoint, export_checkpoint, to_torchscale)}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"
__all__ = [
    "DilatedCache",
    "LongNetCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetImageConfig",
    "LongNetImageEncoder",
    "LongNetModel",
    "LongNetPreTrainedModel",
    "LongNetSlideConfig",
    "LongNetSlideEncoder",
    "Scored",
    "SequenceSharding",
    "convert_checkpoint",
    "dilated_attention",
    "export_checkpoint",
    "stream",
    "to_torchscale",
    "use_dilated_attention",
]
