"""make test-trl: TRL's SFTTrainer with the collator of a built folder. TRL lies outside of `.venv`'s own packages."""

import json
import re

import datasets
import pytest
import torch
from helpers import audio, image, text
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import upload
from collator import ChatCollator
from configuration_qwen2_audio_vl import IGNORED_LABEL
from demo.ask import EXAMPLES
from publishing.paths import ROOT
from training import train
from training.arguments import LEARNING_RATES


pytestmark = pytest.mark.trl
ANSWER = "seven green apples"


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="TRL is not installed; `make test-trl` installs it.")


@pytest.fixture(scope="module")
def processor(demo_repo):
    return AutoProcessor.from_pretrained(demo_repo, trust_remote_code=True)


@pytest.fixture(scope="module")
def rows(examples) -> list[dict]:
    """Chats about audio, a picture or both, all with an answer that the demo checkpoint does not give."""
    chats = []
    for example in examples[:6]:
        content = [audio(str(EXAMPLES / name)) for name in example["audio"]]
        content += [image(str(EXAMPLES / example["image"]))] if example["image"] else []
        question = {"role": "user", "content": [*content, text("What is this?")]}
        chats.append({"messages": [question, {"role": "assistant", "content": [text(ANSWER)]}]})
    assert {len(chat["messages"][0]["content"]) for chat in chats} >= {2, 3}
    return chats


@pytest.fixture
def make_trainer(trl, demo_repo, processor, rows, tmp_path):
    """`make_trainer(data_collator=None, train_dataset=None, **settings of SFTConfig)`, in float32, which is faster."""

    def make(data_collator=None, train_dataset=None, **settings):
        fixed = {"max_steps": 4, "logging_steps": 1, "bf16": False, "report_to": "none"}
        config = trl.SFTConfig(output_dir=str(tmp_path), **{"learning_rate": 1e-3, **fixed, **settings})
        model = AutoModel.from_pretrained(demo_repo, trust_remote_code=True, dtype=torch.float32)
        dataset = datasets.Dataset.from_list(rows if train_dataset is None else train_dataset)
        return trl.SFTTrainer(model, config, data_collator, dataset, processing_class=processor)

    return make


OURS = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def copy_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def learned(processor, labels: torch.Tensor) -> list[str]:
    return [processor.tokenizer.decode(row[row != IGNORED_LABEL]) for row in labels]


def test_what_the_document_shows(trl, demo_repo, processor, rows, tmp_path, monkeypatch):
    section = (ROOT / "docs" / "training.md").read_text().partition("\n## With TRL\n")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    answers = [*[ANSWER] * len(rows), '{"a": 1}', "null", "[]", "2026-01-31"]  # the last four are not texts everywhere
    question = rows[0]["messages"][0]
    rows = rows + [{"messages": [question, {"role": "assistant", "content": a}]} for a in answers[len(rows) :]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    shown = {"REPO": str(demo_repo)}
    exec(code, shown)

    trainer, collator = shown["trainer"], shown["trainer"].data_collator
    batch = collator([*trainer.train_dataset])
    assert {"input_features", "pixel_values"} <= batch.keys()
    assert learned(processor, batch["labels"]) == [f"{answer}<|im_end|>" for answer in answers]
    base = AutoModel.from_pretrained(demo_repo, trust_remote_code=True, dtype="auto")
    start = copy_of(base)
    model = train.PeftModel.from_pretrained(base, "run").eval()
    inputs = processor.make_inputs(rows[0]["messages"][:1])
    answers = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        now = model(**batch).loss
        with model.disable_adapter():
            assert now < model(**batch).loss - 0.1
    assert set(LEARNING_RATES.values()) >= {trainer.args.learning_rate}
    names = changed(start, copy_of(model.merge_and_unload()))
    assert "model.audio_projector.weight" in names
    rest = {name.removesuffix(".weight") for name in names} - {"model.audio_projector"}
    assert rest and all(re.fullmatch(train.LANGUAGE_MODEL, name) for name in rest)
    adapter = load_file("run/adapter_model.safetensors")
    assert sum("lora_A" in name for name in adapter) == len(rest)

    command = re.search(r"`python (upload.py build --checkpoint run .*?)`", section, re.DOTALL)[1]
    upload.main(command.split()[1:])
    built = AutoModel.from_pretrained("my-model", trust_remote_code=True, dtype="auto").eval()
    assert torch.equal(built.generate(**inputs, max_new_tokens=8, do_sample=False), answers)


@pytest.mark.parametrize("alone", [True, False], ids=["projector", "everything"])
def test_only_what_should_learn_changes(alone, make_trainer, demo_repo, processor, rows):
    collator = get_class_from_dynamic_module("collator.ChatCollator", str(demo_repo))(processor, needs_audio=alone)
    has_audio = [row for row in rows if row["messages"][0]["content"][0]["type"] == "audio"]
    trainer = make_trainer(collator, has_audio if alone else rows, learning_rate=1e-2 if alone else 1e-3, **OURS)
    if alone:
        trainer.model.requires_grad_(False)
        trainer.model.model.audio_projector.requires_grad_(True)
    before = copy_of(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():  # by TRL's own head, which sees only the positions with labels
        torch.testing.assert_close(trainer.compute_loss(trainer.model, {**batch}), trainer.model(**batch).loss)
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    names = changed(before, trainer.model.state_dict())
    if alone:
        assert names == {"model.audio_projector.weight"}
    else:
        parts = {".".join(name.split(".")[:2]) for name in names}
        assert parts == {"model.audio_projector", "model.language_model", "model.visual", "lm_head.weight"}


def test_settings_that_trl_refuses_with_a_collator(make_trainer, processor):
    collator = ChatCollator(processor)
    with pytest.raises(ValueError, match="custom data collator is not supported when using padding-free"):
        make_trainer(collator, packing=True, **OURS)
    trainer = make_trainer(collator, max_length=8, per_device_train_batch_size=1, **OURS)
    (labels,) = learned(processor, next(iter(trainer.get_train_dataloader()))["labels"])
    assert labels == f"{ANSWER}<|im_end|>"


@pytest.mark.parametrize("pictures", [False, True], ids=["text", "pictures"])
def test_answers_alone_by_the_template_of_the_folder(pictures, make_trainer, processor):
    """Without our collator: TRL takes the answers from the `{% generation %}` markers of the template."""
    first, second = ({"role": "user", "content": words} for words in ("What is this?", "And this?"))
    answers = [{"role": "assistant", "content": words} for words in (ANSWER, "no")]
    row = {"messages": [first, answers[0], second, answers[1]]}
    if pictures:
        row["images"] = [Image.open(EXAMPLES / "02.png")]
    trainer = make_trainer(train_dataset=[row] * 8, assistant_only_loss=True)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(learned(processor, batch["labels"])) == {f"{ANSWER}<|im_end|>no<|im_end|>"}
    if not pictures:
        ours = ChatCollator(processor)([row])
        assert all(torch.equal(batch[name][:1], ours[name]) for name in ("input_ids", "labels"))
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
