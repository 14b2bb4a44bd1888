"""Training: what learns and what does not, on which tokens, from which data, through kills and in several processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import jiwer
import pytest
import soundfile
import torch
import yaml
from accelerate.commands import launch
from filelock import FileLock
from helpers import answer, audio, image, start_python, text, video
from PIL import Image
from safetensors.torch import load_file, save
from transformers import AutoModel, AutoProcessor

import upload
from collator import BadRow
from demo.untrained import make_bases
from evaluation.scoring import normalize
from publishing import check as checking
from publishing import checkpoints, paths
from training import train
from training.rows import load_rows


TONES = {"low": 200, "middle": 600, "high": 1800}  # Hz


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A built folder of a small model with a small vocabulary, windows of 3 s, untrained."""
    folder = tmp_path_factory.mktemp("start")
    return upload.build(*make_bases(folder), folder / "repo")


@pytest.fixture(scope="module")
def rows(start) -> train.ChatCollator:
    return train.ChatCollator(AutoProcessor.from_pretrained(start, trust_remote_code=True), needs_audio=False)


def chat(*content, answer="low") -> dict:
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tones(tmp_path_factory) -> Path:
    """16 rows about tones of 1 s and 8 others to ask about, in JSON lines beside their wav files."""
    folder = tmp_path_factory.mktemp("tones")
    seconds = torch.arange(16_000) / 16_000
    for file, count in (("train", 16), ("test", 8)):
        chats = []
        for number in range(count):
            name = list(TONES)[number % len(TONES)]
            samples = 0.3 * torch.sin(2 * torch.pi * TONES[name] * (1 + number / 100) * seconds)
            soundfile.write(folder / f"{file}-{number}.wav", samples.numpy(), 16_000)
            chats.append(chat(audio(f"{file}-{number}.wav"), text("Which tone?" + "?" * number), answer=name))
        write(folder / f"{file}.jsonl", chats)
    return folder


def arguments(start: Path, tones: Path, output: Path, **more) -> list[str]:
    given = {
        "model": start,
        "data": tones / "train.jsonl",
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "learning_rate": 0.02,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **more,
    }
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def run(*given, **more) -> dict:
    (args,) = train.HfArgumentParser(train.Arguments).parse_args_into_dataclasses(arguments(*given, **more))
    return train.train(args)


def projector(output: Path) -> torch.Tensor:
    return load_file(output / "audio_projector.safetensors")["audio_projector.weight"]


def losses(output: Path) -> list[float]:
    """Of every step, from the state that the last checkpoint holds."""
    state = json.loads((Path(train.newest_checkpoint(output)) / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


@pytest.fixture(scope="module")
def trained(start, tones, tmp_path_factory) -> Path:
    """A run of 6 steps that nothing interrupted."""
    output = tmp_path_factory.mktemp("trained")
    run(start, tones, output)
    return output


def test_labels_are_the_answers_and_the_ends_of_their_turns(rows, photo, sound):
    short = chat(text("Why?"), answer="Because.")
    long = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [audio(sound(1)), image(str(photo)), text("assistant\nWhat?")]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": [text("It "), text("slept.")]},
        ]
    }
    batch = rows([{**short, "place": "a:1"}, {**long, "place": "a:2"}])
    tokenizer = rows.processor.tokenizer
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert len(batch["input_features"]) == 1 and len(batch["image_grid_thw"]) == 1
    learned = [labels[labels != -100] for labels in batch["labels"]]
    assert [tokenizer.decode(ids) for ids in learned] == ["Because.<|im_end|>", "A cat.<|im_end|>It slept.<|im_end|>"]
    # Every label is the token of its own place, and what stands before each answer is the prompt for it.
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        starts = [i for i in range(1, len(ids)) if labels[i] != -100 and labels[i - 1] == -100]
        assert all(tokenizer.decode(ids[:i]).endswith("<|im_start|>assistant\n") for i in starts)
    assert (batch["labels"][0][batch["attention_mask"][0] == 0] == -100).all()
    assert (batch["attention_mask"][0] == 0).sum() > 100  # the short row is padded


def test_audio_and_pictures_in_an_answer_are_not_learned(rows, photo, sound):
    """The words of such an answer are, and its pads and markers are not, with fixed and with trimmed tokens."""
    clip, picture, film = audio(sound(1)), image(str(photo)), video([Image.open(photo)] * 2)
    row = chat(text("Which tone?"), answer=[text("This: "), clip, text("and "), picture, film, text("low")])
    row["messages"] += [{"role": "user", "content": [clip]}, {"role": "assistant", "content": "high"}]
    tokenizer = rows.processor.tokenizer
    for audio_tokens in ("fixed", "trimmed"):
        inputs = rows.inputs(row, audio_tokens)
        ids, labels = inputs["input_ids"][0], inputs["labels"][0]
        assert (ids == rows.processor.audio_token_id).sum() == 2 * {"fixed": 150, "trimmed": 50}[audio_tokens]
        assert {"image_grid_thw", "video_grid_thw"} <= inputs.keys()
        learned = labels != -100
        assert torch.equal(ids[learned], labels[learned])
        assert tokenizer.decode(labels[learned]) == "This: and low<|im_end|>high<|im_end|>"


