"""
Serves a repository with OpenAI's chat API, by `transformers serve`:

    python serve.py REPO [options of transformers serve]      needs: pip install "transformers[serving]"

REPO is a folder, a Hub id or ID@REVISION, and the name of the model in requests. `transformers serve` looks models up
among the classes of transformers, so those of REPO are registered there. The code of other repositories does not run,
whatever a request names: --trust-remote-code is neither needed nor set.
"""

import os
import sys

from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor
from transformers.cli.transformers import app
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


def register(repo: str):
    name, _, revision = (repo, "", "") if os.path.isdir(repo) else repo.partition("@")
    config_class, processor_class, model_class = (
        get_class_from_dynamic_module(reference, name, revision=revision or None)
        for reference in (
            "configuration_qwen2_audio_vl.Qwen2AudioVLConfig",
            "processing_qwen2_audio_vl.Qwen2AudioVLProcessor",
            "modeling_qwen2_audio_vl.Qwen2AudioVLForConditionalGeneration",
        )
    )
    AutoConfig.register(config_class.model_type, config_class)
    AutoProcessor.register(config_class, processor_class)
    AutoModelForMultimodalLM.register(config_class, model_class)
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config_class.model_type] = model_class.__name__  # what the server looks up


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    register(sys.argv[1])
    app(["serve", *sys.argv[1:]])
