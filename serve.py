"""
Serves a repository with OpenAI's chat API, by `transformers serve`:

    python serve.py REPO [options of transformers serve]      needs: pip install "transformers[serving]"

REPO is a folder, a Hub id or ID@REVISION, and the name of the model in requests. `transformers serve` looks for models
among the classes of transformers, so those of REPO are registered there. It does not run the code of other repositories
that a request may name, as --trust-remote-code is neither needed nor set. Requests that cannot be answered get HTTP 400
with `{"error": {"message": "one sentence"}}`.
"""

import os
import sys
from functools import partial

from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor
from transformers.cli.serving import server
from transformers.cli.transformers import app
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import logging

from configuration_qwen2_audio_vl import WHOLE_MODEL, find_folder


logger = logging.get_logger(__name__)
TRANSCRIPTIONS = "/v1/audio/transcriptions"  # a route of `transformers serve`, for models of other families


def register(repo: str):
    """Makes the classes of a repository known to transformers."""
    name, _, revision = (repo, "", "") if os.path.isdir(repo) else repo.partition("@")
    # An error here says what is missing; `transformers serve` downloads the rest.
    needed = WHOLE_MODEL if os.path.isdir(name) else ("config.json",)
    find_folder(name, revision or None, needed, allow_patterns=["config.json"])
    load = partial(get_class_from_dynamic_module, pretrained_model_name_or_path=name, revision=revision or None)
    config_class = load("configuration_qwen2_audio_vl.Qwen2AudioVLConfig")
    model_class = load("modeling_qwen2_audio_vl.Qwen2AudioVLForConditionalGeneration")

    class Qwen2AudioVLProcessor(load("processing_qwen2_audio_vl.Qwen2AudioVLProcessor")):
        def apply_chat_template(self, *args, **kwargs):
            try:
                inputs = super().apply_chat_template(*args, **kwargs)
            except Exception as error:  # of many types, where files are broken and addresses do not answer
                raise ValueError(str(error) or type(error).__name__) from error
            length, positions = len(inputs["input_ids"][0]), self.tokenizer.model_max_length
            if length >= positions:
                raise ValueError(
                    f"The prompt has {length} tokens, but prompt and answer must fit the model's {positions} positions."
                )
            return inputs

    AutoConfig.register(config_class.model_type, config_class)
    AutoProcessor.register(config_class, Qwen2AudioVLProcessor)
    AutoModelForMultimodalLM.register(config_class, model_class)
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config_class.model_type] = model_class.__name__  # what the server looks up


def answer_errors():
    """Makes `transformers serve` answer bad requests with HTTP 400 and the reason, and name a missing route."""
    from fastapi.responses import JSONResponse

    build_server = server.build_server

    def build(*args, **kwargs):
        api = build_server(*args, **kwargs)

        @api.exception_handler(ValueError)
        @api.exception_handler(KeyError)  # of a field that is missing
        async def refuse(request, error):
            logger.warning(f"A request was refused: {error!r}")
            reason = f"The request has no {error}." if isinstance(error, KeyError) else str(error)
            return JSONResponse({"error": {"message": reason}}, status_code=400)

        @api.middleware("http")
        async def name_missing_route(request, call_next):
            if request.url.path != TRANSCRIPTIONS:
                return await call_next(request)
            reason = "This model has no such route. Ask for transcripts at /v1/chat/completions, with input_audio."
            return JSONResponse({"error": {"message": reason}}, status_code=404)

        return api

    server.build_server = build


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        register(sys.argv[1])
    except ValueError as error:
        sys.exit(f"serve.py: {error}")
    answer_errors()
    app(["serve", *sys.argv[1:]])