BAD = {
    "not json": "Expecting value",
    '"a text"': "no list of `messages`",
    '{"messages": []}': "no list of `messages`",
    json.dumps({"messages": [{"role": "user", "content": "hi"}]}): "the last message is from 'user'",
    json.dumps({"messages": [{"role": "robot", "content": "hi"}]}): "role 'robot'",
    json.dumps(chat(text("hi"), answer=" ")): "answer of the assistant is empty",
    json.dumps(chat({"type": "smell", "smell": "rose"})): "Content of type 'smell'",
    json.dumps(chat("a bare string")): "Content of Python type str",
    json.dumps(chat(audio("nowhere.wav"))): "there is no file",
    json.dumps(chat(text("hi<|im_end|>\n<|im_start|>assistant\nyes"))): "a text contains <|im_start|>",
    json.dumps(chat(text("hi"), answer="<|audio_pad|>")): "a text contains <|audio_pad|>",
    json.dumps(chat(text("hi"), answer=[text("<|audio_"), text(""), text("bos|>")])): "a text contains <|audio_bos|>",
    json.dumps({"audio": "bad.jsonl", "text": "yes<|audio_eos|>"}): "a text contains <|audio_eos|>",
    json.dumps(chat(text("a <|image_pad|>"))): "a text contains <|image_pad|>",
    json.dumps(chat(text("<|video_pad|>"))): "a text contains <|video_pad|>",
    json.dumps(chat(text("<|vision_start|>"))): "a text contains <|vision_start|>",
    json.dumps({"messages": [{"role": "system", "content": "<|vision_end|>"}, *chat()["messages"]]}): (
        "a text contains <|vision_end|>"
    ),
}


def test_bad_rows_are_counted_and_named_before_training(start, tones, tmp_path):
    data = write(tmp_path / "bad.jsonl", [*BAD, (tones / "train.jsonl").read_text().splitlines()[0]])
    shutil.copyfile(tones / "train-0.wav", tmp_path / "train-0.wav")
    with pytest.raises(ValueError) as error:
        run(start, tones, tmp_path / "out", data=data, stage="lora")
    lines = str(error.value).splitlines()
    assert lines[0] == f"{len(BAD)} of {len(BAD) + 1} rows cannot be used:"
    for number, (line, message) in enumerate(zip(lines[1:], BAD.values(), strict=True), start=1):
        assert line.startswith(f"{data}:{number}: ") and message in line
    with pytest.raises(ValueError, match="jsonl:1: there is no audio, so the projector learns nothing"):
        run(start, tones, tmp_path / "out", data=write(tmp_path / "text.jsonl", [chat(text("hi"))]))


def test_undecodable_audio_is_an_error_or_left_out_by_name(start, tones, tmp_path):
    for file in tones.glob("train-*.wav"):
        shutil.copyfile(file, tmp_path / file.name)
    (tmp_path / "train-2.wav").write_bytes(b"this is no sound")
    data = shutil.copyfile(tones / "train.jsonl", tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=r"train\.jsonl:3: .*train-2\.wav"):
        run(start, tones, tmp_path / "out", data=data, max_steps=4)
    assert run(start, tones, tmp_path / "left-out", data=data, max_steps=1, skip_bad_rows=True)["rows"] == 15


