"""
make test-common: transformers' own tests of models and processors, on this model. They come out of the source
distribution of the pinned release, which the Makefile fetches; nothing of theirs is copied here. The stock base, which
BASE names, runs beside ours, without audio, so that what fails or is skipped for ours alone stands out.

The source distribution leaves `tests/generation` out. `GenerationTesterMixin` runs where `TRANSFORMERS_SOURCE` names a
checkout of the release: `TRANSFORMERS_SOURCE=../transformers make test-common`.
"""

import contextlib
import os
import sys
import types
import unittest
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import BASE
from sounds import encode
from transformers import CONFIG_MAPPING, ProcessorMixin, testing_utils

from demo.bases import ASSETS, make_bases
from publishing.build import build
from publishing.paths import ROOT, family_class, type_on


SOURCE = Path(os.environ.get("TRANSFORMERS_SOURCE", ROOT / ".venv" / "transformers-source"))
if not (SOURCE / "tests").is_dir():
    pytest.skip(f"{SOURCE} has no tests of transformers; `make test-common` fetches them.", allow_module_level=True)

# One of theirs waits for a deprecation warning.
pytestmark = [pytest.mark.common, pytest.mark.filterwarnings("always")]

NO_AUTO_MAP = (
    "transformers gives a processor of custom code an `auto_map` when it saves it, and drops it when it loads one, so "
    "`to_dict` of the two differs for every such class."
)
# Why a maintainer of transformers would not expect these to pass. One that passes nevertheless fails the run.
EXCUSED = {
    "test_processor_from_and_save_pretrained": NO_AUTO_MAP,
    "test_processor_from_and_save_pretrained_as_nested_dict": NO_AUTO_MAP,
    "test_bc_cache_name_forward": (
        "It waits for the deprecation of `past_key_values`, the only name of the cache on transformers 5.16 to 5.23; "
        "this model runs on these as well, and takes both names without a warning."
    ),
    "test_can_init_all_missing_weights": (
        "For custom code transformers leaves out `_init_weights` of modules that own no parameter directly, and "
        "WhisperEncoder writes its sinusoidal positions there; every checkpoint carries them."
    ),
    "test_apply_chat_template_tool_calls_no_content": (
        "It runs for templates that name tools, and this one does so to refuse them; a message with tool calls is "
        "refused as well, and not rendered without them."
    ),
    "test_init_arguments_not_in_processor_kwargs": (
        "`audio_tokens` is a property of a checkpoint, saved with its processor, and a call may ask for the other kind "
        "to compare; the test itself says that it may be too strict for arguments with such a default."
    ),
    "test_chat_template_audio_sampling_rate": (
        "It expects `apply_chat_template` to decode clips and to pass their rate on; here `__call__` decodes them, and "
        "resamples each from its own rate to the feature extractor's."
    ),
}

# Modules of theirs that the source distribution leaves out, and what the others import from them.
LEFT_OUT = {
    "tests.generation.test_utils": "GenerationTesterMixin",
    "tests.exporters.test_export": "ExportTesterMixin",  # to ONNX, OpenVINO and ExecuTorch
}
FILES = Path(os.environ["HF_HOME"])  # removed by conftest.py
TONE = np.sin(np.arange(8_000) / 10).astype(np.float32)  # 0.5 s, less than a window
MEDIA = {".wav": encode(TONE, "s16.wav"), ".mp3": encode(TONE, "clip.mp3"), ".mp4": encode(TONE, "aac.m4a", video=True)}


def url_to_local_path(url: str) -> str:
    """A file of ours in the place of one that their tests download."""
    suffix = Path(url).suffix
    if suffix not in MEDIA:
        return str(ASSETS / "images" / "chelsea.png")
    path = FILES / f"media{suffix}"
    path.write_bytes(MEDIA[suffix])
    return str(path)


def import_theirs():
    package = types.ModuleType("tests")
    package.__path__ = [str(SOURCE / "tests")]
    sys.modules["tests"] = package
    for name, member in LEFT_OUT.items():
        if not (SOURCE / name.replace(".", "/")).with_suffix(".py").exists():
            sys.modules[name] = types.ModuleType(name)
            setattr(sys.modules[name], member, type(member, (), {}))
    sys.modules["fetch_hub_objects_for_ci"] = types.SimpleNamespace(url_to_local_path=url_to_local_path)
    testing_utils.is_librosa_available = lambda: True  # their tests of audio ask for it; our loader does without
    # torchcodec takes FFmpeg from the system, PyAV brings its own.
    transformers.video_utils.VIDEO_DECODERS["torchcodec"] = transformers.video_utils.VIDEO_DECODERS["pyav"]
    transformers.video_processing_utils.is_torchcodec_usable = lambda **kwargs: True
    from tests import test_modeling_common, test_processing_common

    return test_modeling_common, test_processing_common


modeling, processing = import_theirs()
StockConfig = CONFIG_MAPPING[BASE]
STOCK_CLASSES = (
    transformers.MODEL_MAPPING[StockConfig],
    transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[StockConfig],
)
TYPE = type_on(BASE)
Config, ForConditionalGeneration, Processor = (
    family_class(TYPE, name) for name in ("AutoConfig", "AutoModel", "AutoProcessor")
)
Model = ForConditionalGeneration.backbone_class
# In these tables they look up what a class of the library returns.
transformers.MODEL_MAPPING.register(Config, Model)
modeling.MODEL_MAPPING_NAMES[TYPE] = Model.__name__
modeling.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[TYPE] = ForConditionalGeneration.__name__
# Random ids of theirs may not be audio tokens, which need audio.
ids_tensor = modeling.ids_tensor
modeling.ids_tensor = lambda *args, **kwargs: ids_tensor(*args, **kwargs).clamp(min=10)


