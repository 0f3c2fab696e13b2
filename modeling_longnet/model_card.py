"""The model card of a saved LongNet: README.md, built with huggingface_hub's `ModelCard`.

The metadata field `longnet_card` is a digest of the text: if it matches, nobody edited the card, and saving renews it.
Transformers' generic card is replaced. The Trainer's card stays and ours goes in front. Any other README.md is left
alone. Tags and other metadata of a replaced card are kept in the new one.
"""

import hashlib
import logging
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .pattern import Pattern
from .saving import merging

logger = logging.getLogger(__name__)
DIGEST = "longnet_card"
# From the cards that Transformers generates.
GENERIC = "model card has been automatically generated"
TRAINER = "This model card has been generated automatically according to the information the Trainer had access to"
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
}
TAGS = ["longnet", "dilated-attention", "long-context", "custom_code"]
# By model type; before the licence of the code.
NOTICES = {
    "longnet_slide": (
        "\nThis encoder turns the tiles of a slide into embeddings. It diagnoses nothing: it is not a medical device, "
        "and no\ndecision about a patient may rest on it. A classifier on top of it must be validated for its purpose, "
        "scanners,\nstains and patients.\n"
    )
}
TEXT = """
# LongNet

A LongNet ([arXiv 2307.02486](https://arxiv.org/abs/2307.02486)): a Transformer with dilated attention,
whose time and memory grow linearly with the sequence length.

| | |
| --- | --- |
| kind | {kind} |
| parameters | {parameters:,} |
| layers, hidden size, heads | {config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads} |
| vocabulary | {config.vocab_size} |
| branches (segment length, dilation rate) | {branches} |
| positions | {config.position_embedding} |
{notice}
This card was generated when the model was saved and describes the architecture only. Training data,
evaluation results and intended uses are for the author to add. The licence above is that of the code in
this folder; the author decides on the licence of the weights.

## Use

The folder contains its own code and needs only Transformers (5.17 or newer) and PyTorch.
`trust_remote_code=True` runs that code: read it first.

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("path/of/this/folder", trust_remote_code=True)
```

- `attn_implementation="eager"` is the dense reference with attention maps, quadratic in the length.
  The default, `"sdpa"`, is the fast path.
- `segment_lengths=[...]` and `dilation_rates=[...]` passed to `from_pretrained` use the same weights
  with other branches; pass `query_rates` and `window_size` too (or None), if the config sets them.
  Measure the quality of the result.
- Attention dropout is not supported. Attention is dense to nearby tokens and sparse to distant ones:
  whether a head sees a distant token depends on the token's position.

## Citation

```bibtex
@article{{ding2023longnet,
  title   = {{LongNet: Scaling Transformers to 1,000,000,000 Tokens}},
  author  = {{Ding, Jiayu and Ma, Shuming and Dong, Li and Zhang, Xingxing and Huang, Shaohan and
             Wang, Wenhui and Zheng, Nanning and Wei, Furu}},
  journal = {{arXiv preprint arXiv:2307.02486}},
  year    = {{2023}}
}}
```
"""


class ModelCardMixin:
    """Write the model card where `save_pretrained` and `push_to_hub` of a `PreTrainedModel` write a folder."""

    def save_pretrained(
        self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, *args, **kwargs
    ):
        """As in Transformers, but an interrupted save keeps the former files; the folder also gets the model card.

        A README.md that a person wrote is kept.
        """
        arguments = is_main_process, state_dict, push_to_hub, *args
        is_shared = kwargs.get("distributed_checkpoint") or getattr(self.config, "distributed_config", None)
        if is_main_process and not push_to_hub and not is_shared:
            with merging(Path(save_directory)) as scratch:
                super().save_pretrained(scratch, *arguments, **kwargs)
                write_model_card(self, Path(save_directory), scratch)
            return
        # An upload and other processes need the folder itself.
        super().save_pretrained(save_directory, *arguments, **kwargs)
        if is_main_process:
            write_model_card(self, Path(save_directory))

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # Just before, Transformers puts the Hub's card or its generic one into the folder.
        write_model_card(self, Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def write_model_card(model, folder: Path, target: Path | None = None) -> None:
    """Write README.md to `target`, by default `folder`, unless a person wrote or edited that of `folder`."""
    readme = folder / "README.md"
    card = make_model_card(model, readme.read_text("utf-8", errors="replace") if readme.exists() else None)
    if card is not None:
        card.save((target or folder) / readme.name)


def make_model_card(model, previous: str | None = None) -> ModelCard | None:
    """Return the card of a model, given the README.md it is to replace; None if a person wrote or edited that one."""
    config, auto_class = model.config, model._auto_class or "AutoModel"
    text = TEXT.format(
        config=config,
        kind="causal decoder" if config.is_causal else "bidirectional encoder",
        parameters=model.num_parameters(),
        branches=_branches(config),
        notice=NOTICES.get(config.model_type, ""),
        auto_class=auto_class,
    )
    pipeline = PIPELINES.get(auto_class, "feature-extraction")
    own = {"library_name": "transformers", "pipeline_tag": pipeline, DIGEST: _digest(text)}
    metadata = {"license": "apache-2.0"}
    if previous is not None:
        card = _parse(previous)
        if card is None:
            return None
        metadata |= card.data.to_dict()
        if TRAINER in card.text:
            text += card.text  # the digest no longer matches, so later saves keep this card
    data = ModelCardData(**metadata | own | {"tags": [*TAGS, *metadata.get("tags", [])]})
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _branches(config) -> str:
    """Return the branches, and what of their pattern goes beyond the paper."""
    pattern = Pattern.of(config)
    pairs = map(str, zip(pattern.segment_lengths, pattern.dilation_rates, strict=True))
    return ", ".join([*pairs, *(f"{name} {x}" for name, x in pattern.beyond.items())])


def _parse(text: str) -> ModelCard | None:
    """Return the card if a machine wrote it and nobody edited it, else None."""
    if not any(sign in text for sign in (DIGEST, GENERIC, TRAINER)):
        return None
    try:
        card = ModelCard(text)
    except (RecursionError, TypeError, ValueError, yaml.YAMLError) as error:  # edited, and no longer valid
        logger.warning("README.md is kept as it is: its metadata cannot be read (%s).", error)
        return None
    if DIGEST in card.data:
        return card if card.data[DIGEST] == _digest(card.text) else None
    return card if GENERIC in card.text or TRAINER in card.text else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