def test_projector_stage_changes_the_projector_alone(start, tones, trained, tmp_path):
    folder = upload.build(checkpoint=start, projector=trained / "audio_projector.safetensors", output=tmp_path / "a")
    before, after = (load_file(path / "model.safetensors") for path in (start, folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.audio_projector.weight"}
    assert json.loads((trained / "summary.json").read_text())["learning parameters"] == 128 * 128
    assert losses(trained)[-1] < 0.8 * losses(trained)[0]
    assert Image.open(trained / "loss.png").width > 500

    run(start, tones, tmp_path / "markers", train_markers=True, max_steps=2, export=tmp_path / "exported")
    projected = tmp_path / "markers" / "audio_projector.safetensors"
    built = upload.build(checkpoint=start, projector=projected, output=tmp_path / "b")
    after, exported = (load_file(path / "model.safetensors") for path in (built, tmp_path / "exported"))
    rows_changed = (before[checkpoints.EMBEDDINGS] != after[checkpoints.EMBEDDINGS]).any(1).nonzero().flatten().tolist()
    config = json.loads((start / "config.json").read_text())
    assert rows_changed == [config["audio_bos_token_id"], config["audio_eos_token_id"]]
    assert after.keys() == exported.keys() and all(torch.equal(after[name], exported[name]) for name in after)


def test_lora_touches_the_language_model_alone(start, tones, tmp_path):
    run(start, tones, tmp_path / "out", stage="lora", max_steps=3, lora_r=4, export=tmp_path / "exported")
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    adapted = {name.partition("base_model.model.")[2].partition(".lora_")[0] for name in adapter}
    layers = [f"model.language_model.layers.{i}" for i in range(4)]
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert adapted == {f"{layer}.{part}" for layer in layers for part in parts} | {"model.audio_projector.weight"}

    exported = upload.build(checkpoint=tmp_path / "exported", output=tmp_path / "repo")
    before, after = (load_file(path / "model.safetensors") for path in (start, exported))
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name.removesuffix(".weight") for name in adapted}
    checking.check_files(exported)

    # The merged model says what the trained one does.
    merged = AutoModel.from_pretrained(exported, trust_remote_code=True, dtype="auto").eval()
    base = AutoModel.from_pretrained(start, trust_remote_code=True, dtype="auto")
    unmerged = train.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    processor = AutoProcessor.from_pretrained(exported, trust_remote_code=True)
    row = train.load_rows([str(tones / "test.jsonl")])[0]
    inputs = train.ChatCollator(processor, needs_audio=True).inputs(row)
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, unmerged(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_run_that_was_killed_goes_on_to_the_same_bits(start, tones, trained, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "training", *arguments(start, tones, output, save_steps=1)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "2"}, stderr=subprocess.DEVNULL)
    while train.newest_checkpoint(output) is None or int(train.newest_checkpoint(output)[-1]) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # What a kill leaves when it comes while a checkpoint is written.
    half = output / "checkpoint-5"
    half.mkdir(exist_ok=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    assert int(train.newest_checkpoint(output)[-1]) < 6
    run(start, tones, output, save_steps=1)
    assert torch.equal(projector(output), projector(trained))
    assert losses(output) == losses(trained)
    with pytest.raises(ValueError, match="checkpoints of another run: learning_rate was 0.02, is 0.5"):
        run(start, tones, output, learning_rate=0.5)
    weights = Path(train.newest_checkpoint(output)) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="content of adapter_model.safetensors is not what SHA256SUMS says. Remove it"):
        run(start, tones, output, save_steps=1)


def test_summary_after_an_interruption_is_of_the_whole_run(start, tones, trained, tmp_path, monkeypatch):
    settings = {"save_steps": 3, "logging_steps": 2}
    compute_loss, calls = train.AnswerTrainer.compute_loss, []

    def interrupt(self, *args, **kwargs):
        calls.append(time.sleep(0.5))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train.AnswerTrainer, "compute_loss", interrupt)
        run(start, tones, tmp_path, **settings)
    assert train.newest_checkpoint(tmp_path).endswith("checkpoint-3")
    whole, resumed = json.loads((trained / "summary.json").read_text()), run(start, tones, tmp_path, **settings)
    for name in ("rows", "steps", "learning parameters"):
        assert resumed[name] == whole[name]
    assert resumed["loss"] == pytest.approx(whole["loss"], abs=2e-4)
    assert whole["loss"] == pytest.approx(sum(losses(trained)) / 6, abs=1e-4)
    assert resumed["seconds"] > 3 * 0.5
    assert 24 / resumed["seconds"] < resumed["rows per second"] < 24 / (3 * 0.5)


def test_one_run_at_a_time_writes_into_a_folder(start, tones, tmp_path, capsys):
    with FileLock(tmp_path / ".lock"), pytest.raises(SystemExit):
        train.main(arguments(start, tones, tmp_path))
    assert "is in use by another run" in capsys.readouterr().err


def test_data_that_is_not_there_is_named(start, tones, tmp_path, capsys):
    for option, path in (
        ("data", "nowhere.jsonl"),
        ("eval", "nowhere.jsonl"),
        ("data", "/no/where"),
        ("aligner", "./no"),
    ):
        more = {option: path} | ({"stage": "align"} if option == "aligner" else {})
        with pytest.raises(SystemExit, match="1"):
            train.main(arguments(start, tones, tmp_path, **more))
        assert f"training: There is no {'folder' if option == 'aligner' else 'file'}" in capsys.readouterr().err


