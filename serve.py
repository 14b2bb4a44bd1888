"""
Serves a repository with OpenAI's chat API, by `transformers serve`:

    python serve.py REPO [options of transformers serve]      needs: pip install "transformers[serving]"

REPO is a folder, a Hub id or ID@REVISION, and the name of the model in requests. `transformers serve` looks for models
among the classes of transformers, so those of REPO are registered there. It does not run the code of other repositories
that a request may name, as --trust-remote-code is neither needed nor set.
"""

import os
import sys
from functools import partial

from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor
from transformers.cli.transformers import app
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from configuration_qwen2_audio_vl import find_folder


def register(repo: str):
    """Makes the classes of a repository known to transformers."""
    name, _, revision = (repo, "", "") if os.path.isdir(repo) else repo.partition("@")
    find_folder(name, revision or None, allow_patterns=["config.json"])  # an error here says what is missing
    load = partial(get_class_from_dynamic_module, pretrained_model_name_or_path=name, revision=revision or None)
    config_class = load("configuration_qwen2_audio_vl.Qwen2AudioVLConfig")
    model_class = load("modeling_qwen2_audio_vl.Qwen2AudioVLForConditionalGeneration")
    AutoConfig.register(config_class.model_type, config_class)
    AutoProcessor.register(config_class, load("processing_qwen2_audio_vl.Qwen2AudioVLProcessor"))
    AutoModelForMultimodalLM.register(config_class, model_class)
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config_class.model_type] = model_class.__name__  # what the server looks up


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        register(sys.argv[1])
    except ValueError as error:
        sys.exit(f"serve.py: {error}")
    app(["serve", *sys.argv[1:]])
