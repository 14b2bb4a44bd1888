"""make test ONLY=tests/test_configuration.py: the files at the top level, and contradictions that are refused."""

import json
import logging
import re

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from configuration_qwen2_audio_vl import CODE_FILES, FAMILIES
from demo.ask import DEMO
from demo.bases import ASSETS
from publishing import build as building
from publishing import checkpoints, paths


@pytest.fixture(scope="module")
def config_class():
    return paths.own_class("configuration_qwen2_audio_vl.Qwen2AudioVLConfig")


def small(**changes) -> dict:
    values = {
        "text_config": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 152064},
        "vision_config": {"hidden_size": 64},
        "audio_config": {"d_model": 64, "encoder_attention_heads": 2},
    }
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) else change
    return values


def test_top_level_files_are_the_full_size(tmp_path):
    """config.json and its neighbours are what `build` makes of Qwen2-VL-7B-Instruct and whisper-large-v3-turbo."""
    base, encoder = ASSETS / "qwen2-vl-7b", ASSETS / "whisper-large-v3-turbo"
    tokenizer = building.build_tokenizer(base)
    built = building.build_config(base, encoder, tokenizer)
    config = AutoConfig.from_pretrained(paths.ROOT, trust_remote_code=True)
    ignored = ("_name_or_path", "transformers_version", "auto_map")
    ours, theirs = ({k: v for k, v in each.to_dict().items() if k not in ignored} for each in (config, built))
    ours["audio_config"], theirs["audio_config"] = config.audio_config.to_diff_dict(), built.audio_config.to_diff_dict()
    assert ours == theirs

    building.build_processor(base, encoder, tokenizer, built).save_pretrained(tmp_path)
    ours, theirs = (json.loads((folder / "processor_config.json").read_text()) for folder in (paths.ROOT, tmp_path))
    for name, part in ours.items():
        if isinstance(part, dict) and name != "auto_map":
            # Newer releases write more of their own defaults.
            assert {key: theirs[name][key] for key in part if key in theirs[name]}.items() <= part.items()
            assert {"image_processor": 14, "video_processor": 14, "feature_extractor": 128}[name] in part.values()
        else:
            assert theirs[name] == part
    generation = json.loads((paths.ROOT / "generation_config.json").read_text())
    assert generation.items() <= json.loads((base / "generation_config.json").read_text()).items()


def test_defaults_are_the_full_size(config_class):
    default, full = config_class(), AutoConfig.from_pretrained(paths.ROOT, trust_remote_code=True)
    for part in ("text_config", "vision_config", "audio_config"):
        for name, value in getattr(default, part).to_dict().items():
            if name not in ("dtype", "_name_or_path", "transformers_version", "rope_parameters"):
                assert getattr(full, part).to_dict()[name] == value, (part, name)


def test_every_auto_class_is_mapped(repo, model_type):
    for folder in (paths.ROOT, repo):
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        names = "Config Processor Model ModelForMultimodalLM ModelForImageTextToText ModelForCausalLM"
        assert auto_map.keys() == {f"Auto{name}" for name in names.split()}
    for auto_class in (AutoModel, AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForCausalLM):
        model = auto_class.from_pretrained(repo, trust_remote_code=True)
        assert type(model).__name__ == f"{FAMILIES[model_type].prefix}ForConditionalGeneration"
        assert model.can_generate()


def test_no_line_asks_which_base_it_has():
    """What a base does in its own way comes from `super()`, so that the next base is a few lines in each file."""
    files = [paths.ROOT / name for name in CODE_FILES[:3]]
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert [line for line in lines if re.search(r"(model|base)_(type|name)\W* (==|!=|in|not in|is) ", line)] == []
    assert len(lines) <= 1400


def test_full_size_model_on_the_meta_device():
    config = AutoConfig.from_pretrained(paths.ROOT, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    names = model.state_dict().keys()
    index = json.loads((ASSETS / "qwen2-vl-7b" / "model.safetensors.index.json").read_text())
    published = {checkpoints.rename(name, checkpoints.BASE_NAMES) for name in index["weight_map"]}
    assert published == {name for name in names if "audio" not in name}
    assert model.model.audio_projector.weight.shape == (3584, 1280)
    assert sum(p.numel() for p in model.model.audio_encoder.parameters()) == 636_968_960
    assert {"model.audio_encoder.conv1.weight", "model.audio_encoder.layers.31.fc2.bias"} < names


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vision_config": {"hidden_size": 32}}, "vision_config.hidden_size is 32 but text_config.hidden_size is 64"),
        ({"audio_config": {"encoder_attention_heads": 3}}, "d_model must be a multiple of .*, got 64 and 3"),
        ({"audio_token_id": 152064}, "audio_token_id is 152064, outside the vocabulary of 152064"),
        ({"audio_eos_token_id": -1}, "audio_eos_token_id is -1, outside the vocabulary"),
        ({"audio_bos_token_id": 151657}, "audio_token_id and audio_bos_token_id are all 151657"),
        ({"audio_token_id": 151655}, "image_token_id and audio_token_id are all 151655"),
        ({"text_config": {"vocab_size": 151657}}, "audio_token_id is 151657, outside the vocabulary of 151657"),
    ],
)
def test_contradictions_are_errors(changes, message, config_class):
    config_class(**small())
    with pytest.raises(ValueError, match=message):
        config_class(**small(**changes))


def test_round_trip(config_class, tmp_path):
    config = config_class(**small(audio_config={"num_mel_bins": 128}))
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert reloaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    config_class().save_pretrained(tmp_path)  # what equals a default has to survive as well
    reloaded = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert (reloaded.text_config.hidden_size, reloaded.audio_config.d_model) == (3584, 1280)


def test_the_configuration_of_another_release_loads_without_a_warning(config_class, monkeypatch, caplog):
    """The demo's was saved by the newest release."""
    assert "axial" in (DEMO / "config.json").read_text()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config_class.from_pretrained(DEMO)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
