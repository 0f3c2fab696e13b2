"""Transformers' own model tests on the models: `make test-transformers`, minutes on one core.

`exceptions.py` lists what fails or is skipped, and why; `conftest.py` fails a run that differs from the list.
"""

import unittest

import torch
from transformers.models.auto import modeling_auto

from modeling_longnet import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetImageConfig,
    LongNetImageEncoder,
    LongNetModel,
    LongNetSlideConfig,
    LongNetSlideEncoder,
)

from . import exceptions, source

common = source.load("test_modeling_common")
configuration = source.load("test_configuration_common")
fsdp = source.load("test_fsdp_mixin")
training = source.load("test_training_mixin")

# Without these names the training tests take every model for one without a loss.
modeling_auto.MODEL_MAPPING_NAMES |= {
    "longnet": "LongNetModel",
    "longnet_slide": "LongNetSlideEncoder",
    "longnet_image": "LongNetImageEncoder",
}
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES |= {"longnet": "LongNetForCausalLM"}
modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES |= {"longnet": "LongNetForMaskedLM"}
modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES |= {"longnet": "LongNetForQuestionAnswering"}
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES |= {"longnet": "LongNetForSequenceClassification"}
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES |= {"longnet": "LongNetForTokenClassification"}
# None: the distributed tests run for every model with a plan; on the CPU four processes may share a core.
fsdp.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
fsdp._get_available_fsdp_workers = lambda: 4
common.set_config_for_less_flaky_test = exceptions.set_config_for_less_flaky_test

BATCH, LENGTH = 3, 13
SIZES = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "segment_lengths": [4, 16], "dilation_rates": [1, 4],
}  # fmt: skip


class Tester:
    """What the mixins need of a model: a config, inputs, and sizes to compare shapes with."""

    __test__ = False  # pytest takes every name with "Test" for a test
    is_training = True
    batch_size, seq_length = BATCH, LENGTH
    config_class = LongNetConfig
    fields = SIZES

    def __init__(self, parent):
        self.parent = parent
        vars(self).update(self.fields)

    def get_config(self):
        config = self.config_class(**self.fields)
        if self.is_eager:
            config._attn_implementation = "eager"
        return config

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.inputs()


class TextTester(Tester):
    base_model_class = LongNetModel
    causal_lm_class = LongNetForCausalLM
    fields = SIZES | {"vocab_size": 99, "pad_token_id": 0}

    def inputs(self):
        ids = torch.randint(1, 99, (BATCH, LENGTH))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class EncoderTester(TextTester):
    fields = TextTester.fields | {"is_causal": False, "position_embedding": "rope"}


class SlideTester(Tester):
    config_class = LongNetSlideConfig
    seq_length = LENGTH + 1
    # No sequence may skip a residual while gradients are compared.
    fields = SIZES | {"tile_features": LENGTH, "grid_size": 10, "dropout": 0.0, "drop_path_rate": 0.0}

    def inputs(self):
        return {"tiles": torch.randn(BATCH, LENGTH, LENGTH), "coordinates": torch.randint(0, 2560, (BATCH, LENGTH, 2))}


class ImageTester(Tester):
    config_class = LongNetImageConfig
    seq_length = 9
    fields = SIZES | {"image_size": 12, "patch_size": 4, "num_channels": 3, "num_classes": 5}

    def inputs(self):
        return {"pixel_values": torch.randn(BATCH, 3, 12, 12)}


class Suite(common.ModelTesterMixin):
    """The tests of every model and of its configuration."""

    shapes: type[Tester]
    has_text_modality = False

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = self.shapes(self)
        self.model_tester.is_eager = self._testMethodName in exceptions.EAGER

    def test_config(self):
        config_class, fields = self.shapes.config_class, self.shapes.fields
        tester = configuration.ConfigTester(self, config_class, has_text_modality=self.has_text_modality, **fields)
        tester.run_common_tests()


for _name, (_value, _) in exceptions.SETTINGS.items():
    setattr(Suite, _name, _value)


class TestLongNet(
    Suite, common.GenerationTesterMixin, training.TrainingTesterMixin, fsdp.FSDPTesterMixin, unittest.TestCase
):
    shapes = TextTester
    model_tester = None
    all_model_classes = (LongNetModel, LongNetForCausalLM)
    has_text_modality = True


class TestBidirectional(Suite, unittest.TestCase):
    shapes = EncoderTester
    all_model_classes = (LongNetModel,)
    has_text_modality = True


class TestHeads(Suite, unittest.TestCase):
    shapes = EncoderTester
    all_model_classes = (
        LongNetForMaskedLM, LongNetForQuestionAnswering, LongNetForSequenceClassification, LongNetForTokenClassification
    )  # fmt: skip
    has_text_modality = True


class TestSlideEncoder(Suite, unittest.TestCase):
    shapes = SlideTester
    test_resize_embeddings = False
    all_model_classes = (LongNetSlideEncoder,)
    additional_model_inputs = ["coordinates"]


class TestImageEncoder(Suite, unittest.TestCase):
    shapes = ImageTester
    test_resize_embeddings = False
    all_model_classes = (LongNetImageEncoder,)
