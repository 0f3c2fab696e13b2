"""LongNet for Transformers: dilated attention whose cost grows linearly with the sequence (arXiv 2307.02486)."""

from importlib import import_module

import transformers
from transformers import AutoConfig

from .cache_longnet import LongNetCache
from .configuration_longnet import LongNetConfig
from .dilate import DilatedCache, use_dilated_attention
from .dilated_attention import dilated_attention
from .exporting import ExportableDecoder
from .image_encoder import LongNetForImageClassification, LongNetImageConfig, LongNetImageEncoder
from .modeling_longnet import (
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetModel,
    LongNetPreTrainedModel,
)
from .pattern import parse_pattern
from .sharding_accelerate import SequenceSharding
from .slide_encoder import LongNetSlideConfig, LongNetSlideEncoder
from .streaming import Scored, stream

for _config in (LongNetConfig, LongNetSlideConfig, LongNetImageConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto, _path in _config.auto_classes.items():
        if _auto != "AutoConfig":
            _model = globals()[_path.partition(".")[2]]
            getattr(transformers, _auto).register(_config, _model, exist_ok=True)


def __getattr__(name: str):
    """Import the conversion on demand: `python -m modeling_longnet.conversion` warns if it is imported already."""
    if name in ("convert_checkpoint", "export_checkpoint", "to_torchscale"):
        return getattr(import_module(".conversion", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"
__all__ = [
    "DilatedCache",
    "ExportableDecoder",
    "LongNetCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetForImageClassification",
    "LongNetForMaskedLM",
    "LongNetForQuestionAnswering",
    "LongNetForSequenceClassification",
    "LongNetForTokenClassification",
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
    "parse_pattern",
    "stream",
    "to_torchscale",
    "use_dilated_attention",
]