def test_files_of_other_editors(start, rows, tones, tmp_path, speech):
    """A mark of UTF-8, blank lines and Windows' ends of lines are read; what is no UTF-8 or empty is said."""
    line = json.dumps(chat(audio(str(speech)), text("Tone?")))
    for number, content in enumerate((f"\ufeff{line}\n", f"\n{line}\r\n\r\n", f"{line}\n \n\n")):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(content.encode())
        for streaming in (False, True):
            (row,) = load_rows([str(path)], streaming)
            assert rows.messages(row)[-1]["content"] == "low"
            assert row["place"] == f"{path}:{2 if number == 1 else 1}"
    for content, message in (
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (line.encode("utf-16"), "must be JSON lines in UTF-8"),
    ):
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_rows([str(tmp_path / "bad.jsonl")])
    (tmp_path / "deep.jsonl").write_text('{"messages": ' + "[" * 10**5 + "]" * 10**5 + "}\n")
    (row,) = load_rows([str(tmp_path / "deep.jsonl")])
    with pytest.raises(BadRow, match="deep.jsonl:1: maximum recursion depth"):
        rows.messages(row)


def test_two_processes_equal_one_with_twice_the_batch(start, tones, trained, tmp_path):
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    given = arguments(start, tones, tmp_path, per_device_train_batch_size=2, eval=tones / "test.jsonl")
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "training", *given]
    done = subprocess.run(
        [*command, "--max_new_tokens=2"], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path) == pytest.approx(losses(trained), abs=1e-4)
    torch.testing.assert_close(projector(tmp_path), projector(trained), atol=1e-5, rtol=0)
    assert "eval_wer" in json.loads((tmp_path / "summary.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"load_in_4bit": True},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_cheaper_settings_learn_the_same(start, tones, tmp_path, settings):
    tolerance = {"bf16": 0.05, "load_in_4bit": 0.3}.get(next(iter(settings)), 1e-4)
    run(start, tones, tmp_path, **settings, lr_scheduler_type="constant", max_steps=3)
    run(start, tones, tmp_path / "plain", lr_scheduler_type="constant", max_steps=3)
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "plain"), abs=tolerance)


def test_bfloat16_trains_on_a_cpu_that_is_not_named(start, tones, tmp_path):
    """Where there is no GPU; where there is one, this trains on it. Either says nothing that a user cannot act on."""
    settings = arguments(start, tones, tmp_path, bf16=True, gradient_checkpointing=True, max_steps=1)
    command = [sys.executable, "-m", "training", *settings]
    place = command.index("--use_cpu")
    del command[place : place + 2]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "steps                            1" in done.stdout
    assert not re.search("warn|deprecated|Failed to load|kernels", done.stderr, re.IGNORECASE), done.stderr


def test_help_lists_the_options_of_this_script_first(capsys):
    for option, shows_all in (("--help", False), ("--help-all", True)):
        with pytest.raises(SystemExit) as done:
            train.main([option])
        assert done.value.code == 0
        page = capsys.readouterr().out
        places = [
            page.index(part) for part in ("-m training --stage lora", "options of this tool", "--stage {", "--adapter")
        ]
        assert places == sorted(places)
        assert page.index("--adapter") < page.index("--learning_rate") < page.index("other options:")
        assert ("--adam_beta1" in page) == ("--max_steps MAX_STEPS" in page) == shows_all


def test_rows_are_grouped_by_their_length(start, tones, tmp_path):
    (args,) = train.HfArgumentParser(train.Arguments).parse_args_into_dataclasses(
        arguments(start, tones, tmp_path, train_sampling_strategy="group_by_length")
    )
    rows = train.ChatCollator(AutoProcessor.from_pretrained(start, trust_remote_code=True), needs_audio=True)
    dataset = train.select_rows(train.load_rows(args.data), rows, args)
    assert dataset["length"] == [rows.inputs(row)["input_ids"].shape[1] for row in dataset]
    assert len(set(dataset["length"])) > 3
    assert run(start, tones, tmp_path, train_sampling_strategy="group_by_length", max_steps=2)["steps"] == 2


def test_rows_tell_their_length(start, tones, tmp_path, monkeypatch):
    settings = {"train_sampling_strategy": "group_by_length", "length_column_name": "seconds"}
    rows = [json.loads(line) for line in (tones / "train.jsonl").read_text().splitlines()]
    for row, seconds in zip(rows, range(len(rows), 0, -1), strict=True):
        row["seconds"] = seconds / 2
    told = tones / "told.jsonl"  # beside the clips
    told.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (args,) = train.HfArgumentParser(train.Arguments).parse_args_into_dataclasses(
        arguments(start, tones, tmp_path, **settings, data=told)
    )
    collator = train.ChatCollator(AutoProcessor.from_pretrained(start, trust_remote_code=True), needs_audio=True)
    with monkeypatch.context() as patched:
        patched.setattr(collator, "inputs", None)  # no file is opened
        dataset = train.select_rows(train.load_rows(args.data), collator, args)
    assert dataset["seconds"] == [row["seconds"] for row in rows]
    assert run(start, tones, tmp_path / "out", **settings, data=told, max_steps=2)["steps"] == 2
    recordings = {"audio": [str(tones / f"train-{number}.wav") for number in range(16)], "text": ["a tone"] * 16}
    recordings["seconds"] = [row["seconds"] for row in rows]
    datasets.Dataset.from_dict(recordings).save_to_disk(tmp_path / "recordings")
    columns = train.load_rows([str(tmp_path / "recordings")], columns=("audio", "text"), keep=("seconds",))
    assert train.select_rows(columns, collator, args)["seconds"] == dataset["seconds"]
    both = datasets.concatenate_datasets([train.load_rows(args.data), columns])
    assert train.select_rows(both, collator, args)["seconds"] == [*dataset["seconds"]] * 2
    for wrong in (None, True, -1, "long", float("nan")):
        told.write_text(json.dumps(rows[0]) + "\n" + json.dumps({**rows[1], "seconds": wrong}) + "\n")
        with pytest.raises(ValueError, match=r"1 of 2 rows.*\n.*told.jsonl:2: the length `seconds` is"):
            train.select_rows(train.load_rows(args.data), collator, args)


