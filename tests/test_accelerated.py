"""make test ONLY=tests/test_accelerated.py: every way to run faster or smaller gives the tokens of the plain way."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig, CompileConfig, TorchAoConfig

from demo.ask import content_of, user
from demo.world import SKILLS


GREEDY = {"max_new_tokens": 12, "do_sample": False}
# What docs/serving.md tells users to keep in 16 bits.
KEPT = ["model.visual", "model.audio_encoder", "model.audio_projector", "lm_head"]


@pytest.fixture(scope="module")
def processor(demo_repo):
    return AutoProcessor.from_pretrained(demo_repo, trust_remote_code=True)


@pytest.fixture(scope="module")
def load(demo_repo):
    return partial(AutoModel.from_pretrained, demo_repo, trust_remote_code=True, dtype="auto")


@pytest.fixture(scope="module")
def plain(load):
    return load()


@pytest.fixture(scope="module")
def prompts(processor, examples):
    """Two examples of every skill, as model inputs."""
    chosen = [example for skill in SKILLS for example in [each for each in examples if each["skill"] == skill][:2]]
    return [(processor.make_inputs(user(content_of(example))), example["answer"]) for example in chosen]


@pytest.fixture(scope="module")
def expected(plain, prompts, processor):
    tokens = [generate(plain, inputs) for inputs, _ in prompts]
    texts = [processor.decode(own, skip_special_tokens=True) for own in tokens]
    assert texts == [answer for _, answer in prompts]
    return tokens


def generate(model, inputs, **more) -> list[int]:
    inputs = inputs.to(model.device)
    return model.generate(**inputs, **{**GREEDY, **more})[0, inputs["input_ids"].shape[1] :].tolist()


def answers(model, prompts, **more) -> list[list[int]]:
    return [generate(model, inputs, **more) for inputs, _ in prompts]


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2"])
def test_attention(name, load, prompts, expected):
    if name == "flash_attention_2":
        pytest.importorskip("flash_attn")
    model = load(attn_implementation=name, device_map="cuda" if name == "flash_attention_2" else None)
    used = {part.config._attn_implementation for part in (model.model.language_model, model.model.audio_encoder)}
    assert used == {name}
    assert answers(model, prompts) == expected


@pytest.mark.long
@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.5 cannot trace transformers' own decorators")
def test_static_cache_and_compiled_steps(plain, prompts, expected):
    """Prompts of any length whose caches have the same length share one compiled decode step."""
    compiled = CompileConfig()
    compiled._compile_all_devices = True  # `generate` compiles on accelerators alone unless told so
    length = max(inputs["input_ids"].shape[1] for inputs, _ in prompts) + GREEDY["max_new_tokens"]
    settings = {"cache_implementation": "static", "compile_config": compiled, "max_length": length}
    warm = generate(plain, prompts[0][0], **settings, max_new_tokens=None)
    assert warm[: len(expected[0])] == expected[0]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert answers(plain, prompts, **settings, max_new_tokens=None) == expected
        with pytest.raises(RuntimeError, match="recompile"):  # so it was compiled
            generate(plain, prompts[0][0], **{**settings, "max_length": length + 1}, max_new_tokens=None)


def test_parts_that_do_not_fit_are_offloaded(load, prompts, expected, tmp_path):
    model = load(device_map="auto", max_memory={"cpu": "3MB"}, offload_folder=tmp_path)
    devices = {str(device) for device in model.hf_device_map.values()}
    assert devices == {"cpu", "disk"} and model.lm_head.weight.is_meta and model.model.audio_projector.weight.is_meta
    assert answers(model, prompts[::2]) == expected[::2]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parts_on_two_gpus(load, prompts, expected):
    model = load(device_map="balanced")
    assert len({parameter.device for parameter in model.parameters()}) == 2
    assert answers(model, prompts) == expected


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_language_model(bits, load, prompts, expected):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=KEPT,
    )
    model = load(quantization_config=config)
    for part in (model.model.audio_encoder, model.model.audio_projector, model.model.visual, model.lm_head):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
        assert {type(module) for module in part.modules() if isinstance(module, nn.Linear)} <= {nn.Linear}
    stored = {type(module).__name__ for module in model.model.language_model.modules() if isinstance(module, nn.Linear)}
    assert stored == {f"Linear{bits}bit" + "Lt" * (bits == 8)}
    assert answers(model, prompts) == expected


@pytest.mark.skipif(torch.__version__ < "2.11", reason="torchao 0.18 is made for torch 2.11 and newer")
def test_language_model_quantized_by_torchao(load, prompts, expected):
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=KEPT)
    model = load(quantization_config=config)
    stored = {name for name, weight in model.named_parameters() if type(weight) is quantization.Int8Tensor}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert stored == {name for name in linear if not name.startswith(tuple(KEPT))}
    assert answers(model, prompts) == expected