@pytest.fixture(autouse=True)
def excuse(request):
    if request.node.name in EXCUSED and request.cls is not StockModelTest:
        request.instance.subTest = lambda *args, **kwargs: contextlib.nullcontext()  # which reports failures by itself
        request.applymarker(pytest.mark.xfail(reason=EXCUSED[request.node.name], strict=True))


TEXT_CONFIG = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "hidden_size": 32,
    "vocab_size": 99,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]},
}
VISION_CONFIG = {"depth": 2, "hidden_size": 32, "num_heads": 4, "spatial_merge_size": 1, "patch_size": 14}
if BASE == "qwen2_vl":
    VISION_CONFIG["embed_dim"] = 32
else:
    VISION_CONFIG |= {"intermediate_size": 32, "out_hidden_size": 32}
if BASE == "qwen3_vl":
    TEXT_CONFIG["head_dim"] = 8
    TEXT_CONFIG["rope_parameters"]["mrope_interleaved"] = True
    VISION_CONFIG |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
AUDIO_CONFIG = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 8,
    "max_source_positions": 4,
}


class Inputs:
    """What they call a model tester: a small configuration, and inputs of text and an image of one token a row."""

    batch_size = 7  # some tests add rows of text to fewer
    seq_length, image_size, is_training = 39, 14, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4

    def __init__(self, parent):
        self.parent = parent

    def get_config(self, config_class=StockConfig, **more):
        special = {"vision_start_token_id": 3, "image_token_id": 4, "video_token_id": 5}
        return config_class(text_config=dict(TEXT_CONFIG), vision_config=dict(VISION_CONFIG), **special, **more)

    def prepare_config_and_inputs_for_common(self):
        input_ids = modeling.ids_tensor((self.batch_size, self.seq_length), self.vocab_size)
        attention_mask, mm_token_type_ids = torch.ones_like(input_ids), torch.zeros_like(input_ids)
        input_ids[:, -1], attention_mask[:, -1] = TEXT_CONFIG["pad_token_id"], 0
        input_ids[:, 31:33], mm_token_type_ids[:, 32] = torch.tensor([3, 4]), 1
        return self.get_config(), {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": mm_token_type_ids,
            "pixel_values": torch.rand(self.batch_size, 3 * 2 * self.image_size**2),
            "image_grid_thw": torch.ones(self.batch_size, 3, dtype=torch.long),
        }


class InputsWithAudio(Inputs):
    """The same with a clip a row: one window of 8 frames, 4 audio tokens."""

    def get_config(self):
        special = {"audio_token_id": 6, "audio_bos_token_id": 7, "audio_eos_token_id": 8}
        return super().get_config(Config, audio_config=dict(AUDIO_CONFIG), **special)

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs["input_ids"][:, 10:16] = torch.tensor([7, 6, 6, 6, 6, 8])
        inputs["mm_token_type_ids"][:, 11:15] = 3
        return config, {**inputs, "input_features": torch.rand(self.batch_size, 8, 8)}


class ModelTests(modeling.ModelTesterMixin, modeling.GenerationTesterMixin):
    _is_composite = True
    additional_model_inputs = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "input_features")
    test_can_init_all_missing_weights_before_2023 = True  # they take a file that names no year for older

    def setUp(self):
        self.model_tester = self.inputs(self)

    def attention_mask_padding_matches_padding_free_with_position_ids(self, *args, **kwargs):
        self.skipTest("It packs rows without their images and audio; Qwen2-VL's own test file replaces it as well.")


class StockModelTest(ModelTests, unittest.TestCase):
    all_model_classes = STOCK_CLASSES
    inputs = Inputs


class ModelTest(ModelTests, unittest.TestCase):
    all_model_classes = (Model, ForConditionalGeneration)
    inputs = InputsWithAudio


@pytest.fixture(scope="module")
def built(request):
    """The demo's vocabulary of 377 makes for quick tests; `setUpClass` of theirs reads the folder."""
    if BASE == "qwen2_vl":
        ProcessorTest.model_id = str(request.getfixturevalue("demo_repo"))
    else:
        folder = request.getfixturevalue("tmp_path_factory").mktemp("few")
        ProcessorTest.model_id = str(build(*make_bases(folder, BASE), folder / "repo"))


@pytest.mark.usefixtures("built")
class ProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = Processor
    audio_unstructured_max_length = 200  # a window is 150 tokens

    @staticmethod
    def prepare_processor_dict():
        return {"trained_audio_tokens": "fixed", "piece_seconds": 3.0}  # what the demo checkpoint says of itself

    @property
    def video_sampling_expectations(self):
        """Every two of the 8 frames in a second are 64 patches with the demo's pixels, 16 in Qwen3-VL's bounds."""
        grid = 16 if BASE == "qwen3_vl" else 64
        cases = (({"num_frames": 3, "fps": None}, 2), ({"fps": 4}, 2), ({"do_sample_frames": False}, 4))
        cases = [(sampling, grids * grid) for sampling, grids in cases]
        return [{**sampling, "expected_dim": 0, "output_length": patches} for sampling, patches in cases]

    @staticmethod
    def does_processor_return_mm_offsets(processor_class, method_name):
        # Theirs compares with the parent, which is Qwen2-VL's processor here and returns them as well.
        return getattr(processor_class, method_name) is not getattr(ProcessorMixin, method_name)