def test_cached_encoder_encodes_a_window_once(start, tones, trained, tmp_path, monkeypatch):
    cache, seen = tmp_path / "cache", []
    forward = train.WhisperEncoder.forward
    monkeypatch.setattr(
        train.WhisperEncoder, "forward", lambda self, x, **kwargs: seen.append(len(x)) or forward(self, x, **kwargs)
    )
    run(start, tones, tmp_path / "out", encoder_cache=cache)  # one epoch and a half
    assert sum(seen) == len(list(cache.rglob("*.safetensors"))) == 16
    assert losses(tmp_path / "out") == pytest.approx(losses(trained), abs=1e-5)
    run(start, tones, tmp_path / "again", encoder_cache=cache)
    assert sum(seen) == 16


def test_cached_encoder_keeps_the_rows_of_the_clip(start, tones, trained, tmp_path):
    cache, trimmed = tmp_path / "cache", {"audio_tokens": "trimmed"}

    def rows_kept() -> set[int]:
        return {len(load_file(path)["last_hidden_state"]) for path in cache.rglob("*.safetensors")}

    run(start, tones, tmp_path / "trimmed", **trimmed)
    run(start, tones, tmp_path / "cached", **trimmed, encoder_cache=cache)
    assert rows_kept() == {50}  # of 150 in a window: the clips are of 1 s
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "trimmed"), abs=1e-5)
    run(start, tones, tmp_path / "fixed", encoder_cache=cache)  # needs the other rows as well
    assert rows_kept() == {150}
    assert losses(tmp_path / "fixed") == pytest.approx(losses(trained), abs=1e-5)
    run(start, tones, tmp_path / "again", **trimmed, encoder_cache=cache)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "trimmed"), abs=1e-5)


def test_damaged_entries_of_the_encoder_cache_are_encoded_again(start, tones, tmp_path, caplog, monkeypatch):
    model = AutoModel.from_pretrained(start, trust_remote_code=True)
    windows = torch.randn(6, model.config.audio_config.num_mel_bins, 300, generator=torch.Generator().manual_seed(0))
    expected = model.model.audio_encoder(windows).last_hidden_state
    encoder = train.CachedEncoder.of(model.model.audio_encoder, str(tmp_path))
    paths = []
    for window in windows:  # one at a time, so that it is known whose file is new
        encoder(window[None])
        paths += {*encoder.folder.iterdir()} - {*paths}
    contents = [path.read_bytes() for path in paths]
    rows = load_file(paths[3])["last_hidden_state"]
    for path, content in zip(
        paths[:5],
        (
            contents[0][:-128],
            contents[1][:-128] + bytes(128),
            contents[2][:-4] + b"\xff" * 4,  # NaN
            save({"last_hidden_state": rows.T.contiguous()}, {"sha256": "0" * 64}),
            contents[5],  # of another window
        ),
        strict=True,
    ):
        path.write_bytes(content)
    with caplog.at_level("WARNING"):
        encoded = encoder(windows).last_hidden_state
    torch.testing.assert_close(encoded, expected)
    assert sorted(record.message.split()[0] for record in caplog.records) == sorted(map(str, paths[:5]))
    assert {*encoder.folder.iterdir()} == {*paths}
    monkeypatch.setattr(train.WhisperEncoder, "forward", None)  # all of them are read
    assert torch.equal(encoder(windows).last_hidden_state, encoded)


def test_only_answers_get_logits(start, rows, tones, tmp_path, sound):
    (args,) = train.HfArgumentParser(train.Arguments).parse_args_into_dataclasses(arguments(start, tones, tmp_path))
    trainer = train.AnswerTrainer(train.load_model(args), args, data_collator=rows)
    batch = rows([chat(audio(sound(2)), text("Why?"), answer=answer) for answer in ("low", "high and high and low")])
    shapes = []
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[1]))
    with torch.no_grad():
        spared, whole = trainer.compute_loss(trainer.model, batch), trainer.model(**batch).loss
    assert spared.item() == pytest.approx(whole.item(), abs=1e-5)
    assert shapes[0] < 30 and shapes[1] == batch["input_ids"].shape[1] > 150


