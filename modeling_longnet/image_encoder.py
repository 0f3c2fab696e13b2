"""LongViT (arXiv 2312.03558): a bidirectional LongNet over the patches of an image.

Letters: B images, C channels, L patches, E hidden size.
"""

import copy
from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ModelOutput, can_return_tuple

from .attention_context import make_context
from .compat import capture_outputs, merge_with_config_defaults
from .configuration_longnet import LongNetConfig
from .modeling_longnet import LongNetBackbone, check_shape

# Arguments of language models: passing one raises an error.
TEXT_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache", "past_key_values")


@strict
class LongNetImageConfig(LongNetConfig):
    r"""A bidirectional LongNet over an image's patches. The defaults are LongViT's small model for 1024 pixels.

    Args:
        image_size: side of the image in pixels, a multiple of patch_size.
        patch_size: side of a patch in pixels.
        num_channels: channels of the image, C.
        num_classes: outputs of a linear head on the normed mean over the patches. 0: neither norm nor head.
        Others: as in `LongNetConfig`.

    Raises:
        StrictDataclassError or ValueError: names the field, the value and what is allowed.
    """

    model_type = "longnet_image"
    auto_classes = {
        "AutoConfig": "image_encoder.LongNetImageConfig",
        "AutoModel": "image_encoder.LongNetImageEncoder",
        "AutoModelForImageClassification": "image_encoder.LongNetForImageClassification",
    }

    vocab_size: int | None = None
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_attention_heads: int = 16
    segment_lengths: list[int] | tuple[int, ...] = (64, 128, 256, 512, 1024)
    dilation_rates: list[int] | tuple[int, ...] = (1, 2, 4, 8, 16)
    head_offsets: str = "blocked"
    is_causal: bool = False
    position_embedding: str = "none"
    final_layer_norm: bool = False
    image_size: int = 1024
    patch_size: int = 32
    num_channels: int = 3
    num_classes: int = 0

    def __post_init__(self, **kwargs):
        if self.num_classes and self.id2label is None:
            kwargs.setdefault("num_labels", self.num_classes)
        super().__post_init__(**kwargs)
        # Beside a saved file, `from_pretrained(num_labels=...)` replaces the number of classes.
        if self.transformers_version is None and 0 < self.num_classes != self.num_labels:
            raise ValueError(f"num_classes={self.num_classes} contradicts num_labels={self.num_labels}: give one.")

    def validate_image(self):
        """Check the sizes of image and patches, and that the model is bidirectional and has no vocabulary."""
        sizes = "image_size", "patch_size", "num_channels"
        self._check_numbers(sizes, lambda size: size >= 1, "must be at least 1")
        self._check_numbers(["num_classes"], lambda number: number >= 0, "must be at least 0")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}.")
        if self.is_causal or self.vocab_size is not None:
            raise ValueError(
                f"is_causal={self.is_causal}, vocab_size={self.vocab_size}: an image encoder is bidirectional and has "
                "no vocabulary; leave them at False and None."
            )


@dataclass
class ImageEncoderOutput(ModelOutput):
    """Output of `LongNetImageEncoder`.

    Args:
        last_hidden_state: (B, L, E).
        logits: (B, num_classes), if there is a head.
        hidden_states, attentions: as in Transformers, if requested.
    """

    last_hidden_state: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class LongNetImageEncoder(LongNetBackbone):
    """Encode images: projected patches with learned positions, then a LongNet (LongViT).

    Example:
        >>> encoder = LongNetImageEncoder(LongNetImageConfig(num_hidden_layers=2))
        >>> encoder(torch.randn(1, 3, 1024, 1024)).last_hidden_state.shape
        torch.Size([1, 1024, 384])
    """

    config: LongNetImageConfig
    config_class = LongNetImageConfig
    main_input_name = "pixel_values"
    _input_embed_layer = "patch_embed"

    def __init__(self, config: LongNetImageConfig):
        super().__init__(config)
        size, patch = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(config.num_channels, size, kernel_size=patch, stride=patch)
        self.position_embed = nn.Parameter(torch.zeros(1, (config.image_size // patch) ** 2, size))
        if config.num_classes:
            self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
            self.head = nn.Linear(size, config.num_classes)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values: Tensor | None = None, **kwargs) -> ImageEncoderOutput:
        """Encode images.

        Args:
            pixel_values: (B, C, image_size, image_size), normalised as in training.
            output_hidden_states, output_attentions, return_dict: as in `LongNetModel.forward`.

        Raises:
            ValueError: no images, arguments of a language model, or images of another size than the learned positions.
        """
        if self.sequence_group() is not None:
            raise ValueError("images cannot be sharded; turn sequence sharding off, give each process its own images.")
        given = [name for name in TEXT_INPUTS if kwargs.get(name) is not None]
        if pixel_values is None or given:
            raise ValueError(f"an image encoder takes pixel_values and no arguments of language models; given {given}.")
        side = self.config.image_size
        check_shape("pixel_values", pixel_values, "images", self.config.num_channels, side, side)
        patches = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype)).flatten(2).mT.contiguous()
        embeds = patches + self.position_embed
        backend = self.backend(embeds, kwargs.get("output_attentions", self.config.output_attentions))
        hidden_states = self.encode(embeds, make_context(self.config, embeds, backend))
        logits = self.head(self.norm(hidden_states.mean(1))) if self.config.num_classes else None
        return ImageEncoderOutput(last_hidden_state=hidden_states, logits=logits)


class LongNetForImageClassification(LongNetImageEncoder):
    """A `LongNetImageEncoder` with a head of `num_labels` outputs, and a loss."""

    accepts_loss_kwargs = False  # a mean over the batch: Trainer divides it by the accumulation steps

    def __init__(self, config: LongNetImageConfig):
        config = copy.deepcopy(config)  # the caller may build other models from theirs
        config.num_classes = config.num_labels
        super().__init__(config)

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """Return the loss, if there are labels (B,) or (B, num_labels), and the logits (B, num_labels).

        Others: as in `LongNetImageEncoder.forward`.
        """
        outputs = super().forward(pixel_values, **kwargs | {"return_dict": True})
        loss = labels
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=outputs.logits, config=self.config)
        return ImageClassifierOutput(loss, outputs.logits, outputs.hidden_states, outputs.attentions)


LongNetImageConfig.register_for_auto_class()
LongNetImageEncoder.register_for_auto_class("AutoModel")
LongNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["ImageEncoderOutput", "LongNetForImageClassification", "LongNetImageConfig", "LongNetImageEncoder"]