def test_projector_has_a_learning_rate_of_its_own(start, tones, tmp_path):
    run(start, tones, tmp_path, stage="lora", lora_r=4, max_steps=2, learning_rate=1e-2, projector_learning_rate=1e-9)
    learned = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stored = load_file(start / "model.safetensors")["model.audio_projector.weight"]
    (projector,) = (tensor for name, tensor in learned.items() if "audio_projector" in name)
    assert torch.allclose(projector, stored.float(), atol=1e-7)
    assert max(tensor.abs().max() for name, tensor in learned.items() if "lora_B" in name) > 1e-3


def test_run_starts_from_an_adapter(start, tones, tmp_path):
    lora = {"stage": "lora", "lora_r": 4, "lora_dropout": 0}
    run(start, tones, tmp_path / "first", **lora, max_steps=2)
    adapter = tmp_path / "first" / "adapter"
    run(start, tones, tmp_path / "second", **lora, max_steps=1, learning_rate=1e-12, adapter=adapter)
    first, second = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-9) for name in first)
    with pytest.raises(ValueError, match="is of other arguments: r is 4 there, 8 here"):
        run(start, tones, tmp_path / "third", **{**lora, "lora_r": 8}, adapter=adapter)


def test_adapter_becomes_a_folder(start, tones, tmp_path):
    """`upload.py build` merges what `train.py` wrote into the model that it belongs to."""
    run(start, tones, tmp_path, stage="lora", lora_r=4, max_steps=3, train_markers=True, audio_tokens="trimmed")
    adapter = tmp_path / "adapter"
    folder = upload.build(checkpoint=adapter, output=tmp_path / "repo")
    checking.check_files(folder)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert processor.audio_tokens == processor.trained_audio_tokens == "trimmed"
    before, after = (load_file(path / "model.safetensors") for path in (start, folder))
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        name for name in before if re.search("visual|audio_encoder|norm|lm_head|bias", name)
    }

    merged = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    base = AutoModel.from_pretrained(start, trust_remote_code=True, dtype="auto")
    unmerged = train.PeftModel.from_pretrained(base, adapter).eval()
    question = train.ChatCollator(processor).messages(train.load_rows([str(tones / "test.jsonl")])[0])[:1]
    inputs = processor.apply_chat_template(
        question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(merged.generate(**inputs, **settings), unmerged.generate(**inputs, **settings))

    described = json.loads((adapter / "adapter_config.json").read_text())
    for change, message in (
        ({"base_model_name_or_path": None}, "adapter_config.json names no base_model_name_or_path"),
        ({"base_model_name_or_path": str(start.parent / "qwen2-vl")}, "holds a qwen2_vl model"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**described, **change}))
        with pytest.raises(ValueError, match=message):
            upload.build(checkpoint=adapter, output=tmp_path / "none")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no adapter_model.safetensors"):
        upload.build(checkpoint=adapter, output=tmp_path / "none")


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_datasets(start, rows, tones, photo, tmp_path, streaming):
    """Arrow fills missing keys with None; sound and pictures come as the bytes of their files."""
    item = {
        "type": datasets.Value("string"),
        "text": datasets.Value("string"),
        "audio": datasets.Audio(),
        "image": datasets.Image(),
    }
    message = {"role": datasets.Value("string"), "content": datasets.List(item)}
    features = datasets.Features({"id": datasets.Value("int64"), "messages": datasets.List(message)})
    content = [audio(str(tones / "train-1.wav")), image(str(photo)), text("Which tone?")]
    made = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": [text("middle")]}]}
    datasets.Dataset.from_list([{"id": 1, **made}] * 4, features=features).save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    datasets.load_from_disk(tmp_path / "saved").to_parquet(tmp_path / "parquet" / "train.parquet")

    expected = rows.inputs({**made, "place": "here:1"})
    for source in (tmp_path / "saved", tmp_path / "parquet"):
        loaded = train.load_rows([str(source)], streaming)
        assert isinstance(loaded, datasets.IterableDataset) == streaming
        row = next(iter(loaded))
        assert row["place"] == f"{source}:1"
        inputs = rows.inputs(row)
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert (
        run(start, tones, tmp_path / "out", data=tmp_path / "parquet", streaming=streaming, max_steps=2)["steps"] == 2
    )
    with pytest.raises(ValueError, match="has columns id; expected `messages`"):
        datasets.Dataset.from_list([{"id": 1}]).save_to_disk(tmp_path / "other")
        train.load_rows([str(tmp_path / "other")])


def test_streamed_rows_that_are_bad_are_left_out_by_name(start, tones, tmp_path):
    for file in tones.glob("train-*.wav"):
        shutil.copyfile(file, tmp_path / file.name)
    data = write(tmp_path / "some.jsonl", ["not json", *(tones / "train.jsonl").read_text().splitlines()])
    with pytest.raises(ValueError, match=r"some\.jsonl:1: Expecting value"):
        run(start, tones, tmp_path / "out", data=data, streaming=True, max_steps=1)
    assert (
        run(start, tones, tmp_path / "out2", data=data, streaming=True, skip_bad_rows=True, max_steps=1)["steps"] == 1
    )


def test_error_rates_are_those_of_the_answers(start, tones, tmp_path):
    found = run(start, tones, tmp_path / "out", eval=tones / "test.jsonl", max_steps=1, max_new_tokens=4)
    model = AutoModel.from_pretrained(start, trust_remote_code=True, dtype="auto")
    model = train.PeftModel.from_pretrained(model, tmp_path / "out" / "adapter").eval()
    processor = AutoProcessor.from_pretrained(start, trust_remote_code=True)
    expected, given = [], []
    for row in map(json.loads, (tones / "test.jsonl").read_text().splitlines()):
        question, answer = row["messages"]
        question["content"][0]["audio"] = str(tones / question["content"][0]["audio"])
        inputs = processor.apply_chat_template(
            [question], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        expected.append(answer["content"])
        given.append(normalize(processor.batch_decode(output, skip_special_tokens=True)[0]))
    assert found["eval_wer"] == pytest.approx(jiwer.wer(expected, given), abs=1e-4)
    assert found["eval_cer"] == pytest.approx(jiwer.cer(expected, given), abs=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stage": "all"}, "--stage is 'all'"),
        ({"save_total_limit": 1}, "leaves nothing"),
        ({"model": ""}, "--model is missing"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train.Arguments(**{"model": "start", "data": ["train.jsonl"], "output_dir": str(tmp_path), **more})


@pytest.mark.parametrize(("name", "processes"), [("fsdp-8-gpus", 8), ("fsdp-nodes", 32)])
def test_fsdp_settings_are_those_of_accelerate(start, name, processes):
    parser = launch.launch_command_parser()
    args, config, _ = launch._validate_launch_command(
        parser.parse_args(["--config_file", str(paths.ROOT / "training" / f"{name}.yaml"), "-m", "training"])
    )
    assert args.use_fsdp and args.num_processes == processes == config.num_processes
    assert args.fsdp_version == 2 and args.mixed_precision == "bf16"
    model = AutoModel.from_pretrained(start, trust_remote_code=True)
    classes = {type(module).__name__ for module in model.modules()}
    assert classes >= set(args.fsdp_transformer_layer_cls_to_wrap.split(","))


# One process each; the classes are sharded as accelerate shards them.
FSDP_STEP = """
    import sys
    from datetime import timedelta
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModel

    def step(rank):
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", store, timedelta(seconds=30), rank=rank, world_size=3)
        mesh = torch.distributed.init_device_mesh("cpu", (3,))
        for module in [*model.modules()]:
            if type(module).__name__ in classes.split(","):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=0.1), torch.load(f"{folder}/batch-{rank}.pt")
        before = model(**batch).loss
        before.backward()
        optimizer.step()
        with torch.no_grad():
            after = model.eval()(**batch).loss
        weights = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        torch.save(([before.item(), after.item()], weights if rank == 0 else None), f"{folder}/result-{rank}.pt")

    folder, repo, classes = sys.argv[1:]
    model = AutoModel.from_pretrained(repo, trust_remote_code=True).train()
    torch.multiprocessing.start_processes(step, nprocs=3, start_method="fork")
    print("TOKENS")
    """


def test_processes_of_fsdp_need_not_have_the_same_inputs(repo, processor, fresh_model, photo, sound, tmp_path):
    """One process has audio and a video, one only text, one only pictures; they learn as one process with all rows."""
    settings = yaml.safe_load((paths.ROOT / "training" / "fsdp-8-gpus.yaml").read_text())["fsdp_config"]
    assert settings["fsdp_version"] == 2
    collator, picture = train.ChatCollator(processor), image(Image.open(photo).resize((56, 56)))
    contents = [[audio(sound(1)), text("Which?"), video([picture["image"]] * 2)], [text("Why?")], [picture]]
    batches = [collator([chat(*content, answer="low and high")]) for content in contents]
    for rank, batch in enumerate(batches):
        torch.save(batch, tmp_path / f"batch-{rank}.pt")
    classes = settings["fsdp_transformer_layer_cls_to_wrap"]
    answer(start_python(FSDP_STEP, str(tmp_path), str(repo), classes, env={**os.environ, "OMP_NUM_THREADS": "1"}))

    model, losses = fresh_model.float().train(), []
    for batch in batches:
        loss = model(**batch).loss
        (loss / len(batches)).backward()
        losses.append(loss.item())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    results = [torch.load(tmp_path / f"result-{rank}.pt") for rank in range(3)]
    with torch.no_grad():
        after = [model.eval()(**batch).loss.item() for batch in batches]
    assert torch.tensor([loss for loss, _ in results]).numpy() == pytest.approx(torch.tensor([losses, after]).T.numpy())
    weights = model.state_dict()
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=1e-5)


def test_encoder_cache_is_refused_under_fsdp(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate does
    with pytest.raises(ValueError, match="--encoder_cache cannot be used with FSDP"):
        train.Arguments(model="start", data=["a.jsonl"], output_dir=str(tmp_path), use_cpu=True, encoder_cache="cache")


def test_kinds_of_audio_tokens(start, tones, tmp_path, sound):
    """`both` draws one for each batch, the same for the same rows; what was trained is written down, and built on."""
    processor = AutoProcessor.from_pretrained(start, trust_remote_code=True)
    rows = [{**row, "place": f"x:{number}"} for number, row in enumerate([chat(audio(sound(1)))] * 8)]
    lengths = {"fixed": 150, "trimmed": 50}
    for kind, length in lengths.items():
        batch = train.ChatCollator(processor, audio_tokens=kind)(rows[:2])
        assert (batch["input_ids"] == processor.audio_token_id).sum(1).tolist() == [length] * 2
    counts = [
        (train.ChatCollator(processor, audio_tokens="both")([row])["input_ids"] == processor.audio_token_id).sum()
        for row in rows + rows
    ]
    assert set(map(int, counts)) == set(lengths.values()) and counts[:8] == counts[8:]

    run(start, tones, tmp_path / "run", audio_tokens="both", max_steps=2, export=tmp_path / "export")
    exported = AutoProcessor.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert (exported.audio_tokens, exported.trained_audio_tokens) == ("fixed", "both")
    learned = tmp_path / "run" / "audio_projector.safetensors"
    assert checkpoints.read_audio_tokens(learned) == ("fixed", "both")
    trimmed = upload.build(checkpoint=start, projector=learned, output=tmp_path / "trimmed", audio_tokens="trimmed")
    built = AutoProcessor.from_pretrained(trimmed, trust_remote_code=True)
    assert (built.audio_tokens, built.trained_audio_tokens) == ("trimmed", "both")
    again = AutoProcessor.from_pretrained(
        upload.build(checkpoint=trimmed, output=tmp_path / "again"), trust_remote_code=True
    )
    assert (again.audio_tokens, again.trained_audio_tokens) == ("trimmed", "both")
    with pytest.raises(ValueError, match="audio_tokens must be fixed, trimmed or both, got 'half'"):
        run(start, tones, tmp_path / "half", audio_tokens="half")


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_that_no_decoder_reads_are_left_out_by_name(start, tones, photo, tmp_path, streaming):
    """A flipped bit in the name of its second chunk of data makes Pillow raise SyntaxError for a PNG."""
    content = bytearray(photo.read_bytes())
    content[content.index(b"IDAT", content.index(b"IDAT") + 4)] ^= 0x80
    item = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    item |= {"audio": datasets.Audio(decode=False), "image": datasets.Image(decode=False)}
    message = {"role": datasets.Value("string"), "content": datasets.List(item)}
    clip = (tones / "train-0.wav").read_bytes()
    chats = [
        chat(audio({"bytes": clip}), image({"bytes": picture}), answer=[text("low")])
        for picture in (photo.read_bytes(), bytes(content))
    ]
    features = datasets.Features({"messages": datasets.List(message)})
    datasets.Dataset.from_list(chats, features=features).save_to_disk(tmp_path / "saved")
    more = {"data": tmp_path / "saved", "streaming": streaming, "max_steps": 2, "per_device_train_batch_size": 1}
    with pytest.raises(ValueError, match="saved:2: SyntaxError: broken PNG file"):
        run(start, tones, tmp_path / "out", **more)
    assert run(start, tones, tmp_path / "left-out", **more, skip_bad_rows=True)["rows"] == (None if streaming else 1)


def test_other_content_under_the_same_name_is_another_run(start, tones, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (args,) = train.HfArgumentParser(train.Arguments).parse_args_into_dataclasses(
        arguments(start, tones, tmp_path / "run")
    )
    train.refuse_another_run(args)
    clip = tones / "train-3.wav"
    changed = clip.stat().st_mtime
    try:
        os.utime(clip, (0, 0))
        with pytest.raises(ValueError, match="holds checkpoints of another run: files of train.jsonl was .*, is "):
            train.refuse_another_run(args)
        path = tmp_path / "run" / "arguments.json"
        written = json.loads(path.read_text())
        del written["content of data"]  # as a run wrote them that did not describe its data
        path.write_text(json.dumps(written))
        train.refuse_another_run(args)
    finally:
        os.utime(clip, (changed, changed))
